"""What fuzzing found (tests/test_robustness.py), each as the smallest call that showed it: wrong numbers first."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attncongruence import (
    RELEASED,
    WEIGHTED_MEAN,
    AttentionBlocks,
    CACRLoss,
    QueryKey,
    TokenLayout,
    argmax_entropy,
    attention_distance,
    cacr_loss,
    exponential_warmup,
    hard_equivalence_loop,
    iais_loss,
    linear_warmup,
    logarithmic_warmup,
    recall_at_k,
    regularize,
    soft_equivalence_loop,
    split_attention,
    symmetric_kl,
    winoground_scores,
)
from tests.helpers.problems import randn

S = randn(2, 2, 6, 6)
MASK = torch.ones(2, 6, dtype=torch.bool)
every_reader = pytest.mark.parametrize(
    "read",
    [cacr_loss, iais_loss, soft_equivalence_loop, hard_equivalence_loop, split_attention, argmax_entropy],
    ids=lambda read: read.__name__,
)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(("dtype", "wrapped", "wanted"), [(torch.int8, 44, 300), (torch.uint8, 255, -1)])
def test_ids_are_compared_in_64_bits(dtype, wrapped, wanted):
    # In 8 bits, 300 is 44: text was taken for image.
    ids = torch.tensor([[wrapped, 1]], dtype=dtype)
    assert not TokenLayout.from_input_ids(ids, wanted).image.any()
    assert not TokenLayout.from_token_type_ids(ids, image_type=wanted).image.any()
    assert TokenLayout.from_input_ids(ids, wrapped).image.tolist() == [[True, False]]


@pytest.mark.parametrize("wanted", [2**63, -(2**63) - 1, 2**70])
def test_an_id_beyond_64_bits_is_refused(wanted):
    ids = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match=rf"image_token_id={wanted} is not an id"):
        TokenLayout.from_input_ids(ids, wanted)
    with pytest.raises(ValueError, match=rf"image_type={wanted} is not an id"):
        TokenLayout.from_token_type_ids(ids, image_type=wanted)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_boundaries_of_unsigned_integers(dtype):
    boundary = torch.tensor([3, 2])
    expected = cacr_loss(S, boundary)
    assert torch.equal(cacr_loss(S, boundary.to(dtype)), expected)


def test_boundaries_of_empty_sequences_are_checked():
    for boundary in (torch.tensor([5, 0]), 5):
        with pytest.raises(ValueError, match="n_text=5 is out of range: a sequence of 0 positions"):
            TokenLayout.from_n_text(boundary, length=0)
    with pytest.raises(ValueError, match="n_text=7 is out of range"):
        cacr_loss(randn(2, 2, 0, 0), torch.tensor([0, 7]))
    # No sample, but a boundary for all of them
    with pytest.raises(ValueError, match="n_text=9 is out of range: a sequence of 4 positions"):
        TokenLayout.from_n_text(9, attention_mask=torch.ones(0, 4, dtype=torch.bool))


def test_lengths_and_boundaries_beyond_any_sequence():
    with pytest.raises(ValueError, match="length=-1 must be >= 0"):
        TokenLayout.from_n_text(0, -1)
    with pytest.raises(ValueError, match=f"n_text={2**70} is out of range"):
        TokenLayout.from_n_text(2**70, 4)


def test_a_sample_of_a_layout_by_a_numpy_integer():
    layout = TokenLayout.from_n_text(torch.tensor([1, 2]), 4)
    assert torch.equal(layout[np.int64(1)].text, layout[1].text)


# ---------------------------------------------------------------- metrics


def test_argmax_entropy_passes_nan_on():
    # It was 0, as if attention had collapsed.
    with_nan = S.clone()
    with_nan[0, 1, 1, 4] = math.nan
    for convention in (RELEASED, WEIGHTED_MEAN):
        entropy = argmax_entropy(with_nan, 3, convention=convention, reduction="none")
        assert entropy.isnan().tolist() == [True, False]
        assert entropy[1] == argmax_entropy(S, 3, convention=convention, reduction="none")[1]
    masked = argmax_entropy(with_nan, 3, mask=torch.tensor([[1, 1, 1, 1, 0, 1]]).expand(2, 6))
    assert masked.isfinite()


def test_metrics_check_shapes_and_types():
    # Their checker looked at the wrapper of torch.no_grad, which takes anything.
    for wrong in (torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 3), [[0, 1, 2]]):
        with pytest.raises(ValueError, match="regions"):
            attention_distance(S, 3, regions=wrong)
    for metric in (attention_distance, argmax_entropy):
        for nothing in (None, S.numpy(), [S]):
            with pytest.raises(ValueError, match="attention"):
                metric(nothing, 3)


def test_regions_where_there_are_none():
    # No image token at all, so no region: one_hot refused a range of 0.
    assert attention_distance(S, 6, regions=torch.full((2, 6), -1)) == 0


def test_metrics_of_any_integers_and_half_precision():
    regions = torch.tensor([[0, 1, 2], [2, 0, 1]])
    expected = attention_distance(S, 3, regions=regions)
    assert torch.equal(attention_distance(S, 3, regions=regions.to(torch.uint16)), expected)
    pairs = torch.tensor([[[3, 1], [0, 2]], [[1, 1], [1, 1]]])
    for dtype in (torch.uint8, torch.uint16, torch.uint32, torch.float16, torch.bfloat16):
        assert winoground_scores(pairs.to(dtype)) == (50.0, 50.0, 50.0)
    scores = torch.tensor([[1, 0], [0, 1]])
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        assert recall_at_k(scores, 1, torch.tensor([0, 0]).to(dtype)) == 50.0


def test_recall_compares_large_integers_exactly():
    # 2**53 and 2**53 + 1 are one number in float64: a tie that was none.
    scores = torch.tensor([[2**53 + 1, 2**53], [0, 1]])
    assert recall_at_k(scores) == 100.0


def test_metrics_refuse_what_has_no_order_or_no_values():
    for metric in (winoground_scores, recall_at_k):
        shape = (2, 2, 2) if metric is winoground_scores else (2, 2)
        with pytest.raises(ValueError, match="is on the meta device and has a shape but no values"):
            metric(torch.zeros(shape, device="meta"))
        with pytest.raises(ValueError, match=r"is torch\.uint64"):
            metric(torch.zeros(shape, dtype=torch.uint64))
    with pytest.raises(ValueError, match="regions is on the meta device"):
        attention_distance(S.to("meta"), 3, regions=torch.zeros(2, 3, dtype=torch.long, device="meta"))


# ---------------------------------------------------------------- heads and widths of 0


@every_reader
def test_no_head_is_refused(read):
    if read is split_attention:
        assert read(randn(2, 0, 6, 6), 3).LV.shape == (2, 0, 3, 3)
        return
    with pytest.raises(ValueError, match="the attention has 0 heads"):
        read(randn(2, 0, 6, 6), 3)


@pytest.mark.parametrize(
    ("query", "key"),
    [((1, 2, 5, 0), (1, 2, 5, 0)), ((1, 2, 5, 4), (1, 0, 5, 4)), ((1, 0, 5, 4), (1, 2, 5, 4)), ((1, 0, 5, 4),) * 2],
)
@pytest.mark.parametrize("impl", ["dense", "streaming"])
def test_queries_and_keys_need_a_head_and_a_width(query, key, impl):
    with pytest.raises(ValueError, match="both need at least one head and a width"):
        cacr_loss(QueryKey(randn(*query), randn(*key)), 2, impl=impl)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 10**400], ids=["nan", "inf", "-inf", "huge"])
def test_a_scale_is_finite(scale):
    with pytest.raises(ValueError, match=r"scale.* must be (finite|a number in the range of floats)"):
        cacr_loss(QueryKey(randn(1, 2, 5, 4), randn(1, 2, 5, 4), scale), 2)
    with pytest.raises(TypeError, match="scale='1' is a str: it must be a number"):
        QueryKey(randn(1, 2, 5, 4), randn(1, 2, 5, 4), "1")


# ---------------------------------------------------------------- tensors that are not dense, or have no values


@every_reader
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: S.to_sparse(), "sparse_coo"),
        (lambda: S[0].to_sparse_csr(), "sparse_csr"),
        (lambda: torch.nested.nested_tensor([S[0, :, :4], S[1]], layout=torch.jagged), "nested"),
    ],
    ids=["coo", "csr", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_only_dense_tensors(read, make, what):
    # One of them gave a number.
    with pytest.raises(ValueError, match=rf"(S|attention) is a {what} tensor, and only dense ones"):
        read(make(), 3)


@every_reader
def test_a_sparse_mask_or_boundary(read):
    with pytest.raises(ValueError, match="mask is a sparse_coo tensor"):
        read(S, 3, mask=MASK.to_sparse())
    with pytest.raises(ValueError, match="n_text is a sparse_coo tensor"):
        read(S, torch.tensor([3, 2]).to_sparse())
    with pytest.raises(ValueError, match="text is a sparse_coo tensor"):
        TokenLayout(MASK.to_sparse(), MASK.to_sparse())


@every_reader
def test_float8_has_no_arithmetic(read):
    with pytest.raises(ValueError, match=r"is torch\.float8_e5m2, which has no arithmetic: pass (S|attention)\.float"):
        read(S.to(torch.float8_e5m2), 3)


def test_the_loops_need_values():
    for loop in (soft_equivalence_loop, hard_equivalence_loop):
        with pytest.raises(ValueError, match="attention is on the meta device"):
            loop(S.to("meta"), 3)


def test_streams_of_something_else():
    blocks = {"LL": randn(1, 2, 2), "LV": randn(1, 2, 3), "VV": randn(1, 3, 3)}
    with pytest.raises(ValueError, match="LV"):
        AttentionBlocks.from_streams(**blocks | {"LV": blocks["LV"].numpy()})


# ---------------------------------------------------------------- numbers and switches


def test_the_mean_of_no_rows_is_0():
    rows = torch.zeros(0, 3, requires_grad=True)
    loss = symmetric_kl(rows, torch.zeros(0, 3), reduction="mean")
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize("schedule", [exponential_warmup, linear_warmup, logarithmic_warmup])
def test_schedules_of_no_number(schedule):
    # NaN and infinity gave weights of NaN, many steps later.
    for steps in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=f"total_steps={steps} must be >= 1 and finite"):
            schedule(steps)
    for steps in ("5", None, torch.tensor([4, 5]), 1j):
        with pytest.raises(TypeError, match=r"total_steps=.* must be a number"):
            schedule(steps)
    if schedule is not linear_warmup:
        for scale in (math.nan, math.inf):
            with pytest.raises(ValueError, match=f"scale={scale} must be > 0 and finite"):
                schedule(5, scale)
    with pytest.raises(ValueError, match="step=nan must be >= 0"):
        schedule(5)(math.nan)
    with pytest.raises(TypeError, match="step='1' is a str"):
        schedule(5)("1")
    with pytest.raises(ValueError, match="total_steps must be a number in the range of floats"):
        schedule(10**400)
    assert schedule(5)(math.inf) == schedule(5)(5)
    assert schedule(5)(10**300) == schedule(5)(5)


@pytest.mark.parametrize("name", ["temperature", "epsilon"])
def test_conventions_of_no_number(name):
    for wrong in ("a", None, torch.tensor([1.0, 2.0])):
        with pytest.raises(TypeError, match=f"{name}=.* must be a number"):
            replace(RELEASED, **{name: wrong})


@pytest.mark.parametrize("name", ["detach_equivalence", "target_softmax", "iais_target_softmax"])
def test_switches_of_conventions_are_bools(name):
    # "no" was taken for True.
    for wrong in ("no", 1, None):
        with pytest.raises(TypeError, match=f"{name}={wrong!r} must be True or False"):
            replace(RELEASED, **{name: wrong})


def test_the_weight_of_a_regularizer_is_a_number():
    model = torch.nn.TransformerEncoderLayer(8, 2)
    for weight in (math.inf, math.nan, -1):
        with pytest.raises(ValueError, match=f"weight={weight} must be >= 0 and finite"):
            regularize(model, CACRLoss(), n_text=2, weight=weight)
    with pytest.raises(TypeError, match="weight='1' is a str: it must be a number"):
        regularize(model, CACRLoss(), n_text=2, weight="1")
