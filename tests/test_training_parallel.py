"""Two processes on CPU: each framework, unedited, trains like one process on the whole batch by hand."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from attncongruence import CACRLoss, regularize
from tests.helpers.training import LR, MODELS, TEXT, by_hand, furthest, regularized, schedule, weights
from tests.helpers.versions import FSDP2_ON_CPU, has

pytestmark = pytest.mark.slow

WORLD, STEPS, CLOSE = 2, 3, 1e-6


def own_half(name: str, rank: int) -> dict[str, Tensor]:
    return {key: value.chunk(WORLD)[rank] for key, value in MODELS[name][1]().items()}


def plain_loop(rank: int, name: str, first: str = "regularize") -> list[Tensor]:
    """Forward, backward, step: the loop of a torchrun script."""
    model = MODELS[name][0]().train()
    if first == "regularize":
        regularized(name, model)
    wrapped = DistributedDataParallel(model)
    if first == "wrapper":
        regularized(name, wrapped)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        wrapped(**own_half(name, rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def nothing_matched_in_one_process(rank: int, name: str) -> list[Tensor]:
    """The second process has negatives only: it adds 0, and DDP waits for all parameters all the same."""
    model = MODELS[name][0]().train()
    positives = [True] * 4 if rank == 0 else [False] * 4
    regularized(name, model, positives=positives)
    wrapped = DistributedDataParallel(model)
    wrapped(**own_half(name, rank)).loss.backward()
    return [p.grad for p in model.parameters()]


def sharded(rank: int, name: str, first: str) -> list[Tensor]:
    """FSDP2."""
    model = MODELS[name][0]().train()
    regularizer = regularized(name, model) if first == "regularize" else None
    for layer in model.vilt.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    regularizer = regularizer or regularized(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        model(**own_half(name, rank)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert regularizer.step == STEPS
    return [p.full_tensor().detach() for p in model.parameters()]


def accelerate(rank: int, name: str) -> list[Tensor]:
    from accelerate import Accelerator

    model = MODELS[name][0]().train()
    regularized(name, model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    half = own_half(name, rank)
    for _ in range(STEPS):
        for part in range(2):
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**{key: value.chunk(2)[part] for key, value in half.items()}).loss)
                optimizer.step()
                optimizer.zero_grad()
    return weights(model)


def trainer(rank: int, name: str) -> list[Tensor]:
    """Two micro-batches of two samples a process and step; num_items_in_batch is of both processes for LLaVA."""
    import tempfile

    from transformers import Trainer, TrainingArguments

    from attncongruence.integrations.huggingface import CongruenceCallback
    from tests.helpers.training import rows

    model = MODELS[name][0]()
    regularized(name, model)
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=STEPS,
        learning_rate=LR,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        average_tokens_across_devices=True,  # the default is another in transformers 4.53
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    callbacks = [CongruenceCallback()]
    Trainer(model, arguments, train_dataset=rows(MODELS[name][1]()), callbacks=callbacks).train()
    return weights(model)


def lightning(rank: int, name: str) -> list[Tensor]:
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from tests.helpers.training import rows

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = MODELS[name][0]()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=LR)

    module = Lit().train()
    regularize(module, CACRLoss(), n_text=TEXT, weight=schedule)
    pl.Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy="ddp",
        max_epochs=STEPS,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(rows(MODELS[name][1]()), batch_size=2))
    return weights(module)


JOBS = {
    "DDP": (plain_loop, "vilt"),
    "DDP first": (plain_loop, "vilt", "wrapper"),
    "FSDP2": (sharded, "vilt", "regularize"),
    "FSDP2 first": (sharded, "vilt", "wrapper"),
    "Accelerate": (accelerate, "vilt"),
    "Trainer": (trainer, "vilt"),
    "Trainer, num_items_in_batch": (trainer, "llava"),
    "Lightning": (lightning, "vilt"),
}
NEEDS = {
    "FSDP2": FSDP2_ON_CPU,
    "FSDP2 first": FSDP2_ON_CPU,
    "Accelerate": pytest.mark.needs("accelerate"),
    "Trainer": pytest.mark.needs("accelerate"),
    "Trainer, num_items_in_batch": pytest.mark.needs("accelerate", "transformers>=4.53"),  # which has LLaVA
    "Lightning": pytest.mark.needs("lightning"),
}


def worker(rank: int, folder: str) -> None:
    """As torchrun would start it."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    # The frameworks find a process group and take it: the port is never used.
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", TORCHELASTIC_RUN_ID="test", ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    jobs = {job: how for job, how in JOBS.items() if job not in NEEDS or all(map(has, NEEDS[job].args))}
    results = {job: function(rank, *options) for job, (function, *options) in jobs.items()}
    results["negatives"] = nothing_matched_in_one_process(rank, "vilt")
    torch.save(results, f"{folder}/{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """Two processes do all the jobs, since starting them is what costs."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(worker, (str(folder),), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@functools.cache
def expected(name: str) -> list[Tensor]:
    steps = [[MODELS[name][1]()]] * STEPS
    found = by_hand(name, steps)
    assert furthest(found, by_hand(name, steps, weight=lambda step: 0.0)) > 2000 * CLOSE
    return found


@pytest.mark.parametrize("job", [pytest.param(job, marks=NEEDS.get(job, ())) for job in JOBS])
def test_two_processes_train_like_one(job, trained):
    for process in trained:
        assert furthest(process[job], expected(JOBS[job][1])) < CLOSE


def test_a_process_without_matched_pairs(trained):
    """The mean over processes of (main + weight * loss, main)."""
    model = MODELS["vilt"][0]().train()
    first, second = (own_half("vilt", rank) for rank in range(WORLD))
    with regularized("vilt", model):
        model(**first).loss.backward()
    model(**second).loss.backward()
    for process in trained:
        assert furthest(process["negatives"], [p.grad / WORLD for p in model.parameters()]) < CLOSE
