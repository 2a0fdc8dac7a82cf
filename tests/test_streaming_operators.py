"""The two operators of the streaming form: a low-rank KL and a mean map, from tiles of any size."""

import itertools

import pytest
import torch

from attncongruence import symmetric_kl
from attncongruence.divergence import distributed_kl
from attncongruence.streaming import operators
from attncongruence.streaming.low_rank import low_rank_kl
from attncongruence.streaming.mean_map import mean_map
from tests.helpers.problems import assert_close, pairwise, randn, set_tiles


def factors(batch=3, heads=2, n=9, width=4, lengths=(9, 0, 5)):
    lengths = torch.tensor(lengths)
    real = torch.arange(n) < lengths[:, None]
    made = [randn(batch, heads, n, width, seed=seed) * real[:, None, :, None] for seed in range(4)]
    return [x.requires_grad_() for x in made], lengths


def low_rank_by_hand(A, B, C, D, lengths, scale):
    each = []
    for sample, n in enumerate(lengths.tolist()):
        a, b, c, d = (x[sample, :, :n] for x in (A, B, C, D))
        each.append(
            symmetric_kl(scale * a @ b.mT, scale * c @ d.mT).sum(-1)
            if n
            else 0 * sum(x[sample].sum((1, 2)) for x in (A, B, C, D))
        )
    return torch.stack(each)


@pytest.mark.parametrize("lengths", [(9, 0, 5), (9, 9, 9), (1, 1, 0), (0, 0, 0)])
def test_low_rank_kl(monkeypatch, lengths):
    inputs, lengths = factors(lengths=lengths)
    weights = randn(3, 2, seed=9)
    expected = low_rank_by_hand(*inputs, lengths, 0.7)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for cache in (1, 700, 2000, 10**6):
        set_tiles(monkeypatch, cache)
        loss = low_rank_kl(*inputs, lengths, 0.7)
        assert_close(loss, expected, 1e-13)
        for ours, theirs in zip(torch.autograd.grad((loss * weights).sum(), inputs), wanted, strict=True):
            assert_close(ours, theirs, 1e-13)


def map_inputs(n=9, lengths=(9, 0, 5)):
    lengths = torch.tensor(lengths)
    real = (torch.arange(n) < lengths[:, None]).double()
    q, k = (randn(3, 2, n, 2, seed=seed) * real[:, None, :, None] for seed in (0, 1))
    E, G = randn(3, 4, n, seed=2).softmax(-1) * real[:, None], randn(3, n, 3, seed=3).softmax(-1) * real[..., None]
    F = randn(3, n, 3, seed=4).softmax(-1) * real[..., None]
    return [x.requires_grad_() for x in (q, k, E, F, G)], lengths


def map_by_hand(q, k, E, F, G, lengths, target):
    R, losses = [], []
    for sample, n in enumerate(lengths.tolist()):
        T = (0.7 * q[sample, :, :n] @ k[sample, :, :n].mT).softmax(-1).mean(0)
        R.append(E[sample, :, :n] @ T @ E[sample, :, :n].mT)
        X = F[sample, :n] @ G[sample, :n].mT
        rows = {
            "softmax": lambda X=X, T=T: symmetric_kl(X, T),
            "log": lambda X=X, T=T: symmetric_kl(X, T.log()),
            "distributed": lambda X=X, T=T: distributed_kl(X, T, 1e-3),
        }
        losses.append(rows[target]().sum())
    return torch.stack(R), torch.stack(losses)


@pytest.mark.parametrize(
    ("cache", "target", "asked"),
    pairwise((1, 1500, 4000, 10**6), ("softmax", "log", "distributed"), ("both", "projection", "divergence")),
)
def test_mean_map(monkeypatch, cache, target, asked):
    set_tiles(monkeypatch, cache)
    inputs, lengths = map_inputs()
    q, k, E, F, G = inputs
    R, loss = mean_map(
        q,
        k,
        None if asked == "divergence" else E,
        *((None, None) if asked == "projection" else (F, G)),
        lengths,
        0.7,
        target,
        1e-3,
    )
    expected_R, expected = map_by_hand(*inputs, lengths, target)
    ours, theirs = [], []
    if asked != "divergence":
        assert_close(R, expected_R, 1e-13)
        ours.append((R * randn(*R.shape, seed=7)).sum())
        theirs.append((expected_R * randn(*R.shape, seed=7)).sum())
    if asked != "projection":
        assert_close(loss, expected, 1e-12)
        ours.append((loss * randn(3, seed=8)).sum())
        theirs.append((expected * randn(3, seed=8)).sum())
    used = {"both": inputs, "projection": inputs[:3], "divergence": [q, k, F, G]}[asked]
    for a, b in zip(torch.autograd.grad(sum(ours), used), torch.autograd.grad(sum(theirs), used), strict=True):
        assert_close(a, b, 1e-12)


def test_operators_pass_gradcheck(monkeypatch):
    set_tiles(monkeypatch, 700)
    inputs, lengths = factors(heads=1, n=4, width=2, lengths=(4, 0, 3))
    assert torch.autograd.gradcheck(lambda *x: low_rank_kl(*x, lengths, 0.7), inputs)
    inputs, lengths = map_inputs(n=4, lengths=(4, 1, 3))
    for target in ("softmax", "log", "distributed"):
        assert torch.autograd.gradcheck(lambda *x, t=target: mean_map(*x, lengths, 0.7, t, 1e-3), inputs)


def test_tiles_cover_every_row_of_every_map_once(monkeypatch):
    for maps, n, size in itertools.product((1, 2, 5), (1, 7, 600), (1, 5000, 10**6)):
        set_tiles(monkeypatch, size)
        cut = operators.Tiles(maps, n, 4, torch.zeros(1))
        seen = torch.zeros(maps, n)
        for which, rows in cut:
            seen[which, rows] += 1
            buffers = cut.buffers(which, rows)
            assert [tuple(x.shape) for x in buffers] == [(which.stop - which.start, rows.stop - rows.start, n)] * 4
            spans = sorted((x.data_ptr(), x.data_ptr() + 4 * x.numel()) for x in buffers)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
            # No more than the cache holds, but for a single row.
            assert 16 * buffers[0].numel() <= max(size, 16 * n)
        assert (seen == 1).all()


def test_tiles_are_made_for_the_cache_of_this_machine():
    assert 2**16 <= operators.cache_bytes(torch.device("cpu")) <= 2**24
