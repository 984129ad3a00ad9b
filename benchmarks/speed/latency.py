"""How soon a body starts: after a call, on an idle worker; and after the run that it follows."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import Caller
from benchmarks.speed.contenders import ONCE, OURS, PLAIN, SINGLETON, Setup
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns
from benchmarks.speed.servers import redis_server
from benchmarks.speed.stamps import Stamps
from benchmarks.speed.workers import serving

CONTENDERS = (PLAIN, OURS, ONCE, SINGLETON)
POOLS = ("prefork", "threads")
#: Calls of a contender in a round; seconds of quiet before each.
CALLS, QUIET = 10, 0.01
#: Seconds that a body lasts which is to be followed.
LASTS = 0.05
FOLLOWED = "ours followed"

Numbers = itertools.count


def measure(bench: Bench) -> list[Row]:
    """Measure each pool."""
    rows = []
    for pool in POOLS:
        bench.say(pool)
        rows += _rows(pool, _measured(bench, pool))
    return rows


def _measured(bench: Bench, pool: str) -> dict[str, list[float]]:
    with redis_server(bench.redis) as server, Stamps() as stamps, ExitStack() as stack:
        setups = [Setup(name, server.url, server.url) for name in CONTENDERS]
        stack.enter_context(serving(setups, stamps, pool=pool))
        callers = {setup.contender: stack.enter_context(Caller(setup)) for setup in setups}
        numbers = itertools.count()
        parts: dict[str, Callable[[], float]] = {
            name: partial(_median, partial(_start, stamps, callers[name], numbers)) for name in CONTENDERS
        }
        parts[FOLLOWED] = partial(_median, partial(_follow, stamps, callers[OURS], numbers))
        take_turns(1, parts)
        return take_turns(bench.rounds, parts)


def _median(once: Callable[[], float]) -> float:
    return statistics.median(once() for _ in range(CALLS))


def _start(stamps: Stamps, caller: Caller, numbers: Numbers[int]) -> float:
    """Return the milliseconds from a call to its body."""
    key = f"key:{next(numbers)}"
    time.sleep(QUIET)
    called = caller("trigger", task="stamped", args=[key])["at"]
    return float(1000 * (stamps.wait("start", key)["at"] - called))


def _follow(stamps: Stamps, caller: Caller, numbers: Numbers[int]) -> float:
    """Return the milliseconds from the end of a body to the start of its follow-up."""
    for _ in range(10):
        key = f"key:{next(numbers)}"
        time.sleep(QUIET)
        caller("trigger", task="lasting", args=[key, LASTS])
        stamps.wait("start", key)
        disposition = caller("trigger", task="lasting", args=[key, 0])["disposition"]
        ended = stamps.wait("end", key)["at"]
        started = stamps.wait("start", key)["at"]
        stamps.wait("end", key)
        if disposition == "queued":  # else the machine stood still while the body lasted
            return float(1000 * (started - ended))
    raise RuntimeError(f"no call came within {LASTS} s of the start of a body")


def _rows(pool: str, found: dict[str, list[float]]) -> list[Row]:
    beside = ("plain", found[PLAIN])
    rows = [
        row(f"{pool}, call to start: {name}", found[name], "ms", beside=beside, most=(1.15,) if name == OURS else ())
        for name in CONTENDERS
    ]
    what = f"{pool}, end of a run to its follow-up: ours"
    return [*rows, row(what, found[FOLLOWED], "ms", beside=("plain's call to start", found[PLAIN]), most=(1.5,))]
