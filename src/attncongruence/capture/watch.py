"""Watches one module: the hooks that switch a mode on before its forward and off after it."""

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat
from attncongruence.capture.hooks import Hook, nothing
from attncongruence.capture.mode import AttentionMode, CompiledMode, pop_mode, push_mode, remove_mode
from attncongruence.capture.product import Trail
from attncongruence.capture.seen import Seen
from attncongruence.integrations import kernels


def gradients_off() -> bool:
    """Whether this forward pass leaves no graph."""
    return not torch.is_grad_enabled()


def recomputing() -> bool:
    """Whether a backward pass is running: checkpointing calls forward again there, and it was seen before."""
    return _compat.in_backward()


@dataclasses.dataclass(frozen=True)
class _Active:
    """One forward pass of a watched module: what sees it, and what was so before it."""

    mode: AttentionMode
    seen: list[Seen]
    error: BaseException | None
    restore_kernel: Callable[[], None]


def show_kernel(module: nn.Module) -> Callable[[], None]:
    """Lets a mode see kernels of transformers that no torch function shows, until the returned function is called."""
    return kernels.show_kernel(module) if "config" in module.__dict__ else nothing


_FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def on_torch_fast_path(module: nn.Module, args: Iterable[object]) -> bool:
    """Whether torch's own encoder runs frozen, in evaluation: a mode would change its path, or break it (nested)."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(t.is_nested for t in tensors):
        return True
    if module.training or not isinstance(module, _FAST):
        return False
    return not any(t.requires_grad for t in (*tensors, *module.parameters()))


def refuse_replica(module: nn.Module) -> None:
    """Raises in a copy that torch.nn.DataParallel made for one step: hooks are shared with it, nothing else is."""
    if _compat.is_replica(module):
        raise RuntimeError(
            f"this {type(module).__name__} is a replica of torch.nn.DataParallel, whose copies capture cannot follow. "
            "Use DistributedDataParallel (one process per device), or one device."
        )


class Watch:
    """The hooks of one module; `done` gets its attention operations, in order, each time its forward has ended.

    Hook objects are copied and pickled along with the model. Theirs are inert: a copy of the model is not watched.
    """

    def __init__(
        self, module: nn.Module, name: str, analysis: bool, done: Callable[["Watch", list[Seen]], None]
    ) -> None:
        self.module, self.name, self.analysis, self.done = module, name, analysis, done
        self.entered = self.skipped_without_grad = self.closed = False
        self._local = threading.local()
        self.compiled = CompiledMode()
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Puts the hooks on, if they are off."""
        if not self._handles:
            self._handles = [
                self.module.register_forward_pre_hook(Hook(self.enter), with_kwargs=True),
                # First of all forward hooks, so that the mode is off before anyone else's code runs.
                self.module.register_forward_hook(Hook(self.leave), prepend=True, always_call=True),
            ]

    def detach(self) -> None:
        """Takes the hooks off, if they are on."""
        while self._handles:
            self._handles.pop().remove()

    def close(self) -> None:
        """Takes the hooks off for good and lets go of everything."""
        self.closed = True
        self.detach()
        self.drop_stale()
        self.compiled.take()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before forward: switches the mode on."""
        if kwargs is None:  # the model itself is watched, and its own hook has just taken this one off
            return
        if torch.compiler.is_compiling():
            # Reading `closed` makes it a guard: after close() the model is compiled again, without us.
            if not self.closed and (self.analysis or not gradients_off()):
                self.compiled.slot = ()
                push_mode(self.compiled)
            return
        self.drop_stale()
        refuse_replica(module)
        if module is not self.module or recomputing():
            return
        self.entered = True
        if gradients_off() and not self.analysis:
            self.skipped_without_grad = True
            return
        if on_torch_fast_path(module, (*args, *kwargs.values())):
            return
        seen: list[Seen] = []
        mode = AttentionMode(seen.append)
        self._local.active = _Active(mode, seen, sys.exc_info()[1], show_kernel(module))
        push_mode(mode)

    def leave(self, module: nn.Module, args: object, result: object) -> None:
        """After forward, also after one that raised: switches the mode off and hands over what it saw."""
        if torch.compiler.is_compiling():
            if not self.closed and (self.analysis or not gradients_off()):
                pop_mode(self.compiled)
            return
        active: _Active | None = getattr(self._local, "active", None)
        if active is None or module is not self.module:
            return
        self.drop_stale()
        failed = result is None and sys.exc_info()[1] is not active.error
        if not failed:
            self.done(self, _attention_only(active.seen, active.mode.trail))

    def drop_stale(self) -> None:
        """Takes this thread's mode off the stack: at the end, or late, when an interrupt skipped the end."""
        active: _Active | None = getattr(self._local, "active", None)
        if active is not None:
            active.restore_kernel()
            remove_mode(active.mode)
            self._local.active = None


def _attention_only(seen: list[Seen], trail: Trail) -> list[Seen]:
    """Drops softmaxes that weigh no keys (gates, routers), unless nothing else was seen; finds batch and heads."""
    products = [s for s in seen if s.from_product] or seen
    return [s.with_fold(trail.fold_of) for s in products]
