"""regularize: what it adds and to what, which samples count, and how it fails."""

import copy
import functools
import sys
import types

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

from attncongruence import CACRLoss, IAISLoss, TokenLayout, cacr_loss, capture_attention, regularize
from attncongruence.training.term import share_of
from tests.helpers.models import Attention, hook_count
from tests.helpers.regularizing import (
    EACH_FORM,
    FORMS,
    LENGTH,
    SAMPLES,
    TEXT,
    Model,
    close_all_regularizers,  # noqa: F401
    gradients,
    hidden_states,  # noqa: F401
    logits_of,
    loss_of,
    model_output,
    needs_transformers,
    parts,
)

# -- what is added ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", EACH_FORM)
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
    with pytest.raises(RuntimeError, match=r"whole regularized model runs inside torch\.utils\.checkpoint"):
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
    "an int": (3, 3),
    "a tensor": (torch.tensor([4, 3, 2, 5]), torch.tensor([4, 3, 2, 5])),
    "a function to a layout": (lambda batch, captured: LAYOUT, LAYOUT),
    "a function to a tensor": (lambda batch, captured: batch["n"], torch.tensor([4, 3, 2, 5])),
    "a function to an int": (lambda batch, captured: batch["x"].shape[1] // 3, 3),
    "a function that uses the captured layer": (lambda batch, captured: captured.lengths[0] - 4, 5),
    "a function with names of its own": (lambda inputs, layer: layer.lengths[0] - inputs["x"].shape[1] + 5, 5),
    "a function of any arguments": (lambda *args: args[1].lengths[0] - 4, 5),
    "a partial": (functools.partial(lambda offset, batch, captured=None: captured.lengths[0] - offset, 6), 3),
}


@pytest.mark.parametrize("given", LAYOUTS)
def test_where_text_is(given, x):
    n_text, expected = LAYOUTS[given]
    model = Model()
    with capture_attention(model) as capture:
        model(x)
        congruence = cacr_loss(capture.pop(), expected)
    with regularize(model, CACRLoss(), n_text=n_text) as regularizer:
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
    with regularize(model, CACRLoss(), n_text=lambda batch, captured: seen.append(batch) or TEXT):
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
    with regularize(model, CACRLoss(), n_text=lambda batch, captured: batch["n"]) as regularizer:
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
    with regularize(model, CACRLoss(), everywhere, positives=POSITIVES[which]) as regularizer:
        model(x, labels)
    torch.testing.assert_close(regularizer.last.congruence, congruence.detach())
    with regularize(model, CACRLoss(), lambda batch, captured: everywhere) as regularizer:
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

    with regularize(model, watched, lambda batch, captured: layout, positives=none) as regularizer:
        ours = gradients(model(x)["loss"], model)
    assert regularizer.last.congruence == 0
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert seen[0].requires_grad  # DDP waits for every parameter


@pytest.mark.parametrize(
    ("positives", "message"),
    [
        (torch.tensor([True, False]), r"mask of shape \(2,\), and the batch has 4 samples"),
        (torch.tensor([1, 0, 1, 0]), r"positives=\[1, 0, 1, 0\] .* pass a bool mask such as positives == 1"),
        ([0, 1, 1, 0], r"positives=\[0, 1, 1, 0\] may be labels or indices"),
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


@pytest.mark.parametrize("labels", [[0], [1], [0, 0], [0, 1], [1, 0], [1, 1]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_zeros_and_ones_of_a_small_batch_are_not_taken_for_indices(labels, dtype, x):
    model, batch = Model(), x[: len(labels)]
    for positives in (labels, torch.tensor(labels, dtype=dtype), lambda batch: torch.tensor(labels, dtype=dtype)):
        with regularize(model, CACRLoss(), n_text=TEXT, positives=positives) as regularizer:
            with pytest.raises(ValueError, match=r"may be labels or indices: pass a bool mask such as positives == 1"):
                model(batch)
            assert regularizer.last is None
    with regularize(model, CACRLoss(), n_text=TEXT, positives=torch.tensor(labels) == 1):
        model(batch)


@pytest.mark.parametrize("mask", ["token_mask", lambda batch: batch["token_mask"]])
@pytest.mark.parametrize("positives", [None, [1, 3]])
def test_masks(mask, positives, x):
    model = Model()
    token_mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
    token_mask[1, 2:4] = 0
    with capture_attention(model) as capture:
        model(x)
        picked = slice(None) if positives is None else torch.tensor(positives)
        congruence = cacr_loss(capture.pop()[picked], TEXT, mask=token_mask[picked])
    with regularize(model, CACRLoss(), n_text=TEXT, mask=mask, positives=positives) as regularizer:
        model(x, token_mask=token_mask)
    torch.testing.assert_close(regularizer.last.congruence, congruence.detach())


def test_a_mask_that_is_not_there(x):
    model = Model()
    with (
        regularize(model, CACRLoss(), n_text=TEXT, mask="attention_mask"),
        pytest.raises(ValueError, match=r"mask='attention_mask' is not in the batch: .*\['x'\]"),
    ):
        model(x)


def test_functions_of_the_batch_are_called_for_each_layer_or_once(x):
    called = []
    with regularize(
        model := Model(),
        CACRLoss(),
        n_text=lambda batch, captured: called.append(captured.layer) or TEXT,
        layers=["stack.layers.0", "stack.layers.1"],
        positives=lambda batch: called.append("positives") or [0, 2],
        mask=lambda batch: called.append("mask") or torch.ones(SAMPLES, LENGTH).bool(),
    ):
        model(x)
    assert called == ["positives", "mask", "stack.layers.0", "stack.layers.1"]


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
    if share is None:
        with pytest.raises(RuntimeError, match="how many micro-batches share the optimizer step"):
            share_of(batch, micro_batches)
    else:
        assert share_of(batch, micro_batches) == pytest.approx(share)


@pytest.mark.needs("accelerate>=1.3")
@pytest.mark.parametrize(("items", "known"), [(4, True), (3, True), (5, False)])
def test_a_step_of_one_micro_batch_is_known_from_accelerate(items, known):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    try:
        state = Accelerator(cpu=True).gradient_state
        batch = {"num_items_in_batch": torch.tensor(items), "labels": TOKENS}
        if known:
            assert share_of(batch, None) == 1.0  # all labels, or those that a causal model predicts
            state._set_sync_gradients(False)
        with pytest.raises(RuntimeError, match="how many micro-batches share the optimizer step"):
            share_of(batch, None)
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
        pytest.param(
            lambda logits: model_output(logits=logits),
            "SequenceClassifierOutput with logits",
            marks=needs_transformers,
        ),
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


N_TEXT = r"it must be an int, a \(batch,\) integer tensor, a TokenLayout or a function \(batch, captured\)$"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_text": None}, f"n_text=None is a NoneType: {N_TEXT}"),
        ({"n_text": "4"}, f"n_text='4' is a str: {N_TEXT}"),
        ({"n_text": lambda batch: 4}, "two positional arguments.*: write lambda batch, captured: "),
        ({"n_text": lambda: 4}, "two positional arguments.*: write lambda batch, captured: "),
        ({"n_text": lambda batch, *, captured: 4}, "two positional arguments.*: write lambda batch, captured: "),
        ({"n_text": lambda batch, captured, more: 4}, "two positional arguments.*: write lambda batch, captured: "),
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


LOSS = r"pass CACRLoss\(\), IAISLoss\(\) or a function \(captured, n_text\)$"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("cacr", f"^loss='cacr' is a str: {LOSS}"),
        (None, f"^loss=None is a NoneType: {LOSS}"),
        (torch.tensor(1.0), rf"^loss=tensor\(1.\) is a Tensor: {LOSS}"),
        (CACRLoss, r"^loss is the class CACRLoss: pass CACRLoss\(\)$"),
        (IAISLoss, r"^loss is the class IAISLoss: pass IAISLoss\(\)$"),
    ],
)
def test_a_loss_that_cannot_be_called_is_refused_at_once(loss, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        regularize(model, loss, n_text=TEXT)
    assert hook_count(model) == 0


def test_a_loss_that_is_no_tensor_is_refused(x):
    model = Model()
    with (
        regularize(model, lambda captured, n_text: cacr_loss(captured, n_text).item(), n_text=TEXT),
        pytest.raises(ValueError, match=r"^the loss returned a float: it must return one number as a tensor"),
    ):
        model(x)


def test_a_weight_by_name_is_told_of_schedules():
    allowed = r"it must be a number or a schedule such as exponential_warmup\(5000\)$"
    with pytest.raises(TypeError, match=f"^weight='exponential' is a str: {allowed}"):
        regularize(Model(), CACRLoss(), n_text=TEXT, weight="exponential")


def test_n_text_must_be_given():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'n_text'"):
        regularize(Model(), CACRLoss())


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

    def n_text(batch, captured):
        asked.append(captured.lengths[0])
        return captured.lengths[0] - 3

    with regularize(model, CACRLoss(), n_text=n_text, layers="attention") as regularizer:
        model(x)
        with capture_attention(model, "attention") as capture:
            model(x)
            first, second = capture.pop_all()
    assert asked == [6, LENGTH] * 2
    expected = (cacr_loss(first, 3) + cacr_loss(second, LENGTH - 3)) / 2
    torch.testing.assert_close(regularizer.last.congruence, expected)


class Drawing(nn.Module):
    """Draws mismatched pairs inside of its forward, as ViLT's pretraining does, and returns which those are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(16, 2, dropout=0.0, batch_first=True)

    def forward(self, x):
        matched = torch.tensor([1, 0, 1, 0])
        out = self.encoder(torch.where(matched[:, None, None] == 1, x, x.roll(1, 0)))
        return {"loss": out.square().mean(), "matched": matched}


def test_positives_may_come_from_the_output(x):
    model = Drawing().train()
    with capture_attention(model) as capture:
        model(x)
        captured = capture.pop()
    expected = cacr_loss(captured[torch.tensor([0, 2])], TEXT)
    with regularize(model, CACRLoss(), TEXT, positives=lambda batch, output: output["matched"] == 1) as regularizer:
        model(x)
    torch.testing.assert_close(regularizer.last.congruence, expected.detach())
    assert expected != cacr_loss(captured, TEXT)


def test_a_regularized_forward_passes_for_the_method(x):
    model = Model()
    with regularize(model, CACRLoss(), TEXT) as regularizer:
        assert model.forward.__func__ is Model.forward
        assert model.forward.__self__ is model
        assert model.forward.__name__ == "forward"
        assert copy.deepcopy(model).forward.__func__ is Model.forward
        model.forward = types.MethodType(model.forward.__func__, model)  # as trainers do that patch it
        model(x)["loss"].backward()
        assert regularizer.last.congruence > 0
