"""regularize in a training run: when it is inert, how it counts steps, wrappers and compiled models."""

import copy
import functools
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.optimizer import _global_optimizer_post_hooks

from attncongruence import CACRLoss, cacr_loss, capture_attention, linear_warmup, regularize
from tests.helpers.models import Attention, hook_count
from tests.helpers.regularizing import (
    TEXT,
    Model,
    close_all_regularizers,  # noqa: F401
    gradients,
    hidden_states,  # noqa: F401
    parts,
    sgd,
    train_step,
)

# -- inert ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "closed"])
def test_inert_outside_of_training(how, x):
    model = Model()
    expected = model(x)["loss"].detach()
    regularizer = regularize(model, CACRLoss(), n_text=TEXT)
    if how == "eval":
        model.eval()
    if how == "closed":
        regularizer.close()
    guards = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    with guards.get(how, torch.enable_grad)():
        for _ in range(3):
            assert torch.equal(model(x)["loss"], expected)
            assert model.forward(x)["loss"] == expected
    assert regularizer.last is None
    assert regularizer._capture._records == []
    regularizer.close()


def test_validation_between_training_steps(x):
    main, congruence = parts(x)
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        optimizer = sgd(model, lr=0.0)
        for _ in range(3):
            model.train()
            train_step(model, optimizer, x)
            model.eval()
            model(x[:1])
            with torch.no_grad():
                model(x[:2])
        assert regularizer.step == 3
        torch.testing.assert_close(regularizer.last.congruence, congruence.detach())
        torch.testing.assert_close(regularizer.last.main, main.detach())


def test_after_close_the_model_is_as_it_was_found(x):
    hooks = len(_global_optimizer_post_hooks)
    model = Model()
    train_step(model, sgd(model), x)
    before = pickle.dumps(model)
    regularizer = regularize(model, CACRLoss(), n_text=TEXT)
    assert hook_count(model) > 0
    assert len(_global_optimizer_post_hooks) == hooks + 1
    model(x)
    model.eval()
    model(x)
    model.train()
    regularizer.close()
    regularizer.close()
    assert pickle.dumps(model) == before
    assert hook_count(model) == 0
    assert "forward" not in vars(model)
    assert len(_global_optimizer_post_hooks) == hooks


def test_close_leaves_what_others_put_on_top(x):
    model = Model()
    regularizer = regularize(model, CACRLoss(), n_text=TEXT)
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)  # as Accelerate does for mixed precision
    outer = model.forward
    assert model(x)["loss"] > regularizer.last.main
    regularizer.close()
    assert model.forward is outer
    torch.testing.assert_close(model(x)["loss"], parts(x)[0])
    torch.testing.assert_close(model.forward(x)["loss"], parts(x)[0])


def test_a_forward_that_others_put_there_before_stays(x):
    model = Model()
    theirs = functools.partial(Model.forward, model)
    model.forward = theirs
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        assert model(x)["loss"] > regularizer.last.main
        assert copy.deepcopy(model).forward(x)["loss"] == regularizer.last.main
    assert model.forward is theirs


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_regularized_model_are_inert(way, x):
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        twin = way(model)
        with torch.no_grad():
            twin.head.weight.zero_(), twin.head.bias.zero_()
        assert twin(x)["loss"] == 0
        assert twin.forward(x)["loss"] == 0
        assert regularizer.last is None
        assert model(x)["loss"] > 0
        assert regularizer.last is not None


def test_a_regularizer_is_not_copied():
    with regularize(Model(), CACRLoss(), n_text=TEXT) as regularizer:
        for way in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="neither copied nor pickled"):
                way(regularizer)


def test_it_lives_and_dies_with_the_model(x):
    main, congruence = parts(x)
    model = Model()
    reference = weakref.ref(regularize(model, CACRLoss(), n_text=TEXT))  # nobody keeps it
    gc.collect()
    torch.testing.assert_close(model(x)["loss"], main + congruence)
    other = Model()
    optimizer = sgd(other)
    del model
    gc.collect()
    assert reference() is None
    train_step(other, optimizer, x)


def test_an_error_in_forward_leaves_nothing_behind(x):
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        model.trouble = ValueError("mine")
        with pytest.raises(ValueError, match="mine"):
            model(x[:2])
        model.trouble = None
        model(x)
        torch.testing.assert_close(regularizer.last.congruence, parts(x)[1].detach())


# -- steps ------------------------------------------------------------------------------------------------------------


def test_the_weight_follows_optimizer_steps_and_not_forward_passes(x):
    model, seen = Model(), []
    with regularize(model, CACRLoss(), n_text=TEXT, weight=lambda step: seen.append(step) or 1.0 * step) as regularizer:
        optimizer = sgd(model)
        train_step(model, optimizer, x)
        train_step(model, optimizer, *x.chunk(4))
        train_step(model, optimizer, *x.chunk(2))
    assert seen == [0, 1, 1, 1, 1, 2, 2]
    assert regularizer.last.weight == 2.0
    assert regularizer.step == 3


def test_optimizers_of_other_models_do_not_count(x):
    model, other = Model(), Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        model(x)
        train_step(other, sgd(other), x)
        assert regularizer.step == 0


def test_two_optimizers_of_one_model_make_one_step(x):
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.stack, model.head)]
        for _ in range(3):
            model(x)["loss"].backward()
            for optimizer in optimizers:
                optimizer.step()
    assert regularizer.step == 3


def test_steps_that_a_gradient_scaler_skips_are_none(x):
    model = Model()
    scaler = torch.amp.GradScaler("cpu")
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        optimizer, counted = sgd(model, lr=0.0), []
        for number in range(3):
            loss = model(x)["loss"] * (torch.inf if number == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            counted.append(regularizer.step)
    assert counted == [1, 1, 2]


def test_count_step_for_optimizers_that_nobody_sees(x):
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        regularizer.count_step()
        assert regularizer.step == 0
        model(x)
        regularizer.count_step()
        assert regularizer.step == 1
        train_step(model, sgd(model), x)
        regularizer.count_step()  # seen already
        assert regularizer.step == 2


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_state_goes_on_where_it_was_saved(optimizer, x, recwarn):
    def run(model: nn.Module, regularizer: object, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(x)["loss"]
            losses.append(float(loss))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return losses

    def start() -> tuple:
        model = Model()
        regularizer = regularize(model, CACRLoss(), n_text=TEXT, weight=linear_warmup(4))
        return model, regularizer, optimizer(model.parameters(), lr=0.01)

    straight = run(*start(), 4)
    model, regularizer, first = start()
    run(model, regularizer, first, 2)
    saved = model.state_dict(), regularizer.state_dict(), first.state_dict()
    model, regularizer, second = start()
    for part, state in zip((model, regularizer, second), saved, strict=True):
        part.load_state_dict(state)
    assert regularizer.step == 2
    assert run(model, regularizer, second, 2) == straight[2:]
    assert [w for w in recwarn if "resumed" in str(w.message)] == []


def test_a_resumed_optimizer_with_a_schedule_that_starts_anew_is_told(x):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        train_step(model, optimizer, x)
    regularize(model, CACRLoss(), n_text=TEXT, weight=linear_warmup(4))
    with pytest.warns(UserWarning, match="made 4 steps and the regularizer counts 1, .*If the run was resumed"):
        train_step(model, optimizer, x)


@pytest.mark.parametrize("how", ["part", "eval"])
def test_a_step_on_a_model_that_was_never_regularized_is_an_error(how, x):
    model = Model()
    regularize(model, CACRLoss(), n_text=TEXT)
    optimizer = sgd(model)
    if how == "part":
        model.stack(x).mean().backward()
        message = "its hooks never ran. If the loop calls a part of it, regularize that"
    else:
        model.eval()
        model(x)["loss"].backward()
        message = r"eval mode only.*model.train\(\)"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


# -- wrappers ---------------------------------------------------------------------------------------------------------


class Tuner(nn.Module):
    """As PEFT's BaseTuner: goes past the hooks of the model inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.model.forward(*args, **kwargs)


@pytest.mark.parametrize("order", ["before", "after"])
def test_wrappers_that_call_forward_directly(order, x):
    main, congruence = parts(x)
    model = Model()
    if order == "before":
        regularizer, outer = regularize(model, CACRLoss(), n_text=TEXT), Tuner(Tuner(model))
    else:
        outer = Tuner(Tuner(model))
        regularizer = regularize(outer, CACRLoss(), n_text=TEXT)
    for _ in range(3):  # the first pass finds the layer
        torch.testing.assert_close(outer(x)["loss"], main + congruence)
    train_step(outer, sgd(outer), x)
    assert regularizer.step == 1
    called: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: called.append(module))
    with torch.no_grad():
        outer(x)  # validation goes past hooks as it did
    assert called == []
    outer.eval()
    assert torch.equal(outer(x)["loss"], outer.model.model(x)["loss"])


class InStep(nn.Module):
    """As a LightningModule: its own forward does not run. One layer attends twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Attention()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.layer(self.layer(batch["x"])).square().mean()


def test_a_layer_that_attends_twice_in_each_training_step(x):
    model = InStep()
    with capture_attention(model.layer) as capture:
        model.training_step({"x": x}, 0)
        second = cacr_loss(capture.pop_all()[1], TEXT)
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        for number in range(3):
            loss = model.training_step({"x": x}, number)
            torch.testing.assert_close(regularizer.last.congruence, second.detach())
            torch.testing.assert_close(loss, regularizer.last.main + second)
    assert "training_step" not in vars(model)


def test_forward_keeps_its_signature():
    model = Model()
    expected = inspect.signature(model.forward)
    with regularize(model, CACRLoss(), n_text=TEXT):
        assert inspect.signature(model.forward) == expected


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("layers", [-1, pytest.param("stack.layers.1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ["regularize first", "regularize the compiled model", "compile in place"])
def test_compiled_models_in_one_graph_compiled_once(layers, order, x):
    main, congruence = parts(x)
    model, counter = Model(), CompileCounterWithBackend("aot_eager")
    expected = gradients(sum(parts(x, model)), model)
    if order == "regularize first":
        regularizer = regularize(model, CACRLoss(), n_text=TEXT, layers=layers)
        compiled = torch.compile(model, backend=counter)
    elif order == "compile in place":
        model.compile(backend=counter)
        compiled, regularizer = model, regularize(model, CACRLoss(), n_text=TEXT, layers=layers)
    else:
        compiled = torch.compile(model, backend=counter)
        regularizer = regularize(compiled, CACRLoss(), n_text=TEXT, layers=layers)
    optimizer = sgd(model, lr=0.0)
    for _ in range(3):
        loss = compiled(x)["loss"]
        torch.testing.assert_close(loss, main + congruence)
        torch.testing.assert_close(gradients(loss, model), expected)
        optimizer.step()
    assert regularizer.step == 3
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    regularizer.close()
    torch.testing.assert_close(compiled(x)["loss"], main)


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_optimizer_counts_and_compiles_no_more_than_before(x):
    def train() -> None:
        optimizer = sgd(model)
        step = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            model(x)["loss"].backward()
            step()

    model, frames = Model(), counters["frames"]
    train()
    plain = frames["total"]
    torch._dynamo.reset()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        train()
    assert regularizer.step == 3
    assert frames["total"] == 2 * plain > 0


@pytest.mark.usefixtures("_fresh_compiler")
def test_after_the_first_compiled_run_it_says_so(x):
    model = Model()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    regularize(compiled, CACRLoss(), n_text=TEXT, layers="stack.layers.1")
    with pytest.raises(RuntimeError, match="before the first compiled run"):
        compiled(x)
