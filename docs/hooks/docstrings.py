"""Prepares docstrings for the API reference: `Example:` becomes a section, `Returns:` and `Source:` paragraphs.

In the source they are headings like `Args:`. The parser of the API reference knows only `Examples:`, reads the text
before a colon under `Returns:` as a type, and would make a box of `Source:`.
"""

import re
import textwrap

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
PARAGRAPH = re.compile(r"^( *)(Returns|Returns, Raises|Source):\n((?:\1 +\S.*\n?)+)", re.MULTILINE)


def paragraph(match):
    """The section as a paragraph that starts with the section's name."""
    indent, name, text = match.groups()
    return textwrap.indent(f"**{name}:** {textwrap.dedent(text)}", indent)


class Headings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj, **kwargs):
        """Called for every function, class and module that is loaded."""
        if obj.docstring:
            obj.docstring.value = PARAGRAPH.sub(paragraph, EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
