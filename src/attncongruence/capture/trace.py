"""Follows a forward pass: modes that see each torch function, and what they record about its tensors."""

import dataclasses
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from attncongruence import _compat
from attncongruence.capture import product
from attncongruence.capture.axes import Node, Trail
from attncongruence.capture.folds import UNSEEN, Fold, Plan, Unseen, attention_of, planned, unplanned
from attncongruence.capture.origins import Sizes
from attncongruence.capture.product import Log, Operation, tensors_in
from attncongruence.capture.versions import kept


class AttentionMode(TorchFunctionMode):
    """One pass through a watched module: runs every function unchanged, and logs the attention operations.

    It records how each tensor was made, so that a softmax leads back to q and k, and these to samples and heads. In a
    pass through a whole model, it also logs scores that weigh values without a softmax that was seen.

    Args:
        whole: whether all modules of a model are watched.
        records: whether what attends at the moment is to be recorded.
        table: what earlier passes through the same module found out about its tensors.
        sizes: of the model's inputs, where they are known.
    """

    def __init__(
        self,
        *,
        whole: bool = False,
        records: Callable[[], bool] = lambda: True,
        table: dict[Any, Node] | None = None,
        sizes: Sizes = None,
    ) -> None:
        super().__init__()
        # Modules that run now; what to do when they have run; how long the log was before.
        self.path: list[tuple[str, Callable[[], None], int]] = []
        self._records = records
        self.error_before = sys.exc_info()[1]
        self.entries: Log = []
        self.plan: Plan = []  # for compiled passes; made when this one has finished
        self.unseen: Unseen = []  # likewise
        self._whole, self._sizes, self._trail = whole, sizes, Trail({} if table is None else table)
        # By id: the tensor, its version, and the operation behind it. Weak, so that the model's intermediate scores
        # are freed as early as they are without us.
        self._made: dict[int, tuple[weakref.ref[Tensor], float, Operation]] = {}

    def log(self, operation: Operation) -> None:
        """Adds an operation of the innermost module that runs, if it is to be recorded."""
        if self._records():
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
        log, self.plan, self.unseen = attention_of(self.entries, self._sizes, whole=self._whole)
        return log

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a compiled function inside an eager module: nothing here can be traced
            return func(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        # torch.Tensor.__matmul__, torch.matmul and Tensor.matmul are all "matmul".
        name = str(getattr(func, "__name__", "")).strip("_")
        if name == "get":  # Tensor.mT.__get__
            name = str(getattr(func.__self__, "__name__", ""))
        if func is F.scaled_dot_product_attention:
            self.log(self._with_node(product.read_sdpa(*args, **kwargs)))
        elif name == "softmax" and (logits := product.softmax_logits(*args, **kwargs)) is not None:
            operation = self._known(logits) or Operation(from_product=False)
            self.log(dataclasses.replace(operation, logits=logits, where=self._trail.node(logits)))
        result = func(*args, **kwargs)  # softmax(scores, out=scores) writes to what was logged
        self.follow(name, args, kwargs, result, func)
        return result

    def follow(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object, func: Any = None
    ) -> None:
        """Records one torch function after it ran; `name` is its name without underscores."""
        scores = operation = None
        if isinstance(result, Tensor) and result.ndim >= 3:
            if name in product.PRODUCTS:
                operation = self._product(name, args, kwargs)
            elif self._made:
                scores, operation = self._derived(name, args, kwargs, result)
        self._trail.follow(func, name, args, kwargs, result, scores)
        if operation is not None:
            assert isinstance(result, Tensor)
            if operation.product is None and self._trail.node(result).kind == "product":
                operation = self._with_node(operation, self._trail.node(result))
            self._made[id(result)] = (weakref.ref(result), _compat.version(result), operation)

    def _with_node(self, operation: Operation, node: Node | None = None) -> Operation:
        """An operation that begins, with what is known about its scores."""
        if node is None:
            assert operation.query is not None
            assert operation.key is not None
            node = self._trail.product(operation.query, operation.key)
        query, key = (parent.root for parent in node.parents)
        stages = (node,) * len(operation.masks)
        return dataclasses.replace(operation, product=node, where=node, stages=stages, cross=query is not key)

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
        known = [(scores, operation) for scores in factors if (operation := self._known(scores)) is not None]
        if not all(operation.from_product for _, operation in known):
            return None  # probabilities times values
        for scores, operation in known if self._whole else ():
            # Of learned queries or keys, the product is a projection.
            if operation.product and not any(parent.constant for parent in operation.product.parents):
                unseen = operation.logits_alone(scores.detach(), UNSEEN)
                self.log(dataclasses.replace(unseen, where=self._trail.node(scores)))
        return product.read_product(name, args, kwargs)

    def _derived(
        self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor
    ) -> tuple[Tensor | None, Operation | None]:
        """The scores among some arguments, and the operation behind what was made of them."""
        given = ((t, self._known(t, in_place=t is result)) for t in tensors_in((*args, *kwargs.values())))
        scores, operation = next((pair for pair in given if pair[1] is not None), (result, None))
        if operation is None:
            return None, None
        if scores is result and self._made[id(scores)][1] == _compat.version(scores):
            return scores, None  # nothing was done and nothing changes, as in contiguous() of a contiguous tensor
        same_matrix = scores.shape[-2:] == result.shape[-2:]
        if not (same_matrix or scores.numel() == result.numel() or scores.shape[:-1] == result.shape[:-1]):
            return None, None
        # Transposed scores are for the other direction, longer ones have a sink, wider ones a bias for each head: all
        # are scores, none is scale q k^T.
        same_shape = scores.shape == result.shape or (name in product.RESHAPES and same_matrix)
        if name == "softmax" or not same_shape:
            return scores, operation.opaque(from_product=name != "softmax", moved=not same_shape)
        after = product.read_step(name, operation, scores, args, kwargs)
        if after is None:
            return scores, operation.opaque()
        before = len(operation.masks)
        added = (self._trail.node(scores),) * (len(after.masks) - before)
        return scores, dataclasses.replace(after, stages=(*after.all_stages[:before], *added))


_FOLDS = (Tensor.reshape, Tensor.view, Tensor.flatten, torch.reshape, torch.flatten, torch.unflatten)


class CompiledMode(TorchFunctionMode):
    """The mode that `torch.compile` traces. It lives as long as the watch, and keeps what it sees in one slot.

    A new mode or a growing list would be recompiled at each step. Queries and keys are known only for
    `scaled_dot_product_attention` here, because a trail of weak references cannot be traced.
    """

    def __init__(self, *, analysis: bool = False) -> None:
        super().__init__()
        self._analysis = analysis
        self.slot: tuple[tuple[Any, ...], ...] = ()
        self.shapes: tuple[tuple[torch.Size, torch.Size], ...] = ()  # before and after each reshape
        self.plan: Plan | None = None  # of a pass that was followed

    def __torch_function__(self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _compat.mha_body(*args, **kwargs)
        records = self._analysis or torch.is_grad_enabled()
        if records and func in (F.scaled_dot_product_attention, F.softmax, torch.softmax, Tensor.softmax):
            self.slot = (*self.slot, (func is F.scaled_dot_product_attention, args, kwargs))
        if func is Tensor.unflatten:  # its super() is more than torch.compile could trace under a mode in torch 2.11
            func = torch.unflatten
        result = func(*args, **kwargs)
        if func in _FOLDS and args:
            self.shapes = (*self.shapes, (args[0].shape, result.shape))
        return result

    def take(self, sizes: Sizes) -> list[Operation]:
        """Empties the slot; called outside of compiled code. `sizes` are those of the model's inputs."""
        taken, self.slot = self.slot, ()
        shapes, self.shapes = self.shapes, ()
        calls = []
        for is_sdpa, args, kwargs in taken:
            if is_sdpa:
                calls.append((True, product.read_sdpa(*args, **kwargs)))
            elif (logits := product.softmax_logits(*args, **kwargs)) is not None:
                calls.append((False, Operation(logits=logits)))
        if self.plan is None and calls:
            plan = unplanned(calls, shapes, sizes)
            self.plan = plan if all(isinstance(fold, Fold) for _, _, fold in plan) else None
        else:
            plan = self.plan or []
        return planned(calls, plan)


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
