"""How far is explored: every setup by its name."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

DEATHS = ("producer dies", "worker dies", "child dies", "sweeper dies")
MESSAGES = ("message lost", "message twice", "publish fails", "reply lost")
CLOCKS = ("worker stalls", "all is slow")
ALL_FAULTS = (*DEATHS, *MESSAGES, *CLOCKS)


@dataclass(frozen=True)
class Setup:
    """What is explored.

    Args:
        options: The task's options, without their prefix.
        producers: How many calls each producer makes, one after the other.
        workers: How many workers there are, each with one place in its pool.
        faults: How many faults there may be in one execution.
        kinds: Which.
        ends: How bodies end: by the attempt, the last one for all others.
        follows: Whether the callers bring task ids of their own.
        record: Whether the record's own invariants are looked at, too.
    """

    options: dict[str, Any] = field(default_factory=dict)
    producers: tuple[int, ...] = (1, 1)
    workers: int = 2
    faults: int = 0
    kinds: tuple[str, ...] = ALL_FAULTS
    ends: tuple[str, ...] = ("",)
    follows: bool = False
    record: bool = True


#: In CI: two producers, two workers and the sweep with any one fault after any step, and what differs from that with
#: fewer processes or faults.
BOUNDED = {
    "queue": Setup(faults=1),
    "queue, three producers": Setup(producers=(1, 1, 1)),
    "queue, two calls each": Setup(producers=(2, 2)),
    "serialize": Setup({"coalesce": "serialize"}, workers=1, faults=1, kinds=(*DEATHS, *MESSAGES)),
    "serialize, two calls each": Setup({"coalesce": "serialize"}, producers=(2, 1)),
    "skip": Setup({"coalesce": "skip"}, workers=1, faults=1, kinds=(*DEATHS, "reply lost")),
    "limit of two": Setup({"limit": 2}, workers=2),
    "limit of two, one worker": Setup({"limit": 2}, workers=1, faults=1, kinds=(*DEATHS, "publish fails")),
    "late acknowledgement": Setup({"acks_late": True}, workers=1, faults=1),
    "followers": Setup(workers=1, faults=1, kinds=DEATHS, follows=True),
    "retry": Setup(workers=1, faults=1, kinds=DEATHS, ends=("retry", "")),
    "stop on error": Setup({"on_error": "stop"}, workers=1, faults=1, kinds=DEATHS, ends=("fail",)),
}

#: Hours: everything with two workers and every fault, and two faults in one execution.
DEEP = {
    **{name: replace(setup, workers=2, faults=1, kinds=Setup.kinds) for name, setup in BOUNDED.items()},
    "queue, two faults": Setup(workers=1, faults=2),
    "late acknowledgement, two faults": Setup({"acks_late": True}, workers=1, faults=2),
    "limit of two, two faults": Setup({"limit": 2}, workers=1, faults=2, kinds=("producer dies", "publish fails")),
}
