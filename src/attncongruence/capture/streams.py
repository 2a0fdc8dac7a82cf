"""Which tensors descend from the same one: self-attention told from cross-attention of equal length."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


class Streams:
    """Two embeddings start two streams, and whatever follows stays in its own.

    A tensor belongs to the stream of the first argument that has one; one made of arguments without a stream starts its
    own. Integer tensors (ids, positions) and tensors made of nothing (zeros) have none.
    """

    def __init__(self) -> None:
        self._stream: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._count = 0

    def follow(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: object) -> None:
        """Takes note of one torch function after it ran."""
        made = [t for t in tensors_in((result,)) if t.is_floating_point()]
        given = tensors_in((*args, *kwargs.values()))
        if not made or not given:
            return
        stream = next((s for s in map(self.of, given) if s is not None), None)
        if stream is None:
            stream = self._count = self._count + 1
            # A model's input starts a stream that all who read it share; its weights do not.
            made += [t for t in given if t.is_floating_point() and not isinstance(t, nn.Parameter)][:1]
        for tensor in made:
            if self.of(tensor) is None:
                self._stream[id(tensor)] = (weakref.ref(tensor), stream)

    def of(self, tensor: Tensor) -> int | None:
        """Number of the stream, if it has one."""
        ref, stream = self._stream.get(id(tensor), (None, 0))
        return stream if ref is not None and ref() is tensor else None

    def differ(self, query: Tensor, key: Tensor) -> bool:
        """Whether the two are known to be of two streams."""
        streams = {self.of(query), self.of(key)} - {None}
        return len(streams) == 2


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """All tensors among some arguments, also in lists and tuples."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, list | tuple):
            flat += tensors_in(value)
    return flat
