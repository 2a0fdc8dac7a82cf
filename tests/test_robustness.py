"""Fuzzing: whatever comes in, a right result, by an oracle of its own, or an error that names the argument.

In the suite there are about 100 examples, the same ones every time; `make fuzz` draws 25 times as many, new ones.
What was found: tests/test_found_by_fuzzing.py and docs/reliability.md.
"""

import math
from collections import Counter
from dataclasses import fields, replace

import torch
from hypothesis import strategies as st

from attncongruence import (
    RELEASED,
    CACRLoss,
    IAISLoss,
    QueryKey,
    TokenLayout,
    argmax_entropy,
    attention_distance,
    cacr_loss,
    exponential_warmup,
    linear_warmup,
    logarithmic_warmup,
    recall_at_k,
    split_attention,
    symmetric_kl,
    winoground_scores,
)
from tests.helpers.fuzzing import FLOATS, HALF, INTEGERS, fuzz, in_memory, outcome, scores, spoiled
from tests.helpers.problems import CASES, CONVENTIONS, DIRECTIONS, LOSSES, assert_close, fast, randn, slow

REDUCTIONS = ("mean", "sum", "none")
FUNCTIONS = {"cacr": "cacr_loss", "singular": "iais_loss", "distributed": "iais_loss"}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}


def sliced(name, case, **options):
    """The oracle in float64: each sample alone, cut to its own tokens; with a mask of pairs, the whole batch."""
    S = case.S.detach().double()
    if case.pairs:
        return slow(name, S, case.n_text, mask=case.mask, reduction="none", **options)
    each = []
    for own, text, image in zip(S, case.text, case.image, strict=True):
        text, image = text.nonzero()[:, 0], image.nonzero()[:, 0]
        kept = torch.cat([text, image])
        alone = own[..., kept[:, None], kept[None, :]][None]
        each.append(slow(name, alone, len(text), **options) if len(text) and len(image) else S.new_zeros(()))
    return torch.stack(each) if each else S.new_zeros(0)


def reduced(each, case, reduction):
    both = (case.text.any(-1) & case.image.any(-1)).sum().clamp(min=1)
    return {"none": each, "sum": each.sum(), "mean": each.sum() / both}[reduction]


@fuzz(28)
def test_losses(data):
    case, (name, convention) = data.draw(scores()), data.draw(st.sampled_from(CASES))
    direction, reduction = data.draw(st.sampled_from(DIRECTIONS)), data.draw(st.sampled_from(REDUCTIONS))
    leaf = case.S.clone().requires_grad_(data.draw(st.booleans()))
    S = leaf * 1 if leaf.requires_grad and data.draw(st.booleans()) else leaf
    before = leaf.detach().clone()
    options = {"convention": convention, "direction": direction}
    as_module = data.draw(st.booleans())

    def call():
        if as_module:
            module = CACRLoss if name == "cacr" else IAISLoss
            made = {"convention": CONVENTIONS[convention], "direction": direction, "reduction": reduction}
            return module(**made, **LOSSES[name][2])(S, case.n_text, case.mask)
        return fast(name, S, case.n_text, mask=case.mask, reduction=reduction, **options)

    # A mask of pairs may hide a whole block, as in causal decoders, and that is refused.
    value = outcome(FUNCTIONS[name], call, valid=None if case.pairs else True)
    assert torch.equal(leaf.detach(), before) or before.isnan().any()
    if value is None:
        return
    work = torch.float64 if S.dtype == torch.float64 else torch.float32
    assert (value.dtype, value.shape) == (work, (S.shape[0],) if reduction == "none" else ())
    saturates = convention == "RELEASED"
    if case.values == "tame" and (name != "singular" or S.dtype == torch.float64):
        # In lower precision the largest of two near scores, which the hard alignment picks, may be the other one.
        assert_close(value.detach().double(), reduced(sliced(name, case, **options), case, reduction), TOLERANCE[work])
    elif case.values == "huge" and saturates:
        assert value.isfinite().all()
    elif case.values == "nan" and direction == "both" and not case.pairs:
        assert value.isnan().any()
    if leaf.requires_grad and (case.values == "tame" or (case.values == "huge" and saturates)):
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        real = case.text | case.image
        used = real[:, :, None] & real[:, None, :]
        assert grad.isfinite().all()
        assert (grad.masked_fill(used if grad.dim() == 3 else used[:, None], 0.0) == 0).all()


@fuzz(14)
def test_spoiled_input_is_refused(data):
    S, where, options = data.draw(spoiled(data.draw(scores())))
    name = data.draw(st.sampled_from(["cacr", "singular", "distributed", "split", "distance", "entropy"]))
    if name in LOSSES:
        read = data.draw(st.sampled_from([fast, slow]))
        asked = FUNCTIONS[name] if read is fast else LOSSES[name][1].__name__
        outcome(asked, lambda: read(name, S, where, **options), valid=False)
        return
    read = {"split": split_attention, "distance": attention_distance, "entropy": argmax_entropy}[name]
    outcome(read.__name__, lambda: read(S, where, **options), valid=False)


@fuzz(4)
def test_unknown_options_are_refused(data):
    name, loss = data.draw(st.sampled_from(["convention", "direction", "reduction", "impl"])), randn(1, 2, 4, 4)
    words = st.text(max_size=4).filter(lambda word: word not in ("both", "mean", "sum", "none", "auto"))
    wrong = data.draw(st.one_of(words, st.integers(), st.none(), st.floats(), st.just([]), st.just(())))
    for read in (fast, slow):
        if name != "convention":
            asked = FUNCTIONS["cacr"] if read is fast else LOSSES["cacr"][1].__name__
            outcome(asked, lambda read=read: read("cacr", loss, 2, **{name: wrong}), valid=False)
    outcome("CACRLoss", lambda: CACRLoss(**{name: wrong}), valid=False)
    if name in ("direction", "reduction"):
        outcome("IAISLoss", lambda: IAISLoss(alignment=wrong), valid=False)
    field = data.draw(st.sampled_from([field.name for field in fields(RELEASED)]))
    outcome("Convention", lambda: replace(RELEASED, **{field: wrong if wrong not in (True, 1) else -1}))


@fuzz(12)
def test_queries_and_keys(data):
    draw = data.draw
    groups, times, width = draw(st.integers(0, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 3))
    batch, length, dtype = draw(st.integers(0, 2)), draw(st.integers(0, 5)), draw(st.sampled_from(FLOATS))
    wrong = draw(st.sampled_from([0, 0, 0, 1]))
    q, k = (
        in_memory(draw, randn(batch, heads, length, width, seed=seed, dtype=dtype)).requires_grad_(draw(st.booleans()))
        for seed, heads in enumerate((groups * times, groups + wrong))
    )
    n = draw(st.integers(0, length))
    where = draw(st.sampled_from([n, torch.full((batch,), n)]))
    scale = draw(st.sampled_from([None, 0.7, 0, -1.0, math.nan, math.inf]))
    mask = draw(st.sampled_from([None, torch.arange(length).expand(batch, length) % 3 != 1]))
    (name, convention), direction = draw(st.sampled_from(CASES)), draw(st.sampled_from(DIRECTIONS))
    options = {"mask": mask, "direction": direction, "reduction": "none"}
    fits = (
        groups and width and (scale is None or math.isfinite(scale)) and not (wrong and times * groups % (groups + 1))
    )

    def call(impl):
        if name == "cacr":
            return cacr_loss(QueryKey(q, k, scale), where, impl=impl, convention=CONVENTIONS[convention], **options)
        return fast(name, QueryKey(q, k, scale), where, impl=impl, convention=convention, **options)

    results = [
        outcome("cacr_loss(QueryKey)", lambda i=i: call(i), valid=bool(fits)) for i in ("auto", "dense", "streaming")
    ]
    if not fits:
        return
    exact = QueryKey(q.detach().double(), k.detach().double(), scale)
    expected = slow(name, exact, where, convention=convention, **options)
    for value in results:
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if name != "singular" or (dtype == torch.float64 and scale != 0):
            assert_close(value.detach().double(), expected, TOLERANCE[value.dtype])
        if value.requires_grad and value.numel():
            for grad in torch.autograd.grad(value.sum(), [x for x in (q, k) if x.requires_grad], allow_unused=True):
                assert grad is None or grad.isfinite().all()


@fuzz(8)
def test_split_attention(data):
    case = data.draw(scores())
    blocks = outcome("split_attention", lambda: split_attention(case.S, case.n_text, mask=case.mask), valid=True)
    for i, (text, image) in enumerate(zip(case.text, case.image, strict=True)):
        own = {"L": (text.nonzero()[:, 0], blocks.text_mask[i]), "V": (image.nonzero()[:, 0], blocks.image_mask[i])}
        for rows, columns in ("LL", "LV", "VL", "VV"):
            (at, kept), (to, kept_to) = own[rows], own[columns]
            expected = case.S[i][..., at[:, None], to[None, :]]
            block = getattr(blocks, rows + columns)[i][..., kept, :][..., kept_to]
            assert torch.equal(block.nan_to_num(0.5), expected.nan_to_num(0.5))


@fuzz(8)
def test_symmetric_kl(data):
    draw = data.draw
    rows, columns, dtype = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.sampled_from(FLOATS))
    scale = draw(st.sampled_from([0.1, 1.0, 20.0, 1e-40, 1e30]))
    if dtype in HALF and scale == 1e30:
        scale = 200.0
    a, b = (in_memory(draw, (scale * randn(rows, columns, seed=seed)).to(dtype)) for seed in (3, 4))
    mask = draw(st.sampled_from([None, randn(rows, columns, seed=5) > 0, randn(columns, seed=6) > 0]))
    reduction = draw(st.sampled_from(REDUCTIONS))
    if draw(st.integers(0, 4)) == 0:
        b = draw(st.sampled_from([b[..., :0], b.long(), b.to_sparse(), b.to("meta"), None, b > 0, b.cfloat(), 3.0]))
        outcome("symmetric_kl", lambda: symmetric_kl(a, b, mask), valid=False if columns else None)
        return
    value = outcome("symmetric_kl", lambda: symmetric_kl(a, b, mask, reduction=reduction), valid=True)
    counted = torch.ones(rows, columns, dtype=torch.bool) if mask is None else mask.expand(rows, columns)
    each = []
    for x, y, own in zip(a.double(), b.double(), counted, strict=True):
        log_p, log_t = x[own].log_softmax(-1), y[own].log_softmax(-1)
        each.append(((log_p.exp() - log_t.exp()) * (log_p - log_t)).sum())
    each = torch.stack(each) if each else torch.zeros(0, dtype=torch.float64)
    expected = {"none": each, "sum": each.sum(), "mean": each.sum() / max(rows, 1)}[reduction]
    assert_close(value.double(), expected, TOLERANCE[value.dtype])


@fuzz(10)
def test_layouts(data):
    draw, integer = data.draw, data.draw(st.sampled_from(INTEGERS))
    batch, length = draw(st.integers(0, 3)), draw(st.integers(0, 5))
    ids = [[draw(st.integers(0, 3)) for _ in range(length)] for _ in range(batch)]
    wanted = draw(st.sampled_from([0, 1, 3, 256, 259, -1, 2**40, 2**63, True]))
    real = [[draw(st.booleans()) for _ in range(length)] for _ in range(batch)]
    mask = torch.tensor(real, dtype=torch.bool).view(batch, length)
    tensor = in_memory(draw, torch.tensor(ids).view(batch, length).to(integer))
    make = draw(st.sampled_from([TokenLayout.from_input_ids, TokenLayout.from_token_type_ids]))
    option = {"image_token_id": wanted} if make == TokenLayout.from_input_ids else {"image_type": wanted}
    layout = outcome("TokenLayout", lambda: make(tensor, attention_mask=mask, **option), valid=wanted < 2**63)
    if layout is not None:
        image = [[i == wanted and r for i, r in zip(*row, strict=True)] for row in zip(ids, real, strict=True)]
        assert layout.image.tolist() == image
        assert torch.equal(layout.text | layout.image, mask)
        special = draw(st.sampled_from([mask.long(), mask[:, :1], mask.float(), mask[:1], None]))
        fits = special is not None and not special.is_floating_point() and special.shape[1] == length
        left = outcome("TokenLayout", lambda: layout.without(special), valid=None if batch != 1 else fits)
        assert left is None or not (left.text & special.bool()).any()
    ends = draw(st.lists(st.integers(-1, 6), min_size=batch, max_size=batch))
    ragged = torch.tensor(ends, dtype=torch.long).clamp(min=0 if integer in INTEGERS[::5] else -1)
    inside = all(0 <= end <= length for end in ragged.tolist())
    layout = outcome("TokenLayout", lambda: TokenLayout.from_n_text(ragged, length, mask), valid=inside)
    if layout is not None:
        assert layout.text.sum(1).tolist() == [sum(row[:n]) for row, n in zip(real, ragged.tolist(), strict=True)]
    other = torch.zeros(draw(st.integers(0, 3)), draw(st.integers(0, 5)), dtype=draw(st.sampled_from(INTEGERS)))
    outcome("TokenLayout", lambda: TokenLayout.from_masks(mask, other), valid=other.shape == mask.shape)
    outcome("TokenLayout", lambda: TokenLayout.from_segments(mask, other), valid=len(other) == batch)


@fuzz(10)
def test_metrics(data):
    draw, dtype = data.draw, data.draw(st.sampled_from([*FLOATS, *INTEGERS, torch.bool, torch.complex64]))
    n, k, shift = draw(st.integers(0, 3)), draw(st.integers(-1, 4)), draw(st.sampled_from([0, 0, 2**53]))
    shift = shift if dtype == torch.int64 else 0
    values = [[draw(st.integers(0, 3)) + shift for _ in range(n)] for _ in range(n)]
    table = in_memory(draw, torch.tensor(values, dtype=torch.int64).view(n, n).to(dtype))
    ordered = dtype not in (torch.bool, torch.complex64, torch.uint64) and n > 0
    found = outcome("recall_at_k", lambda: recall_at_k(table, k), valid=ordered and 1 <= k <= n)
    if found is not None:
        ahead = [sum(row[j] >= row[i] for j in range(n) if j != i) for i, row in enumerate(values)]
        assert math.isclose(found, 100 * sum(place < k for place in ahead) / n)
    pairs = [[[draw(st.integers(0, 3)) for _ in range(2)] for _ in range(2)] for _ in range(n)]
    given = torch.tensor(pairs, dtype=torch.int64).view(n, 2, 2).to(dtype)
    found = outcome("winoground_scores", lambda: winoground_scores(given), valid=ordered)
    if found is not None:
        text = [p[0][0] > p[1][0] and p[1][1] > p[0][1] for p in pairs]
        image = [p[0][0] > p[0][1] and p[1][1] > p[1][0] for p in pairs]
        both = [t and i for t, i in zip(text, image, strict=True)]
        assert [math.isclose(x, 100 * sum(y) / n) for x, y in zip(found, (text, image, both), strict=True)] == [
            True
        ] * 3


@fuzz(8)
def test_metrics_of_attention(data):
    case = data.draw(scores())
    options = {"mask": case.mask, "reduction": "none"}
    allowed = None if case.pairs else True
    distance = outcome("attention_distance", lambda: attention_distance(case.S, case.n_text, **options), valid=allowed)
    entropy = outcome(
        "argmax_entropy", lambda: argmax_entropy(case.S, case.n_text, convention="released", **options), valid=allowed
    )
    if distance is None or case.values != "tame" or case.S.dtype != torch.float64 or case.pairs:
        return
    assert not distance.requires_grad
    expected = sliced("singular", case, convention="WEIGHTED_MEAN", direction="language")
    assert_close(distance, expected, 1e-10)
    for own, text, image, found in zip(case.S, case.text, case.image, entropy, strict=True):
        LV = (own if own.dim() == 3 else own[None])[:, text][:, :, image]
        looked = Counter(LV.softmax(-1).mean(0).argmax(-1).tolist()) if LV.numel() else {}
        share = [count / sum(looked.values()) for count in looked.values()]
        assert math.isclose(float(found), -sum(p * math.log(p) for p in share), abs_tol=1e-6)


@fuzz(8)
def test_schedules(data):
    numbers = st.one_of(st.integers(-2, 10**6), st.floats(), st.text(max_size=2), st.none(), st.just(10**400))
    steps, scale, step = data.draw(numbers), data.draw(numbers), data.draw(numbers)
    schedule = data.draw(st.sampled_from([exponential_warmup, linear_warmup, logarithmic_warmup]))
    scaled = {"scale": scale} if schedule in (exponential_warmup, logarithmic_warmup) else {}
    weight = outcome("schedules", lambda: schedule(steps, **scaled))
    if weight is not None:
        found = outcome("schedules", lambda: weight(step))
        assert found is None or 0 <= found <= 1


@fuzz(1)
def test_nothing_is_kept(data):
    # A refused call keeps no graph and changes no default of torch.
    S = randn(1, 2, 4, 4).requires_grad_()
    outcome("cacr_loss", lambda: cacr_loss(S, data.draw(st.integers(5, 9))), valid=False)
    assert S.grad is None
    assert torch.is_grad_enabled()
