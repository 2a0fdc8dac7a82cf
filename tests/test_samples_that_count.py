"""Which samples count: those in which text and image may see each other, as far as the direction needs it."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attncongruence import CACRLoss, QueryKey, TokenLayout, cacr_loss, capture_attention, regularize
from attncongruence.metrics import argmax_entropy
from tests.helpers.problems import CASES, DIRECTIONS, Synchronizations, assert_close, fast, randn, slow

NEEDS = {"language": "l", "vision": "v", "both": "lv"}
UNSEEN = "in no sample of the batch may text attend to the image"


def drawn(seed, batch=5, heads=2, n=3, m=4):
    """Scores, a layout and random pairs, in which some samples lose LV, some VL, some both, some all their image."""
    generator = torch.Generator().manual_seed(seed)
    length = n + m
    kinds = torch.randint(0, 3, (batch, length), generator=generator)
    kinds[:, :2] = torch.tensor([0, 1])  # text and image in each sample, but
    text, image = kinds == 0, kinds == 1
    image[seed % batch] = False
    pairs = torch.rand(batch, 1 + seed % heads, length, length, generator=generator) < 0.7
    blind = torch.randint(0, 4, (batch,), generator=generator)
    LV, VL = text[:, :, None] & image[:, None, :], image[:, :, None] & text[:, None, :]
    hidden = (LV & (blind & 1).bool()[:, None, None]) | (VL & (blind & 2).bool()[:, None, None])
    pairs &= ~hidden[:, None]
    return randn(batch, heads, length, length, seed=seed), TokenLayout(text, image), pairs


def seen(layout, pairs, way):
    """Whether a sample's text may see its image (l), and its image the text (v); by loops."""
    found = []
    for text, image, own in zip(layout.text, layout.image, pairs.any(1), strict=True):
        rows, columns = (text, image) if way == "l" else (image, text)
        found.append(any(bool(own[i, j]) for i in rows.nonzero()[:, 0] for j in columns.nonzero()[:, 0]))
    return found


@pytest.mark.parametrize(("name", "convention"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_a_sample_that_sees_nothing_is_like_one_without_an_image(name, convention, seed):
    S, layout, pairs = drawn(seed + 10 * len(name))
    for direction in DIRECTIONS:
        ways = "lv" if name == "distributed" else NEEDS[direction]
        counts = [all(each) for each in zip(*(seen(layout, pairs, way) for way in ways), strict=True)]
        options = {"convention": convention, "direction": direction}
        # Each sample alone, cut to its own tokens
        alone = []
        for sample, counted in enumerate(counts):
            own = (layout.text | layout.image)[sample]
            part = TokenLayout(layout.text[sample : sample + 1, own], layout.image[sample : sample + 1, own])
            cut = (slice(sample, sample + 1), slice(None), own.nonzero()[:, 0][:, None], own.nonzero()[:, 0])
            alone.append(fast(name, S[cut], part, mask=pairs[cut], **options) if counted else S.new_zeros(()))
        if not any(counts):
            continue
        leaf = S.clone().requires_grad_()
        each = fast(name, leaf, layout, mask=pairs, reduction="none", **options)
        assert_close(each, torch.stack(alone), 1e-12)
        (grad,) = torch.autograd.grad(each.sum(), leaf)
        for sample, counted in enumerate(counts):
            if not counted:
                assert each[sample] == 0
                assert (grad[sample] == 0).all()
        mean = sum(alone) / sum(counts)
        for loss in (fast, slow):
            assert_close(loss(name, S, layout, mask=pairs, **options), mean, 1e-12)
            assert_close(loss(name, S, layout, mask=pairs, reduction="sum", **options), sum(alone), 1e-12)


def test_the_mean_does_not_depend_on_which_neighbor_sees_no_image():
    # Sample 0: image, text; sample 1: text, image; sample 2: text alone. All causal.
    S, causal = randn(3, 2, 7, 7), torch.ones(3, 7, 7, dtype=torch.bool).tril()
    is_text = torch.arange(7) >= 4
    text = torch.stack([is_text, ~is_text, is_text])
    layout = TokenLayout(text, torch.stack([~is_text, is_text, torch.zeros(7).bool()]))
    alone = cacr_loss(S[:1], layout[0], mask=causal[:1], direction="language")
    for kept in ([0], [0, 1], [0, 2], [1, 0, 2]):
        value = cacr_loss(S[kept], layout[kept], mask=causal[kept], direction="language")
        assert_close(value, alone, 1e-14)
        assert argmax_entropy(S[kept], layout[kept], mask=causal[kept]) == argmax_entropy(
            S[:1], layout[0], mask=causal[:1]
        )
    # The image that comes last sees the text: the vision side of sample 1 alone.
    vision = cacr_loss(S, layout, mask=causal, direction="vision", reduction="none")
    assert (vision != 0).tolist() == [False, True, False]
    assert_close(cacr_loss(S, layout, mask=causal, direction="vision"), vision[1], 1e-14)
    # Both sides are defined in no sample.
    with pytest.raises(ValueError, match=r"no pair of VL may attend in any sample .*direction='language'"):
        cacr_loss(S, layout, mask=causal)


@pytest.mark.parametrize("direction", ["language", "both"])
def test_a_batch_of_such_samples_is_zero_with_a_graph_and_a_warning(direction):
    q, k = (randn(2, 2, 8, 4, seed=seed).requires_grad_() for seed in (1, 2))
    causal = torch.ones(2, 1, 8, 8, dtype=torch.bool).tril()
    for attention, n_text in itertools.product((QueryKey(q, k), QueryKey(q, k).scores), (5, torch.tensor([5, 3]))):
        for reduction in ("mean", "sum", "none"):
            with pytest.warns(UserWarning, match=UNSEEN):
                value = cacr_loss(attention, n_text, mask=causal, direction=direction, reduction=reduction)
            assert (value == 0).all()
            assert value.requires_grad
            assert all((grad == 0).all() for grad in torch.autograd.grad(value.sum(), (q, k), retain_graph=True))


def test_pairs_still_cost_one_synchronization():
    S, layout, pairs = drawn(3)
    for direction in DIRECTIONS:
        with Synchronizations() as waits, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cacr_loss(S, layout, mask=pairs, direction=direction)
        assert waits.count == 1, waits.names


class Decoder(nn.Module):
    """One causal self-attention, and a loss."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x, image):
        q, k, v = (t[:, None] for t in self.qkv(x).chunk(3, -1))
        return {"loss": F.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()}


def test_training_goes_on_and_says_it_once():
    torch.manual_seed(0)
    model, x = Decoder(), torch.randn(2, 7, 6)
    last, first = (torch.arange(7) >= 4).expand(2, 7), (torch.arange(7) < 3).expand(2, 7)
    none = torch.zeros(2, 7, dtype=torch.bool)
    term = regularize(
        model, CACRLoss(direction="language"), lambda batch, captured: TokenLayout(~batch["image"], batch["image"])
    )
    with term, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        losses = []
        for image in (last, first, last, torch.stack([first[0], last[1]]), none, none):
            output = model(x, image)
            output["loss"].backward()
            losses.append(float(term.last.congruence))
    assert [loss == 0 for loss in losses] == [True, False, True, False, True, True]
    assert [str(w.message)[:24] for w in said] == ["in no sample of the batch"[:24], "a batch has no image token"[:24]]
    with capture_attention(model) as capture:
        model(x, first)
        expected = cacr_loss(capture.pop()[:1], TokenLayout(~first, first)[0], direction="language")
    assert losses[3] == pytest.approx(expected.item(), rel=1e-6)  # the other sample does not count
