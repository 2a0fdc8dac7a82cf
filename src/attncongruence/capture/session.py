"""capture_attention: hooks on the chosen layers, and the records they leave."""

import sys
import threading
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from attncongruence import _compat
from attncongruence.capture import messages
from attncongruence.capture.find import crosses, find_attention, select_modules, self_attention, watch_model
from attncongruence.capture.product import Log
from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.watch import Watch, hook_module, raised, uncompiled_hook, unhook

_MANY = 32
Layers = int | str | nn.Module | Iterable[int | str | nn.Module]


def capture_attention(model: nn.Module, layers: Layers = -1, *, analysis: bool = False) -> "AttentionCapture":
    """Captures the pre-softmax attention of chosen layers, with gradient, each time the model runs.

    Nothing in the model changes: no configuration, no weights, no attention kernel, and its output stays the same bit
    for bit. Forward passes with gradients off (validation) are not captured.

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
            raise RuntimeError(messages.DATA_PARALLEL)
        self._indices, others = _by_number_or_not(layers)
        _compat.check(by_number=bool(self._indices))
        self.model = unwrapped(model)
        self.analysis = analysis
        self._records: list[tuple[object, CapturedAttention]] = []  # each with its forward pass
        self._watches: list[Watch] = []
        self._finder: Watch | None = None
        self._log: Log = []  # what attended in passes through parts of the model
        self._keep: dict[str, set[int]] = {}  # which operations of a layer, where it attends several times
        self._thread = _ThisThread()
        self._ran = self._ran_with_grad = False
        self._trouble = ""
        self._closed = self._warned = self._popped = False
        hook = uncompiled_hook()
        self._handles = hook_module(self.model, hook(self._begin), hook(self._end))
        try:
            self._watch(others)
        except ValueError:
            self.close()
            raise
        if self._indices:
            self._finder = watch_model(self.model, analysis, self._on_pass_end)

    def pop(self) -> CapturedAttention:
        """The one record since the last pop.

        Raises:
            RuntimeError: there is none, there are several, or no gradient can flow from it; the message says why.
        """
        records = self._waiting()
        if len(records) > 1:
            names = ", ".join(record.layer for record in records[:8])
            raise RuntimeError(messages.SEVERAL.format(len(records), names))
        return self.pop_all()[0]

    def pop_all(self) -> list[CapturedAttention]:
        """All records since the last pop, in order of execution.

        Raises:
            RuntimeError: there is none, or no gradient can flow from one; the message says why.
        """
        records, self._records = self._waiting(), []
        if not self._thread.running:
            self._thread.count = {}
        if not records:
            raise RuntimeError(f"nothing was captured: {self._why_nothing()}")
        self._popped, self._ran, self._ran_with_grad = True, False, False
        for watch in self._watches:
            watch.entered = watch.skipped_without_grad = False
        for record in records:
            if not (self.analysis or record.requires_grad):
                raise RuntimeError(f"{record.layer} {messages.FROZEN}")
        return records

    def forget(self) -> None:
        """Drops all records since the last pop, however many there are."""
        self._records, self._log = [], []

    def close(self) -> None:
        """Takes every hook off and forgets all records: the model is as it was found."""
        for watch in self._watches:
            watch.close()
        unhook(self._handles)
        if self._finder is not None:
            self._finder.close()
        self._finder, self._watches = None, []
        self.forget()
        self._closed = True

    def __enter__(self) -> "AttentionCapture":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, layers: Iterable[str | nn.Module]) -> None:
        for name, module in select_modules(self.model, layers).items():
            self._watches.append(Watch({name: module}, self.analysis, self._on_layer_end))

    def _begin(self, module: nn.Module, args: object, kwargs: object) -> None:
        """Before the model's own forward."""
        if module is not self.model or _compat.in_backward():
            return
        if self._thread.running:  # an interrupt cut this thread's last pass short
            self._forget_pass()
        self._thread.begin()
        with_grad = torch.is_grad_enabled()
        self._ran, self._ran_with_grad = True, self._ran_with_grad or with_grad
        for watch in self._watches:
            watch.recording.stop()
            watch.compiled.take()  # left by a recomputation in backward
            # nn.TransformerEncoderLayer leaves its fast path when a hook is on: validation runs without them.
            if not (with_grad or self.analysis):
                watch.detach()

    def _end(self, module: nn.Module, args: object, result: object) -> None:
        """After the model's own forward, also if it raised."""
        if module is not self.model or not self._thread.running:
            return
        self._thread.running = False
        for watch in self._watches:
            self._on_layer_end("", [(name, o) for name in watch.modules for o in watch.compiled.take()])
            watch.attach()
        if raised(result, self._thread.error_before):
            self._forget_pass()
        if not self._warned and len(self._records) > _MANY * max(1, len(self._watches)):
            self._warned = True
            warnings.warn(messages.MANY_WAIT.format(len(self._records)), stacklevel=2)

    def _forget_pass(self) -> None:
        self._records = [(token, record) for token, record in self._records if token is not self._thread.token]

    def _on_layer_end(self, _: str, log: Log) -> None:
        """A watched layer has run."""
        count = self._thread.count
        for name, operation in log:
            keep = self._keep.get(name)
            number = count[name] = count.get(name, -1) + 1
            if keep is None or number in keep:
                self._records.append((self._thread.token, CapturedAttention(name, operation)))

    def _on_pass_end(self, name: str, log: Log) -> None:
        """The model has run, or a part of it (`name`) that was called from outside; layers are not chosen yet."""
        self._log = log if not name else self._log + log
        if not name:
            self._choose()

    def _waiting(self) -> list[CapturedAttention]:
        # If only parts of the model have run, because a wrapper calls them, they are the forward pass.
        if self._finder is not None and self._log:
            self._choose()
        return [record for _, record in self._records]

    def _choose(self) -> None:
        log, self._log = self._log, []
        found = self_attention(log)
        try:
            chosen = [found[index] for index in self._indices]
        except IndexError:
            self._trouble = messages.OUT_OF_RANGE.format(self._indices, len(found), messages.operations(log))
            return
        for name, _, operation in chosen:
            crossed = dict.fromkeys(n for n, o in log if crosses(o) and o.lengths[0] == operation.lengths[0])
            if crossed:
                others = ", ".join([*crossed][-3:])
                warnings.warn(messages.TWO_STREAMS.format(name or "the model itself", others), stacklevel=2)
        self._records += [(self._thread.token, CapturedAttention(name, operation)) for name, _, operation in chosen]
        if self._finder is None:  # another thread was first
            return
        self._finder.close()
        self._finder = None
        names = [name for name, _, _ in found]
        for name, number, _ in chosen:
            if names.count(name) > 1:
                self._keep.setdefault(name, set()).add(number)
        self._watch(dict.fromkeys(name for name, _, _ in chosen))

    def _why_nothing(self) -> str:
        if self._closed:
            return messages.CLOSED
        entered = any(watch.entered for watch in self._watches)
        if not self._ran and not entered:
            never_ran = messages.NEVER_RAN.format(type(self.model).__name__, messages.some(find_attention(self.model)))
            return messages.TAKEN if self._popped else never_ran
        if any(watch.skipped_without_grad for watch in self._watches) or (self._ran and not self._ran_with_grad):
            return messages.GRADIENTS_OFF
        if self._watches and not entered:
            return messages.LAYER_NEVER_RAN.format(", ".join(name for watch in self._watches for name in watch.modules))
        return self._trouble + messages.nothing_seen(find_attention(self.model))


class _ThisThread(threading.local):
    """This thread's forward pass through the model."""

    running, token = False, object()  # the token tells the records of one pass from those of another
    error_before: BaseException | None = None

    def __init__(self) -> None:
        self.count: dict[str, int] = {}

    def begin(self) -> None:
        self.running, self.token, self.error_before, self.count = True, object(), sys.exc_info()[1], {}


def _by_number_or_not(layers: Layers) -> tuple[list[int], list[str | nn.Module]]:
    choice = [layers] if isinstance(layers, int | str | nn.Module) else list(layers)
    for layer in choice:
        if isinstance(layer, bool) or not isinstance(layer, int | str | nn.Module):
            raise ValueError(messages.WRONG_LAYER.format(layer, type(layer).__name__))
    if not choice:
        raise ValueError("layers is empty: name at least one, or leave it out for the last self-attention")
    return [c for c in choice if isinstance(c, int)], [c for c in choice if not isinstance(c, int)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch's own wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, _compat.COMPILED, None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model
