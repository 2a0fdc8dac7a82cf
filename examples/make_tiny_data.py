"""Makes tiny data and a tiny ViLT in the formats that `examples.finetune_vilt` reads, to try it in a minute.

    python -m examples.make_tiny_data tiny

writes pictures of colored shapes with captions such as "the red circle is left of the blue square":

    tiny/dataset_flickr30k.json, tiny/images/     matched pairs, in Karpathy's form of Flickr30k
    tiny/winoground/                              pairs of pairs that differ only in what is where, as in Winoground
    tiny/vilt/                                    a ViLT checkpoint: random weights, tokenizer, image processor

Nothing is downloaded. The same seed writes the same files.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compositionality.scenes import Item
from examples.demo import WORLD, make_model, make_processor


def write_flickr(folder: Path, items: Sequence[Item]) -> None:
    """Write `dataset_flickr30k.json` and `images/`; every tenth picture is in split `val`."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, item in enumerate(items):
        name = f"{number}.png"
        item.image.save(images / name)
        split = "val" if number % 10 == 9 else "train"
        entries.append({"filename": name, "split": split, "sentences": [{"raw": item.caption}]})
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries}) + "\n")


def write_winoground(folder: Path, items: Sequence[Item]) -> None:
    """Write `examples.jsonl` and `images/`: each item, and the same item with two shapes exchanged."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, item in enumerate(items):
        row: dict[str, int | str] = {"id": number, "tag": "Object"}
        for which, one in enumerate((item, item.swapped())):
            name = f"ex_{number}_img_{which}"
            one.image.save(images / f"{name}.png")
            row[f"caption_{which}"], row[f"image_{which}"] = one.caption, name
        rows.append(json.dumps(row))
    (folder / "examples.jsonl").write_text("\n".join(rows) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description="Tiny data and a tiny ViLT for examples.finetune_vilt.")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--scenes", type=int, default=400, help="pictures with captions")
    parser.add_argument("--winoground", type=int, default=100, metavar="EXAMPLES", help="Winoground examples")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and weights")
    options = parser.parse_args(arguments)

    items = WORLD.items(options.scenes + options.winoground, options.seed)
    scenes, pairs = items[: options.scenes], items[options.scenes :]
    write_flickr(options.folder, scenes)
    write_winoground(options.folder / "winoground", pairs)
    processor = make_processor([item.caption for item in items])
    torch.manual_seed(options.seed)
    make_model(len(processor.tokenizer)).save_pretrained(options.folder / "vilt")
    processor.save_pretrained(options.folder / "vilt")
    print(f"{len(scenes)} pictures, {len(pairs)} Winoground examples and a ViLT are in {options.folder}")


if __name__ == "__main__":
    main()
