"""Where each axis of a tensor comes from: which part of the scores is a sample, which is a head.

A model may put heads beside the batch, fold the two into one axis in either order, or give each head its own slice.
Sizes do not tell these apart. What tells is the way back from the scores: the axis that a product contracts is the
width, so whatever was split from the same axis is a head, and all other leading axes are samples.

`Trail` notes how each tensor was made, without keeping it. `capture/origins.py` goes back along that trail.
"""

import itertools
import weakref
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence.capture.product import FACTORS, RESHAPES, einsum_letters, tensors_in

# These give a view of their first argument: of a contiguous one, with strides that say where each element was.
VIEWS = {
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "T", "mT", "H", "mH", "adjoint"),
    *("select", "narrow", "getitem", "split", "split_with_sizes", "tensor_split", "chunk", "unbind", "unsafe_split"),
    *("unsafe_chunk", "hsplit", "vsplit", "dsplit", "expand", "expand_as", "broadcast_to", "unfold", "diagonal"),
}
# These move elements within a shape, or mix them: they are not the same element by element.
_SHUFFLES = {
    *("flip", "fliplr", "flipud", "roll", "rot90", "sort", "argsort", "gather", "index_select", "take_along_dim"),
    *("take", "getitem", "as_strided", "msort", "topk", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
_CATS = {"cat", "concat", "concatenate"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
CONTRACTED = -1
_numbers = itertools.count()


class Node:
    """How a tensor was made: from which others, and where its elements were in them.

    Args:
        number: larger than those of its parents; equal for tensors that are made alike in each pass.
        kind: `leaf` (nothing is known), `flat`, `view`, `cat`, `stack`, `tile`, `interleave`, `real`, `complex`,
            `mix` (a product with a weight) or `product`.
        shape: of the tensor.
        parents: what it was made of. Of a product: its two factors.
        how: what the kind needs to find an element in its parent. Of a `mix` or `product`, for each parent: where its
            axes went, as axes of this tensor, or `CONTRACTED`.
        root: the leaf it descends from first of all.
        constant: made of parameters alone.
        gathered: parts of several processes, one after the other: its first axis is more than samples.
    """

    def __init__(
        self, number: int, kind: str, shape: torch.Size, parents: tuple["Node", ...], how: Any, root: "Node | None"
    ) -> None:
        self.number, self.kind, self.shape, self.parents, self.how = number, kind, shape, parents, how
        self.root, self.constant, self.gathered = root or self, False, False
        self.found: dict[Any, Any] = {}  # what was found out about it

    @cached_property
    def strides(self) -> tuple[tuple[int, ...], int]:
        """Of a view: strides and offset in its contiguous parent."""
        function, args, kwargs, index = self.how
        made = function(torch.empty(self.parents[0].shape, dtype=torch.int64, device="meta"), *args, **kwargs)
        made = made if index is None else made[index]
        return made.stride(), made.storage_offset()

    def back(self, points: Tensor) -> Iterator[tuple["Node", Tensor, Tensor]]:
        """Elements of this tensor, `(points, axes)`, as elements of its parents: which parent, which points, where."""
        every = torch.arange(len(points))
        first = self.parents[0]
        if self.kind in ("flat", "view"):
            strides, offset = (contiguous(self.shape), 0) if self.kind == "flat" else self.strides
            flat = points @ torch.tensor(strides, dtype=torch.int64) + offset
            yield first, every, unravel(flat, first.shape)
        elif self.kind == "cat":
            start = 0
            for parent in self.parents:
                place = points[:, self.how] - start
                here = every[(place >= 0) & (place < parent.shape[self.how])]
                moved = points[here].clone()
                moved[:, self.how] -= start
                yield parent, here, moved
                start += parent.shape[self.how]
        elif self.kind == "stack":
            rest = [axis for axis in range(len(self.shape)) if axis != self.how]
            for number, parent in enumerate(self.parents):
                here = every[points[:, self.how] == number]
                yield parent, here, points[here][:, rest]
        elif self.kind == "tile":
            aligned = points[:, len(self.shape) - len(first.shape) :]
            yield first, every, aligned % torch.tensor(first.shape, dtype=torch.int64)
        elif self.kind == "interleave":
            axis, times = self.how
            moved = points.clone()
            moved[:, axis] //= times
            yield first, every, moved
        elif self.kind == "complex":
            yield first, every, torch.cat([points, points.new_zeros(len(points), 1)], 1)
        else:  # real
            yield first, every, points[:, :-1]


def contiguous(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= length
    return tuple(reversed(strides))


def unravel(flat: Tensor, shape: torch.Size) -> Tensor:
    """Row-major indices as coordinates, `(points, axes)`."""
    coordinates = []
    for length in reversed(shape):
        coordinates.append(flat % length)
        flat = flat // length
    return torch.stack(coordinates[::-1], 1) if coordinates else flat.new_zeros(len(flat), 0)


class Trail:
    """How the tensors of one forward pass were made. Only weak references are kept.

    `table` is shared by all passes through a module: tensors that are made alike have one node, so that what was found
    out about them is found once.
    """

    def __init__(self, table: dict[Any, Node]) -> None:
        if len(table) > 50_000:  # sizes that change in every step
            table.clear()
        self._table, self._nodes, self._fresh = table, dict[int, tuple[weakref.ref[Tensor], Node]](), 0

    def node(self, tensor: Tensor) -> Node:
        """How a tensor was made; a new leaf where nobody saw it."""
        # A DTensor and its part on this process are one: the way from one to the other is no torch function.
        shape, constant, tensor = tensor.shape, isinstance(tensor, nn.Parameter), _compat.local_part(tensor)
        ref, node = self._nodes.get(id(tensor), (None, None))
        if node is not None and ref is not None and ref() is tensor and node.shape != shape:
            return self._intern("leaf", shape, (node,), None, "part", node.root)
        if node is None or ref is None or ref() is not tensor:
            self._fresh += 1
            node = self._intern("leaf", shape, (), None, ("source", self._fresh, constant))
            node.constant = constant
            self._nodes[id(tensor)] = weakref.ref(tensor), node
        return node

    def _intern(
        self, kind: str, shape: torch.Size, parents: tuple[Node, ...], how: Any, key: Any, root: Node | None = None
    ) -> Node:
        full = (kind, shape, tuple(parent.number for parent in parents), key)
        node = self._table.get(full)
        if node is None:
            node = self._table.setdefault(full, Node(next(_numbers), kind, shape, parents, how, root))
        return node

    def product(self, query: Tensor, key: Tensor) -> Node:
        """The scores of queries and keys, as if they had been computed."""
        lead = max(query.shape[:-2], key.shape[:-2], key=torch.Size.numel)
        axes = []
        for factor, own in ((query, len(lead)), (key, len(lead) + 1)):
            skip = len(lead) + 2 - factor.ndim
            axes.append((*range(skip, len(lead)), own, CONTRACTED))
        shape = torch.Size((*lead, query.shape[-2], key.shape[-2]))
        nodes = (self.node(query), self.node(key))
        return self._intern("product", shape, nodes, tuple(axes), ("scores", tuple(axes)), nodes[0].root)

    def follow(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        result: Any,
        scores: Tensor | None = None,
    ) -> None:
        """Notes one torch function after it ran; `scores` is the argument that the result is a later form of."""
        if isinstance(result, Tensor):
            made: list[tuple[int | None, Tensor]] = [(None, result)]
        elif isinstance(result, tuple | list) and not isinstance(result, torch.Size):
            made = [(index, part) for index, part in enumerate(result) if isinstance(part, Tensor)]
        else:
            return
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        given = tensors_in((*args, *kwargs.values()))
        inner = [t for t in given if _counts(t)]
        parents = [self.node(t) for t in inner]
        for index, tensor in made:
            if not _counts(tensor):
                continue
            main = None if scores is None else self.node(scores)
            node = self._made(func, name, args, kwargs, index, tensor, inner, parents, main)
            if len(parents) == len(given) and all(parent.constant for parent in parents):
                node.constant = True
            local = _compat.local_part(tensor)
            self._nodes[id(local)] = weakref.ref(local), node

    def _made(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        index: int | None,
        result: Tensor,
        given: list[Tensor],
        parents: list[Node],
        main: Node | None,
    ) -> Node:
        shape = result.shape
        if not parents:
            return self._intern("leaf", shape, (), None, (name, index, self._count()))
        first = parents[0]
        if args and args[0] is given[0]:
            if name in RESHAPES and first.shape.numel() == shape.numel():
                return self._intern("flat", shape, (first,), None, None, first.root)
            if name in VIEWS and (how := _replay(func, name, args[1:], kwargs, shape, index)) is not None:
                key = (name, index, repr(how[1]), repr(how[2]))
                return self._intern("view", shape, (first,), how, key, first.root)
            if name in ("repeat", "tile"):
                return self._intern("tile", shape, (first,), None, None, first.root)
            if name == "repeat_interleave" and isinstance(times := _argument(args, kwargs, 1, "repeats"), int):
                dim = _argument(args, kwargs, 2, "dim")
                if isinstance(dim, int):
                    how = (dim % len(shape), times)
                    return self._intern("interleave", shape, (first,), how, how, first.root)
            if name == "view_as_complex":
                return self._intern("complex", shape, (first,), None, None, first.root)
            if name == "view_as_real":
                return self._intern("real", shape, (first,), None, None, first.root)
        whole = sorted(parents, key=lambda node: (node.constant, node.shape != shape))  # stable: the first of the best
        root = whole[0].root
        if (name in _CATS or name == "stack") and isinstance(args[0], list | tuple) and len(parents) == len(args[0]):
            dim = _argument(args, kwargs, 1, "dim") or 0
            if isinstance(dim, int) and all(len(p.shape) == len(parents[0].shape) for p in parents):
                dim %= len(shape)
                kind = "stack" if name == "stack" else "cat"
                return self._intern(kind, shape, tuple(parents), dim, dim, root)
        if (factors := product_of(name, args, kwargs, result)) is not None:
            nodes = tuple(self.node(tensor) for tensor, _ in factors)
            how = tuple(axes for _, axes in factors)
            # Of two factors one may be a weight: a projection. Scores may be made of weights, too (learned queries).
            kind = "mix" if len(nodes) == 1 else "product"
            root = next((node for node in nodes if not node.constant), nodes[0]).root
            numbers = tuple(node.number for node in parents)  # another weight makes another tensor
            return self._intern(kind, shape, nodes, how, (name, how, numbers), root)
        same = whole[0] if main is None or main.shape != shape else main
        if same.shape == shape and name not in _SHUFFLES:
            return same
        if same.shape != shape and _broadcast(parents) == shape:
            # Elements of several shapes meet: axes that only weights have are new features.
            best = main or max((node for node in parents if not node.constant), key=_numel, default=first)
            skip = len(shape) - len(best.shape)
            axes = tuple(CONTRACTED if n == 1 else axis + skip for axis, n in enumerate(best.shape))
            return self._intern("mix", shape, (best,), (axes,), (name, axes), root)
        once = self._count() if name in _SHUFFLES else None
        node = self._intern("leaf", shape, tuple(parents), None, (name, index, once), root)
        node.gathered = "all_gather" in f"{name} {func}"
        return node

    def _count(self) -> int:
        self._fresh += 1
        return self._fresh


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _numel(node: Node) -> int:
    return node.shape.numel()


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _broadcast(nodes: list[Node]) -> torch.Size | None:
    try:
        return torch.Size(torch.broadcast_shapes(*(node.shape for node in nodes)))
    except RuntimeError:
        return None


def _replay(func: Any, name: str, args: Any, kwargs: Any, shape: torch.Size, index: int | None) -> Any:
    """What gives the view again from any tensor of the same shape; None where an index is a tensor or a list."""
    if name in ("expand", "expand_as", "broadcast_to"):
        return Tensor.expand, (shape,), {}, index
    if name == "getitem":
        keys = args[0] if isinstance(args[0], tuple) else (args[0],)
        if not all(key is None or key is Ellipsis or type(key) is int or _plain(key) for key in keys):
            return None
    elif tensors_in((*args, *kwargs.values())):
        return None
    return func, args, dict(kwargs), index


def _plain(key: Any) -> bool:
    return isinstance(key, slice) and all(n is None or type(n) is int for n in (key.start, key.stop, key.step))


def product_of(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
) -> list[tuple[Tensor, tuple[int, ...]]] | None:
    """The factors of a product, each with where its axes went; without a weight that all positions share."""
    rank = result.ndim
    if name == "linear" and args[0].ndim == rank:
        return [(args[0], (*range(rank - 1), CONTRACTED))]
    if name in _CONVOLUTIONS and args[0].ndim == rank:
        channels = rank - int(name[4]) - 1
        return [(args[0], tuple(CONTRACTED if axis == channels else axis for axis in range(rank)))]
    if name == "einsum":
        letters = einsum_letters(*args)
        if letters is None:
            return None
        (left, right, out), factors = letters
        return [
            (tensor, tuple(out.find(letter) for letter in own))
            for own, tensor in zip((left, right), factors, strict=True)
        ]
    if name not in {"matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm"}:
        return None
    args = (*args, *(kwargs[key] for key in ("mat1", *FACTORS) if key in kwargs))
    left_right = [t for t in args if isinstance(t, Tensor)][-2:]
    if len(left_right) != 2 or min(t.ndim for t in left_right) < 2:
        return None
    a, b = left_right[::-1] if name == "rmatmul" else left_right
    found = [
        (a, (*range(rank - a.ndim, rank - 2), rank - 2, CONTRACTED)),
        (b, (*range(rank - b.ndim, rank - 2), CONTRACTED, rank - 1)),
    ]
    if {a.ndim, b.ndim} == {2, rank} and rank > 2:
        found = [pair for pair in found if pair[0].ndim == rank]
    return found
