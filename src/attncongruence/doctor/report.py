"""What an examination found, as plain values: they print, compare and become JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Trouble:
    """Something that keeps the loss from training this model."""

    came: str
    """What was found."""
    allowed: str
    """What would be right."""
    remedy: str
    """What to do."""


@dataclass(frozen=True)
class Attending:
    """One attention operation of a forward pass."""

    module: str
    kind: str
    """`"self"` or `"cross"`."""
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class Captured:
    """What capture took from the examined layer."""

    shape: tuple[int, int, int, int]
    """Batch, heads, queries, keys."""
    dtype: str
    offers_query_key: bool
    """Whether `query`, `key` and `scale` give the scores; else there are scores alone."""
    streaming: bool
    """Whether the loss has a form in linear memory here."""
    mask: str
    """`"none"`, `"tokens"` (padding), `"causal"` or `"pairs"`."""
    hidden: float
    """Share of pairs that may not attend."""
    shifted: bool
    """Whether the softmax sees scores less their row's maximum, so that raw scores mean nothing."""


@dataclass(frozen=True)
class Placed:
    """Where text and image are."""

    how: str
    """Where the layout came from."""
    guessed: bool
    text: list[int]
    """Text tokens of each sample."""
    image: list[int]
    seen_by_text: float
    """Share of pairs (text, image) that may attend: LV."""
    seen_by_image: float
    """Share of pairs (image, text): VL."""
    confirmed: bool | None
    """Whether changed pictures change none of the positions called text; None: it can't be told."""


@dataclass(frozen=True)
class LossRow:
    """The loss under one convention, in nats; None where it is not defined, and `why` says so."""

    name: str
    language: float | None
    vision: float | None
    both: float | None
    why: str = ""


@dataclass(frozen=True)
class Gradient:
    """Which parameters the congruence loss alone trains."""

    reached: list[str]
    """Parameters of the layer that get gradient."""
    untouched: list[str]
    """Those that get none, or rounding noise: values and output take no part in scores."""
    frozen: list[str]
    elsewhere: int
    """Parameters outside of the layer that get gradient."""


@dataclass(frozen=True)
class Overhead:
    """Forward and backward with the loss, in times of the same without: median and quartiles of paired rounds."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


@dataclass
class Report:
    """All that `examine` found; parts that could not be looked at are None or empty, and a trouble says why."""

    model: str
    batch_size: int | None = None
    attention: list[Attending] = field(default_factory=list)
    """Every attention that ran, in order."""
    unseen: dict[str, str] = field(default_factory=dict)
    """Modules that look like attention, in which none was seen: name to class."""
    default: str | None = None
    """What `capture_attention(model)` takes."""
    layer: str | None = None
    """What was examined."""
    captured: Captured | None = None
    placed: Placed | None = None
    gradient: Gradient | None = None
    losses: list[LossRow] = field(default_factory=list)
    direction: str | None = None
    """What the snippets use."""
    overhead: Overhead | None = None
    unchanged: bool | None = None
    """Whether outputs are the same bit for bit with capture; None: the model does not repeat itself."""
    restored: bool = False
    """Whether the model was left as it was found."""
    snippet: str | None = None
    """What to write in a training loop."""
    one_line: str | None = None
    """The same with `regularize`; None where the model returns no loss."""
    notes: list[str] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the loss can train this model as it is."""
        return not self.troubles
