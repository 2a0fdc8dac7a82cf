"""What the fine-tuning example reads: tiny data are real scenes, a query has one matched pair, a batch a row a pair."""

import json
import pickle
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViltProcessor

from examples import demo
from examples.ranking_data import Picture, Queries, Ranking, rank_batch, read_flickr, read_winoground
from tests.helpers.finetuning import EXAMPLES, SCENES, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def test_tiny_data_are_the_scenes(tiny: Path) -> None:
    items = demo.WORLD.items(SCENES + EXAMPLES, seed=0)
    pictures = read_flickr(tiny / "dataset_flickr30k.json", tiny / "images")
    scenes = [item for number, item in enumerate(items[:SCENES]) if number % 10 != 9]
    assert [picture.captions for picture in pictures] == [(item.caption,) for item in scenes]
    examples = read_winoground(tiny / "winoground")
    pairs = items[SCENES:]
    assert [example.captions for example in examples] == [(item.caption, item.swapped().caption) for item in pairs]
    drawn = [item.image for item in scenes] + [one.image for item in pairs for one in (item, item.swapped())]
    paths = [picture.path for picture in pictures] + [path for example in examples for path in example.pictures]
    for path, image in zip(paths, drawn, strict=True):
        assert Image.open(path).tobytes() == image.tobytes()


def test_several_captions_a_subfolder_and_other_splits(tmp_path: Path) -> None:
    def entry(name: str, split: str, *captions: str) -> dict[str, object]:
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        return {"filename": name, "filepath": "train2014", "split": split, "sentences": sentences}

    entries = [entry("1.jpg", "train", "a", "b"), entry("2.jpg", "test", "c"), entry("3.jpg", "train")]
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014/1.jpg").touch()
    assert read_flickr(tmp_path / "coco.json", tmp_path) == [Picture(tmp_path / "train2014/1.jpg", ("a", "b"))]


PICTURES = [Picture(Path(f"{n}.jpg"), (f"{n} a", f"{n} b")) for n in range(9)]


def number_of(candidate: Path | str) -> int:
    """The picture it is, or belongs to."""
    return int(candidate.stem if isinstance(candidate, Path) else candidate.split()[0])


def test_a_query_is_a_matched_pair_and_false_ones_in_both_directions() -> None:
    queries = [Queries(PICTURES, 5, 600, seed=1)[index] for index in range(600)]
    assert {(len(q.captions), len(q.pictures), q.right) for q in queries} == {(1, 6, (0,)), (6, 1, (0,))}
    for captions, pictures, _ in queries:
        own, *false = (number_of(candidate) for candidate in (pictures if len(pictures) == 6 else captions))
        assert own == number_of(captions[0]) == number_of(pictures[0])
        assert own not in false
        assert len(set(false)) == 5
    # 600 draws: one of two directions (standard error 0.02), one of 18 captions (0.01), one of 8 false pictures
    assert sum(len(query.pictures) == 6 for query in queries) / 600 == pytest.approx(0.5, abs=0.08)
    assert sum(query.captions[0] == "3 b" for query in queries) / 600 == pytest.approx(1 / 18, abs=0.04)
    of_8 = [query for query in queries if number_of(query.pictures[0]) == 8 and len(query.pictures) == 6]
    assert {number_of(path) for query in of_8 for path in query.pictures[1:]} == set(range(8))


def test_a_query_depends_on_seed_and_number_alone() -> None:
    short, long = Queries(PICTURES, 5, 10, seed=1), Queries(PICTURES, 5, 1000, seed=1)
    assert [long[index] for index in reversed(range(10))] == [short[index] for index in range(10)][::-1]
    other = Queries(PICTURES, 5, 10, seed=2)
    assert sum(other[index] == short[index] for index in range(10)) == 0


@pytest.fixture(scope="module")
def processor(tiny: Path) -> ViltProcessor:
    return ViltProcessor.from_pretrained(tiny / "vilt")


def test_a_batch_has_a_row_for_each_pair(tiny: Path, processor: ViltProcessor) -> None:
    pictures = read_flickr(tiny / "dataset_flickr30k.json", tiny / "images")
    paths, captions = [picture.path for picture in pictures], [picture.captions[0] for picture in pictures]
    both = [Ranking((captions[0],), tuple(paths[:4]), (0,)), Ranking(tuple(captions[4:8]), (paths[4],), (0,))]
    for rankings in (read_winoground(tiny / "winoground")[:3], both):
        batch = pickle.loads(pickle.dumps(rank_batch(processor, 40)))(rankings)  # as sent to a worker
        pairs = [pair for ranking in rankings for pair in product(ranking.captions, ranking.pictures)]
        assert batch["labels"].tolist() == [list(ranking.right) for ranking in rankings]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(pairs), 40)
        for row, (caption, path) in enumerate(pairs):
            assert processor.tokenizer.decode(batch["input_ids"][row], skip_special_tokens=True) == caption
            alone = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"][0]
            _, height, width = alone.shape
            assert torch.equal(batch["pixel_values"][row, :, :height, :width], alone)
            assert batch["pixel_mask"][row].sum() == batch["pixel_mask"][row, :height, :width].sum() == height * width


def test_long_captions_are_cut(processor: ViltProcessor, tiny: Path) -> None:
    long = Ranking(("the red circle " * 9,), (tiny / "images/0.png",), (0,))
    ids = rank_batch(processor, 8)([long])["input_ids"]
    words = processor.tokenizer.convert_ids_to_tokens(ids[0])
    assert words == ["[CLS]", "the", "red", "circle", "the", "red", "circle", "[SEP]"]


ENTRY = {"filename": "0.png", "split": "train", "sentences": [{"raw": "a"}]}
EXAMPLE = {"caption_0": "a", "caption_1": "b", "image_0": "0", "image_1": "1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "dataset.json is not there: it must be a file, in a format that examples/ranking_data.py describes"),
        ("{", '"sentences": [{"raw": ...}, ...]}, ...]}; reading it gave JSONDecodeError'),
        ("[]", "reading it gave TypeError"),
        (json.dumps({"annotations": []}), "reading it gave KeyError: 'images'"),
        (json.dumps({"images": [{"filename": "0.png"}]}), "reading it gave KeyError: 'split'"),
        (
            json.dumps({"images": [ENTRY | {"split": "test"}, ENTRY | {"split": "val"}]}),
            "has no picture with a caption in split 'train'; it has ['test', 'val']",
        ),
        (json.dumps({"images": [ENTRY | {"sentences": []}]}), "no picture with a caption in split 'train'"),
        (json.dumps({"images": [ENTRY, ENTRY | {"filename": "1.png"}]}), "1 of the 2 pictures named in "),
    ],
)
def test_captions_of_another_form(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "0.png").touch()
    if text is not None:
        (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_flickr(tmp_path / "dataset.json", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "examples.jsonl is not there: it must be a file"),
        ("\n", "examples.jsonl is empty: it must have an example on each line"),
        (
            "caption_0",
            "must have a JSON object on each line, with caption_0, caption_1, image_0 and image_1; reading it",
        ),
        (json.dumps({"caption": "a"}), "reading it gave KeyError: 'caption_0'"),
        (json.dumps(EXAMPLE), "1.png: give the folder that holds them"),
    ],
)
def test_winoground_of_another_form(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/0.png").touch()
    if text is not None:
        (tmp_path / "examples.jsonl").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_winoground(tmp_path)


@pytest.mark.parametrize("negatives", [0, 9])
def test_as_many_negatives_as_there_are_other_pictures(negatives: int) -> None:
    assert len(Queries(PICTURES, 8, 1, seed=0)[0].captions + Queries(PICTURES, 8, 1, seed=0)[0].pictures) == 10
    needed = f"{negatives} negatives need at least {max(2, negatives + 1)} pictures with captions, and there are 9: ask"
    with pytest.raises(ValueError, match=needed):
        Queries(PICTURES, negatives, 1, seed=0)
