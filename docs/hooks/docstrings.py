"""Docstrings as the site reads them: `Example:` is a section of code, `Returns:` and `Source:` are paragraphs.

In the source all are headings like `Args:`. The parser behind the API reference knows only the plural of the first,
takes what stands before a colon in the second for a type, and the third for a box.
"""

import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
PARAGRAPH = re.compile(r"^( *)(Returns|Returns, Raises|Source):\n((?:\1 +\S.*\n?)+)", re.MULTILINE)


def paragraph(match):
    """The section as a paragraph that begins with its name."""
    indent, name, text = match.groups()
    return textwrap.indent(f"**{name}:** {textwrap.dedent(text)}", indent)


class Headings(griffe.Extension):
    """Rewrites them before the docstring is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Called for every function, class and module that is loaded."""
        if obj.docstring:
            obj.docstring.value = PARAGRAPH.sub(paragraph, EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
