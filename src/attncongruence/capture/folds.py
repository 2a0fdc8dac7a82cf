"""Samples and heads in the leading axes of scores: decided by the way that those axes came.

`capture/origins.py` gives each leading position numbers that tell its sample and its head. `decide` turns them into
`(sample, head)`, and `Fold` says how to bring tensors of that shape into `(batch, heads, ...)`: by views where the
tensor allows it.
"""

import dataclasses
import math

import torch
from torch import Tensor

from attncongruence.capture.axes import Node, unravel
from attncongruence.capture.origins import CHANNELS, Codes, Sizes, codes_of, over_features, softmax_codes
from attncongruence.capture.product import Log, Operation

UNKNOWN = (
    "has scores whose first dimensions cannot be told apart as samples and heads ({shape}). Capture the module around "
    "it, or the whole model by number, so that the split into heads is seen; or keep batch and heads in two "
    "dimensions, (batch, heads, length, length)."
)


@dataclasses.dataclass(frozen=True)
class Fold:
    """How the leading axes of some scores hold samples and heads.

    Args:
        lead: sizes of the leading axes.
        factors: what they hold, outermost first: how many, and whether they are heads.
    """

    lead: tuple[int, ...]
    factors: tuple[tuple[int, bool], ...]

    @property
    def batch(self) -> int:
        """Number of samples."""
        return math.prod(size for size, head in self.factors if not head)

    @property
    def heads(self) -> int:
        """Number of heads."""
        return math.prod(size for size, head in self.factors if head)

    @property
    def plain(self) -> bool:
        """Whether they are `(batch, heads)` as they are."""
        kinds = [head for _, head in self.factors]
        return self.lead == (self.batch, self.heads) and kinds == sorted(kinds)

    def refit(self, lead: tuple[int, ...]) -> "Fold | None":
        """The same arrangement for another number of samples; None where it does not fit."""
        if lead == self.lead:
            return self
        if len(lead) == len(self.lead) == 2 and self.plain:
            return Fold(lead, ((lead[0], False), (lead[1], True))) if lead[1] == self.heads else None
        count, rest = math.prod(lead), math.prod(lead) % self.heads
        if len(lead) != len(self.lead) or rest or sum(not head for _, head in self.factors) != 1:
            return None
        return Fold(lead, tuple((size if head else count // self.heads, head) for size, head in self.factors))

    def apply(self, tensor: Tensor) -> Tensor:
        """A tensor that broadcasts to the scores, as `(batch, heads, ...)`."""
        tensor = tensor[(None,) * (len(self.lead) + 2 - tensor.ndim)]
        given, rest = tensor.shape[:-2], tensor.shape[-2:]
        if self.plain:
            return tensor
        if given.numel() == 1:
            return tensor.reshape(1, 1, *rest)
        order = sorted(range(len(self.factors)), key=lambda place: self.factors[place][1])
        split = tensor.expand(*self.lead, *rest).reshape(*(size for size, _ in self.factors), *rest)
        count = len(order)
        return split.permute(*order, count, count + 1).reshape(self.batch, self.heads, *rest)


def fold_of(scores: Node, product: Node | None, sizes: Sizes) -> Fold | str:
    """How the leading axes of scores hold samples and heads, or why that is not known.

    `sizes` are the first and the second dimensions of the model's inputs, where the module is only a part of it.
    """
    key = ("fold", product and product.number, sizes)
    if key not in scores.found:
        with torch.device("cpu"):
            scores.found[key] = _fold_of(scores, product, sizes)
    found: Fold | str = scores.found[key]
    return found


def _fold_of(scores: Node, product: Node | None, sizes: Sizes) -> Fold | str:
    lead = tuple(scores.shape[:-2])
    unknown = UNKNOWN.format(shape=" x ".join(map(str, scores.shape)))
    codes = softmax_codes(scores, sizes) if product is None else codes_of(scores, product, sizes)
    if codes is None or codes.problem:
        return unknown if codes is None else codes.problem
    ranks = decide(codes)
    if ranks is None:
        return unknown
    heads = max(ranks[1]) + 1
    if heads == 1 and len(lead) == 1 and sizes is not None and not _fits(lead[0], *sizes):
        return unknown
    factors = _factors(*ranks)
    return unknown if factors is None else Fold(lead, factors)


def _fits(count: int, first: frozenset[int], second: frozenset[int]) -> bool:
    """Whether a number can be samples alone, and not samples times heads."""
    if first == {count} or not first:
        return True
    known = first if count in first | second else first | second
    return not any(count % size == 0 and count != size for size in known)


def decide(codes: Codes) -> tuple[list[int], list[int]] | None:
    """Sample and head of each position, numbered by first appearance; None where they do not tell it apart."""
    (q, k), (query_heads, key_heads), (q_copy, k_copy) = codes.samples, codes.heads, codes.copies
    both = torch.cat([q, k], 1), torch.cat([query_heads, key_heads], 1)
    ways = [(q, query_heads), (k, key_heads), both]
    ways += [(torch.cat([q, q_copy], 1), query_heads), (torch.cat([k, k_copy], 1), key_heads)]
    ways += [(torch.cat([both[0], q_copy, k_copy], 1), both[1])]
    single = None
    many = False
    for samples, heads in ways:
        s, h = _rank(samples), _rank(heads)
        count, fits = max(h) + 1, (max(s) + 1) * (max(h) + 1) == len(s) == len(set(zip(s, h, strict=True)))
        if fits and count > 1:
            return s, h
        many |= count > 1
        single = single or ((s, h) if fits else None)
    return None if many else single


def _rank(codes: Tensor) -> list[int]:
    seen: dict[tuple[int, ...], int] = {}
    return [seen.setdefault(tuple(row), len(seen)) for row in codes.tolist()]


def _factors(samples: list[int], heads: list[int]) -> tuple[tuple[int, bool], ...] | None:
    """The two as axes of one shape, outermost first."""
    factors: list[tuple[int, bool]] = []
    s, h = samples, heads
    while len(s) > 1:
        head = s[0] == s[1]
        outer = s if head else h
        run = next((place for place, value in enumerate(outer) if value != outer[0]), len(outer))
        if run == 1 or len(outer) % run:
            return None
        factors.insert(0, (run, head))
        s, h = s[::run], h[::run]
    grid = unravel(torch.arange(len(samples)), torch.Size(size for size, _ in factors))
    for ranks, kind in ((samples, False), (heads, True)):
        chosen = [place for place, (_, head) in enumerate(factors) if head is kind]
        if _rank(grid[:, chosen]) != ranks:
            return None
    return tuple(factors)


def attention_of(log: Log, sizes: Sizes) -> Log:
    """The operations of one pass, as `(batch, heads, ...)`; those of a loop over heads or samples are one."""
    # Softmaxes that weigh no keys (gates, routers) are dropped, unless nothing else was seen; features are no keys.
    seen = [entry for entry in log if entry[1].from_product]
    seen = seen or [entry for entry in log if entry[1].where is None or not over_features(entry[1].where)]
    return [(name, canonical(operation, sizes)) for name, operation in seen]


def canonical(operation: Operation, sizes: Sizes) -> Operation:
    """The same operation with all tensors as `(batch, heads, ...)`, or with a problem."""
    if operation.where is None:  # a kernel of transformers, which has them so
        return operation.four_d()
    main = fold_of(operation.where, operation.product, sizes)
    if isinstance(main, str):
        return dataclasses.replace(operation, problem=main, cross=operation.cross or main == CHANNELS)
    logits = operation.logits if operation.logits is None else main.apply(operation.logits)
    if operation.query is None or operation.key is None:
        return dataclasses.replace(operation, logits=logits)
    product = fold_of(operation.product, operation.product, sizes)
    stages = [fold_of(stage, operation.product, sizes) for stage in operation.stages]
    folds = [fold for fold in (product, *stages) if isinstance(fold, Fold)]
    if len(folds) <= len(stages):
        return dataclasses.replace(operation.opaque(), logits=logits)
    query, key = folds[0].apply(operation.query), folds[0].apply(operation.key)
    masks = tuple((f.apply(mask), factor) for f, (mask, factor) in zip(folds[1:], operation.masks, strict=True))
    return dataclasses.replace(operation, query=query, key=key, masks=masks, logits=logits)
