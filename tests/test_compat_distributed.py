"""Each private part of torch.distributed does what `_compat_distributed` says, and what is said happens without it."""

import os
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import context_parallel

from attncongruence import _compat, _compat_distributed
from attncongruence.capture.axes import Trail


@pytest.fixture
def mesh(tmp_path):
    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_local_part(mesh):
    x = torch.randn(2, 4, requires_grad=True)
    assert _compat.local_part(x) is x
    spread = DTensor.from_local(x, mesh, [Shard(1)])
    assert torch.equal(_compat.local_part(spread), x)
    trail = Trail({})
    double = 2 * spread
    trail.follow(torch.mul, "mul", (2, spread), {}, double)
    assert trail.node(_compat.local_part(double)).root is trail.node(spread).root
    assert trail.node(torch.randn(2, 4)).root is not trail.node(spread).root


def test_placement(mesh):
    x = torch.randn(2, 4, requires_grad=True)
    assert _compat_distributed.shows_placements()
    plain = DTensor.from_local(x, mesh, [Shard(1)]).to_local()
    spec = _compat_distributed.placement(plain.grad_fn)
    assert (spec.mesh, spec.placements, tuple(spec.shape)) == (mesh, (Shard(1),), (2, 4))
    assert _compat_distributed.placement((x * 2).grad_fn) is None
    assert _compat_distributed.placement(types.SimpleNamespace(dtensor_spec=spec)) is None


def test_one_process_takes_part_in_nothing(mesh):
    dist.all_reduce(torch.ones(1))
    assert _compat_distributed.collectives() == {}


class Counting:
    """A group of two as torch has it, or one whose backend does not count."""

    group_name = "two"

    def __init__(self, count):
        self.count = count

    def size(self):
        return 2

    def _get_sequence_number_for_group(self):
        if self.count is None:
            raise RuntimeError("not yet implemented")
        return self.count


@pytest.mark.parametrize(("count", "expected"), [(3, {"two": 3}), (None, {})])
def test_collectives(monkeypatch, count, expected):
    monkeypatch.setattr(_compat, "part", lambda path: {Counting(count): None})
    assert _compat_distributed.collectives() == expected
    monkeypatch.setattr(_compat, "part", lambda path: None)
    assert _compat_distributed.collectives() == {}


def test_cuts_sequences(mesh, monkeypatch):
    assert _compat_distributed.cuts_sequences() == ""
    with context_parallel(mesh, buffers=[torch.randn(1, 4, 2)], buffer_seq_dims=[1]):
        assert "context parallelism of torch" in _compat_distributed.cuts_sequences()
    assert _compat_distributed.cuts_sequences() == ""
    state = types.SimpleNamespace(_SEQUENCE_PARALLEL_GROUP=object())
    monkeypatch.setitem(__import__("sys").modules, "deepspeed.runtime.sequence_parallel.parallel_state_sp", state)
    assert _compat_distributed.cuts_sequences() == "sequence parallelism of DeepSpeed"


def test_marks_of_other_libraries():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert _compat_distributed.splits_heads(model) == ""
    model[0]._hf_tp_plan = "replicate"
    assert _compat_distributed.splits_heads(model) == ""
    model[0]._hf_tp_plan = "local_colwise"
    assert _compat_distributed.splits_heads(model) == "the tensor parallel plan of transformers"
    model[1].weight.tensor_model_parallel = True
    assert _compat_distributed.splits_heads(model[1]) == "tensor parallelism"
    assert not _compat_distributed.zero3(model)
    model[1].weight.ds_id = 0
    assert _compat_distributed.zero3(model)


def test_fsdp_weights(mesh):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert _compat_distributed.fsdp_weights(model) == set()
    fully_shard(model[0], mesh=mesh)
    assert _compat_distributed.fsdp_weights(model) == {id(p) for p in model[0].parameters()}
