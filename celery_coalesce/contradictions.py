"""Which options make no sense together, and why. The page of the options shows them as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .options import OPTIONS

__all__ = ["CONTRADICTIONS", "NEEDS", "Contradiction", "declared_on"]


@dataclass(frozen=True)
class Contradiction:
    """Two options that make no sense together.

    ``option=value`` is one word of an option, ``option`` any value but its default.
    """

    one: str
    other: str
    #: Why, as what is wrong with ``one``.
    reason: str
    remedy: str


_SKIP, _SERIALIZE, _REPLACE = "coalesce=skip", "coalesce=serialize", "coalesce=replace"
_REJECT, _STOP = "coalesce_overflow=reject", "coalesce_on_error=stop"
_RELEASE, _MERGE_RETRY = "coalesce_on_retry=release", "coalesce_on_retry=merge"


def _merging(option: str) -> Iterable[Contradiction]:
    for mode in (_SKIP, _SERIALIZE):
        reason = f'has no meaning with coalesce="{mode.partition("=")[2]}", which merges nothing'
        yield Contradiction(option, mode, reason, 'leave it out, or use coalesce="queue"')


#: What is refused at the declaration, and of one call's own options at the call.
CONTRADICTIONS: tuple[Contradiction, ...] = (
    Contradiction(
        "coalesce_limit",
        _SKIP,
        'contradicts coalesce="skip", which answers a call with the one run there is',
        'use coalesce_limit=1, or coalesce="queue"',
    ),
    *_merging("coalesce_max_queued"),
    *_merging(_REJECT),
    *_merging("coalesce_args"),
    *_merging("coalesce_delay"),
    *_merging("coalesce_max_delay"),
    *_merging(_MERGE_RETRY),
    Contradiction(
        "coalesce_args",
        _REJECT,
        'has no meaning with coalesce_overflow="reject", which merges nothing',
        'leave it out, or use coalesce_overflow="merge"',
    ),
    Contradiction(
        "coalesce_delay",
        _REJECT,
        'contradicts coalesce_overflow="reject": the calls of a burst are merged, not refused',
        'use coalesce_overflow="merge"',
    ),
    Contradiction(
        "coalesce_max_delay",
        _REJECT,
        'contradicts coalesce_overflow="reject": the calls of a burst are merged, not refused',
        'use coalesce_overflow="merge"',
    ),
    Contradiction(
        _MERGE_RETRY,
        _REJECT,
        'contradicts coalesce_overflow="reject", which merges nothing',
        'use coalesce_overflow="merge", or coalesce_on_retry="hold"',
    ),
    Contradiction(
        _MERGE_RETRY,
        "coalesce_constraints",
        "contradicts coalesce_constraints: the run keeps the slots of its own arguments, and would get those of others",
        'use coalesce_on_retry="hold" or "release"',
    ),
    Contradiction(
        "coalesce_limit",
        _REPLACE,
        'contradicts coalesce="replace": with several runs it is not said which one is replaced',
        'use coalesce_limit=1, or coalesce="queue"',
    ),
    Contradiction(
        _REJECT,
        _REPLACE,
        'contradicts coalesce="replace": the newest call is the one that shall run',
        'use coalesce_overflow="merge"',
    ),
    Contradiction(
        _STOP,
        _REPLACE,
        'contradicts coalesce="replace": the newer call takes the place of the older, whatever became of that',
        'use coalesce_on_error="continue"',
    ),
    Contradiction(
        _RELEASE,
        _REPLACE,
        'contradicts coalesce="replace": the older run would come back after the newer',
        'use coalesce_on_retry="hold"',
    ),
    Contradiction(
        _MERGE_RETRY,
        _REPLACE,
        'contradicts coalesce="replace": a newer call would wait for the older run\'s retry',
        'use coalesce_on_retry="hold"',
    ),
    Contradiction(
        _STOP,
        _SKIP,
        'has no meaning with coalesce="skip": nothing waits behind a single flight',
        'leave it out, or use coalesce="serialize"',
    ),
    Contradiction(
        _RELEASE,
        _SKIP,
        'contradicts coalesce="skip": a second flight would overtake the one that is to be retried',
        'use coalesce_on_retry="hold"',
    ),
    Contradiction(
        "coalesce_once",
        _SERIALIZE,
        'contradicts coalesce="serialize", where every call runs',
        'use coalesce="queue" or coalesce="skip"',
    ),
    Contradiction(
        "coalesce_once",
        "coalesce_limit",
        "contradicts coalesce_limit: runs that go on at once would all succeed",
        "use coalesce_limit=1",
    ),
)


#: An option that has no meaning without another.
NEEDS: tuple[Contradiction, ...] = (
    Contradiction(
        "coalesce_max_delay",
        "coalesce_delay",
        "has no meaning without coalesce_delay, which it bounds",
        "give coalesce_delay as well",
    ),
    Contradiction(
        "coalesce_grace",
        _REPLACE,
        'has no meaning without coalesce="replace"',
        'leave it out, or use coalesce="replace"',
    ),
)


def declared_on(feature: str, options: Mapping[str, Any]) -> bool:
    """Return whether options have a feature, as :class:`Contradiction` names it."""
    option, is_word, word = feature.partition("=")
    if option not in options:
        return False
    value = options[option]
    if is_word:
        return not callable(value) and bool(value == word)
    # Nothing, in whatever form a subclass takes back what its base declares.
    nothing = OPTIONS[option] is None and (value is None or value is False or value in ((), [], {}))
    return callable(value) or not (nothing or value == OPTIONS[option])
