"""m-KL (Eq. 4): hand values, properties, extremes."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from attncongruence import symmetric_kl
from tests.helpers.problems import assert_close, randn


def test_hand_value():
    # P = (1/4, 3/4), T = (1/2, 1/2): log(3) / 4
    a, b = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.zeros(1, 2).double()
    assert_close(symmetric_kl(a, b), torch.tensor([math.log(3) / 4], dtype=torch.float64), 1e-14)


@hypothesis.given(seed=st.integers(0, 2**20), rows=st.integers(1, 6), columns=st.integers(1, 9))
def test_equals_two_divergences(seed, rows, columns):
    a, b = randn(2, rows, columns, seed=seed) * 3
    p, t = a.log_softmax(-1), b.log_softmax(-1)
    kl = torch.nn.functional.kl_div
    two = (kl(t, p, log_target=True, reduction="none") + kl(p, t, log_target=True, reduction="none")).sum(-1)
    assert_close(symmetric_kl(a, b), two, 1e-12)
    assert_close(symmetric_kl(a, b, reduction="sum"), two.sum(), 1e-12)
    assert_close(symmetric_kl(a, b, reduction="mean"), two.mean(), 1e-12)
    # Symmetric, blind to a constant in a row, and never negative
    assert torch.equal(symmetric_kl(a, b), symmetric_kl(b, a))
    assert_close(symmetric_kl(a + 7, b - 3), two, 1e-12)
    assert (symmetric_kl(a, b) >= 0).all()
    assert (symmetric_kl(a, a) == 0).all()


@hypothesis.given(seed=st.integers(0, 2**20))
def test_masked_equals_sliced(seed):
    a, b = randn(2, 4, 6, seed=seed)
    columns = torch.rand(6, generator=torch.Generator().manual_seed(seed)) < 0.6
    a, b = (x.masked_fill(~columns, value) for x, value in ((a, torch.nan), (b, 1e30)))
    expected = symmetric_kl(a[:, columns], b[:, columns]) if columns.any() else torch.zeros(4).double()
    a.requires_grad_(), b.requires_grad_()
    value = symmetric_kl(a, b, columns.expand(4, 6))
    assert_close(value, expected, 1e-13)
    assert_close(symmetric_kl(a, b, columns[None]), expected, 1e-13)
    for grad in torch.autograd.grad(value.sum(), (a, b)):
        assert (grad[:, ~columns] == 0).all()
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_finite_at_exact_zeros(dtype):
    a = torch.tensor([[200.0, -200.0, 0.0]], dtype=dtype, requires_grad=True)
    b = torch.tensor([[-200.0, 200.0, 0.0]], dtype=dtype, requires_grad=True)
    value = symmetric_kl(a, b)
    assert value.item() == 800.0
    for grad in torch.autograd.grad(value, (a, b)):
        assert torch.isfinite(grad).all()


def test_gradcheck():
    a, b = randn(2, 3, 4).requires_grad_(), randn(2, 3, 4, seed=1).requires_grad_()
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    assert torch.autograd.gradcheck(lambda a, b: symmetric_kl(a, b, mask[None]), (a, b))
    assert torch.autograd.gradgradcheck(symmetric_kl, (a, b))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((randn(2, 3), randn(2, 4)), {}, ValueError, "columns"),
        ((randn(2, 3).long(), randn(2, 3)), {}, ValueError, "a is i64"),
        ((randn(2, 3), randn(2, 3), torch.ones(2, 2, dtype=torch.bool)), {}, ValueError, "mask"),
        (
            (randn(2, 3), randn(2, 3).to("meta")),
            {},
            ValueError,
            "must be on one device, got a on cpu, b on meta",
        ),
        ((randn(2, 3), randn(2, 3)), {"reduction": "batchmean"}, ValueError, "reduction='batchmean' is not known"),
    ],
)
def test_rejects(arguments, options, error, message):
    with pytest.raises(error, match=message):
        symmetric_kl(*arguments, **options)
