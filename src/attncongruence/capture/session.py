"""capture_attention: hooks on the chosen layers, and the records they leave."""

import numbers
import sys
import threading
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attncongruence import _compat, _compat_stack
from attncongruence.capture import find, sharded
from attncongruence.capture.folds import Plan, Unseen
from attncongruence.capture.origins import sizes_of
from attncongruence.capture.product import Log
from attncongruence.capture.record import CapturedAttention
from attncongruence.capture.watch import DATA_PARALLEL, Watch, hook_module, raised, uncompiled_hook, unhook

_REENTRANT = (
    "under reentrant checkpointing (pass use_reentrant=False to torch.utils.checkpoint, or "
    "gradient_checkpointing_kwargs={'use_reentrant': False} to Trainer's arguments, gradient_checkpointing_enable or "
    "PEFT's prepare_model_for_kbit_training)"
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
    for bit. What runs with gradients off is not captured: validation, or negatives that a model ranks in its forward.

    Args:
        model: any `nn.Module`; best before its first run if it is compiled.
        layers: which attention to take. An int or ints: self-attention by order of execution, -1 is the last one that
            runs; they are found by watching the first forward pass, and those that run with gradients off are not
            counted. Names: dotted, `*` stands for anything (see `find_attention`). Modules: as they are.
        analysis: record also where no gradient can flow (under `torch.no_grad`, from frozen layers), and count it, too.
            With gradients off, a record holds copies of queries and keys. Not for losses.

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
        several = isinstance(layers, Iterable) and not isinstance(layers, str | bytes | nn.Module | Tensor)
        choice: list[int | str | nn.Module] = []
        for layer in layers if several else [layers]:  # type: ignore[union-attr]
            if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
                choice.append(int(layer))
            elif isinstance(layer, str | nn.Module):
                choice.append(layer)
            else:
                raise ValueError(
                    f"layers has {layer!r}, a {type(layer).__name__}: it takes ints (order of execution, -1 is the "
                    "last), dotted names with wildcards, or modules, one or a list of them"
                )
        if not choice:
            raise ValueError("layers is empty: name at least one, or leave it out for the last self-attention")
        self._indices = [layer for layer in choice if isinstance(layer, int)]
        _compat.check(by_number=bool(self._indices))
        self.model = _compat.unwrapped(model)
        self.analysis = analysis
        self._records: list[tuple[_Passes, CapturedAttention]] = []  # each with the forward passes that it is part of
        self._watches: list[Watch] = []
        self._finder: Watch | None = None
        self._log: Log = []  # what attended in passes through parts of the model
        self._unseen: Unseen = []  # likewise, without a softmax that was seen
        self._keep: dict[str, set[int]] = {}  # which operations of a layer, where it attends several times
        self._thread = _CurrentPasses()
        self._ran: set[bool] = set()  # since the last pop: whether gradients were on, for each pass of the model
        self._wrong_index = ""  # why the indices name no layer
        self._gone = ""  # where the records of earlier passes are
        self._cut = ""  # what has spread sequences over processes since the last pop
        self._closed = self._warned = False
        hook = uncompiled_hook()
        self._handles = hook_module(self.model, hook(self._begin), hook(self._end))
        try:
            self._watch(model, (layer for layer in choice if not isinstance(layer, int)))
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
        if not self._thread.passes:
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
        return [sharded.whole(record, self.model) for record in records]

    def forget(self) -> None:
        """Drops all records since the last pop, however many there are."""
        self._start_over(_DROPPED)

    def close(self) -> None:
        """Takes every hook off and forgets all records: the model is as it was found."""
        for watch in self._all_watches():
            watch.close()
        unhook(self._handles)
        self._finder, self._watches = None, []
        self.forget()
        self._closed = True

    def __enter__(self) -> "AttentionCapture":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start_over(self, gone: str) -> None:
        """Only what runs from now on counts: for records, and for the reason why there is none."""
        self._records, self._log, self._gone, self._cut = [], [], gone, ""
        for ran in (self._ran, *(watch.ran for watch in self._all_watches())):
            ran.clear()

    def _all_watches(self) -> list[Watch]:
        return self._watches if self._finder is None else [*self._watches, self._finder]

    def _watch(self, model: nn.Module, layers: Iterable[str | nn.Module], plan: Plan | None = None) -> None:
        for name, module in find.select_modules(model, layers).items():
            own = None if plan is None else [step for step in plan if f"{step[0]}.".startswith(f"{name}.") or not name]
            self._watches.append(Watch({name: module}, self.analysis, self._on_layer_end, plan=own))

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's own forward."""
        if module is not self.model or _compat.in_backward():
            return
        thread = self._thread
        self._unwind(0)
        records = torch.is_grad_enabled() or self.analysis
        if not thread.passes:
            thread.count = {}
            self._ran.add(torch.is_grad_enabled())
            self._cut = sharded.cuts_sequences() or self._cut
        first, second = sizes_of((*args, *kwargs.values()))
        for watch in self._all_watches():
            watch.sizes = first, second, "" not in watch.modules
        for watch in self._watches:
            if not thread.passes:
                watch.stop()
                watch.compiled.slot = ()  # left by a recomputation in backward
            # nn.TransformerEncoderLayer leaves its fast path when a hook is on: validation runs without them.
            watch.attach() if records else unhook(watch.handles)
        thread.passes = (*thread.passes, _Pass(sys.exc_info()[1]))

    def _end(self, module: nn.Module, args: object, result: object) -> None:
        """After the model's own forward, also if it raised."""
        thread = self._thread
        if module is not self.model or not thread.passes or _compat.in_backward():
            return
        self._unwind(1)
        for watch in self._watches:
            self._on_layer_end("", [(name, o) for name in watch.modules for o in watch.compiled.take(watch.sizes)])
            watch.attach()
        if raised(result, thread.passes[-1].error_before):
            self._forget_pass()
        thread.passes = thread.passes[:-1]
        if not self._warned and len(self._records) > 32 * max(1, len(self._watches)):
            self._warned = True
            warnings.warn(
                f"{len(self._records)} records of captured attention wait, and each keeps its forward pass in memory. "
                "Call pop() or pop_all() after each forward pass with gradients on, also where the loss is not used; "
                "or close() the capture.",
                stacklevel=2,
            )

    def _unwind(self, begun: int) -> None:
        """Forgets the passes of this thread that an interrupt cut short; called where one begins (0) or ends (1)."""
        thread = self._thread
        if len(thread.passes) > begun:
            calls = _compat_stack.calls_around(self.model) or ()
            while len(thread.passes) > begun + sum(call is self.model for call in calls):
                self._forget_pass()
                thread.passes = thread.passes[:-1]

    def _forget_pass(self) -> None:
        self._records = [(passes, record) for passes, record in self._records if self._thread.passes[-1] not in passes]

    def _on_layer_end(self, _: str, log: Log) -> None:
        """A watched layer has run."""
        count = self._thread.count
        for name, operation in log:
            keep = self._keep.get(name)
            number = count[name] = count.get(name, -1) + 1
            if keep is None or number in keep:
                self._records.append((self._thread.passes, CapturedAttention(name, operation)))

    def _on_pass_end(self, name: str, log: Log) -> None:
        """The model has run, or a part of it (`name`) that was called from outside; layers are not chosen yet."""
        assert self._finder is not None
        self._log, before = (log, 0) if not name else (self._log + log, len(self._log))
        unseen = [(layer, lengths, before + place) for layer, lengths, place in self._finder.unseen]
        self._unseen = unseen if not name else self._unseen + unseen
        if not name:
            self._choose()

    def _waiting(self) -> list[CapturedAttention]:
        # If only parts of the model have run, because a wrapper calls them, they are the forward pass.
        if self._finder is not None and self._log:
            self._choose()
        if cut := sharded.cuts_sequences() or self._cut:
            raise RuntimeError(sharded.CUT.format(cut))
        return [record for _, record in self._records]

    def _choose(self) -> None:
        log, self._log = self._log, []
        found, self._wrong_index = find.self_attention(log), ""
        try:
            chosen = [found[index] for index in self._indices]
        except IndexError:
            self._wrong_index = find.wrong_index(self._indices, len(found), log)
            return
        for index, (name, _, operation) in zip(self._indices, chosen, strict=True):
            if missed := find.missed(log, self._unseen, index, operation):
                self._wrong_index = (
                    f"layers={index} would take {name or 'the model itself'}, but {missed} attended without a softmax "
                    "that was seen, and would be passed over. Name the layer that you mean, layers='...'. "
                    f"{find.nothing_seen(self.model)}"
                )
                return
            for text in find.doubts(name or "the model itself", operation, log):
                warnings.warn(text, stacklevel=2)
        self._records += [(self._thread.passes, CapturedAttention(name, operation)) for name, _, operation in chosen]
        if self._finder is None:  # another thread was first
            return
        plan = self._finder.compiled.plan
        self._finder.close()
        self._finder = None
        names = [name for name, _, _ in found]
        for name, number, _ in chosen:
            if names.count(name) > 1:
                self._keep.setdefault(name, set()).add(number)
        self._watch(self.model, dict.fromkeys(name for name, _, _ in chosen), plan)

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
        off = any(False in watch.ran for watch in self._all_watches()) and not self._wrong_index
        if not self.analysis and (self._ran == {False} or off):
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
        mark = sharded.splits_heads(self.model)
        return (self._wrong_index or find.nothing_seen(self.model)) + (mark and f" The model is under {mark}.")


class _Pass:
    """One forward pass through the model."""

    def __init__(self, error_before: BaseException | None) -> None:
        self.error_before = error_before


_Passes = tuple[_Pass, ...]


class _CurrentPasses(threading.local):
    """This thread's forward passes through the model: more than one where the model calls itself."""

    passes: _Passes = ()

    def __init__(self) -> None:
        self.count: dict[str, int] = {}  # attention operations so far in the outer pass, by layer
