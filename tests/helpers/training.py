"""Two tiny models with losses of their own, and the loop that a person would write: what all trainers must equal."""

import contextlib
from collections.abc import Callable, Iterable

import torch
import transformers
from torch import Tensor, nn

from attncongruence import CACRLoss, TokenLayout, capture_attention, regularize

TEXT, IMAGE_ID = 6, 5
LR = 0.03
Batch = dict[str, Tensor]


def schedule(step: int) -> float:
    """Another weight at each step, and so large that a wrong one shows."""
    return 3.0 + 2.0 * step


def vilt() -> nn.Module:
    """Labels are scores of answers, one row a sample. Its loss is a mean that knows nothing of num_items_in_batch."""
    torch.manual_seed(0)
    config = transformers.ViltConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        vocab_size=50,
        max_position_embeddings=TEXT,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        num_labels=3,
    )
    model = transformers.ViltForQuestionAnswering(config)
    model.accepts_loss_kwargs = False  # its forward takes **kwargs, and Trainer would believe that it uses them
    return model


def vilt_batch(size: int = 8) -> Batch:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (size, TEXT), generator=random)
    mask = torch.ones_like(ids)
    for row, length in enumerate((TEXT, 3, 4, 5, 6, 2, 4, 3)[:size]):
        mask[row, length:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(size, 3, 16, 16, generator=random),
        "labels": torch.rand(size, 3, generator=random),
    }


def llava() -> nn.Module:
    """Labels are tokens, more or fewer a sample. Its loss is a sum divided by num_items_in_batch, if that comes."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlavaConfig(
        vision_config={**small, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        text_config={
            **small,
            "model_type": "llama",
            "vocab_size": 50,
            "num_key_value_heads": 1,
            "initializer_range": 0.2,
        },
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def llava_batch(size: int = 8) -> Batch:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 50, (size, 12), generator=random)
    ids[:, 2:6] = IMAGE_ID
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :7] = -100
    for row, length in enumerate((12, 9, 10, 8, 12, 12, 9, 11)[:size]):
        mask[row, length:] = 0
        labels[row, length:] = -100
    pixels = torch.randn(size, 3, 16, 16, generator=random)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels}


def llava_layout(batch: Batch, captured: object = None) -> TokenLayout:
    return TokenLayout.from_input_ids(batch["input_ids"], IMAGE_ID, batch["attention_mask"])


LOSSES = {"vilt": CACRLoss(), "llava": CACRLoss(direction="language")}
MODELS = {"vilt": (vilt, vilt_batch), "llava": (llava, llava_batch)}


def regularized(name: str, model: nn.Module, **options: object):
    """The line under test."""
    n_text = TEXT if name == "vilt" else llava_layout
    return regularize(model, LOSSES[name], n_text, weight=schedule, **options)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    parts = {key: value.chunk(count) for key, value in batch.items()}
    return [{key: parts[key][number] for key in parts} for number in range(count)]


def rows(batch: Batch) -> list[Batch]:
    """As a data set: a list of samples."""
    return [{key: value[number] for key, value in batch.items()} for number in range(len(batch["labels"]))]


def by_hand(
    name: str,
    steps: Iterable[list[Batch]],
    *,
    weight: Callable[[int], float] = schedule,
    autocast: bool = False,
    summed: bool = False,
    model: nn.Module | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
) -> list[Tensor]:
    """`loss = main + weight * cacr_loss(...)`, micro-batches averaged, one optimizer step each; the final weights.

    `summed`: the main loss of micro-batches is a sum over the labels of the whole step, divided by their number.
    """
    model = MODELS[name][0]().train() if model is None else model
    optimizer = optimizer(model.parameters(), lr=LR)
    with capture_attention(model) as capture:
        for step, parts in enumerate(steps):
            items = sum(part["labels"][:, 1:].ne(-100).sum() for part in parts)
            for batch in parts:
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    main = model(**batch, num_items_in_batch=items).loss if summed else model(**batch).loss / len(parts)
                where = TEXT if name == "vilt" else llava_layout(batch)
                loss = main + weight(step) * LOSSES[name](capture.pop(), where) / len(parts)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def furthest(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference between two sets of weights."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
