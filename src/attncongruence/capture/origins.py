"""Where the leading positions of some scores come from: numbers that tell their sample and their head.

A leading position is followed back through queries and keys (`capture/axes.py`). Where it varies along the axis that
the product contracts, or along an axis that a weight made, it is a head; along any other, a sample. Only points are
followed: all leading positions, and a few rows and places along the width.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attncongruence.capture.axes import CONTRACTED, Node, unravel
from attncongruence.capture.product import tensors_in

Points = list[tuple[Node, Tensor, Tensor]]
Sizes = tuple[frozenset[int], frozenset[int], bool] | None
"""First and second dimensions of a model's inputs, and whether the watched module is only a part of the model."""

CHANNELS = (
    "attends over channels, not tokens (its queries and keys are features), so its scores are no token-to-token scores."
)
GATHERED = (
    "has queries and keys gathered from several processes, so that samples and heads cannot be told apart: let it "
    "attend by scaled_dot_product_attention, (batch, heads, length, width)."
)
_MADE, _AXES = 4, 8  # columns for coordinates along what one weight made, and along the axes of one tensor


@dataclasses.dataclass(frozen=True)
class Codes:
    """For each leading position of some scores: numbers that tell its sample, and numbers that tell its head.

    Twice, as the queries and as the keys know it; `copies` tell positions apart that are copies of one sample.
    """

    samples: tuple[Tensor, Tensor]
    heads: tuple[Tensor, Tensor]
    copies: tuple[Tensor, Tensor]
    problem: str = ""
    unsure: bool = False  # a function that is not known made them

    def at(self, places: Tensor, mixed: Tensor) -> "Codes":
        """Those of some positions, with more numbers for heads."""
        samples, heads, copies = (tuple(t[places] for t in pair) for pair in (self.samples, self.heads, self.copies))
        heads = tuple(torch.cat([t, mixed], 1) for t in heads)
        return Codes(samples, heads, copies, self.problem, self.unsure)  # type: ignore[arg-type]


def walk(starts: Points, copies: Tensor | None = None) -> Points:
    """Points back to where their tensors were made by something that mixes elements; which points came to which."""
    waiting: dict[Node, list[tuple[Tensor, Tensor]]] = {}
    for node, which, points in starts:
        waiting.setdefault(node, []).append((which, points))
    ends: Points = []
    while waiting:
        node = max(waiting, key=lambda one: one.number)
        parts = waiting.pop(node)
        which, points = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        if node.kind in ("leaf", "mix", "product"):
            ends.append((node, which, points))
            continue
        if copies is not None:
            for axis in _copied(node):
                copies[which] = copies[which] * node.shape[axis] + points[:, axis]
        for parent, here, moved in node.back(points):
            if len(here):
                waiting.setdefault(parent, []).append((which[here], moved))
    return ends


def _copied(node: Node) -> list[int]:
    """Axes along which a tensor repeats its parent."""
    if node.kind == "view":
        return [axis for axis, stride in enumerate(node.strides[0]) if stride == 0 and node.shape[axis] > 1]
    if node.kind == "tile":
        padded = (1,) * (len(node.shape) - len(node.parents[0].shape)) + tuple(node.parents[0].shape)
        return [axis for axis, size in enumerate(padded) if size == 1 < node.shape[axis]]
    return []


def mixed(node: Node) -> tuple[Node, tuple[int, ...], list[int]] | None:
    """Of a product with a weight: the other factor, where its axes went, and the axes that the weight made."""
    place = 0
    if node.kind == "product":
        constant = [parent.constant for parent in node.parents]
        if constant.count(True) != 1:
            return None
        place = constant.index(False)
    elif node.kind != "mix":
        return None
    axes = node.how[place]
    return node.parents[place], axes, [axis for axis in range(len(node.shape)) if axis not in axes]


def through(
    node: Node, points: Tensor, parent: Node, axes: Sequence[int], contracted: Callable[[int], Tensor]
) -> Tensor:
    """Points of a product as points of one of its factors; `contracted(size)` is where they go in a contracted axis."""
    columns = []
    for size, axis in zip(parent.shape, axes, strict=True):
        if axis == CONTRACTED:
            columns.append(contracted(size))
        else:  # an axis of size 1 is broadcast, one with fewer heads is shared by groups
            columns.append(points[:, axis] * size // node.shape[axis])
    return torch.stack([column.expand(len(points)) for column in columns], 1)


def spread(size: int) -> Tensor:
    """A few positions of an axis, near each other and far apart; two of them even if it has one."""
    places = sorted({*range(min(size, 4)), *(size * part // 4 for part in range(4)), size - 1})
    return torch.tensor(places if size > 1 else [0, 0])


def codes_of(scores: Node, product: Node | None, sizes: Sizes) -> Codes | None:
    """Samples and heads of the leading positions of some scores; None where the way back is lost."""
    lead = scores.shape[:-2]
    count = lead.numel()
    points = torch.cat([unravel(torch.arange(count), lead), torch.zeros(count, 2, dtype=torch.int64)], 1)
    points[:, -2], points[:, -1] = scores.shape[-2] // 2, scores.shape[-1] // 2
    features = torch.zeros(count, 1, dtype=torch.int64)
    places = torch.zeros(count, dtype=torch.int64)
    nothing = torch.zeros(count, 1, dtype=torch.int64)
    starts: Points = [(scores, torch.arange(count), points)]
    found: list[tuple[Tensor, Codes]] = []
    while starts:
        ends, starts = walk(starts), []
        for node, which, where in ends:
            weights = None if product is not None and node.number == product.number else mixed(node)
            if weights is not None:  # talking heads, a bias for each head
                parent, axes, made = weights
                made = [axis for axis in made if axis < len(node.shape) - 2]
                for axis in made:
                    features[which, 0] = features[which, 0] * node.shape[axis] + where[:, axis]
                starts.append((parent, which, through(node, where, parent, axes, lambda _: nothing[:1, 0])))
            elif node.kind == "product":
                flat = torch.zeros(len(where), dtype=torch.int64)
                for axis, size in enumerate(node.shape[:-2]):
                    flat = flat * size + where[:, axis]
                places[which] = flat
                found.append((which, product_codes(node, sizes)))
            else:
                return None
    order = torch.argsort(torch.cat([which for which, _ in found]))
    return together([codes.at(places[which], features[which]) for which, codes in found]).at(order, nothing)


def together(codes: Sequence[Codes]) -> Codes:
    """Positions of several scores, one after another."""

    def joined(name: str) -> tuple[Tensor, Tensor]:
        left, right = (torch.cat([getattr(one, name)[side] for one in codes]) for side in (0, 1))
        return left, right

    problem = next((one.problem for one in codes if one.problem), "")
    unsure = any(one.unsure for one in codes)
    return Codes(joined("samples"), joined("heads"), joined("copies"), problem, unsure)


def sizes_of(inputs: Iterable[object]) -> tuple[frozenset[int], frozenset[int]]:
    """First and second dimensions of a model's inputs, as far as they are tensors."""
    tensors = tensors_in(inputs)
    first, second = (frozenset(t.shape[axis] for t in tensors if t.ndim > axis) for axis in (0, 1))
    return first, second


def product_codes(product: Node, sizes: Sizes) -> Codes:
    """Samples and heads of all leading positions of a product of queries and keys."""
    row = len(product.shape) - 2
    pairs = sorted(zip(product.parents, product.how, strict=True), key=lambda pair: row not in pair[1])
    constant = [parent.constant for parent, _ in pairs]  # an equation may name the keys first
    sides = [
        _side(product.shape, parent, axes, side, constant[side] and not constant[not side], sizes)
        for side, (parent, axes) in enumerate(pairs)
    ]
    certain, likely = ([side[3] == degree for side in sides] for degree in (2, 1))
    problem = CHANNELS if any(certain) or all(likely) else ""
    problem = GATHERED if 3 in (sides[0][3], sides[1][3]) else problem
    q, k = sides
    return Codes((q[0], k[0]), (q[1], k[1]), (q[2], k[2]), problem, q[4] and k[4])


def softmax_codes(scores: Node, sizes: Sizes) -> Codes:
    """The same for scores that are no product: their last axis takes the place of the width."""
    rank = len(scores.shape)
    one = _side(scores.shape, scores, (*range(rank - 1), CONTRACTED), 0, False, sizes)
    return Codes((one[0], one[0]), (one[1], one[1]), (one[2], one[2]))


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Where points are made, whatever the user's default device is. A device as a context costs time in each call."""
    here = torch.get_default_device().type == "cpu"
    return contextlib.nullcontext() if here else torch.device("cpu")


def over_features(scores: Node) -> bool:
    """Whether a softmax over something that is no product runs over features, or gives features a weight each."""
    with on_cpu():
        rank = len(scores.shape)
        rows = _side(scores.shape, scores, (*range(rank - 1), CONTRACTED), 0, False, None)
        columns = _side(scores.shape, scores, (*range(rank - 2), CONTRACTED, rank - 1), 1, False, None)
        leaf = walk([(scores, torch.zeros(1), torch.zeros(1, rank, dtype=torch.int64))])[0][0]
    # Heads that were split from the same axis, and a tensor that came as it is and has no heads, are features, too.
    split = bool(_vary(rows[1][:, 1 + _MADE :])) and len(leaf.shape) != rank
    given = leaf.kind == "leaf" and not leaf.parents and rank == 3 == len(leaf.shape)
    return rows[3] == 2 or columns[3] == 2 or split or given


def _side(
    shape: torch.Size, factor: Node, axes: Sequence[int], side: int, weight: bool, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, int, bool]:
    """What one factor of a product knows: samples, heads, copies; 3 if parts of several processes are in it, 2 if its
    rows are features, 1 if that may be; whether it is unsure.
    """
    lead = shape[:-2]
    count, row = lead.numel(), len(lead) + side
    width = next(size for size, axis in zip(factor.shape, axes, strict=True) if axis == CONTRACTED)
    rows, places = spread(shape[row]), spread(width)
    n = count + len(rows) + len(places)
    points = torch.zeros(n, len(shape) + 1, dtype=torch.int64)  # the last column is the width
    points[:, :-3] = torch.cat([unravel(torch.arange(count), lead), points[count:, :-3]])
    points[:, row] = shape[row] // 2
    points[count : count + len(rows), row] = rows
    points[count + len(rows) :, -1] = places
    is_row, is_width = slice(count, count + len(rows)), slice(count + len(rows), n)

    columns = [
        points[:, -1] if axis == CONTRACTED else points[:, axis] * size // shape[axis]
        for size, axis in zip(factor.shape, axes, strict=True)
    ]
    copies = torch.zeros(n, dtype=torch.int64)
    makers, made = torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, _MADE, dtype=torch.int64)
    leaves, where = torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, _AXES, dtype=torch.int64)
    finals: Points = []
    starts: Points = []
    for node, which, at in walk([(factor, torch.arange(n), torch.stack(columns, 1))], copies):
        weights = mixed(node)
        if weights is None:
            finals.append((node, which, at))
            continue
        parent, its_axes, features = weights
        makers[which] = node.number
        for column, axis in enumerate(features[:_MADE]):
            made[which, column] = at[:, axis]

        def everywhere(size: int, which: Tensor = which) -> Tensor:
            """All of a contracted axis matters: the points along the width are spread over it."""
            some = spread(size)
            turn = which - is_width.start
            return torch.where(turn >= 0, some[turn % len(some)], 0)

        starts.append((parent, which, through(node, at, parent, its_axes, everywhere)))
    features_in_rows = 0
    if any(_vary(made[is_row][makers[is_row, 0] == maker]) for maker in set(makers[is_row, 0].tolist()) - {0}):
        features_in_rows = 2
    projected = bool(starts)
    finals += walk(starts, copies)

    if any(node.gathered for node, *_ in finals):
        features_in_rows = 3
    heads = torch.zeros(n, _AXES, dtype=torch.int64)
    split = bool(_vary(torch.cat([makers, made], 1)[:count]))
    for node, which, at in finals:
        leaves[which] = node.number
        rank = len(node.shape)
        in_lead, in_rows, in_width = which < count, (which >= count) & (which < is_width.start), which >= is_width.start
        in_rows[which == 0], in_width[which == 0] = True, True
        along_rows, along_width = _vary(at[in_rows]), _vary(at[in_width])
        own = along_width - along_rows
        if (weights := mixed(node)) is not None:
            own |= set(weights[2]) - along_rows
        if weight:  # learned queries or keys, the same for all samples
            own |= set(range(rank)) - along_rows
        if not own and width == 1:
            own = {rank - 1} - along_rows
        if not projected and along_width and rank - 1 in along_rows - along_width:
            features_in_rows = max(features_in_rows, 1)
        if rank == 4 and not split and not _vary(at[in_lead]) & own:
            own |= _usual(node, along_rows or {2 if node.shape[2] == 1 else 1}, own or {3}, sizes)
        for axis in range(min(rank, _AXES)):
            (heads if axis in own else where)[which, axis] = at[:, axis]
    samples = torch.cat([leaves, where], 1)
    unsure = any(
        node.kind == "leaf" and bool(node.parents) and bool((which < count).any()) for node, which, _ in finals
    )
    return samples[:count], torch.cat([makers, made, heads], 1)[:count], copies[:count, None], features_in_rows, unsure


def _usual(leaf: Node, rows: set[int], features: set[int], sizes: Sizes) -> set[int]:
    """The axis of heads of a 4-D tensor that came as it is: after the batch, unless the inputs say otherwise."""
    rest = [axis for axis in range(4) if axis not in rows | features]
    if len(rest) != 2:
        return set()
    swapped = sizes is not None and sizes[0] == {leaf.shape[rest[1]]} and leaf.shape[rest[0]] not in sizes[0]
    return {rest[0] if swapped else rest[1]}


def _vary(points: Tensor) -> set[int]:
    """Columns in which some points differ."""
    return set((points != points[:1]).any(0).nonzero()[:, 0].tolist()) if len(points) else set()
