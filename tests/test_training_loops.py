"""One line before the real Trainer, Accelerate and Lightning, none of them edited: the weights of a loop by hand."""

import os
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from attncongruence import CACRLoss, Regularizer, cacr_loss, exponential_warmup, regularize
from attncongruence.integrations import huggingface, lightning
from tests.helpers.training import (
    LR,
    MODELS,
    TEXT,
    Batch,
    by_hand,
    furthest,
    llava,
    llava_batch,
    micro_batches,
    regularized,
    rows,
    schedule,
    vilt,
    vilt_batch,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
CLOSE = 1e-6
SLOW = pytest.mark.slow
# Micro-batches a step, and their size: four of two samples, or the batch whole.
every_size = pytest.mark.parametrize(("accumulate", "micro"), [(4, 2), pytest.param(1, 8, marks=SLOW)])
STEPS = 3
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps precision and accumulation in the process; Trainer of 4.53 sets precision in os.environ."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def whole(name: str) -> list[list[Batch]]:
    return [[MODELS[name][1]()]] * STEPS


@pytest.fixture(scope="module", params=MODELS)
def expected(request) -> tuple[str, list[Tensor]]:
    """By hand, one batch of 8 a step; and proof that the loss moves the weights by far more than `CLOSE`."""
    name = request.param
    final = by_hand(name, whole(name))
    assert furthest(final, by_hand(name, whole(name), weight=lambda step: 0.0)) > 2000 * CLOSE
    assert furthest(final, by_hand(name, whole(name), weight=lambda step: schedule(0))) > 500 * CLOSE
    return name, final


def trainer_for(
    model: nn.Module,
    batch: Batch,
    folder: object,
    *,
    micro: int = 8,
    accumulate: int = 1,
    callbacks: list[TrainerCallback] | None = None,
    trainer: type[Trainer] = Trainer,
    **options: object,
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": STEPS,
        "learning_rate": LR,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        **options,
    }
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:  # up to some transformers 5.x
        del arguments["train_sampling_strategy"]
        trainer = type("InOrder", (trainer,), {"_get_train_sampler": lambda self, *_: SequentialSampler(rows(batch))})
    return trainer(model, TrainingArguments(**arguments), train_dataset=rows(batch), callbacks=callbacks)


# -- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, pytest.param(CHECKPOINTING, marks=SLOW)], ids=["plain", "checkpointing"])
@every_size
def test_trainer(expected, accumulate, micro, options, tmp_path):
    """LLaVA divides a sum by num_items_in_batch, and Trainer doesn't divide it again; ViLT's mean is divided."""
    name, final = expected
    make, batch = MODELS[name]
    model = make()
    regularizer = regularized(name, model)
    # Where labels are tokens, only the callback knows how many micro-batches there are.
    callbacks = [huggingface.CongruenceCallback()] if name == "llava" and accumulate > 1 else None
    trainer = trainer_for(model, batch(), tmp_path, micro=micro, accumulate=accumulate, callbacks=callbacks, **options)
    trainer.train()
    assert furthest(weights(model), final) < CLOSE
    assert regularizer.step == STEPS
    assert regularizer.micro_batches is None  # a later loop may accumulate otherwise


class StepByHand(Trainer):
    """Trainer's training step in its author's own words, with a scale of its own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, num_items_in_batch=num_items_in_batch).loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("options", [{}, pytest.param(CHECKPOINTING, marks=SLOW)], ids=["plain", "checkpointing"])
@every_size
def test_trainer_itself_is_regularized(expected, accumulate, micro, options, tmp_path):
    name, final = expected
    make, batch = MODELS[name]
    model = make()
    options = {**options, "logging_strategy": "steps", "logging_steps": 1}
    trainer = trainer_for(model, batch(), tmp_path, micro=micro, accumulate=accumulate, **options)
    regularizer = regularized(name, trainer)
    trainer.train()
    assert furthest(weights(model), final) < CLOSE
    assert regularizer.step == STEPS
    logged = [entry["congruence_weight"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [schedule(step) for step in range(STEPS)]
    regularizer.close()
    assert type(trainer.training_step).__name__ == type(trainer.log).__name__ == "method"


def test_a_training_step_of_its_own_is_regularized(tmp_path):
    model = llava()
    trainer = trainer_for(model, llava_batch(), tmp_path, micro=2, accumulate=4, trainer=StepByHand)
    regularized("llava", trainer)
    trainer.train()
    assert furthest(weights(model), by_hand("llava", [[llava_batch()]] * STEPS)) < CLOSE


def test_evaluation_in_between_adds_nothing(tmp_path):
    model, other = llava(), llava()
    for one in (model, other):
        trainer = trainer_for(one, llava_batch(), tmp_path)
        trainer.eval_dataset = rows(llava_batch(2))
        if one is model:
            trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
        regularized("llava", trainer)
        trainer.train()
        evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        assert len(evaluations) == (STEPS if one is model else 0)
    assert furthest(weights(model), weights(other)) == 0.0


class WithoutBackward(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


class OfAnother(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.other(**inputs).loss


def test_a_trainer_that_would_lose_the_term_is_refused(tmp_path):
    trainer = trainer_for(llava(), llava_batch(), tmp_path, trainer=WithoutBackward)
    regularized("llava", trainer)
    with pytest.raises(RuntimeError, match=r"did not call accelerator\.backward.*add weight"):
        trainer.train()
    trainer = trainer_for(llava(), llava_batch(), tmp_path, trainer=OfAnother)
    trainer.other = llava().train()
    regularized("llava", trainer)
    with pytest.raises(RuntimeError, match=r"ran no forward pass with gradients.*compute_loss"):
        trainer.train()


def test_another_model_than_the_regularized_one_is_refused(tmp_path):
    trainer = trainer_for(llava(), llava_batch(), tmp_path)
    trainer.model_init = llava
    regularized("llava", trainer)
    with pytest.raises(RuntimeError, match=r"made another model \(model_init\)"):
        trainer.train()


def test_what_is_neither_model_nor_trainer_is_refused():
    for thing in (pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), object(), "model"):
        with pytest.raises(ValueError, match=r"takes a model \(nn\.Module\) or a transformers Trainer"):
            regularize(thing, CACRLoss(), 4)


def test_a_loss_that_nobody_uses_is_an_error_at_the_first_step(tmp_path):
    """As trainers that compute their loss from logits: 4 forward passes, no backward pass."""

    class FromLogits(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits, labels = model(**inputs).logits, inputs["labels"]
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = llava()
    regularized("llava", model)
    callbacks = [huggingface.CongruenceCallback()]
    trainer = trainer_for(
        model, llava_batch(), tmp_path, micro=2, accumulate=4, callbacks=callbacks, trainer=FromLogits
    )
    with pytest.raises(RuntimeError, match=r"no backward pass has reached.*regularize\(trainer, \.\.\.\)"):
        trainer.train()
    assert trainer.state.log_history == []

    trainer = trainer_for(other := llava(), llava_batch(), tmp_path, micro=2, accumulate=4, trainer=FromLogits)
    regularizer = regularized("llava", trainer)
    trainer.train()
    assert regularizer.step == STEPS
    assert furthest(weights(other), weights(llava())) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_trainer_in_half_precision(name, tmp_path):
    make, batch = MODELS[name]
    model = make()
    regularized(name, model)
    callbacks = [huggingface.CongruenceCallback()]
    trainer_for(model, batch(), tmp_path, micro=2, accumulate=4, callbacks=callbacks, bf16=True).train()
    steps = [micro_batches(batch(), 4)] * STEPS
    final = by_hand(name, steps, autocast=True, summed=name == "llava")
    assert furthest(weights(model), final) < CLOSE
    assert furthest(final, by_hand(name, steps, summed=name == "llava")) > 100 * CLOSE


def test_a_trainer_that_computes_the_loss_its_own_way(expected, tmp_path):
    """As TRL's SFTTrainer: super().compute_loss, then metrics of the outputs."""

    class Measuring(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.seen = outputs.logits.detach().mean()
            return (loss, outputs) if return_outputs else loss

    name, final = expected
    model = MODELS[name][0]()
    regularized(name, model)
    trainer_for(model, MODELS[name][1](), tmp_path, trainer=Measuring).train()
    assert furthest(weights(model), final) < CLOSE


def test_the_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    model, batch = llava(), llava_batch(6)
    regularized("llava", model)
    callbacks = [huggingface.CongruenceCallback()]
    trainer_for(model, batch, tmp_path, micro=2, accumulate=2, callbacks=callbacks, num_train_epochs=2).train()
    first, second = ({key: value[part] for key, value in batch.items()} for part in (slice(4), slice(4, 6)))
    assert furthest(weights(model), by_hand("llava", [[first], [second]] * 2)) < CLOSE


class Classifier(nn.Module):
    """One label a sample; a sum divided by num_items_in_batch; a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Tensor | None = None, **kwargs: object) -> dict:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        logits = self.out(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))
        loss = F.cross_entropy(logits, labels, reduction="mean" if num_items_in_batch is None else "sum")
        return {"logits": logits, "loss": loss if num_items_in_batch is None else loss / num_items_in_batch}


def test_unequal_micro_batches_of_classes_need_no_callback(tmp_path):
    """2, 2 | 2, 1 samples: each micro-batch counts by its samples, known from the labels."""
    random = torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(7, 9, 16, generator=random), "labels": torch.tensor([0, 1, 2, 0, 1, 2, 0])}
    model = Classifier()
    regularizer = regularize(model, CACRLoss(), n_text=4, weight=schedule)
    trainer_for(model, batch, tmp_path, micro=2, accumulate=2, num_train_epochs=1).train()
    assert float(regularizer.last.share) == pytest.approx(1 / 3)

    other = Classifier()
    optimizer = torch.optim.SGD(other.parameters(), lr=LR)
    for step, part in enumerate((slice(4), slice(4, 7))):
        q, k, _ = other.qkv(batch["x"][part])[:, None].chunk(3, -1)
        main = other(batch["x"][part], batch["labels"][part])["loss"]
        (main + schedule(step) * cacr_loss(q @ k.mT / 4, n_text=4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert furthest(weights(model), weights(other)) < CLOSE


def test_tokens_under_accumulation_without_the_callback_are_an_error(tmp_path):
    model = llava()
    regularizer = regularized("llava", model)
    trainer = trainer_for(model, llava_batch(), tmp_path, micro=2, accumulate=4)
    with pytest.raises(RuntimeError, match=r"num_items_in_batch came.*add .*CongruenceCallback\(\)"):
        trainer.train()
    regularizer.micro_batches = 4  # what the message offers as well
    trainer.train()
    assert regularizer.step == STEPS


def test_trainer_that_takes_the_labels_away_is_told(tmp_path):
    model = vilt()
    regularized("vilt", model)
    trainer = trainer_for(model, vilt_batch(), tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.mean()
    with pytest.raises(
        ValueError, match=r"returned no loss \(SequenceClassifierOutput with logits\).*compute_loss_func"
    ):
        trainer.train()


class Reporter(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_trainer_logs(tmp_path):
    model, batch = vilt(), vilt_batch()
    regularizer = regularized("vilt", model)
    found: list[float] = []
    model.register_forward_hook(lambda *_: found.append(float(regularizer.last.congruence)))
    trainer = trainer_for(
        model, batch, tmp_path, micro=4, accumulate=2, logging_strategy="steps", logging_steps=1, callbacks=[Reporter()]
    )
    trainer.callback_handler.callbacks.insert(0, huggingface.CongruenceCallback(regularizer))
    trainer.train()
    *steps, _ = trainer.state.log_history
    assert [log["congruence_weight"] for log in steps] == [3.0, 5.0, 7.0]
    assert [log["congruence_loss"] for log in steps] == pytest.approx(
        [(found[2 * step] + found[2 * step + 1]) / 2 for step in range(STEPS)]
    )
    *reported, _ = trainer.callback_handler.callbacks[-2].seen
    assert [log["congruence_weight"] for log in reported] == [3.0, 5.0, 7.0]


@pytest.mark.parametrize("restore", [True, pytest.param(False, marks=SLOW)])
def test_trainer_resumes_with_the_same_losses(restore, tmp_path):
    def train(folder: object, model: nn.Module, resume: str | None = None, steps: int = 4) -> tuple[list, Regularizer]:
        regularizer = regularize(model, CACRLoss(), n_text=TEXT, weight=exponential_warmup(4))
        trainer = trainer_for(
            model,
            vilt_batch(),
            folder,
            micro=4,
            callbacks=[huggingface.CongruenceCallback(None if restore else regularizer)],
            num_train_epochs=2,
            max_steps=steps,
            save_strategy="steps",
            save_steps=2,
            logging_strategy="steps",
            logging_steps=1,
            restore_callback_states_from_checkpoint=restore,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.state.log_history[:4], regularizer

    straight, _ = train(tmp_path / "straight", vilt())
    train(tmp_path / "broken", vilt(), steps=2)
    resumed, regularizer = train(tmp_path / "broken", vilt(), str(tmp_path / "broken/checkpoint-2"))
    for before, after in zip(straight, resumed, strict=True):
        for key in ("loss", "congruence_loss", "congruence_weight"):
            assert after[key] == pytest.approx(before[key], abs=1e-6)
    assert [log["congruence_weight"] for log in resumed] == [exponential_warmup(4)(step) for step in range(4)]
    assert regularizer.step == 4


def test_a_checkpoint_without_the_callback_gives_trainers_step(tmp_path):
    model = vilt()
    regularized("vilt", model)
    trainer_for(model, vilt_batch(), tmp_path, save_strategy="steps", save_steps=1, max_steps=2).train()
    model = vilt()
    regularizer = regularized("vilt", model)
    trainer = trainer_for(model, vilt_batch(), tmp_path, callbacks=[huggingface.CongruenceCallback()])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert regularizer.last.weight == schedule(2)


@pytest.mark.parametrize(
    ("world", "averaged", "tensor_parallel", "expected"),
    [(1, True, None, 4), (4, True, None, 16), (4, False, None, 4), (4, True, 2, 8)],
)
def test_the_callback_counts_micro_batches_of_all_processes_with_other_data(world, averaged, tensor_parallel, expected):
    """What Trainer adds num_items_in_batch up over, and multiplies the loss by: not those that share a sample."""
    model = vilt()
    model._tp_size = tensor_parallel
    regularizer = regularized("vilt", model)
    args = SimpleNamespace(gradient_accumulation_steps=4, world_size=world, average_tokens_across_devices=averaged)
    huggingface.CongruenceCallback(regularizer).on_step_begin(args, None, None, train_dataloader=iter([]), model=model)
    assert regularizer.micro_batches == expected


def test_the_callback_counts_steps_of_optimizers_that_no_hook_sees():
    """DeepSpeed's: Trainer says when they stepped, and its scaler when they did not."""
    model = vilt().train()
    regularizer = regularized("vilt", model)
    callback = huggingface.CongruenceCallback(regularizer)
    for skipped, step in ((False, 1), (True, 1), (False, 2)):
        model(**vilt_batch())
        callback.on_step_end(None, None, None, optimizer=SimpleNamespace(step_was_skipped=skipped))
        assert regularizer.step == step


@pytest.mark.parametrize("count", [0, 2])
def test_the_callback_wants_one_regularizer(count, tmp_path):
    model = vilt()
    for _ in range(count):
        regularized("vilt", model)
    trainer = trainer_for(model, vilt_batch(), tmp_path, callbacks=[huggingface.CongruenceCallback()])
    with pytest.raises(ValueError, match=f"ViltForQuestionAnswering has {count} open regularizers"):
        trainer.train()


# -- Accelerate -------------------------------------------------------------------------------------------------------


def accelerated(
    name: str, micro: int, accumulate: int, precision: str = "no", checkpointing: bool = False
) -> tuple[nn.Module, Regularizer]:
    model, batch = MODELS[name][0]().train(), MODELS[name][1]()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    regularizer = regularized(name, model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(rows(batch), batch_size=micro)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(STEPS):
        for part in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**part).loss)
                optimizer.step()
                optimizer.zero_grad()
    return model, regularizer


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=SLOW)])
@every_size
def test_accelerate(accumulate, micro, checkpointing):
    model, regularizer = accelerated("vilt", micro, accumulate, checkpointing=checkpointing)
    assert furthest(weights(model), by_hand("vilt", whole("vilt"))) < CLOSE
    assert regularizer.step == STEPS


@pytest.mark.slow
def test_accelerate_in_half_precision():
    model, _ = accelerated("vilt", 2, 4, "bf16")
    final = by_hand("vilt", [micro_batches(vilt_batch(), 4)] * STEPS, autocast=True)
    assert furthest(weights(model), final) < CLOSE


def test_accelerate_keeps_the_step_in_checkpoints(tmp_path):
    def start() -> tuple[Accelerator, nn.Module, torch.optim.Optimizer, Regularizer]:
        model = vilt().train()
        regularizer = regularized("vilt", model)
        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
        accelerator.register_for_checkpointing(regularizer)
        return accelerator, wrapped, optimizer, regularizer

    accelerator, model, optimizer, _ = start()
    batch, losses = vilt_batch(), []
    for step in range(4):
        if step == 2:
            accelerator.save_state(str(tmp_path))
        loss = model(**batch).loss
        losses.append(float(loss))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator, model, optimizer, regularizer = start()
    accelerator.load_state(str(tmp_path))
    assert regularizer.step == 2
    assert float(model(**batch).loss) == pytest.approx(losses[2], abs=1e-6)


# -- Lightning --------------------------------------------------------------------------------------------------------


class Lit(pl.LightningModule):
    """`own`: the loss is computed in training_step, from logits; otherwise the network inside returns it."""

    def __init__(self, own: bool = False, name: str = "vilt") -> None:
        super().__init__()
        self.net, self.own = MODELS[name][0](), own

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | dict:
        if not self.own:
            return self.net(**batch).loss
        labels = batch["labels"]
        logits = self.net(**{key: value for key, value in batch.items() if key != "labels"}).logits
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels) * labels.shape[1], "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class Losses(pl.Callback):
    """What training_step returned, and what was logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        self.logged.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def fit(
    module: Lit,
    folder: object,
    *,
    micro: int = 8,
    accumulate: int = 1,
    batch: Batch | None = None,
    resume: str | None = None,
    **options: object,
) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        **{
            "max_epochs": STEPS,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            **options,
        },
    )
    trainer.fit(module, DataLoader(rows(batch or vilt_batch()), batch_size=micro), ckpt_path=resume)
    return trainer


@every_size
@pytest.mark.parametrize("what", ["network", "module", "training_step"])
def test_lightning(accumulate, micro, what, tmp_path):
    module = Lit(own=what != "network").train()
    regularizer = regularized("vilt", module.net if what == "network" else module)
    fit(module, tmp_path, micro=micro, accumulate=accumulate)
    assert furthest(weights(module), by_hand("vilt", whole("vilt"))) < CLOSE
    assert regularizer.step == STEPS


@pytest.mark.slow
def test_lightning_with_checkpointing(tmp_path):
    module = Lit(own=True).train()
    module.net.gradient_checkpointing_enable({"use_reentrant": False})
    regularized("vilt", module)
    fit(module, tmp_path, micro=2, accumulate=4)
    assert furthest(weights(module), by_hand("vilt", whole("vilt"))) < CLOSE


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_lightning_in_half_precision(own, tmp_path):
    module = Lit(own).train()
    regularized("vilt", module if own else module.net)
    fit(module, tmp_path, micro=2, accumulate=4, precision="bf16-mixed")
    final = by_hand("vilt", [micro_batches(vilt_batch(), 4)] * STEPS, autocast=True)
    assert furthest(weights(module), final) < CLOSE


def test_lightning_resumes_with_the_same_losses_and_logs_them(tmp_path):
    def train(epochs: int, resume: str | None = None) -> tuple[Losses, pl.Trainer]:
        module = Lit().train()
        regularized("vilt", module.net)
        seen = Losses()
        callbacks = [lightning.CongruenceCallback(), seen]
        trainer = fit(module, tmp_path, max_epochs=epochs, resume=resume, callbacks=callbacks)
        return seen, trainer

    straight, _ = train(4)
    _, trainer = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, _ = train(4, str(tmp_path / "two.ckpt"))
    assert resumed.losses == pytest.approx(straight.losses[2:], abs=1e-6)
    assert [log["congruence_weight"] for log in straight.logged] == [3.0, 5.0, 7.0, 9.0]
    assert [log["congruence_weight"] for log in resumed.logged] == [7.0, 9.0]
    assert straight.logged[0]["congruence_loss"] > 0.01


def test_lightning_may_skip_a_step_and_may_not_optimize_by_hand(tmp_path):
    class Skips(Lit):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

    module = Skips().train()
    regularizer = regularized("vilt", module)
    fit(module, tmp_path, micro=4, max_epochs=1)
    assert regularizer.step == 1

    module = Lit().train()
    module.automatic_optimization = False
    regularized("vilt", module)
    with pytest.raises(RuntimeError, match="optimizes by hand"):
        fit(module, tmp_path)
