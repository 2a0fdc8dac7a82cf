"""What a result file of the speed suite holds; `check` says what is wrong with one."""

from __future__ import annotations

import math
from typing import Any

PARTS = ("loops", "speed", "growth")


class Each:
    """A list, or a mapping with any keys, of entries of one shape."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


class Either:
    """One shape or another."""

    def __init__(self, *shapes: Any) -> None:
        self.shapes = shapes


class Maybe:
    """A key that may be missing."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


POSITIVE = "a positive number"
SPREAD = {"median": float, "lower_quartile": float, "upper_quartile": float}
TIMES = dict.fromkeys(SPREAD, POSITIVE)
NOT_RUN = {"not_run": str}
ERRORS = {"value": float, "gradient": float}
WHERE = {"n_text": int, "n_image": int, "batch": int}
FORM = {"peak_bytes": POSITIVE, "seconds": TIMES, "value": Maybe(float)}
BLOCK = WHERE | {
    "name": str,
    "loss": str,
    "picked": str,
    "rounds": int,
    "forms": Each(Either(FORM, NOT_RUN)),
    "ratios": Each(TIMES),
}
GROWTH = {
    "loss": str,
    "form": str,
    "n_text": int,
    "batch": int,
    "rounds": int,
    "n_image": Each(int),
    "seconds": Each(TIMES),
    "peak_bytes": Each(POSITIVE),
    "time_slope": Either(SPREAD, None),
    "memory_slope": Either(float, None),
    "not_run": Each(str),
}
CORRECTNESS = {
    "seed": int,
    "limit": POSITIVE,
    "heads": int,
    "width": int,
    "rows": Each(WHERE | {"loss": str, "streaming": ERRORS, "dense": ERRORS}),
}
FILE = {
    "environment": {
        "date": str,
        "machine": {"processor": str, "cores": int, "threads": int, "gpu": Either(str, None)},
        "versions": Each(str),
        "commit": str,
        "uncommitted_changes": Either(bool, None),
        "command": str,
    },
    "results": {
        "quick": bool,
        "parts": Each(str),
        "setting": {"device": str, "slug": str, "dtype": str, "heads": int, "width": int},
        "correctness": CORRECTNESS,
        "loops": Maybe(Each(Each(Either(TIMES, NOT_RUN)))),
        "speed": Maybe(Each(BLOCK)),
        "growth": Maybe(Each(GROWTH)),
    },
}


def check(content: Any) -> None:
    """Raise a ValueError that names every place where a result file is not what it should be."""
    wrong = mismatches(content, FILE)
    if not wrong:
        results = content["results"]
        present = [part for part in PARTS if results.get(part)]
        if sorted(results["parts"]) != sorted(present):
            wrong.append(f"results.parts: {results['parts']}, but there is {present}")
        wrong += [
            f"results.speed[{i}].{form}: neither run at least once nor said why"
            for i, block in enumerate(results.get("speed", []))
            for form in ("dense", "streaming", "auto", "yardstick")
            if form not in block["forms"]
        ]
    if wrong:
        raise ValueError("not a result of the speed suite:\n" + "\n".join(wrong))


def mismatches(value: Any, shape: Any, at: str = "") -> list[str]:
    """Where a value has another shape, and what is there."""
    if isinstance(shape, Maybe):
        return mismatches(value, shape.shape, at)
    if isinstance(shape, Either):
        found = [mismatches(value, each, at) for each in shape.shapes]
        return min(found, key=len)
    if isinstance(shape, Each):
        if not isinstance(value, list | dict):
            return [f"{at}: {value!r} holds nothing"]
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [wrong for key, entry in pairs for wrong in mismatches(entry, shape.shape, f"{at}[{key!r}]")]
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{at}: {value!r} is no mapping"]
        needed = {key for key, each in shape.items() if not isinstance(each, Maybe)}
        wrong = [f"{at}.{key}: missing" for key in sorted(needed - set(value))]
        wrong += [f"{at}.{key}: unknown" for key in sorted(set(value) - set(shape))]
        return wrong + [x for key in shape if key in value for x in mismatches(value[key], shape[key], f"{at}.{key}")]
    return [] if _fits(value, shape) else [f"{at}: {value!r} is not {getattr(shape, '__name__', shape)}"]


def _fits(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if shape in (float, POSITIVE):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and (shape is float or value > 0)
    return type(value) is shape
