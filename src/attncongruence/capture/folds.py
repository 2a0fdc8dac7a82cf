"""Samples and heads in the leading axes of scores: decided by the way that those axes came.

`capture/origins.py` gives each leading position numbers that tell its sample and its head. `decide` turns them into
`(sample, head)`, and `Fold` says how to bring tensors of that shape into `(batch, heads, ...)`: by views where the
tensor allows it.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncongruence.capture.axes import Node, unravel
from attncongruence.capture.origins import (
    CHANNELS,
    GATHERED,
    Codes,
    Sizes,
    codes_of,
    on_cpu,
    over_features,
    softmax_codes,
    together,
)
from attncongruence.capture.product import Log, Operation

UNKNOWN = (
    "has scores whose first dimensions cannot be told apart as samples and heads ({shape}). Capture the module around "
    "it, or the whole model by number, so that the split into heads is seen; or keep batch and heads in two "
    "dimensions, (batch, heads, length, length)."
)
NO_PLAN = (
    "called softmax, or attended in three dimensions, in compiled code before it ran uncompiled: samples, heads and "
    "gates cannot be told apart there. Open the capture before torch.compile and run one uncompiled step, or choose "
    "the layer by its number."
)
OTHER_CALLS = (
    "attended another number of times, or in another way, than in the uncompiled pass that was followed: what each "
    "call is cannot be told in compiled code. Make the capture anew, or do not compile this module."
)
UNSEEN = "multiplied its scores with values, and no softmax was seen in between."
LOOP = "loops over heads or samples, which cannot be told apart in compiled code. Do not compile this module."


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

    `sizes` are those of the model's inputs, where they are known.
    """
    key = ("fold", product and product.number, sizes)
    if key not in scores.found:
        with on_cpu():
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
    doubt = sizes is not None and (sizes[2] or codes.unsure)  # a fold that was not seen
    if heads == 1 and len(lead) == 1 and doubt and not _fits(lead[0], *sizes[:2]):  # type: ignore[index]
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


Plan = list[tuple[str, bool, "Fold | str | None"]]
"""Each softmax and each `scaled_dot_product_attention` of a pass, in order: its module, whether it is the latter, and
how its leading axes are folded: None where it is no attention, a message where it cannot be used."""

Unseen = list[tuple[str, tuple[int, int], int]]
"""Attention without a softmax that was seen: its module, its lengths, how many operations of the log ran before."""


def attention_of(log: Log, sizes: Sizes, *, whole: bool) -> tuple[Log, Plan, Unseen]:
    """The operations of one pass, as `(batch, heads, ...)`, the plan for passes that are not followed, what was missed.

    The operations of a loop over heads or samples are one.
    """
    # Softmaxes that weigh no keys (gates, routers) are dropped, unless nothing else was seen; features are no keys.
    products = whole or any(operation.from_product for _, operation in log)
    plan: Plan = []
    found: Log = []
    kept: Log = []
    unseen = []
    for name, operation in log:
        if operation.problem == UNSEEN:
            known = canonical(operation, sizes)
            if known.problem == UNSEEN and not known.cross:
                unseen.append((name, known.lengths, len(found)))
            continue
        where, fold = operation.where, None
        if operation.from_product or not (products or where is None or over_features(where)):
            fold = None if where is None else fold_of(where, operation.product, sizes)
            found.append((name, canonical(operation, sizes)))
            kept.append((name, operation))
        plan.append((name, operation.logits is None, fold))
    gone: set[int] = set()  # places of operations that are a part of another
    for group in _loops(kept):
        joined = _joined([kept[place][1] for place in group], sizes)
        if joined is not None:
            gone.update(group[:-1])
            found[group[-1]] = (kept[group[0]][0], joined)
            inside = kept[group[0]][0]
            plan = [(name, sdpa, fold and LOOP if name == inside else fold) for name, sdpa, fold in plan]
    unseen = [(name, lengths, place - sum(other < place for other in gone)) for name, lengths, place in unseen]
    return [entry for place, entry in enumerate(found) if place not in gone], plan, unseen


def _loops(log: Log) -> list[list[int]]:
    """Places in a log of operations that may be one: of one module, with scores of one shape."""
    groups: dict[Any, list[int]] = {}
    for place, (name, operation) in enumerate(log):
        if operation.product is not None:
            key = name, operation.where.shape, operation.product.shape, operation.logits is None
            groups.setdefault(key, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _joined(parts: list[Operation], sizes: Sizes) -> Operation | None:
    """Operations that are heads or samples of one, as that one; None if they are not."""
    key = ("loop", sizes, *(node.number for part in parts for node in (part.where, part.product)))
    first = parts[0]
    if key not in first.where.found:
        with on_cpu():
            first.where.found[key] = _loop_factors(parts, sizes)
    factors = first.where.found[key]
    if factors is None:
        return None
    lead = (len(parts), *parts[0].where.shape[:-2])
    fold = Fold(lead, factors)
    logits = None if first.logits is None else fold.apply(torch.stack([part.logits for part in parts]))  # type: ignore[misc]
    versions = tuple(version for part in parts for version in part.versions)
    shapes = {stage and stage.shape[:-2] for part in parts for stage in (part.product, *part.all_stages)}
    alike = {(part.scale, part.causal, tuple(factor for _, factor in part.masks)) for part in parts}
    if len(alike) > 1 or shapes != {first.where.shape[:-2]} or any(part.query is None for part in parts):
        return None if logits is None else dataclasses.replace(first.logits_alone(logits), versions=versions)

    def bring(tensors: Iterable[Any]) -> Tensor:
        aligned = [t[(None,) * (len(lead) + 1 - t.ndim)] for t in tensors]
        return fold.apply(torch.stack(torch.broadcast_tensors(*aligned)))

    masks = tuple(
        (bring(part.masks[place][0] for part in parts), factor) for place, (_, factor) in enumerate(first.masks)
    )
    q, k = bring(part.query for part in parts), bring(part.key for part in parts)
    return dataclasses.replace(first, query=q, key=k, masks=masks, logits=logits, versions=versions)


def _loop_factors(parts: list[Operation], sizes: Sizes) -> tuple[tuple[int, bool], ...] | None:
    codes = [codes_of(part.where, part.product, sizes) for part in parts]
    known = [code for code in codes if code is not None and not code.problem]
    if len(known) < len(parts):
        return None
    for side in (0, 1):
        sources = {tuple(code.samples[side][:, 0].tolist()) for code in known}
        projections = {tuple(code.heads[side][:, 0].tolist()) for code in known}
        several = any(max(_rank(code.heads[side])) for code in known)
        if len(sources) > 1 or (len(projections) > 1 and several):
            return None  # another sequence, or another attention with heads of its own
    codes_together = together(known)
    ranks = decide(codes_together)
    # Chunks of the queries share their keys: they are no samples.
    if ranks is None or any(max(_rank(side)) != max(ranks[0]) for side in codes_together.samples):
        return None
    return _factors(*ranks)


def unplanned(
    calls: Sequence[tuple[bool, Operation]], shapes: Iterable[tuple[torch.Size, torch.Size]], sizes: Sizes
) -> Plan:
    """A plan for compiled code that never ran uncompiled: where the sizes of the model's inputs tell samples and heads.

    `shapes` are those before and after each reshape in there.
    """
    known = frozenset[int]() if sizes is None else sizes[0] | sizes[1]
    pairs = [max(pair, key=len) for pair in shapes if sorted(map(len, pair)) == [3, 4]]
    plan: Plan = []
    for sdpa, operation in calls:
        lead = tuple(operation.main.shape[:-2])
        splits = {lead} if len(lead) == 2 else {tuple(p[:2]) for p in pairs if (p[0] * p[1],) == lead}
        found = {
            Fold(lead, tuple((size, size not in known) for size in split))
            for split in splits
            if sum(size in known for size in split) == 1
        }
        if sdpa and len(lead) == 2:
            found = {Fold(lead, ((lead[0], False), (lead[1], True)))}
        plan.append(("", sdpa, found.pop() if len(found) == 1 else NO_PLAN))
    return plan


def planned(calls: Sequence[tuple[bool, Operation]], plan: Plan) -> list[Operation]:
    """Operations of a compiled pass, which leaves no trail: read by the plan of a pass that was followed."""
    same = [sdpa for sdpa, _ in calls] == [sdpa for _, sdpa, _ in plan]
    found = []
    for place, (sdpa, operation) in enumerate(calls):
        fold = plan[place][2] if same else OTHER_CALLS
        if sdpa and fold is None and operation.main.ndim == 4:
            found.append(operation.four_d())
        if isinstance(fold, Fold):
            lead = tuple(operation.main.shape[:-2])
            fold = fold.refit(lead) or UNKNOWN.format(shape=" x ".join(map(str, operation.main.shape)))
        if isinstance(fold, str):
            found.append(dataclasses.replace(operation, problem=fold, cross=operation.cross or fold == CHANNELS))
        elif fold is not None:
            found.append(operation.apply(fold.apply))
    return found


def canonical(operation: Operation, sizes: Sizes) -> Operation:
    """The same operation with all tensors as `(batch, heads, ...)`, or with a problem."""
    if operation.where is None:  # a kernel of transformers, which has them so
        return operation.four_d()
    main = fold_of(operation.where, operation.product, sizes)
    if main == GATHERED and operation.logits is None and operation.main.ndim == 4:
        return operation.four_d()  # as the kernel's own documents have them
    if isinstance(main, str):
        return dataclasses.replace(operation, problem=main, cross=operation.cross or main == CHANNELS)
    logits = operation.logits if operation.logits is None else main.apply(operation.logits)
    product = fold_of(operation.product, operation.product, sizes) if operation.product is not None else main
    stages = [fold_of(stage, operation.product, sizes) if stage else product for stage in operation.all_stages]
    folds = [fold for fold in (product, *stages) if isinstance(fold, Fold)]
    if len(folds) <= len(stages):
        return operation.logits_alone(logits)
    masks = tuple((f.apply(mask), factor) for f, (mask, factor) in zip(folds[1:], operation.masks, strict=True))
    query, key = (t if t is None else folds[0].apply(t) for t in (operation.query, operation.key))
    return dataclasses.replace(operation, query=query, key=key, masks=masks, logits=logits)
