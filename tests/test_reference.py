"""The dense forms against Algorithm 1 and its hard-aligned ancestor, entry by entry."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attncongruence import TokenLayout
from tests.helpers.problems import (
    CASES,
    DIRECTIONS,
    KINDS,
    assert_close,
    fast,
    make_problem,
    pairwise,
    problems,
    randn,
    slow,
    value_and_grad,
)


@pytest.mark.parametrize(
    ("name", "convention", "direction", "kind", "rank"),
    [(*case, *rest) for case, *rest in pairwise(CASES, DIRECTIONS, KINDS, (4, 3))],
)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_dense_equals_loop(data, name, convention, direction, kind, rank):
    problem = data.draw(problems(kind, rank))
    options = {"mask": problem.mask, "convention": convention, "direction": direction, "reduction": "none"}
    value, grad = value_and_grad(lambda S: fast(name, S, problem.n_text, **options), problem.S)
    expected, expected_grad = value_and_grad(lambda S: slow(name, S, problem.n_text, **options), problem.S)
    assert_close(value, expected, 1e-10)
    assert_close(grad, expected_grad, 1e-10)


@pytest.mark.parametrize("kind", ["int", "interleaved"])
@pytest.mark.parametrize(("name", "convention"), CASES)
def test_dense_equals_loop_with_pairs_left_out(name, convention, kind):
    for seed in range(4):
        problem = make_problem(kind, 4, seed, n=5, m=6)
        # A column mask, a mask for each head, and one for all heads: dense rows and columns alike.
        pairs = torch.rand(2, (1, 2)[seed % 2], 11, 11, generator=torch.Generator().manual_seed(seed)) < 0.6
        options = {"mask": pairs[:, 0] if seed == 2 else pairs, "convention": convention, "reduction": "none"}
        value, grad = value_and_grad(lambda S, p=problem, o=options: fast(name, S, p.n_text, **o), problem.S)
        expected, wanted = value_and_grad(lambda S, p=problem, o=options: slow(name, S, p.n_text, **o), problem.S)
        assert_close(value, expected, 1e-10)
        assert_close(grad, wanted, 1e-10)
        assert (expected > 0).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions_count_the_samples_that_have_both_modalities(reduction):
    S = randn(4, 2, 6, 6)
    text = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    image = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    layout = TokenLayout(text, image)
    each = torch.stack([fast("cacr", S[i : i + 1], layout[[i]]) for i in (0, 2)])
    expected = {
        "mean": each.mean(),
        "sum": each.sum(),
        "none": torch.stack([each[0], S.new_zeros(()), each[1], S.new_zeros(())]),
    }
    for loss in (fast, slow):
        assert_close(loss("cacr", S, layout, reduction=reduction), expected[reduction], 1e-12)


def test_algorithm_1_by_hand():
    # One head, raw scores: R[i, j] = sum_kp LV[i, k] LV[j, p] VV[k, p], 2 text and 2 image tokens.
    LL, LV = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    VL, VV = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    S = torch.cat([torch.cat([LL, LV], 1), torch.cat([VL, VV], 1)])[None].double()
    # R[0, 0] = 1*1*1 + 1*2*0 + 2*1*3 + 2*2*2 = 15, R[0, 1] = 1*1*0 + 2*1*2 = 4,
    # R[1, 0] = 1*1*3 + 1*2*2 = 7, R[1, 1] = 2
    R = torch.tensor([[15.0, 4.0], [7.0, 2.0]]).double()
    p, t = R.softmax(-1), LL.double().softmax(-1)
    by_hand = (p * (p / t).log()).sum() + (t * (t / p).log()).sum()
    for loss in (fast, slow):
        assert_close(loss("cacr", S, 2, convention="PRINTED", direction="language"), by_hand, 1e-12)
