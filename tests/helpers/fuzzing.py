"""Inputs of every kind for tests/test_robustness.py, and the one rule: a right result, or an error that says why."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from attncongruence import TokenLayout
from tests.helpers.problems import randn

TALLY: dict[str, Counter[str]] = defaultdict(Counter)
"""Function -> how many calls it answered, and how many it refused."""
EXAMPLES: Counter[str] = Counter()
"""Property -> how many examples were drawn."""
# The arguments, as messages of values and options name them; the checker of shapes always does.
NAMED = re.compile(
    r"\b(attention|S|n_text|length|mask|masks|convention|direction|reduction|impl|alignment|query|key|scale|special|"
    r"layout|image_type|image_token_id|regions|scores|k|relevant|total_steps|step|temperature|epsilon|blocks|heads|"
    r"equivalence|rows|detach_equivalence|target_softmax|iais_target_softmax|weight|positives|text|image|VL|LV)\b|"
    r"^[abs] "
)
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def fuzz(share: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`hypothesis.given(data=...)`, with that many of each hundred examples that the profile asks for."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        examples = max(1, hypothesis.settings().max_examples * share // 100)
        health = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much]

        @functools.wraps(test)
        def counted(data: st.DataObject) -> None:
            EXAMPLES[test.__name__] += 1
            test(data)

        made: Callable[..., None] = hypothesis.given(data=st.data())(counted)
        return hypothesis.settings(max_examples=examples, suppress_health_check=health)(made)

    return decorate


def outcome(name: str, call: Callable[[], Any], valid: bool | None = None) -> Any:
    """What the call returns, or None where it was refused with a message that names an argument.

    Any other exception is a bug, and so is one for valid input; `valid=None`: not known.
    """
    refusal: Exception | None = None
    try:
        result = call()
    except (ValueError, TypeError) as error:
        refusal = error
    if refusal is not None:
        TALLY[name]["refused"] += 1
        assert not valid, f"refused valid input: {refusal!r}"
        assert NAMED.search(str(refusal)), f"names no argument: {refusal!r}"
        return None
    TALLY[name]["answered"] += 1
    assert valid is not False, f"invalid input gave {result!r}"
    return result


def in_memory(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same tensor, laid out in memory in another way."""
    way = draw(st.sampled_from(["as is", "transposed", "strided", "inside", "offset"]))
    if way == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if way == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if way == "inside" and x.dim() > 1:
        wide = torch.nn.functional.pad(x.float() if x.dtype == torch.bool else x, (1, 1, 1, 1))
        return wide.to(x.dtype)[..., 1:-1, 1:-1]
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if way == "offset" else x


@dataclass
class Scores:
    """Scores of a joint sequence, one way to say where its tokens are, and what is known of them."""

    S: Tensor
    n_text: int | Tensor | TokenLayout
    mask: Tensor | None
    text: Tensor
    """`(batch, length)`, the real text tokens."""
    image: Tensor
    pairs: bool
    """Whether the mask says more than which tokens are real."""
    values: str
    """"tame", "huge", "nan" (at a real pair of a sample with text and image) or "inf"; padding may hold anything."""


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    """Valid input of the losses: sizes from 0, every float type, layout, mask and way to lie in memory."""
    batch, heads, n, m = (draw(st.integers(low, 3)) for low in (0, 1, 0, 0))
    length, seed = n + m, draw(st.integers(0, 2**20))
    random = torch.Generator().manual_seed(seed)
    shape = (batch, length, length) if draw(st.booleans()) else (batch, heads, length, length)
    position, everything = torch.arange(length), torch.ones(batch, length, dtype=torch.bool)

    kind = draw(st.sampled_from(["int", "ragged", "layout", "one row"]))
    where: int | Tensor | TokenLayout = n
    text = (position < n).expand(batch, length)
    if kind == "ragged":
        ends = torch.randint(0, length + 1, (batch,), generator=random)
        where, text = ends.to(draw(st.sampled_from(INTEGERS))), position < ends[:, None]
    image = ~text
    if kind in ("layout", "one row"):
        kinds = torch.randint(0, 3, (1 if kind == "one row" else batch, length), generator=random)
        where = TokenLayout(kinds == 0, kinds == 1)
        text, image = ((kinds == which).expand(batch, length) for which in (0, 1))

    given = draw(st.sampled_from(["none", "tokens", "no tokens", "pairs", "pairs of heads"]))
    mask, real, allowed = None, everything, None
    if given in ("tokens", "no tokens"):
        real = torch.rand(batch, length, generator=random) < (0.7 if given == "tokens" else 0.0)
        mask = real.to(draw(st.sampled_from([torch.bool, torch.int64, torch.uint8])))
    elif given != "none":
        wide = heads if given == "pairs of heads" and len(shape) == 4 else 1
        allowed = torch.rand(batch, wide, length, length, generator=random) < 0.8
        mask, real = (allowed[:, 0] if wide == 1 else allowed), allowed.any(1).any(1)
    text, image = text & real, image & real

    values = draw(st.sampled_from(["tame", "tame", "tame", "constant", "tiny", "huge", "nan", "inf"]))
    dtype = draw(st.sampled_from(FLOATS))
    S = randn(*shape, seed=seed) * draw(st.sampled_from([0.3, 1.0, 2.0]))
    if values == "constant":
        S = torch.full_like(S, 2.0)
    if values == "tiny":
        S = S * torch.finfo(dtype).tiny / 8
    if values == "huge":
        S = S.sign() * (200.0 if dtype in HALF else 1e30)
    used = (text | image)[:, :, None] & (text | image)[:, None, :]
    counts = used[:, None] if allowed is None else used[:, None] & allowed
    counts = (counts.any(1) if len(shape) == 3 else counts).expand(shape)
    if values in ("nan", "inf"):
        at = (counts & (text.any(1) & image.any(1)).view(-1, *[1] * (len(shape) - 1))).nonzero()
        if len(at):
            S[tuple(at[draw(st.integers(0, len(at) - 1))])] = float(values)
        else:
            values = "tame"
    S = S.masked_fill(~counts, draw(st.sampled_from([0.0, float("nan"), float("inf"), 1e30])))
    values = "tame" if values in ("constant", "tiny") else values
    S = in_memory(draw, S.to(dtype))
    return Scores(S, where, mask, text, image, allowed is not None, values)


@st.composite
def spoiled(draw: st.DrawFn, case: Scores) -> tuple[Any, Any, dict[str, Any]]:
    """The same input with one thing wrong: scores, n_text and options, none of which may be answered."""
    S, where, options = case.S, case.n_text, {"mask": case.mask}
    batch, length = S.shape[0], S.shape[-1]
    tokens = torch.ones(batch, length, dtype=torch.bool)
    what, wrong = draw(
        st.sampled_from(
            [
                ("S", lambda: S.long()),
                ("S", lambda: S.to(torch.complex64)),
                ("S", lambda: S > 0),
                ("S", lambda: S.to(torch.float8_e5m2)),
                ("S", lambda: S.contiguous().to_sparse()),
                ("S", lambda: S[0] if S.dim() == 3 and batch else S[None, None]),
                ("S", lambda: torch.nn.functional.pad(S, (0, 1))),
                ("S", lambda: None),
                ("S", lambda: S.detach().float().numpy()),
                ("S", lambda: [S]),
                ("n_text", lambda: length + 1),
                ("n_text", lambda: -1),
                ("n_text", lambda: 2**70),
                ("n_text", lambda: 1.0),
                ("n_text", lambda: "1"),
                ("n_text", lambda: None),
                ("n_text", lambda: torch.tensor(1)),
                ("n_text", lambda: torch.zeros(batch + 1, dtype=torch.long)),
                ("n_text", lambda: torch.zeros(batch)),
                ("n_text", lambda: torch.full((batch + (not batch),), length + 1)),
                ("n_text", lambda: TokenLayout.from_n_text(0, length + 1)),
                ("n_text", lambda: torch.zeros(max(batch, 1), dtype=torch.long).to_sparse()),
                ("mask", lambda: torch.ones(batch, length + 1, dtype=torch.bool)),
                ("mask", lambda: tokens.float()),
                ("mask", lambda: tokens[..., None, None, None]),
                ("mask", lambda: tokens.to("meta")),
                ("mask", lambda: tokens.to_sparse()),
                ("mask", lambda: [True] * length),
                ("mask", lambda: torch.ones(batch + 2, 1, length, length, dtype=torch.bool)),
            ]
        )
    )
    if what == "S":
        return wrong(), where, options
    if what == "n_text":
        return S, wrong(), {"mask": None}
    return S, where, {"mask": wrong()}
