"""The documentation site builds without a warning, loads nothing from other hosts, and has every page and name."""

import html
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from mkdocs.config import load_config

import attncongruence

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Public, but not imported by the root: they need a framework, or are a tool of their own.
APART = ("integrations.huggingface", "integrations.lightning", "viz", "doctor")
# The table of losses is public, the functions around it are not.
OF_LOSSES = ("CongruenceLoss", "LOSSES", "congruence_loss")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return out


def page_of(site, source):
    return site / ("index.html" if source.stem == "index" else f"{source.stem}/index.html")


class Elements(HTMLParser):
    """All elements of a page, as (tag, attributes)."""

    def __init__(self, path):
        super().__init__()
        self.found = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_every_page_is_in_the_navigation(site):
    def leaves(part):
        for value in part.values() if isinstance(part, dict) else part:
            yield from [value] if isinstance(value, str) else leaves(value)

    assert sorted(leaves(load_config(str(ROOT / "mkdocs.yml")).nav)) == [page.name for page in PAGES]
    assert all(page_of(site, page).exists() for page in PAGES)


def test_nothing_comes_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)  # and 404.html
    for page in pages:
        for tag, attributes in Elements(page).found:
            if tag != "a":  # a link is followed by whoever clicks it
                wanted = [attributes.get(name) or "" for name in ("src", "srcset", "href", "data", "poster", "style")]
                assert not any(re.search(r"(^|[\s(,])(https?:)?//", value) for value in wanted), (page, tag, attributes)
            # What the theme's script would fetch by itself: diagrams' renderer, the repository's facts.
            assert "mermaid" not in (attributes.get("class") or "").split()
            assert attributes.get("data-md-component") != "source"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text()), style


def test_search_has_every_page_and_its_script(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert found == {"" if page.stem == "index" else f"{page.stem}/" for page in PAGES}
    assert any(entry["location"] == "api/#attncongruence.cacr_loss" for entry in index["docs"])
    settings = re.search(
        r'<script id="__config" type="application/json">(.*?)</script>', (site / "index.html").read_text()
    )
    assert (site / json.loads(settings[1])["search"]).exists()


def test_links_that_leave_docs_lead_to_the_file_itself(site):
    links = [(page, target) for page in PAGES for target in re.findall(r"\]\(\.\./([^)\s#]+)", page.read_text())]
    copied = [(page, target) for page, target in links if target not in ("README.md", "CHANGELOG.md")]
    assert copied
    for page, target in copied:
        assert (site / "files" / target).read_bytes() == (ROOT / target).read_bytes()
        assert f'files/{target}"' in page_of(site, page).read_text(), (page.name, target)
    # The README's place on the site is the home page.
    assert 'href="../">README' in page_of(site, ROOT / "docs/training.md").read_text()


def test_names_of_the_code_lead_to_their_lines(site):
    page = page_of(site, ROOT / "docs/paper-map.md")
    links = re.findall(r'<a href="\.\./source/([^"]+)/#__codelineno-0-(\d+)"><code>([^<]+)</code>', page.read_text())
    rows = (ROOT / "docs/paper-map.md").read_text()
    names = re.findall(r"`([\w/]+\.py(?:::[\w.]+)?|test_\w+)`", rows)
    assert len(names) > 60
    assert [html.unescape(name) for _, _, name in links] == names
    for path, line, name in links:
        last = re.split(r"::|\.(?!py$)", html.unescape(name))[-1]
        source = (ROOT / path).read_text().splitlines()
        assert last.endswith(".py") or re.match(rf"\s*(def|class) {last}\b|{last}\b", source[int(line) - 1]), name
        shown = html.unescape(re.sub("<.*?>", "", (site / "source" / path / "index.html").read_text()))
        assert source[int(line) - 1] in shown
        assert f'id="__codelineno-0-{line}"' in (site / "source" / path / "index.html").read_text()


@pytest.mark.parametrize("source", PAGES, ids=lambda page: page.name)
def test_formulas_are_drawn_without_a_script(site, source):
    text, page = source.read_text(), page_of(site, source).read_text()
    assert page.count("<math") == text.count("```math\n") + text.count("$`")
    assert "$<code>" not in page


def test_the_changelog_is_the_one_of_the_repository(site):
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    page = page_of(site, ROOT / "docs/changelog.md").read_text()
    assert headings
    assert all(heading in page for heading in headings)


def public_names():
    names = [f"attncongruence.{name}" for name in attncongruence.__all__]
    names += [f"attncongruence.losses.{name}" for name in OF_LOSSES]
    for part in APART:
        if importlib.util.find_spec(f"attncongruence.{part}") is None:
            continue
        module = importlib.import_module(f"attncongruence.{part}")
        own = [
            name
            for name, value in vars(module).items()
            if (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__ == module.__name__
        ]
        listed = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
        names += [f"{module.__name__}.{name}" for name in listed if name not in attncongruence.__all__]
    return names


def test_the_reference_has_every_public_name_once_and_nothing_else(site):
    written = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert Counter(written) == Counter(public_names())
    anchors = {attributes.get("id") for _, attributes in Elements(page_of(site, ROOT / "docs/api.md")).found}
    assert set(written) <= anchors


def test_examples_in_the_reference_are_code(site):
    page = page_of(site, ROOT / "docs/api.md").read_text()
    assert "<blockquote>" not in page  # what >>> becomes outside of a section of code
    assert page.count("Examples:") > 10
