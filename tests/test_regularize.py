"""regularize: what it adds and to what, when it is inert, how it counts steps, and how it fails."""

import collections
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import sys
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import SequenceClassifierOutput

from attncongruence import CACRLoss, IAISLoss, TokenLayout, cacr_loss, capture_attention, linear_warmup, regularize
from attncongruence.training.share import share_of
from attncongruence.training.steps import listeners
from tests.helpers.models import Attention, Stack, hook_count

TEXT, LENGTH, SAMPLES = 4, 9, 4
Pair = collections.namedtuple("Pair", ["loss", "logits"])
Shuffled = collections.namedtuple("Shuffled", ["logits", "loss"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor
    logits: Tensor


class Thing:
    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


FORMS = {
    "ModelOutput": lambda loss, logits: SequenceClassifierOutput(loss=loss, logits=logits),
    "dict": lambda loss, logits: {"logits": logits, "loss": loss},
    "tuple": lambda loss, logits: (loss, logits),
    "list": lambda loss, logits: [loss, logits],
    "namedtuple": Pair,
    "namedtuple with the loss elsewhere": lambda loss, logits: Shuffled(logits, loss),
    "namedtuple without the name": lambda loss, logits: collections.namedtuple("Out", ["a", "b"])(loss, logits),
    "dataclass": Frozen,
    "object": Thing,
    "tensor": lambda loss, logits: loss,
    "one number in a vector": lambda loss, logits: (loss[None], logits),
}


class Model(nn.Module):
    """Two attention layers and a main loss; `outputs` are all it ever returned."""

    def __init__(self, form: object = "dict", layers: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack, self.head = Stack(layers), nn.Linear(16, 1)
        self.form, self.checkpointed, self.trouble = form, checkpointed, None

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: object) -> object:
        for layer in self.stack.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        logits = self.head(x.mean(1))
        if self.trouble is not None:
            raise self.trouble
        loss = (logits.square() if labels is None else (logits - labels).square()).mean()
        return FORMS[self.form](loss, logits)


@pytest.fixture(autouse=True)
def _no_one_listens():
    """Regularizers live as long as their models, and those until they are collected."""
    yield
    for listener in list(listeners.all):
        listener.close()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SAMPLES, LENGTH, 16, generator=torch.Generator().manual_seed(1))


def loss_of(output: object) -> Tensor:
    if isinstance(output, dict):
        return output["loss"]
    if hasattr(output, "loss"):
        return output.loss
    return output if isinstance(output, Tensor) else output[0]


def logits_of(output: object) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output.logits if hasattr(output, "logits") else output[1]


def parts(x: Tensor, model: nn.Module | None = None, layers: object = -1, **options: object) -> tuple[Tensor, Tensor]:
    """Main and congruence loss of an untouched model, by hand."""
    model = Model().train() if model is None else model
    with capture_attention(model, layers) as capture:
        main = loss_of(model(x))
        losses = [cacr_loss(record, TEXT, **options) for record in capture.pop_all()]
    return main, torch.stack(losses).mean()


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, model.parameters()))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    for batch in batches:
        loss_of(model(batch)).backward()
    optimizer.step()
    optimizer.zero_grad()


# -- what is added ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_added_wherever_the_model_returns_one(form, x):
    main, congruence = parts(x)
    model = Model(form)
    own: list[object] = []
    model.register_forward_hook(lambda module, args, output: own.append(output))
    with regularize(model, CACRLoss(), n_text=TEXT, weight=0.5) as regularizer:
        output = model(x)
    torch.testing.assert_close(loss_of(output).squeeze(), main + 0.5 * congruence)
    torch.testing.assert_close(loss_of(own[0]).squeeze(), main)  # the model's own object is as it was
    assert type(output) is type(own[0])
    assert loss_of(output).shape == loss_of(own[0]).shape
    if form != "tensor":
        assert logits_of(output) is logits_of(own[0])
    last = regularizer.last
    torch.testing.assert_close((last.main.squeeze(), last.congruence), (main.detach(), congruence.detach()))
    assert (last.weight, last.step, last.share) == (0.5, 0, 1.0)
    assert not last.main.requires_grad
    assert not last.congruence.requires_grad


def test_gradient_equals_the_sum_by_hand(x):
    model = Model()
    main, congruence = parts(x, model)
    expected = gradients(main + 3.0 * congruence, model)
    with regularize(model, CACRLoss(), n_text=TEXT, weight=3.0):
        torch.testing.assert_close(gradients(model(x)["loss"], model), expected)
    plain = gradients(parts(x, model)[0], model)
    assert (plain[2] - expected[2]).abs().max() > 1e-5  # the last layer's queries and keys


def test_half_precision_losses_keep_their_dtype(x):
    model = Model().to(torch.bfloat16)
    with regularize(model, CACRLoss(), n_text=TEXT, weight=3.0) as regularizer:
        loss = model(x.bfloat16())["loss"]
        loss.backward()
    assert loss.dtype == torch.bfloat16
    assert regularizer.last.congruence.dtype == torch.float32


def test_checkpointing_inside_the_model_changes_nothing(x):
    main, congruence = parts(x)
    plain = Model()
    with regularize(plain, CACRLoss(), n_text=TEXT):
        expected = gradients(plain(x)["loss"], plain)
    model = Model(checkpointed=True)
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        loss = model(x)["loss"]
        torch.testing.assert_close(gradients(loss, model), expected)
        torch.testing.assert_close(loss, main + congruence)
        assert regularizer._capture._records == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_whole_model_is_an_error(reentrant, x):
    model = Model("tensor")
    regularize(model, CACRLoss(), n_text=TEXT)
    loss = checkpoint(model, x.requires_grad_(), use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match=r"whole regularised model runs inside torch\.utils\.checkpoint"):
        loss.backward()


def test_several_layers_are_averaged(x):
    main, congruence = parts(x, layers=[0, 1])
    single = [parts(x, layers=layer)[1] for layer in (0, 1)]
    torch.testing.assert_close(congruence, (single[0] + single[1]) / 2)
    assert (single[0] - single[1]).abs() > 1e-5
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT, layers=["stack.layers.0", "stack.layers.1"]):
        torch.testing.assert_close(model(x)["loss"], main + congruence)


def test_any_function_is_a_loss(x):
    model = Model()
    main, congruence = parts(x, model, direction="language")
    with regularize(model, functools.partial(cacr_loss, direction="language"), n_text=TEXT):
        torch.testing.assert_close(model(x)["loss"], main + congruence)
    with regularize(model, lambda captured, n_text: captured.scores[:, :, :n_text].mean(), n_text=TEXT) as regularizer:
        model(x)
    with capture_attention(model) as capture:
        model(x)
        torch.testing.assert_close(regularizer.last.congruence, capture.pop().scores[:, :, :TEXT].mean())


def test_two_regularizers_add_up(x):
    main, congruence = parts(x)
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT), regularize(model, IAISLoss(), n_text=TEXT) as second:
        loss = model(x)["loss"]
    torch.testing.assert_close(second.last.main, main + congruence)
    torch.testing.assert_close(loss, main + congruence + second.last.congruence)


# -- where text is, which samples count -------------------------------------------------------------------------------

LAYOUT = TokenLayout.from_n_text(torch.tensor([4, 3, 2, 5]), LENGTH)
LAYOUTS = {
    "a layout": (LAYOUT, LAYOUT),
    "a function to a layout": (lambda batch: LAYOUT, LAYOUT),
    "a function to a tensor": (lambda batch: batch["n"], torch.tensor([4, 3, 2, 5])),
    "a function to an int": (lambda batch: batch["x"].shape[1] // 3, 3),
    "a function that wants the record": (lambda batch, captured: captured.lengths[0] - 4, 5),
    "a partial": (functools.partial(lambda offset, batch, captured=None: captured.lengths[0] - offset, 6), 3),
}


@pytest.mark.parametrize("given", LAYOUTS)
def test_layouts(given, x):
    layout, expected = LAYOUTS[given]
    model = Model()
    with capture_attention(model) as capture:
        model(x)
        congruence = cacr_loss(capture.pop(), expected)
    with regularize(model, CACRLoss(), layout=layout) as regularizer:
        model(x, n=torch.tensor([4, 3, 2, 5]))
    torch.testing.assert_close(regularizer.last.congruence, congruence.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, y: model(x, y),
        lambda model, x, y: model(x, labels=y),
        lambda model, x, y: model(labels=y, x=x),
    ],
)
def test_the_batch_is_what_the_model_was_called_with_by_name(call, x):
    model, seen, labels = Model(), [], torch.ones(SAMPLES, 1)
    with regularize(model, CACRLoss(), layout=lambda batch: seen.append(batch) or TEXT):
        call(model, x, labels)
    assert sorted(seen[0]) == ["labels", "x"]
    assert seen[0]["x"] is x
    assert seen[0]["labels"] is labels


def test_a_batch_handed_over_whole_is_looked_into(x):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def forward(self, batch: dict, scale: float) -> Tensor:
            return scale * self.model(**batch)["loss"]

    model = Whole()
    with regularize(model, CACRLoss(), layout=lambda batch: batch["n"]) as regularizer:
        model({"x": x, "n": torch.full((SAMPLES,), TEXT)}, 2.0)
    torch.testing.assert_close(regularizer.last.congruence, parts(x)[1].detach())


POSITIVES = {
    "mask": torch.tensor([True, False, True, False]),
    "list of bool": [True, False, True, False],
    "index": torch.tensor([0, 2]),
    "index from the end": torch.tensor([0, -2]),
    "list": [2, 0],
    "function": lambda batch: batch["labels"][:, 0] == 1,
}


@pytest.mark.parametrize("which", POSITIVES)
@pytest.mark.parametrize("layout", [TEXT, LAYOUT, "tensor"])
def test_negatives_are_left_out(which, layout, x):
    model, labels = Model(), torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    lengths = torch.tensor([4, 3, 2, 5])
    everywhere = lengths if layout == "tensor" else layout
    with capture_attention(model) as capture:
        model(x, labels)
        some = everywhere if isinstance(everywhere, int) else everywhere[torch.tensor([0, 2])]
        congruence = cacr_loss(capture.pop()[[0, 2]], some)
    with regularize(model, CACRLoss(), layout=lambda batch: everywhere, positives=POSITIVES[which]) as regularizer:
        model(x, labels)
    torch.testing.assert_close(regularizer.last.congruence, congruence.detach())
    with regularize(model, CACRLoss(), layout=lambda batch: everywhere) as regularizer:
        model(x, labels)
    assert (regularizer.last.congruence - congruence).abs() > 1e-5


@pytest.mark.parametrize("none", [torch.zeros(SAMPLES, dtype=torch.bool), [], torch.tensor([], dtype=torch.long)])
@pytest.mark.parametrize("loss", [CACRLoss(), IAISLoss()])
@pytest.mark.parametrize("layout", [TEXT, LAYOUT])
def test_a_batch_of_negatives_adds_exactly_zero_with_a_graph(none, loss, layout, x):
    model = Model()
    expected = gradients(model(x)["loss"], model)
    seen: list[Tensor] = []

    def watched(captured: object, n_text: object) -> Tensor:
        seen.append(loss(captured, n_text))
        return seen[-1]

    with regularize(model, watched, layout=lambda batch: layout, positives=none) as regularizer:
        ours = gradients(model(x)["loss"], model)
    assert regularizer.last.congruence == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert seen[0].requires_grad  # DDP waits for every parameter


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (torch.tensor([True, False]), r"mask of shape \(2,\), and the batch has 4 samples"),
        (torch.tensor([1, 0, 1, 0]), r"positives=\[1, 0, 1, 0\] .* positives == 1"),
        (torch.tensor([0, 4]), "must name samples 0 to 3 once each"),
        (torch.tensor([0, -4]), "must name samples 0 to 3 once each"),
        (torch.tensor([1.0, 0.0]), "bool mask or a list of indices"),
        (torch.tensor([[1], [0]]), "bool mask or a list of indices"),
    ],
)
def test_positives_that_do_not_fit(positives, message, x):
    model = Model()
    with regularize(model, CACRLoss(), n_text=TEXT, positives=positives), pytest.raises(ValueError, match=message):
        model(x)


@pytest.mark.parametrize("mask", ["real", lambda batch: batch["real"]])
@pytest.mark.parametrize("positives", [None, [1, 3]])
def test_masks(mask, positives, x):
    model = Model()
    real = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    real[1, 2:4] = 0
    with capture_attention(model) as capture:
        model(x)
        picked = slice(None) if positives is None else torch.tensor(positives)
        congruence = cacr_loss(capture.pop()[picked], TEXT, mask=real[picked])
    with regularize(model, CACRLoss(), n_text=TEXT, mask=mask, positives=positives) as regularizer:
        model(x, real=real)
    torch.testing.assert_close(regularizer.last.congruence, congruence.detach())


def test_a_mask_that_is_not_there(x):
    model = Model()
    with (
        regularize(model, CACRLoss(), n_text=TEXT, mask="attention_mask"),
        pytest.raises(ValueError, match=r"mask='attention_mask' names no entry of the batch: .*\['x'\]"),
    ):
        model(x)


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
def test_copies_of_a_regularised_model_are_inert(way, x):
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


def test_the_weight_follows_optimiser_steps_and_not_forward_passes(x):
    model, seen = Model(), []
    with regularize(model, CACRLoss(), n_text=TEXT, weight=lambda step: seen.append(step) or 1.0 * step) as regularizer:
        optimizer = sgd(model)
        train_step(model, optimizer, x)
        train_step(model, optimizer, *x.chunk(4))
        train_step(model, optimizer, *x.chunk(2))
    assert seen == [0, 1, 1, 1, 1, 2, 2]
    assert regularizer.last.weight == 2.0
    assert regularizer.step == 3


def test_optimisers_of_other_models_do_not_count(x):
    model, other = Model(), Model()
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        model(x)
        train_step(other, sgd(other), x)
        assert regularizer.step == 0


def test_two_optimisers_of_one_model_make_one_step(x):
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


def test_count_step_for_optimisers_that_nobody_sees(x):
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


def test_a_resumed_optimiser_with_a_schedule_that_starts_anew_is_told(x):
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        train_step(model, optimizer, x)
    regularize(model, CACRLoss(), n_text=TEXT, weight=linear_warmup(4))
    with pytest.warns(UserWarning, match="made 4 steps and the regularizer counts 1: was the run resumed"):
        train_step(model, optimizer, x)


@pytest.mark.parametrize("how", ["part", "eval"])
def test_a_step_on_a_model_that_was_never_regularised_is_an_error(how, x):
    model = Model()
    regularize(model, CACRLoss(), n_text=TEXT)
    optimizer = sgd(model)
    if how == "part":
        model.stack(x).mean().backward()
        message = "came through here.*regularize what the training loop calls"
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
@pytest.mark.parametrize("layers", [-1, "stack.layers.1"])
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
def test_a_compiled_optimiser_counts_and_compiles_no_more_than_before(x):
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


# -- num_items_in_batch -----------------------------------------------------------------------------------------------

TOKENS = torch.tensor([[-100, 4, 5, -100], [3, 4, -100, -100]])


@pytest.mark.parametrize(
    ("batch", "micro_batches", "share"),
    [
        ({}, None, 1.0),
        ({}, 4, 1.0),
        ({"num_items_in_batch": None}, 4, 1.0),
        ({"num_items_in_batch": 8, "labels": torch.tensor([0, 1, 1])}, None, 3 / 8),
        ({"num_items_in_batch": torch.tensor(8), "labels": torch.tensor([0, 1, -100])}, 4, 2 / 8),
        ({"num_items_in_batch": 24, "labels": torch.zeros(2, 3)}, None, 6 / 24),
        ({"num_items_in_batch": 20, "labels": TOKENS}, 4, 1 / 4),
        ({"num_items_in_batch": 20}, 4, 1 / 4),
        ({"num_items_in_batch": 4, "labels": TOKENS}, None, None),  # nobody says that this is the whole step
        ({"num_items_in_batch": 4}, None, None),
    ],
)
def test_shares(batch, micro_batches, share, monkeypatch):
    monkeypatch.delitem(sys.modules, "accelerate.state", raising=False)  # what an Accelerator of another test left
    assert share_of(batch, micro_batches) == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(("items", "share"), [(4, 1.0), (3, 1.0), (5, None)])
def test_a_step_of_one_micro_batch_is_known_from_accelerate(items, share):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        state = Accelerator(cpu=True).gradient_state
        batch = {"num_items_in_batch": torch.tensor(items), "labels": TOKENS}
        assert share_of(batch, None) == share  # all labels, or those that a causal model predicts
        state._set_sync_gradients(False)
        assert share_of(batch, None) is None
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def test_micro_batches_of_a_loop_of_ones_own(x):
    model = Model()
    labels = torch.full((1, LENGTH), 2)
    with regularize(model, CACRLoss(), n_text=TEXT, weight=2.0) as regularizer:
        with pytest.raises(RuntimeError, match=r"regularizer\.micro_batches"):
            model(x, labels=labels, num_items_in_batch=36)
        regularizer.micro_batches = 4
        loss = model(x, labels=labels[:, :1], num_items_in_batch=36)["loss"]
        last = regularizer.last
        torch.testing.assert_close(loss.detach(), last.main + 0.25 * 2.0 * last.congruence)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (lambda logits: {"logits": logits}, "dict with logits"),
        (lambda logits: {"logits": logits, "loss": None}, "dict with logits, loss"),
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: logits, r"a tensor of shape \(4, 1\)"),
        (lambda logits: None, "None"),
        (lambda logits: (), "a tuple"),
        (lambda logits: SequenceClassifierOutput(logits=logits), "SequenceClassifierOutput with logits"),
        (lambda logits: torch.tensor(3), r"a tensor of shape \(\)"),
    ],
)
def test_a_model_without_a_loss(output, what, x, monkeypatch):
    monkeypatch.setitem(FORMS, "none", lambda loss, logits: output(logits))
    model = Model("none")
    with regularize(model, CACRLoss(), n_text=TEXT) as regularizer:
        with pytest.raises(ValueError, match=rf"Model ran in training mode and returned no loss \({what}\).*labels"):
            model(x)
        model.eval()
        model(x)
        assert regularizer.last is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither n_text nor layout: give n_text"),
        ({"n_text": 4, "layout": LAYOUT}, "both n_text and layout: give n_text"),
        ({"n_text": lambda batch: 4}, "n_text is a function: pass it as layout="),
        ({"n_text": 4, "weight": -0.1}, "weight=-0.1 must be >= 0"),
        ({"n_text": 4, "weight": float("nan")}, "weight=nan must be >= 0"),
        ({"n_text": 4, "layers": "nothing"}, "no module is called 'nothing'"),
    ],
)
def test_rejects(options, message):
    hooks = len(_global_optimizer_post_hooks)
    model = Model()
    with pytest.raises(ValueError, match=message):
        regularize(model, CACRLoss(), **options)
    assert hook_count(model) == 0
    assert "forward" not in vars(model)
    assert len(_global_optimizer_post_hooks) == hooks


def test_a_loss_of_each_sample_is_refused(x):
    model = Model()
    with (
        regularize(model, CACRLoss(reduction="none"), n_text=TEXT),
        pytest.raises(ValueError, match=r"the loss has shape \(4,\): it must be one number"),
    ):
        model(x)


def test_frozen_attention_is_refused(x):
    model = Model()
    model.stack.requires_grad_(False)
    with regularize(model, CACRLoss(), n_text=TEXT), pytest.raises(RuntimeError, match="captured without gradient"):
        model(x)


def test_repr_says_what_and_how_far():
    with regularize(Model(), CACRLoss(direction="language"), n_text=TEXT) as regularizer:
        assert repr(regularizer).startswith("Regularizer(Model, CACRLoss(direction='language'")
        assert repr(regularizer).endswith("step=0)")


def test_a_layer_that_runs_several_times_is_laid_out_each_time():
    class Twice(nn.Module):
        """Two images, one after the other, as for NLVR2: the second pass is longer."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.attention(x[:, :6]).square().mean() + self.attention(x).square().mean()}

    model, x, asked = Twice(), torch.randn(3, LENGTH, 16), []

    def layout(batch, captured):
        asked.append(captured.lengths[0])
        return captured.lengths[0] - 3

    with regularize(model, CACRLoss(), layout=layout, layers="attention") as regularizer:
        model(x)
        with capture_attention(model, "attention") as capture:
            model(x)
            first, second = capture.pop_all()
    assert asked == [6, LENGTH] * 2
    expected = (cacr_loss(first, 3) + cacr_loss(second, LENGTH - 3)) / 2
    torch.testing.assert_close(regularizer.last.congruence, expected)
