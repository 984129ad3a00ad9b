"""What goes wrong in a storm."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from benchmarks.storm.log import Log
from benchmarks.storm.tasks import RUNS
from benchmarks.storm.world import World

__all__ = ["Weather"]

#: Messages of a queue that is short, and seconds for which it is waited for.
SHORT, SHORT_WITHIN = 10, 20


class Weather:
    """Breaks things, one at a time, and puts them right again.

    Args:
        world: What there is to break.
        log: Where is written what was broken, and when.
        choice: What decides.
        lease: A worker's lease, in seconds.
    """

    def __init__(self, world: World, log: Log, choice: random.Random, lease: float) -> None:
        self.world = world
        self.log = log
        self.choice = choice
        self.lease = lease
        #: How often each fault was made.
        self.made: dict[str, int] = {}
        self._faults: dict[Callable[[], None], int] = {
            self.kill_a_child: 6,
            self.kill_a_worker: 3,
            self.kill_a_producer: 2,
            self.shut_a_worker_down: 2,
            self.freeze_a_worker: 3,
            self.cut_a_worker_off: 3,
            self.swallow_replies: 2,
            self.slow_down: 2,
            self.freeze_the_store: 2,
            self.kill_the_store: 2,
            self.purge_the_queue: 1,
            self.restart_the_broker: 1,
        }

    def blow(self) -> None:
        """Break one thing."""
        fault = self.choice.choices(list(self._faults), weights=list(self._faults.values()))[0]
        name = fault.__name__.replace("_", " ")
        self.made[name] = self.made.get(name, 0) + 1
        fault()

    # -- processes ---------------------------------------------------------------------------------------------------

    def kill_a_child(self) -> None:
        """SIGKILL one child of a pool."""
        worker = self.choice.choice([each for each in self.world.workers if each.pool == "prefork"])
        children = worker.child_pids()
        if not children:
            return
        pid = self.choice.choice(children)
        self.log.write("killed", pids=[pid])
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()

    def kill_a_worker(self) -> None:
        """SIGKILL a worker, with all that it has."""
        worker = self.choice.choice(self.world.workers)
        self.log.write("killed", pids=[worker.pid, *worker.child_pids()])
        worker.kill()
        self._pause(0, 2)
        worker.start()

    def shut_a_worker_down(self) -> None:
        """Ask a worker to finish what it is doing, and start it again."""
        worker = self.choice.choice(self.world.workers)
        pids = [worker.pid, *worker.child_pids()]
        worker.signal(signal.SIGTERM)
        try:
            worker.wait(20)
        except TimeoutError:
            self.log.write("killed", pids=pids)
            worker.kill()
        worker.start()

    def freeze_a_worker(self) -> None:
        """Stop a worker and its children, for less than a lease or for more, and let them go on."""
        worker = self.choice.choice(self.world.workers)
        with self._away(worker):
            worker.pause()
            self._pause(0.1, 2 * self.lease)
            worker.resume()

    def kill_a_producer(self) -> None:
        """SIGKILL a producer; another takes its place."""
        producer = self.choice.choice(self.world.producers)
        self.log.write("killed", pids=[producer.pid])
        producer.kill()
        self.world.replace(producer)

    # -- between a worker and the store ------------------------------------------------------------------------------

    def cut_a_worker_off(self) -> None:
        """Cut a worker's connections to the store, and allow no new ones."""
        worker = self.choice.choice(self.world.workers)
        with self._away(worker):
            self.world.lines[worker].cut()
            self._pause(0.1, 2 * self.lease)
            self.world.lines[worker].heal()

    def swallow_replies(self) -> None:
        """Have the store act on what a worker asks for, and the worker not hear of it."""
        worker = self.choice.choice(self.world.workers)
        line = self.world.lines[worker]
        with self._away(worker):
            line.drop_replies = True
            self._pause(0.1, self.lease)
            line.drop_replies = False
            line.cut()
            line.heal()

    def slow_down(self) -> None:
        """Have the store answer a worker late."""
        worker = self.choice.choice(self.world.workers)
        with self._away(worker):
            self.world.lines[worker].delay = self.choice.uniform(0.01, 0.3)
            self._pause(0.5, 3)
            self.world.lines[worker].delay = 0

    # -- servers -----------------------------------------------------------------------------------------------------

    def freeze_the_store(self) -> None:
        """Stop the store, for less than a lease or for more."""
        with self._trouble():
            self.world.store.pause()
            self._pause(0.1, 1.5 * self.lease)
            self.world.store.resume()

    def kill_the_store(self) -> None:
        """SIGKILL the store, which has written down whatever it acknowledged, and start it again."""
        with self._trouble():
            self.world.store.kill()
            self._pause(0, 1.5 * self.lease)
            self.world.store.start()

    def purge_the_queue(self) -> None:
        """Lose every message that waits for a worker.

        Once the queue is short: in a long one are second messages of runs whose first ones have waited for too long,
        and whoever loses a second one waits for an hour, as it should.
        """
        deadline = time.monotonic() + SHORT_WITHIN
        while self.world.messages(RUNS) > SHORT:
            if time.monotonic() > deadline:
                return
            self._pause(0.2, 0.2)
        with self._trouble(of=self.world.redispatch_after), contextlib.suppress(ConnectionError):
            self.world.purge()

    def restart_the_broker(self) -> None:
        """Restart the broker, which keeps its queues."""
        with self._trouble(of=self.world.redispatch_after):
            self.world.broker.restart()

    # -- all of them -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _away(self, worker: Any) -> Iterator[None]:
        since, pids = time.monotonic(), [worker.pid, *worker.child_pids()]
        yield
        self.log.write("away", pids=pids, since=since)

    @contextlib.contextmanager
    def _trouble(self, of: float = 0) -> Iterator[None]:
        """Note when all were in trouble, and for how many seconds longer they may feel it."""
        since = time.monotonic()
        yield
        self.log.write("trouble", at=time.monotonic() + of, since=since)

    def _pause(self, least: float, most: float) -> None:
        time.sleep(self.choice.uniform(least, most))
