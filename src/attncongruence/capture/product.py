"""Recognizes one attention operation in the torch functions that a model calls.

`scaled_dot_product_attention` names its queries and keys. A model that calls `matmul` and `softmax` itself does not:
there, each product of two batched tensors may be `query @ key.T`, and each later function on the result either adds to
it in a known way (a scale, a mask) or makes it opaque (a soft cap, a shift by the row's maximum). Nothing is computed.
"""

import dataclasses
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

# A mask value this low hides a pair: -inf, finfo.min, -1e9 and -1e4 (-9984 in bfloat16) are all in use, and no score
# outweighs 5000. A position bias is never this low. Swin's -100 between shifted windows is a bias by this rule.
FLOOR = -5000.0

PRODUCTS = {"matmul", "rmatmul", "bmm", "baddbmm", "einsum"}
# These keep the order of the elements, whatever the shape.
RESHAPES = {
    *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "ravel", "view_as", "reshape_as"),
    *("atleast_2d", "atleast_3d"),
}
_COPIES = {"to", "float", "half", "bfloat16", "double", "type", "type_as", "contiguous", "clone", "alias"}
_TIMES = {"mul", "rmul", "imul", "multiply"}
_DIVIDE = {"div", "truediv", "itruediv", "idiv", "divide", "true_divide"}
_PLUS = {"add", "radd", "iadd"}
_MINUS = {"sub", "isub", "subtract"}
_FILL = {"masked_fill", "where"}
FACTORS = ("input", "batch1", "batch2", "mat2", "tensor2", "other")
_OPERANDS = {"other", "mask", "value"}

Masks = tuple[tuple[Tensor, float], ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One attention operation as it was called: `softmax(scale * query @ key.T + sum(masks))`, nothing computed.

    Args:
        query: `(..., length, width)`, or None where only `logits` are known.
        key: `(..., keys, width)`; fewer heads than `query` when queries are grouped.
        scale: factor of the product.
        masks: pairs `(mask, factor)`: a boolean mask is True at allowed pairs (factor 1) or at hidden pairs (-1), any
            other mask is added `factor` times. Where only `logits` are known: those among them that were seen.
        written: the factor of each mask where the model added it, before it scaled both; (): as in `masks`.
        causal: query `i` sees keys `0..i`.
        logits: the tensor given to `softmax`, where the model calls it by itself.
        from_product: False for a softmax over something that is no product of two batched tensors.
        cross: queries and keys are known to come from two sequences, or are no tokens.
        product: how the scores were made (a node of `capture/axes.py`), where that was seen.
        where: how `main` was made.
        stages: for each mask, how the scores were made to which it was added.
        problem: why the scores cannot be used, if they cannot.
        versions: what each tensor is, the tensor as the model used it, its version then; (): not known.
        spoke: groups of processes that its module spoke to while it ran.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    scale: float = 1.0
    masks: Masks = ()
    causal: bool = False
    logits: Tensor | None = None
    from_product: bool = True
    cross: bool = False
    product: Any = None
    where: Any = None
    stages: tuple[Any, ...] = ()
    problem: str = ""
    written: tuple[float, ...] = ()
    versions: tuple[tuple[str, Tensor, float], ...] = ()
    spoke: frozenset[str] = frozenset()

    @property
    def main(self) -> Tensor:
        """The tensor that the softmax or the kernel was given first."""
        tensor = self.query if self.logits is None else self.logits
        assert tensor is not None
        return tensor

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        columns = self.key.shape[-2] if self.logits is None and self.key is not None else self.main.shape[-1]
        return self.main.shape[-2], columns

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Operation":
        """The same operation with a function applied to each tensor."""
        query, key, logits = (None if t is None else change(t) for t in (self.query, self.key, self.logits))
        masks = tuple((change(mask), factor) for mask, factor in self.masks)
        return dataclasses.replace(self, query=query, key=key, logits=logits, masks=masks)

    def logits_alone(self, logits: Tensor | None, problem: str = "") -> "Operation":
        """The same operation without what led to its logits."""
        versions = tuple(version for version in self.versions if version[0] == "scores")
        bare = dataclasses.replace(self, query=None, key=None, scale=1.0, masks=(), written=(), stages=(), causal=False)
        return dataclasses.replace(bare, logits=logits, versions=versions, problem=problem)

    def with_mask(self, mask: Tensor, factor: float, stage: Any = None) -> "Operation":
        """The same operation with one more mask; a mask that learns hides nothing, so logits alone do without it."""
        if self.query is None and mask.requires_grad:
            return self
        masks, stages = (*self.masks, (mask, factor)), (*self.all_stages, stage)
        return dataclasses.replace(self, masks=masks, written=(*self.as_written, factor), stages=stages)

    def times(self, factor: float) -> "Operation | None":
        """The scaled operation; None where that would show what a mask hides.

        Whether a mask hides a pair is decided by what the model added, before it scaled both.
        """
        if factor < 0 and self.masks:
            return None
        masks = tuple((m, f if m.dtype == torch.bool else f * factor) for m, f in self.masks)
        return dataclasses.replace(self, scale=self.scale * factor, masks=masks, written=self.as_written)

    @property
    def as_written(self) -> tuple[float, ...]:
        """The factor of each mask where the model added it."""
        return self.written or tuple(factor for _, factor in self.masks)

    @property
    def all_stages(self) -> tuple[Any, ...]:
        """`stages`, with None for those that are not known."""
        return self.stages or (None,) * len(self.masks)

    def opaque(self, *, from_product: bool = True, moved: bool = False) -> "Operation":
        """What is still known after a function that is neither a scale nor a mask; `moved`: the pairs changed place."""
        unknown = Operation(from_product=self.from_product and from_product, cross=self.cross)
        unknown = dataclasses.replace(unknown, product=self.product if from_product else None)
        if not moved:
            for (mask, _), factor, stage in zip(self.masks, self.as_written, self.all_stages, strict=True):
                unknown = unknown.with_mask(mask, factor, stage)
        return unknown

    def four_d(self) -> "Operation":
        """The same operation with all tensors as `(batch, heads, ...)`: views, no copies."""
        main = self.main
        # Parts of a 4-D operation may still be folded: alibi, or q and k of a bmm.
        folded = (main.shape[0], main.shape[1]) if main.ndim == 4 else None

        def view(tensor: Tensor) -> Tensor:
            if tensor.ndim >= 4:
                return tensor
            if tensor.ndim == 3 and folded is not None and tensor.shape[0] == folded[0] * folded[1]:
                return tensor.view(*folded, *tensor.shape[1:])
            return tensor.unsqueeze(1) if tensor.ndim == main.ndim == 3 else tensor[(None,) * (4 - tensor.ndim)]

        return self.apply(view)


Log = list[tuple[str, Operation]]
"""Attention operations in order of execution, each with the name of its module."""


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among some arguments, also in lists and tuples."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, list | tuple):
            flat += tensors_in(value)
    return flat


def read_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Operation:
    """The operation of one call of `scaled_dot_product_attention`. The signature is torch's own."""
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    return Operation(query, key, scale, () if attn_mask is None else ((attn_mask, 1.0),), is_causal)


def softmax_logits(input: Tensor, dim: int | None = None, *args: object, **kwargs: object) -> Tensor | None:
    """The input of a softmax, where it runs over the last of three or more dimensions."""
    return input if dim is not None and input.ndim >= 3 and dim in (-1, input.ndim - 1) else None


def read_product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
    """The operation that begins with a product; None if it is no product of two batched tensors."""
    if name == "einsum":
        return _read_einsum(*args)
    masks, scale = Masks(), 1.0
    if name == "baddbmm":
        beta, scale = float(kwargs.get("beta", 1.0)), float(kwargs.get("alpha", 1.0))
        masks, args = ((args[0], beta),) if beta else (), args[1:]
    if len(args) != 2 or not all(isinstance(a, Tensor) and a.ndim >= 3 for a in args):
        return None
    query, key = args if name != "rmatmul" else args[::-1]
    return Operation(query, key.transpose(-1, -2), scale, masks)


def einsum_letters(equation: object, *operands: Any) -> tuple[tuple[str, str, str], tuple[Tensor, Tensor]] | None:
    """Letters of two operands and of their result, with those that `...` stands for; None if it is no such equation."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    parts = re.fullmatch(r"([\w.]+),([\w.]+)->([\w.]+)", str(equation).replace(" ", ""))
    if parts is None or len(operands) != 2 or not all(isinstance(t, Tensor) for t in operands):
        return None
    left, right, out = parts.groups()
    rest = [t.ndim - len(own.replace("...", "")) for own, t in zip((left, right), operands, strict=True)]
    unused = [letter for letter in string.ascii_letters if letter not in left + right][: max(0, *rest)]
    left, right = (
        own.replace("...", "".join(unused[len(unused) - n :])) for own, n in zip((left, right), rest, strict=True)
    )
    if any(len(set(own)) != len(own) for own in (left, right)):
        return None
    return (left, right, out.replace("...", "".join(unused))), operands


def _read_einsum(*args: Any) -> Operation | None:
    """Finds q and k by an equation like `bihd,bjhd->bhij`; None if it is no attention product."""
    letters = einsum_letters(*args)
    if letters is None or len(letters[0][2]) < 3:
        return None
    (left, right, out), operands = letters
    batch, row, column = out[:-2], out[-2], out[-1]
    (query, q), (key, k) = sorted(zip((left, right), operands, strict=True), key=lambda part: row not in part[0])
    width = (set(left) & set(right)) - set(out)
    if len(width) != 1 or {row, *width} - set(query) or {column, *width} - set(key) or column in query or row in key:
        return None
    if (set(query) | set(key)) - {*out, *width} or not (set(batch) <= set(query) or set(batch) <= set(key)):
        return None
    return Operation(_ordered(q, query, batch + row + min(width)), _ordered(k, key, batch + column + min(width)))


def _ordered(tensor: Tensor, own: str, letters: str) -> Tensor:
    """Axes in the order of some letters, with size 1 for those that the tensor does not have (grouped queries)."""
    tensor = tensor.permute([own.index(letter) for letter in letters if letter in own])
    return tensor[tuple(slice(None) if letter in own else None for letter in letters)]


def read_step(
    name: str, operation: Operation, scores: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operation | None:
    """The operation after one more function on its scores; None if it is no longer scale, product and masks."""
    if name in _COPIES or name in RESHAPES:
        return operation
    if name == "addcmul":
        return _read_addcmul(operation, scores, *args, **kwargs)
    if kwargs.keys() - _OPERANDS - {"input", "alpha"}:  # rounding_mode, out
        return None
    args = (*args, *(value for key, value in kwargs.items() if key in _OPERANDS))
    first = kwargs.get("input", args[0] if args else None) is scores
    rest = [a for a in args if a is not scores]
    if (name in _TIMES or (name in _DIVIDE and first)) and len(rest) == 1:
        number = _number(rest[0])
        return operation.times(1.0 / number if name in _DIVIDE else number) if number else None
    if name in _PLUS | _MINUS and len(rest) == 1 and isinstance(rest[0], Tensor):
        # first + alpha second, first - alpha second
        alpha = _number(kwargs.get("alpha", 1))
        alpha = -alpha if alpha and name in _MINUS else alpha
        if not alpha:
            return None
        scaled = operation if first else operation.times(alpha)
        return scaled and scaled.with_mask(rest[0], alpha if first else 1.0)
    if name in _FILL and len(rest) == 2 and isinstance(rest[0], Tensor):
        # masked_fill(scores, hidden, low), where(allowed, scores, low) or where(hidden, low, scores)
        low = _number(rest[1])
        if low is not None and low <= FLOOR:
            hides = name == "masked_fill" or args[-1] is scores
            return operation.with_mask(rest[0], -1.0 if hides else 1.0)
    return None


def _read_addcmul(
    operation: Operation, scores: Tensor, input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: Any = 1
) -> Operation | None:
    """`scores + value * tensor1 * tensor2`. The signature is torch's own."""
    factor = _number(value)
    if input is not scores or not factor or tensor1.requires_grad or tensor2.requires_grad:
        return None
    return operation.with_mask(tensor1 * tensor2, factor)


def _number(value: Any) -> float | None:
    """The value of a plain number, or of a tensor that costs no synchronization to read and has no gradient."""
    if isinstance(value, Tensor):
        readable = value.numel() == 1 and value.device.type == "cpu" and not value.requires_grad
        return float(value) if readable else None
    return float(value) if isinstance(value, int | float) else None
