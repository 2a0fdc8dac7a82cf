"""Which modules of a model attend: by name and class, by the user's choice, or by watching one forward pass."""

import fnmatch
import re
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from attncongruence import _compat
from attncongruence.capture.hooks import eager_pass_hooks, nothing, uncompiled_hook
from attncongruence.capture.mode import AttentionMode, push_mode, remove_mode
from attncongruence.capture.seen import Seen
from attncongruence.capture.streams import Streams
from attncongruence.capture.watch import gradients_off, on_torch_fast_path, recomputing, refuse_replica, show_kernel

_WRAPPERS = re.compile(rf"(?:^|\.)(?:{'|'.join(_compat.WRAPPERS)})(?=\.|$)")


def find_attention(model: nn.Module) -> dict[str, str]:
    """Modules that look like attention, by dotted name: candidates for `capture_attention(model, layers=name)`.

    Only names and classes are looked at, nothing runs; what really attends is known after a forward pass. Wrappers
    around another candidate are left out.

    Args:
        model: any `nn.Module`.

    Returns:
        `{dotted name: class name}` in order of definition.

    Example:
        >>> find_attention(nn.TransformerEncoderLayer(8, 2))
        {'self_attn': 'MultiheadAttention'}
    """
    named = {name: module for name, module in named_modules(model).items() if _looks_like_attention(module)}
    return {
        name: type(module).__name__
        for name, module in named.items()
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in named)
    }


def _alias(model: nn.Module, name: str) -> nn.Module | None:
    """The module by another of its names, where one module is shared."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def some_candidates(model: nn.Module) -> str:
    """The last of `find_attention`, for an error message."""
    names = [name or "the model itself" for name in find_attention(model)]
    return ", ".join(names[-6:]) or "none, by their class names"


def _looks_like_attention(module: nn.Module) -> bool:
    if not any(True for _ in module.parameters()):
        return False
    children = [name for name, _ in module.named_children()]
    if "qkv" in children or all(any(name.startswith(letter) for name in children) for letter in "qkv"):
        return True
    words = type(module).__name__.lower()
    # Parts of an attention attend to nothing.
    return ("attention" in words or "attn" in words) and not words.endswith(("output", "norm", "pooling", "mlp"))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by dotted name, without the names of wrappers (`_orig_mod`, FSDP, checkpointing)."""
    return {_WRAPPERS.sub("", name).lstrip("."): module for name, module in model.named_modules()}


def select_modules(model: nn.Module, layers: Iterable[str | nn.Module]) -> dict[str, nn.Module]:
    """The modules meant by dotted names, wildcards and modules, in order of definition.

    Raises:
        ValueError: a name that matches nothing, or a module that is not part of the model.
    """
    named = named_modules(model)
    chosen: set[str] = set()
    for layer in layers:
        if isinstance(layer, str):
            names = [layer] if layer in named else [name for name in named if fnmatch.fnmatchcase(name, layer)]
            names = names or [first for first, module in named.items() if module is _alias(model, layer)]
            wanted = f"no module is called {layer!r}"
        else:
            names = [name for name, module in named.items() if module is layer]
            wanted = f"the given {type(layer).__name__} is not a module of this {type(model).__name__}"
        if not names:
            raise ValueError(
                f"{wanted}. Modules that look like attention: {some_candidates(model)} (see find_attention)"
            )
        chosen.update(names)
    return {name: module for name, module in named.items() if name in chosen}


Log = list[tuple[str, Seen]]


class Finder:
    """Watches whole forward passes; `done(log, whole)` gets what attended, in order: `(module name, operation)`.

    The name is that of the innermost module with parameters, so that a `nn.Softmax` or `nn.Dropout` called on the way
    does not stand for the attention it is part of. A pass is an outermost call of any module: `whole` says that it was
    the model's own forward, and not that of a part which someone called directly.
    """

    def __init__(self, model: nn.Module, analysis: bool, done: Callable[[Log, bool], None]) -> None:
        self.analysis, self.done = analysis, done
        self._local = threading.local()
        self._handles: list[Any] = []
        self._candidates = set(find_attention(model))
        for name, module in named_modules(model).items():
            if module is model or any(True for _ in module.parameters()):
                self._attach(name, module)

    def _attach(self, name: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            refuse_replica(module)
            frozen = not self.analysis and on_torch_fast_path(module, (*args, *kwargs.values()))
            self._enter(name, module, unwatched=frozen)

        def leave(module: nn.Module, args: object, result: object) -> None:
            self._leave(name, result)

        # Under torch.compile this one pass runs eagerly: layers are not known yet, and hooks on all would be traced.
        before, after = (uncompiled_hook(),) * 2 if name else eager_pass_hooks()
        self._handles.append(module.register_forward_pre_hook(before(enter), with_kwargs=True))
        self._handles.append(module.register_forward_hook(after(leave), always_call=True, prepend=True))

    def _enter(self, name: str, module: nn.Module, *, unwatched: bool) -> None:
        now: _Pass | None = getattr(self._local, "now", None)
        if now is not None and not name:
            now.stop()  # an interrupt skipped the end of the last pass
            now = None
        if now is None:
            if recomputing() or (gradients_off() and not self.analysis):
                return
            now = self._local.now = _Pass()
        now.enter(name, show_kernel(module) if name in self._candidates else nothing, unwatched)

    def _leave(self, name: str, result: object) -> None:
        now: _Pass | None = getattr(self._local, "now", None)
        if now is None:
            return
        now.leave()
        if not now.path:
            self._local.now = None
            log = now.stop()
            if not (result is None and sys.exc_info()[1] is not now.error):
                self.done(log, not name)

    def close(self) -> None:
        """Takes all hooks off, and the mode of a pass that was cut short."""
        while self._handles:
            self._handles.pop().remove()
        now: _Pass | None = getattr(self._local, "now", None)
        if now is not None:
            self._local.now = None
            now.stop()


class _Pass:
    """One forward pass of one thread: the path to the module that runs, and what attended."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.error = sys.exc_info()[1]
        self._log: Log = []
        self._undo: list[Callable[[], None]] = []
        self._unwatched = 0  # depth at which watching stopped
        self._mode = AttentionMode(self._see, Streams())
        push_mode(self._mode)

    def enter(self, name: str, undo: Callable[[], None], unwatched: bool) -> None:
        self.path.append(name)
        self._undo.append(undo)
        if unwatched and not self._unwatched:
            self._unwatched = len(self.path)
            remove_mode(self._mode)

    def leave(self) -> None:
        if len(self.path) == self._unwatched:
            self._unwatched = 0
            push_mode(self._mode)
        self.path.pop()
        self._undo.pop()()

    def _see(self, seen: Seen) -> None:
        if seen.from_product:
            self._log.append((self.path[-1], seen))

    def stop(self) -> Log:
        remove_mode(self._mode)
        while self._undo:
            self._undo.pop()()
        return [(name, seen.with_fold(self._mode.trail.fold_of)) for name, seen in self._log]


def self_attention(log: Log) -> list[tuple[str, int, Seen]]:
    """The entries where a sequence attends to itself: module, how many of its operations came before, operation."""
    count: dict[str, int] = {}
    found = []
    for name, seen in log:
        number = count[name] = count.get(name, -1) + 1
        if not crosses(seen):
            found.append((name, number, seen))
    return found


def crosses(seen: Seen) -> bool:
    """Whether queries and keys come from two sequences."""
    return seen.cross or seen.lengths[0] != seen.lengths[1]
