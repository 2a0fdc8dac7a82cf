"""Gradients through a capture: checkpointing of both kinds, frozen weights, autocast, memory over many steps."""

import gc
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attncongruence.capture import capture_attention
from tests.helpers.models import Stack
from tests.zoo import CASES, each, needs, run


class Checkpointed(Stack):
    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant))
        return x


def build(reentrant: bool | None, fused: bool = True) -> tuple[Checkpointed, Tensor]:
    torch.manual_seed(0)
    model, x = Checkpointed(fused=fused), torch.randn(2, 5, 16, requires_grad=True)
    model.reentrant = reentrant
    return model, x


def step(model: nn.Module, x: Tensor, layers: object) -> list[Tensor]:
    """Gradients of a main loss and a loss on the capture, over two steps."""
    with capture_attention(model, layers) as capture:
        for _ in range(2):
            model.zero_grad()
            out = model(x)
            record = capture.pop()
            (out.square().mean() + record.scores.square().mean()).backward()
            with pytest.raises(RuntimeError, match="nothing was captured"):
                capture.pop()  # the recomputation in backward left nothing
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("layers", [-1, "layers.1"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpointed_layer_is_recorded_once_with_its_gradient(layers, fused):
    expected = step(*build(None, fused), layers)
    ours = step(*build(False, fused), layers)
    assert all(g.abs().max() > 0 for g in expected)
    for our, their in zip(ours, expected, strict=True):
        torch.testing.assert_close(our, their)


@pytest.mark.needs("transformers>=4.53", reason="gradient_checkpointing_enable takes no options in 4.30")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", each(["llava", "visual_bert"], slow=False))
def test_transformers_checkpointing_trains_what_no_checkpointing_does(name):
    found = []
    for checkpointed in (False, True):
        model, inputs = CASES[name].build()
        if checkpointed:
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with capture_attention(model) as capture:
            out = next(iter(run(model, inputs).values()))
            (out.square().mean() + capture.pop().probs.square().mean()).backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 10
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [-1, "layers.1"])
def test_reentrant_checkpointing_is_refused_by_name(layers):
    model, x = build(True)
    with capture_attention(model, layers) as capture:
        for _ in range(2):
            out = model(x)
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                capture.pop()
            out.sum().backward()


@pytest.mark.parametrize("layers", [-1, "layers.0"])
def test_frozen_queries_and_keys_are_refused(layers):
    model, x = build(None)
    model.requires_grad_(False)
    with capture_attention(model, layers) as capture:
        model(x.detach())
        with pytest.raises(RuntimeError, match=r"captured without gradient.*frozen"):
            capture.pop()
        model(x)  # the input is trained: a loss reaches it through frozen layers
        assert torch.autograd.grad(capture.pop().scores.sum(), x)[0].abs().max() > 0


@pytest.mark.parametrize("fused", [True, False])
def test_autocast_keeps_queries_and_computes_scores_in_float32(fused):
    model, x = build(None, fused)
    with capture_attention(model) as capture, torch.autocast("cpu", torch.bfloat16):
        model(x)
        record = capture.pop()
        scores = record.scores
        assert record.query.dtype == record.key.dtype == torch.bfloat16
        assert scores.dtype == record.probs.dtype == torch.float32
        if fused:  # exactly the float32 product of what the layer has, and not a rounded one
            with torch.autocast("cpu", enabled=False):
                product = record.query.float() @ record.key.float().transpose(-1, -2) / 8**0.5
            torch.testing.assert_close(scores, product, rtol=1e-6, atol=1e-6)
    scores.sum().backward()
    assert model.layers[1].qkv.weight.grad.dtype == torch.float32


@needs("timm_fused")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_give_float32_scores(dtype):
    model, inputs = CASES["timm_fused"].build()
    with capture_attention(model) as capture:
        run(model, inputs)
        exact = capture.pop().scores
        run(model.to(dtype), inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
        scores = capture.pop().scores
    assert scores.dtype == torch.float32
    assert torch.equal(torch.isinf(scores), torch.isinf(exact))
    seen = torch.isfinite(exact)
    assert (scores - exact)[seen].abs().max() < 0.1 * exact[seen].abs().max()


def resident() -> float:
    """Megabytes of this process in memory now; its peak where the system does not say."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("name", each(["timm_fused", "vilt"], slow=False))
def test_two_hundred_steps_keep_neither_tensors_nor_memory(name):
    model, inputs = CASES[name].build()
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    counts, sizes = [], []
    with capture_attention(model) as capture:
        for number in range(201):
            output = run(model, inputs)
            output = output if isinstance(output, Tensor) else output.last_hidden_state
            record = capture.pop()
            loss = output.square().mean() + record.probs.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del output, record, loss
            if number in (20, 200):
                gc.collect()
                counts.append(sum(type(o) in (Tensor, nn.Parameter) for o in gc.get_objects()))
                sizes.append(resident())
    assert counts[0] == counts[1]
    # Megabytes: what allocators do by themselves. One record kept in each step is 13 and 26.
    assert sizes[1] - sizes[0] < 8
