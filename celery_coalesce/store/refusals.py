"""What the server's refusals mean: that it can not now, or that it never will."""

from __future__ import annotations

from kombu.exceptions import OperationalError
from redis.exceptions import (
    AskError,
    ClusterError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import (
    ConnectionError as RedisConnectionError,
)
from redis.exceptions import (
    TimeoutError as RedisTimeoutError,
)

__all__ = ["NEWER", "OUTAGES", "code_of", "is_outage"]

#: What a transition says of a record of a version that it does not know (lua/lib/record.lua).
NEWER = "NEWER"

#: It could not be asked.
OUTAGES = (RedisConnectionError, RedisTimeoutError, RedisClusterException, OperationalError)

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
