"""What there is in a storm: servers, workers, producers, and the lines between them."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.storm.tasks import CALLBACKS, RUNS, SETTINGS, app
from tests.support.process import Process
from tests.support.proxy import TCPProxy
from tests.support.rabbit import RabbitServer
from tests.support.servers import RedisServer, ValkeyServer
from tests.support.worker import WorkerProcess

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["ProducerProcess", "World"]

#: Pool and concurrency of each worker.
WORKERS = (("prefork", 2), ("prefork", 2), ("threads", 4))


class ProducerProcess(Process):
    """A process that calls.

    Args:
        name: What its calls are named after.
        pause: Seconds between two calls, on average.
        settings: What tells it of the storm.
    """

    name = "producer"

    def __init__(self, name: str, pause: float, settings: str) -> None:
        super().__init__()
        self.called = name
        self.generation = 0
        self._pause = pause
        self._settings = settings

    def command(self) -> list[str]:
        name = f"{self.called}.{self.generation}"
        return [sys.executable, "-m", "benchmarks.storm.producer", name, str(self._pause)]

    def environment(self) -> dict[str, str]:
        return super().environment() | {SETTINGS: self._settings}


class World:
    """Everything that runs.

    Args:
        directory: Where the log is.
        seed: What the producers' choices begin with.
        broker: ``"rabbitmq"``, or ``"redis"``: the server that is the store as well.
        producers: How many processes call.
        rate: Calls in a second, of all together.
        keys: How many keys there are of each task.
        lease: A worker's lease, in seconds.
        redispatch_after: After how many seconds a message counts as lost.
    """

    def __init__(
        self,
        directory: Path,
        *,
        seed: int,
        broker: str,
        producers: int,
        rate: float,
        keys: int,
        lease: float,
        redispatch_after: float,
    ) -> None:
        self._stack = ExitStack()
        self.redispatch_after = redispatch_after
        # What is told is on disk before it is acknowledged, so that a killed store has lost nothing.
        self.store = self._stack.enter_context(RedisServer(aof=True))
        self._results = self._stack.enter_context(ValkeyServer())
        #: The database of the store; where that is the broker as well, the same.
        self.db = int(broker == "redis")
        self.broker: Any = self._stack.enter_context(RabbitServer()) if broker == "rabbitmq" else self.store
        self.settings: dict[str, Any] = {
            "directory": str(directory),
            "broker": self.broker.url if broker == "rabbitmq" else self.store.url(self.db),
            "backend": self._results.url(),
            "store": self.store.url(self.db),
            "keys": keys,
            "lease": lease,
            "redispatch_after": redispatch_after,
        }
        self.workers: list[WorkerProcess] = []
        self.lines: dict[WorkerProcess, TCPProxy] = {}
        for pool, concurrency in WORKERS:
            line = self._stack.enter_context(TCPProxy(self.store.port))
            through = self.settings | {"store": self.store.url(self.db).replace(str(self.store.port), str(line.port))}
            worker = WorkerProcess(
                "benchmarks.storm.tasks",
                broker=self.settings["broker"],
                pool=pool,
                concurrency=concurrency,
                queues=[RUNS, CALLBACKS],
                env={SETTINGS: json.dumps(through)},
                events=False,
            )
            worker.start_timeout = 60
            self.workers.append(worker)
            self.lines[worker] = line
            self._stack.callback(worker.close)
            self._stack.callback(self._keep_log, worker, directory)
            worker.start()
        self.producers: list[ProducerProcess] = []
        for number in range(producers):
            # Of the store nothing is said where the broker is one: so scripts push their calls' messages.
            own = self.settings | ({"store": None} if broker == "redis" else {})
            producer = ProducerProcess(f"{seed}.{number}", producers / rate, json.dumps(own))
            self.producers.append(producer)
            self._stack.callback(producer.close)

    def begin(self) -> None:
        """Let the producers call."""
        for producer in self.producers:
            producer.start()

    def replace(self, producer: ProducerProcess) -> None:
        """Start another producer in the place of one that was killed."""
        producer.generation += 1
        producer.start()

    def messages(self, queue: str) -> int:
        """Return how many messages of a queue wait for a worker."""
        if self.broker is self.store:
            with self.store.client(db=self.db) as client:
                return int(client.llen(queue))  # type: ignore[arg-type]
        with app.connection_for_write() as connection:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)

    def purge(self) -> None:
        """Lose every message of a run that waits for a worker."""
        with app.connection_for_write() as connection:
            connection.default_channel.queue_purge(RUNS)

    def is_told(self) -> bool:
        """Return whether no callback waits in the broker, nor is with a worker that may have been killed."""
        if self.messages(CALLBACKS):
            return False
        if self.broker is self.store:
            with self.store.client(db=self.db) as client:
                return not client.exists("unacked")
        return True

    def be_quiet(self) -> None:
        """Have the producers finish, and nothing broken any more."""
        for producer in self.producers:
            producer.stop(timeout=30)
        for worker in self.workers:
            if not worker.running:
                worker.start()

    def _keep_log(self, worker: WorkerProcess, directory: Path) -> None:
        shutil.copy(worker.log, directory / f"{worker.hostname}.txt")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
