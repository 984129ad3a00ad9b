"""What becomes of 10,000 triggers of one key."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import Caller
from benchmarks.speed.contenders import GATE, OURS, Setup
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns
from benchmarks.speed.servers import Server, redis_server
from benchmarks.speed.stamps import Stamps
from benchmarks.speed.workers import serving

TRIGGERS = 10_000
#: Seconds that a run lasts.
LASTS = 0.05
#: Calls that coalesce while nothing runs.
QUIET = 500
#: Seconds after the last expected run in which there could be another.
SURPLUS = 0.5

Found = dict[str, float]


def measure(bench: Bench) -> list[Row]:
    """Trigger while runs go on, and while one run waits for the end of the burst."""
    with redis_server(bench.redis) as server, Stamps() as stamps, ExitStack() as stack:
        setup = Setup(OURS, server.url, server.url)
        stack.enter_context(serving([setup], stamps, pool="prefork"))
        caller = stack.enter_context(Caller(setup))
        unheard = stack.enter_context(Caller(Setup(OURS, server.url, server.url, queue="speed.nobody")))
        keys = (f"burst:{number}" for number in itertools.count())
        parts: dict[str, Callable[[], Found]] = {
            "quiet": partial(unheard, "again", number=QUIET),
            "going on": lambda: _going_on(stamps, caller, next(keys)),
            "held": lambda: _held(server, stamps, caller, next(keys)),
        }
        return _rows(take_turns(bench.share(0.3), parts))


def _going_on(stamps: Stamps, caller: Caller, key: str) -> Found:
    """Trigger a key while its runs come and go."""
    found = caller("burst", task="lasting", key=key, number=TRIGGERS, given=[LASTS])
    return found | _made(stamps, key, found["last"])


def _held(server: Server, stamps: Stamps, caller: Caller, key: str) -> Found:
    """Trigger a key whose first run ends after the burst."""
    server.client.delete(GATE)
    caller("trigger", task="gated", args=[key])
    stamps.wait("start", key)
    found = caller("burst", task="gated", key=key, number=TRIGGERS, given=[])
    server.client.rpush(GATE, "open")
    made = _made(stamps, key, found["last"])
    return found | made | {"runs": made["runs"] + 1}


def _made(stamps: Stamps, key: str, last: float) -> Found:
    """Return what a burst has made, once it is over."""
    seen = stamps.until("end", key=key, number=TRIGGERS - 1) + stamps.rest(SURPLUS)
    starts: list[dict[str, Any]] = [each for each in seen if each["event"] == "start" and each["key"] == key]
    covered = any(each["number"] == TRIGGERS - 1 and each["at"] >= last for each in starts)
    sessions = {each.get("session") for each in starts}
    return {"runs": len(starts), "sessions": len(sessions), "lost": float(not covered)}


def _rows(found: dict[str, list[Found]]) -> list[Row]:
    def of(part: str, figure: str) -> list[float]:
        return [each[figure] for each in found[part]]

    bound = [wall * TRIGGERS / 1e6 / LASTS + 2 for wall in of("going on", "wall")]
    cost = ("a quiet one", of("quiet", "wall"))
    return [
        row("a call that coalesces, nothing runs", cost[1], "us"),
        row("a call of the burst, runs going on", of("going on", "wall"), "us", beside=cost),
        row("a call of the burst, one run going on", of("held", "wall"), "us", beside=cost),
        row("runs, going on", of("going on", "runs"), "runs", beside=("one per 50 ms and two", bound), most=(1,)),
        row("sessions, runs going on", of("going on", "sessions"), "sessions"),
        row("last triggers lost, runs going on", of("going on", "lost"), "lost", most=(0,)),
        row("runs of a burst within one run", of("held", "runs"), "runs", most=(2,)),
        row("last triggers lost, one run going on", of("held", "lost"), "lost", most=(0,)),
    ]
