"""Makes links out of docs/ work on the site: to the page that replaces the file, or to a copy of the file.

In the repository `[results](../benchmarks/results/x.json)` opens the file. The site copies the file to `files/` and
links to the copy, so it does not need to know where the repository is hosted.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
# [text](../path#anchor): code has no such links, and tests/test_docs.py checks that the file exists.
LEAVES = re.compile(r"(?<=\]\()\.\./([^)\s#]+)")


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of one page and add the files that they lead to."""
    root = Path(config.docs_dir).parent

    def inside(match):
        path = match[1]
        if path in PAGES:
            return PAGES[path]
        if not (root / path).is_file():
            return match[0]  # MkDocs itself reports the broken link
        target = f"files/{path}"
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(root / path)))
        return target

    return LEAVES.sub(inside, markdown)
