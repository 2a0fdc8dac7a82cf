"""capture_attention: hooks on the chosen layers, and the records they leave."""

import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attncongruence import _compat
from attncongruence.capture import find
from attncongruence.capture.origins import sizes_of
from attncongruence.capture.product import Log
from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.watch import DATA_PARALLEL, Watch, hook_module, raised, uncompiled_hook, unhook

_REENTRANT = (
    "under reentrant checkpointing (pass use_reentrant=False to torch.utils.checkpoint, or "
    "gradient_checkpointing_kwargs={'use_reentrant': False})"
)
_TAKEN = (
    "its record was taken before, and the model has not run since. Each record can be taken once: keep what pop() "
    "returned."
)
_DROPPED = "forget() dropped its records, and the model has not run since."
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
            raise RuntimeError(DATA_PARALLEL)
        choice = [layers] if isinstance(layers, int | str | nn.Module) else list(layers)
        for layer in choice:
            if isinstance(layer, bool) or not isinstance(layer, int | str | nn.Module):
                raise ValueError(
                    f"layers has {layer!r}, a {type(layer).__name__}: it takes ints (order of execution, -1 is the "
                    "last), dotted names with wildcards, or modules, one or a list of them"
                )
        if not choice:
            raise ValueError("layers is empty: name at least one, or leave it out for the last self-attention")
        self._indices = [layer for layer in choice if isinstance(layer, int)]
        _compat.check(by_number=bool(self._indices))
        self.model = unwrapped(model)
        self.analysis = analysis
        self._records: list[tuple[object, CapturedAttention]] = []  # each with its forward pass
        self._watches: list[Watch] = []
        self._finder: Watch | None = None
        self._log: Log = []  # what attended in passes through parts of the model
        self._keep: dict[str, set[int]] = {}  # which operations of a layer, where it attends several times
        self._thread = _CurrentPass()
        self._ran: set[bool] = set()  # since the last pop: whether gradients were on, for each pass of the model
        self._wrong_index = ""  # why the indices name no layer
        self._gone = ""  # where the records of earlier passes are
        self._closed = self._warned = False
        hook = uncompiled_hook()
        self._handles = hook_module(self.model, hook(self._begin), hook(self._end))
        try:
            self._watch(layer for layer in choice if not isinstance(layer, int))
        except ValueError:
            self.close()
            raise
        if self._indices:
            self._finder = find.watch_model(self.model, analysis, self._on_pass_end)

    def pop(self) -> CapturedAttention:
        """The one record since the last pop.

        Raises:
            RuntimeError: there is none, there are several, or no gradient can flow from it; the message says why.
        """
        records = self._waiting()
        if len(records) > 1:
            names = ", ".join(record.layer for record in records[:8])
            raise RuntimeError(
                f"pop() takes the one record since the last pop, but {len(records)} wait: {names}. Take them all with "
                "pop_all(), choose one layer, or pop after each forward pass."
            )
        return self.pop_all()[0]

    def pop_all(self) -> list[CapturedAttention]:
        """All records since the last pop, in order of execution.

        Raises:
            RuntimeError: there is none, or no gradient can flow from one; the message says why.
        """
        records = self._waiting()
        if not self._thread.running:
            self._thread.count = {}
        if not records:
            raise RuntimeError(f"nothing was captured: {self._why_nothing()}")
        self._start_over(_TAKEN)
        for record in records:
            if record.problem:
                raise RuntimeError(f"{record.layer or 'the model itself'} {record.problem}")
            if not (self.analysis or record.requires_grad):
                raise RuntimeError(
                    f"{record.layer} was captured without gradient, so that a loss on it trains nothing: its queries "
                    f"and keys are frozen, or the layer ran {_REENTRANT}. To look at attention without training it, "
                    "capture_attention(..., analysis=True)."
                )
        return records

    def forget(self) -> None:
        """Drops all records since the last pop, however many there are."""
        self._start_over(_DROPPED)

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

    def _start_over(self, gone: str) -> None:
        """Only what runs from now on counts: for records, and for the reason why there is none."""
        self._records, self._log, self._gone = [], [], gone
        for ran in (self._ran, *(watch.ran for watch in self._watches)):
            ran.clear()

    def _watch(self, layers: Iterable[str | nn.Module]) -> None:
        for name, module in find.select_modules(self.model, layers).items():
            self._watches.append(Watch({name: module}, self.analysis, self._on_layer_end))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's own forward."""
        if module is not self.model or _compat.in_backward():
            return
        if self._thread.running:  # an interrupt cut this thread's last pass short
            self._forget_pass()
        thread = self._thread
        thread.running, thread.token, thread.error_before, thread.count = True, object(), sys.exc_info()[1], {}
        self._ran.add(torch.is_grad_enabled())
        for watch in self._watches:
            watch.sizes = sizes_of((*args, *kwargs.values()))
            watch.stop()
            watch.compiled.take()  # left by a recomputation in backward
            # nn.TransformerEncoderLayer leaves its fast path when a hook is on: validation runs without them.
            if not (torch.is_grad_enabled() or self.analysis):
                unhook(watch.handles)

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
        if not self._warned and len(self._records) > 32 * max(1, len(self._watches)):
            self._warned = True
            warnings.warn(
                f"{len(self._records)} records of captured attention wait, and each keeps its forward pass in memory. "
                "Call pop() or pop_all() after each forward pass with gradients on, also where the loss is not used; "
                "or close() the capture.",
                stacklevel=2,
            )

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
        found, self._wrong_index = find.self_attention(log), ""
        try:
            chosen = [found[index] for index in self._indices]
        except IndexError:
            self._wrong_index = find.wrong_index(self._indices, len(found), log)
            return
        for name, _, operation in chosen:
            crossed = dict.fromkeys(n for n, o in log if find.crosses(o) and o.lengths[0] == operation.lengths[0])
            if crossed:
                warnings.warn(
                    f"{name or 'the model itself'} was chosen by its number, and cross-attention ran on a sequence of "
                    f"the same length ({', '.join([*crossed][-3:])}): it may hold text alone or image alone, and a "
                    "loss on it would mean nothing. Where text and image are two streams, name their four layers and "
                    "use AttentionBlocks.from_streams. Where the layer holds both, name it, layers='...', and this "
                    "warning is gone.",
                    stacklevel=2,
                )
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
            return "this capture is closed. Make a new one with capture_attention(model)."
        layers_ran = [watch.ran for watch in self._watches if watch.ran]
        if not self._ran and not layers_ran:
            return self._gone or (
                f"{type(self.model).__name__} has not run since capture began: call model(...) first. If it has, its "
                "hooks were not called: TorchScript calls none, and a direct model.forward(...) only those of "
                f"submodules. Then name a layer inside the part that runs: {find.candidates(self.model)}."
            )
        if not self.analysis and (self._ran == {False} or any(False in ran for ran in layers_ran)):
            return (
                f"the layer ran with gradients off. In training: {_REENTRANT}, or inside a no_grad() block of the "
                "model. In validation, or for analysis: capture_attention(..., analysis=True)."
            )
        if self._watches and not layers_ran:
            names = ", ".join(name for watch in self._watches for name in watch.modules)
            return (
                f"the model ran, but {names} did not. Either this forward pass does not use it, or the model was "
                "compiled and had run before capture began, and compiled code never calls hooks added later: call "
                "capture_attention before the first compiled run, or torch.compiler.reset() after it."
            )
        return self._wrong_index or find.nothing_seen(self.model)


class _CurrentPass(threading.local):
    """This thread's forward pass through the model."""

    running, token = False, object()  # the token tells the records of one pass from those of another
    error_before: BaseException | None = None

    def __init__(self) -> None:
        self.count: dict[str, int] = {}  # attention operations so far, by layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's model inside torch's own wrappers."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    compiled = getattr(model, _compat.COMPILED, None)
    return unwrapped(compiled) if isinstance(compiled, nn.Module) else model
