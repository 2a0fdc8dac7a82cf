"""Add CACR to an existing training loop: the five lines marked `new`. Use your own model and loader.

python -m examples.add_cacr
"""

from __future__ import annotations

import torch
from transformers import ViltConfig, ViltForQuestionAnswering

from attncongruence import cacr_loss, capture_attention, exponential_warmup
from attncongruence.integrations.huggingface import token_layout

STEPS, TEXT = 60, 12


def main(steps: int = STEPS, scale: float = 1.0) -> list[dict[str, float]]:
    """Train a small ViLT on one synthetic batch and print both losses; `scale` 0 trains without the congruence loss."""
    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViltConfig(**small, image_size=64, patch_size=16, vocab_size=100, num_labels=4, initializer_range=0.2)
    model = ViltForQuestionAnswering(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    words = torch.randint(4, TEXT + 1, (8, 1))
    batch = {
        "input_ids": torch.randint(1, 100, (8, TEXT)),
        "attention_mask": (torch.arange(TEXT) < words).long(),
        "pixel_values": torch.randn(8, 3, 64, 64),
        "labels": torch.eye(4).repeat(2, 1),
    }

    capture = capture_attention(model)  # new: the last self-attention, whatever kernel it runs
    weight = exponential_warmup(total_steps=steps)  # new
    history = []
    for step in range(steps):
        main_loss = model(**batch).loss
        captured = capture.pop()  # new
        congruence = cacr_loss(captured, token_layout(model, batch, captured))  # new: without padding
        loss = main_loss + scale * weight(step) * congruence  # new
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"main": main_loss.item(), "congruence": congruence.item(), "weight": weight(step)})
        if step % 10 == 0 or step == steps - 1:
            figures = "  ".join(f"{name} {value:.5f}" for name, value in history[-1].items())
            print(f"step {step:3d}  {figures}")
    capture.close()
    return history


if __name__ == "__main__":
    main()
