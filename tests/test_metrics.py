"""Metrics: values by hand, brute force over random scores with ties, accumulation over batches, rejects."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from attncongruence import (
    PRINTED,
    RELEASED,
    WEIGHTED_MEAN,
    AttentionBlocks,
    TokenLayout,
    argmax_entropy,
    attention_distance,
    iais_loss,
    recall_at_k,
    winoground_scores,
)

# -- Winoground -------------------------------------------------------------------------------------------------------


def winoground_by_hand(s: Tensor) -> tuple[float, float, float]:
    """Three loops: examples, captions or images, and whether all of them choose right."""
    right = {"text": 0, "image": 0, "group": 0}
    for example in s.tolist():
        text = image = True
        for own in range(2):
            for other in range(2):
                if other != own:
                    text = text and example[own][own] > example[other][own]
                    image = image and example[own][own] > example[own][other]
        right["text"] += text
        right["image"] += image
        right["group"] += text and image
    return tuple(100 * count / len(s) for count in right.values())


def test_winoground_equals_three_loops_with_ties():
    random = torch.Generator().manual_seed(0)
    for values in (2, 3, 5):
        s = torch.randint(values, (400, 2, 2), generator=random).float()
        assert winoground_scores(s) == pytest.approx(winoground_by_hand(s), abs=1e-12)
    assert 0 < winoground_scores(s).group < winoground_scores(s).text < 100


@pytest.mark.parametrize(
    ("s", "expected"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], (100, 100, 100)),
        ([[1.0, 0.0], [1.0, 2.0]], (0, 100, 0)),  # image 0 cannot tell the captions apart: a tie
        ([[1.0, 1.0], [0.0, 2.0]], (100, 0, 0)),  # caption 0 cannot tell the images apart
        ([[0.0, 0.0], [0.0, 0.0]], (0, 0, 0)),
        ([[0.0, 1.0], [1.0, 0.0]], (0, 0, 0)),
    ],
)
def test_winoground_by_hand(s, expected):
    assert winoground_scores(torch.tensor([s])) == expected


def test_winoground_chance_is_exact():
    """All orders of four different scores: text and image in 6 of 24, both in 4 of 24."""
    orders = torch.tensor(list(itertools.permutations(range(4)))).view(24, 2, 2)
    assert winoground_scores(orders) == pytest.approx((25, 25, 100 / 6))


def test_winoground_text_and_image_are_each_others_transpose():
    s = torch.randint(3, (100, 2, 2), generator=torch.Generator().manual_seed(1))
    scores, swapped = winoground_scores(s), winoground_scores(s.mT)
    assert (scores.text, scores.image, scores.group) == (swapped.image, swapped.text, swapped.group)
    assert scores.text != scores.image


def test_winoground_rejects():
    with pytest.raises(ValueError, match=r"s is f32\[3,4\]"):
        winoground_scores(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"s of shape \(0, 2, 2\) is empty"):
        winoground_scores(torch.zeros(0, 2, 2))
    with pytest.raises(ValueError, match="s contains NaN"):
        winoground_scores(torch.full((1, 2, 2), torch.nan))


# -- recall -----------------------------------------------------------------------------------------------------------


def recall_by_hand(scores: Tensor, k: int, relevant: Tensor) -> float:
    found = 0
    for row, mine in zip(scores.tolist(), relevant.tolist(), strict=True):
        # Worst case of any order of ties: irrelevant candidates first.
        order = sorted(range(len(row)), key=lambda j: (-row[j], mine[j]))
        found += any(mine[j] for j in order[:k])
    return 100 * found / len(scores)


@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_recall_equals_sorting_with_ties(k):
    random = torch.Generator().manual_seed(0)
    scores = torch.randint(4, (200, 7), generator=random).float()
    relevant = torch.rand(200, 7, generator=random) < 0.2
    relevant[torch.arange(200), torch.randint(7, (200,), generator=random)] = True
    assert recall_at_k(scores, k, relevant) == pytest.approx(recall_by_hand(scores, k, relevant), abs=1e-12)


def test_recall_of_an_index_and_of_the_diagonal():
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 6, generator=random)
    own = torch.randperm(6, generator=random)
    mask = torch.nn.functional.one_hot(own, 6).bool()
    assert recall_at_k(scores, 2, own) == recall_at_k(scores, 2, mask)
    assert recall_at_k(scores, 2) == recall_at_k(scores, 2, torch.arange(6))
    assert recall_at_k(scores, 2, own) != recall_at_k(scores, 2)


def test_recall_by_hand():
    scores = torch.tensor([[2, 1, 0], [2, 1, 0], [2, 1, 0]])
    assert [recall_at_k(scores, k) for k in (1, 2, 3)] == pytest.approx([100 / 3, 200 / 3, 100])
    assert recall_at_k(torch.zeros(4, 4), 3) == 0  # all alike: no rank at all
    assert recall_at_k(torch.zeros(4, 4), 4) == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 2), 0), "k=0 is out of range: 2 candidates allow 1 to 2"),
        ((torch.zeros(2, 2), 3), "k=3 is out of range"),
        ((torch.zeros(2, 3), 1), "2 queries and 3 candidates: without relevant= it must be square"),
        ((torch.zeros(2, 3), 1, torch.tensor([0, 3])), "relevant must name candidates 0 to 2"),
        ((torch.zeros(2, 3), 1, torch.tensor([0, -1])), "relevant must name candidates 0 to 2"),
        ((torch.zeros(1, 3), 1, torch.zeros(1, 3, dtype=torch.bool)), "every query needs a relevant candidate"),
        ((torch.zeros(0, 0), 1), "scores of shape .* is empty"),
        ((torch.full((1, 1), torch.nan), 1), "scores contains NaN"),
    ],
)
def test_recall_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(*arguments)


# -- attention --------------------------------------------------------------------------------------------------------

TEXT, IMAGE = 4, 5


@pytest.fixture
def S() -> Tensor:
    return torch.randn(
        3, 2, TEXT + IMAGE, TEXT + IMAGE, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )


def distance_by_hand(scores: Tensor, N: int, regions: list[int] | None) -> float:
    """One sample: for each head, rows of VV picked by region against rows of LL, over tokens that have a region."""
    total = 0.0
    for head in scores:
        LL, LV, VV = head[:N, :N], head[:N, N:], head[N:, N:]
        place = LV.argmax(-1).tolist() if regions is None else regions
        tokens = [i for i in range(N) if place[i] >= 0]
        for i in tokens:
            P = torch.tensor([VV[place[i], place[j]] for j in tokens], dtype=torch.float64).softmax(0)
            T = torch.tensor([LL[i, j] for j in tokens], dtype=torch.float64).softmax(0)
            total += float((P * (P / T).log()).sum() + (T * (T / P).log()).sum()) / len(tokens)
    return total / len(scores)


def test_attention_distance_equals_loops(S):
    expected = [distance_by_hand(sample, TEXT, None) for sample in S]
    torch.testing.assert_close(attention_distance(S, TEXT, reduction="none"), torch.tensor(expected).double())
    assert float(attention_distance(S, TEXT)) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("convention", [RELEASED, PRINTED, WEIGHTED_MEAN])
def test_without_regions_it_is_the_iais_loss_without_gradient(S, convention):
    S.requires_grad_()
    ours = attention_distance(S, TEXT, convention=convention)
    assert torch.equal(ours, iais_loss(S, TEXT, convention=convention, direction="language"))
    assert not ours.requires_grad


def test_annotated_regions_take_the_place_of_the_argmax(S):
    regions = torch.tensor([[0, 4, 2, 2], [3, -1, 0, -1], [-1, -1, -1, -1]])
    expected = [distance_by_hand(S[n], TEXT, regions[n].tolist()) for n in range(2)]
    ours = attention_distance(S, TEXT, regions=regions, reduction="none")
    torch.testing.assert_close(ours, torch.tensor([*expected, 0.0]).double())
    # The third sample has no region and is no part of the mean.
    assert float(attention_distance(S, TEXT, regions=regions)) == pytest.approx(sum(expected) / 2)
    assert float(attention_distance(S[2:], TEXT, regions=regions[2:])) == 0
    own = S[:, :1, :TEXT, TEXT:].argmax(-1)[:, 0]
    torch.testing.assert_close(attention_distance(S[:, :1], TEXT, regions=own), attention_distance(S[:, :1], TEXT))


def test_attention_distance_is_0_where_regions_attend_as_the_text_does(S):
    regions = torch.tensor([[1, 3, 0, 4]] * 3)
    rows = regions[0] + TEXT
    S[:, :, rows[:, None], rows] = S[:, :, :TEXT, :TEXT] + torch.randn(TEXT, 1)
    torch.testing.assert_close(attention_distance(S, TEXT, regions=regions), torch.zeros(()).double())
    S[0, 0, TEXT + 1, TEXT + 3] += 1.0
    assert attention_distance(S, TEXT, regions=regions) > 0.001


def test_attention_distance_with_padding_is_that_of_each_sample_alone(S):
    layout = TokenLayout.from_n_text(torch.tensor([4, 2, 3]), TEXT + IMAGE)
    regions = torch.tensor([[0, 1, -1, 2], [5, 0, -1, -1], [2, 2, 1, -1]])
    expected = [distance_by_hand(S[n], N, regions[n].tolist()[:N]) for n, N in enumerate((4, 2, 3))]
    ours = attention_distance(S, layout, regions=regions, reduction="none")
    torch.testing.assert_close(ours, torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (torch.zeros(3, 3, dtype=torch.long), r"regions has shape \(3, 3\).*\(3, 4\)"),
        (torch.full((3, 4), 5), "regions must lie between -1 and 4"),
        (torch.full((3, 4), -2), "regions must lie between -1 and 4"),
    ],
)
def test_attention_distance_rejects(S, regions, message):
    with pytest.raises(ValueError, match=message):
        attention_distance(S, TEXT, regions=regions)


def test_a_region_for_a_token_that_is_not_there(S):
    layout = TokenLayout.from_n_text(torch.tensor([4, 2, 3]), TEXT + IMAGE)
    with pytest.raises(ValueError, match="-1 where a sample has no text token"):
        attention_distance(S, layout, regions=torch.zeros(3, 4, dtype=torch.long))


def entropy_by_hand(LV: Tensor) -> float:
    """One map, text by image."""
    places = LV.argmax(-1).tolist()
    counts = [places.count(k) for k in range(LV.shape[1])]
    return -sum(c / len(places) * math.log(c / len(places)) for c in counts if c)


@pytest.mark.parametrize("direction", ["language", "vision"])
def test_argmax_entropy_equals_loops(S, direction):
    block = S[:, :, :TEXT, TEXT:] if direction == "language" else S[:, :, TEXT:, :TEXT]
    expected = torch.tensor([entropy_by_hand(A) for A in block.softmax(-1).mean(1)])
    released = {"convention": RELEASED, "direction": direction}
    torch.testing.assert_close(argmax_entropy(S, TEXT, reduction="none", **released), expected)
    torch.testing.assert_close(argmax_entropy(S, TEXT, **released), expected.mean())
    torch.testing.assert_close(argmax_entropy(S, TEXT, reduction="sum", **released), expected.sum())
    each = torch.tensor([[entropy_by_hand(head) for head in sample] for sample in block])
    weighted = {"convention": WEIGHTED_MEAN, "direction": direction}
    torch.testing.assert_close(argmax_entropy(S, TEXT, reduction="none", **weighted), each.mean(1))
    assert not torch.equal(each.mean(1), expected)


def test_one_default_convention(S):
    for metric in (attention_distance, argmax_entropy):
        assert torch.equal(metric(S, TEXT), metric(S, TEXT, convention=WEIGHTED_MEAN))
        assert not torch.equal(metric(S, TEXT), metric(S, TEXT, convention=RELEASED))


@pytest.mark.parametrize(
    ("places", "expected"),
    [([0, 0, 0, 0], 0.0), ([0, 1, 2, 3], math.log(4)), ([0, 0, 1, 1], math.log(2)), ([2, 2, 2, 4], 0.5623351446)],
)
def test_argmax_entropy_by_hand(places, expected):
    scores = torch.zeros(1, TEXT + IMAGE, TEXT + IMAGE)
    scores[0, torch.arange(TEXT), TEXT + torch.tensor(places)] = 1.0
    assert float(argmax_entropy(scores, TEXT)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("places", "expected"), [([3] * 5, 0.0), ([0, 1, 2, 3, 3], 1.3321790402), ([1, 1, 1, 2, 2], 0.6730116670)]
)
def test_argmax_entropy_of_the_vision_side_by_hand(places, expected):
    """Five image tokens look at four text tokens: 3 log(5) / 5 + 2 log(5/2) / 5, for instance."""
    scores = torch.zeros(1, TEXT + IMAGE, TEXT + IMAGE)
    scores[0, TEXT + torch.arange(IMAGE), torch.tensor(places)] = 1.0
    assert float(argmax_entropy(scores, TEXT, direction="vision")) == pytest.approx(expected)
    assert argmax_entropy(scores, TEXT) == 0  # all text tokens look alike: the first image token


def test_argmax_entropy_of_the_vision_side_is_that_of_swapped_text_and_image(S):
    """Padding and pairs that may not attend, too: the layout that exchanges text and image gives the same numbers."""
    text = torch.arange(TEXT + IMAGE)[None] < torch.tensor([[4], [2], [4]])
    image = ((torch.arange(TEXT + IMAGE) >= TEXT) & (torch.arange(TEXT + IMAGE) != 6)).expand(3, -1)
    pairs = torch.ones(3, 2, TEXT + IMAGE, TEXT + IMAGE, dtype=torch.bool)
    pairs[:, 1, TEXT, :TEXT] = False
    for convention in (RELEASED, WEIGHTED_MEAN):
        common = {"mask": pairs, "convention": convention, "reduction": "none"}
        vision = argmax_entropy(S, TokenLayout(text, image), direction="vision", **common)
        torch.testing.assert_close(vision, argmax_entropy(S, TokenLayout(image, text), **common))
        assert vision.min() > 0


def test_argmax_entropy_rejects(S):
    with pytest.raises(ValueError, match="direction='both' is not known: it must be one of 'language', 'vision'"):
        argmax_entropy(S, TEXT, direction="both")
    blocks = AttentionBlocks.from_streams(LL=S[..., :TEXT, :TEXT], LV=S[..., :TEXT, TEXT:], VV=S[..., TEXT:, TEXT:])
    with pytest.raises(ValueError, match="these blocks have no VL"):
        argmax_entropy(blocks, direction="vision")


def test_argmax_entropy_with_padding_is_that_of_each_sample_alone(S):
    mask = torch.ones(3, TEXT + IMAGE, dtype=torch.bool)
    mask[1, 2:4] = mask[2, 6:] = False
    cut = [S[0], S[1][:, [0, 1, 4, 5, 6, 7, 8]][:, :, [0, 1, 4, 5, 6, 7, 8]], S[2][:, :6, :6]]
    alone = [argmax_entropy(sample[None], N) for sample, N in zip(cut, (4, 2, 4), strict=True)]
    for convention in (RELEASED, WEIGHTED_MEAN):
        alone = [
            argmax_entropy(sample[None], N, convention=convention) for sample, N in zip(cut, (4, 2, 4), strict=True)
        ]
        ours = argmax_entropy(S, TEXT, mask=mask, convention=convention, reduction="none")
        torch.testing.assert_close(ours, torch.stack(alone))


def test_argmax_entropy_leaves_out_tokens_that_may_look_at_nothing(S):
    """Pairs of each head: token 0 may look at no region, token 1 in the second head at region 2 alone."""
    pairs = torch.ones(3, 2, TEXT + IMAGE, TEXT + IMAGE, dtype=torch.bool)
    pairs[:, :, 0, TEXT:] = False
    pairs[:, 1, 1, TEXT:] = False
    pairs[:, 1, 1, TEXT + 2] = True
    LV = S[:, :, 1:TEXT, TEXT:].clone()
    LV[:, 1, 0] = torch.nn.functional.one_hot(torch.tensor(2), IMAGE)
    expected = torch.tensor([[entropy_by_hand(head) for head in sample] for sample in LV]).mean(1)
    ours = argmax_entropy(S, TEXT, mask=pairs, convention=WEIGHTED_MEAN, reduction="none")
    torch.testing.assert_close(ours, expected)


def test_a_sample_without_image_is_no_part_of_the_mean(S):
    layout = TokenLayout.from_n_text(torch.tensor([4, 9, 4]), TEXT + IMAGE)
    each = argmax_entropy(S, layout, reduction="none")
    assert each[1] == 0
    torch.testing.assert_close(argmax_entropy(S, layout), (each[0] + each[2]) / 2)
    assert argmax_entropy(S, n_text=9) == 0


def test_blocks_of_a_dual_stream_do_as_well(S):
    blocks = AttentionBlocks.from_streams(LL=S[..., :TEXT, :TEXT], LV=S[..., :TEXT, TEXT:], VV=S[..., TEXT:, TEXT:])
    assert torch.equal(argmax_entropy(blocks), argmax_entropy(S, TEXT))
    assert torch.equal(attention_distance(blocks), attention_distance(S, TEXT))
    with pytest.raises(ValueError, match="reduction='median'"):
        argmax_entropy(blocks, reduction="median")


# -- over batches and processes ---------------------------------------------------------------------------------------


@pytest.mark.needs("torchmetrics>=1.6", reason="lightning brings it; merge_state came with 1.6")
def test_metrics_over_batches_and_processes(S):
    """As docs/metrics.md does it: two processes with batches of different sizes, and a sample that has no image."""
    from torchmetrics import MeanMetric

    layout = TokenLayout.from_n_text(torch.tensor([4, 9, 4]), TEXT + IMAGE)
    pairs = torch.randint(3, (7, 2, 2), generator=torch.Generator().manual_seed(0))
    expected = {
        "entropy": argmax_entropy(S, layout),
        "distance": attention_distance(S, layout),
        "group": winoground_scores(pairs).group,
        "recall": recall_at_k(pairs[:, 0], 1, pairs[:, 1, 0] % 2),
    }
    processes = [{name: MeanMetric(nan_strategy="error") for name in expected} for _ in range(2)]
    for process, samples, examples in (
        (processes[0], slice(0, 1), slice(0, 4)),
        (processes[0], slice(1, 2), slice(4, 5)),
        (processes[1], slice(2, 3), slice(5, 7)),
    ):
        counts = layout.text.any(-1)[samples] & layout.image.any(-1)[samples]
        for name, metric in (("entropy", argmax_entropy), ("distance", attention_distance)):
            process[name].update(metric(S[samples], layout[samples], reduction="none")[counts])
        some = pairs[examples]
        process["group"].update(winoground_scores(some).group, weight=len(some))
        process["recall"].update(recall_at_k(some[:, 0], 1, some[:, 1, 0] % 2), weight=len(some))
    for name, value in expected.items():
        processes[0][name].merge_state(processes[1][name])
        assert float(processes[0][name].compute()) == pytest.approx(float(value)), name
