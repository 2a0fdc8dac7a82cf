"""Two processes that share one layer: its heads are joined, with one process's value and gradient, or it is refused."""

import functools
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from attncongruence import RELEASED, WEIGHTED_MEAN, cacr_loss, iais_loss
from attncongruence.capture import capture_attention
from tests.helpers.versions import FSDP2_ON_CPU, has

pytestmark = pytest.mark.slow

WORLD, TEXT = 2, 3
Result = tuple[list[str], list[float], dict[str, Tensor]]


class Attention(nn.Module):
    """Queries, keys, values and output; `how` is sdpa, by hand, or by hand with a cap on the scores."""

    def __init__(self, width: int, heads: int, groups: int, how: str) -> None:
        super().__init__()
        self.width, self.how = width, how
        self.q, self.o = nn.Linear(24, heads * width), nn.Linear(heads * width, 24)
        self.k, self.v = nn.Linear(24, groups * width), nn.Linear(24, groups * width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.how == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        else:
            scores = q @ k.mT / self.width**0.5
            out = (scores.tanh() if self.how == "cap" else scores).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, *options: object) -> None:
        super().__init__()
        self.before, self.attention, self.after = nn.LayerNorm(24), Attention(*options), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.down(F.gelu(self.up(self.after(x))))


class Model(nn.Module):
    def __init__(self, width: int = 4, heads: int = 6, groups: int = 6, how: str = "sdpa") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(10, 24)
        self.blocks = nn.ModuleList([Block(width, heads, groups, how) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


Change = Callable[[Model, DeviceMesh], object]


def heads(model: Model, mesh: DeviceMesh, **output: object) -> None:
    """Tensor parallelism as torch's tutorial has it."""
    plan = {f"attention.{name}": ColwiseParallel(**output) for name in "qkv"}
    plan |= {"attention.o": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)


def heads_as_dtensors(model: Model, mesh: DeviceMesh) -> None:
    heads(model, mesh, use_local_output=False)


def gathered(model: Model, mesh: DeviceMesh) -> None:
    """Each process has all heads."""
    for block in model.blocks:
        parallelize_module(block.attention, mesh, {name: ColwiseParallel(output_layouts=Replicate()) for name in "qkv"})


def sequences(model: Model, mesh: DeviceMesh) -> None:
    """Norms on a part of each sequence, attention on a part of the heads."""
    cut = Shard(1)
    parallelize_module(model, mesh, {"first": ColwiseParallel(output_layouts=cut)})
    for block in model.blocks:
        plan = {
            "before": SequenceParallel(),
            "attention": PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(Replicate(),)),
            "attention.o": RowwiseParallel(output_layouts=cut),
            "after": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=cut),
            "down": RowwiseParallel(output_layouts=cut),
        }
        parallelize_module(block, mesh, plan | {f"attention.{name}": ColwiseParallel() for name in "qkv"})
    gather = PrepareModuleInput(input_layouts=(cut,), desired_input_layouts=(Replicate(),), use_local_output=True)
    model.blocks.append(parallelize_module(nn.Identity(), mesh, gather))


def both(model: Model, mesh: DeviceMesh) -> None:
    """FSDP2 over a mesh of its own, around tensor parallelism."""
    meshes = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "heads"))
    heads(model, meshes["heads"])
    for block in model.blocks:
        fully_shard(block, mesh=meshes["data"])


def by_hand_around_torch(model: Model, mesh: DeviceMesh) -> None:
    """Only what follows on attention is spread, in the module that attends."""
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


class Sum(torch.autograd.Function):
    """Adds up over processes: forward, or backward."""

    @staticmethod
    def forward(ctx: object, x: Tensor, now: bool) -> Tensor:
        ctx.now, out = now, x.clone()
        if now:
            dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        if not ctx.now:
            dist.all_reduce(grad)
        return grad, None


def by_hand(model: Model, mesh: DeviceMesh) -> None:
    """Tensor parallelism with plain tensors: nothing tells what the parts are parts of."""
    for block in model.blocks:
        attention, own = block.attention, dist.get_rank()
        for part, axis in ((attention.q, 0), (attention.k, 0), (attention.v, 0), (attention.o, 1)):
            part.weight = nn.Parameter(part.weight.detach().chunk(WORLD, axis)[own].clone())
            if axis == 0:
                part.bias = nn.Parameter(part.bias.detach().chunk(WORLD)[own].clone())
        plain = attention.forward
        attention.forward = lambda x, plain=plain: Sum.apply(plain(Sum.apply(x, False)), True)


def inputs(seed: int = 1, length: int = 8) -> Tensor:
    return torch.randn(3, length, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: Model, layers: object = -1, x: Tensor | None = None) -> Result:
    """Layers, losses and gradients of a step with a main loss."""
    with capture_attention(model, layers) as capture:
        out = model(inputs() if x is None else x)
        records = capture.pop_all()
    forms = [(loss, convention, "dense") for loss in (cacr_loss, iais_loss) for convention in (RELEASED, WEIGHTED_MEAN)]
    if records[0].query is not None:
        forms += [(cacr_loss, RELEASED, "streaming"), (cacr_loss, WEIGHTED_MEAN, "streaming")]
    losses = [loss(r, TEXT, convention=c, impl=impl) for r in records for loss, c, impl in forms]
    (out.square().mean() + sum(losses)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    grads = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return [record.layer for record in records], [loss.item() for loss in losses], grads


DRAWN = torch.Generator().manual_seed(int.from_bytes(b"heads"))
WIDTH, GROUPS = (int(torch.randint(low, 4, (), generator=DRAWN)) for low in (2, 1))
EQUAL: dict[str, tuple[Callable[[], Model], Change, object]] = {
    "torch": (Model, heads, -1),
    "two layers": (Model, heads, "blocks.*.attention"),
    "by hand": (functools.partial(Model, how="hand"), heads, -1),
    "capped": (functools.partial(Model, how="cap"), heads, [0, 1]),
    "grouped": (functools.partial(Model, groups=2), heads, -1),
    "drawn": (functools.partial(Model, 2 * WIDTH, 12 * GROUPS, 2 * GROUPS), heads, [-2]),
    "one head each": (functools.partial(Model, 8, 2, 2, "hand"), heads, -1),
    "DTensors": (functools.partial(Model, how="hand"), heads_as_dtensors, -1),
    "DTensors, capped": (functools.partial(Model, how="cap"), heads_as_dtensors, -1),
    "sequence parallel norms": (Model, sequences, -1),
    "FSDP2": (Model, both, -1),
    "gathered": (Model, gathered, -1),
    "only the rest": (Model, by_hand_around_torch, "blocks.*"),
}
DTENSOR_PRODUCTS = pytest.mark.needs(
    "torch>=2.14", reason="torch 2.11 cannot multiply spread heads; none between tried"
)
NEEDS = {
    "DTensors": DTENSOR_PRODUCTS,
    "DTensors, capped": DTENSOR_PRODUCTS,
    "FSDP2": FSDP2_ON_CPU,
    "transformers": pytest.mark.needs("transformers>=5.0", "accelerate", reason="a tensor parallel plan on CPU"),
}


def spread(make: Callable[[], Model], change: Change, layers: object, mesh: DeviceMesh) -> Result:
    model = make()
    change(model, mesh)
    return step(model, layers)


def llava(plan: str | None, folder: str) -> Result:
    """LLaVA, whose language model transformers spreads and whose vision tower it leaves whole."""
    import transformers

    from tests.helpers.training import llava_batch, llava_layout

    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, tp_plan=plan, dtype=torch.float64)
    batch = llava_batch()
    with capture_attention(model.train()) as capture:
        main = model(**batch).loss
        record = capture.pop()
    conventions = (RELEASED, WEIGHTED_MEAN)
    losses = [cacr_loss(record, llava_layout(batch), convention=c, direction="language") for c in conventions]
    (main + 10 * sum(losses)).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    grads = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return [record.layer], [loss.item() for loss in losses], grads


def in_context_parallel(mesh: DeviceMesh) -> None:
    """Its own kernels are not there on CPU in all versions; a model that attends by hand sees a part all the same."""
    x = inputs()
    with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):  # 2.6 stays in it after an error
        found = refusal(lambda _: step(Model(how="hand"), -1, x), mesh)
    raise RuntimeError(found)


def after_context_parallel(mesh: DeviceMesh) -> None:
    model, x = Model(how="hand"), inputs()
    with capture_attention(model, "blocks.0.attention") as capture:
        with context_parallel(mesh, buffers=[x], buffer_seq_dims=[1]):
            model(x)
        capture.pop()


def ulysses(mesh: DeviceMesh) -> None:
    """Whole sequences of some heads, by an exchange inside of the attention."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    class Core(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(10, 48)
            self.attend = DistributedAttention(Core(), mesh.get_group(), scatter_idx=2, gather_idx=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.attend(*self.project(x).unflatten(-1, (4, 12)).split(4, -1), batch_dim_idx=0)

    own = inputs().chunk(WORLD, 1)[dist.get_rank()]
    for layers in (-1, "attend.local_attn"):
        model = Sequence()
        with capture_attention(model, layers) as capture:
            model(own)
            with pytest.raises(RuntimeError, match=r"DistributedAttention of DeepSpeed"):
                capture.pop()
    raise RuntimeError("DistributedAttention refused, by number and by name")


def compiled(mesh: DeviceMesh) -> None:
    model = Model()
    heads(model, mesh)
    model.blocks[1].attention.compile(backend="aot_eager")
    step(model, "blocks.1.attention")


def without_gradients(mesh: DeviceMesh) -> None:
    model = Model()
    heads(model, mesh)
    with capture_attention(model, analysis=True) as capture, torch.no_grad():
        model(inputs())
        capture.pop()


def cut_along(dim: int, mesh: DeviceMesh) -> None:
    """Three heads of width 1, of which each process gets a part: of the sequence, or of the heads."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            whole = DTensor.from_local(self.project(x), mesh, [Replicate()])
            q = whole.redistribute(placements=[Shard(dim)]).to_local().unflatten(-1, (-1, 1)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q)

    step(Cut())


REFUSED: dict[str, tuple[Callable[[DeviceMesh], object], str]] = {
    "by hand": (
        lambda mesh: spread(Model, by_hand, -1, mesh),
        r"blocks.1.attention .* speaks to other processes .* Shard heads evenly with DTensors",
    ),
    "unevenly": (functools.partial(cut_along, 2), r"3 is no multiple of 2 processes"),
    "context parallel": (in_context_parallel, r"part of each sequence, by context parallelism of torch .* without it"),
    "after context parallel": (after_context_parallel, r"part of each sequence, by context parallelism of torch"),
    "Ulysses": (ulysses, r"refused, by number and by name"),
    "compiled": (compiled, r"weights are DTensors, and autograd does not show .* without torch.compile"),
    "without gradients": (without_gradients, r"weights are DTensors, and autograd does not show .* with gradients on"),
    "part of the sequence": (functools.partial(cut_along, 1), r"is cut along dimension 1: a part of each sequence"),
}
NEEDS_REFUSED = {"Ulysses": pytest.mark.needs("deepspeed")}


def refusal(job: Callable[[DeviceMesh], object], mesh: DeviceMesh) -> str:
    try:
        job(mesh)
    except RuntimeError as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return "nothing was refused"


def worker(rank: int, folder: str) -> None:
    """As torchrun would start it."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    possible = functools.partial(lambda needs, job: job not in needs or all(map(has, needs[job].args)))
    results = {job: spread(*how, mesh) for job, how in EQUAL.items() if possible(NEEDS, job)}
    if possible(NEEDS, "transformers"):
        results["transformers"] = llava("auto", f"{folder}/llava")
    refused = {job: refusal(how, mesh) for job, (how, _) in REFUSED.items() if possible(NEEDS_REFUSED, job)}
    torch.save((results, refused), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two processes do all the jobs, since starting them is what costs."""
    folder = str(tmp_path_factory.mktemp("processes"))
    if all(map(has, NEEDS["transformers"].args)):
        from tests.helpers import training

        model = training.llava()
        model.config.text_config.num_key_value_heads = 2  # one for each process
        type(model)(model.config).save_pretrained(f"{folder}/llava")
    mp.spawn(worker, (folder,), WORLD)
    return folder


@pytest.fixture(autouse=True)
def double() -> object:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(folder: str, job: str, expected: Result) -> None:
    layers, losses, grads = expected
    assert len(grads) > 4
    for rank in range(WORLD):
        found, _ = torch.load(f"{folder}/{rank}.pt", weights_only=False)
        assert found[job][0] == layers
        assert found[job][1] == pytest.approx(losses, rel=1e-9)
        assert found[job][2].keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[job][2][name], grad, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("job", [pytest.param(job, marks=NEEDS.get(job, ())) for job in EQUAL])
def test_two_processes_are_like_one(job, folder):
    make, _, layers = EQUAL[job]
    close(folder, job, step(make(), layers))


@pytest.mark.needs(*NEEDS["transformers"].args)
def test_a_plan_of_transformers_is_like_one_process(folder):
    close(folder, "transformers", llava(None, f"{folder}/llava"))


@pytest.mark.parametrize("job", [pytest.param(job, marks=NEEDS_REFUSED.get(job, ())) for job in REFUSED])
def test_what_cannot_be_joined_is_refused(job, folder):
    for rank in range(WORLD):
        _, refused = torch.load(f"{folder}/{rank}.pt", weights_only=False)
        with pytest.raises(RuntimeError, match=REFUSED[job][1]):
            raise RuntimeError(refused[job])
