"""Watches modules: hooks that switch a mode on before a forward and off after it."""

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat, _compat_distributed, _compat_stack
from attncongruence.capture.axes import Node
from attncongruence.capture.folds import Plan, Unseen
from attncongruence.capture.kernels import do_nothing, show_kernel
from attncongruence.capture.origins import Sizes
from attncongruence.capture.product import Log
from attncongruence.capture.trace import AttentionMode, CompiledMode, pop_mode, push_mode, remove_mode

OnEnd = Callable[[str, Log], None]
DATA_PARALLEL = (
    "torch.nn.DataParallel copies the model for each device in each step, and capture cannot follow the copies. Use "
    "DistributedDataParallel (one process per device), or one device."
)


class Watch:
    """Hooks on one module, or on all modules of a model.

    `on_end(name, log)` gets the attention operations of each forward pass: of the module, or of whichever module of the
    model was called from outside. The names in the log are those of the innermost modules that ran. `candidates` are
    given for a whole model: the names of the modules whose hidden kernels are shown.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        analysis: bool,
        on_end: OnEnd,
        candidates: Iterable[str] | None = None,
        plan: Plan | None = None,
    ) -> None:
        self.modules, self.analysis, self.on_end = modules, analysis, on_end
        self.ran: set[bool] = set()  # since the last pop: whether passes through it were to be recorded
        self.closed = False
        self._thread, self.compiled = _ThisThread(), CompiledMode(analysis=analysis)
        self.compiled.plan = plan
        self.unseen: Unseen = []  # of the last pass that was followed
        self.sizes: Sizes = None  # of the model's inputs
        self._table: dict[Any, Node] = {}
        self._whole, self._candidates = candidates is not None, modules if candidates is None else set(candidates)
        self.handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Puts the hooks on, if they are off."""
        if self.handles:
            return
        for name, module in self.modules.items():
            before, after = Hook, Hook
            if self._whole:
                # Under torch.compile this one pass runs eagerly: which layers to trace is not known yet.
                before, after = (uncompiled_hook(),) * 2 if name else eager_pass_hooks()
            enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            self.handles += hook_module(module, before(enter), after(leave))

    def stop(self) -> Log:
        """Ends this thread's pass, also late, when an interrupt skipped the end; returns what attended in it."""
        mode, self._thread.mode = self._thread.mode, None
        return [] if mode is None else mode.finish()

    def close(self) -> None:
        """Takes the hooks off for good and lets go of everything."""
        self.closed = True
        unhook(self.handles)
        self.stop()
        self.compiled.slot = ()

    def _traces(self) -> bool:
        # torch.compile guards on `closed`: after close() the model is compiled again, without us.
        return not self.closed and (self.analysis or torch.is_grad_enabled())

    def _records(self) -> bool:
        """Whether to record what runs now.

        Not with gradients off, where a model ranks negatives inside its forward. What reentrant checkpointing runs has
        a gradient all the same, which its record lacks: it is recorded so that pop() can say so.
        """
        return self._traces() or (not self.closed and _compat_stack.in_function())

    def _logs(self) -> bool:
        """Whether to record one operation of a pass."""
        if not self._records():
            self.ran.add(False)
            return False
        return not _compat.in_backward()

    def _unwind(self, mode: AttentionMode, calls: list[object] | None) -> None:
        """Leaves the modules of a pass that are not among the calls on the stack: an interrupt cut them short."""
        names = [name for name, *_ in mode.path]
        while names and names.count(names[-1]) > sum(call is self.modules[names[-1]] for call in calls or ()):
            mode.leave(failed=True)
            names.pop()
        if not names:
            self.stop()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is None:  # the model itself is watched, and its own hook has just taken this one off
            return
        if torch.compiler.is_compiling():
            if self._traces():
                self.compiled.slot = self.compiled.shapes = ()
                push_mode(self.compiled)
            return
        if _compat.is_replica(module):  # made for one step: it has the model's hooks and nothing else
            raise RuntimeError(f"this {type(module).__name__} is a replica of torch.nn.DataParallel. {DATA_PARALLEL}")
        # Checkpointing calls forward again in backward; the module was seen before.
        if module is not self.modules[name] or _compat.in_backward():
            return
        if self._thread.mode is not None:
            calls = _compat_stack.calls_around(module)
            if calls is not None or not (self._whole and name):
                self._unwind(self._thread.mode, calls)
        fast = on_torch_fast_path(module, (*args, *kwargs.values()), self.analysis)
        mode = self._thread.mode
        if mode is None:
            records = self._records()
            if not self._whole:
                self.ran.add(records)
            if not records or (fast and not self._whole):
                return
            mode = self._thread.mode = AttentionMode(
                whole=self._whole, records=self._logs, table=self._table, sizes=self.sizes
            )
            push_mode(mode)
        at_end: Callable[[], None] = do_nothing
        if fast and not self.analysis:
            if remove_mode(mode):
                at_end = functools.partial(push_mode, mode)
        elif name in self._candidates:
            at_end = show_kernel(module)
        mode.enter(name, _listen(name, mode.entries, at_end))

    def _leave(self, name: str, module: nn.Module, args: object, result: object) -> None:
        if torch.compiler.is_compiling():
            if self._traces():
                pop_mode(self.compiled)
        elif (mode := self._thread.mode) is not None and module is self.modules[name] and not _compat.in_backward():
            if len(mode.path) > 1 and (calls := _compat_stack.calls_around(module)) is not None:
                self._unwind(mode, [module, *calls])
            failed = raised(result, mode.error_before)
            mode.leave(failed=failed)
            if not mode.path:
                log = self.stop()
                if not failed:
                    self.compiled.plan, self.unseen = mode.plan, mode.unseen
                    self.on_end(name, log)


def _listen(name: str, log: Log, at_end: Callable[[], None]) -> Callable[[], None]:
    """`at_end`, which then also marks what a module logs until then, if the module speaks to other processes."""
    start, before = len(log), _compat_distributed.collectives()
    if not before:  # this process works by itself
        return at_end

    def end() -> None:
        at_end()
        if groups := frozenset(g for g, count in _compat_distributed.collectives().items() if count != before.get(g)):
            log[start:] = [(n, dataclasses.replace(o, spoke=groups) if n == name else o) for n, o in log[start:]]

    return end


class _ThisThread(threading.local):
    mode: AttentionMode | None = None  # on while a pass is recorded


class Hook:
    """A hook that does nothing in a copy or a pickle, so that a copy of a watched model is not watched."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:  # noqa: D102
        return self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (do_nothing,)


@functools.cache
def uncompiled_hook() -> type[Hook]:
    """A type of hook that `torch.compile` does not trace. Made on first use, because it imports dynamo."""
    return type("UncompiledHook", (Hook,), {"__call__": torch.compiler.disable(Hook.__call__)})


@functools.cache
def eager_pass_hooks() -> tuple[type[Hook], type[Hook]]:
    """Two types of hooks: the first switches `torch.compile` off for one forward pass, the second on again."""
    compiler = threading.local()  # a pass may run inside of another one of the same model

    def open_pass(self: Hook, *args: Any) -> None:
        compiler.callbacks = [*getattr(compiler, "callbacks", ()), _compat.set_compiler(None)]
        self.call(*args)

    def close_pass(self: Hook, *args: Any) -> None:
        self.call(*args)
        *compiler.callbacks, callback = getattr(compiler, "callbacks", None) or [None]
        _compat.set_compiler(callback)

    return (
        type("OpensEagerPass", (Hook,), {"__call__": _compat.skip_frame(open_pass)}),
        type("ClosesEagerPass", (Hook,), {"__call__": _compat.skip_frame(close_pass)}),
    )


def hook_module(module: nn.Module, before: Hook, after: Hook) -> list[Any]:
    """Puts a hook before a forward and one after it, which is called even if forward raises; returns the handles."""
    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        # First of all forward hooks, so that a mode is off before anyone else's code runs.
        module.register_forward_hook(after, prepend=True, always_call=True),
    ]


def unhook(handles: list[Any]) -> None:
    """Takes hooks off and empties the list."""
    while handles:
        handles.pop().remove()


def raised(result: object, error_before: BaseException | None) -> bool:
    """Whether a hook after forward was called because forward raised; a forward that returns None did not."""
    return result is None and sys.exc_info()[1] is not error_before


def on_torch_fast_path(module: nn.Module, args: Iterable[object], analysis: bool) -> bool:
    """Whether torch's encoder runs frozen in evaluation, or on nested tensors: a mode would change or break that.

    With gradients off it runs as if it were frozen, which is for analysis to record.
    """
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.is_nested for t in tensors):
        return True
    encoders = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
    if module.training or not isinstance(module, encoders):
        return False
    learns = torch.is_grad_enabled() or analysis
    return not (learns and any(t.requires_grad for t in (*tensors, *module.parameters())))
