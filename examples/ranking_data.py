"""Pictures and captions to rank: Flickr30k-style queries with random negatives, Winoground, and batches for ViLT.

The two formats on disk are the published ones:

- Flickr30k in Karpathy's split: `dataset_flickr30k.json`, which is `{"images": [{"filename": "1000092795.jpg", "split":
  "train", "sentences": [{"raw": "Two young guys ..."}, ...]}, ...]}`, and a folder with the pictures. COCO's
  `dataset_coco.json` has the same form, with a subfolder in `filepath`.
- Winoground as on the hub (`facebook/winoground`, `data/`, with `images.zip` unpacked): a folder with `examples.jsonl`,
  a JSON object a line with `caption_0`, `caption_1`, `image_0`, `image_1`, and `images/`, where `ex_0_img_0` is the
  file `ex_0_img_0.png`.
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import ViltProcessor


class Picture(NamedTuple):
    """A picture, and the captions that are true of it."""

    path: Path
    captions: tuple[str, ...]


class Ranking(NamedTuple):
    """All pairs of some captions and some pictures, caption by caption: the candidates of one or several queries.

    `right` has, for each query, the index of the candidate that is the matched pair. One caption and 32 pictures, or 32
    captions and one picture, are one query with 32 candidates. A Winoground example is two queries, its captions, with
    two candidates each, its pictures.
    """

    captions: tuple[str, ...]
    pictures: tuple[Path, ...]
    right: tuple[int, ...]


class Queries(Dataset[Ranking]):
    """Queries for training: a matched pair with either false pictures or false captions, chosen at random.

    Query `i` depends only on `seed` and `i`. So an interrupted run continues with the same queries, whichever process
    or worker draws them. Each false candidate comes from a different picture.

    Args:
        pictures: all pictures, at least two.
        negatives: number of false candidates of a query, 1 to `len(pictures) - 1`.
        total: number of queries.
        seed: of all draws.

    Raises:
        ValueError: too few pictures for this number of negatives.
    """

    def __init__(self, pictures: Sequence[Picture], negatives: int, total: int, seed: int) -> None:
        if not 1 <= negatives < len(pictures):
            raise ValueError(
                f"{negatives} negatives need at least {max(negatives, 1) + 1} pictures with captions, and there are "
                f"{len(pictures)}: ask for 1 to {len(pictures) - 1}"
            )
        self.pictures, self.negatives, self.total, self.seed = pictures, negatives, total, seed
        self._pairs = [(number, caption) for number, picture in enumerate(pictures) for caption in picture.captions]

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, index: int) -> Ranking:
        rng = random.Random(f"{self.seed} {index}")
        own, caption = rng.choice(self._pairs)
        # Any picture but the query's own: indices from there on move up by one.
        others = [n + (n >= own) for n in rng.sample(range(len(self.pictures) - 1), self.negatives)]
        false = [self.pictures[n] for n in others]
        if rng.random() < 0.5:
            return Ranking((caption,), (self.pictures[own].path, *(picture.path for picture in false)), (0,))
        captions = (caption, *(rng.choice(picture.captions) for picture in false))
        return Ranking(captions, (self.pictures[own].path,), (0,))


def rank_batch(processor: ViltProcessor, text_length: int) -> Callable[[Sequence[Ranking]], dict[str, Tensor]]:
    """A collate function that returns ViLT's arguments, one row for each pair, and `labels`, `(rankings, queries)`.

    Captions are padded or cut to `text_length` tokens; pictures are padded to the largest of the batch. Each is
    processed once, however many pairs it is part of. All rankings of a batch must have the same numbers of queries and
    candidates.
    """

    # Not a closure, because workers receive it by pickle where processes are not forked, as on Python 3.14.
    return partial(_rank_batch, processor, text_length)


def read_flickr(captions: Path, images: Path, split: str = "train") -> list[Picture]:
    """The pictures of one split that have a caption.

    Raises:
        ValueError: the file is missing or has another form, the split has no picture, or pictures are missing from the
            folder. The message says which.
    """
    form = '{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}, ...]}, ...]}'
    try:
        entries = json.loads(_text_of(captions))["images"]
        splits = {entry["split"] for entry in entries}
        pictures = [
            Picture(images / entry.get("filepath", "") / entry["filename"], tuple(s["raw"] for s in entry["sentences"]))
            for entry in entries
            if entry["split"] == split
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{captions} must be {form}; reading it gave {type(error).__name__}: {error}") from None
    pictures = [picture for picture in pictures if picture.captions]
    if not pictures:
        raise ValueError(f"{captions} has no picture with a caption in split {split!r}; it has {sorted(splits)}")
    _all_there([picture.path for picture in pictures], captions)
    return pictures


def read_winoground(folder: Path) -> list[Ranking]:
    """Winoground's examples: caption 0 belongs to picture 0, caption 1 to picture 1.

    Raises:
        ValueError: as `read_flickr`.
    """
    path = folder / "examples.jsonl"
    try:
        rows = [json.loads(line) for line in _text_of(path).splitlines() if line.strip()]
        examples = [
            Ranking(
                (row["caption_0"], row["caption_1"]),
                tuple(folder / "images" / _png(row[name]) for name in ("image_0", "image_1")),
                (0, 1),
            )
            for row in rows
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must have a JSON object on each line, with caption_0, caption_1, image_0 and image_1; reading it "
            f"gave {type(error).__name__}: {error}"
        ) from None
    if not examples:
        raise ValueError(f"{path} is empty: it must have an example on each line")
    _all_there([picture for example in examples for picture in example.pictures], path)
    return examples


def _rank_batch(processor: ViltProcessor, text_length: int, rankings: Sequence[Ranking]) -> dict[str, Tensor]:
    captions = [caption for ranking in rankings for caption in ranking.captions]
    pictures = [_open(path) for ranking in rankings for path in ranking.pictures]
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": text_length}
    text = processor.tokenizer(captions, return_tensors="pt", **options)
    image = processor.image_processor(pictures, return_tensors="pt")

    of_caption, of_picture = [], []
    first_caption = first_picture = 0
    for ranking in rankings:
        for caption, picture in product(range(len(ranking.captions)), range(len(ranking.pictures))):
            of_caption.append(first_caption + caption)
            of_picture.append(first_picture + picture)
        first_caption += len(ranking.captions)
        first_picture += len(ranking.pictures)
    batch = {name: values[of_caption] for name, values in text.items()}
    batch |= {name: values[of_picture] for name, values in image.items()}
    return batch | {"labels": torch.tensor([ranking.right for ranking in rankings])}


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is not there: it must be a file, in a format that examples/ranking_data.py describes")
    return path.read_text(encoding="utf-8")


def _png(name: str) -> str:
    return name if name.endswith(".png") else f"{name}.png"


def _all_there(pictures: Sequence[Path], named_in: Path) -> None:
    """Raise a ValueError now, not after hours of training, if a picture is missing."""
    missing = [picture for picture in pictures if not picture.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(pictures)} pictures named in {named_in} are not there, such as {missing[0]}: "
            "give the folder that holds them"
        )


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
