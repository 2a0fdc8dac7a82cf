"""Writes docs/models.md from real runs of the zoo: what is captured of each family, and what to do with it.

python -m tests.zoo.table
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import transformers

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, AttentionBlocks, TokenLayout, cacr_loss, capture_attention
from attncongruence.capture import CapturedAttention
from tests.zoo import CASES, Case, run

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
CONVENTIONS = {"RELEASED": RELEASED, "WEIGHTED_MEAN": WEIGHTED_MEAN, "PRINTED": PRINTED}
HEAD = """# Families of models

Written by `python -m tests.zoo.table` from real runs of a tiny model of each family: random weights, built by its
library, with the attention kernel that it runs by default. transformers {transformers}, timm {timm}, torch {torch}.
[capture.md](capture.md) shows how to use each kind.

- **layer**: the captured layer, among the last of two or three. *-1*: whether `capture_attention(model)` finds it.
- **error**: largest difference between `.probs` and the model's own eager attention, over rows of real tokens.
- **q, k**: whether `.query` and `.key` are available, so that the streaming form of the loss can be used; otherwise
  only `.scores`.
- **direction**: the directions in which `cacr_loss` makes sense. In a causal decoder an image token sees only the text
  before it. Where the model allows only a part of the block VL, the share is given; if it is small, leave the vision
  direction out.
- **convention**: the conventions that make sense. `PRINTED` uses raw scores as weights, so it does not where the
  softmax's input is shifted by the row's maximum. Such a shift does not change `RELEASED` and `WEIGHTED_MEAN`, under
  causal masks either.

| family | kind | layer | -1 | kernel | error | q, k | direction | convention | note |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def row(case: Case) -> dict[str, str]:
    """One line of the table."""
    model, inputs = case.build()
    _, expected = case.reference(model, inputs)
    with capture_attention(model, sorted({layer.path for layer in case.layers.values()})) as capture:
        run(model, inputs)
        records = capture.pop_all()
    found: dict[str, CapturedAttention] = {}
    for role, layer in case.layers.items():
        found[role] = [record for record in records if record.layer == layer.path][layer.number]
    errors = []
    for role, record in found.items():
        rows = case.real_rows(role, inputs, record.scores.shape)
        errors.append((record.probs - expected[role]).transpose(1, 2)[rows].abs().max().item())
    return {
        "family": case.name,
        "kind": case.kind,
        "layer": ", ".join(
            f"`{layer.path}`" + (f" ({role})" if role != "S" else "") for role, layer in case.layers.items()
        ),
        "-1": finds(case),
        "kernel": kernel(case, model),
        "error": "0" if max(errors) == 0 else f"{max(errors):.0e}",
        "q, k": "yes" if not case.opaque else "no" if len(case.opaque) == len(found) else "LL",
        **meaning(case, found, inputs),
        "note": case.notes,
    }


def finds(case: Case) -> str:
    """Whether the default finds the layer of a joint sequence."""
    if "S" not in case.layers:
        return ""
    model, inputs = case.build()
    with capture_attention(model) as capture:
        run(model, inputs)
        return "yes" if capture.pop().layer == case.layers["S"].path else "no"


def kernel(case: Case, model: torch.nn.Module) -> str:
    """The kernel that the captured layer is configured to run."""
    module = model.get_submodule(next(iter(case.layers.values())).path)
    fused = getattr(module, "fused_attn", None)
    own = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return {True: "fused", False: "softmax"}[fused] if isinstance(fused, bool) else own or "own"


def meaning(case: Case, found: dict[str, CapturedAttention], inputs: dict) -> dict[str, str]:
    """Directions that are defined and conventions that make sense, found by computing the losses."""
    text, image = case.text(inputs), case.image(inputs)
    if text is None or image is None:
        return {"direction": "", "convention": "one modality: attention alone"}
    if "S" in found:
        attention, layout = found["S"], TokenLayout(text, image)
    elif {"LL", "LV", "VV"} <= set(found):
        attention, layout = AttentionBlocks.from_streams(**found, text_mask=text, image_mask=image), None
    elif case.kind == "cross-attention":
        return {"direction": "language, with VV of the vision tower", "convention": "all"}
    else:
        return {"direction": "", "convention": "none: VV is deformable attention, without scores"}
    directions = [name for name in ("language", "vision") if defined(attention, layout, name)]
    share = seen_by_image(found["S"], layout) if layout is not None else 1.0
    if "vision" in directions and share < 1:
        directions[-1] = f"vision ({share:.0%} of VL)"
    shifted = all(bool((record.scores.amax(-1).abs() < 1e-6).all()) for record in found.values())
    names = [name for name in CONVENTIONS if not (shifted and name == "PRINTED")]
    for name in names:
        loss = cacr_loss(attention, layout, direction="language", convention=CONVENTIONS[name])
        assert torch.isfinite(loss), (case.name, name)
    return {"direction": " and ".join(directions), "convention": "all" if len(names) == 3 else ", ".join(names)}


def seen_by_image(record: CapturedAttention, layout: TokenLayout) -> float:
    """Share of the pairs (image token, text token) that may attend."""
    pairs = layout.image[:, None, :, None] & layout.text[:, None, None, :]
    allowed = pairs if record.allowed is None else pairs & record.allowed
    return float((allowed.sum() / pairs.expand(allowed.shape).sum()).item())


def defined(attention: CapturedAttention | AttentionBlocks, layout: TokenLayout | None, direction: str) -> bool:
    """Whether the loss exists in this direction."""
    try:
        cacr_loss(attention, layout, direction=direction)
    except ValueError:
        return False
    return True


def table() -> list[dict[str, str]]:
    """All lines."""
    return [row(case) for case in CASES.values()]


def main() -> None:
    """Write the page."""
    versions = {module.__name__: module.__version__.split("+")[0] for module in (torch, transformers, timm)}
    lines = ["| " + " | ".join(line.values()) + " |" for line in table()]
    PAGE.write_text(HEAD.format(**versions) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
