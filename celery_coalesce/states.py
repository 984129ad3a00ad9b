"""The only spelling of each word that is stored, sent or answered."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "Answer",
    "Disposition",
    "Mode",
    "OnError",
    "OnRetry",
    "Outage",
    "Outcome",
    "Overflow",
    "Rule",
    "RunState",
]


class Word(str, Enum):
    """A string constant that prints as itself."""

    def __str__(self) -> str:
        return str(self.value)


class Disposition(Word):
    """What became of a trigger."""

    DISPATCHED = "dispatched"
    QUEUED = "queued"
    COALESCED = "coalesced"
    SKIPPED = "skipped"
    REJECTED = "rejected"
    EXEMPT = "exempt"


class RunState(Word):
    """Where a run is."""

    PENDING = "pending"
    DISPATCHED = "dispatched"
    RUNNING = "running"
    RETRYING = "retrying"
    CLEARED = "cleared"
    #: Not in the record any more; only its ``once`` is.
    ENDED = "ended"


class Outcome(Word):
    """How a run ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    SKIPPED = "skipped"
    REVOKED = "revoked"
    EXPIRED = "expired"
    LOST = "lost"
    STOPPED = "stopped"


class Mode(Word):
    """``coalesce``: what a trigger does while its key is busy."""

    QUEUE = "queue"
    SKIP = "skip"
    SERIALIZE = "serialize"
    REPLACE = "replace"


class Overflow(Word):
    """``coalesce_overflow``: what a trigger does when enough runs wait."""

    MERGE = "merge"
    REJECT = "reject"


class Rule(Word):
    """``coalesce_args``: whose arguments a covering run gets."""

    LATEST = "latest"
    FIRST = "first"
    MERGE = "merge"


class OnError(Word):
    """``coalesce_on_error``: what a failure does to what was already waiting."""

    CONTINUE = "continue"
    STOP = "stop"


class OnRetry(Word):
    """``coalesce_on_retry``: what becomes of a key while a run of it waits for its retry."""

    HOLD = "hold"
    RELEASE = "release"
    MERGE = "merge"


class Outage(Word):
    """``coalesce_on_outage``: what a call does when the state server is away."""

    RAISE = "raise"
    PUBLISH = "publish"


class Answer(Word):
    """The word that a transition's reply begins with, where it is not a disposition."""

    MERGE = "merge"
    KNOWN = "known"
    RUNNING = "running"
    EXPIRED = "expired"
    REVOKED = "revoked"
    EARLY = "early"
    SKIPPED = "skipped"
    CARRY = "carry"
    STOP = "stop"
    PENDING = "pending"
    DUPLICATE = "duplicate"
    GONE = "gone"
    UNKNOWN = "unknown"
    LOST = "lost"
    FOLLOWERS = "followers"
    ENDED = "ended"
    RETRYING = "retrying"
    DISPATCHED = "dispatched"
    UNPUBLISHED = "unpublished"
    CLEARED = "cleared"
    RENEWED = "renewed"
    OVERDUE = "overdue"
    ALIVE = "alive"
    GRACE = "grace"
    TAKEN = "taken"
    IDLE = "idle"
    RECORD = "record"
