"""The record's home: what the engine needs of it, the Lua scripts, and the one module that speaks to Redis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..keys import Names

__all__ = ["MOST_AT_ONCE", "Store"]

#: So many transitions are sent in one go: few enough that the server answers others in between soon.
MOST_AT_ONCE = 250


class Store(Protocol):
    """What the engine needs of a store."""

    names: Names

    def call(self, script: str, keys: Sequence[str], *argv: str | bytes | int) -> Any:
        """Run a transition and return its reply."""
        ...

    def call_many(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Run transitions, each given as the arguments of :meth:`call`, in their order; yield their replies."""
        ...

    def is_at(self, pool: Any) -> bool:
        """Return whether a pool of redis-py's leads to the same database."""
        ...

    def connect(self) -> None:
        """Make the client now, for the processes that are forked from this one."""
        ...

    def members(self, key: str, most: int | None = None) -> list[str]:
        """Return the members of a set, or some of them."""
        ...

    def push(self, key: str, what: str) -> None:
        """Put something into a list, at its beginning."""
        ...

    def receive(self, key: str, seconds: float) -> bytes | None:
        """Take what is handed to a list; ``None`` if nothing is within some seconds."""
        ...
