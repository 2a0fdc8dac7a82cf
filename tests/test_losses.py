"""The losses: the released codes' numbers, hand values, properties, gradients, extremes, half precision."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from attncongruence import (
    PRINTED,
    RELEASED,
    WEIGHTED_MEAN,
    AttentionBlocks,
    CACRLoss,
    IAISLoss,
    QueryKey,
    TokenLayout,
    cacr_loss,
    hard_equivalence_loop,
    iais_loss,
    losses,
    soft_equivalence_loop,
    split_attention,
    symmetric_kl,
)
from attncongruence.capture import CapturedAttention
from attncongruence.capture.product import Operation
from attncongruence.losses import congruence_loss
from tests.helpers.problems import (
    CASES,
    CONVENTIONS,
    DIRECTIONS,
    KINDS,
    Synchronizations,
    assert_close,
    fast,
    make_problem,
    pairwise,
    problems,
    randn,
    slow,
    value_and_grad,
)

every_case = pytest.mark.parametrize(("name", "convention"), CASES)

# ---------------------------------------------------------------- the released codes

RELEASED_CODE = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "data/released_code.npz").items()}


@pytest.mark.parametrize("which", ["L-soft", "V-soft", "L-singular", "V-singular", "L-distributed", "V-distributed"])
def test_released_code(which):
    data = RELEASED_CODE
    heads = int(data["num_heads"])

    def scores(hidden):
        query, key = (
            (hidden @ data["w" + x].T + data["b" + x]).unflatten(-1, (heads, -1)).transpose(1, 2) for x in "qk"
        )
        return query @ key.mT / query.shape[-1] ** 0.5

    side, alignment = which.split("-")
    name = "cacr" if alignment == "soft" else alignment
    direction = {"L": "language", "V": "vision"}[side]
    layout = {"n_text": TokenLayout(data["text_mask"], data["image_mask"])}
    masked = {"n_text": int(data["n_text"]), "mask": data["text_mask"] | data["image_mask"]}
    for ours, where in itertools.product((fast, slow), (layout, masked)):
        hidden = data["hidden"].clone().requires_grad_()
        loss = ours(name, scores(hidden), direction=direction, **where)
        (grad,) = torch.autograd.grad(loss, hidden)
        torch.testing.assert_close(loss.detach(), data[f"loss_{which}"], rtol=1e-9, atol=0)
        expected = data[f"grad_{which}"]
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


# ---------------------------------------------------------------- hand values and the relations between the losses


def test_hand_values():
    # Two text tokens, one image token: R is constant, sigma(R) = (1/2, 1/2); LL = (log 3, 0) in both rows.
    S = torch.zeros(1, 3, 3, dtype=torch.float64)
    S[0, :2, 0] = np.log(3)
    one_row = np.log(3) / 4  # m-KL of (1/2, 1/2) and (3/4, 1/4)
    for loss, options, expected in [
        (cacr_loss, {"convention": WEIGHTED_MEAN}, one_row),
        (cacr_loss, {"convention": PRINTED}, 2 * one_row),
        (iais_loss, {}, one_row),
        # A_LV A_VL = column of ones times (1/2, 1/2)
        (iais_loss, {"alignment": "distributed", "convention": replace(RELEASED, epsilon=1e-15)}, one_row),
        # the second softmax: sigma(3/4, 1/4) against (1/2, 1/2)
        (cacr_loss, {}, float(symmetric_kl(torch.tensor([0.75, 0.25]).double(), torch.zeros(2).double()))),
    ]:
        value = loss(S, 2, direction="language", **options)
        assert_close(value, torch.tensor(expected, dtype=torch.float64), 1e-12)


@every_case
def test_both_is_the_sum_of_the_directions(name, convention):
    problem = make_problem("ragged", 4, seed=5)
    one, other, both = (
        value_and_grad(
            lambda S, d=direction: fast(name, S, problem.n_text, mask=problem.mask, convention=convention, direction=d),
            problem.S,
        )
        for direction in DIRECTIONS
    )
    for language, vision, whole in zip(one, other, both, strict=True):
        assert_close(whole, language + vision, 1e-12)


def test_weighted_mean_tends_to_singular_as_the_temperature_falls():
    S = randn(2, 3, 9, 9)
    hard = iais_loss(S, 4, convention=WEIGHTED_MEAN)
    errors = [
        float((cacr_loss(S, 4, convention=replace(WEIGHTED_MEAN, temperature=t)) - hard).abs())
        for t in (1, 0.1, 0.01, 1e-4)
    ]
    assert errors[0] > 0.1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("side", ["language", "vision"])
def test_singular_is_cacr_with_a_one_hot_equivalence(side):
    blocks = split_attention(randn(2, 3, 9, 9), 4)
    one_hot = {
        name: torch.nn.functional.one_hot(block.argmax(-1), block.shape[-1]).double()
        for name, block in (("LV", blocks.LV), ("VL", blocks.VL))
    }
    by_hand = replace(blocks, **one_hot)
    # PRINTED takes the block itself as E; the mean over rows is its sum over their number.
    printed = cacr_loss(by_hand, convention=replace(PRINTED, rows="mean"), direction=side)
    assert_close(iais_loss(blocks, convention=WEIGHTED_MEAN, direction=side), printed, 1e-12)


def test_probabilities_will_do_for_released():
    S = randn(2, 3, 9, 9)
    for name in ("cacr", "singular", "distributed"):
        assert_close(fast(name, S.softmax(-1).log(), 4), fast(name, S, 4), 1e-12)


def test_released_detaches_the_equivalence():
    S = randn(1, 2, 7, 7)
    for convention, moves in ((RELEASED, False), (PRINTED, True), (WEIGHTED_MEAN, True)):
        _, grad = value_and_grad(cacr_loss, S, 3, convention=convention, direction="language")
        assert bool((split_attention(grad, 3).LV != 0).any()) == moves
        assert (split_attention(grad, 3).VL == 0).all()


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize(
    ("name", "convention", "direction", "kind"), [(*case, *rest) for case, *rest in pairwise(CASES, DIRECTIONS, KINDS)]
)
@hypothesis.settings(max_examples=3)
@hypothesis.given(data=st.data())
def test_masked_equals_sliced(data, name, convention, direction, kind):
    problem = data.draw(problems(kind, 4))
    options = {"convention": convention, "direction": direction}
    value, grad = value_and_grad(
        lambda S: fast(name, S, problem.n_text, mask=problem.mask, reduction="none", **options), problem.S
    )
    weight = torch.linspace(1.0, 2.0, len(value), dtype=torch.float64)
    for i in range(len(value)):
        text, image = problem.text[i].nonzero()[:, 0], problem.image[i].nonzero()[:, 0]
        expected, wanted = torch.zeros(()).double(), torch.zeros_like(problem.S[i])
        if len(text) and len(image):
            kept = torch.cat([text, image])
            alone = problem.S[i][:, kept][:, :, kept][None]
            expected, alone_grad = value_and_grad(lambda S, t=text: fast(name, S, len(t), **options), alone)
            wanted[:, kept[:, None], kept[None, :]] = alone_grad[0] * weight[i]
        assert_close(value[i], expected, 1e-12)
        assert_close(grad[i], wanted, 1e-12)


@every_case
@pytest.mark.parametrize("padding", [1, 5])
def test_padding_changes_nothing_whatever_it_holds(name, convention, padding):
    S = randn(2, 2, 8, 8)
    value, grad = value_and_grad(lambda S: fast(name, S, 3, convention=convention), S)
    # Padding behind the text, as tokenizers put it: 3 text, padding, 5 image.
    kept = torch.cat([torch.arange(3), torch.arange(3 + padding, 8 + padding)])
    mask = torch.zeros(2, 8 + padding, dtype=torch.bool)
    mask[:, kept] = True
    layout = TokenLayout(mask & (torch.arange(8 + padding) < 3), mask & (torch.arange(8 + padding) >= 3))
    ways = ({"n_text": 3 + padding, "mask": mask}, {"n_text": layout})
    for garbage, where in itertools.product((math.nan, 1e30, math.inf, -math.inf), ways):
        wide = torch.full((2, 2, 8 + padding, 8 + padding), garbage, dtype=torch.float64)
        wide[:, :, kept[:, None], kept[None, :]] = S
        padded, padded_grad = value_and_grad(lambda S, w=where: fast(name, S, convention=convention, **w), wide)
        assert_close(padded, value, 1e-12)
        assert_close(padded_grad[:, :, kept[:, None], kept[None, :]], grad, 1e-12)
        assert padded_grad.count_nonzero() == grad.count_nonzero()


@every_case
def test_order_of_tokens_and_heads_means_nothing(name, convention):
    S, (heads, text, image) = randn(2, 3, 9, 9), (torch.randperm(n) for n in (3, 4, 5))
    value = fast(name, S, 4, convention=convention)
    tokens = torch.cat([text, 4 + image])
    shuffled = S[:, heads][:, :, tokens][:, :, :, tokens]
    assert_close(fast(name, shuffled, 4, convention=convention), value, 1e-12)
    # The whole sequence, interleaved at will
    anywhere = torch.randperm(9)
    is_text = (anywhere < 4).expand(2, 9)
    mixed = S[:, :, anywhere][:, :, :, anywhere]
    assert_close(fast(name, mixed, TokenLayout(is_text, ~is_text), convention=convention), value, 1e-12)


@every_case
def test_swapping_the_modalities_swaps_the_directions(name, convention):
    blocks = split_attention(randn(2, 3, 9, 9), 4)
    language = fast(name, blocks, convention=convention, direction="language")
    assert_close(fast(name, blocks.swap(), convention=convention, direction="vision"), language, 1e-12)


@pytest.mark.parametrize("convention", ["RELEASED", "WEIGHTED_MEAN"])
def test_congruent_attention_costs_nothing(convention):
    # Each word stands for one region and regions attend like words: a sharp one-to-one LV, VV a copy of LL.
    LL = randn(1, 1, 5, 5)
    sharp = 1e4 * torch.eye(5, dtype=torch.float64).expand(1, 1, 5, 5)
    blocks = AttentionBlocks.from_streams(LL=LL, LV=sharp, VL=sharp, VV=LL)
    assert fast("cacr", blocks, convention=convention) < 1e-12
    assert fast("cacr", replace(blocks, VV=LL.flip(-1)), convention=convention) > 1e-3


@every_case
def test_streams_of_different_heads(name, convention):
    blocks = AttentionBlocks.from_streams(
        LL=randn(2, 3, 4, 4), LV=randn(2, 3, 4, 5), VV=randn(2, 2, 5, 5), VL=randn(2, 3, 5, 4)
    )
    if CONVENTIONS[convention].heads == "mean_loss":
        with pytest.raises(ValueError, match=r"different numbers of heads, \[2, 3\]"):
            fast(name, blocks, convention=convention)
    else:
        assert_close(fast(name, blocks, convention=convention), slow(name, blocks, convention=convention), 1e-12)


# ---------------------------------------------------------------- gradients and extremes


@every_case
def test_gradcheck(name, convention):
    problem = make_problem("interleaved", 4, seed=11, n=3, m=4)
    # Detached E is a constant to autograd but not to finite differences: leave it attached for the check.
    attached = replace(CONVENTIONS[convention], detach_equivalence=False)
    loss = iais_loss if name != "cacr" else cacr_loss
    extra = {} if name == "cacr" else {"alignment": name}
    S = problem.S.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda S: loss(S, problem.n_text, convention=attached, direction="both", reduction="none", **extra), S
    )


@every_case
def test_finite_at_extreme_logits(name, convention):
    # +-200: most probabilities are exactly 0 in float32
    for dtype, direction in itertools.product((torch.float32, torch.float64), DIRECTIONS):
        S = torch.where(randn(2, 3, 9, 9) > 0, 200.0, -200.0).to(dtype)
        assert (S.softmax(-1).float() == 0).any()
        value, grad = value_and_grad(lambda S, d=direction: fast(name, S, 4, convention=convention, direction=d), S)
        assert torch.isfinite(value)
        assert torch.isfinite(grad).all()
        assert value > 0


@every_case
def test_one_token_modalities(name, convention):
    for n, m in ((1, 5), (5, 1), (1, 1)):
        S = randn(2, 2, n + m, n + m)
        value, grad = value_and_grad(lambda S, n=n: fast(name, S, n, convention=convention, reduction="none"), S)
        assert_close(value, slow(name, S, n, convention=convention, reduction="none"), 1e-12)
        assert torch.isfinite(grad).all()


@every_case
def test_a_missing_modality_costs_exactly_nothing(name, convention):
    S = torch.full((2, 2, 6, 6), float("nan"), dtype=torch.float64)
    nothing = torch.zeros(2, 6, dtype=torch.bool)
    ways = (
        {"n_text": 0},
        {"n_text": 6},
        {"n_text": torch.tensor([0, 6])},
        {"n_text": 3, "mask": nothing},
        {"n_text": TokenLayout(nothing, ~nothing)},
        {"n_text": TokenLayout(nothing, nothing)},
    )
    for where, direction, reduction in itertools.product(ways, DIRECTIONS, ("mean", "sum", "none")):
        options = {**where, "direction": direction, "reduction": reduction}
        value, grad = value_and_grad(lambda S, o=options: fast(name, S, convention=convention, **o), S)
        assert (value == 0).all()
        assert (grad == 0).all()


def test_meta_tensors_have_shapes():
    S, pairs = torch.zeros(2, 2, 6, 6, device="meta"), torch.ones(2, 1, 6, 6, dtype=torch.bool, device="meta")
    for mask in (None, pairs, pairs[:, 0, 0]):
        assert cacr_loss(S, 2, mask=mask, reduction="none").shape == (2,)


def test_an_empty_batch_is_zero():
    for loss in (cacr_loss, iais_loss, soft_equivalence_loop, hard_equivalence_loop):
        assert loss(torch.zeros(0, 2, 5, 5), 2) == 0
    assert cacr_loss(torch.zeros(0, 2, 5, 5), torch.zeros(0, dtype=torch.long), reduction="none").shape == (0,)


@every_case
def test_nan_scores_are_passed_on(name, convention):
    used = {"cacr": "LL LV VV", "singular": "LL LV VV", "distributed": "LL LV VL"}[name].split()
    for block, mask in itertools.product(("LL", "LV", "VL", "VV"), (None, torch.ones(1, 9, dtype=torch.bool))):
        S = randn(1, 2, 9, 9)
        getattr(split_attention(S, 4), block)[0, 0, 1, 1] = float("nan")
        value = fast(name, S, 4, mask=mask, convention=convention, direction="language")
        assert value.isnan() == (block in used)


def test_causal_decoders_have_a_language_side_only():
    S, causal = randn(2, 2, 8, 8), torch.ones(8, 8, dtype=torch.bool).tril().expand(2, 8, 8)
    image_first = TokenLayout((torch.arange(8) >= 5).expand(2, 8), (torch.arange(8) < 5).expand(2, 8))
    # By hand for RELEASED: each block softmaxed over what is allowed, then the released formula
    blocks = split_attention(S.masked_fill(~causal[:, None], -torch.inf), image_first)
    E, VV, LL = (block.softmax(-1).mean(1) for block in (blocks.LV, blocks.VV, blocks.LL))
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    expected = symmetric_kl(E @ VV @ E.mT, LL, lower).mean()
    assert_close(cacr_loss(S, image_first, mask=causal, direction="language"), expected, 1e-12)
    for direction in ("vision", "both"):
        for loss in (cacr_loss, soft_equivalence_loop):
            with pytest.raises(ValueError, match=r"no pair of VL may attend.*direction='language'"):
                loss(S, image_first, mask=causal, direction=direction)
    with pytest.warns(UserWarning, match="in no sample of the batch may text attend to the image"):
        assert cacr_loss(S, 3, mask=causal, direction="language") == 0


@pytest.mark.parametrize(
    ("name", "convention", "kind"),
    pairwise(("cacr", "singular"), ("RELEASED", "WEIGHTED_MEAN"), ("all", "causal", "some")),
)
def test_what_is_added_to_a_row_of_scores_changes_attention_and_loss_by_nothing(name, convention, kind):
    S, shift = randn(3, 2, 9, 9), 30 * randn(3, 2, 9, 1, seed=1)
    some = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.7
    mask = {"all": None, "causal": torch.ones(3, 9, 9, dtype=torch.bool).tril(), "some": some}[kind]
    layout = TokenLayout.from_n_text(4, 9)
    image_first = TokenLayout(layout.image, layout.text)

    def loss(S):
        return fast(name, S, image_first, mask=mask, convention=convention, direction="language", reduction="none")

    assert loss(S).min() > 1e-4
    assert_close(loss(S + shift), loss(S), 1e-10)


def test_weighted_mean_of_the_pairs_that_may_attend_by_hand():
    # Two image tokens, the first of which does not see the second, then three text tokens.
    S = torch.zeros(1, 5, 5, dtype=torch.float64)
    S[0, 3, 0], S[0, 1, 0] = math.log(3), math.log(4)
    text = torch.arange(5)[None] >= 2
    E, a, b = [(0.5, 0.5), (0.75, 0.25), (0.5, 0.5)], math.log(4 / 5), math.log(1 / 5)
    # log sigma(VV) = 0, -, a, b; the weights of the three pairs are divided by their sum
    R = [[(v * x * a + v * y * b) / (u * x + v * x + v * y) for x, y in E] for u, v in E]
    lower = torch.ones(3, 3, dtype=torch.bool).tril()
    expected = symmetric_kl(torch.tensor([R], dtype=torch.float64), torch.zeros(1, 3, 3).double(), lower).mean()
    causal = torch.ones(1, 5, 5, dtype=torch.bool).tril()
    for loss in (cacr_loss, soft_equivalence_loop):
        ours = loss(S, TokenLayout(text, ~text), mask=causal, convention=WEIGHTED_MEAN, direction="language")
        assert_close(ours, expected, 1e-12)
    assert expected > 1e-3


# ---------------------------------------------------------------- half precision, autocast, compilation


@every_case
def test_half_precision_errs_no_more_than_its_input_does(name, convention):
    S = randn(8, 4, 30, 30, seed=3)
    exact = fast(name, S, 10, convention=convention, reduction="none")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = fast(name, S.to(dtype).double(), 10, convention=convention, reduction="none")
        half = fast(name, S.to(dtype), 10, convention=convention, reduction="none")
        assert half.dtype == torch.float32
        assert (half - exact).norm() <= 2 * (rounded - exact).norm()


def test_half_precision_is_finite_where_it_would_overflow():
    # E VV E^T of scores around 12 leaves float16, which ends at 65504.
    value, grad = value_and_grad(cacr_loss, (12 * randn(2, 2, 12, 12)).half(), 5, convention=PRINTED)
    assert 65504 < value < torch.inf
    assert torch.isfinite(grad).all()
    assert grad.count_nonzero() > 0


@every_case
def test_autocast_changes_nothing(name, convention):
    S = randn(2, 2, 9, 9, dtype=torch.float32)
    value, grad = value_and_grad(lambda S: fast(name, S, 4, convention=convention), S)
    S = S.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fast(name, S, 4, convention=convention)
    assert torch.equal(cast, value)
    # As everywhere in torch, the backward pass belongs outside the autocast region.
    assert torch.equal(torch.autograd.grad(cast, S)[0], grad)


def test_autocast_from_a_matrix_product():
    hidden = randn(2, 9, 16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        S = hidden @ hidden.mT
        assert S.dtype == torch.bfloat16
        loss = cacr_loss(S, 4)
    assert loss.dtype == torch.float32
    assert_close(loss, cacr_loss(S.float(), 4), 1e-7)


# ---------------------------------------------------------------- modules, rejects


def test_modules_are_the_functions():
    S, mask = randn(2, 2, 9, 9), torch.rand(2, 9) < 0.8
    options = {"convention": WEIGHTED_MEAN, "direction": "vision", "reduction": "none"}
    assert torch.equal(CACRLoss(**options)(S, 4, mask), cacr_loss(S, 4, mask=mask, **options))
    assert torch.equal(IAISLoss(**options)(S, 4, mask), iais_loss(S, 4, mask=mask, **options))
    assert torch.equal(IAISLoss(alignment="distributed")(S, 4), iais_loss(S, 4, alignment="distributed"))
    assert "direction='vision'" in repr(CACRLoss(**options))
    assert "alignment='distributed'" in repr(IAISLoss(alignment="distributed"))


def test_modules_refuse_at_once():
    with pytest.raises(ValueError, match="direction='up' is not known"):
        CACRLoss(direction="up")
    with pytest.raises(ValueError, match="alignment='soft' is not known"):
        IAISLoss(alignment="soft")
    with pytest.raises(ValueError, match="convention"):
        IAISLoss("distributed")


S = randn(2, 2, 6, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((randn(2, 2, 6, 5), 3), {}, ValueError, "length length"),
        ((randn(6, 6), 3), {}, ValueError, "batch length length"),
        ((randn(1, 2, 2, 6, 6), 3), {}, ValueError, "batch heads length length"),
        ((torch.zeros(2, 2, 6, 6, dtype=torch.long), 3), {}, ValueError, "attention"),
        ((S, 7), {}, ValueError, "n_text=7 is out of range: a sequence of 6 positions allows 0 to 6"),
        ((S, -1), {}, ValueError, "n_text=-1 is out of range"),
        ((S, torch.tensor([3, 7])), {}, ValueError, "n_text=7 is out of range"),
        ((S, torch.tensor([-2, 3])), {}, ValueError, "n_text=-2 is out of range"),
        ((S, torch.tensor([3, 3, 3])), {}, ValueError, "n_text"),
        ((S, torch.tensor([3.0, 3.0])), {}, ValueError, "n_text"),
        ((S, 3.0), {}, ValueError, "n_text"),
        ((S,), {}, ValueError, "n_text is missing"),
        ((S, TokenLayout(MASK, ~MASK)[[0, 1, 0]]), {}, ValueError, r"the layout is for \(batch, length\) = \(3, 6\)"),
        ((S, TokenLayout(MASK[:, :5], ~MASK[:, :5])), {}, ValueError, r"= \(2, 5\), the scores have \(2, 6\)"),
        ((split_attention(S, 3), 3), {}, ValueError, "leave n_text and mask out"),
        ((S[:, 0], 3), {"mask": torch.ones(2, 3, 6, 6, dtype=torch.bool)}, ValueError, "the mask is for 3 heads"),
        ((S, 3), {"mask": MASK[:, :5]}, ValueError, "mask"),
        ((S, 3), {"mask": MASK.double()}, ValueError, "mask"),
        (
            (S, 3),
            {"direction": "text"},
            ValueError,
            "direction='text' is not known: it must be one of 'both', 'language'",
        ),
        (
            (S, 3),
            {"reduction": "avg"},
            ValueError,
            "reduction='avg' is not known: it must be one of 'mean', 'sum', 'none'",
        ),
        ((S, 3), {"impl": "fast"}, ValueError, "impl='fast' is not known"),
        ((S, 3), {"convention": "RELEASED"}, ValueError, "convention"),
        (
            (S, 3),
            {"mask": MASK.to("meta")},
            ValueError,
            "all tensors must be on one device, got attention on cpu, mask on meta",
        ),
        ((S, torch.tensor([3, 3]).to("meta")), {}, ValueError, "n_text on meta"),
    ],
)
def test_rejects(arguments, options, error, message):
    for loss in (cacr_loss, iais_loss, soft_equivalence_loop, hard_equivalence_loop):
        with pytest.raises(error, match=message):
            loss(*arguments, **options)


def test_rejects_of_iais():
    soft = "alignment='soft' is not known: it must be one of 'singular', 'distributed'"
    for loss in (iais_loss, hard_equivalence_loop):
        with pytest.raises(ValueError, match=soft):
            loss(S, 3, alignment="soft")
        for convention in (PRINTED, WEIGHTED_MEAN):
            with pytest.raises(ValueError, match="the loss 'distributed' is not defined on raw scores"):
                loss(S, 3, alignment="distributed", convention=convention)


def test_rejects_a_vision_side_without_VL():
    blocks = AttentionBlocks.from_streams(LL=randn(1, 2, 2), LV=randn(1, 2, 3), VV=randn(1, 3, 3))
    assert cacr_loss(blocks, direction="language") > 0
    for direction in ("vision", "both"):
        with pytest.raises(ValueError, match="these blocks have no VL, which this loss and direction need"):
            cacr_loss(blocks, direction=direction)
    with pytest.raises(ValueError, match="these blocks have no VL"):
        iais_loss(blocks, direction="language", alignment="distributed")


# ---------------------------------------------------------------- a loss of one's own is one entry


def mean_difference(maps, convention):
    """How far the head-mean maps of text and of the image, seen through E, differ: a loss that no paper has."""
    R = maps.LV @ maps.VV @ maps.LV.mT
    counted = torch.ones_like(R, dtype=torch.bool) if maps.counted.LL is None else maps.counted.LL
    return losses.Comparison(R, maps.LL, maps.counted.LL, ((R - maps.LL).square() * counted).sum(-1))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "difference", losses.CongruenceLoss("difference", "Difference", mean_difference))


@pytest.mark.usefixtures("registered")
def test_a_registered_loss_needs_nothing_else():
    blocks = split_attention(S, 3)
    LL, LV, VL, VV = (b.softmax(-1).mean(1) for b in (blocks.LL, blocks.LV, blocks.VL, blocks.VV))
    by_hand = (LV @ VV @ LV.mT - LL).square().sum(-1).mean(-1), (VL @ LL @ VL.mT - VV).square().sum(-1).mean(-1)
    for direction, expected in zip(("language", "vision", "both"), (*by_hand, sum(by_hand)), strict=True):
        value = congruence_loss("difference", S, 3, direction=direction, reduction="none")
        assert_close(value, expected, 1e-14)
    # Padding, layouts and gradients come with it.
    padded = torch.nn.functional.pad(S, (0, 2, 0, 2), value=7.0)
    mask = (torch.arange(S.shape[-1] + 2) < S.shape[-1]).expand(len(S), -1)
    assert_close(congruence_loss("difference", padded, 3, mask=mask), congruence_loss("difference", S, 3), 1e-14)
    scores = S.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: congruence_loss("difference", x, 3), scores)
    with pytest.raises(ValueError, match="the loss 'difference' has no streaming form: use impl='auto'"):
        congruence_loss("difference", S, 3, impl="streaming")


def test_an_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="loss='soft' is not known: it must be one of 'cacr', 'singular'"):
        congruence_loss("soft", S, 3)


@every_case
def test_congruence_loss_is_each_loss_by_its_name(name, convention):
    by_name = congruence_loss(name, S, 3, convention=CONVENTIONS[convention])
    assert_close(by_name, fast(name, S, 3, convention=convention), 0)


# ---------------------------------------------------------------- names of conventions, synchronizations


@pytest.mark.parametrize("name", ["released", "printed", "weighted_mean"])
def test_a_convention_by_its_name(name):
    convention = CONVENTIONS[name.upper()]
    assert_close(cacr_loss(S, 3, convention=name), cacr_loss(S, 3, convention=convention), 0)
    assert_close(soft_equivalence_loop(S, 3, convention=name), soft_equivalence_loop(S, 3, convention=convention), 0)
    assert CACRLoss(name).convention == IAISLoss(name).convention == convention


def padding(kind, length):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, 2] = False
    pairs = mask[:, None, None].expand(2, 1, length, length)
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return {"none": None, "tokens": mask, "spread": pairs, "copied": pairs.contiguous(), "causal": causal}[kind]


@pytest.mark.parametrize("length", [9, 300])
@pytest.mark.parametrize(
    ("n_text", "mask", "expected"),
    [
        (4, "none", 0),
        (4, "tokens", 0),
        (4, "spread", 0),
        (4, "copied", 1),
        (4, "causal", 1),
        ("layout", "tokens", 0),
        ("tensor", "none", 1),
        ("tensor", "causal", 2),
    ],
)
def test_synchronizations(length, n_text, mask, expected):
    where = {"layout": TokenLayout.from_n_text(4, length), "tensor": torch.tensor([4, 3])}.get(n_text, n_text)
    source, mask = QueryKey(randn(2, 2, length, 4), randn(2, 2, length, 4)), padding(mask, length)
    for attention in (source, source.scores):
        with Synchronizations() as seen:
            cacr_loss(
                attention, where, mask=mask, direction="vision", impl="dense" if attention is not source else "auto"
            )
        assert seen.count == expected, seen.names


@pytest.mark.parametrize(
    ("kind", "length", "expected"),
    [("none", 300, 0), ("added", 9, 0), ("added", 300, 1), ("bool", 300, 0), ("causal", 9, 1), ("causal", 300, 1)],
)
def test_synchronizations_of_a_captured_layer(kind, length, expected):
    mask = padding("tokens", length)[:, None, None]
    masks = {"added": ((torch.where(mask, 0.0, -1e9), 1.0),), "bool": ((mask, 1.0),)}.get(kind, ())
    q, k = randn(2, 2, length, 4), randn(2, 2, length, 4)
    record = CapturedAttention("layer", Operation(query=q, key=k, masks=masks, causal=kind == "causal"))
    with Synchronizations() as seen:
        cacr_loss(record, 4, direction="vision")
    assert seen.count == expected, seen.names
