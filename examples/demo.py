"""Image-text matching with a real ViLT, trained without and with the congruence loss.

    python -m examples.demo [--steps 300] [--seed 0] [--json PATH]

A tiny ViLT (random weights; transformers' own model, image processor and tokenizer) learns whether a caption is true
of a picture of colored shapes. Captions and pictures differ in size, so both are padded. The model is trained twice
from the same weights on the same batches. The table at the end describes its last attention layer on held-out scenes.
This shows how the parts work together; one short run with one seed is no evidence for or against the loss.
"""

import argparse
import json
import math
import platform
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import BertTokenizer, ViltConfig, ViltForImageAndTextRetrieval, ViltImageProcessor, ViltProcessor

import attncongruence
from attncongruence import TokenLayout, cacr_loss, capture_attention, exponential_warmup
from benchmarks.compositionality.scenes import Item, World

WORLD = World(shapes=(2, 3), pictures=((96, 96), (144, 96), (96, 128), (160, 128)), sized=0.25, clauses=0.25)
TRAINING_SCENES, HELD_OUT_SCENES = 400, 200
PATCH, PICTURE = 16, 96  # pixels: a patch, and the shorter side of a picture after the processor
MATCHED = 16  # matched pairs in a batch, and as many mismatched ones
SWAPPED = 0.25  # share of mismatched pairs whose two nouns are exchanged; the rest has another scene's caption

# The rows of the table: name in the JSON file, label, and number format.
ROWS = (
    ("other_caption", "prefers own caption to another scene's (%)", "{:.1f}"),
    ("swapped_caption", "prefers own caption to swapped roles (%)", "{:.1f}"),
    ("language", "congruence loss, language (1e-3 nats)", "{:.3f}"),
    ("vision", "congruence loss, vision (1e-3 nats)", "{:.3f}"),
    ("text_to_image", "share of text's attention on image (%)", "{:.1f}"),
    ("entropy", "entropy of text-to-image attention (bits)", "{:.2f}"),
    ("projected_entropy", "entropy of projected attention (bits)", "{:.2f}"),
)

Pair = tuple[Item, Item]  # the picture is from the first, the caption from the second
Figures = dict[str, float]


class Batch(NamedTuple):
    """Encoded pairs, and which positions of the model's joint sequence are words and patches."""

    inputs: dict[str, Tensor]
    layout: TokenLayout


def make_processor(captions: Sequence[str]) -> ViltProcessor:
    """ViLT's own processor, whose vocabulary has only the words of these captions."""
    words = sorted({word for caption in captions for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    images = ViltImageProcessor(size={"shortest_edge": PICTURE}, size_divisor=PATCH)
    return ViltProcessor(images, BertTokenizer(vocab=vocabulary))


def make_model(vocab_size: int) -> ViltForImageAndTextRetrieval:
    """transformers' ViLT with its matching head, tiny and untrained."""
    return ViltForImageAndTextRetrieval(
        ViltConfig(
            vocab_size=vocab_size,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=PICTURE,
            patch_size=PATCH,
            initializer_range=0.2,  # the usual 0.02 suits widths near 768; at 64 the model learns nothing in a minute
        )
    )


def joint_layout(
    inputs: dict[str, Tensor], special_ids: Sequence[int], patch: int, max_image_length: int = -1
) -> TokenLayout:
    """Where ViLT puts words and patches: `[CLS] words [SEP] padding | [image CLS] patches padding`.

    In each forward pass ViLT shuffles the patches of a picture, and draws which ones it keeps if there are more than
    `max_image_length`. Patches always come before padding, so their number says where they are. The image part is as
    long as the largest picture of the batch. The three special tokens are left out, because the losses ignore positions
    that are neither text nor image.
    """
    words = inputs["attention_mask"].bool()
    for special in special_ids:
        words = words & (inputs["input_ids"] != special)
    patches = inputs["pixel_mask"][:, ::patch, ::patch].flatten(1).sum(1)
    if max_image_length > 0:
        patches = patches.clamp(max=max_image_length)
    image = torch.arange(-1, int(patches.max()), device=patches.device)  # -1 is the image's [CLS]
    return TokenLayout.from_segments(words, (image >= 0) & (image < patches[:, None]))


def encode(processor: ViltProcessor, pairs: Sequence[Pair]) -> Batch:
    """Pictures and captions as model inputs, padded to the largest and to the longest of the batch."""
    pictures, captions = [picture.image for picture, _ in pairs], [caption.caption for _, caption in pairs]
    inputs = dict(processor(images=pictures, text=captions, padding=True, return_tensors="pt"))
    tokenizer = processor.tokenizer
    return Batch(inputs, joint_layout(inputs, (tokenizer.cls_token_id, tokenizer.sep_token_id), PATCH))


def other_caption(item: Item, pool: Sequence[Item], rng: random.Random) -> Item:
    """A caption of another scene that is false of this one."""
    while (other := rng.choice(pool)).true_in(item.scene):
        pass
    return other


def mismatched_pair(item: Item, pool: Sequence[Item], rng: random.Random) -> Pair:
    """A picture and a false caption, one of which is the item's."""
    if rng.random() >= SWAPPED:
        return item, other_caption(item, pool, rng)
    return rng.choice([(item, item.swapped()), (item.swapped(), item)])


def training_batches(items: Sequence[Item], processor: ViltProcessor, steps: int, seed: int) -> Iterator[Batch]:
    """Batches of matched pairs, followed by one mismatched pair for each of them."""
    rng = random.Random(seed)
    for _ in range(steps):
        chosen = rng.sample(items, MATCHED)
        matched = [(item, item) for item in chosen]
        yield encode(processor, matched + [mismatched_pair(item, items, rng) for item in chosen])


def train(
    model: nn.Module, batches: Iterator[Batch], steps: int, weight: Callable[[int], float], name: str
) -> list[Figures]:
    """An ordinary training loop with three more lines: `capture`, `congruence`, and the sum of the two losses."""
    labels = torch.cat([torch.ones(MATCHED), torch.zeros(MATCHED)])
    positives = slice(0, MATCHED)  # a caption that is false of its picture need not agree with it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = []
    capture = capture_attention(model)  # the last self-attention
    bar = tqdm(batches, total=steps, desc=name, bar_format="{desc} {n_fmt}/{total_fmt} {bar} {remaining}{postfix}")
    for step, batch in enumerate(bar):
        logits = model(**batch.inputs).logits[:, 0]
        main = F.binary_cross_entropy_with_logits(logits, labels)
        congruence = cacr_loss(capture.pop()[positives], batch.layout[positives])
        loss = main + weight(step) * congruence
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"main": main.item(), "congruence": congruence.item(), "weight": weight(step)})
        bar.set_postfix({key: f"{value:.4f}" for key, value in history[-1].items()}, refresh=False)
    capture.close()
    return history


def attention_figures(scores: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """The last rows of the table for each sample, `(batch,)` each."""
    of_text: Tensor = layout.text
    probs = scores.softmax(-1)

    def over_text(values: Tensor) -> Tensor:
        return (values * of_text).sum(1) / of_text.sum(1)

    def entropy(rows: Tensor) -> Tensor:  # - sum_j p_j log2 p_j, with p the rows scaled to a sum of 1
        total = rows.sum(-1, keepdim=True)
        bits: Tensor = torch.special.entr(rows / total.where(total > 0, 1.0)).sum(-1) / math.log(2)
        return bits

    to_image = probs * layout.image[:, None, None, :]
    # The maps of the loss: softmax inside the block, mean over heads. Text rows hold A_LV, image rows A_VV.
    maps = (to_image / to_image.sum(-1, keepdim=True)).mean(1)
    E = maps * of_text[:, :, None]
    return {
        "language": 1e3 * cacr_loss(scores, layout, direction="language", reduction="none"),
        "vision": 1e3 * cacr_loss(scores, layout, direction="vision", reduction="none"),
        "text_to_image": 100 * over_text(to_image.sum(-1).mean(1)),
        "entropy": over_text(entropy(to_image).mean(1)),
        "projected_entropy": over_text(entropy(E @ maps @ E.mT)),  # E VV E^T
    }


@torch.no_grad()
def evaluate(model: nn.Module, processor: ViltProcessor, items: Sequence[Item], uniform: bool = False) -> Figures:
    """One column of the table: means over held-out scenes. `uniform` replaces the attention by a uniform one."""
    model.eval()
    rng, figures = random.Random(0), defaultdict(list)
    with capture_attention(model, analysis=True) as capture:
        for start in range(0, len(items), 25):
            some = items[start : start + 25]
            false = [[item.swapped() for item in some], [other_caption(item, items, rng) for item in some]]
            pairs = [*zip(some, some, strict=True)] + [pair for f in false for pair in zip(some, f, strict=True)]
            batch = encode(processor, pairs)
            own, swapped, other = model(**batch.inputs).logits[:, 0].view(3, len(some))
            scores, layout = capture.pop()[: len(some)].scores, batch.layout[: len(some)]
            if uniform:
                scores = scores.masked_fill(scores.isfinite(), 0.0)
            figures["other_caption"].append(100.0 * (own > other))
            figures["swapped_caption"].append(100.0 * (own > swapped))
            for name, values in attention_figures(scores, layout).items():
                figures[name].append(values)
    model.train()
    means = {name: float(torch.cat(values).mean()) for name, values in figures.items()}
    return means | ({"other_caption": 50.0, "swapped_caption": 50.0} if uniform else {})


def table(columns: dict[str, Figures]) -> str:
    """The table at the end: one line for each of `ROWS`, one column for each state of the model."""
    wide = max(len(title) for _, title, _ in ROWS)
    lines = [" " * wide + "".join(f"{name:>9}" for name in columns)]
    for name, title, form in ROWS:
        lines.append(f"{title:<{wide}}" + "".join(f"{form.format(column[name]):>9}" for column in columns.values()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Train without and with the loss, print the table, return (and write) all numbers."""
    parser = argparse.ArgumentParser(description="A real ViLT trained without and with the congruence loss.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each of the two runs")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, weights and batches")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all numbers here")
    options = parser.parse_args(arguments)

    torch.set_num_threads(
        1
    )  # the tensors are tiny: several threads mostly wait for each other and can take ten times as long
    start = time.perf_counter()
    items = WORLD.items(TRAINING_SCENES + HELD_OUT_SCENES, options.seed)
    training, held_out = items[:TRAINING_SCENES], items[TRAINING_SCENES:]
    processor = make_processor([item.caption for item in training])
    torch.manual_seed(options.seed)
    untrained = make_model(len(processor.tokenizer))
    print(f"ViLT, {untrained.num_parameters():,} weights; {len(training)} scenes, such as:")
    print("\n".join(f"    {item.image.width} x {item.image.height}  {item.caption}" for item in training[:3]))

    columns = {
        "uniform": evaluate(untrained, processor, held_out, uniform=True),
        "before": evaluate(untrained, processor, held_out),
    }
    history = {}
    for name, weight in (("without", lambda step: 0.0), ("with", exponential_warmup(total_steps=options.steps))):
        torch.manual_seed(options.seed)  # ViLT draws the order of its patches from here
        model = deepcopy(untrained)
        batches = training_batches(training, processor, options.steps, options.seed)
        history[name] = train(model, batches, options.steps, weight, f"{name:<7}")
        columns[name] = evaluate(model, processor, held_out)

    seconds = time.perf_counter() - start
    print(f"""
The last attention layer on {len(held_out)} held-out scenes: if all attention were uniform
(and matching at chance), before training, and after training without and
with the congruence loss.

{table(columns)}

Projected attention is that among patches, in terms of the words: E VV E^T.
Preferences have a standard error of {50 / len(held_out) ** 0.5:.1f} points from the choice of scenes alone;
runs that differ in rounding or seed differ by more.
{options.steps} steps a run, seed {options.seed}, {seconds:.0f} s. One seed is a demonstration, not evidence.""")
    result = {
        "steps": options.steps,
        "seed": options.seed,
        "seconds": seconds,
        "versions": {
            "attncongruence": attncongruence.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "figures": columns,
        "history": history,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
