"""Workers of the contenders, and what they use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import psutil

from benchmarks.speed.contenders import VARIABLE, Setup
from benchmarks.speed.stamps import VARIABLE as STAMPS
from benchmarks.speed.stamps import Stamps
from tests.support.worker import WorkerProcess

POOLS = ("prefork", "threads", "solo")


@contextmanager
def serving(
    setups: Sequence[Setup], stamps: Stamps, *, pool: str, queue: str = "", extra: Sequence[str] = ()
) -> Iterator[dict[str, WorkerProcess]]:
    """Run a worker for each contender, two bodies at a time; give them by contender.

    Args:
        setups: The contenders.
        stamps: Where their bodies tell times.
        pool: Which pool they have.
        queue: What is appended to the name of the queue that they consume.
        extra: Further arguments.
    """
    with ExitStack() as stack:
        workers = {}
        for setup in setups:
            worker = WorkerProcess(
                "benchmarks.speed.contenders",
                broker=setup.broker,
                pool=pool,
                concurrency=2,
                queues=[f"speed.{setup.contender}{queue}"],
                events=False,
                extra_args=["-l", "WARNING", *extra],
                env={VARIABLE: setup.dump(), STAMPS: stamps.path},
            )
            stack.callback(worker.close)
            worker.launch()
            workers[setup.contender] = worker
        for worker in workers.values():
            worker.wait_ready()
        yield workers


def cpu_of(worker: WorkerProcess) -> float:
    """Return the seconds of CPU time that a worker and its children have used."""
    seconds = 0.0
    for pid in (worker.pid, *worker.child_pids()):
        with suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            seconds += times.user + times.system
    return seconds
