"""The example that fine-tunes ViLT: what it trains on, that it goes on where it was."""

import json
import math
import re
import shlex
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import BertConfig, ViltForImageAndTextRetrieval, ViltProcessor

from attncongruence import cacr_loss, capture_attention, exponential_warmup, iais_loss, winoground_scores
from examples import demo, finetune_vilt
from examples.ranking_data import Queries, Ranking, rank_batch, read_flickr, read_winoground
from tests.helpers.finetuning import EXAMPLES, STEPS, Run, column, command, make_tiny, same, weights

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def processor(tiny: Path) -> ViltProcessor:
    return ViltProcessor.from_pretrained(tiny / "vilt")


def two_queries(tiny: Path) -> list[Ranking]:
    """Two captions, with four pictures each."""
    pictures = read_flickr(tiny / "dataset_flickr30k.json", tiny / "images")
    some = Queries(pictures, 3, 100, seed=0)
    return [query for query in map(some.__getitem__, range(100)) if len(query.captions) == 1][:2]


# What it trains on


def test_the_ranking_loss_by_hand(tiny: Path, processor: ViltProcessor) -> None:
    batch = rank_batch(processor, 40)(two_queries(tiny))
    batch["labels"] = torch.tensor([[0], [2]])
    model = finetune_vilt.ViltForRanking.from_pretrained(tiny / "vilt").eval()
    plain = ViltForImageAndTextRetrieval.from_pretrained(tiny / "vilt").eval()
    with torch.no_grad():
        ours = model(**batch)
        scores = plain(**{name: values for name, values in batch.items() if name != "labels"}).logits.view(2, 4)
    torch.testing.assert_close(ours["logits"], scores.view(2, 1, 4), rtol=1e-4, atol=1e-5)  # patches in another order
    first, second = scores.tolist()
    losses = [math.log(sum(map(math.exp, row))) - row[right] for row, right in ((first, 0), (second, 2))]
    assert ours["loss"].item() == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_matched_pairs_by_hand() -> None:
    batch = {"input_ids": torch.zeros(6, 4), "labels": torch.tensor([[0], [2]])}
    assert finetune_vilt.matched_pairs(batch).tolist() == [True, False, False, False, False, True]


@pytest.mark.parametrize("convention", finetune_vilt.CONVENTIONS)
@pytest.mark.parametrize("loss", finetune_vilt.LOSSES)
def test_added_is_the_loss_of_the_matched_pairs_words_and_patches(
    tiny: Path, processor: ViltProcessor, loss: str, convention: str, tmp_path: Path
) -> None:
    changes = ["--loss", loss, "--convention", convention, "--weight", "0.5", "--steps", "10"]
    _, options = finetune_vilt.parse(command(tiny, tmp_path, *changes))
    model = finetune_vilt.ViltForRanking.from_pretrained(tiny / "vilt").train()
    batch = rank_batch(processor, 40)(two_queries(tiny))
    with capture_attention(model) as capture, finetune_vilt.add_congruence(model, processor, options) as regularizer:
        total = model(**batch)["loss"]
        parts, captured = regularizer.last, capture.pop()
    tokenizer = processor.tokenizer
    layout = demo.joint_layout(batch, (tokenizer.cls_token_id, tokenizer.sep_token_id), demo.PATCH)
    by_hand = {"cacr": cacr_loss, "iais": iais_loss}[loss]
    right = torch.tensor([0, 4])
    expected = by_hand(captured[right], layout[right], convention=finetune_vilt.CONVENTIONS[convention])
    assert parts.congruence.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts.weight == pytest.approx(0.5 * exponential_warmup(10)(0))
    assert total.item() == pytest.approx(parts.main.item() + parts.weight * expected.item(), rel=1e-5)


# Whole runs


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same queries and starting weights, and what is added differs: metrics and folder of each."""
    changes = {
        "none": ["--loss", "none"],
        "zero": ["--loss", "cacr", "--weight", "0"],
        "cacr": ["--loss", "cacr", "--weight", "30"],
        "iais": ["--loss", "iais", "--weight", "30"],
    }
    found = {}
    for name, change in changes.items():
        output = tmp_path_factory.mktemp("runs") / name
        found[name] = finetune_vilt.main(command(tiny, output, *change)), output
    return found


def test_weight_0_trains_like_none_and_measures(runs: dict[str, Run]) -> None:
    assert column(runs["zero"], "loss") == column(runs["none"], "loss")
    assert same(weights(runs["zero"][1]), weights(runs["none"][1]))
    assert runs["zero"][0]["winoground"] == runs["none"][0]["winoground"]
    assert min(column(runs["zero"], "congruence_loss")) > 0
    assert not any("congruence_loss" in row for row in runs["none"][0]["training"])


@pytest.mark.parametrize("name", ["cacr", "iais"])
def test_the_first_loss_is_the_ranking_loss_and_the_weighted_congruence_loss(runs: dict[str, Run], name: str) -> None:
    added = column(runs[name], "congruence_weight")[0] * column(runs[name], "congruence_loss")[0]
    assert column(runs[name], "loss")[0] == pytest.approx(column(runs["none"], "loss")[0] + added, rel=1e-5)
    assert added > 1e-4
    schedule = exponential_warmup(STEPS)
    assert column(runs[name], "congruence_weight") == pytest.approx([30 * schedule(step) for step in range(STEPS)])


def test_each_loss_leads_elsewhere(runs: dict[str, Run]) -> None:
    assert column(runs["cacr"], "congruence_loss")[0] == column(runs["zero"], "congruence_loss")[0]
    assert column(runs["cacr"], "congruence_loss")[-1] < column(runs["zero"], "congruence_loss")[-1]
    assert column(runs["iais"], "congruence_loss")[0] > 2 * column(runs["cacr"], "congruence_loss")[0]
    for name, other in (("cacr", "none"), ("iais", "none"), ("iais", "cacr")):
        assert not same(weights(runs[name][1]), weights(runs[other][1]))


def test_metrics(runs: dict[str, Run], tiny: Path) -> None:
    metrics, output = runs["iais"]
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert set(metrics) == {"options", "versions", "training", "winoground"}
    options = {"loss": "iais", "convention": "released", "weight": 30.0, "negatives": 3, "processes": 1, "seed": 0}
    assert options.items() <= metrics["options"].items()
    assert metrics["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in metrics["training"]] == [1, 2, 3, 4, 5, 6]
    assert column(runs["iais"], "learning_rate") == pytest.approx([5e-6 * step for step in range(STEPS)])
    assert [row["step"] for row in metrics["winoground"]] == [0, 2, 4, 6]


def test_winoground_pair_by_pair(runs: dict[str, Run], tiny: Path, processor: ViltProcessor) -> None:
    """Scores of the checkpoint as transformers loads it, one pair at a time, without padding."""
    metrics, output = runs["iais"]
    examples = read_winoground(tiny / "winoground")
    model = ViltForImageAndTextRetrieval.from_pretrained(output / f"checkpoint-{STEPS}").eval()
    ranking = finetune_vilt.ViltForRanking.from_pretrained(output / f"checkpoint-{STEPS}").eval()
    scores = torch.empty(EXAMPLES, 2, 2)
    with torch.no_grad():
        batched = ranking(**rank_batch(processor, 40)(examples))["logits"]
        for (n, example), c, i in product(enumerate(examples), (0, 1), (0, 1)):
            pair = processor(Image.open(example.pictures[i]), example.captions[c], return_tensors="pt")
            scores[n, c, i] = model(**pair).logits
    torch.testing.assert_close(batched, scores, rtol=1e-4, atol=1e-5)
    assert metrics["winoground"][-1] == {"step": STEPS} | winoground_scores(scores)._asdict()


def test_checkpointing_workers_and_rarer_saving_change_nothing(
    runs: dict[str, Run], tiny: Path, tmp_path: Path
) -> None:
    changes = ["--loss", "iais", "--weight", "30", "--gradient-checkpointing", "--workers", "1", "--save-every", "4"]
    again = finetune_vilt.main(command(tiny, tmp_path, *changes))
    assert [row["loss"] for row in again["training"]] == pytest.approx(column(runs["iais"], "loss"), rel=1e-5)
    assert again["winoground"] == [row for row in runs["iais"][0]["winoground"] if row["step"] != 2]


# Interrupted runs


def test_an_interrupted_run_ends_like_one_that_was_not(
    runs: dict[str, Run],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, folder = runs["cacr"]
    arguments = command(tiny, tmp_path, "--loss", "cacr", "--weight", "30")
    drawn, draw = [], Queries.__getitem__

    def interrupted(queries: Queries, index: int) -> Ranking:
        drawn.append(index)
        if len(drawn) == 10:  # in step 5, of two queries each
            raise KeyboardInterrupt
        return draw(queries, index)

    with monkeypatch.context() as patch:
        patch.setattr(Queries, "__getitem__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune_vilt.main(arguments)
    assert not (tmp_path / "metrics.json").exists()
    # As if the interrupt had come while checkpoint 4 was written: 2 is the last whole one.
    state = tmp_path / "checkpoint-4/trainer_state.json"
    state.write_text(state.read_text()[:100])

    monkeypatch.setattr(Queries, "__getitem__", lambda queries, index: drawn.append(index) or draw(queries, index))
    drawn.clear()
    capsys.readouterr()
    resumed = finetune_vilt.main(arguments)
    assert capsys.readouterr().out.startswith(f"Continuing from {tmp_path}/checkpoint-2\n")
    assert len(drawn) == 8  # steps 3 to 6: the first two are not trained again
    assert resumed == expected
    assert same(weights(tmp_path), weights(folder))

    drawn.clear()
    assert finetune_vilt.main(arguments) == expected
    assert capsys.readouterr().out == f"This run is complete: {tmp_path}/metrics.json\n"
    assert not drawn


# What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--captions", "nowhere.json"], r"error: nowhere\.json is not there: it must be a file"),
        (["--images", "{tiny}"], r"error: 27 of the 27 pictures named in .*json are not there, such as .*/0\.png"),
        (["--winoground", "{tiny}"], r"error: .*/examples\.jsonl is not there"),
        (["--negatives", "27"], r"error: 27 negatives need at least 28 pictures .*: ask for 1 to 26"),
        (["--model", "{bert}"], r"--model .* is of type 'bert', and this example is about 'vilt'"),
        (["--model", "{tiny}/images"], r"images"),
        (["--loss", "none", "--weight", "1"], r"--loss none takes no --convention and no --weight"),
        (["--weight", "-1"], r"--weight -1\.0 must be 0 or more"),
        (["--steps", "0"], r"--steps 0 must be 1 or more"),
        (["--log-every", "4"], r"--save-every 2 must be a multiple of --log-every 4"),
        (["--loss", "clip"], r"invalid choice: 'clip'"),
    ],
)
def test_bad_input(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    BertConfig().save_pretrained(tmp_path / "bert")
    changes = [change.format(tiny=tiny, bert=tmp_path / "bert") for change in changes]
    with pytest.raises(SystemExit):
        finetune_vilt.main(command(tiny, tmp_path / "output", *changes))
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "output").exists()


def test_a_folder_holds_one_run(runs: dict[str, Run], tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, output = runs["cacr"]
    with pytest.raises(SystemExit):
        finetune_vilt.main(command(tiny, output, "--loss", "cacr", "--weight", "3", "--seed", "1"))
    error = capsys.readouterr().err
    assert "holds another run: weight was 30.0 and is 3.0; seed was 0 and is 1. Give the same options" in error


def test_documented_commands_are_commands() -> None:
    text = (ROOT / "docs/training.md").read_text() + finetune_vilt.__doc__
    commands = re.findall(r"-m examples\.finetune_vilt ([^`\n]+)", text.replace("\\\n", " "))
    parsed = [finetune_vilt.parse(shlex.split(command))[1] for command in commands if "..." not in command]
    assert [options.loss for options in parsed] == ["cacr", "cacr", "iais", "cacr"]
