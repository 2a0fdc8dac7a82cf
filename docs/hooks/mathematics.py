"""Converts LaTeX to MathML when the site is built, so that browsers show formulas without a script.

Formulas are written for GitHub: a ```` ```math ```` block, or $`...`$ within a line. A formula that cannot be converted
stops the build.
"""

from markdown import Extension
from markdown.inlinepatterns import InlineProcessor
from math_core import LatexToMathML

MATHML = LatexToMathML()


def block(source, language, css_class, options, md, **kwargs):
    """A fence of pymdownx.superfences: one displayed equation, which scrolls if it is too wide."""
    formula = MATHML.convert_with_local_state(source, displaystyle=True)
    return f'<div class="{css_class}" tabindex="0">{formula}</div>'


class Inline(InlineProcessor):
    """$`...`$ within a line."""

    def handleMatch(self, m, data):
        """The formula as finished HTML, which the other patterns leave alone."""
        formula = MATHML.convert_with_local_state(m[1], displaystyle=False)
        return self.md.htmlStash.store(formula), m.start(0), m.end(0)


class Mathematics(Extension):
    """Registers the inline form with a higher priority than code spans, which also start with a backtick."""

    def extendMarkdown(self, md):
        """Called by Markdown."""
        md.inlinePatterns.register(Inline(r"\$`([^`]+)`\$", md), "inline-math", 200)


def on_config(config):
    """Called by MkDocs: adds both forms, for pages and docstrings."""
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "equation", "format": block})
    config.markdown_extensions.append(Mathematics())
