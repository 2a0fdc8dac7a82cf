"""CapturedAttention: scores, masks and probabilities by hand, and what it costs to ask for them."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from attncongruence import QueryKey, cacr_loss
from attncongruence.capture import CapturedAttention, capture_attention
from attncongruence.capture import record as module
from attncongruence.capture.folds import Fold
from attncongruence.capture.product import FLOOR, Operation
from tests.helpers.problems import Synchronizations
from tests.helpers.single_head import ByHand, Fused, record


def test_hand_values():
    q, k = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    record = CapturedAttention("attention", Operation(query=q, key=k, scale=0.5, causal=True))
    assert record.scores.tolist() == [[[[1.5, -math.inf], [3.0, 4.0]]]]
    assert record.allowed.tolist() == [[[[True, False], [True, True]]]]
    assert record.probs[0, 0, 0].tolist() == [1.0, 0.0]
    assert record.probs[0, 0, 1].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    assert CapturedAttention("attention", Operation(query=q, key=k)).allowed is None


@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e9, -1e4, -9984.0])
def test_every_usual_mask_value_hides_and_an_ordinary_bias_does_not(low):
    q = torch.ones(1, 1, 2, 1)
    mask = torch.tensor([[low, 0.0], [-100.0, FLOOR + 1]])
    record = CapturedAttention("attention", Operation(query=q, key=q, masks=((mask, 1.0),)))
    assert record.allowed.tolist() == [[[[False, True], [True, True]]]]
    assert record.scores.tolist() == [[[[-math.inf, 1.0], [-99.0, FLOOR + 2]]]]
    assert record.query is None  # -100 is a bias


def test_rows_without_any_allowed_key_have_no_probability_and_no_nan():
    q = torch.ones(1, 1, 2, 1, requires_grad=True)
    mask = torch.tensor([[False, False], [True, True]])
    record = CapturedAttention("attention", Operation(query=q, key=q, masks=((mask, 1.0),)))
    assert record.probs.tolist() == [[[[0.0, 0.0], [0.5, 0.5]]]]
    (gradient,) = torch.autograd.grad(record.probs.square().sum(), q)
    assert torch.isfinite(gradient).all()


def test_grouped_queries_repeat_their_keys():
    q, k = torch.randn(1, 4, 3, 2), torch.randn(1, 2, 3, 2)
    record = CapturedAttention("attention", Operation(query=q, key=k))
    assert torch.equal(record.key[0, 1], k[0, 0])
    assert torch.equal(record.key[0, 2], k[0, 1])
    torch.testing.assert_close(record.scores[0, 3], q[0, 3] @ k[0, 1].T)


def test_one_mask_for_all_samples_stays_one():
    q = torch.randn(3, 1, 2, 2)
    record = CapturedAttention("attention", Operation(query=q, key=q, masks=((torch.ones(2, 2).tril().bool(), 1.0),)))
    assert record[[0, 2]].allowed.shape == (1, 1, 2, 2)
    torch.testing.assert_close(record[[0, 2]].scores, record.scores[[0, 2]])


def test_parts_that_fold_batch_and_heads_become_4_d_views():
    q, k, bias = torch.randn(6, 5, 4), torch.randn(6, 5, 4), torch.randn(3, 1, 5)
    folded = Operation(query=q, key=k, masks=((bias, 1.0),))
    assert Fold((6,), ((2, False), (3, True))).apply(q).shape == (2, 3, 5, 4)
    assert folded.four_d().query.shape == (6, 1, 5, 4)
    wide = Operation(query=q, key=k, logits=torch.randn(2, 3, 5, 5), masks=((bias, 1.0),)).four_d()
    assert (wide.query.shape, wide.masks[0][0].shape) == ((2, 3, 5, 4), (1, 3, 1, 5))
    assert (wide.query.data_ptr(), wide.masks[0][0].data_ptr()) == (q.data_ptr(), bias.data_ptr())


def test_scores_that_were_first_seen_under_no_grad_still_train():
    model = Fused()
    captured = record(model)
    with torch.no_grad():
        seen = captured.scores
        assert captured.scores is seen
    scores = captured.scores
    assert (seen.requires_grad, scores.requires_grad) == (False, True)
    assert scores is captured.scores
    assert torch.equal(scores, seen)
    assert torch.autograd.grad(scores.square().sum(), model.query.weight)[0].abs().max() > 0


TOKENS = torch.tensor([0.0, 0.0, -1e9]).expand(2, 1, 3, 3)
PAIRS = torch.zeros(3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)


@pytest.mark.parametrize(
    ("masks", "causal", "logits", "expected"),
    [
        ((), False, False, 0),
        ((), True, False, 0),
        ((TOKENS == 0,), False, False, 0),
        ((TOKENS == 0,), True, False, 0),
        ((TOKENS,), False, False, 1),
        ((TOKENS, PAIRS, TOKENS == 0), True, False, 1),
        ((TOKENS, PAIRS), False, True, 1),
    ],
)
def test_all_float_masks_together_cost_one_synchronization(masks, causal, logits, expected):
    q = torch.randn(2, 1, 3, 4, requires_grad=True)
    masks = tuple((mask, 1.0) for mask in masks)
    made = Operation(query=q, key=q, masks=masks, causal=causal)
    if logits:
        made = Operation(query=q, key=q, masks=masks, logits=CapturedAttention("attention", made).scores)
    captured = CapturedAttention("attention", made)
    with Synchronizations() as seen:
        scores, allowed, probs = captured.scores, captured.allowed, captured.probs
        captured[[1]].scores.sum().backward()
        assert seen.count == 0
        for _ in range(2):
            assert captured.query is q
            assert captured.key is q
            assert captured.scale == 1.0
    assert seen.count == expected
    assert (allowed is None) == (not masks and not causal)
    torch.testing.assert_close(probs, scores.softmax(-1))


@pytest.mark.parametrize("model", [Fused(), ByHand()])
def test_scores_without_masks_run_few_functions(model):
    captured, called = record(model), []

    def note(frame, event, arg):
        if event == "call" and frame.f_code.co_filename == module.__file__:
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        captured.scores, captured.allowed  # noqa: B018
    finally:
        sys.setprofile(None)
    assert 2 <= len(called) <= 5, called


@pytest.mark.parametrize("one", [1, np.int64(1), np.int32(1), torch.tensor(1), np.array(1), [1], np.array([1])])
def test_one_sample_by_any_integer(one):
    encoder = nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True)
    with capture_attention(encoder) as capture:
        encoder(torch.randn(3, 5, 8))
        captured = capture.pop()
    assert captured[one].shape == (1, 2, 5, 5)
    assert torch.equal(captured[one].scores, captured.scores[1:2])


@pytest.mark.parametrize("wrong", [True, np.bool_(True), torch.tensor(True), 1.0, None, (0, 1), "text"])
def test_what_is_no_index_of_samples_is_refused(wrong):
    encoder = nn.TransformerEncoderLayer(8, 2, dropout=0.0, batch_first=True)
    with capture_attention(encoder) as capture:
        encoder(torch.randn(3, 5, 8))
        captured = capture.pop()
    with pytest.raises(TypeError, match="indexed by samples"):
        captured[wrong]


@pytest.mark.parametrize("impl", ["dense", "streaming"])
@pytest.mark.parametrize("convention", ["released", "weighted_mean"])
def test_a_scale_that_learns_gets_its_gradient(impl, convention):
    q, k = (torch.randn(2, 2, 7, 4, dtype=torch.float64) for _ in range(2))
    scale = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    loss = cacr_loss(QueryKey(q, k, scale), 3, convention=convention, impl=impl)
    expected = cacr_loss(scale * q @ k.mT, 3, convention=convention)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, scale)[0] for one in (loss, expected)))
