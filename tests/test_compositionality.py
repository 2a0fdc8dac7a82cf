"""The experiment: its data says what its captions say, a run depends on its setting alone, and its summary is right."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from attncongruence import TokenLayout, cacr_loss
from benchmarks.compositionality import __main__ as experiment
from benchmarks.compositionality import data, summary, tables, train
from benchmarks.compositionality.grid import FULL, LOSSES, SMOKE, Runs
from benchmarks.compositionality.model import Matcher
from benchmarks.compositionality.train import METHODS, Setting

pytestmark = pytest.mark.docs

TINY = Setting(steps=6, items=64, batch=8, every=3, held_out=10, tested=20, share=0.5)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The two-minute version, run as a user would."""
    folder = tmp_path_factory.mktemp("smoke")
    experiment.main(["--smoke", "--out", str(folder), "--processes", "2"])
    return folder


def test_hand_value_of_a_caption():
    pairs, item = data.pairs(3, 5, "regions"), data.WORLD.items(3, 5)[1]
    for side, one in enumerate((item, item.swapped())):
        words = [data.WORDS[word] for word in pairs.captions[1, side]]
        assert words[0] == "[CLS]"
        assert " ".join(words[1:]) == one.caption


def test_regions_are_looks_with_noise_and_standardized_boxes():
    pairs, items = data.pairs(300, 5, "regions"), data.WORLD.items(300, 5)
    looks, boxes = pairs.images.split((data.APPEARANCE, 7), dim=-1)
    torch.testing.assert_close(boxes.mean(dim=(0, 1, 2)), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes.std(dim=(0, 1, 2)), torch.ones(7))
    left = torch.tensor([[shape.box[0] for shape in item.scene.regions] for item in items]).float()
    assert torch.corrcoef(torch.stack((left.flatten(), boxes[:, 0, :, 0].flatten())))[0, 1] > 0.9999
    same: dict[str, list[torch.Tensor]] = {}
    for item, look in zip(items, looks[:, 0], strict=True):
        for shape, feature in zip(item.scene.regions, look, strict=True):
            same.setdefault(f"{shape.color} {shape.kind}", []).append(feature)
    assert len(same) == 9
    spread = torch.stack([torch.stack(features).std(dim=0).mean() for features in same.values()]).mean()
    assert spread == pytest.approx(data.NOISE, rel=0.05)


def test_patches_are_the_picture():
    pairs, item = data.pairs(2, 5, "patches"), data.WORLD.items(2, 5)[1].swapped()
    rows = (1 - pairs.images[1, 1]).reshape(3, 3, 16, 16, 3).permute(0, 2, 1, 3, 4).reshape(48, 48, 3)
    picture = Image.fromarray((rows * 255).round().byte().numpy())
    assert picture.tobytes() == item.image.reduce(2).tobytes()


def test_ordinary_negatives_are_false_both_ways():
    items, others = data.WORLD.items(50, 3), data.pairs(50, 3, "regions").others
    for item, some in zip(items, others.tolist(), strict=True):
        assert len(some) == data.OTHERS
        assert not any(item.true_in(items[other].scene) or items[other].true_in(item.scene) for other in some)


def test_a_share_of_negatives_is_the_swap():
    scenes = data.pairs(400, 0, "regions")
    for share in (0.0, 0.7, 1.0):
        draw = train._draw(replace(TINY, share=share, batch=400), scenes)
        caption, _, other, _ = next(draw)
        matched = {tuple(words[0].tolist()): words[1] for words in scenes.captions}
        swaps = sum(bool((matched[tuple(a.tolist())] == b).all()) for a, b in zip(caption, other, strict=True))
        assert swaps / 400 == pytest.approx(share, abs=0.06)


def test_a_step_adds_the_loss_of_matched_pairs_alone():
    scenes = data.pairs(64, 0, "regions")
    setting = replace(TINY, method="cacr-released", weight=3.0, schedule="constant")
    torch.manual_seed(0)
    model = Matcher(3, data.APPEARANCE + 7, ordered=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    seen, gradient = [], {}

    def forward(captions, images):
        seen.append((captions, images))
        return model(captions, images)

    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradient.__setitem__(name, grad.clone()))
    train.stepper(setting, model, forward, scenes)(0)
    model.load_state_dict(before)
    (captions, images) = seen[0]
    scores, S = model(captions, images)
    good, bad = scores[:16], scores[16:].reshape(2, 8)
    main = torch.nn.functional.softplus(bad[:, None] - good.reshape(2, 8)).mean((1, 2)).sum()
    place = torch.arange(12).expand(8, -1)
    layout = TokenLayout((place >= 1) & (place <= 8), place >= 9)
    (main + 3.0 * cacr_loss(S[:8], layout)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradient[name], msg=name)
    for i in range(
        8
    ):  # the four quarters are: both that fit, the caption with the other image, and the other way round
        assert (captions[16 + i] == captions[i]).all()
        assert (images[16 + i] == images[8 + i]).all()
        assert (captions[24 + i] == captions[8 + i]).all()
        assert (images[24 + i] == images[i]).all()


def test_a_run_is_a_function_of_its_setting():
    first = train.run(TINY)
    other = train.run(replace(TINY, method="cacr-printed", weight=1.0, seed=1))
    assert train.run(TINY) == first
    assert other["attention"]["before"] != first["attention"]["before"]
    assert other["attention"]["after"] != first["attention"]["after"]
    assert [point[0] for point in first["curve"]] == [3, 6]


def test_no_weight_is_no_loss():
    plain = train.run(TINY)
    for method in LOSSES:
        assert train.run(replace(TINY, method=method, weight=0.0)) == plain


def test_uniform_attention_is_flat():
    assert train._flatness(torch.zeros(2, 3, 4, 5)) == pytest.approx(1.0)
    assert train._flatness(torch.tensor([[[[0.0, 200.0]]]])) == pytest.approx(0.0)


def test_methods_share_seeds_trials_and_budget():
    trials = {method: FULL.trials(method) for method in LOSSES}
    assert {len(some) for some in trials.values()} == {6}
    assert all(any(one.weight == 1.0 for one in some) for some in trials.values())
    assert len(FULL.seeds) >= 20
    assert not set(FULL.seeds) & (set(FULL.tuning_seeds) | set(FULL.sweep_seeds))


def test_hand_value_of_the_statistics():
    assert summary.holm([0.01, 0.04, 0.03, 0.5]) == [0.04, 0.09, 0.09, 0.5]
    found = summary.mean([1.0, 2.0, 3.0])  # 2 +- 4.3027 / sqrt(3)
    assert found == {"mean": 2.0, "low": pytest.approx(-0.4841, abs=1e-3), "high": pytest.approx(4.4841, abs=1e-3)}
    plain = [{"test": [0, 0, group]} for group in (10.0, 20.0, 30.0, 40.0, 50.0)]
    some = [{"test": [0, 0, one["test"][2] + more]} for one, more in zip(plain, (1, 2, 3, 4, 5), strict=True)]
    found = summary.paired(some, plain, lambda one: one["test"][2])
    assert (found["mean"], found["better"], found["worse"]) == (3.0, 5, 0)
    assert found["p"] == pytest.approx(2 / 32)  # only all + and all - are as far out, of 2^5 signs


def test_hand_value_of_steps_to_half():
    def run(*groups):
        return {"curve": [[100 * (i + 1), 0, 0, group] for i, group in enumerate(groups)]}

    found = summary._half([run(0, 50, 40), run(0, 0, 80), run(0, 0, 49)])
    assert found == {"reached": 2, "runs": 3, "median": 300}
    assert summary._half([run(0, 0), run(1, 2)])["median"] is None


def test_the_smoke_version_gives_every_figure(smoke):
    content = json.loads((smoke / "summary.json").read_text())
    for name, table in tables.tables(content["results"]).items():
        assert table.count("\n") >= 3, name
    assert set(content["results"]["cost"]) == {"regions", "patches"}
    for picture in ("scores.png", "curves.png"):
        assert Image.open(smoke / picture).size == (1440, 660)


def test_an_interrupted_grid_goes_on_and_ends_the_same(smoke, tmp_path):
    lines = (smoke / "runs.jsonl").read_text().splitlines()
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-7]) + "\n" + lines[-7][:50])
    (tmp_path / "cost.json").write_text((smoke / "cost.json").read_text())
    experiment.main(["--smoke", "--out", str(tmp_path), "--processes", "2"])
    assert sorted((tmp_path / "runs.jsonl").read_text().splitlines()) == sorted(lines)
    assert (tmp_path / "summary.json").read_text() == (smoke / "summary.json").read_text()


def test_smoke_results_cannot_mix_with_committed_ones(capsys):
    with pytest.raises(SystemExit):
        experiment.main(["--smoke"])
    assert "--smoke needs --out DIR" in capsys.readouterr().err


def test_the_committed_summary_is_that_of_the_committed_runs():
    content = json.loads((experiment.RESULTS / "summary.json").read_text())
    cost = json.loads((experiment.RESULTS / "cost.json").read_text())["results"]
    made = summary.summarize(FULL, Runs(experiment.RESULTS / "runs.jsonl")) | {"cost": cost}
    assert json.loads(json.dumps(made)) == content["results"]


def test_the_page_shows_the_committed_summary():
    page, content = experiment.PAGE.read_text(), json.loads((experiment.RESULTS / "summary.json").read_text())
    assert (
        len(tables.MARKED.findall(page))
        == page.count("<!-- compositionality ")
        == len(tables.tables(content["results"]))
    )
    assert tables.fill(page, content) == page, "python -m benchmarks.compositionality writes it"


def test_smoke_and_full_plan_have_the_same_phases():
    assert SMOKE.weights.keys() == FULL.weights.keys() == set(LOSSES)
    assert [*METHODS] == ["none", *LOSSES]
