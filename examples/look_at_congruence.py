"""How congruent is the attention of your model in each layer? Put your own model and batch in `load`.

    python -m examples.look_at_congruence [--picture congruence.png]

For each self-attention over words and patches, this prints the divergence of the words' attention from the projected
attention of the patches (language), the same with words and patches exchanged (vision), and the argmax entropy, which
says how many different patches the words attend to most. With --picture it draws the last layer: the words' attention
beside the projection.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltModel

from attncongruence import (
    WEIGHTED_MEAN,
    CapturedAttention,
    argmax_entropy,
    cacr_loss,
    capture_attention,
    find_attention,
)
from attncongruence.integrations.huggingface import token_layout
from attncongruence.viz import plot_congruence


class Row(NamedTuple):
    """One layer, mean over samples, in nats."""

    layer: str
    language: float
    vision: float
    argmax_entropy: float


def load() -> tuple[nn.Module, dict[str, Tensor]]:
    """Your model and a batch."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViltConfig(**small, image_size=64, patch_size=16, vocab_size=100, initializer_range=0.1)
    batch = {
        "input_ids": torch.randint(1, 100, (2, 9)),
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [5]])).long(),
        "pixel_values": torch.randn(2, 3, 64, 64),
    }
    return ViltModel(config).eval(), batch


@torch.no_grad()
def look(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Row], list[CapturedAttention]]:
    """One row for each layer, and the captured records."""
    with capture_attention(model, layers=find_attention(model), analysis=True) as capture:
        model(**batch)
        layers = capture.pop_all()
    rows = []
    for captured in layers:
        layout = token_layout(model, batch, captured)
        language, vision = (
            cacr_loss(captured, layout, convention=WEIGHTED_MEAN, direction=direction).item()
            for direction in ("language", "vision")
        )
        rows.append(Row(captured.layer, language, vision, argmax_entropy(captured, layout).item()))
    return rows, layers


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and draw the picture if asked."""
    parser = argparse.ArgumentParser(description="How congruent is a model's attention, layer by layer?")
    parser.add_argument("--picture", type=Path, help="where to draw the last layer of the first sample")
    options = parser.parse_args(arguments)
    model, batch = load()
    rows, layers = look(model, batch)
    print(f"{'layer':50} {'language':>10} {'vision':>10} {'argmax entropy':>15}   (nats)")
    for row in rows:
        print(f"{row.layer:50} {row.language:10.4f} {row.vision:10.4f} {row.argmax_entropy:15.4f}")
    if options.picture:
        layout = token_layout(model, batch, layers[-1])
        plot_congruence(layers[-1], layout, convention=WEIGHTED_MEAN).savefig(options.picture)
        print(f"drawn: {options.picture}")


if __name__ == "__main__":
    main()
