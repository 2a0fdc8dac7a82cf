"""Follows a forward pass: modes that see each torch function, and what they record about its tensors."""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attncongruence import _compat
from attncongruence.capture import product
from attncongruence.capture.product import Log, Operation, tensors_in
from attncongruence.capture.versions import kept


class AttentionMode(TorchFunctionMode):
    """One pass through a watched module: runs every function unchanged, and logs the attention operations.

    It records how each score-like tensor was made, so that a softmax leads back to q and k. In a pass through a whole
    model, it also tells inputs apart, and logs only softmaxes over products.
    """

    def __init__(self, *, whole: bool = False, records: Callable[[], bool] = lambda: True) -> None:
        super().__init__()
        # Modules that run now; what to do when they have run; how long the log was before.
        self.path: list[tuple[str, Callable[[], None], int]] = []
        self._records = records
        self.error_before = sys.exc_info()[1]
        self.entries: Log = []
        self._lineage = Lineage() if whole else None
        # By id: the tensor, its version, and the operation behind it. Weak, so that the model's intermediate scores
        # are freed as early as they are without us.
        self._made: dict[int, tuple[weakref.ref[Tensor], float, Operation]] = {}
        self._folds: dict[int, tuple[int, int]] = {}  # (batch, heads) by their product, as reshapes show them

    def log(self, operation: Operation) -> None:
        """Adds an operation of the innermost module that runs, if it is to be recorded."""
        if (operation.from_product or self._lineage is None) and self._records():
            self.entries.append((self.path[-1][0], kept(operation)))

    def enter(self, name: str, at_end: Callable[[], None]) -> None:
        """A module begins to run."""
        self.path.append((name, at_end, len(self.entries)))

    def leave(self, *, failed: bool) -> None:
        """The innermost module has run; nothing of it counts if it raised."""
        _, at_end, before = self.path.pop()
        at_end()
        if failed:
            del self.entries[before:]

    def finish(self) -> Log:
        """Switches the mode off, also late, when an interrupt skipped the end, and returns the log."""
        while self.path:
            self.path.pop()[1]()
        remove_mode(self)
        # Softmaxes that weigh no keys (gates, routers) are dropped, unless nothing else was seen.
        log = [(name, operation) for name, operation in self.entries if operation.from_product] or self.entries
        return [(name, operation.four_d(self._folds)) for name, operation in log]

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function inside an eager module: nothing here can be traced
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        # torch.Tensor.__matmul__, torch.matmul and Tensor.matmul are all "matmul".
        name = str(getattr(func, "__name__", "")).strip("_")
        if func is F.scaled_dot_product_attention:
            operation = product.read_sdpa(*args, **kwargs)
            self.log(self._mark_cross(operation, operation.query, operation.key))
        elif name == "softmax" and (logits := product.softmax_logits(*args, **kwargs)) is not None:
            operation = self._known(logits) or Operation(from_product=False)
            self.log(dataclasses.replace(operation, logits=logits))
        result = func(*args, **kwargs)  # softmax(scores, out=scores) writes to what was logged
        self.follow(name, args, kwargs, result)
        return result

    def follow(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Records one torch function after it ran; `name` is its name without underscores."""
        if self._lineage is not None:
            self._lineage.follow(args, kwargs, result)
        if not isinstance(result, Tensor) or result.ndim < 3:
            return
        if name in product.RESHAPES and args and isinstance(args[0], Tensor):
            _note_fold(self._folds, args[0].shape, result.shape)
        operation = None
        if name in product.PRODUCTS:
            operation = self._product(name, args, kwargs)
        elif self._made:
            operation = self._derived(name, args, kwargs, result)
        if operation is not None:
            self._made[id(result)] = (weakref.ref(result), _compat.version(result), operation)

    def _mark_cross(self, operation: Operation, *factors: object) -> Operation:
        if self._lineage is None or not self._lineage.differ(*factors):
            return operation
        return dataclasses.replace(operation, cross=True)

    def _known(self, tensor: Tensor, *, in_place: bool = False) -> Operation | None:
        """The operation behind a tensor; opaque if the tensor may have been written to since (`scores[..., 0] = 0`)."""
        made = self._made.get(id(tensor))
        if made is None or made[0]() is not tensor:  # a freed tensor leaves its id to another
            return None
        _, version, operation = made
        # Inference tensors do not count writes.
        unchanged = not tensor.is_inference() and version == _compat.version(tensor) - in_place
        return operation if unchanged else operation.opaque()

    def _product(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Operation | None:
        # baddbmm(alibi, batch1=query, batch2=key), matmul(query, other=key)
        args = (*args, *(kwargs[key] for key in product.FACTORS if key in kwargs))
        factors = tensors_in(args)[-2:]
        if any((known := self._known(t)) is not None and not known.from_product for t in factors):
            return None  # probabilities times values
        operation = product.read_product(name, args, kwargs)
        return None if operation is None else self._mark_cross(operation, *factors)

    def _derived(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> Operation | None:
        given = ((t, self._known(t, in_place=t is result)) for t in tensors_in((*args, *kwargs.values())))
        scores, operation = next((pair for pair in given if pair[1] is not None), (result, None))
        if operation is None:
            return None
        if scores is result and self._made[id(scores)][1] == _compat.version(scores):
            return None  # nothing was done and nothing changes, as in contiguous() of a contiguous tensor
        same_matrix = scores.shape[-2:] == result.shape[-2:]
        if not (same_matrix or scores.numel() == result.numel() or scores.shape[:-1] == result.shape[:-1]):
            return None
        # Transposed scores are for the other direction, longer ones have a sink, wider ones a bias for each head: all
        # are scores, none is scale q k^T.
        same_shape = scores.shape == result.shape or (name in product.RESHAPES and same_matrix)
        if name == "softmax" or not same_shape:
            return operation.opaque(from_product=name != "softmax", moved=not same_shape)
        return product.read_step(name, operation, scores, args, kwargs) or operation.opaque()


class Lineage:
    """Records which input each tensor descends from, to tell self-attention from cross-attention of equal length.

    Two embeddings are two origins. A tensor has the origin of the first argument that has one; if none has, it is an
    origin itself. Integer tensors (ids, positions) and tensors without arguments (zeros) have no origin.
    """

    def __init__(self) -> None:
        self._origins: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def follow(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Records one torch function after it ran."""
        # A DTensor and its part on this process are one: the way from one to the other is no torch function.
        made = [_compat.local_part(t) for t in tensors_in((result,)) if t.is_floating_point()]
        given = [_compat.local_part(t) for t in tensors_in((*args, *kwargs.values()))]
        if not made or not given:
            return
        origin = next((o for o in map(self.origin, given) if o is not None), None)
        if origin is None:
            origin = self._count = self._count + 1
            # An input of the model has the same origin as what is made of it; weights have no origin.
            made += [t for t in given if t.is_floating_point() and not isinstance(t, nn.Parameter)][:1]
        for tensor in made:
            if self.origin(tensor) is None:
                self._origins[id(tensor)] = (weakref.ref(tensor), origin)

    def origin(self, tensor: object) -> int | None:
        """Number of a tensor's origin, if it has one."""
        tensor = _compat.local_part(tensor) if isinstance(tensor, Tensor) else tensor
        ref, origin = self._origins.get(id(tensor), (None, 0))
        return origin if ref is not None and ref() is tensor else None

    def differ(self, *tensors: object) -> bool:
        """Whether two tensors are known to have different origins."""
        return len(set(map(self.origin, tensors)) - {None}) == 2


def _note_fold(folds: dict[int, tuple[int, int]], before: torch.Size, after: torch.Size) -> None:
    wide, flat = (before, after) if len(before) == 4 else (after, before)
    if len(wide) == 4 and flat == (wide[0] * wide[1], *wide[2:]):
        folds.setdefault(flat[0], (wide[0], wide[1]))


_FOLDS = (Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten, torch.unflatten)


class CompiledMode(TorchFunctionMode):
    """The mode that `torch.compile` traces. It lives as long as the watch, and keeps what it sees in one slot.

    A new mode or a growing list would be recompiled at each step. Queries and keys are known only for
    `scaled_dot_product_attention` here, because a trail of weak references cannot be traced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot: tuple[tuple[Any, ...], ...] = ()
        self.shapes: tuple[tuple[torch.Size, torch.Size], ...] = ()  # before and after each reshape

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        if func in (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax):
            self.slot = (*self.slot, (func is F.scaled_dot_product_attention, args, kwargs))
        if func is Tensor.unflatten:  # its super() is more than torch.compile could trace under a mode in torch 2.11
            func = torch.unflatten
        result = func(*args, **kwargs)
        if func in _FOLDS and args:
            self.shapes = (*self.shapes, (args[0].shape, result.shape))
        return result

    def take(self) -> list[Operation]:
        """Empties the slot; called outside of compiled code."""
        taken, self.slot = self.slot, ()
        shapes, self.shapes = self.shapes, ()
        folds: dict[int, tuple[int, int]] = {}
        for before, after in shapes:
            _note_fold(folds, before, after)
        found = []
        for is_sdpa, args, kwargs in taken:
            if is_sdpa:
                found.append(product.read_sdpa(*args, **kwargs))
            elif (logits := product.softmax_logits(*args, **kwargs)) is not None:
                found.append(Operation(logits=logits))
        return [operation.four_d(folds) for operation in found]


def push_mode(mode: TorchFunctionMode) -> None:
    """Switches a mode on, not by its own `__enter__`: the mode may be the user's, and do more there."""
    TorchFunctionMode.__enter__(mode)


def pop_mode(mode: TorchFunctionMode) -> None:
    """Switches the innermost mode off."""
    TorchFunctionMode.__exit__(mode, None, None, None)


def remove_mode(mode: TorchFunctionMode) -> bool:
    """Takes one mode off the stack, wherever it is, and leaves the others in order; False if it was not there."""
    stack = _compat.function_modes()
    if mode not in stack:
        return False
    place = stack.index(mode)
    for other in reversed(stack[place:]):
        pop_mode(other)
    for other in stack[place + 1 :]:
        push_mode(other)
    return True
