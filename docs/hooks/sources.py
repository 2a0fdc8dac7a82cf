"""Links code spans that name a place in the code, `losses.py::cacr` or `test_losses.py::test_by_hand`, to its line.

Each file that is named becomes a page with numbered lines, which is neither in the navigation nor in the search. A test
may be named without its file if its name is unique or if the file was named before.
"""

import ast
import functools
import re
from pathlib import Path

from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
SPAN = re.compile(r"(?<![\[`])`(?:([\w/]+\.py)(?:::([\w.]+))?|(test_\w+))`(?!`)")
FENCE = "`" * 6


@functools.cache
def lines(path):
    """Line numbers of the functions, classes, methods and constants of a file, by dotted name."""
    found = {}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno

    visit(ast.parse((ROOT / path).read_text()).body, "")
    return found


def places(markdown):
    """For each span of a page that names a place: the match, the file's path from the root, and the line."""
    tests = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py"))
    last = ""
    for match in SPAN.finditer(markdown):
        name, attribute, test = match.groups()
        if name is not None:
            roots = ("src/attncongruence/", "tests/", "")
            path = next((f"{root}{name}" for root in roots if (ROOT / root / name).is_file()), None)
            if path is not None and (attribute is None or attribute in lines(path)):
                last = path
                yield match, path, lines(path)[attribute] if attribute else 1
        else:
            having = [path for path in dict.fromkeys([last, *tests]) if path and test in lines(path)]
            if having and (len(having) == 1 or having[0] == last):
                yield match, having[0], lines(having[0])[test]


def on_files(files, config):
    """A page for each file that is named."""
    named = {path for page in files.documentation_pages() for _, path, _ in places(page.content_string)}
    for path in sorted(named):
        source = (ROOT / path).read_text()
        matter = "search: { exclude: true }\nhide: [navigation, toc]"
        text = f"---\n{matter}\n---\n\n# {path}\n\n{FENCE}{{ .python linenums=1 }}\n{source}{FENCE}\n"
        files.append(File.generated(config, f"source/{path}.md", content=text))


def on_page_markdown(markdown, page, config, files):
    """Replace the spans of one page by links."""
    if page.file.src_uri.startswith("source/"):
        return markdown
    parts, end = [], 0
    for match, path, line in places(markdown):
        url = get_relative_url(files.get_file_from_path(f"source/{path}.md").url, page.url)
        text = match[0].strip("`").replace("_", "&#95;")  # __call__ is no emphasis
        link = f'<a href="{url}#__codelineno-0-{line}"><code>{text}</code></a>'
        parts += [markdown[end : match.start()], link]
        end = match.end()
    return "".join(parts) + markdown[end:]
