"""Render the pictures of docs/pictures.md from the code on that page: `python -m examples.pictures`."""

import io
import re
from pathlib import Path

import torch
from PIL import Image

PAGE = Path(__file__).parent.parent / "docs/pictures.md"


def render(folder: Path) -> list[Path]:
    """Run the code of the page, one section at a time, and save `figure` for each picture; returns the paths."""
    written = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        torch.manual_seed(0)
        names: dict[str, object] = {}
        for code, picture in re.findall(r"(?ms)^```python\n(.*?)^```|\]\(pictures/(.*?)\)", section):
            if code:
                exec(compile(code, PAGE.name, "exec"), names)
            else:
                path = folder / picture
                drawn = io.BytesIO()
                names["figure"].savefig(drawn, dpi=105)
                Image.open(drawn).convert("RGB").save(path, optimize=True)
                written.append(path)
    return written


if __name__ == "__main__":
    for path in render(PAGE.parent / "pictures"):
        print(f"{path.relative_to(PAGE.parent.parent)}  {path.stat().st_size / 1000:.0f} kB")
