"""Several processes on CPU: DDP equals one process on the whole batch, both FSDPs too, DataParallel is refused."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from attncongruence import RELEASED, WEIGHTED_MEAN, cacr_loss
from attncongruence.capture import capture_attention
from tests.helpers.models import Attention, Stack
from tests.helpers.versions import FSDP2_ON_CPU, has

WORLD = 2


def data() -> Tensor:
    return torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))


def make() -> Stack:
    torch.manual_seed(0)
    return Stack(layers=2)


def losses(model: nn.Module, capture: object, x: Tensor) -> Tensor:
    """Main loss and auxiliary losses, all of them means over samples: of the scores, and of queries and keys."""
    out = model(x)
    captured = capture.pop()
    streamed = sum(cacr_loss(captured, 2, convention=c, impl="streaming") for c in (RELEASED, WEIGHTED_MEAN))
    return out.square().mean() + captured.scores.square().mean() + streamed


def alone() -> list[Tensor]:
    """One process, whole batch, two steps of plain SGD."""
    model = make()
    with capture_attention(model) as capture:
        for _ in range(2):
            losses(model, capture, data()).backward()
            update(model)
    return [p.detach() for p in model.parameters()]


def update(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    model.zero_grad()


def ddp(rank: int, first: str) -> list[Tensor]:
    model = make()
    before = capture_attention(model) if first == "capture" else None
    wrapped = DistributedDataParallel(model)
    capture = before or capture_attention(wrapped)
    for _ in range(2):
        losses(wrapped, capture, data().chunk(WORLD)[rank]).backward()
        update(model)
    return [p.detach() for p in model.parameters()]


def fsdp2(rank: int, first: str) -> list[Tensor]:
    model = make()
    before = capture_attention(model) if first == "capture" else None
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    capture = before or capture_attention(model)
    for _ in range(2):
        losses(model, capture, data().chunk(WORLD)[rank]).backward()
        update(model)
    return [p.full_tensor() for p in model.parameters()]


def fsdp1(rank: int, first: str) -> list[Tensor]:
    model = make()
    before = capture_attention(model) if first == "capture" else None
    policy = ModuleWrapPolicy({Attention})
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True
    )
    capture = before or capture_attention(wrapped, "layers.1")  # by the name it had without FSDP
    for _ in range(2):
        losses(wrapped, capture, data().chunk(WORLD)[rank]).backward()
        with torch.no_grad():
            for p in wrapped.parameters():
                p -= 0 if p.grad is None else p.grad
        wrapped.zero_grad()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return [p.detach().clone() for p in wrapped.parameters()]


JOBS = {
    f"{job.__name__}, {first} first": (job, first) for job in (ddp, fsdp1, fsdp2) for first in ("capture", "wrapper")
}
NEEDS = {name: FSDP2_ON_CPU for name, (job, _) in JOBS.items() if job is fsdp2}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    jobs = {name: how for name, how in JOBS.items() if name not in NEEDS or all(map(has, NEEDS[name].args))}
    torch.save({name: job(rank, first) for name, (job, first) in jobs.items()}, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """Parameters after training, of each process: two processes do all the jobs, since starting them is what costs."""
    folder = str(tmp_path_factory.mktemp("processes"))
    mp.spawn(worker, (folder,), WORLD)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("job", [pytest.param(job, marks=NEEDS.get(job, ())) for job in JOBS])
def test_two_processes_train_like_one(trained, job):
    expected = alone()
    assert all((new - old).abs().max() > 1e-4 for new, old in zip(expected, make().parameters(), strict=True))
    for process in trained:
        for our, their in zip(process[job], expected, strict=True):
            torch.testing.assert_close(our, their)


def test_data_parallel_is_refused():
    model = make()
    with pytest.raises(RuntimeError, match=r"DataParallel copies .* Use DistributedDataParallel"):
        capture_attention(nn.DataParallel(model))


@pytest.mark.parametrize("found", [True, False])
@pytest.mark.parametrize("layers", [-1, "layers.1"])
def test_a_replica_of_a_watched_model_is_refused(layers, found):
    model = make()
    with capture_attention(model, layers) as capture:
        if found:
            model(data())
            capture.pop()
        replica = model.layers[1]._replicate_for_data_parallel()
        replica.qkv = model.layers[1].qkv
        with pytest.raises(RuntimeError, match=r"replica of torch.nn.DataParallel"):
            replica(data())
