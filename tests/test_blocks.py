"""split_attention and AttentionBlocks: Eq. 2, block by block."""

import pytest
import torch

from attncongruence import AttentionBlocks, TokenLayout, split_attention
from attncongruence.sources import ScoreSource
from tests.helpers.problems import assert_close, fast, make_problem, randn


@pytest.mark.parametrize("shape", [(2, 3, 7, 7), (2, 7, 7)])
def test_one_boundary_gives_views(shape):
    S = randn(*shape)
    blocks = split_attention(S, 3)
    expected = {"LL": S[..., :3, :3], "LV": S[..., :3, 3:], "VL": S[..., 3:, :3], "VV": S[..., 3:, 3:]}
    for name, block in expected.items():
        own = getattr(blocks, name)
        assert torch.equal(own, block)
        assert own.data_ptr() == block.data_ptr()
    assert blocks.text_mask.shape == (2, 3)
    assert blocks.image_mask.shape == (2, 4)
    assert blocks.text_mask.all()
    assert blocks.image_mask.all()


def test_by_hand():
    S = torch.arange(16.0).view(1, 4, 4)
    # image, text, nothing, text
    layout = TokenLayout(torch.tensor([[False, True, False, True]]), torch.tensor([[True, False, False, False]]))
    blocks = split_attention(S, layout)
    assert blocks.LL.tolist() == [[[5, 7], [13, 15]]]
    assert blocks.LV.tolist() == [[[4], [12]]]
    assert blocks.VL.tolist() == [[[1, 3]]]
    assert blocks.VV.tolist() == [[[0]]]


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("kind", ["int", "ragged", "interleaved"])
def test_real_entries_are_each_samples_own(kind, rank):
    for seed in range(6):
        problem = make_problem(kind, rank, seed, batch=3)
        blocks = split_attention(problem.S, problem.n_text, mask=problem.mask)
        for i in range(3):
            where = {"L": problem.text[i].nonzero()[:, 0], "V": problem.image[i].nonzero()[:, 0]}
            real = {"L": blocks.text_mask[i], "V": blocks.image_mask[i]}
            for name in ("LL", "LV", "VL", "VV"):
                expected = problem.S[i][..., where[name[0]], :][..., where[name[1]]]
                own = getattr(blocks, name)[i][..., real[name[0]], :][..., real[name[1]]]
                assert torch.equal(own, expected)


def test_a_layout_of_two_stretches_gives_views():
    S = randn(2, 2, 9, 9)
    # image 1..3, special 4, text 5..8; the second sample has fewer of both
    image = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0, 0]]).bool()
    text = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 0]]).bool()
    blocks = split_attention(S, TokenLayout(text, image))
    assert blocks.LV.data_ptr() == S[..., 5:, 1:4].data_ptr()
    assert torch.equal(blocks.LV, S[..., 5:, 1:4])
    assert torch.equal(blocks.text_mask, text[:, 5:])
    assert torch.equal(blocks.image_mask, image[:, 1:4])
    # With no sample that fills the stretch, gathering is smaller.
    assert split_attention(S, TokenLayout(text, image)[[1]].to("cpu")).LV.shape == (2, 2, 2, 2)


def test_ragged_blocks_are_as_long_as_the_longest():
    S = randn(2, 1, 9, 9)
    mask = torch.arange(9) < torch.tensor([[7], [5]])
    blocks = split_attention(S, torch.tensor([2, 4]), mask=mask)
    assert blocks.LV.shape == (2, 1, 4, 5)
    assert blocks.text_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert blocks.image_mask.tolist() == [[True] * 5, [True, False, False, False, False]]


def test_swap():
    blocks = split_attention(randn(2, 3, 7, 7), 3, mask=torch.rand(2, 1, 7, 7) < 0.7)
    swapped = blocks.swap()
    for name, other in {"LL": "VV", "LV": "VL", "VL": "LV", "VV": "LL"}.items():
        assert getattr(swapped, name) is getattr(blocks, other)
        assert getattr(swapped.allowed, name) is getattr(blocks.allowed, other)
    assert swapped.text_mask is blocks.image_mask
    with pytest.raises(ValueError, match="these blocks have no VL"):
        AttentionBlocks.from_streams(LL=randn(1, 2, 2), LV=randn(1, 2, 3), VV=randn(1, 3, 3)).swap()


def test_a_mask_of_columns_is_a_mask_of_tokens():
    S, tokens = randn(2, 2, 7, 7), torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7]).bool()
    for name in ("cacr", "singular"):
        expected = fast(name, S, 3, mask=tokens)
        for pairs in (
            tokens[:, None, None, :],
            tokens[:, None, None, :].expand(2, 2, 7, 7),
            tokens[:, None].expand(2, 7, 7),
        ):
            assert_close(fast(name, S, 3, mask=pairs), expected, 1e-12)
        assert_close(fast(name, S, 3, mask=tokens.long()), expected, 1e-12)


class Layer(ScoreSource):
    def __init__(self, scores, allowed):
        self._scores, self._allowed = scores, allowed

    scores = property(lambda self: self._scores)
    allowed = property(lambda self: self._allowed)


def test_a_layer_brings_its_own_mask():
    S, tokens = randn(2, 2, 7, 7), torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7]).bool()
    special = torch.tensor([[1, 0, 0, 0, 0, 0, 0]]).bool().expand(2, 7)
    layer = Layer(S.masked_fill(~tokens[:, None, None], -torch.inf), tokens[:, None, None])
    assert_close(fast("cacr", layer, 3), fast("cacr", S, 3, mask=tokens), 1e-12)
    assert_close(fast("cacr", layer, 3, mask=~special), fast("cacr", S, 3, mask=tokens & ~special), 1e-12)
    assert_close(fast("cacr", Layer(S, None), 3, mask=tokens), fast("cacr", S, 3, mask=tokens), 1e-12)


def test_from_streams_equals_split():
    S, tokens = randn(2, 2, 7, 7), torch.tensor([[1, 1, 0, 1, 1, 1, 0], [1] * 7]).bool()
    whole = split_attention(S, 3)
    parts = {name: getattr(whole, name) for name in ("LL", "LV", "VL", "VV")}
    assert_close(fast("cacr", AttentionBlocks.from_streams(**parts)), fast("cacr", S, 3), 1e-12)
    expected = fast("cacr", S, 3, mask=tokens)
    masked = AttentionBlocks.from_streams(**parts, text_mask=tokens[:, :3], image_mask=tokens[:, 3:].long())
    assert_close(fast("cacr", masked), expected, 1e-12)
    # Captured layers say themselves which keys are real.
    text, image = tokens[:, None, None, :3], tokens[:, None, None, 3:]
    layers = {name: Layer(block, text if name[1] == "L" else image) for name, block in parts.items()}
    assert_close(fast("cacr", AttentionBlocks.from_streams(**layers)), expected, 1e-12)
    flat = {name: block[:, 0] for name, block in parts.items()}
    assert_close(fast("cacr", AttentionBlocks.from_streams(**flat)), fast("cacr", S[:, 0], 3), 1e-12)


FIVE_D = {
    name: randn(2, 1, 2, *size) for name, size in {"LL": (3, 3), "LV": (3, 4), "VL": (4, 3), "VV": (4, 4)}.items()
}


FIVE_D = {
    name: randn(2, 1, 2, *size) for name, size in {"LL": (3, 3), "LV": (3, 4), "VL": (4, 3), "VV": (4, 4)}.items()
}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"LV": randn(2, 2, 3, 5)}, ValueError),
        ({"LL": randn(2, 2, 3, 4)}, ValueError),
        ({"VL": randn(2, 2, 3, 4)}, ValueError),
        ({"text_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError),
        ({"VV": torch.zeros(2, 2, 4, 4, dtype=torch.long)}, ValueError),
        ({"VV": randn(2, 2, 4, 4).to("meta")}, ValueError),
        ({"VV": randn(2, 4, 4)}, ValueError),
        ({"VV": randn(2, 2, 4, 4).float()}, ValueError),
        (FIVE_D, ValueError),
    ],
)
def test_from_streams_rejects(change, error):
    right = {"LL": randn(2, 2, 3, 3), "LV": randn(2, 2, 3, 4), "VV": randn(2, 2, 4, 4), "VL": randn(2, 2, 4, 3)}
    AttentionBlocks.from_streams(**right)
    with pytest.raises(error, match=r"LV|LL|VL|text_mask|VV|one device|must be all"):
        AttentionBlocks.from_streams(**(right | change))
