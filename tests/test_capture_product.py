"""From the softmax back to q and k: every way models write `softmax(scale q k^T + mask)`."""

import functools

import pytest
import torch
from torch import Tensor, nn

from attncongruence.capture import CapturedAttention, capture_attention
from attncongruence.capture.trace import AttentionMode
from tests.helpers.single_head import Ways, record_of

B, H, N, D = 2, 3, 5, 4
MASK = torch.zeros(B, 1, 1, N).masked_fill(torch.arange(N) == 4, -1e4)
ALLOWED = (MASK == 0).expand(B, H, N, N)


model_of = functools.partial(Ways, shape=(B, H, N, D), seed=0)


def capture(way: object) -> tuple[CapturedAttention, Ways]:
    model = model_of(way)
    return record_of(model), model


def flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(B * H, N, -1)


def in_place(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    scores /= 2
    scores += MASK
    return scores.softmax(-1)


def folded(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.bmm(flat(q), flat(k).transpose(1, 2)) * 0.5
    scores = scores.view(B, H, N, N) + MASK
    return torch.softmax(scores.view(B * H, N, N), -1)


REPRODUCIBLE = {
    "matmul": lambda q, k: torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / 2 + MASK, dim=-1),
    "scaled query": lambda q, k: ((q / 2) @ k.mT + MASK).softmax(dim=3),
    "scale after": lambda q, k: nn.functional.softmax(torch.mul(0.5, q @ k.mT).add(MASK), -1, dtype=torch.float64),
    "scale by a tensor": lambda q, k: ((q @ k.mT) / torch.sqrt(torch.tensor(4.0)) + MASK).softmax(-1),
    "mask first": lambda q, k: (MASK + (q @ k.mT) * 0.5).softmax(-1),
    "mask then scale": lambda q, k: ((q @ k.mT + 4 * MASK) / 2).softmax(-1),
    "subtract": lambda q, k: (0.5 * (q @ k.mT) - -MASK).softmax(-1),
    "masked_fill": lambda q, k: (q @ k.mT / 2).masked_fill(MASK < 0, torch.finfo(torch.float32).min).softmax(-1),
    "masked_fill_": lambda q, k: (q @ k.mT / 2).masked_fill_(MASK < 0, -1e9).softmax(-1),
    "where allowed": lambda q, k: torch.where(MASK == 0, q @ k.mT / 2, -torch.inf).softmax(-1),
    "where hidden": lambda q, k: torch.where(MASK < 0, torch.tensor(-1e9), q @ k.mT / 2).softmax(-1),
    "in place": in_place,
    "folded": folded,
    "baddbmm": lambda q, k: torch.baddbmm(
        MASK.expand(B, H, N, N).reshape(B * H, N, N), flat(q), flat(k).mT, alpha=0.5
    ).view(B, H, N, N).view(B * H, N, N).softmax(-1),
    "by keyword": lambda q, k: MASK.expand(B, H, N, N).reshape(B * H, N, N).baddbmm(
        batch1=flat(q), batch2=flat(k).mT, beta=1.0, alpha=0.5
    ).view(B, H, N, N).softmax(dim=-1),
    "einsum": lambda q, k: (torch.einsum("bhid,bhjd->bhij", q, k) / 2 + MASK).softmax(-1),
    "einsum of a list": lambda q, k: (torch.einsum("bhid,bhjd->bhij", [q, k]) / 2 + MASK).softmax(-1),
    "einsum, heads last": lambda q, k: (
        torch.einsum("b j h d, b i h d -> b h i j", k.transpose(1, 2), q.transpose(1, 2)) / 2 + MASK
    ).softmax(-1),
    "other dtypes on the way": lambda q, k: ((q @ k.mT).double() / 2 + MASK).type_as(q).contiguous().softmax(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", REPRODUCIBLE)
def test_q_and_k_are_found_and_give_the_scores(name):
    record, model = capture(REPRODUCIBLE[name])
    expected = model.q @ model.k.mT / 2
    assert record.scores.shape == (B, H, N, N)
    torch.testing.assert_close(record.scores, expected.masked_fill(~ALLOWED, -torch.inf))
    assert torch.equal(record.allowed.expand(B, H, N, N), ALLOWED)
    torch.testing.assert_close(record.scale * record.query @ record.key.mT, expected)
    for weight in (model.q, model.k):
        pull = torch.arange(record.scores.numel()).view(record.scores.shape) / 100
        (ours,) = torch.autograd.grad((record.scores[ALLOWED] * pull[ALLOWED]).sum(), weight, retain_graph=True)
        (theirs,) = torch.autograd.grad((expected[ALLOWED] * pull[ALLOWED]).sum(), weight, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


BIAS = torch.linspace(-2, 2, H * N * N).view(1, H, N, N)


def written_behind(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 0] = 1.0
    return scores.softmax(-1)


def clamped_max(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


OPAQUE = {
    "one product, a bias for each head": (
        lambda q, k: (q[:, :1] @ k[:, :1].mT + BIAS).softmax(-1),
        lambda s: s[:, :1] + BIAS,
    ),
    "bias": (lambda q, k: (q @ k.mT + BIAS).softmax(-1), lambda s: s + BIAS),
    "soft cap": (lambda q, k: (5 * torch.tanh(q @ k.mT / 5)).softmax(-1), lambda s: 5 * torch.tanh(s / 5)),
    "row maximum": (lambda q, k: clamped_max(q @ k.mT).softmax(-1), clamped_max),
    "clamp": (lambda q, k: (q @ k.mT).clamp(-1, 1).softmax(-1), lambda s: s.clamp(-1, 1)),
    "clamp, all by keyword": (
        lambda q, k: torch.clamp(input=q @ k.mT, min=-1, max=1).softmax(-1),
        lambda s: s.clamp(-1, 1),
    ),
    "a mask times a small alpha": (
        lambda q, k: torch.add(q @ k.mT, MASK, alpha=0.1).softmax(-1),
        lambda s: s + 0.1 * MASK,
    ),
    "scale per head": (
        lambda q, k: (q @ k.mT * torch.arange(1.0, H + 1).view(H, 1, 1)).softmax(-1),
        lambda s: s * torch.arange(1.0, H + 1).view(H, 1, 1),
    ),
    "low fill": (
        lambda q, k: (q @ k.mT).masked_fill(BIAS < 0, -3.0).softmax(-1),
        lambda s: s.masked_fill(BIAS < 0, -3),
    ),
    "windows": (lambda q, k: (q @ k.mT + MASK / 100).softmax(-1), lambda s: s + MASK / 100),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_scores_alone_where_they_are_more_than_a_product(name):
    way, expected = OPAQUE[name]
    record, model = capture(way)
    assert record.query is None
    assert record.key is None
    torch.testing.assert_close(record.scores, expected(model.q @ model.k.mT))
    assert torch.autograd.grad(record.scores.sum(), model.q)[0].abs().max() > 0


def test_scores_written_to_behind_our_back_lose_their_q_and_k():
    record, model = capture(written_behind)
    assert record.query is None
    expected = (model.q @ model.k.mT).index_fill(-1, torch.tensor([0]), 1.0)
    torch.testing.assert_close(record.scores, expected)


@pytest.mark.parametrize("samples", [1, [1, 0], slice(1, 2), torch.tensor([1]), torch.tensor([False, True])])
@pytest.mark.parametrize("name", ["matmul", "folded", "baddbmm"])
def test_samples_are_picked_from_everything(name, samples):
    record, _ = capture(REPRODUCIBLE[name])
    picked = record[samples]
    rows = [samples] if isinstance(samples, int) else samples
    torch.testing.assert_close(picked.scores, record.scores[rows])
    torch.testing.assert_close(picked.query, record.query[rows])
    torch.testing.assert_close(picked.key, record.key[rows])
    assert torch.equal(picked.allowed.expand(picked.scores.shape), record.allowed.expand(B, H, N, N)[rows])


@pytest.mark.parametrize("way", [in_place, written_behind])
def test_inference_tensors_count_no_writes_so_scores_are_all_that_is_offered(way):
    model = model_of(way)
    with capture_attention(model, model, analysis=True) as captured:
        with torch.inference_mode():
            model()
        record = captured.pop()
        with torch.no_grad():
            model()
        expected = captured.pop()
    assert record.query is None
    torch.testing.assert_close(record.scores, expected.scores)
    assert torch.equal(record.allowed, expected.allowed.expand(record.scores.shape))


def test_a_freed_tensors_id_tells_nothing_of_the_next():
    # Dropout in eval hands its own argument through; if that argument has the id of freed probabilities, it must not
    # become probabilities itself (seen as a last layer that went missing, one run in six).
    mode = AttentionMode()
    query, key = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 3)
    scores = query @ key.mT
    mode.follow("matmul", (query, key.mT), {}, scores)
    probs = scores.softmax(-1)
    mode.follow("softmax", (scores,), {"dim": -1}, probs)
    hidden = torch.randn(2, 5, 12)
    mode._made[id(hidden)] = mode._made[id(probs)]
    del probs
    mode.follow("dropout", (hidden,), {}, hidden)
    assert mode._known(hidden) is None
