"""Errors and warnings say what to do: those that new users met first."""

import re
import warnings

import pytest
import torch

from attncongruence import (
    WEIGHTED_MEAN,
    AttentionBlocks,
    CACRLoss,
    QueryKey,
    ScoreSource,
    TokenLayout,
    argmax_entropy,
    attention_distance,
    cacr_loss,
    capture_attention,
    iais_loss,
    regularize,
    soft_equivalence_loop,
    split_attention,
)
from attncongruence._typing import REMEDIES
from tests.helpers.models import Tiny
from tests.helpers.problems import assert_close, randn

S, zeros = randn(2, 4, 9, 9), torch.zeros
STREAMS = {"LL": zeros(1, 6, 6), "LV": zeros(1, 6, 8), "VL": zeros(1, 8, 6), "VV": zeros(1, 8, 8)}


@pytest.mark.parametrize(
    ("call", "argument", "remedy"),
    [
        (lambda: cacr_loss(S, 5, mask=torch.ones(2, 5).long()), "mask", "TokenLayout.from_segments"),
        (lambda: cacr_loss(S[..., :5], 5), "attention", "AttentionBlocks.from_streams"),
        (lambda: split_attention(S.long(), 5), "S", "scores are square"),
        (lambda: TokenLayout(zeros(2, 9), zeros(2, 9).bool()), "text", "TokenLayout.from_masks also takes integers"),
        (lambda: TokenLayout(zeros(2, 9).bool(), zeros(2, 8).bool()), "image", "from_segments takes one mask for each"),
        (
            lambda: AttentionBlocks.from_streams(**STREAMS | {"LV": STREAMS["VL"], "VL": STREAMS["LV"]}),
            "LV",
            r"LV \(.., text, image\), VL \(.., image, text\)",
        ),
    ],
)
def test_one_line_says_what_came_what_was_expected_and_what_to_do(call, argument, remedy):
    with pytest.raises(ValueError, match=remedy) as raised:
        call()
    message = str(raised.value)
    assert re.fullmatch(rf"{argument} is \w+\[[\d,]+\]; expected .*: {re.escape(REMEDIES[argument])}", message), message


def test_two_streams_are_not_told_to_stream():
    blocks = AttentionBlocks.from_streams(**STREAMS)
    with pytest.raises(ValueError, match=r"two streams have no streaming form: use impl='auto'.* the dense form$"):
        cacr_loss(blocks, impl="streaming")
    with pytest.raises(ValueError, match=r"given scores.* or pass a captured layer or QueryKey"):
        cacr_loss(S, 5, impl="streaming")


@pytest.mark.parametrize("name", ["n_text", "positives", "mask"])
def test_a_function_of_the_batch_that_asks_for_what_it_has_not(name):
    wrong = {"n_text": 2, name: lambda batch, *captured: batch["input_ids"]}
    model = Tiny()
    with regularize(model, CACRLoss(), **wrong), pytest.raises(KeyError, match="input_ids") as raised:
        model(randn(2, 5, 4, dtype=torch.float32))
    (note,) = raised.value.__notes__
    assert note == f"in regularize(..., {name}=): the batch, what the model was called with, has ['x']"


def test_an_n_text_function_with_its_arguments_swapped():
    model = Tiny()
    message = r"^a record is indexed by samples, not by 'ids': n_text is called as \(batch, captured\)$"
    with (
        regularize(model, CACRLoss(), lambda captured, batch: batch["ids"].shape[1]),
        pytest.raises(TypeError, match=message),
    ):
        model(randn(2, 5, 4, dtype=torch.float32))


@pytest.mark.parametrize("came", [(torch.ones(2, 5),) * 2, [1, 2], 2.0, None])
def test_an_n_text_function_that_returns_something_else(came):
    model = Tiny()
    with (
        regularize(model, CACRLoss(), lambda batch, captured: came),
        pytest.raises(ValueError, match="n_text") as raised,
    ):
        model(randn(2, 5, 4, dtype=torch.float32))
    returned = f"n_text(batch, captured) returned a {type(came).__name__}: it must be an int, a (batch,) integer tensor"
    assert str(raised.value).startswith(returned)


def test_a_mask_of_the_text_alone_beside_a_captured_layer():
    model, x = Tiny(), randn(2, 9, 4, dtype=torch.float32)
    with capture_attention(model) as capture:
        model(x)
        captured = capture.pop()
    q, k = captured.query, captured.key
    for attention, impl in ((captured, "auto"), (captured, "streaming"), (QueryKey(q, k), "streaming")):
        with pytest.raises(ValueError, match=r"pass a layout: n_text=TokenLayout\.from_segments"):
            cacr_loss(attention, 5, mask=torch.ones(2, 5, dtype=torch.bool), impl=impl)
    for shape in ((3, 9), (2, 3, 9, 9)):
        with pytest.raises(ValueError, match=r"the mask has shape .* batch 2, heads 1, length 9"):
            cacr_loss(QueryKey(q, k), 5, mask=torch.ones(shape, dtype=torch.bool), impl="streaming")


@pytest.mark.parametrize(
    ("take", "why"),
    [
        (lambda capture: capture.pop(), "taken before, and the model has not run since"),
        (lambda capture: capture.forget(), r"forget\(\) dropped its records, and the model has not run since"),
    ],
    ids=["taken", "dropped"],
)
def test_what_is_gone_is_not_blamed_on_something_else(take, why):
    model, x = Tiny(), randn(2, 9, 4, dtype=torch.float32)
    for layers in (-1, ""):
        with capture_attention(model, layers) as capture:
            model(x)
            take(capture)
            with pytest.raises(RuntimeError, match=why):
                capture.pop()
            with torch.no_grad():
                model(x)
            with pytest.raises(RuntimeError, match="ran with gradients off"):
                capture.pop()
            model(x)
            assert capture.pop().lengths == (9, 9)


def test_no_text_or_no_image_is_said_once_in_a_training_step():
    model, x = Tiny(), randn(2, 5, 4, dtype=torch.float32)
    nothing = TokenLayout.from_input_ids(torch.ones(2, 5, dtype=torch.long), 7)
    for where, found in (
        (5, "no image token"),
        (0, "no text token"),
        (nothing, "no image token"),
    ):
        with regularize(model, CACRLoss(), where) as regularizer:
            with pytest.warns(UserWarning, match=f"{found}.* exactly 0") as said:
                model(x)
            assert len(said) == 1
            assert regularizer.last.congruence == 0


def test_the_same_loss_twice_on_one_model():
    model = Tiny()
    with regularize(model, CACRLoss(), 2), warnings.catch_warnings():
        warnings.simplefilter("error")
        with regularize(model, CACRLoss(WEIGHTED_MEAN), 2), regularize(Tiny(), CACRLoss(), 2):
            pass  # another loss, another model
        with pytest.raises(UserWarning, match=r"Tiny is regularized with CACRLoss.* already.*close\(\) the first"):
            regularize(model, CACRLoss(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularize(model, CACRLoss(), 2).close()


def test_a_wrong_layout_of_a_decoder_is_named_as_a_cause():
    causal = torch.ones(2, 9, 9, dtype=torch.bool).tril()
    with pytest.warns(UserWarning, match=r"exactly 0.*direction='vision'.* layout is wrong: where does the image"):
        cacr_loss(S, 5, mask=causal, direction="language")


class Given(ScoreSource):
    """A source of whatever it is given."""

    def __init__(self, scores, allowed=None):
        self._given = scores, allowed

    @property
    def scores(self):
        return self._given[0]

    @property
    def allowed(self):
        return self._given[1]


ADDITIVE = torch.zeros(2, 1, 1, 9)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Given(S, ADDITIVE), r"Given\.allowed is torch.float32 of shape \(2, 1, 1, 9\): .*mask > -5000"),
        (Given(S, [True]), r"Given\.allowed is a list: it must be None or bool"),
        (Given(S.long()), r"Given\.scores is torch.int64 of shape \(2, 4, 9, 9\): it must be floating point"),
        (Given(S[0, 0]), r"Given\.scores is torch.float64 of shape \(9, 9\)"),
        (Given(S.numpy()), r"Given\.scores is a ndarray"),
    ],
)
def test_a_source_of_something_else_is_refused(source, message):
    for loss in (cacr_loss, attention_distance, argmax_entropy):
        with pytest.raises(ValueError, match=message):
            loss(source, 5)


def test_a_source_without_its_properties_is_refused():
    class Empty(ScoreSource):
        pass

    with pytest.raises(NotImplementedError, match="Empty has no scores: write them as a property"):
        cacr_loss(Empty(), 5)


def test_a_source_of_ones_own_is_as_good_as_its_scores():
    pairs = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    pairs[..., 7] = False
    for convention in ("released", "printed", "weighted_mean"):
        own = cacr_loss(Given(S, pairs), 5, convention=convention)
        assert_close(own, cacr_loss(S, 5, mask=pairs, convention=convention), 0)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (
            {f"state_{i}": zeros(2, 9, 4) for i in range(9)},
            r"^attention is .{,63}; expected Float.*: scores are square",
        ),
        (capture_attention(torch.nn.MultiheadAttention(4, 1)), r"Of a capture, pass capture\.pop\(\)\.$"),
    ],
)
def test_what_people_pass_for_scores(attention, message):
    with pytest.raises(ValueError, match=message) as raised:
        cacr_loss(attention, 5)
    assert "\n" not in str(raised.value)


def test_an_additive_mask_is_told_how_to_become_bool():
    with pytest.raises(ValueError, match=r"mask is f32\[2,9\]; expected .*of an additive mask, pass mask > -5000"):
        cacr_loss(S, 5, mask=torch.zeros(2, 9))


@pytest.mark.parametrize("size", [2, 6, 9])
def test_a_square_mask_may_be_of_tokens_or_of_pairs(size):
    generator = torch.Generator().manual_seed(size)
    scores, n_text = randn(size, 2, size, size, seed=size), size // 2
    query, key = (randn(size, 2, size, 4, seed=seed) for seed in (1, 2))
    mask = torch.rand(size, size, generator=generator) < 0.8
    mask[:, [0, -1]] = True
    masked = Given(scores, torch.ones(size, 1, 1, size, dtype=torch.bool))
    for attention in (scores, scores[:, 0], QueryKey(query, key), Given(scores), masked):
        for function in (cacr_loss, iais_loss, argmax_entropy, attention_distance, soft_equivalence_loop):
            with pytest.raises(
                ValueError, match=r"it may say which tokens .* mask\.long\(\).* of pairs, pass mask\[None"
            ):
                function(attention, n_text, mask=mask)
        # Either is right where it says what it is.
        tokens = cacr_loss(attention, n_text, mask=mask.long())
        layout = TokenLayout.from_n_text(n_text, attention_mask=mask)
        assert torch.equal(tokens, cacr_loss(attention, n_text, mask=mask[:, None, None]))
        torch.testing.assert_close(tokens, cacr_loss(attention, layout))
        shared = mask.expand(size, size, size)
        torch.testing.assert_close(
            cacr_loss(attention, n_text, mask=mask[None]), cacr_loss(attention, n_text, mask=shared)
        )
    for attention in (scores, QueryKey(query, key), Given(scores)):
        with pytest.raises(ValueError, match=r"mask .*\(1, length, length\) if all samples share it"):
            cacr_loss(attention[:-1] if attention is scores else few(attention), n_text, mask=mask)
    with pytest.raises(ValueError, match=r"of pairs, pass mask\[None"):
        split_attention(scores, n_text, mask=mask)


def few(source):
    """All samples of a source but the last."""
    return Given(source.scores[:-1])


@pytest.mark.parametrize("positives", [None, [0, 3, 4], [True, False, False, True, True]])
def test_a_square_mask_in_regularize(positives):
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    x = randn(5, 5, 4, dtype=torch.float32)
    model = Tiny()
    refused = pytest.raises(ValueError, match="it may say which tokens are real")
    with regularize(model, CACRLoss(), 2, positives=positives, mask=lambda batch: mask), refused:
        model(x)
    with regularize(model, CACRLoss(direction="vision"), 2, positives=positives, mask=lambda batch: mask[None]) as term:
        model(x)
        assert term.last.congruence > 0
    with regularize(model, CACRLoss(), 2, positives=positives, mask=lambda batch: mask.long()) as term:
        model(x)
        assert term.last.congruence > 0


@pytest.mark.parametrize("loss", ["cacr", None, 3.0])
def test_a_loss_that_cannot_be_called_is_refused_at_once(loss):
    with pytest.raises(ValueError, match=r"^loss=.*: pass CACRLoss\(\), IAISLoss\(\) or a function"):
        regularize(Tiny(), loss, 4)


@pytest.mark.parametrize("convention", ["released", "printed", "weighted_mean"])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scale_that_learns_gets_its_gradient_in_both_forms(convention, shape, dtype):
    q, k = (randn(2, 4, 9, 8, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    scale = torch.full(shape, 0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
    scores = scale * (q.to(scale.dtype) @ k.to(scale.dtype).mT)
    expected = torch.autograd.grad(cacr_loss(scores, 4, convention=convention), (scale, q, k))
    assert expected[0].abs() > 0
    for impl in ("dense", "streaming", "auto"):
        source = QueryKey(q, k, scale)
        assert_close(source.scores, scores, 1e-12 if dtype == torch.float64 else 1e-5)
        found = torch.autograd.grad(cacr_loss(source, 4, convention=convention, impl=impl), (scale, q, k))
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, 1e-9 if dtype == torch.float64 else 2e-2)
    grouped = QueryKey(q, k[:, :2], scale)
    assert_close(
        grouped.scores, scale * (q.to(scale.dtype) @ k[:, :2].to(scale.dtype).repeat_interleave(2, 1).mT), 1e-5
    )
