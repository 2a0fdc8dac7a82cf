"""The GPU kernels: against float64, in Triton's interpreter where there is no card, and compiled for cards anyhow."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import triton

from attncongruence.streaming import kernel_tiles, map_kernels
from attncongruence.streaming import low_rank_kernels as kernels
from tests.helpers.problems import assert_close, randn
from tests.helpers.triton_problems import HALF, beyond, distance, low_rank_loss, mean_map, with_grad

SLOW = pytest.mark.slow  # the interpreter takes a second for a few tiles
INTERPRETED = kernel_tiles.INTERPRETED.value


@pytest.fixture
def device():
    assert INTERPRETED or torch.cuda.is_available(), "TRITON_INTERPRET was set too late: Triton was imported before"
    return "cpu" if INTERPRETED else "cuda"


def spoil(x, lengths):
    """NaN and infinities wherever no kernel may look."""
    return x.masked_fill(beyond(x, lengths, 2), torch.nan).masked_fill(
        beyond(x, lengths, 2) & (torch.arange(x.shape[-1]) % 2 == 0), torch.inf
    )


def problem(n, width, lengths, heads=2, near=None, dtype=torch.float32, size=1.0):
    """A, B in float32, C, D in a dtype, in float64 as given to the kernel; two samples of equal maps if near is 0."""
    A, B, C, D = (size * randn(len(lengths), heads, n, width, seed=seed) for seed in range(4))
    C, D = C.to(dtype), D.to(dtype)
    if near is not None:
        A, B = C + near * A, D + near * B
    return [A.float(), B.float(), C, D], torch.tensor(lengths)


def run(factors, lengths, scale, device, grad=True):
    return [
        x.cpu()
        for x in kernels.low_rank_kl(*(spoil(x, lengths).to(device) for x in factors), lengths.to(device), scale, grad)
    ]


@pytest.mark.parametrize(
    ("n", "width", "lengths", "scale"),
    [
        (33, 32, (32, 33, 1), -0.2),
        pytest.param(70, 40, (70, 0, 33, 64), 0.3, marks=SLOW),
        pytest.param(35, 64, (35, 17), 0.125, marks=SLOW),
        pytest.param(37, 80, (37, 5), 0.1, marks=SLOW),
        pytest.param(18, 256, (18, 17), 0.0625, marks=SLOW),
        (1, 8, (1, 0), 0.5),
        (3, 1, (3, 2), 2.0),
    ],
)
def test_float32(n, width, lengths, scale, device):
    factors, lengths = problem(n, width, lengths)
    results = run(factors, lengths, scale, device)
    expected = with_grad(lambda leaves: low_rank_loss(leaves, lengths, scale), factors)
    assert results[0].dtype == torch.float32
    for got, want in zip(results, expected, strict=True):
        assert_close(got.double(), want, 1e-5)
    # What is beyond the lengths has no gradient at all, and a sample of length 0 no loss
    for got in results[1:]:
        assert (got[beyond(got, lengths, 2)] == 0).all()
    assert (results[0][lengths == 0] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("n", "width", "near", "size"),
    [
        (70, 32, None, 0.1),
        pytest.param(150, 64, None, 1.0, marks=SLOW),
        pytest.param(150, 64, 0.05, 1.0, marks=SLOW),
        pytest.param(77, 80, None, 2.0, marks=SLOW),
        pytest.param(40, 256, 0.1, 0.5, marks=SLOW),
    ],
)
def test_half_precision(n, width, near, size, dtype, device):
    """The error is that of scores in half precision, which a model's own dense scores are."""
    factors, lengths = problem(n, width, (n, n // 2 + 3, 0), 3, near, dtype, size)
    scale = width**-0.5
    results = run(factors, lengths, scale, device)
    exact = with_grad(lambda leaves: low_rank_loss(leaves, lengths, scale), factors)
    dense = with_grad(lambda leaves: low_rank_loss(leaves, lengths, scale, dtype), factors)
    for got, want, other in zip(results[1:], exact[1:], dense[1:], strict=True):
        assert distance(got, want) <= 1.5 * distance(other, want)
    # In a sum over rows, errors of either cancel by chance.
    assert distance(results[0], exact[0]) <= max(1.5 * distance(dense[0], exact[0]), torch.finfo(dtype).eps / 8)
    for got in results[1:]:
        assert (got[beyond(got, lengths, 2)] == 0).all()


@pytest.mark.parametrize(("of_A", "of_B"), [(1e5, 1e5), (1e5, 1e-5), (3e-7, 1e6), (1e30, 1e-30)])
def test_pooled_values_beyond_float16(of_A, of_B, device):
    (A, B, C, D), lengths = problem(50, 32, (50, 21), dtype=torch.float16)
    factors = [A * of_A, B * of_B, C * 100, D * 100]
    scale = 0.2 / max(of_A * of_B, 1e4)
    results = run(factors, lengths, scale, device)
    exact = with_grad(lambda leaves: low_rank_loss(leaves, lengths, scale), factors)
    dense = with_grad(lambda leaves: low_rank_loss(leaves, lengths, scale, torch.float16), factors)
    for got, want, other in zip(results[1:], exact[1:], dense[1:], strict=True):
        assert distance(got, want) <= max(1.5 * distance(other, want), torch.finfo(torch.float16).eps)
    assert distance(results[0], exact[0]) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n", "of_AB", "of_CD"), [(60, 0.3, 300.0), (150, 0.004, 0.004)])
def test_gradients_beyond_float16(n, of_AB, of_CD, dtype, device):
    """A flat map against one-hot rows, so that dx is 1e5, and two flat ones, so that it is 1e-7."""
    (A, B, C, D), lengths = problem(n, 32, (n, 41), dtype=dtype)
    factors = [A * of_AB, B * of_AB, C * of_CD, D * of_CD]
    results = run(factors, lengths, 2.0, device)
    exact = with_grad(lambda leaves: low_rank_loss(leaves, lengths, 2.0), factors)
    for got, want in zip(results, exact, strict=True):
        assert distance(got, want) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_large_logits(dtype, device):
    factors, lengths = problem(40, 32, (40, 19), dtype=dtype)
    # To 1e4 and beyond: softmaxes are one-hot, and the loss is of the size of the logits.
    results = run(factors, lengths, 600.0, device)
    exact = with_grad(lambda leaves: low_rank_loss(leaves, lengths, 600.0), factors)
    assert exact[0].min() > 1e4
    for got, want in zip(results, exact, strict=True):
        assert torch.isfinite(got).all()
        # Two float32 of 1e4 differ by 1e-3, and so do probabilities; in half precision another column may win.
        assert dtype in HALF or distance(got, want) <= 2e-3
    assert distance(results[0], exact[0]) <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(dtype, marks=SLOW) for dtype in HALF)])
def test_equal_maps(dtype, device):
    (_, _, C, D), lengths = problem(70, 40, (70, 51), dtype=dtype)
    loss, *grads = run([C, D, C, D], lengths, 0.4, device)
    assert_close(loss, torch.zeros_like(loss), 1e-6)
    for grad in grads:
        assert_close(grad, torch.zeros_like(grad), 1e-5)


def test_a_constant_of_a_row_cancels(device):
    """Equal maps still, of logits 1000 apart: mu and nu are 1000 each, were they not centered."""
    (_, _, C, D), lengths = problem(70, 40, (70, 51))
    C[..., -1], D[..., -1] = 0, 1
    A = C.clone()
    A[..., -1] = 1000
    loss, *grads = run([A, D, C, D], lengths, 1.0, device)
    assert loss.max() < 1e-6
    for grad in (grads[0][..., :-1], grads[2]):
        assert grad.abs().max() < 2e-3
    # Never below 0, also where only rounding is left
    assert (loss >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(dtype, marks=SLOW) for dtype in HALF)])
def test_repeats_bit_by_bit(dtype, device):
    factors, lengths = problem(70, 40, (70, 33), dtype=dtype)
    first, second = run(factors, lengths, 0.3, device), run(factors, lengths, 0.3, device)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradient_strided_and_mixed(device):
    factors, lengths = problem(20, 16, (20, 7))
    loss, *grads = run(factors, lengths, 0.3, device, grad=False)
    assert [x.shape for x in grads] == [(0,)] * 4
    assert torch.equal(loss, run(factors, lengths, 0.3, device)[0])
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in factors]
    value = kernels.low_rank_kl(*(x.to(device) for x in strided), lengths.to(device), 0.3, False)[0]
    assert torch.equal(value.cpu(), loss)
    assert not value.requires_grad
    # C and D that differ in dtype are as one that holds both; A and B may be in half precision themselves.
    A, B, C, D = factors
    mixed, wide = [A, B, C.half(), D.bfloat16()], [A, B, C.half().float(), D.bfloat16().float()]
    for a, b in zip(run(mixed, lengths, 0.3, device), run(wide, lengths, 0.3, device), strict=True):
        assert torch.equal(a, b)
    halves, floats = [x.half() for x in factors], [A.half().float(), B.half().float(), C.half(), D.half()]
    for a, b in zip(run(halves, lengths, 0.3, device), run(floats, lengths, 0.3, device), strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do(device):
    for shape in ((0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8)):
        x, lengths = torch.zeros(shape, device=device), torch.zeros(shape[0], dtype=torch.int64, device=device)
        loss, *grads = kernels.low_rank_kl(x, x, x, x, lengths, 1.0, True)
        assert loss.shape == shape[:2]
        assert (loss == 0).all()
        assert all(grad.shape == shape for grad in grads)


def map_and_grad(q, k, lengths, scale, chunks, dT, device, dk=0.0):
    """T, dq and dk from the kernels, some rows at a time."""
    real = lengths[:, None].expand(-1, q.shape[2])
    outside = beyond(dT, lengths, 1) | beyond(dT, lengths, 2)
    dT = dT.masked_fill(outside, torch.nan).to(device)
    q, k, lengths = spoil(q, lengths).to(device), spoil(k, lengths).to(device), lengths.to(device)
    assert real.shape == q.shape[::2]
    tiles = map_kernels.KernelRows(q, k, lengths, scale)
    dk, Ts, dq = torch.full(k.shape, dk, device=device), [], torch.full(q.shape, torch.nan, device=device)
    whole = slice(0, len(q))
    for start, stop in zip(chunks, [*chunks[1:], q.shape[2]], strict=True):
        rows = slice(start, stop)
        work, T = tiles.map(whole, rows)
        tiles.grad(whole, rows, work[:1], T, dT[:, rows], dq, dk)
        Ts.append(T)
    return [x.cpu() for x in (tiles.lse, torch.cat(Ts, 1), dq, dk)]


def map_problem(n, width, lengths, heads, dtype=torch.float32):
    q, k = (randn(len(lengths), heads, n, width, seed=seed).to(dtype) for seed in range(2))
    return q, k, torch.tensor(lengths), randn(len(lengths), n, n, seed=2, dtype=torch.float32)


@pytest.mark.parametrize(
    ("n", "width", "lengths", "heads", "chunks", "scale"),
    [
        (66, 32, (64, 40), 1, (0,), -0.2),
        pytest.param(70, 40, (70, 0, 33), 2, (0, 31, 64), 0.3, marks=SLOW),
        pytest.param(35, 80, (35, 32), 2, (0, 33), 0.1, marks=SLOW),
        pytest.param(18, 256, (18, 3), 2, (0, 7), 0.0625, marks=SLOW),
        (1, 8, (1, 0), 1, (0,), 0.5),
    ],
)
def test_mean_map_float32(n, width, lengths, heads, chunks, scale, device):
    q, k, lengths, dT = map_problem(n, width, lengths, heads)
    lse, T, dq, dk = map_and_grad(q, k, lengths, scale, chunks, dT, device)
    for b, count in enumerate(lengths.tolist()):
        scores = scale * q[b, :, :count].double() @ k[b, :, :count].double().mT
        assert_close(lse[b, :, :count].double(), scores.logsumexp(-1), 1e-6)
    assert (lse[beyond(lse, lengths, 2)] == 0).all()

    want, *grads = with_grad(lambda leaves: mean_map(*leaves, lengths, scale) * dT.double(), [q, k])
    assert_close(T.double() * dT.double(), want, 1e-6)
    assert (T[beyond(T, lengths, 1) | beyond(T, lengths, 2)] == 0).all()
    for got, grad in zip((dq, dk), grads, strict=True):
        assert_close(got.double(), grad, 1e-5)
        assert (got[beyond(got, lengths, 2)] == 0).all()
    # What dk held before is kept, and added to.
    again = map_and_grad(q, k, lengths, scale, chunks, dT, device, dk=2.0)[-1]
    assert_close(again, dk + 2, 1e-6)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("n", "width", "size"),
    [
        (50, 32, 1e-9),
        pytest.param(150, 64, 1.0, marks=SLOW),
        pytest.param(77, 80, 1.0, marks=SLOW),
        pytest.param(30, 256, 1e7, marks=SLOW),
    ],
)
def test_mean_map_half_precision(n, width, size, dtype, device):
    q, k, lengths, dT = map_problem(n, width, (n, n // 2 + 3), 2, dtype)
    scale, chunks = width**-0.5, (0, n // 3)
    _, T, *results = map_and_grad(q, k, lengths, scale, chunks, dT * size, device)

    def total(leaves, scores=None):
        return mean_map(*leaves, lengths, scale, scores) * dT.double()

    want, *exact = with_grad(total, [q, k])
    other, *dense = with_grad(lambda leaves: total(leaves, dtype), [q, k])
    assert distance(T * dT, want) <= 0.1 * distance(other, want)
    for got, a, b in zip(results, exact, dense, strict=True):
        assert distance(got / size, a) <= 1.5 * distance(b, a)


def test_mean_map_large_logits_and_repeats(device):
    q, k, lengths, dT = map_problem(70, 40, (70, 33), 2)
    first, second = (map_and_grad(q, k, lengths, 500.0, (0, 20), dT, device) for _ in range(2))
    assert first[0].max() > 1e4
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
    want = mean_map(q.double(), k.double(), lengths, 500.0)
    assert_close(first[1].double(), want, 5e-3)


def test_what_is_supported(device, monkeypatch):
    x = torch.zeros(1, 1, 2, 256, device=device)
    assert kernels.supported(x, x.half(), x.bfloat16())
    assert not kernels.supported(x, x.double())
    assert not kernels.supported(x, torch.zeros(1, 1, 2, 257, device=device))
    assert not kernels.supported(x[..., :0])
    monkeypatch.setattr(kernels, "INTERPRETED", triton.language.constexpr(False))
    assert not kernels.supported(x.cpu())


def test_tf32_is_asked_for():
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            assert kernel_tiles.settings("statistics", torch.float32, 64)[2]["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.slow
def test_compiles_for_cards_that_are_not_there(tmp_path):
    # Architecture, dtype, heads, n, width, and the tensor cores' instruction
    cases = [
        (90, "bfloat16", 16, 128, 64, "wgmma"),
        # One head of one token: numbers that are 1 are compiled in.
        (80, "float16", 1, 1, 80, "mma"),
        (80, "float32", 2, 20, 16, None),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.triton_problems", *(str(word) for case in cases for word in case[:-1])],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 7 * len(cases)
    for i, line in enumerate(lines):
        instruction = cases[i // 7][-1]
        # Ampere's and Ada's consumer cards have 99 KB.
        assert line["shared"] <= 99 * 1024, line
        assert line.get("spilled", 0) <= 256, line
        assert instruction is None or line[instruction], line


def test_hand_value(device):
    # P = (1/4, 3/4) against T = (1/2, 1/2) in both rows: log(3) / 4 each
    A, B = torch.ones(1, 1, 2, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    loss, *_ = run([A, B, A, 0 * B], torch.tensor([2]), 1.0, device)
    assert_close(loss, torch.full((1, 1), math.log(3) / 2), 1e-6)
