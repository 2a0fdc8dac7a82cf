"""Training without a Trainer: DeepSpeed's engine, Accelerate, Fabric and unusual optimizers train like a loop by hand.

DeepSpeed runs in processes of its own, started as torchrun would start them: it configures the process that imports it.
"""

import functools
import os
import sys
import types
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from attncongruence import CACRLoss, cacr_loss, capture_attention, exponential_warmup, regularize
from tests.helpers.regularizing import TEXT as LENGTH_OF_TEXT
from tests.helpers.regularizing import Model, close_all_regularizers, hidden_states, parts  # noqa: F401
from tests.helpers.training import (
    LR,
    TEXT,
    Batch,
    by_hand,
    furthest,
    micro_batches,
    regularized,
    rows,
    schedule,
    vilt,
    vilt_batch,
    weights,
)

STEPS, CLOSE = 3, 1e-6
DEEPSPEED = pytest.mark.needs(
    "deepspeed>=0.19.8",
    "accelerate",
    "transformers>=5.0",
    reason="0.19.0 and 0.19.4 accumulate gradients wrongly on CPU by themselves",
)


def adamw(parameters: object, lr: float) -> torch.optim.Optimizer:
    """With an eps that leaves the rounding of gradients that are 0 (of key biases) as small as it is."""
    return torch.optim.AdamW(parameters, lr=lr, eps=0.1)


def config(stage: int, accumulate: int, micro: int, **options: object) -> dict:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **options,
    }


def initialize(model: nn.Module, settings: dict, optimizer: type = torch.optim.SGD) -> object:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model.parameters(), lr=LR), config=settings)
    return engine


def gathered(model: nn.Module) -> list[Tensor]:
    """The weights, also where each process holds a part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        return weights(model)


def own(batch: Batch) -> Batch:
    """This process's share of a batch."""
    return {key: value.chunk(dist.get_world_size())[dist.get_rank()] for key, value in batch.items()}


def in_bf16(batch: Batch) -> Batch:
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}


def train(engine: object, steps: int, accumulate: int, batch: Batch | None = None) -> None:
    for _ in range(steps):
        for part in micro_batches(own(vilt_batch()) if batch is None else batch, accumulate):
            engine.backward(engine(**part).loss)
            engine.step()


# -- jobs: each returns what its test looks at


def zero(stage: int, optimizer: type = torch.optim.SGD, accumulate: int = 2, first: str = "regularize") -> dict:
    model = vilt().train()
    regularizer = regularized("vilt", model) if first == "regularize" else None
    engine = initialize(model, config(stage, accumulate, 8 // accumulate // dist.get_world_size()), optimizer)
    if regularizer is None:
        regularizer = regularized("vilt", engine)
    train(engine, STEPS, accumulate)
    return {"weights": gathered(model), "step": regularizer.step, "last": regularizer.last.weight}


def in_bf16_by_hand() -> list[Tensor]:
    """The model in bf16, the weights that are stepped in float32."""
    model = vilt().train().bfloat16()
    kept = [parameter.detach().float() for parameter in model.parameters()]
    with capture_attention(model) as capture:
        for step in range(STEPS):
            for parameter, weight in zip(model.parameters(), kept, strict=True):
                parameter.data.copy_(weight)
                parameter.grad = None
            main = model(**in_bf16(vilt_batch())).loss
            (main + (schedule(step) * cacr_loss(capture.pop(), TEXT)).to(main)).backward()
            kept = [w - LR * p.grad.float() for p, w in zip(model.parameters(), kept, strict=True)]
    return [weight.bfloat16() for weight in kept]


def half(stage: int) -> dict:
    """bf16 weights in the model, float32 ones in the optimizer."""
    model = vilt().train()
    regularizer = regularized("vilt", model)
    engine = initialize(model, config(stage, 1, 8, bf16={"enabled": True}))
    train(engine, STEPS, 1, in_bf16(vilt_batch()))
    # By hand in the same process: what rounds bf16 products is chosen for the process.
    return {"weights": gathered(model), "step": regularizer.step, "expected": in_bf16_by_hand()}


def skipped() -> dict:
    """An infinite gradient: the engine leaves the step out, and so does the schedule."""
    model = vilt().train()
    regularizer = regularized("vilt", model)
    engine = initialize(model, config(1, 1, 8, bf16={"enabled": True, "check_grad_overflow": True}))
    counted = []
    for factor in (1.0, torch.inf, 1.0):
        engine.backward(engine(**in_bf16(vilt_batch())).loss * factor)
        engine.step()
        counted.append(regularizer.step)
    return {"counted": counted, "engine": (engine.global_steps, engine.skipped_steps)}


def issue() -> dict:
    """The weight of a schedule after 20 steps."""
    model = vilt().train()
    regularizer = regularize(model, CACRLoss(), n_text=TEXT, weight=exponential_warmup(20))
    engine = initialize(model, config(1, 1, 8))
    train(engine, 20, 1)
    return {"last": regularizer.last.weight, "next": exponential_warmup(20)(regularizer.step)}


def resumed(stage: int, folder: str) -> dict:
    """Two steps, a checkpoint, two more: straight on, in another engine, and there without the regularizer's state."""

    def start() -> tuple:
        model = vilt().train()
        regularizer = regularized("vilt", model)
        return regularizer, initialize(model, config(stage, 1, 8), adamw)

    regularizer, engine = start()
    train(engine, 2, 1)
    engine.save_checkpoint(f"{folder}/zero{stage}", client_state={"congruence": regularizer.state_dict()})
    train(engine, 2, 1)
    found = {"straight": gathered(engine.module)}
    regularizer, engine = start()
    _, client = engine.load_checkpoint(f"{folder}/zero{stage}")
    regularizer.load_state_dict(client["congruence"])
    train(engine, 2, 1)
    found |= {"resumed": gathered(engine.module), "step": regularizer.step}
    _, engine = start()
    engine.load_checkpoint(f"{folder}/zero{stage}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(engine, 1, 1)
    return found | {"told": [str(w.message) for w in caught if "regularizer" in str(w.message)]}


def accelerate(stage: int, folder: str = "") -> dict:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    def start() -> tuple:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        model = vilt().train()
        regularizer = regularized("vilt", model)
        settings = config(stage, 2, 4 // dist.get_world_size())
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, deepspeed_plugin=plugin)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
        accelerator.register_for_checkpointing(regularizer)
        return accelerator, wrapped, optimizer, regularizer

    def go_on(accelerator: object, wrapped: nn.Module, optimizer: object, steps: int) -> None:
        for _ in range(steps):
            for part in micro_batches(own(vilt_batch()), 2):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**part).loss)
                    optimizer.step()
                    optimizer.zero_grad()

    accelerator, wrapped, optimizer, regularizer = start()
    go_on(accelerator, wrapped, optimizer, 2)
    if folder:
        accelerator.save_state(f"{folder}/accelerate{stage}")
    go_on(accelerator, wrapped, optimizer, 1)
    found = {"weights": gathered(wrapped.module), "step": regularizer.step}
    if folder:
        accelerator, wrapped, optimizer, regularizer = start()
        accelerator.load_state(f"{folder}/accelerate{stage}")
        found["loaded"] = regularizer.step
        go_on(accelerator, wrapped, optimizer, 1)
        found["resumed"] = gathered(wrapped.module)
    return found


def trainer(callback: bool, folder: str) -> dict:
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    from attncongruence.integrations.huggingface import CongruenceCallback

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    arguments = TrainingArguments(
        output_dir=f"{folder}/trainer",
        deepspeed=config(2, 2, 4),
        use_cpu=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=STEPS,
        learning_rate=LR,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    model = vilt()
    regularizer = regularized("vilt", model)
    callbacks = [CongruenceCallback()] if callback else []
    Trainer(model, arguments, train_dataset=rows(vilt_batch()), callbacks=callbacks).train()
    return {"weights": weights(model), "step": regularizer.step}


ALONE = {
    **{f"ZeRO {stage}": (zero, stage) for stage in range(4)},
    "ZeRO 1, AdamW, one micro-batch": (zero, 1, adamw, 1),
    "ZeRO 3, AdamW, four micro-batches": (zero, 3, adamw, 4),
    "ZeRO 2, regularized after": (zero, 2, torch.optim.SGD, 2, "engine"),
    "Accelerate, ZeRO 1": (accelerate, 1, "folder"),
    "Accelerate, ZeRO 3": (accelerate, 3),
    "Trainer": (trainer, False, "folder"),
    "Trainer and callback": (trainer, True, "folder"),
}
OTHERS = {
    **{f"bf16, ZeRO {stage}": (half, stage) for stage in range(4)},
    **{f"resumed, ZeRO {stage}": (resumed, stage, "folder") for stage in (0, 2, 3)},
    "skipped": (skipped,),
    "issue": (issue,),
}
TOGETHER = {
    **{f"ZeRO {stage}": (zero, stage) for stage in range(4)},
    "Accelerate, ZeRO 2": (accelerate, 2),
}


def worker(rank: int, folder: str, jobs: dict, world: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    # DeepSpeed takes the process group that it finds: the port is never used.
    os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here, for some 20 s
    deepspeed.init_distributed("gloo")
    results = {}
    for job, (function, *options) in jobs.items():
        results[job] = function(*(folder if option == "folder" else option for option in options))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run(folder: object, jobs: dict, world: int) -> list[dict]:
    mp.spawn(worker, (str(folder), jobs, world), world)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict]:
    """One process does all the jobs: importing DeepSpeed is what costs."""
    (results,) = run(tmp_path_factory.mktemp("alone"), ALONE | OTHERS, 1)
    return results


@functools.cache
def expected(optimizer: type = torch.optim.SGD, steps: int = STEPS) -> list[Tensor]:
    whole = [[vilt_batch()]] * steps
    found = by_hand("vilt", whole, optimizer=optimizer)
    for wrong in (lambda step: 0.0, lambda step: schedule(0)):
        assert furthest(found, by_hand("vilt", whole, weight=wrong, optimizer=optimizer)) > 500 * CLOSE
    return found


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("job", ALONE)
def test_deepspeed_trains_like_a_loop_by_hand(job, alone):
    found = alone[job]
    assert found["step"] == STEPS
    assert furthest(found["weights"], expected(adamw if "AdamW" in job else torch.optim.SGD)) < CLOSE
    assert found.get("last", schedule(STEPS - 1)) == schedule(STEPS - 1)


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("job", TOGETHER)
def test_deepspeed_in_two_processes_trains_like_one(job, together):
    for found in together:
        assert furthest(found[job]["weights"], expected()) < CLOSE
        assert found[job]["step"] == STEPS


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    return run(tmp_path_factory.mktemp("together"), TOGETHER, 2)


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_in_half_precision(stage, alone):
    found = alone[f"bf16, ZeRO {stage}"]
    assert found["step"] == STEPS
    assert found["weights"][0].dtype == torch.bfloat16
    assert furthest(found["weights"], found["expected"]) < CLOSE
    assert furthest([w.float() for w in found["weights"]], expected()) > 100 * CLOSE


@DEEPSPEED
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_resumes_and_says_so_where_the_step_was_left_behind(stage, alone):
    found = alone[f"resumed, ZeRO {stage}"]
    assert found["step"] == 4
    assert furthest(found["straight"], expected(adamw, 4)) < CLOSE
    assert furthest(found["resumed"], expected(adamw, 4)) < CLOSE
    (said,) = found["told"]
    assert "the optimizer has made 3 steps and the regularizer counts 1" in said


@DEEPSPEED
@pytest.mark.slow
def test_accelerate_with_deepspeed_keeps_the_step_in_checkpoints(alone):
    found = alone["Accelerate, ZeRO 1"]
    assert found["loaded"] == 2
    assert furthest(found["resumed"], expected()) < CLOSE


@DEEPSPEED
@pytest.mark.slow
def test_steps_that_the_engine_skips_are_none(alone):
    assert alone["skipped"] == {"counted": [1, 1, 2], "engine": (3, 1)}


@DEEPSPEED
@pytest.mark.slow
def test_the_schedule_moves_under_deepspeed(alone):
    assert alone["issue"]["last"] == pytest.approx(0.7788, abs=1e-4)  # exp(5 (19/20 - 1))
    assert alone["issue"]["next"] == 1.0


# -- Lightning Fabric


@pytest.mark.needs("lightning", "transformers>=5.0")
@pytest.mark.parametrize("first", ["regularize", "setup"])
def test_fabric(first):
    from lightning.fabric import Fabric

    model = vilt().train()
    regularizer = regularized("vilt", model) if first == "regularize" else None
    fabric = Fabric(accelerator="cpu", devices=1)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LR))
    regularizer = regularizer or regularized("vilt", wrapped)
    assert regularizer.model is model
    for _ in range(STEPS):
        for part in micro_batches(vilt_batch(), 2):
            fabric.backward(wrapped(**part).loss / 2)
        optimizer.step()
        optimizer.zero_grad()
    assert regularizer.step == STEPS
    assert furthest(weights(model), expected()) < CLOSE


# -- optimizers of other kinds


def test_an_optimizer_for_each_parameter_in_the_backward_pass_is_one_step(x):
    """As torch's tutorial does to save memory: each steps as soon as its gradient is there."""
    model, other = Model(), Model()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    regularizer = regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT, weight=schedule)
    ordinary = torch.optim.SGD(other.parameters(), lr=0.1)
    for number in range(STEPS):
        model(x)["loss"].backward()
        assert regularizer.step == number + 1
        main, congruence = parts(x, other)
        (main + schedule(number) * congruence).backward()
        ordinary.step()
        ordinary.zero_grad()
    assert furthest(weights(model), weights(other)) < CLOSE


def test_matrices_and_the_rest_have_optimizers_of_their_own(x):
    """Muon and AdamW: two steps of optimizers, one of training; also where micro-batches are accumulated."""
    model = Model()
    regularizer = regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT, weight=schedule)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    kind = getattr(torch.optim, "Muon", torch.optim.RMSprop)  # torch 2.9 and later
    optimizers = [kind(matrices, lr=0.01), torch.optim.AdamW([p for p in model.parameters() if p.ndim < 2])]
    for number in range(STEPS):
        for part in x.chunk(2):
            model(part)["loss"].backward()
            assert regularizer.last.weight == schedule(number)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert regularizer.step == STEPS


def by_hand_descent(model: nn.Module, data: bool) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.data if data else parameter).sub_(0.1 * parameter.grad)
            parameter.grad = None


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_steps_that_nothing_shows_are_told(data, accumulate, x):
    model = Model()
    regularizer = regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT, weight=exponential_warmup(20))
    for number in range(7):
        model(x)["loss"].backward()
        if (number + 1) % accumulate == 0:
            by_hand_descent(model, data)
    with pytest.warns(UserWarning, match=r"changed over 8 forward passes.*at 0\.006738.*regularizer\.count_step\(\)"):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(24):  # once is enough
            model(x)["loss"].backward()
            by_hand_descent(model, data)
        regularizer.count_step()
    assert regularizer.step == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", ["accumulated", "counted", "constant weight", "seen late"])
def test_nothing_is_told_where_nothing_is_wrong(how, x):
    model = Model()
    weight = 0.5 if how == "constant weight" else exponential_warmup(20)
    regularizer = regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT, weight=weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(33):
        model(x)["loss"].backward()
        if how in ("counted", "constant weight"):
            by_hand_descent(model, data=True)
        if how == "counted":
            regularizer.count_step()
    if how == "seen late":
        optimizer.step()
    assert regularizer.step == {"counted": 33, "seen late": 1}.get(how, 0)


# -- how engines are watched


class Engine:
    """What is used of DeepSpeed's engine, for where it is not installed."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.global_steps, self.skipped_steps, self.applied = module, 0, 0, True

    def was_step_applied(self) -> bool:
        return self.applied

    def step(self) -> str:
        self.global_steps += self.applied
        return "done"


def test_engines_are_watched_while_a_regularizer_is_open(monkeypatch, x):
    model, plain = Model(), Engine.step
    monkeypatch.delitem(sys.modules, "deepspeed.runtime.engine", raising=False)
    with regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT) as regularizer:
        # Imported after regularize was called.
        monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", types.SimpleNamespace(DeepSpeedEngine=Engine))
        engine, other = Engine(nn.ModuleList([model])), Engine(Model())
        counted = []
        for applied in (True, False, True):
            model(x)["loss"].backward()
            engine.applied = applied
            other.step()
            assert engine.step() == "done"
            counted.append(regularizer.step)
        assert counted == [1, 1, 2]
        assert Engine.step is not plain
    assert Engine.step is plain
    with regularize(model, CACRLoss(), n_text=LENGTH_OF_TEXT):
        model.eval()
        model(x)["loss"].backward()
        with pytest.raises(RuntimeError, match="eval mode only"):
            engine.step()
        inner = Engine.step
        monkeypatch.setattr(Engine, "step", lambda self: inner(self))
    assert engine.step() == "done"  # wrapped by others: ours stays, and only calls the method
