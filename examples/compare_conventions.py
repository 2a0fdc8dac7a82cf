"""How large are each congruence loss and its gradient on your model? Put your own model and batch in `load`.

    python -m examples.compare_conventions

For the last self-attention and one batch, the table has each loss, the norm of its gradient, and the weight at which
that norm equals the norm of the main loss's gradient. A loss whose gradient is a hundred times that of the main loss
needs a small weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltForQuestionAnswering

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, cacr_loss, capture_attention, iais_loss
from attncongruence.integrations.huggingface import token_layout

LOSSES = {
    "IAIS singular, RELEASED": lambda S, layout: iais_loss(S, layout),
    "CACR, RELEASED": lambda S, layout: cacr_loss(S, layout, convention=RELEASED),
    "CACR, PRINTED": lambda S, layout: cacr_loss(S, layout, convention=PRINTED),
    "CACR, WEIGHTED_MEAN": lambda S, layout: cacr_loss(S, layout, convention=WEIGHTED_MEAN),
}


class Row(NamedTuple):
    """One loss on one batch."""

    name: str
    loss: float
    gradient: float
    equal_weight: float


def load() -> tuple[nn.Module, dict[str, Tensor]]:
    """Your model, and a batch with labels."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViltConfig(**small, image_size=64, patch_size=16, vocab_size=100, num_labels=3, initializer_range=0.1)
    words = torch.tensor([9, 6])  # of 10, the others are padding
    batch = {
        "input_ids": torch.randint(1, 100, (2, 10)),
        "attention_mask": (torch.arange(10) < words[:, None]).long(),
        "pixel_values": torch.randn(2, 3, 64, 64),
        "labels": torch.eye(3)[:2],
    }
    return ViltForQuestionAnswering(config).train(), batch


def compare(model: nn.Module, batch: dict[str, Any]) -> tuple[float, list[Row]]:
    """The norm of the main loss's gradient, and a row for each congruence loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def norm(loss: Tensor) -> float:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return float(torch.stack([grad.norm() for grad in found if grad is not None]).norm())

    with capture_attention(model) as capture:
        main = model(**batch).loss
        captured = capture.pop()
    layout = token_layout(model, batch, captured)  # or a TokenLayout of your own
    reference, rows = norm(main), []
    for name, function in LOSSES.items():
        loss = function(captured, layout)
        gradient = norm(loss)
        rows.append(Row(name, loss.item(), gradient, reference / gradient))
    return reference, rows


def main() -> None:
    """Print the table."""
    reference, rows = compare(*load())
    print(f"norm of the main loss's gradient: {reference:.3g}\n")
    print(f"{'':24} {'loss, nats':>12} {'gradient':>12} {'equal at weight':>16}")
    for row in rows:
        print(f"{row.name:24} {row.loss:12.4g} {row.gradient:12.4g} {row.equal_weight:16.4g}")


if __name__ == "__main__":
    main()
