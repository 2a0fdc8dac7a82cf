"""What capture costs: one training step of a ViLT-base-size model, with and without it.

    python -m benchmarks.capture_cost [--device cuda] [--rounds 9]

12 layers of width 768, 40 text and 185 image tokens, batch 4, forward and backward. The captured step takes the last
layer and adds `cacr_loss`. All variants of a round stand side by side, and the plain step runs twice in each: the ratio
of the two (A/A) is what noise alone does. On CPU it counts processor time in one thread, which others on the machine
disturb less than the clock on the wall. Two models: timm blocks with fused attention, and transformers' BERT with
sdpa, which can also do it the usual way, eager with `output_attentions=True`. Writes
`benchmarks/results/capture-cost-*.json`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from attncongruence import cacr_loss, capture_attention
from benchmarks import record
from benchmarks.record import Results, paired, ratio, write

TEXT, IMAGE, WIDTH, LAYERS, HEADS, BATCH = 40, 185, 768, 12, 12, 4


class Blocks(nn.Module):
    """timm's transformer blocks: attention is fused by default."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(WIDTH, HEADS, qkv_bias=True) for _ in range(LAYERS)])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The last layer's output."""
        for block in self.blocks:
            tokens = block(tokens, attn_mask=mask[:, None, None])
        return tokens


def bert(kernel: str) -> BertModel:
    """An encoder of the same size from transformers, fed with embeddings."""
    config = BertConfig(hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, vocab_size=2)
    return BertModel._from_config(config, attn_implementation=kernel)


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Token embeddings and their mask; every second caption has ten tokens of padding."""
    torch.manual_seed(0)
    mask = torch.ones(BATCH, TEXT + IMAGE, dtype=torch.bool)
    mask[::2, TEXT - 10 : TEXT] = False
    return torch.randn(BATCH, TEXT + IMAGE, WIDTH).to(device), mask.to(device)


def step(model: nn.Module, loss: Callable[[], Tensor], device: str) -> Callable[[], None]:
    """Forward and backward, waited for."""

    def run() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def timm_steps(device: str) -> dict[str, Callable[[], None]]:
    """Plain twice, and captured."""
    tokens, mask = batch(device)
    model = Blocks().to(device).train()

    def plain() -> Tensor:
        return model(tokens, mask).square().mean()

    def captured() -> Tensor:
        with capture_attention(model, "blocks.11.attn") as capture:
            main = model(tokens, mask).square().mean()
            return main + 0.1 * cacr_loss(capture.pop(), TEXT)

    return {
        "plain": step(model, plain, device),
        "again": step(model, plain, device),
        "captured": step(model, captured, device),
    }


def added(device: str, rounds: int, clock: Callable[[], float], whole: float) -> dict[str, dict[str, float]]:
    """The same ratio from the added work alone, which is local: one attention layer with and without it.

    What capture adds to a step happens in the last layer's attention and in the loss on it; its gradient joins the
    main one at q and k. That layer alone takes a fortieth of a step, so many rounds fit between two disturbances.
    """
    tokens, mask = batch(device)
    layer = Block(WIDTH, HEADS, qkv_bias=True).attn.to(device).train()
    tokens.requires_grad_()

    def plain() -> Tensor:
        return layer(tokens, attn_mask=mask[:, None, None]).square().mean()

    def captured() -> Tensor:
        with capture_attention(layer, layer) as capture:
            main = plain()
            return main + 0.1 * cacr_loss(capture.pop(), TEXT)

    steps = {"plain": plain, "again": plain, "captured": captured}
    seconds = paired({name: step(layer, loss, device) for name, loss in steps.items()}, rounds, clock=clock)
    return {
        name: ratio([whole + b - a for a, b in zip(seconds["plain"], times, strict=True)], [whole] * rounds)
        for name, times in seconds.items()
        if name != "plain"
    }


def bert_steps(device: str) -> dict[str, Callable[[], None]]:
    """Plain twice, captured, and the usual way: all layers eager, probabilities returned."""
    tokens, mask = batch(device)
    model, eager = bert("sdpa").to(device).train(), bert("eager").to(device).train()
    inputs = {"inputs_embeds": tokens, "attention_mask": mask.long()}

    def plain() -> Tensor:
        return model(**inputs).last_hidden_state.square().mean()

    def captured() -> Tensor:
        with capture_attention(model, "encoder.layer.11.attention.self") as capture:
            main = plain()
            return main + 0.1 * cacr_loss(capture.pop(), TEXT)

    def usual() -> Tensor:
        out = eager(**inputs, output_attentions=True)
        # What people do: dropout included, and the log of zeros kept out by hand.
        scores = out.attentions[-1].clamp(min=1e-9).log()
        return out.last_hidden_state.square().mean() + 0.1 * cacr_loss(scores, TEXT, mask=mask)

    steps = {"plain": plain, "again": plain, "captured": captured}
    made = {name: step(model, loss, device) for name, loss in steps.items()}
    return made | {"eager, output_attentions": step(eager, usual, device)}


def report(name: str, ratios: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Print one block of results."""
    for other, numbers in ratios.items():
        row = "  ".join(f"{key} {value:.3f}" for key, value in numbers.items())
        print(f"{name:26} {other:26} {row}", flush=True)
    return ratios


def table(results: Results) -> str:
    """The ratios as Markdown."""
    return record.table("a step, against the plain one", results, "{:.3f}".format)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    results, whole = {}, 0.0
    for name, steps in (("transformers BERT, sdpa", bert_steps), ("timm blocks, fused", timm_steps)):
        seconds = paired(steps(options.device), options.rounds, clock=clock)
        ratios = {other: ratio(times, seconds["plain"]) for other, times in seconds.items() if other != "plain"}
        results[name] = report(name, ratios)
        whole = statistics.median(seconds["plain"])
    name = "timm, added work alone"
    results[name] = report(name, added(options.device, 20 * options.rounds, clock, whole))
    print(f"written to {write(f'capture-cost-{options.device}', 'benchmarks.capture_cost', results)}")


if __name__ == "__main__":
    main()
