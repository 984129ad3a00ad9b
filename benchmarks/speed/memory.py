"""What a key takes in the state server. The broker is another server."""

from __future__ import annotations

import json
import time

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import Caller
from benchmarks.speed.contenders import GATE, ONCE, OURS, PLAIN, SINGLETON, Setup, make_app
from benchmarks.speed.report import Row, row
from benchmarks.speed.servers import Server, redis_server
from benchmarks.speed.stamps import Stamps
from benchmarks.speed.workers import serving

KEYS = 2000
#: What a namespace holds when no key is busy.
ALLOWED = {"{coalesce}:meta", "{coalesce}:history", "{coalesce}:presence"}
#: So many names there may be with what a worker and a running script keep for the moment.
FEW = 10
#: What every key comes with: its text, and the arguments of its run.
KEY = f"key:{0:08}"
GIVEN = len(KEY) + len(json.dumps([[KEY], {}]))


def measure(bench: Bench) -> list[Row]:
    """Fill, have all keys leased at once, drain; then the same number of keys of other packages."""
    with redis_server() as broker, redis_server(bench.redis) as state:
        rows = _ours(bench, broker, state)
        for name in (ONCE, SINGLETON):
            state.clear()
            broker.clear()
            with Caller(Setup(name, broker.url, state.url)) as caller:
                before = state.memory()
                caller("fresh", number=KEYS, warm=0)
                each = (state.memory() - before) / KEYS
                rows.append(row(f"{name}, a pending key, its text included", [each], "B"))
        return [*rows, _plain(broker, state)]


def _ours(bench: Bench, broker: Server, state: Server) -> list[Row]:
    from celery_coalesce import Coalescer, RunState
    from tests.support.process import wait_until

    setup = Setup(OURS, broker.url, state.url)
    coalescer = Coalescer(make_app(setup))

    def leased() -> bool:
        # Asking for all keys is much work: seldom, and not before their messages are taken.
        if broker.client.llen(f"speed.{OURS}"):
            return False
        time.sleep(1)
        return sum(run.state is RunState.RUNNING for run in coalescer.runs()) == KEYS

    with Caller(setup) as caller, Stamps() as stamps:
        caller("fresh", number=1)
        state.clear()
        broker.clear()
        before = state.memory()
        caller("batch", task="gated", number=KEYS)
        pending = (state.memory() - before) / KEYS
        bench.say("a lease for each")
        # This pool takes a lease for what it has fetched, though two bodies go on at a time.
        with serving([setup], stamps, pool="threads", extra=["--prefetch-multiplier", str(KEYS)]):
            wait_until(leased, 60, "not every key has a lease")
            running = (state.memory() - before) / KEYS
            caller("batch", task="gated", number=KEYS)
            followed = (state.memory() - before) / KEYS
            bench.say("draining")
            state.client.rpush(GATE, "open")
            wait_until(lambda: state.client.dbsize() < FEW and not coalescer.runs(), 120, "the keys are not drained")
            state.client.delete(GATE)
            names = set(state.client.scan_iter("*", count=1000)) - ALLOWED
            left = (state.memory() - before) / KEYS
    bench.say(f"left in the store: {sorted(names)[:5] or 'nothing of a key'}")
    return [
        row("ours, a pending key", [pending - GIVEN], "B", most=(400,)),
        row("ours, a running key", [running - GIVEN], "B", most=(500,)),
        row("ours, a running key and its follow-up", [followed - GIVEN - len(json.dumps([[KEY], {}]))], "B"),
        row("ours, an idle key", [left], "B"),
        row(f"ours, names left by {KEYS:,} idle keys", [len(names)], "names", most=(0,)),
        row("ours, a pending key, its text and arguments included", [pending], "B"),
    ]


def _plain(broker: Server, state: Server) -> Row:
    broker.clear()
    with Caller(Setup(PLAIN, broker.url, state.url)) as caller:
        before = broker.memory()
        caller("fresh", number=KEYS, warm=0)
        return row("plain, a message in the broker", [(broker.memory() - before) / KEYS], "B")
