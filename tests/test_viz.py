"""Pictures: what they show is what the library computes, and they look as they should."""

import functools
import importlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.testing.compare import compare_images

from attncongruence import RELEASED, AttentionBlocks, TokenLayout, argmax_entropy, split_attention
from attncongruence.viz import plot_blocks, plot_congruence, plot_region_labels, plot_token_attention
from attncongruence.viz.picture import BEST, NEXT
from examples import pictures
from tests.helpers.problems import CASES, CONVENTIONS, fast, make_problem, randn
from tests.helpers.viz_pictures import FOLDER, PICTURES, causal, hiding, image, save, scores

# Of 255, root mean square. matplotlib 3.9 and 3.11 differ by 3.3, two blocks exchanged make 30 and more.
TOLERANCE = 6.0


def shown(figure):
    """The arrays of its heat maps, NaN where nothing is drawn."""
    return [axes.images[0].get_array().filled(np.nan) for axes in figure.axes if axes.images]


def title_nats(figure):
    """The loss as its title says it."""
    return figure.get_suptitle().split(": ")[1].split(" nats")[0]


# -- as a whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PICTURES)
def test_looks_as_before(name, tmp_path):
    save(PICTURES[name](), tmp_path / f"{name}.png")
    difference = compare_images(str(FOLDER / f"{name}.png"), str(tmp_path / f"{name}.png"), TOLERANCE)
    assert difference is None, f"{difference}\npython -m tests.helpers.viz_pictures draws {FOLDER} anew"


def test_the_tolerance_tells_pictures_apart(tmp_path):
    S = scores(1, 2, 9)
    for name, figure in (
        ("blocks", plot_blocks(S.mT, 4)),
        ("blocks_causal", plot_blocks(S.masked_fill(~causal(9), 0.0), 4, values="probabilities")),
        ("congruence", plot_congruence(S.mT, 4, convention=CONVENTIONS["WEIGHTED_MEAN"])),
        ("patches", plot_token_attention(scores(1, 2, 17), 2, image=image(40, 64), token=1, grid=(3, 5), top=3)),
    ):
        save(figure, tmp_path / "other.png")
        assert compare_images(str(FOLDER / f"{name}.png"), str(tmp_path / "other.png"), 2 * TOLERANCE) is not None


SILENT = """
import os, sys
import attncongruence
assert "matplotlib" not in sys.modules, "the library itself needs no matplotlib"
import matplotlib
matplotlib.use("template")
before = matplotlib.rcParams.copy()
from tests.helpers.viz_pictures import PICTURES
for draw in PICTURES.values():
    draw().savefig(os.devnull, format="png")
changed = [name for name, value in before.items() if matplotlib.rcParams[name] != value]
assert not changed, changed
assert "matplotlib.pyplot" not in sys.modules, "pyplot"
assert os.listdir() == [], "files"
"""


@pytest.mark.slow
def test_nothing_but_a_figure(tmp_path, monkeypatch):
    """In a process of its own, without a display: no pyplot, no rcParams, no file."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    result = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("attncongruence.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        importlib.import_module("attncongruence.viz")


@pytest.mark.docs
def test_the_page_draws_the_committed_pictures(tmp_path):
    drawn = {path.name for path in pictures.render(tmp_path)}
    committed = {path.name: path.stat().st_size for path in (pictures.PAGE.parent / "pictures").iterdir()}
    assert drawn == set(committed)
    assert max(committed.values()) < 100_000


def test_drawing_into_a_part_of_a_figure():
    figure = Figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert plot_blocks(randn(1, 5, 5), 2, figure=left) is figure
    assert plot_congruence(randn(1, 5, 5), 2, figure=right) is figure
    assert plot_blocks(randn(1, 5, 5), 2) is not figure
    assert (len(left.axes), len(right.axes)) == (5, 5)


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int", "ragged", "interleaved"])
@pytest.mark.parametrize("head", [None, 1])
def test_blocks_are_those_of_split_attention(kind, head):
    problem = make_problem(kind, 4, seed=3, n=5, m=6)
    blocks = split_attention(problem.S, problem.n_text, mask=problem.mask)
    for sample in range(2):
        figure = plot_blocks(problem.S, problem.n_text, mask=problem.mask, sample=sample, head=head)
        text, image = blocks.text_mask[sample], blocks.image_mask[sample]
        heads = slice(None) if head is None else slice(head, head + 1)
        for array, block, rows, columns in zip(
            shown(figure),
            (blocks.LL, blocks.LV, blocks.VL, blocks.VV),
            (text, text, image, image),
            (text, image, text, image),
            strict=True,
        ):
            expected = block[sample, heads].mean(0)[rows][:, columns]
            np.testing.assert_allclose(array, expected, atol=1e-12)


def test_probabilities_are_each_blocks_own_softmax():
    S = randn(1, 3, 7, 7)
    for array, part in zip(
        shown(plot_blocks(S, 3, values="probabilities")),
        (S[..., :3, :3], S[..., :3, 3:], S[..., 3:, :3], S[..., 3:, 3:]),
        strict=True,
    ):
        np.testing.assert_allclose(array, part.softmax(-1).mean(1)[0], atol=1e-12)


@pytest.mark.parametrize("values", ["scores", "probabilities"])
def test_pairs_that_may_not_attend_are_hatched(values):
    pairs = causal(9)
    figure = plot_blocks(randn(1, 2, 9, 9), 4, mask=pairs, values=values)
    LL, LV, VL, VV = (np.isnan(array) for array in shown(figure))
    assert np.array_equal(LL, ~pairs[0, :4, :4])
    assert np.array_equal(VV, ~pairs[0, 4:, 4:])
    assert LV.all()
    assert not VL.any()
    assert all(axes.patch.get_hatch() for axes in figure.axes[:4])


def test_a_mean_is_over_the_heads_that_allow_a_pair():
    pairs = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    pairs[:, 0, 0, 1] = False
    pairs[:, :, 1, 0] = False
    S = randn(1, 2, 5, 5)
    LL = shown(plot_blocks(S, 2, mask=pairs))[0]
    assert LL[0, 1] == pytest.approx(float(S[0, 1, 0, 1]))
    assert LL[0, 0] == pytest.approx(float(S[0, :, 0, 0].mean()))
    assert np.isnan(LL[1, 0])


def test_a_score_of_minus_infinity_is_no_attention():
    S = randn(1, 2, 5, 5)
    S[:, :, 0, 1] = -torch.inf
    assert np.isnan(shown(plot_blocks(S, 2))[0][0, 1])
    assert shown(plot_blocks(S, 2, values="probabilities"))[0][0, 1] == 0


def test_a_dual_stream_without_VL_leaves_its_place_hatched():
    S = randn(1, 2, 7, 7)
    blocks = AttentionBlocks.from_streams(LL=S[..., :3, :3], LV=S[..., :3, 3:], VV=S[..., 3:, 3:])
    arrays = shown(plot_blocks(blocks))
    assert np.isnan(arrays[2]).all()
    assert arrays[2].shape == (4, 3)
    np.testing.assert_array_equal(arrays[1], shown(plot_blocks(S, 3))[1])


def test_labels_are_words_and_the_boundary_is_drawn():
    words, regions = ["$a$", "b_", "c^2"], ["r1", "r2"]
    figure = plot_blocks(randn(1, 5, 5), 3, text_labels=words, image_labels=regions)
    LL, LV, VL, VV = figure.axes[:4]
    assert [label.get_text() for label in VL.get_xticklabels()] == words
    assert [label.get_text() for label in LL.get_yticklabels()] == words
    assert [label.get_text() for label in VV.get_xticklabels()] == regions
    assert not any(label.get_parse_math() for label in VL.get_xticklabels())
    for axes, edges in ((LL, "right bottom"), (LV, "left bottom"), (VL, "right top"), (VV, "left top")):
        assert {edge for edge, spine in axes.spines.items() if spine.get_linewidth() > 1} == set(edges.split())


@pytest.mark.parametrize("count", [3, 40, *(pytest.param(count, marks=pytest.mark.slow) for count in (10, 120))])
@pytest.mark.parametrize("letters", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_tick_labels_do_not_overlap(count, letters):
    labels = ["My" * letters] * count
    for figure in (
        plot_blocks(randn(1, count + 5, count + 5), count, text_labels=labels),
        plot_congruence(randn(1, count + 5, count + 5), count, text_labels=labels),
    ):
        figure.savefig("/dev/null", format="png")
        first_column, with_keys = figure.axes[0], figure.axes[2]
        rows = [label.get_window_extent() for label in first_column.get_yticklabels()]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(rows))
        keys = with_keys.get_xticklabels()
        if keys[0].get_rotation() == 45:  # side by side if their lines are: the height of one, at a slant
            points = with_keys.bbox.width / len(keys) / figure.dpi * 72
            assert points > rcParams["font.size"] * 1.2
        else:
            columns = [label.get_window_extent() for label in keys]
            assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(columns))


# -- congruence -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "convention", "direction"),
    [(*case, direction) for case, direction in zip(CASES, 4 * ["language", "vision"], strict=False)],
)
def test_the_title_says_the_samples_loss(name, convention, direction):
    S, n_text, mask = randn(2, 2, 11, 11), torch.tensor([4, 5]), torch.arange(11) < torch.tensor([[9], [11]])
    options = {"mask": mask, "convention": convention, "direction": direction, "reduction": "none"}
    losses, first = (fast(name, scores, n_text, **options) for scores in (S, S[:, :1]))
    assert losses.min() > 0
    common = {"mask": mask, "loss": name, "convention": CONVENTIONS[convention], "direction": direction}
    for sample in range(2):
        figure = plot_congruence(S, n_text, sample=sample, **common)
        assert title_nats(figure) == f"{float(losses[sample]):.4g}"
        figure = plot_congruence(S, n_text, sample=sample, head=0, **common)
        assert title_nats(figure) == f"{float(first[sample]):.4g}"
        assert convention in figure.get_suptitle()


@pytest.mark.parametrize("direction", ["language", "vision"])
@pytest.mark.parametrize(("name", "convention"), CASES)
def test_the_maps_shown_have_the_loss_of_the_title(name, convention, direction):
    """m-KL of the two arrays, in numpy; with one head, as the loss of several is no function of their mean maps."""
    convention = CONVENTIONS[convention]
    S = randn(1, 1, 9, 9, seed=5)
    figure = plot_congruence(S, 4, mask=hiding(9, range(2, 3)), loss=name, convention=convention, direction=direction)
    T, P, difference = shown(figure)
    np.testing.assert_allclose(difference, P - T, atol=1e-12)
    if name != "distributed":
        np.testing.assert_allclose([np.nansum(P, 1), np.nansum(T, 1)], np.ones((2, len(P))), atol=1e-9)
    rows = np.nansum((P - T) * np.log(P / T), 1)
    nats = rows.mean() if convention.rows == "mean" else rows.sum()
    assert float(title_nats(figure)) == pytest.approx(nats, rel=1e-3 if name != "distributed" else 1e-2)
    assert np.isnan(P).sum() == (direction == "language")
    low, high = figure.axes[2].images[0].get_clim()
    assert low == -high == pytest.approx(-np.nanmax(np.abs(difference)))
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim()


def test_a_loss_that_is_a_mean_over_heads_shows_mean_maps():
    S = randn(1, 3, 7, 7)
    common = {"convention": CONVENTIONS["WEIGHTED_MEAN"]}
    heads = [shown(plot_congruence(S, 3, head=head, **common)) for head in range(3)]
    for together, *alone in zip(shown(plot_congruence(S, 3, **common)), *heads, strict=True):
        np.testing.assert_allclose(together, np.mean(alone, 0), atol=1e-12)


def test_the_image_first_decoder_has_a_language_side_only():
    image = torch.arange(9)[None] < 5
    S, layout = randn(1, 2, 9, 9), TokenLayout(~image, image)
    upper = np.isnan(shown(plot_congruence(S, layout, mask=causal(9)))[0])
    assert np.array_equal(upper, ~causal(4)[0])
    with pytest.raises(ValueError, match="no pair of VL may attend"):
        plot_congruence(S, layout, mask=causal(9), direction="vision")
    with (
        pytest.warns(UserWarning, match="exactly 0"),
        pytest.raises(ValueError, match="sample 0 has nothing to compare"),
    ):
        plot_congruence(S, 4, mask=causal(9))


# -- words and image tokens -------------------------------------------------------------------------------------------

PICTURE = image(40, 64)


def text_by_image(S, n, block):
    """A_LV, or A_VL transposed, of each head."""
    return S[:, :n, n:].softmax(-1) if block == "LV" else S[:, n:, :n].softmax(-1).mT


def outlines(figure):
    """Color, and left, top, right, bottom of each outline, best first."""
    found = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    return [(to_hex(patch.get_edgecolor()), np.ravel(patch.get_bbox().get_points()).tolist()) for patch in found]


@pytest.mark.parametrize("block", ["LV", "VL"])
@pytest.mark.parametrize("head", [None, 2])
def test_the_argmax_is_green_and_the_next_are_red(head, block):
    S = randn(2, 3, 11, 11)
    layout = TokenLayout.from_n_text(torch.tensor([4, 5]), 11)
    boxes = torch.arange(28.0).view(7, 4) + torch.tensor([0.0, 0.0, 9.0, 7.0])
    for sample, n in ((0, 4), (1, 5)):
        for token in range(n):
            A = text_by_image(S[sample], n, block)
            looks = (A.mean(0) if head is None else A[head])[token]
            order = looks.argsort(descending=True).tolist()[:3]
            common = {"boxes": boxes[: 11 - n], "sample": sample, "head": head, "block": block, "top": 3}
            figure = plot_token_attention(S, layout, image=PICTURE, token=token, **common)
            assert outlines(figure) == [(NEXT if rank else BEST, boxes[k].tolist()) for rank, k in enumerate(order)]
            texts = [text.get_text() for text in figure.legends[0].get_texts()]
            assert texts == [f"{rank + 1}  token {k}  {looks[k]:.2f}" for rank, k in enumerate(order)]
            what = f"Where token {token} looks" if block == "LV" else f"What looks at token {token}"
            assert figure.axes[0].get_title().startswith(what)


def test_the_argmax_is_that_of_the_metric():
    """All words look at region 2: its entropy is 0, and each picture's green box is that region's."""
    S = randn(1, 2, 7, 7)
    S[:, :, :3, 5] += 50
    assert float(argmax_entropy(S, 3, convention=RELEASED)) == 0
    boxes = [(k, 0, k + 1, 9) for k in range(4)]
    for token in range(3):
        assert outlines(plot_token_attention(S, 3, image=PICTURE, token=token, boxes=boxes))[0] == (BEST, [2, 0, 3, 9])


def test_of_several_maxima_the_first_is_green():
    figure = plot_token_attention(torch.zeros(1, 5, 5), 1, image=PICTURE, token=0, grid=(2, 2), top=2)
    assert [box for _, box in outlines(figure)] == [[0, 0, 32, 20], [32, 0, 64, 20]]


def test_a_grid_is_in_reading_order_and_leaves_special_tokens_out():
    """Two words, the image's [CLS], 2 x 3 patches, padding; the patch in row 1, column 2 has the highest score."""
    S = torch.zeros(1, 1, 10, 10)
    S[0, 0, 1, 2], S[0, 0, 1, 8], S[0, 0, 1, 9] = 9.0, 3.0, 9.0
    position = torch.arange(10)[None]
    layout = TokenLayout(position < 2, (position > 2) & (position < 9))
    figure = plot_token_attention(S, layout, image=PICTURE, token=1, grid=(2, 3), top=1)
    ((color, box),) = outlines(figure)
    assert (color, box) == (BEST, pytest.approx([64 * 2 / 3, 20, 64, 40]))
    assert figure.legends[0].get_texts()[0].get_text() == f"1  token 5  {np.exp(3) / (np.exp(3) + 5):.2f}"
    shade = figure.axes[0].collections[-1].get_array()
    np.testing.assert_allclose(shade, S[0, 0, 1, 3:9].softmax(-1))
    with pytest.raises(ValueError, match="6 patches, and the sample 7 image tokens: leave special image tokens out"):
        plot_token_attention(S, 2, image=PICTURE, token=1, mask=position < 9, grid=(2, 3))


def test_image_tokens_that_may_not_be_seen_are_no_candidates():
    S = torch.zeros(1, 1, 6, 6)
    S[0, 0, 0, 2] = 9.0
    figure = plot_token_attention(S, 2, image=PICTURE, token=0, mask=hiding(6, range(2, 4)), grid=(2, 2), top=4)
    assert [box for _, box in outlines(figure)] == [[0, 20, 32, 40], [32, 20, 64, 40]]
    hidden, seen = figure.axes[0].collections
    assert hidden.get_hatch()
    assert (len(hidden.get_paths()), seen.get_array().tolist()) == (2, [0.5, 0.5])
    with pytest.raises(ValueError, match="token 0 of sample 0 may attend to no image token"):
        plot_token_attention(S, 2, image=PICTURE, token=0, mask=hiding(6, range(2, 6)), grid=(2, 2))


def labels(figure):
    """Text, and the box whose corner it is at, of each label of a region."""
    return [(label.get_text(), tuple(float(x) for x in label.xy)) for label in figure.axes[0].texts]


@pytest.mark.parametrize("block", ["LV", "VL"])
@pytest.mark.parametrize("head", [None, 1])
def test_a_region_is_labeled_with_its_word(head, block):
    """Against loops: for each region, the text token with the highest attention, the highest first."""
    S, words = randn(2, 3, 11, 11, seed=1), ["a", "$b$", "c_", "d", "e"]
    layout = TokenLayout.from_n_text(torch.tensor([4, 5]), 11)
    corners = [(4.0 * k, 3.0 * k) for k in range(7)]
    boxes = [(x, y, x + 20, y + 15) for x, y in corners]
    for sample, n in ((0, 4), (1, 5)):
        A = text_by_image(S[sample], n, block)
        A = (A.mean(0) if head is None else A[head]).tolist()
        expected = []
        for region in range(11 - n):
            word = max(range(n), key=lambda i: A[i][region])
            expected.append((A[word][region], f"{words[word]} {A[word][region]:.2f}", corners[region]))
        expected.sort(reverse=True)
        common = {"boxes": boxes[: 11 - n], "sample": sample, "head": head, "block": block, "text_labels": words[:n]}
        figure = plot_region_labels(S, layout, image=PICTURE, **common)
        assert labels(figure) == [(text, corner) for _, text, corner in expected]
        assert not any(label.get_parse_math() for label in figure.axes[0].texts)
        figure = plot_region_labels(S, layout, image=PICTURE, top=2, **common)
        assert labels(figure) == [(text, corner) for _, text, corner in expected[:2]]


def test_labels_of_regions_by_hand():
    """Two words, three regions; e^0 = 1 and e^log(3) = 3: A_LV = [[3, 1, 1], [1, 3, 3]] / [5, 7], A_VL by rows."""
    S = torch.zeros(1, 5, 5)
    S[0, 0, 2] = S[0, 1, 3] = S[0, 1, 4] = torch.tensor(3.0).log()
    S[0, 2, 1] = S[0, 3, 0] = torch.tensor(3.0).log()
    boxes = [(0, 0, 20, 20), (20, 0, 40, 20), (40, 0, 60, 20)]
    common = {"image": PICTURE, "boxes": boxes, "text_labels": ["mug", "grass"]}
    figure = plot_region_labels(S, 2, **common)
    assert labels(figure) == [("mug 0.60", (0, 0)), ("grass 0.43", (20, 0)), ("grass 0.43", (40, 0))]
    assert figure.axes[0].get_title() == "Word that looks at each region most\nsample 0"
    figure = plot_region_labels(S, 2, block="VL", **common)
    assert labels(figure) == [("grass 0.75", (0, 0)), ("mug 0.75", (20, 0)), ("mug 0.50", (40, 0))]
    assert figure.axes[0].get_title() == "Word that each region looks at most\nsample 0"
    colors = [color for color, _ in outlines(figure)]
    assert colors[1] == colors[2] != colors[0]


@pytest.mark.parametrize("count", [2, 12])
def test_patches_are_filled_with_the_color_of_their_word(count):
    """Patch k belongs to word k % count: as many colors as words, in the legend too; the last patch sees no word."""
    S = torch.zeros(1, 1, count + 24, count + 24)
    patches = torch.arange(24)
    S[0, 0, count + patches, patches % count] = 3.0
    pairs = torch.ones(1, count + 24, count + 24, dtype=torch.bool)
    pairs[0, -1, :count] = False
    words = [f"w{k}" for k in range(count)]
    figure = plot_region_labels(
        S, count, image=PICTURE, block="VL", mask=pairs, grid=(4, 6), text_labels=words, top=3, figure=None
    )
    hidden, filled = figure.axes[0].collections
    assert (len(hidden.get_paths()), len(filled.get_paths())) == (1, 23)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == words
    colors = [to_hex(patch.get_facecolor()) for patch in legend.get_patches()]
    assert len(set(colors)) == count
    assert [to_hex(color) for color in filled.get_facecolor()] == [colors[k % count] for k in range(23)]
    assert [text for text, _ in labels(figure)] == [
        f"w{k % count} {np.exp(3) / (np.exp(3) + count - 1):.2f}" for k in range(3)
    ]
    assert labels(plot_region_labels(S, count, image=PICTURE, block="VL", grid=(4, 6))) == []


@pytest.mark.parametrize("kind", ["same", "grid", "random"])
def test_labels_of_regions_do_not_overlap(kind):
    S, words = randn(1, 2, 24, 24), [f"word-{k}-$y_p$" for k in range(8)]
    random = torch.rand(16, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([50.0, 30.0])
    where = {
        "same": {"boxes": [(5, 5, 60, 35)] * 16},
        "grid": {"grid": (4, 4), "top": 16},
        "random": {"boxes": torch.cat([random, random + 9], 1)},
    }[kind]
    figure = plot_region_labels(S, 8, image=PICTURE, text_labels=words, **where)
    figure.savefig("/dev/null", format="png")
    extents = [label.get_window_extent() for label in figure.axes[0].texts]
    assert len(extents) == 16
    assert not any(one.fully_overlaps(other) for one, other in itertools.combinations(extents, 2))


def test_a_dual_stream_without_VL_has_the_pictures_of_LV():
    S = randn(1, 2, 7, 7)
    blocks = AttentionBlocks.from_streams(LL=S[..., :3, :3], LV=S[..., :3, 3:], VV=S[..., 3:, 3:])
    common = {"image": PICTURE, "grid": (2, 2), "top": 4}
    assert labels(plot_region_labels(blocks, **common)) == labels(plot_region_labels(S, 3, **common))
    assert outlines(plot_token_attention(blocks, token=0, **common))
    for draw in (plot_region_labels, functools.partial(plot_token_attention, token=0)):
        with pytest.raises(ValueError, match=r"these blocks have no VL .* use block='LV'"):
            draw(blocks, block="VL", **common)


def test_images_of_any_kind():
    from PIL import Image

    pixels = (255 * PICTURE).byte()
    expected = None
    for picture in (pixels, pixels.numpy(), Image.fromarray(pixels.numpy())):
        figure = plot_token_attention(torch.zeros(1, 5, 5), 1, image=picture, token=0, grid=(2, 2))
        found = np.asarray(figure.axes[0].images[0].get_array())
        expected = found if expected is None else expected
        np.testing.assert_array_equal(found, expected)


# -- rejects ----------------------------------------------------------------------------------------------------------

S = torch.zeros(2, 3, 7, 7)
BOXES = torch.tensor([[0, 0, 9, 9]] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 2}, r"sample=2 is out of range: 2 sample\(s\) allow 0 to 1"),
        ({"sample": -1}, "sample=-1 is out of range"),
        ({"head": 3}, r"head=3 is out of range: 3 head\(s\) allow 0 to 2"),
        ({"n_text": 7}, "sample 0 has 7 text tokens and 0 image tokens: choose one that has both"),
        ({"n_text": None}, "n_text is missing"),
        ({"text_labels": ["a"]}, "text_labels has 1 labels, and sample 0 has 3 text tokens: give one for each real"),
        ({"image_labels": ["a"] * 5}, "image_labels has 5 labels, and sample 0 has 4 image tokens"),
        ({"attention": torch.full((1, 7, 7), torch.nan)}, "the attention contains NaN or infinities"),
        ({"attention": torch.full((1, 7, 7), torch.inf)}, "the attention contains NaN or infinities"),
    ],
)
def test_all_reject(options, message):
    given = {"attention": S, "n_text": 3, **options}
    for draw in (plot_blocks, plot_congruence):
        with pytest.raises(ValueError, match=message):
            draw(**given)
    with pytest.raises(ValueError, match=message):
        plot_token_attention(image=PICTURE, token=0, grid=(2, 2), **given)
    if "image_labels" not in options:
        with pytest.raises(ValueError, match=message):
            plot_region_labels(image=PICTURE, grid=(2, 2), **given)


def test_rejects_unknown_words():
    with pytest.raises(ValueError, match="values='logits' is not known: it must be one of 'scores', 'probabilities'"):
        plot_blocks(S, 3, values="logits")
    with pytest.raises(ValueError, match="loss='iais' is not known: it must be one of 'cacr', 'singular'"):
        plot_congruence(S, 3, loss="iais")
    with pytest.raises(ValueError, match="direction='both' is not known: it must be one of 'language', 'vision'"):
        plot_congruence(S, 3, direction="both")
    with pytest.raises(ValueError, match="block='LL' is not known: it must be one of 'LV', 'VL'"):
        plot_region_labels(S, 3, image=PICTURE, grid=(2, 2), block="LL")
    with pytest.raises(ValueError, match="the loss 'distributed' is not defined on raw scores"):
        plot_congruence(S, 3, loss="distributed", convention=CONVENTIONS["PRINTED"])
    with pytest.raises(ValueError, match=r"attention is f32\[2,3,7\]"):
        plot_blocks(torch.zeros(2, 3, 7), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": 3}, "token=3 is out of range: sample 0 has 3 text tokens, 0 to 2"),
        ({"token": -1}, "token=-1 is out of range"),
        ({"top": 0}, "top=0 must be at least 1"),
        ({"boxes": None}, "pass either boxes=, one for each image token, or grid="),
        ({"grid": (2, 2)}, "pass either boxes=, one for each image token, or grid="),
        ({"boxes": None, "grid": (2, 3)}, r"grid=\(2, 3\) has 6 patches, and the sample 4 image tokens"),
        ({"boxes": BOXES[:3]}, r"boxes has shape \(3, 4\), and the sample 4 image tokens: give left, top"),
        ({"boxes": BOXES.flip(-1)}, "left < right and top < bottom"),
        ({"boxes": BOXES / 9}, "the image is 64 x 40 pixels: scale them to its pixels"),
        ({"boxes": BOXES * 6}, r"boxes reach from \(0, 0\) to \(54, 54\), and the image is 64 x 40 pixels"),
        ({"image": PICTURE.permute(2, 0, 1)}, r"image has shape \(3, 40, 64\): it must be \(height, width, 3\)"),
        ({"image": PICTURE[..., 0]}, r"image has shape \(40, 64\).*image.convert\('RGB'\)"),
        ({"image": PICTURE * 2 - 1}, "image has values -1 to 1, and float32 allows 0 to 1: pass the picture itself"),
        ({"image": (PICTURE * 300).int()}, "image has values 0 to 300, and int32 allows 0 to 255"),
    ],
)
def test_token_attention_rejects(options, message):
    given = {"image": PICTURE, "attention": S, "token": 0, "n_text": 3, "boxes": BOXES, **options}
    with pytest.raises(ValueError, match=message):
        plot_token_attention(**given)
    if not {"token", "top"} & set(options):
        del given["token"]
        with pytest.raises(ValueError, match=message):
            plot_region_labels(**given)


def test_pairs_that_may_not_attend_are_reported():
    common = {"image": PICTURE, "grid": (2, 2)}
    forward = causal(7)[None].mT
    for mask, block in ((forward.mT, "LV"), (forward, "VL")):
        with pytest.raises(ValueError, match=f"no pair of {block} may attend in sample 0: choose the other block"):
            plot_region_labels(S, 3, mask=mask, block=block, **common)
    with pytest.raises(ValueError, match="token 1 of sample 0 may be attended to by no image token: choose another"):
        plot_token_attention(S, 3, token=1, mask=forward, block="VL", **common)
    with pytest.raises(ValueError, match="top=-1 must be at least 0"):
        plot_region_labels(S, 3, top=-1, **common)
