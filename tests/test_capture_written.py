"""What a model does to scores and masks: factors of masks, scales after them, NaN, writes after the softmax."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attncongruence import cacr_loss
from attncongruence.capture import CapturedAttention, capture_attention
from attncongruence.capture.product import Operation
from attncongruence.losses import congruence_loss
from tests.helpers.problems import CASES, CONVENTIONS
from tests.helpers.single_head import Ways, record_of

B, H, N, D, TEXT = 3, 4, 12, 16, 5
REAL = torch.arange(N) < torch.tensor([12, 10, 9])[:, None]
PAD = (~REAL).float()[:, None, None]
"""1 at padding, `(batch, 1, 1, length)`."""


model_of = functools.partial(Ways, shape=(B, H, N, D), seed=1)


def capture(way: object) -> tuple[CapturedAttention, Ways]:
    model = model_of(way)
    return record_of(model), model


def in_place(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.add_(PAD, alpha=-1e4)
    scores.div_(4)
    return scores.softmax(-1)


def several(q: Tensor, k: Tensor) -> Tensor:
    half = torch.arange(N) < N // 2
    mask = (PAD * half) * -10000.0 + (PAD * ~half) * -10000.0
    return ((q @ k.mT + mask) / 4).softmax(-1)


def by_index(q: Tensor, k: Tensor) -> Tensor:
    scores = 1 * q @ k.mT
    scores[PAD.bool().expand_as(scores)] = -1e4
    return (scores / 4).softmax(-1)


PADDED = {
    "alpha": lambda q, k: (torch.add(q @ k.mT, PAD, alpha=-1e4) / 4).softmax(-1),
    "alpha, scaled before": lambda q, k: torch.add(q @ k.mT / 4, PAD, alpha=-1e4).softmax(-1),
    "alpha of a method": lambda q, k: (q @ k.mT / 4).add(PAD, alpha=torch.tensor(-1e4)).softmax(-1),
    "alpha of a subtraction": lambda q, k: torch.sub(q @ k.mT, PAD, alpha=1e4).mul(0.25).softmax(-1),
    "alpha of subtract": lambda q, k: torch.subtract(q @ k.mT / 4, other=PAD, alpha=1e5).softmax(-1),
    "alpha of the scores": lambda q, k: torch.add(-1e4 * PAD, q @ k.mT, alpha=0.25).softmax(-1),
    "minus alpha of the scores": lambda q, k: torch.sub(-1e4 * PAD, -q @ k.mT, alpha=0.25).softmax(-1),
    "in place": in_place,
    "addcmul": lambda q, k: (torch.addcmul(q @ k.mT, PAD, torch.tensor(-1e4)) / 4).softmax(-1),
    "addcmul by a value": lambda q, k: (q @ k.mT).addcmul_(PAD, torch.ones(N), value=-1e4).div(4).softmax(-1),
    "times a number, divided": lambda q, k: ((q @ k.mT - 1e4 * PAD) / math.sqrt(D)).softmax(-1),
    "times a tensor, multiplied": lambda q, k: ((q @ k.mT + PAD * torch.tensor(-10000.0)) * D**-0.5).softmax(-1),
    "divided twice": lambda q, k: ((q @ k.mT - 1e4 * PAD) / 2 / 2).softmax(-1),
    "several": several,
    "two masks": lambda q, k: ((q @ k.mT - 1e4 * PAD - 1e4 * PAD) / 4).softmax(-1),
    "filled, divided": lambda q, k: ((q @ k.mT).masked_fill(PAD.bool(), -1e4) / 4).softmax(-1),
    "where, divided": lambda q, k: (torch.where(PAD.bool(), -1e4, q @ k.mT) / 4).softmax(-1),
    "where by a method": lambda q, k: ((q @ k.mT).where(~PAD.bool(), torch.tensor(-1e4)) / 4).softmax(-1),
    "beta": lambda q, k: (
        torch.baddbmm(
            PAD.expand(B, H, N, N).reshape(B * H, N, N), q.flatten(0, 1), k.flatten(0, 1).mT, beta=-1e4
        ).view(B, H, N, N) / 4
    ).softmax(-1),
    "scaled up": lambda q, k: ((q @ k.mT / 400 - 100 * PAD) * 100).softmax(-1),
    "capped, masked, divided": lambda q, k: ((40 * torch.tanh(q @ k.mT / 40) - 1e4 * PAD) / 4).softmax(-1),
    "masked, shifted, divided": lambda q, k: (lambda s: (s - s.amax(-1, keepdim=True)) / 4)(
        q @ k.mT - 1e4 * PAD
    ).softmax(-1),
    "scale of each head, masked": lambda q, k: (
        (q @ k.mT * torch.linspace(0.5, 1, H).view(H, 1, 1)).add(PAD, alpha=-1e4) / 4
    ).softmax(-1),
}  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_padding_is_padding_however_it_is_written(name):
    record, model = capture(PADDED[name])
    assert torch.equal(record.allowed.expand(B, H, N, N), REAL[:, None, None].expand(B, H, N, N))
    torch.testing.assert_close(record.probs, model())
    ours = cacr_loss(record, TEXT)
    plain = capture(lambda q, k: PADDED[name](q, k))[0].scores
    torch.testing.assert_close(ours, cacr_loss(plain.nan_to_num(neginf=0.0), TEXT, mask=REAL))
    if record.query is not None:
        torch.testing.assert_close(cacr_loss(record, TEXT, impl="streaming"), ours)


def test_followed_masks_leave_queries_and_keys():
    for name in set(PADDED) - {"scaled up"}:
        record, _ = capture(PADDED[name])
        assert (record.query is None) == name.startswith(("capped", "masked,", "scale of")), name


@pytest.mark.parametrize("seed", range(12))
def test_padding_is_padding_in_any_order_of_steps(seed):
    """A sibling drawn at random: scales, ways to mask, a cap, in any order."""
    random = np.random.default_rng(seed)
    low = float(random.choice([-1e4, -1e5, -1e9]))
    masks = [
        lambda s: s + low * PAD,
        lambda s: s.add(PAD, alpha=low),
        lambda s: torch.sub(s, PAD, alpha=-low),
        lambda s: torch.addcmul(s, PAD, PAD, value=low),
        lambda s: s.masked_fill(PAD > 0, low),
        lambda s: torch.where(PAD > 0, low, s),
        lambda s: low * PAD + s,
    ]
    factor = float(random.uniform(0.06, 0.9))
    scales = [lambda s: s * factor, lambda s: s / (1 / factor), lambda s: factor * s, lambda s: s.mul_(factor)]
    steps = [random.choice(masks), *random.choice(scales, 2)]
    order = [lambda s: 30 * torch.tanh(s / 30)] * int(random.integers(0, 2)) + list(random.permutation(steps))

    def way(q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.mT
        for step in order:
            scores = step(scores)
        return scores.softmax(-1)

    record, model = capture(way)
    assert torch.equal(record.allowed.expand(B, H, N, N), REAL[:, None, None].expand(B, H, N, N))
    torch.testing.assert_close(record.probs, model())


def test_a_bias_stays_a_bias_under_any_factor():
    bias = torch.linspace(-2, 2, N)
    for way in (
        lambda q, k: torch.add(q @ k.mT, bias, alpha=3).div(4).softmax(-1),
        lambda q, k: torch.sub(q @ k.mT, bias, alpha=3).softmax(-1),
        lambda q, k: torch.addcmul(q @ k.mT, bias, bias, value=0.5).softmax(-1),
        lambda q, k: torch.sub(bias, q @ k.mT, alpha=0.5).softmax(-1),
        lambda q, k: (-(q @ k.mT).masked_fill(PAD > 0, -1e4)).mul(-1).softmax(-1),
    ):
        record, model = capture(way)
        torch.testing.assert_close(record.probs, model())


def test_a_mask_whose_sign_is_turned_shows_what_it_hid():
    record, model = capture(lambda q, k: ((q @ k.mT + 1e4 * PAD) * -1).softmax(-1))
    assert torch.equal(record.allowed.expand(B, H, N, N), REAL[:, None, None].expand(B, H, N, N))
    torch.testing.assert_close(record.probs, model())


def test_scores_that_may_be_masked_or_not_are_refused():
    record, _ = capture(by_index)
    for read in (lambda: record.scores, lambda: record.allowed, lambda: cacr_loss(record, TEXT)):
        with pytest.raises(RuntimeError, match=r"between -5000 and -300.*mask with -inf, or after the division"):
            read()
    # Far from what the softmax sees in one head, and not in another: a bias.
    slopes = torch.tensor([40.0, 0.1, 0.1, 0.1]).view(H, 1, 1) * torch.arange(N)
    record, model = capture(lambda q, k: torch.tanh(q @ k.mT - slopes.requires_grad_()).softmax(-1))
    assert record.allowed.all()
    torch.testing.assert_close(record.probs, model())


# NaN


def nan_at(*place: int) -> Tensor:
    tensor = torch.zeros(B, 1, N, N)
    tensor[place] = torch.nan
    return tensor


NANS = {
    "float mask": lambda q, k, nan: F.scaled_dot_product_attention(q, k, k, nan - 1e4 * PAD),
    "float mask by hand": lambda q, k, nan: (q @ k.mT / 4 + nan - 1e4 * PAD).softmax(-1),
    "float mask, divided": lambda q, k, nan: ((q @ k.mT + nan - 1e4 * PAD) / 4).softmax(-1),
    "scores that can't be followed": lambda q, k, nan: (torch.tanh(q @ k.mT) + nan - 1e4 * PAD).softmax(-1),
    "scores, then masked": lambda q, k, nan: torch.tanh(q @ k.mT + nan).masked_fill(PAD > 0, -torch.inf).softmax(-1),
}


@pytest.mark.parametrize("name", NANS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_nan_is_not_a_mask(name, everywhere):
    places = [slice(None)] if everywhere else [(1, 0, 2, 3), (1, 0, 2, 7), (1, 0, 8, 7)]
    for place in places:
        nan = torch.full((B, 1, N, N), torch.nan) if everywhere else nan_at(*place)
        record, _ = capture(lambda q, k, nan=nan: NANS[name](q, k, nan))
        for loss, convention in CASES:
            value = congruence_loss(loss, record, TEXT, convention=CONVENTIONS[convention], direction="both")
            assert value.isnan(), (place, loss, convention)


def counted(allowed: Tensor, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Allowed entries of these blocks, in samples with both modalities."""
    text = torch.arange(N) < TEXT
    side = {"L": text, "V": ~text}
    blocks = sum(side[a][:, None] & side[b][None, :] for a, b in names).bool()
    return [tuple(place) for place in (allowed & blocks).nonzero().tolist()]


READS = {"cacr": ("LL", "LV", "VV"), "singular": ("LL", "LV", "VV"), "distributed": ("LL", "LV", "VL")}


@pytest.mark.parametrize("kind", ["tokens", "pairs", "none"])
@pytest.mark.parametrize(("name", "convention"), CASES)
def test_a_nan_at_any_allowed_entry_that_a_loss_reads_is_a_nan_loss(name, convention, kind):
    random = torch.Generator().manual_seed(3)
    S = torch.randn(B, H, N, N, generator=random, dtype=torch.float64)
    allowed = torch.ones(B, H, N, N, dtype=torch.bool)
    if kind != "none":
        allowed = allowed & REAL[:, None, None] & REAL[:, None, :, None]
    if kind == "pairs":
        allowed = allowed & (torch.rand(B, 1, N, N, generator=random) < 0.8)
    # On raw scores and under pairs, an entry of LL is compared only where R has one.
    raw = kind == "pairs" and convention != "RELEASED"
    places = counted(allowed, READS[name][raw:])
    for i in torch.randperm(len(places), generator=random)[:25].tolist():
        scores = S.clone()
        scores[places[i]] = torch.nan
        value = congruence_loss(
            name,
            scores,
            TEXT,
            mask=None if kind == "none" else allowed,
            convention=CONVENTIONS[convention],
            direction="language",
        )
        assert value.isnan(), places[i]


@pytest.mark.parametrize(("name", "convention"), CASES)
@pytest.mark.parametrize("side", ["query", "key", "scale"])
def test_a_nan_in_queries_or_keys_is_a_nan_loss_in_both_forms(name, convention, side):
    random = torch.Generator().manual_seed(4)
    for position in (0, 3, TEXT, N - 1):
        q, k = (torch.randn(B, H, N, D, generator=random) for _ in range(2))
        if side != "scale":
            (q if side == "query" else k)[1, 2, position, 5] = torch.nan
        masks = ((torch.full((), torch.nan).expand(B, 1, N, N), 1.0),) if side == "scale" else ()
        record = CapturedAttention("layer", Operation(query=q, key=k, masks=masks))
        for impl in ("dense",) if side == "scale" else ("dense", "streaming"):
            for mask in (None, torch.arange(N).expand(B, N) != 4):
                value = congruence_loss(
                    name, record, TEXT, mask=mask, convention=CONVENTIONS[convention], direction="both", impl=impl
                )
                assert value.isnan(), (position, impl)


# Writes after the softmax


def overwritten(write: object) -> object:
    """A way whose scores the model writes to after its softmax."""

    def way(q: Tensor, k: Tensor, opaque: bool) -> Tensor:
        scores = q @ k.mT / 4
        scores = 3 * torch.tanh(scores) if opaque else scores
        probs = scores.softmax(-1)
        write(scores, probs)
        return probs

    return way


WRITES = {
    "times": lambda scores, probs: scores.mul_(0.5),
    "copy": lambda scores, probs: scores.copy_(probs),
    "index": lambda scores, probs: scores.__setitem__((..., 0), 0.0),
    "a view": lambda scores, probs: scores.view(-1).fill_(0.0),
    "detached": lambda scores, probs: scores.detach().zero_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_scores_that_are_written_to_after_the_softmax_are_made_again_or_refused(name):
    way = overwritten(WRITES[name])
    record, model = capture(lambda q, k: way(q, k, False))
    expected = model.q @ model.k.mT / 4
    torch.testing.assert_close(record.scores, expected)
    grads = [torch.autograd.grad(s.square().sum(), model.q)[0] for s in (record.scores, expected)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(record[[1]].probs, expected[[1]].softmax(-1))

    record, _ = capture(lambda q, k: way(q, k, True))
    for read in (
        lambda: record.scores,
        lambda: record.allowed,
        lambda: record.probs,
        lambda: record[0],
        lambda: cacr_loss(record, TEXT),
    ):
        with pytest.raises(RuntimeError, match=r"has written to the scores of this record.*clone\(\)"):
            read()
    assert record.lengths == (N, N)


def test_scores_that_were_read_before_the_write_stay_right():
    kept = []

    def way(q: Tensor, k: Tensor) -> Tensor:
        kept.append(3 * torch.tanh(q @ k.mT))
        return kept[0].softmax(-1)

    record, _ = capture(way)
    before = record.scores.clone()
    kept[0].detach().zero_()
    assert torch.equal(record.scores, before)
    torch.testing.assert_close(record.probs, before.softmax(-1))


@pytest.mark.parametrize("which", ["queries", "keys", "masks"])
def test_queries_keys_and_masks_that_are_written_to_since_are_refused(which):
    kept = {}

    def way(q: Tensor, k: Tensor) -> Tensor:
        kept.update(queries=q, keys=k, masks=-1e4 * PAD)
        return F.scaled_dot_product_attention(q, k, k, kept["masks"])

    record, _ = capture(way)
    written = kept[which].detach()
    record.key  # noqa: B018
    written[0] += 1
    for read in (lambda: record.query, lambda: record.key, lambda: record[:1], lambda: cacr_loss(record, TEXT)):
        with pytest.raises(RuntimeError, match=rf"has written to the {which} of this record"):
            read()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("name", [*WRITES, "out"])
def test_for_analysis_scores_are_copied_before_they_are_written_to(name, opaque, context):
    def way(q: Tensor, k: Tensor) -> Tensor:
        if name == "out":
            scores = q @ k.mT / 4
            scores = 3 * torch.tanh(scores) if opaque else scores
            return torch.softmax(scores, -1, out=scores)
        return overwritten(WRITES[name])(q, k, opaque)

    model = model_of(way)
    with capture_attention(model, model, analysis=True) as captured, context():
        model()
        record = captured.pop()
    scores = (model.q @ model.k.mT / 4).detach()
    torch.testing.assert_close(record.scores, 3 * torch.tanh(scores) if opaque else scores)


def test_for_analysis_a_cache_of_keys_may_be_written_to_between_the_steps():
    cache = torch.zeros(1, 2, 5, 4)

    class Steps(nn.Module):
        def forward(self, x: Tensor, step: int) -> Tensor:
            cache[:, :, step] = x[:, :, 0]
            mask = torch.arange(5).expand(1, 1, 1, 5) <= step
            return F.scaled_dot_product_attention(x, cache, cache, mask)

    model = Steps()
    for context in (torch.no_grad, torch.inference_mode):
        cache = torch.zeros(1, 2, 5, 4)
        xs = torch.randn(5, 1, 2, 1, 4)
        with capture_attention(model, "", analysis=True) as captured, context():
            for step in range(5):
                model(xs[step], step)
            for step, record in enumerate(captured.pop_all()):
                seen = xs[: step + 1, 0, :, 0].transpose(0, 1)
                torch.testing.assert_close(record.scores[0, ..., : step + 1], xs[step, 0] @ seen.mT / 2)


def test_copies_of_a_record_are_as_good():
    for way in (in_place, PADDED["capped, masked, divided"]):
        model = model_of(way)
        with capture_attention(model, model, analysis=True) as captured, torch.no_grad():
            model()
            record = captured.pop()
        for twin in (copy.deepcopy(record), pickle.loads(pickle.dumps(record)), record[:], record[list(range(B))]):
            assert torch.equal(twin.scores, record.scores)
            assert torch.equal(twin.allowed.expand(B, H, N, N), record.allowed.expand(B, H, N, N))
            assert torch.equal(cacr_loss(twin, TEXT), cacr_loss(record, TEXT))


# Samples


@pytest.mark.parametrize("way", [PADDED["beta"], PADDED["capped, masked, divided"], PADDED["in place"]])
def test_any_integer_is_one_sample(way):
    record, _ = capture(way)
    for one in (
        1,
        np.int64(1),
        np.uint8(1),
        torch.tensor(1),
        torch.tensor([1]),
        np.array(1),
        np.array([1]),
        [np.int64(1)],
    ):
        picked = record[one]
        assert picked.shape == (1, H, N, N)
        assert torch.equal(picked.scores, record[1].scores)
        assert torch.equal(picked.allowed.expand(1, H, N, N), record.allowed.expand(B, H, N, N)[1:2])
    for mask in (
        np.array([True, False, True]),
        torch.tensor([True, False, True]),
        [True, False, True],
        [0, 2],
        slice(0, 3, 2),
    ):
        assert torch.equal(record[mask].scores, record.scores[[0, 2]])
    assert torch.equal(record[...].scores, record.scores)
    assert record[[]].shape == (0, H, N, N)
    assert torch.equal(record[-1].scores, record.scores[2:])
    assert len([sample.shape for sample in record]) == B


@pytest.mark.parametrize(
    "wrong",
    [True, np.True_, torch.tensor(True), None, {}, 1.0, torch.tensor(1.0), (0, 1), torch.zeros(2, 2).long(), "ids"],
    ids=repr,
)
def test_what_is_no_choice_of_samples_is_refused(wrong):
    record, _ = capture(PADDED["alpha"])
    with pytest.raises(TypeError, match="a record is indexed by samples, not by"):
        record[wrong]


@pytest.mark.parametrize("outside", [3, -4, np.int64(7)])
def test_a_sample_outside_of_the_batch_is_an_index_error(outside):
    record, _ = capture(PADDED["alpha"])
    with pytest.raises(IndexError, match=f"sample {outside} is not among the 3 of the batch"):
        record[outside]
