"""Score providers: what a loss accepts besides a tensor of scores."""

from __future__ import annotations

import abc
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from attncongruence._typing import at_least_float32, checked, no_autocast, number, same_device


class ScoreSource(Protocol):
    """One layer's pre-softmax scores, computed when they are asked for. Subclass it to write a source of your own.

    Write `scores` and `allowed` as properties; they cannot be set on `self`. The streaming form also needs `query` and
    `key`. `shape` and `device` save computing the scores to learn them. A captured layer and `QueryKey` are sources.

    Example:
        >>> class Tempered(ScoreSource):
        ...     def __init__(self, source, temperature):
        ...         self.source, self.temperature = source, temperature
        ...     @property
        ...     def scores(self):
        ...         return self.source.scores / self.temperature
        ...     @property
        ...     def allowed(self):
        ...         return self.source.allowed
        >>> layer = QueryKey(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
        >>> cacr_loss(Tempered(layer, 2.0), n_text=2)
        tensor(0.)
    """

    @property
    def scores(self) -> Tensor:
        """Pre-softmax scores, `(batch, heads, queries, keys)`."""
        raise NotImplementedError(f"{type(self).__name__} has no scores: write them as a property")

    @property
    def allowed(self) -> Tensor | None:
        """Which pairs may attend, bool, 4-D and broadcastable to `scores`; None: all."""
        raise NotImplementedError(f"{type(self).__name__} has no allowed: write it as a property, None for all pairs")

    @property
    def query(self) -> Tensor | None:
        """`(batch, heads, length, width)`, if `scale query key^T` is the score of each allowed pair; else None."""
        return None

    @property
    def key(self) -> Tensor | None:
        """As `query`, with as many heads."""
        return None

    @property
    def scale(self) -> float:
        """Factor of `query key^T`."""
        return 1.0

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of `scores`."""
        return tuple(self.scores.shape)

    @cached_property
    def device(self) -> torch.device:
        """Device of `scores`."""
        return self.scores.device


if TYPE_CHECKING:
    Source = ScoreSource
else:

    class Source(abc.ABC):  # noqa: B024
        """`ScoreSource` for checks at run time: `isinstance` with a Protocol would compute the scores."""

        @classmethod
        def __subclasshook__(cls, other: type) -> bool:
            """Looks at the class alone, once."""
            return hasattr(other, "scores")


def wrong_scores(source: ScoreSource, scores: Any) -> ValueError:
    """The error for a source whose scores are not scores."""
    return ValueError(
        f"{type(source).__name__}.scores is {_what(scores)}: it must be floating point, (batch, heads, length, length)"
    )


def wrong_allowed(source: ScoreSource, allowed: Any) -> ValueError:
    """The error for a source whose mask is not bool."""
    return ValueError(
        f"{type(source).__name__}.allowed is {_what(allowed)}: it must be None or bool, True where a pair may attend: "
        "of an additive mask, mask > -5000"
    )


def _what(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class QueryKey(ScoreSource):
    """Queries and keys of one layer in place of its scores, so that the streaming form can be used.

    Args:
        query: `(batch, heads, length, width)`, after rotary embedding and norms, if the layer has them.
        key: `(batch, groups, length, width)`; with grouped queries, heads is a multiple of groups.
        scale: factor of `query key^T`, finite; None: 1 / sqrt(width), as in scaled dot product attention. A tensor of
            one element that learns gets its gradient: `query` is then multiplied by it, in float32 at least.

    Raises:
        ValueError: other shapes or integers, heads that are not a multiple of groups, no head or no width, different
            dtypes, tensors on several devices, a scale that is not finite.

    Example:
        >>> q, k = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [5.0]]]])
        >>> QueryKey(q, k, scale=0.5).scores.tolist()
        [[[[1.5, 2.5], [3.0, 5.0]]]]
    """

    def __init__(self, query: Tensor, key: Tensor, scale: float | Tensor | None = None) -> None:
        _check(query, key)
        if scale is not None:
            number("scale", scale)
            if not -math.inf < scale < math.inf:
                raise ValueError(f"scale={scale} must be finite: leave it out for 1 / sqrt(width)")
        if isinstance(scale, Tensor) and scale.requires_grad:
            factor = scale.reshape(()).to(query.device)
            query, key, scale = factor * at_least_float32(query), at_least_float32(key), 1.0
        self._query = query
        self._key = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if key.shape[1] < query.shape[1] else key
        self._scale = query.shape[-1] ** -0.5 if scale is None else float(scale)

    @property
    def query(self) -> Tensor:
        """`(batch, heads, length, width)`."""
        return self._query

    @property
    def key(self) -> Tensor:
        """`(batch, heads, length, width)`, repeated over grouped queries."""
        return self._key

    @property
    def scale(self) -> float:
        """Factor of `query key^T`."""
        return self._scale

    @property
    def allowed(self) -> None:
        """None: all pairs may attend, unless the loss is given a `mask`."""

    @property
    def scores(self) -> Tensor:
        """`scale query key^T`, `(batch, heads, length, length)`, float32 for half inputs."""
        with no_autocast(self._query.device):
            return (self._scale * at_least_float32(self._query)) @ at_least_float32(self._key).mT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `scores`."""
        return (*self._query.shape[:3], self._key.shape[2])

    @property
    def device(self) -> torch.device:
        """Device of `query` and `key`."""
        return self._query.device


@checked
def _check(query: Float[Tensor, "batch heads length width"], key: Float[Tensor, "batch groups length width"]) -> None:
    """Check that queries and keys fit each other."""
    same_device(query=query, key=key)
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype} and key {key.dtype}: both must have one dtype")
    if 0 in (query.shape[1], key.shape[1], query.shape[3]):
        raise ValueError(
            f"query has shape {tuple(query.shape)} and key {tuple(key.shape)}: both need at least one head and a width"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query has {query.shape[1]} heads and key {key.shape[1]}: with grouped queries, the number of query heads "
            "must be a multiple of the number of key heads"
        )
