"""E and the projection: hand values, and the identities that connect them."""

from dataclasses import replace

import torch

from attncongruence import PRINTED, RELEASED, WEIGHTED_MEAN, split_attention
from attncongruence.blocks import Quadrants
from attncongruence.maps import (
    attention_map,
    counted_entries,
    entries,
    equivalence,
    log_attention_map,
    project,
    project_singular,
)
from tests.helpers.problems import assert_close, randn

NO_MASKS = Quadrants(None, None, None, None)


def test_maps():
    block = randn(2, 3, 4, 5)
    assert_close(attention_map(block, None, RELEASED), block.softmax(-1).mean(1, keepdim=True), 1e-14)
    assert_close(attention_map(block, None, PRINTED), block, 0)
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 4, 5)
    kept = block[..., [0, 1, 3]]
    masked = attention_map(block, mask, RELEASED)
    assert_close(masked[..., [0, 1, 3]], kept.softmax(-1).mean(1, keepdim=True), 1e-14)
    assert (masked[..., [2, 4]] == 0).all()
    assert_close(log_attention_map(block, mask, RELEASED)[..., [0, 1, 3]].exp(), masked[..., [0, 1, 3]], 1e-14)


def test_log_map_is_finite_where_the_map_is_zero():
    block = torch.tensor([[[[0.0, 300.0]]]])
    assert attention_map(block, None, RELEASED)[0, 0, 0, 0] == 0
    assert log_attention_map(block, None, RELEASED)[0, 0, 0].tolist() == [-300.0, 0.0]


def test_equivalence():
    LV = randn(2, 3, 4, 5).requires_grad_()
    assert equivalence(LV, None, PRINTED) is LV
    assert not equivalence(LV, None, RELEASED).requires_grad
    sharp = replace(WEIGHTED_MEAN, temperature=0.25)
    assert_close(equivalence(LV, None, sharp), (4 * LV).softmax(-1), 1e-14)


def test_projection_by_hand():
    E, VV = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    assert project(E, VV).tolist() == [[15.0, 4.0], [7.0, 2.0]]
    # argmax picks image token 1 for both text tokens
    R, counted = project_singular(E[None, None], VV[None, None], NO_MASKS)
    assert R.tolist() == [[[[2.0, 2.0], [2.0, 2.0]]]]
    assert counted is None


def test_projection_is_the_attention_of_pooled_queries_and_keys():
    # E VV E^T = scale (E Q_V) (E K_V)^T: why VV never needs to exist
    E, Q, K = randn(2, 3, 4, 5), randn(2, 3, 5, 8, seed=1), randn(2, 3, 5, 8, seed=2)
    assert_close(project(E, 0.3 * Q @ K.mT), 0.3 * (E @ Q) @ (E @ K).mT, 1e-13)


def test_entries():
    S = randn(2, 1, 5, 5)
    assert entries(split_attention(S, 2)) == NO_MASKS
    # Sample 0: text 0, 1 and image 2, 3; sample 1: no image
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    masks = entries(split_attention(S, 2, mask=mask))
    assert masks.LL[:, 0].int().tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]]]
    assert masks.LV[:, 0].int().tolist() == [[[1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]]
    # Text token 0 may attend to no image token: it has no counterpart
    pairs = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    pairs[0, :, 0, 2:] = False
    masks = entries(split_attention(S, 2, mask=pairs))
    assert counted_entries(masks, RELEASED, True).LL[:, 0].int().tolist() == [[[0, 0], [0, 1]], [[1, 1], [1, 1]]]
