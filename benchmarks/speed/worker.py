"""What a run costs a worker whose bodies do nothing.

A caller fills a staging list; renaming it to the worker's queue makes all its messages available at once.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import Caller
from benchmarks.speed.contenders import ONCE, OURS, PLAIN, SINGLETON, Setup
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns
from benchmarks.speed.servers import Server, redis_server
from benchmarks.speed.stamps import Stamps
from benchmarks.speed.workers import POOLS, cpu_of, serving
from tests.support.worker import WorkerProcess

#: With results off, and on.
CONTENDERS = {False: (PLAIN, OURS, ONCE, SINGLETON), True: (PLAIN, OURS, ONCE)}
RUNS, WARM = 500, 100
#: Of plain Celery's runs per second.
LEAST = {"prefork": 0.95, "threads": 0.90, "solo": 0.85}
CPU_MOST = 1.10
#: Seconds after which the run beside the last one has ended, too.
SETTLE = 0.05

Figures = dict[str, list[dict[str, float]]]


def measure(bench: Bench) -> list[Row]:
    """Measure each pool with results off, then on."""
    rows = []
    for results in (False, True):
        for pool in POOLS:
            bench.say(f"{pool}, results {'on' if results else 'off'}")
            rows += _rows(pool, results, _measured(bench, pool, results))
    return rows


def _measured(bench: Bench, pool: str, results: bool) -> Figures:
    with redis_server(bench.redis) as server, Stamps() as stamps, ExitStack() as stack:
        given = {"broker": server.url, "state": server.url, "results": server.url if results else None}
        setups = [Setup(name, **given) for name in CONTENDERS[results]]
        workers = stack.enter_context(serving(setups, stamps, pool=pool))
        contenders = []
        for name, worker in workers.items():
            caller = stack.enter_context(Caller(Setup(name, **given, queue=_staging(name))))
            contenders.append(_Contender(name, caller, worker))
        for contender in contenders:
            contender.round(server, stamps, WARM)
        parts = {each.name: partial(each.round, server, stamps, RUNS) for each in contenders}
        return take_turns(bench.share(0.5), parts)


def _staging(contender: str) -> str:
    return f"speed.{contender}.staging"


@dataclass
class _Contender:
    name: str
    caller: Caller
    worker: WorkerProcess
    rounds: int = 0

    def round(self, server: Server, stamps: Stamps, runs: int) -> dict[str, float]:
        """Have the worker run once for each of its messages."""
        self.rounds += 1
        mark = f"{self.name}:{self.rounds}"
        self.caller("fill", number=runs, mark=mark)
        used, redis_used = cpu_of(self.worker), server.cpu()
        began = time.time()
        server.client.rename(_staging(self.name), f"speed.{self.name}")
        ended = stamps.wait("last", mark)["at"]
        time.sleep(SETTLE)
        return {
            "rate": runs / (ended - began),
            "cpu": 1e6 * (cpu_of(self.worker) - used) / runs,
            "redis": 1e6 * (server.cpu() - redis_used) / runs,
        }


def _rows(pool: str, results: bool, found: Figures) -> list[Row]:
    where = f"{pool}{', results on' if results else ''}"
    by = {name: {figure: [each[figure] for each in rounds] for figure in rounds[0]} for name, rounds in found.items()}
    for figures in by.values():
        figures["both"] = [sum(pair) for pair in zip(figures["cpu"], figures["redis"], strict=True)]
    plain = by[PLAIN]
    rows = []
    for name, figures in by.items():
        least = (LEAST[pool],) if name == OURS else ()
        rows.append(row(f"{where}: {name}", figures["rate"], "runs/s", beside=("plain", plain["rate"]), least=least))
    for name, figures in by.items():
        most = (CPU_MOST,) if name == OURS else ()
        beside = ("plain", plain["both"])
        rows.append(row(f"{where}, CPU per run: {name}", figures["both"], "us", beside=beside, most=most))
        if name in (PLAIN, OURS):
            beside = ("plain", plain["redis"])
            rows.append(row(f"{where}, CPU per run, of Redis: {name}", figures["redis"], "us", beside=beside))
    return rows
