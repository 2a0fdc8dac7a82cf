"""capture_attention: hooks on the chosen layers, and the records they leave."""

import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from attncongruence import _compat
from attncongruence.capture import reasons
from attncongruence.capture.find import Finder, Log, crosses, select_modules, self_attention
from attncongruence.capture.hooks import uncompiled_hook
from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.seen import Seen
from attncongruence.capture.watch import Watch, gradients_off, recomputing

_MANY = 32
Layers = int | str | nn.Module | Iterable[int | str | nn.Module]


def capture_attention(model: nn.Module, layers: Layers = -1, *, analysis: bool = False) -> "AttentionCapture":
    """Takes the pre-softmax attention of chosen layers, with gradient, each time the model runs.

    Nothing in the model changes: no configuration, no weights, no attention kernel, and its output stays the same bit
    for bit. Forward passes with gradients off (validation) are left alone.

    Args:
        model: any `nn.Module`; best before its first run if it is compiled.
        layers: which attention to take. An int or ints: self-attention by order of execution, -1 is the last one that
            runs; they are found by watching the first forward pass. Names: dotted, `*` stands for anything (see
            `find_attention`). Modules: as they are.
        analysis: record also where no gradient can flow (under `torch.no_grad`, from frozen layers). Not for losses.

    Returns:
        An `AttentionCapture`: take records with `.pop()`, end it with `.close()` or a `with` block.

    Raises:
        ValueError: no such layer, or an empty choice.
        RuntimeError: a model in `torch.nn.DataParallel`; a version of torch that capture cannot work with.

    Example:
        >>> encoder = nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True)
        >>> with capture_attention(encoder) as capture:
        ...     _ = encoder(torch.randn(3, 5, 8))
        ...     capture.pop()
        CapturedAttention('self_attn', batch=3, queries=5, keys=5)
    """
    return AttentionCapture(model, layers, analysis=analysis)


class AttentionCapture:
    """The records of some attention layers; made by `capture_attention`.

    Each forward pass leaves one record for each time a chosen layer attends. `pop` takes them out; after that nothing
    here keeps a graph alive.
    """

    def __init__(self, model: nn.Module, layers: Layers = -1, *, analysis: bool = False) -> None:
        if isinstance(model, nn.DataParallel):
            raise RuntimeError(
                "torch.nn.DataParallel copies the model for each device in each step, and capture cannot follow the "
                "copies. Use DistributedDataParallel (one process per device), or one device."
            )
        indices, others = _sorted_choice(layers)
        _compat.check(by_number=bool(indices))
        self.model = unwrapped(model)
        self.analysis = analysis
        self._records: list[tuple[object, CapturedAttention]] = []
        self._watches: list[Watch] = []
        self._finder: Finder | None = None
        self._partial: Log = []
        self._keep: dict[str, set[int]] = {}
        self._pass = _Pass()
        self._passes = self._passes_without_grad = 0
        self._trouble = ""
        self._closed = self._warned = self._popped = False
        self._handles: list[Any] = []
        self._indices = indices
        hook = uncompiled_hook()
        self._handles += [
            self.model.register_forward_pre_hook(hook(self._begin)),
            self.model.register_forward_hook(hook(self._end), always_call=True, prepend=True),
        ]
        try:
            for name, module in select_modules(self.model, others).items():
                self._watches.append(Watch(module, name, analysis, self._take))
        except ValueError:
            self.close()
            raise
        if indices:
            self._finder = Finder(self.model, analysis, self._found)

    def pop(self) -> CapturedAttention:
        """The one record since the last pop.

        Raises:
            RuntimeError: there is none, there are several, or no gradient can flow from it; the message says why.
        """
        self._resolve()
        if len(self._records) > 1:
            names = ", ".join(record.layer for _, record in self._records[:8])
            raise RuntimeError(
                f"pop() takes the one record since the last pop, but {len(self._records)} wait: {names}. Take them all "
                "with pop_all(), choose one layer, or pop after each forward pass."
            )
        return self.pop_all()[0]

    def pop_all(self) -> list[CapturedAttention]:
        """All records since the last pop, in order of execution.

        Raises:
            RuntimeError: there is none, or no gradient can flow from one; the message says why.
        """
        self._resolve()
        records = [record for _, record in self._records]
        self._records = []
        if not self._pass.running:
            self._pass.count = {}
        if not records:
            raise RuntimeError(f"nothing was captured: {self._why_nothing()}")
        self._popped, self._passes, self._passes_without_grad = True, 0, 0
        for watch in self._watches:
            watch.entered = watch.skipped_without_grad = False
        for record in records:
            if not (self.analysis or record.requires_grad):
                raise RuntimeError(f"{record.layer} {reasons.FROZEN}")
        return records

    def forget(self) -> None:
        """Drops all records since the last pop, however many there are."""
        self._records, self._partial = [], []

    def close(self) -> None:
        """Takes every hook off and forgets all records: the model is as it was found."""
        for watch in self._watches:
            watch.close()
        while self._handles:
            self._handles.pop().remove()
        if self._finder is not None:
            self._finder.close()
        self._finder, self._watches, self._records, self._partial = None, [], [], []
        self._closed = True

    def __enter__(self) -> "AttentionCapture":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, module: nn.Module, args: object) -> None:
        """Before the model's own forward."""
        if module is not self.model or recomputing():
            return
        if self._pass.running:  # an interrupt cut this thread's last pass short
            self._forget_pass()
        self._pass.begin()
        self._passes += 1
        self._passes_without_grad += gradients_off()
        for watch in self._watches:
            watch.drop_stale()
            watch.compiled.take()  # left by a recomputation in backward
            # nn.TransformerEncoderLayer leaves its fast path when a hook is on: validation runs without them.
            if gradients_off() and not self.analysis:
                watch.detach()

    def _end(self, module: nn.Module, args: object, result: object) -> None:
        """After it, also when it raised."""
        if module is not self.model or not self._pass.running:
            return
        self._pass.running = False
        for watch in self._watches:
            self._take(watch, watch.compiled.take())
            watch.attach()
        if result is None and sys.exc_info()[1] is not self._pass.error:
            self._forget_pass()
        if not self._warned and len(self._records) > _MANY * max(1, len(self._watches)):
            self._warned = True
            warnings.warn(reasons.MANY_WAIT.format(len(self._records)), stacklevel=2)

    def _forget_pass(self) -> None:
        self._records = [(token, record) for token, record in self._records if token is not self._pass.token]

    def _take(self, watch: Watch, seen: list[Seen]) -> None:
        """From a layer's hook."""
        keep = self._keep.get(watch.name)
        count = self._pass.count
        for operation in seen:
            number = count[watch.name] = count.get(watch.name, -1) + 1
            if keep is None or number in keep:
                self._records.append((self._pass.token, CapturedAttention(watch.name, operation)))

    def _found(self, log: Log, whole: bool) -> None:
        """From the finder: a forward pass ended."""
        if not whole:
            self._partial += log
            return
        self._partial = []
        self._choose(log)

    def _resolve(self) -> None:
        # The model's own forward never ran, but parts of it did (a wrapper calls them): what they did was the pass.
        if self._finder is not None and self._partial:
            log, self._partial = self._partial, []
            self._choose(log)

    def _choose(self, log: Log) -> None:
        found = self_attention(log)
        try:
            chosen = [found[index] for index in self._indices]
        except IndexError:
            self._trouble = reasons.index_out_of_range(self._indices, len(found), log)
            return
        for name, _, seen in chosen:
            if crossed := [other for other, s in log if crosses(s) and s.lengths[0] == seen.lengths[0]]:
                warnings.warn(reasons.two_streams(name, crossed), stacklevel=2)
        self._records += [(self._pass.token, CapturedAttention(name, seen)) for name, _, seen in chosen]
        if self._finder is None:  # another thread was first
            return
        self._finder.close()
        self._finder = None
        for name, module in select_modules(self.model, dict.fromkeys(name for name, _, _ in chosen)).items():
            if sum(other == name for other, _, _ in found) > 1:
                self._keep[name] = {number for other, number, _ in chosen if other == name}
            self._watches.append(Watch(module, name, self.analysis, self._take))

    def _why_nothing(self) -> str:
        if self._closed:
            return reasons.CLOSED
        entered = any(watch.entered for watch in self._watches)
        skipped = any(watch.skipped_without_grad for watch in self._watches)
        if not self._passes and not entered and self._popped:
            return reasons.TAKEN
        if not self._passes and not entered:
            return reasons.never_ran(self.model)
        if skipped or self._passes_without_grad == self._passes:
            return reasons.GRADIENTS_OFF
        if self._watches and not entered:
            return reasons.layer_never_ran(watch.name for watch in self._watches)
        return self._trouble + reasons.nothing_seen(self.model)


class _Pass(threading.local):
    """This thread's forward pass through the model."""

    running = False
    token: object = None
    error: BaseException | None = None

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def begin(self) -> None:
        self.running, self.token, self.error, self.count = True, object(), sys.exc_info()[1], {}


def _sorted_choice(layers: Layers) -> tuple[list[int], list[str | nn.Module]]:
    choice = [layers] if isinstance(layers, int | str | nn.Module) else list(layers)
    for layer in choice:
        if isinstance(layer, bool) or not isinstance(layer, int | str | nn.Module):
            raise ValueError(
                f"layers has {layer!r}, a {type(layer).__name__}: it takes ints (order of execution, -1 is the last), "
                "dotted names with wildcards, or modules, one or a list of them"
            )
    if not choice:
        raise ValueError("layers is empty: name at least one, or leave it out for the last self-attention")
    return [c for c in choice if isinstance(c, int)], [c for c in choice if not isinstance(c, int)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch's own wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, _compat.COMPILED, None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model
