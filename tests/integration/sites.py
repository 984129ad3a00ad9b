"""A state server of a test's own, which can go away for one side or for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.app import HarnessApp
from tests.support.process import HOST, wait_until
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

#: Seconds. Three beats.
LEASE = 2


@dataclass
class Site:
    """A state server of a test's own, and two ways to it that can be cut.

    Attributes:
        state: The server.
        ours: The way of this process.
        theirs: The way of its workers.
        app: This process' app; its broker and result backend are another server.
    """

    state: ValkeyServer
    ours: TCPProxy
    theirs: TCPProxy
    app: HarnessApp
    make_worker: Callable[..., WorkerProcess]

    def worker(self, **options: Any) -> WorkerProcess:
        """Start a worker, whose way to the state is its own."""
        conf = {"coalesce_redis_url": f"redis://{HOST}:{self.theirs.port}/0"}
        return self.make_worker(self.app, **{"concurrency": 2, "conf": conf, **options})

    def left(self) -> set[str]:
        """Return what is stored for keys."""
        with self.state.client() as client:
            names = {name.removeprefix("{coalesce}:") for name in client.scan_iter(count=1000)}
        return names - {"meta", "presence", "history", "seen"}

    def wait_idle(self, timeout: float = 20) -> None:
        """Wait until nothing is left."""
        wait_until(lambda: not self.left(), timeout, lambda: f"left: {self.left()}")

    def noted_as_unpublished(self) -> bool:
        """Tell whether a timer is as far ahead as that of a run whose publish has failed."""
        with self.state.client() as client:
            now = client.time()[0] * 1000
            return any(at > now + 45_000 for _, at in client.zrange("{coalesce}:timers", 0, -1, withscores=True))

    def timers_are_over(self, but: str = "") -> None:
        """Let every timer of the namespace be over, but for one run's."""
        with self.state.client() as client:
            timers: Any = [run for run in client.zrange("{coalesce}:timers", 0, -1) if run != but]
            if timers:
                client.zadd("{coalesce}:timers", dict.fromkeys(timers, 1), xx=True)


def queued(app: HarnessApp) -> int:
    """Return how many messages wait in a Redis broker."""
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.llen(app.conf.task_default_queue))


def unacknowledged(app: HarnessApp) -> int:
    """Return how many messages a worker of a Redis broker keeps."""
    with app.connection_for_read() as connection:
        return int(connection.default_channel.client.hlen("unacked"))
