"""American spelling in code, pages, examples, benchmarks and tests."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for pattern in (
        *("*.md", "*.yml", "*.toml", "*.cff", "Makefile", ".github/workflows/*.yml"),
        *("src/**/*.py", "docs/*.md", "docs/**/*.py", "examples/*.py", "benchmarks/**/*.py", "tests/**/*.py"),
    )
    for path in ROOT.glob(pattern)
    if path != Path(__file__)
)

# -ise, -ised, -isation: American English writes z. Only these stems, because raise, noise, promise, otherwise, precise
# and many other words end the same way.
IZE = """
author canonical capital categor central character color colour critic custom derandom diagonal emphas equal external
factor final formal general global ideal initial internal item linear local marginal material maxim memor minim mobil
modern neutral normal optim organ orthogonal orthonormal parallel parametr penal polar priorit quant random real recogn
regular renormal reorgan serial special stabil standard summar symbol symmetr synchron token util vector visual
"""
BRITISH = re.compile(
    rf"({'|'.join(IZE.split())})is(e|es|ed|er|ers|ing|able|ation|ations)"
    r"|(un|re|dis)?(behaviour|colour|favour|flavour|harbour|honour|labour|neighbour|rumour|vapour)\w*"
    r"|(centre|metre|litre|fibre|calibre|theatre)[ds]?|centring"
    r"|(cancel|channel|dial|fuel|label|level|model|signal|total|travel|unlabel|tunnel)l(ed|ing|er|ers)"
    r"|(analys|catalys|paralys)(e|ed|er|ers|ing)"
    r"|(licence|defence|offence|pretence)s?"
    r"|practis(e|es|ed|ing)"
    r"|artefacts?|programmes?|grey(s|ed|ish)?|judgements?|ageing|sceptic(al|s)?|fulfils?|skilful|mould(s|ed)?|maths"
    r"|learnt|spelt|whilst|amongst"
)
PER_CENT = re.compile(r"\bper cent\b", re.IGNORECASE)


def words(text):
    """The words of a text in lower case, also those inside of names such as max_colour and MaxColour."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word.lower() for word in re.findall(r"[A-Za-z]+", text)]


def british(text):
    """The words of a text that are spelled the British way."""
    return [word for word in words(text) if BRITISH.fullmatch(word)] + PER_CENT.findall(text)


def test_american_spelling():
    found = []
    for path in FILES:
        text = path.read_text()
        if path.name == "CHANGELOG.md":  # a released entry stays as it was
            text = re.split(r"^## \[\d", text, flags=re.MULTILINE)[0]
        found += [
            f"{path.relative_to(ROOT)}:{number}: {word}"
            for number, line in enumerate(text.splitlines(), 1)
            for word in british(line)
        ]
    assert not found, "\n".join(found)


def test_british_spelling_is_found():
    text = (
        "regularised optimiser normalise initialisation Summarising organised recognised standardised renormalises "
        "colour discoloured behaviour neighbours favourite centre centred labelled modelling analysed licence "
        "max_colour SynchroniseAll unlabelled learnt grey"
    )
    assert len(british(text)) == len(text.split())
    assert british("50 per cent") == ["per cent"]


def test_american_spelling_passes():
    text = (
        "raise raised noise otherwise precise likewise promise exercise rise arise advise supervised revised pairwise "
        "elementwise bitwise concise expertise disguise compromise enterprise comprise premise surprise wise denoise "
        "regularized optimizer normalization color center behavior neighbor labeled modeling analyze license analyses "
        "organism realist generalist specialist finalist programmer parameter grid percent"
    )
    assert not british(text)
