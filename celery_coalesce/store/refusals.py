"""What the server's refusals mean: that it can not now, or that it never will."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kombu.exceptions import OperationalError
from redis.exceptions import (
    AskError,
    ClusterError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

from ..errors import NewerRecord, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["NEWER", "Refusals", "code_of", "is_outage"]

#: What a transition says of a record of a version that it does not know (lua/lib/record.lua).
NEWER = "NEWER"

#: It could not be asked.
OUTAGES = (RedisConnectionError, RedisTimeoutError, RedisClusterException, OperationalError)
#: Whatever may come out of redis-py.
THEIRS = (*OUTAGES, RedisError)

#: It was asked, has changed nothing, and will do better: a replica that was the primary, a memory that is full, a slot
#: on its way to another node, or of a node that is gone.
NOT_NOW = (ReadOnlyError, OutOfMemoryError, TryAgainError, AskError, ClusterError)
#: The same, where redis-py (6.4-8.1) has no class: too few replicas (``min-replicas-to-write``), a disk that is full,
#: and a script of somebody else that does not end.
NOT_NOW_CODES = frozenset({"NOREPLICAS", "MISCONF", "BUSY", "MASTERDOWN"})


def code_of(error: Exception) -> str:
    """Return the code that an error reply begins with, "" where redis-py has read it already."""
    return str(error).split(" ", 1)[0] if type(error) is ResponseError else ""


def is_outage(error: Exception) -> bool:
    """Return whether the same call may succeed a little later."""
    return isinstance(error, (*OUTAGES, *NOT_NOW)) or code_of(error) in NOT_NOW_CODES


class Refusals:
    """Turns redis-py's errors within it into ours; no message of theirs names a password.

    Args:
        address: The server as it may be shown to people.
    """

    def __init__(self, address: str) -> None:
        self._server = f"the state server {address}"

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise what is ours in the place of what is not."""
        if isinstance(error, THEIRS) and not isinstance(error, StoreUnavailable):
            raise self._ours(error) from error

    def _ours(self, error: Exception) -> Exception:
        if isinstance(error, OUTAGES):
            return StoreUnavailable(f"{self._server} can not be reached: {error}")
        if code_of(error) == NEWER:
            return NewerRecord(f"{error}; upgrade this process")
        if is_outage(error):
            return StoreUnavailable(f"{self._server} refused for now: {error}")
        return StoreError(f"{self._server} refused: {error}")
