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
        shortcuts: Whether scripts push messages, and the broker keeps none that a worker has.
    """

    options: dict[str, Any] = field(default_factory=dict)
    producers: tuple[int, ...] = (1, 1)
    workers: int = 2
    faults: int = 0
    kinds: tuple[str, ...] = ALL_FAULTS
    ends: tuple[str, ...] = ("",)
    follows: bool = False
    record: bool = True
    shortcuts: bool = False


#: What may go wrong with processes and messages; clocks that go wrong make ten times as many states.
PARTS = (*DEATHS, *MESSAGES)

#: In CI: any one fault of a process or a message after any step of two workers, the sweep and two or three producers,
#: in every mode; a worker that stalls, beside another; and any fault of all, with one worker.
BOUNDED = {
    "queue": Setup(faults=1, kinds=PARTS),
    "queue, a worker stalls": Setup(producers=(2,), faults=1, kinds=("worker stalls",)),
    "queue, every fault": Setup(workers=1, faults=1),
    "queue, three producers": Setup(producers=(1, 1, 1), faults=1, kinds=("worker dies",)),
    "queue, a stall and a lost reply": Setup(
        producers=(1,), workers=1, faults=2, kinds=("worker stalls", "reply lost")
    ),
    "queue, in short ways": Setup(faults=1, kinds=PARTS, shortcuts=True),
    "serialize": Setup({"coalesce": "serialize"}, faults=1, kinds=PARTS),
    "serialize, three producers": Setup({"coalesce": "serialize"}, producers=(1, 1, 1)),
    "skip": Setup({"coalesce": "skip"}, faults=1, kinds=PARTS),
    "limit of two": Setup({"limit": 2}, faults=1, kinds=DEATHS),
    "limit of two, a publish fails": Setup(
        {"limit": 2}, workers=1, faults=2, kinds=("publish fails", "reply lost", "producer dies")
    ),
    "late acknowledgement": Setup({"acks_late": True}, faults=1, kinds=PARTS),
    "late acknowledgement, in short ways": Setup({"acks_late": True}, faults=1, kinds=PARTS, shortcuts=True),
    "followers": Setup(faults=1, kinds=DEATHS, follows=True),
    "retry": Setup(faults=1, kinds=DEATHS, ends=("retry", "")),
    "stop on error": Setup({"on_error": "stop"}, faults=1, kinds=DEATHS, ends=("fail",)),
}

#: Hours: every fault with two workers, and two faults in one execution.
DEEP = {
    **{name: replace(setup, workers=2, faults=1, kinds=ALL_FAULTS) for name, setup in BOUNDED.items()},
    "queue, two faults": Setup(workers=1, faults=2),
    "late acknowledgement, two faults": Setup({"acks_late": True}, workers=1, faults=2),
    "limit of two, two deaths": Setup({"limit": 2}, workers=1, faults=2, kinds=DEATHS),
}
