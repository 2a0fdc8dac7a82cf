"""The streaming form: the dense form's numbers, from tiles of any size, in linear memory."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from attncongruence import (
    PRINTED,
    RELEASED,
    WEIGHTED_MEAN,
    AttentionBlocks,
    Convention,
    QueryKey,
    TokenLayout,
    cacr_loss,
    capture_attention,
    iais_loss,
    losses,
    split_attention,
)
from attncongruence.streaming import per_sample
from tests.helpers.problems import (
    CASES,
    CONVENTIONS,
    DIRECTIONS,
    KINDS,
    LOSSES,
    Problem,
    assert_close,
    fast,
    make_problem,
    pairwise,
    randn,
    set_tiles,
    slow,
)

every_case = pytest.mark.parametrize(("name", "convention"), CASES)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few rows: of 9 rows, 2 or 3 at a time."""
    set_tiles(monkeypatch, 700)


def queries_and_keys(S, width=3, heads=None, seed=0, dtype=torch.float64):
    """For the sequence of some scores: `(batch, heads, length, width)` twice."""
    shape = S.shape[0], heads or S.shape[1], S.shape[-1], width
    return [randn(*shape, seed=seed + i, dtype=dtype).requires_grad_() for i in range(2)]


def value_and_grads(loss, q, k):
    """A loss of `QueryKey(q, k)`, each sample with a weight of its own, and its gradients."""
    value = loss(QueryKey(q, k, 0.8))
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype).view_as(value)
    return value.detach(), *torch.autograd.grad((value * weights).sum(), (q, k))


def assert_streaming_is_dense(loss, q, k, tolerance=1e-10):
    dense = value_and_grads(lambda source: loss(source, impl="dense"), q, k)
    ours = value_and_grads(lambda source: loss(source, impl="streaming"), q, k)
    for a, b in zip(ours, dense, strict=True):
        assert_close(a, b, tolerance)
    return ours


# ---------------------------------------------------------------- equals the dense form


@pytest.mark.parametrize(
    ("name", "convention", "direction", "kind"), [(*case, *rest) for case, *rest in pairwise(CASES, DIRECTIONS, KINDS)]
)
@settings(max_examples=4)
@given(data=st.data())
def test_streaming_is_dense(name, convention, direction, kind, data):
    problem: Problem = make_problem(
        kind,
        4,
        seed=data.draw(st.integers(0, 2**20)),
        batch=data.draw(st.integers(1, 3)),
        heads=data.draw(st.integers(1, 3)),
        n=data.draw(st.integers(1, 13)),
        m=data.draw(st.integers(1, 13)),
    )
    q, k = queries_and_keys(problem.S, width=data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 99)))
    reduction = data.draw(st.sampled_from(["none", "sum", "mean"]))

    def loss(source, **options):
        return fast(
            name,
            source,
            problem.n_text,
            mask=problem.mask,
            convention=convention,
            direction=direction,
            reduction=reduction,
            **options,
        )

    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, data.draw(st.sampled_from([1, 500, 2000, 10**6])))
        assert_streaming_is_dense(loss, q, k)


OWN = [
    Convention(blocks, heads, E, detached, 0.7, target, iais, rows)
    for blocks, heads, E, detached, target, iais, rows in itertools.product(
        ("probabilities", "scores"),
        ("mean_map", "mean_loss"),
        ("block", "softmax"),
        (True, False),
        (True, False),
        (True, False),
        ("mean", "sum"),
    )
    if blocks == "probabilities" or (target and iais)
]


@pytest.mark.parametrize("name", LOSSES)
def test_any_convention_of_ones_own(name, small_tiles):
    loss, _, extra, _ = LOSSES[name]
    for number, convention in enumerate(OWN):
        if name == "distributed" and convention.blocks == "scores":
            continue
        n, m = ((4, 7), (7, 4))[number % 2]
        problem = make_problem("ragged", 4, seed=number, batch=3, n=n, m=m)
        q, k = queries_and_keys(problem.S, seed=number)
        for direction in DIRECTIONS:
            assert_streaming_is_dense(
                lambda source, c=convention, d=direction, p=problem, **o: loss(
                    source, p.n_text, mask=p.mask, convention=c, direction=d, reduction="none", **extra, **o
                ),
                q,
                k,
            )


@pytest.mark.parametrize(
    ("name", "convention", "direction"), [(*case, way) for case, way in zip(CASES, 3 * DIRECTIONS, strict=False)]
)
def test_streaming_is_algorithm_1(name, convention, direction, small_tiles):
    problem = make_problem("interleaved", 4, seed=3, n=4, m=5)
    q, k = queries_and_keys(problem.S)

    def loss(source, **options):
        return fast(name, source, problem.n_text, convention=convention, direction=direction, **options)

    expected = value_and_grads(
        lambda s: slow(name, s, problem.n_text, convention=convention, direction=direction), q, k
    )
    ours = value_and_grads(lambda s: loss(s, impl="streaming"), q, k)
    for a, b in zip(ours, expected, strict=True):
        assert_close(a, b, 1e-10)


@every_case
def test_gradcheck(name, convention, small_tiles):
    problem = make_problem("interleaved", 4, seed=11, n=3, m=4)
    attached = replace(CONVENTIONS[convention], detach_equivalence=False)
    loss, _, extra, _ = LOSSES[name]
    q, k = queries_and_keys(problem.S)
    assert torch.autograd.gradcheck(
        lambda q, k: loss(
            QueryKey(q, k), problem.n_text, convention=attached, reduction="none", impl="streaming", **extra
        ),
        (q, k),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_queries(groups):
    q, k = randn(2, 4, 9, 3, seed=1).requires_grad_(), randn(2, groups, 9, 3, seed=2).requires_grad_()
    for convention in CONVENTIONS.values():
        both = []
        for impl in ("dense", "streaming"):
            loss = cacr_loss(QueryKey(q, k), 4, convention=convention, impl=impl)
            both.append((loss, *torch.autograd.grad(loss, (q, k))))
        repeated = k.repeat_interleave(4 // groups, 1)
        assert_close(both[0][0], cacr_loss(3**-0.5 * q @ repeated.mT, 4, convention=convention), 1e-12)
        for a, b in zip(*both, strict=True):
            assert_close(b, a, 1e-11)


def test_queries_and_keys_are_their_scores():
    q, k = queries_and_keys(torch.zeros(2, 2, 9, 9))
    for scale, factor in ((None, 3**-0.5), (0.2, 0.2), (1, 1.0)):
        source = QueryKey(q, k, scale)
        assert_close(source.scores, factor * q @ k.mT, 1e-15)
        assert_close(cacr_loss(QueryKey(q, k, scale), 4), cacr_loss(factor * q @ k.mT, 4), 1e-14)


# ---------------------------------------------------------------- padding, extremes, precision


@every_case
def test_padding_changes_nothing(name, convention, small_tiles):
    problem = make_problem("ragged", 4, seed=4, batch=3, n=5, m=6)
    padding = ~(problem.text | problem.image)
    assert padding.any()
    q, k = (x.detach() for x in queries_and_keys(problem.S))
    results = []
    for value in (0.0, float("nan"), float("inf"), 1e30):
        dirty = [x.masked_fill(padding[:, None, :, None], value).requires_grad_() for x in (q, k)]
        results.append(
            value_and_grads(
                lambda s: fast(
                    name,
                    s,
                    problem.n_text,
                    mask=problem.mask,
                    convention=convention,
                    reduction="none",
                    impl="streaming",
                ),
                *dirty,
            )
        )
    for dirty in results[1:]:
        for clean, ours in zip(results[0], dirty, strict=True):
            assert torch.equal(clean, ours)
            assert torch.isfinite(ours).all()
        for grad in dirty[1:]:
            assert (grad.mT[padding[:, None, None].expand_as(grad.mT)] == 0).all()


@every_case
def test_nan_is_passed_on(name, convention):
    for where in ("query of an image token", "key of an image token", "query of a text token"):
        q, k = (x.detach().clone() for x in queries_and_keys(torch.zeros(1, 2, 9, 9)))
        (k if "key" in where else q)[0, 1, 6 if "image" in where else 2, 0] = float("nan")
        for impl in ("dense", "streaming"):
            assert fast(name, QueryKey(q, k), 4, convention=convention, impl=impl).isnan(), where


@every_case
def test_finite_at_extreme_logits(name, convention):
    # Scores of +-200 in float32: most probabilities are exactly 0.
    signs = [torch.where(randn(2, 3, 9, 4, seed=seed) > 0, 1.0, -1.0).float().requires_grad_() for seed in (0, 1)]
    assert (50 * (signs[0] @ signs[1].mT)).abs().max() == 200

    def loss(source, **options):
        return fast(name, QueryKey(source.query, source.key, 50.0), 4, convention=convention, **options)

    for way in DIRECTIONS:
        dense, ours = (
            value_and_grads(lambda s, i=impl, d=way: loss(s, impl=i, direction=d), *signs)
            for impl in ("dense", "streaming")
        )
        for a, b in zip(ours, dense, strict=True):
            assert torch.isfinite(a).all()
            assert_close(a, b, 1e-5)


@every_case
def test_a_missing_modality_costs_exactly_nothing(name, convention):
    q, k = (torch.full((2, 2, 6, 3), float("nan"), dtype=torch.float64, requires_grad=True) for _ in range(2))
    neither = TokenLayout(*[torch.zeros(2, 6, dtype=torch.bool)] * 2)
    for n_text, reduction in itertools.product((0, 6, torch.tensor([0, 6]), neither), ("none", "mean")):
        value, *grads = value_and_grads(
            lambda s, n=n_text, r=reduction: fast(name, s, n, convention=convention, reduction=r, impl="streaming"),
            q,
            k,
        )
        assert (value == 0).all()
        assert all((grad == 0).all() for grad in grads)


def test_equal_maps_cost_nothing():
    # One image token for each text token, with its query and key: E is one-hot as temperature falls, R = LL.
    half = 20 * torch.eye(5, dtype=torch.float64) + randn(5, 5)
    q = k = torch.cat([half, half])[None, None]
    sharp = replace(WEIGHTED_MEAN, temperature=1e-3)
    assert cacr_loss(QueryKey(q, k), 5, convention=sharp, impl="streaming") == pytest.approx(0, abs=1e-12)
    k = torch.cat([half, half.flip(0)])[None, None]
    assert cacr_loss(QueryKey(q, k), 5, convention=sharp, impl="streaming") > 1


@every_case
def test_half_precision_errs_no_more_than_dense(name, convention):
    q, k = (randn(4, 4, 40, 16, seed=seed) for seed in (0, 1))
    exact = fast(name, QueryKey(q, k), 10, convention=convention, reduction="none", impl="dense")
    for dtype in (torch.bfloat16, torch.float16):
        dense, ours = (
            fast(name, QueryKey(q.to(dtype), k.to(dtype)), 10, convention=convention, reduction="none", impl=impl)
            for impl in ("dense", "streaming")
        )
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1.01 * (dense - exact).norm()


@every_case
def test_single_precision_errs_no_more_than_dense(name, convention):
    q, k = (randn(4, 4, 60, 16, seed=seed).float() for seed in (0, 1))
    exact = fast(name, QueryKey(q.double(), k.double()), 10, convention=convention, reduction="none", impl="dense")
    dense, ours = (
        (fast(name, QueryKey(q, k), 10, convention=convention, reduction="none", impl=impl) - exact).norm()
        for impl in ("dense", "streaming")
    )
    assert ours <= 2 * dense + 1e-6 * exact.norm()


# ---------------------------------------------------------------- autograd, autocast


@every_case
def test_a_second_derivative_is_refused(name, convention):
    q, k = queries_and_keys(torch.zeros(1, 2, 9, 9))
    loss = fast(name, QueryKey(q, k), 4, convention=convention, impl="streaming")
    first = torch.autograd.grad(loss, (q, k), create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative .* impl='dense'"):
        torch.autograd.grad(sum(x.sum() for x in first), (q, k))


@every_case
def test_gradients_of_frozen_queries_are_not_asked_for(name, convention):
    q, k = queries_and_keys(torch.zeros(1, 2, 9, 9))
    whole = torch.autograd.grad(fast(name, QueryKey(q, k), 4, convention=convention, impl="streaming"), k)[0]
    ours = torch.autograd.grad(fast(name, QueryKey(q.detach(), k), 4, convention=convention, impl="streaming"), k)[0]
    assert torch.equal(ours, whole)
    with torch.no_grad():
        assert not fast(name, QueryKey(q, k), 4, convention=convention, impl="streaming").requires_grad


@every_case
def test_autocast_changes_nothing(name, convention):
    q, k = queries_and_keys(torch.zeros(2, 2, 9, 9), dtype=torch.float32)
    expected = value_and_grads(lambda s: fast(name, s, 4, convention=convention, impl="streaming"), q, k)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fast(name, QueryKey(q, k, 0.8), 4, convention=convention, impl="streaming")
    assert loss.dtype == torch.float32
    for a, b in zip((loss, *torch.autograd.grad(loss, (q, k))), expected, strict=True):
        assert torch.equal(a, b)


@every_case
def test_backward_inside_autocast_rounds_at_most(name, convention):
    q, k = queries_and_keys(torch.zeros(2, 2, 9, 9), dtype=torch.float32)
    _, *expected = value_and_grads(lambda s: fast(name, s, 4, convention=convention, impl="streaming"), q, k)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            loss = fast(name, QueryKey(q, k, 0.8), 4, convention=convention, impl="streaming")
            ours = torch.autograd.grad(loss, (q, k))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * float(b.abs().max()))


# ---------------------------------------------------------------- from a model; which form is taken


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return BertModel(config).eval()


@pytest.mark.needs("transformers>=4.30")
@every_case
def test_a_captured_layer_with_padding(name, convention):
    model, ids = bert(), torch.arange(20).view(2, 10)
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    results = []
    for impl in ("dense", "streaming"):
        with capture_attention(model) as capture:
            model(input_ids=ids, attention_mask=mask)
            loss = fast(name, capture.pop(), 4, convention=convention, impl=impl)
        model.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-6)


def taken(monkeypatch, loss):
    """Which form a loss takes."""
    seen = []
    original = losses.per_sample
    monkeypatch.setattr(losses, "per_sample", lambda *args: seen.append("streaming") or original(*args))
    loss()
    return seen or ["dense"]


def test_auto_takes_the_form_that_pays(monkeypatch):
    q, k = queries_and_keys(torch.zeros(1, 1, 9, 9))
    monkeypatch.setattr(losses, "SHORTEST", 0)
    for pays in (True, False):
        monkeypatch.setattr(per_sample, "pays", lambda *args, p=pays: p)
        expected = "streaming" if pays else "dense"
        assert taken(monkeypatch, lambda: cacr_loss(QueryKey(q, k), 4)) == [expected]
        assert taken(monkeypatch, lambda: cacr_loss(QueryKey(q, k), 4, impl="dense")) == ["dense"]
        assert taken(monkeypatch, lambda: cacr_loss(QueryKey(q, k).scores, 4)) == ["dense"]
        assert taken(monkeypatch, lambda: iais_loss(QueryKey(q, k), 4)) == [expected]
        # Pairs that may not attend have no low-rank form; the same pairs for all queries are only padding.
        causal = torch.ones(1, 9, 9, dtype=torch.bool).tril()
        assert taken(monkeypatch, lambda c=causal: cacr_loss(QueryKey(q, k), 4, mask=c, direction="vision")) == [
            "dense"
        ]
        padding = (torch.arange(9) < 7).expand(1, 1, 9, 9)
        for mask in (padding, padding.contiguous()):
            assert taken(monkeypatch, lambda m=mask: cacr_loss(QueryKey(q, k), 4, mask=m)) == [expected]
            assert_close(
                cacr_loss(QueryKey(q, k), 4, mask=mask), cacr_loss(QueryKey(q, k), 4, mask=mask[:, 0, 0]), 1e-14
            )


def test_auto_pays_where_the_map_leaves_the_cache(monkeypatch):
    set_tiles(monkeypatch, 4 * 4 * 256**2)
    for batch, longest, raw, probabilities in (
        (1, (44, 256), False, False),
        (2, (44, 256), True, False),
        (2, (256, 44), True, False),
        (8, (44, 256), True, False),
        (9, (44, 256), True, True),
        (9, (45, 255), False, False),
    ):
        query = torch.empty(batch, 1, 300, 8)
        assert per_sample.pays(query, longest, WEIGHTED_MEAN) == raw
        assert per_sample.pays(query, longest, RELEASED) == probabilities
        assert per_sample.pays(query.half(), longest, WEIGHTED_MEAN) == raw  # the map is float32 then, too


CAUSAL = torch.ones(1, 9, 9, dtype=torch.bool).tril()
Q, K = (x.detach() for x in queries_and_keys(torch.zeros(1, 2, 9, 9)))


class Biased(QueryKey):
    """A layer that adds something to its scores."""

    query = None


@pytest.mark.parametrize(
    ("attention", "n_text", "mask", "message"),
    [
        (QueryKey(Q, K).scores, 4, None, "it was given scores, not queries and keys"),
        (split_attention(QueryKey(Q, K).scores, 4), None, None, "AttentionBlocks hold scores, not queries and keys"),
        (AttentionBlocks.from_streams(LL=Q @ K.mT, LV=Q @ K.mT, VV=Q @ K.mT), None, None, "AttentionBlocks"),
        (Biased(Q, K), 4, None, r"no query and key, as a layer whose model adds a bias"),
        (QueryKey(Q, K), 4, CAUSAL, r"which pairs may attend .*impl='auto'"),
        (QueryKey(Q, K), 10, None, "n_text=10 is out of range"),
        (QueryKey(Q, K), None, None, "n_text is missing"),
    ],
)
def test_rejects_what_it_cannot_stream(attention, n_text, mask, message):
    for loss in (cacr_loss, iais_loss):
        with pytest.raises(ValueError, match=message):
            loss(attention, n_text, mask=mask, impl="streaming")


@pytest.mark.parametrize(
    ("query", "key", "error", "message"),
    [
        (Q, K[:, :, :8], ValueError, "length"),
        (Q, K[..., :2], ValueError, "width"),
        (Q[0], K[0], ValueError, "batch heads length width"),
        (Q, K.expand(-1, 2, -1, -1).repeat(1, 2, 1, 1)[:, :3], ValueError, "query has 2 heads and key 3"),
        (Q, K.float(), ValueError, "query is torch.float64 and key torch.float32"),
        (Q, K.to("meta"), ValueError, "query on cpu, key on meta"),
        (Q.long(), K.long(), ValueError, "query"),
    ],
)
def test_rejects_queries_and_keys_that_do_not_fit(query, key, error, message):
    with pytest.raises(error, match=message):
        QueryKey(query, key)


def test_distributed_alignment_of_scores_is_refused():
    with pytest.raises(ValueError, match="the loss 'distributed' is not defined on raw scores"):
        iais_loss(QueryKey(Q, K), 4, alignment="distributed", convention=PRINTED, impl="streaming")


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 1e-6, 1e-8])
def test_low_temperatures_are_as_exact_as_dense(temperature):
    convention = replace(WEIGHTED_MEAN, temperature=temperature)
    assert_as_exact_as_dense(convention, batch=2, n_text=20, n_image=60, spread=1.0, seed=1)


@settings(max_examples=20, deadline=None)
@given(
    st.floats(-9, 1), st.floats(-1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(2, 30), st.integers(0, 99)
)  # fmt: skip
def test_any_temperature_and_spread_of_scores_is_as_exact_as_dense(temperature, spread, batch, n_text, n_image, seed):
    convention = replace(WEIGHTED_MEAN, temperature=10**temperature)
    assert_as_exact_as_dense(convention, batch, n_text, n_image, 10**spread, seed)


def assert_as_exact_as_dense(convention, batch, n_text, n_image, spread, seed):
    """In float32, the streaming form is as near to the dense form in float64 as the dense form in float32."""
    shape = batch, 4, n_text + n_image, 16
    given = [spread**0.5 * randn(*shape, seed=seed + i, dtype=torch.float32) for i in range(2)]
    lengths = torch.randint(1, n_text + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    layout = TokenLayout.from_n_text(lengths, n_text + n_image)

    def value_and_gradients(dtype, impl):
        q, k = (x.to(dtype).requires_grad_() for x in given)
        loss = cacr_loss(QueryKey(q, k, 0.25), layout, convention=convention, impl=impl)
        return torch.cat([loss.detach().view(1), *(x.flatten() for x in torch.autograd.grad(loss, (q, k)))]).double()

    exact = value_and_gradients(torch.float64, "dense")
    dense, streaming = (value_and_gradients(torch.float32, impl) - exact for impl in ("dense", "streaming"))
    assert streaming.norm() <= 3 * dense.norm() + 1e-5 * exact.norm()
