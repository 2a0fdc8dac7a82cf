"""The result files of the speed suite: written whole or not at all, read back, and shown as tables and a plot.

    python -m benchmarks.report benchmarks/results/<date>-<device>.json    # its .md and .png again
    python -m benchmarks.report                                           # the tables in README.md and docs/

A page holds a table of the newest full result between two comments, `<!-- bench cpu goals -->` and `<!-- /bench -->`,
and `tests/test_docs.py` holds it to that.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks import plot, record
from benchmarks.schema import PARTS, check
from benchmarks.tables import tables

PAGES = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- bench (\w+) (\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def name_of(content: dict[str, Any]) -> str:
    """`<date>-<device>`; what is not the whole has a name of its own, and overwrites no full result."""
    results = content["results"]
    name = f"{content['environment']['date']}-{results['setting']['slug']}"
    if set(results["parts"]) != set(PARTS):
        name += f"-only-{'-'.join(results['parts'])}"
    return f"{name}-quick" if results["quick"] else name


def write(content: dict[str, Any], folder: Path) -> Path:
    """Check and write a result, then its tables and its plot."""
    content = _rounded(content)
    check(content)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name_of(content)}.json"
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(unfinished, path)
    show(path)
    return path


def show(path: Path) -> None:
    """Write a result file's tables, as `.md`, and its plot, as `.png`, beside it."""
    content = read(path)
    setting = content["results"]["setting"]
    sections = [f"## {name}\n\n{table}\n" for name, table in tables(content, setting["device"]).items()]
    lead = f"From [{path.name}]({path.name}), by `python -m benchmarks.report`. M is the number of image tokens; the\n"
    lead += (
        "yardstick is `scaled_dot_product_attention` at the same length; median (quartiles) of ratios side by side.\n"
    )
    drawn = "growth" in content["results"]["parts"]
    picture = [f"![time and memory against M]({path.stem}.png)\n"] if drawn else []
    path.with_suffix(".md").write_text("\n".join([f"# {path.stem}\n", lead, *picture, *sections]))
    if drawn:
        plot.draw(content, path.with_suffix(".png"))


def read(path: Path) -> dict[str, Any]:
    """A result file, checked."""
    content = json.loads(path.read_text())
    check(content)
    return content


def latest(device: str, folder: Path = record.RESULTS) -> dict[str, Any] | None:
    """The newest full result of a kind of device (`cpu`, `cuda`) or of one device (`h200`); None: not measured yet."""
    found = None
    for path in sorted(folder.glob("[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-*.json")):
        content = read(path)
        setting = content["results"]["setting"]
        full = not content["results"]["quick"] and set(content["results"]["parts"]) == set(PARTS)
        if full and device in (setting["device"], setting["slug"]):
            found = content
    return found


def fill(text: str, folder: Path = record.RESULTS) -> str:
    """A page with every table between marks as it is in the newest results."""

    def table(match: re.Match[str]) -> str:
        begin, device, name, end = match.groups()
        return f"{begin}{tables(latest(device, folder), device)[name]}\n{end}"

    return MARKED.sub(table, text)


def _rounded(value: Any) -> Any:
    """Six digits are more than a clock knows."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main(arguments: list[str]) -> None:
    """Show these result files again, or, without any, fill the pages."""
    for path in map(Path, arguments):
        show(path)
    if not arguments:
        for page in (PAGES / "README.md", *sorted((PAGES / "docs").glob("*.md"))):
            text = page.read_text()
            if (filled := fill(text)) != text:
                page.write_text(filled)
                print(f"written to {page.relative_to(PAGES)}")


if __name__ == "__main__":
    main(sys.argv[1:])
