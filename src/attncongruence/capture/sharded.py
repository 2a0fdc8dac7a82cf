"""Attention that is spread over processes: its heads are joined when a record is taken, or the record is refused.

Under tensor parallelism each process has some of the heads, and all of them compute one loss. A loss needs all heads:
they are gathered, and in backward each process takes the gradient of its own, as it does for the model's own loss.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from attncongruence import _compat_distributed as _compat
from attncongruence.capture.find import named_modules
from attncongruence.capture.product import Operation
from attncongruence.capture.record import CapturedAttention

CUT = (
    "each process holds a part of each sequence, by {}, and no process sees all pairs of text and image tokens. Train "
    "with this loss without it: tensor parallelism, FSDP and DDP work, and gradient checkpointing saves memory, too."
)
_UNKNOWN = (
    "{layer} is spread over processes in a way that capture cannot follow: {why}. Each process would average over its "
    "own part alone. Shard heads evenly with DTensors (torch's parallelize_module, tp_plan='auto' in transformers), "
    "run the layer with gradients on and without torch.compile, and name the module that holds the projections of "
    "queries and keys; or train with this loss under FSDP or DDP."
)
_PRODUCT = re.compile(r"(Mm|Addmm|Bmm|Baddbmm|Linear|MkldnnLinear|Convolution)Backward")
_VIEW = re.compile(
    r"(T|Transpose|Permute|\w*View|Expand|\w*[Ss]queeze|Split\w*|Slice|Select|Unbind|Clone|ToCopy)Backward"
)

Cut = tuple[Any, frozenset[int]]
"""A mesh, and those of its dimensions that heads are spread over."""


def alone() -> bool:
    """Whether this process works by itself."""
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def cuts_sequences() -> str:
    """What spreads each sequence over processes at the moment; "" where nothing does."""
    return "" if alone() else _compat.cuts_sequences()


def splits_heads(model: nn.Module) -> str:
    """Which library has split a model over processes and left a mark; "" where none has."""
    return "" if alone() else _compat.splits_heads(model)


def whole(record: CapturedAttention, model: nn.Module) -> CapturedAttention:
    """The record with the heads of all processes; itself where this process has them all. All processes must call it.

    Raises:
        RuntimeError: it is spread over processes in any other way, or in a way that cannot be known.
    """
    if alone():
        return record
    operation, layer = record._operation, record.layer
    from torch.distributed.tensor import DTensor

    parts = [t for t in (operation.query, operation.key, operation.logits) if t is not None]
    if any(isinstance(part, DTensor) for part in parts):
        for part in (part for part in parts if isinstance(part, DTensor)):
            for dim, placement in enumerate(part.placements):
                if getattr(placement, "dim", 0) > 1 and part.device_mesh.size(dim) > 1:
                    raise RuntimeError(CUT.format(f"DTensors that lie as {part.placements} in {layer}"))
        return CapturedAttention(layer, operation.apply(lambda t: t.full_tensor() if isinstance(t, DTensor) else t))
    try:
        cut = _cut(record, model)
    except ValueError as error:
        raise RuntimeError(_UNKNOWN.format(layer=layer, why=error)) from None
    return record if cut is None else CapturedAttention(layer, _joined(operation, *cut))


def _joined(operation: Operation, mesh: Any, dims: frozenset[int]) -> Operation:
    """The operation over the heads of all processes."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = [Replicate()] * mesh.ndim
    spread = [Shard(1) if dim in dims else Replicate() for dim in range(mesh.ndim)]
    heads = _head_counts(operation)

    def join(tensor: Tensor) -> Tensor:
        if tensor.shape[1] not in heads:  # a mask for all heads
            return tensor
        part = DTensor.from_local(tensor, mesh, spread, run_check=False)
        # Backward: each process takes its part of the gradient, and nothing is added up.
        return part.redistribute(placements=whole).to_local()

    return operation.apply(join)


def _cut(record: CapturedAttention, model: nn.Module) -> Cut | None:
    """Over which processes the heads of a record are spread; None: this one has all of them.

    Raises:
        ValueError: it cannot be known, or something else is spread.
    """
    operation = record._operation
    scores = operation.query is None
    sources = [_source(part, record) for part in ((operation.logits,) if scores else (operation.query, operation.key))]
    (cut, known), key_cut = sources[0], sources[-1][0]
    if cut is None and key_cut is not None:
        if known is not None:
            raise ValueError("its keys are spread and its queries are not")
        cut = key_cut  # frozen queries lie like the keys
    unit = _with_weights(record.layer, model)
    meshes = _meshes(unit, model)
    if cut is None and not known:
        if mark := _compat.splits_heads(unit):
            raise ValueError(f"it is under {mark}")
        if known is None and meshes:
            raise ValueError("its weights are DTensors, and autograd does not show what was done with them")
    groups = {group.group_name for mesh in meshes for group in mesh.get_all_groups()}
    if operation.spoke - groups and not _gathers_weights(unit):
        raise ValueError("it speaks to other processes while it runs (tensor, context or sequence parallelism by hand)")
    return cut


def _source(tensor: Tensor | None, record: CapturedAttention) -> tuple[Cut | None, bool | None]:
    """How the heads of queries, keys or scores are spread, and whether that is known; None: no graph shows it."""
    cuts: set[Cut] = set()
    known: bool | None = False
    if tensor is None or tensor.grad_fn is None or not _compat.shows_placements():
        return None, None
    for spec, behind_weight in _made_from(tensor):
        if spec is None:
            known = None
            continue
        dims = _head_dims(spec, record)
        if dims and behind_weight:
            raise ValueError("weights that are no DTensors follow on those that are")
        if dims:
            cuts.add((spec.mesh, dims))
        known = known if behind_weight else True
    if len(cuts) > 1:
        raise ValueError("its parts lie in several ways")
    return next(iter(cuts), None), known


def _made_from(tensor: Tensor) -> Iterator[tuple[Any, bool]]:
    """The DTensors behind a tensor as autograd noted them, and whether a weight stands between; None: compiled code."""
    waiting: list[tuple[Any, bool]] = [(tensor.grad_fn, False)]
    done = set(waiting)
    while waiting:
        node, behind = waiting.pop()
        spec = _compat.placement(node)
        if spec is not None or node.name().startswith("CompiledFunction"):
            yield spec, behind
            continue
        before = [n for n, _ in node.next_functions]
        behind = behind or (_PRODUCT.match(node.name()) is not None and any(map(_is_weight, before)))
        for step in ((n, behind) for n in before if n is not None):
            if step not in done:
                done.add(step)
                waiting.append(step)


def _is_weight(node: Any) -> bool:
    while node is not None and _VIEW.match(node.name()):
        node = node.next_functions[0][0]
    return node is None or node.name().endswith("AccumulateGrad")


def _head_dims(spec: Any, record: CapturedAttention) -> frozenset[int]:
    """The dimensions of a mesh that a DTensor's heads are spread over.

    Raises:
        ValueError: it is spread in another way, or unevenly.
    """
    heads = set()
    for number, placement in enumerate(spec.placements):
        if spec.mesh.size(number) == 1 or placement.is_replicate():
            continue
        if placement.is_partial():
            raise ValueError("it holds partial sums")
        axis, last = placement.dim % len(spec.shape), len(spec.shape) - 1
        processes = math.prod(
            spec.mesh.size(n) for n, p in enumerate(spec.placements) if getattr(p, "dim", None) == placement.dim
        )
        size, rest = divmod(spec.shape[axis], processes)
        if rest:
            raise ValueError(f"{spec.shape[axis]} is no multiple of {processes} processes")
        in_heads, in_length = size in _head_counts(record._operation), size in record.lengths
        if (axis == last and last < 3) or (0 < axis < last and last > 2 and in_heads and not in_length):
            heads.add(number)
        elif axis > 0 or size != record.batch_size or in_length:
            raise ValueError(
                f"a tensor of shape {tuple(spec.shape)} is cut along dimension {axis}: a part of each sequence"
            )
    return frozenset(heads)


def _head_counts(operation: Operation) -> set[int]:
    return {t.shape[1] for t in (operation.query, operation.key, operation.logits) if t is not None}


def _with_weights(layer: str, model: nn.Module) -> nn.Module:
    """The innermost module around a layer that has parameters: where its projections are."""
    modules = named_modules(model)
    while layer and next(modules[layer].parameters(), None) is None:
        layer = layer.rpartition(".")[0]
    return modules[layer]


def _gathers_weights(unit: nn.Module) -> bool:
    """Whether FSDP or ZeRO-3 speaks to other processes inside of a module, to gather weights."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return _compat.zero3(unit) or any(isinstance(m, FSDPModule | FullyShardedDataParallel) for m in unit.modules())


def _meshes(unit: nn.Module, model: nn.Module) -> list[Any]:
    """The meshes of weights that are spread over processes, other than by FSDP, which gathers them to run."""
    from torch.distributed.tensor import DTensor

    whole = _compat.fsdp_weights(model)
    weights = [p for p in unit.parameters() if isinstance(p, DTensor) and id(p) not in whole]
    return [w.device_mesh for w in weights if not all(place.is_replicate() for place in w.placements)]
