"""Producers that are killed: each call is made by a process of its own, forked from one that has imported everything.

Run as `python -m tests.killing.producing`, by `Producers`; what to do comes through a pipe, a line of JSON for each.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from kombu.exceptions import OperationalError

from celery_coalesce import Coalescer
from tests.support import points
from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.coalesced import journal_signals
from tests.support.journal import Journal, journal_of
from tests.support.process import Process


def fresh(app: HarnessApp, journal: Journal) -> None:
    """Call on an idle key."""
    app.tasks["queue"].delay(journal.key(), 2)


def published(app: HarnessApp, journal: Journal) -> None:
    """The same with a producer of the caller's own, which no script takes the message from."""
    with app.producer_or_acquire() as producer:
        app.tasks["queue"].apply_async((journal.key(), 2), producer=producer)


def joining(app: HarnessApp, journal: Journal) -> None:
    """Call, with callbacks and an id of its own, on a key whose run waits in the broker."""
    link = app.tasks["collect"].s(key=journal.key("link"))
    app.tasks["queue"].apply_async((journal.key(), 2), task_id=f"{journal.name}-joined", link=link)


def unpublished(app: HarnessApp, journal: Journal) -> None:
    """Call while the broker is away."""

    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("away")

    points.publish_with(away)
    try:
        app.tasks["queue"].delay(journal.key(), 2)
    except OperationalError:
        journal.record("refused")


def batch(app: HarnessApp, journal: Journal) -> None:
    """Make three calls together: two keys, one of them twice."""
    app.tasks["queue"].batch_delay([(journal.key(), 1), (journal.key("other"), 3), (journal.key(), 2)])


def delayed(app: HarnessApp, journal: Journal) -> None:
    """Call with a due time."""
    app.tasks["queue"].apply_async((journal.key(), 2), countdown=0.5)


def hold(app: HarnessApp, journal: Journal) -> None:
    """Hold a key, which is free or has a run to wait for."""
    with Coalescer(app).hold(journal.key(), scope="queue", timeout=20):
        journal.record("held", pid=os.getpid())
        journal.pass_gate("held")
    journal.record("left", pid=os.getpid())


CALLS: dict[str, Callable[[HarnessApp, Journal], None]] = {
    call.__name__: call for call in (fresh, published, joining, unpublished, batch, delayed, hold)
}


class Producers(Process):
    """The process that the others are forked from."""

    name = "producers"

    def __init__(self, app: HarnessApp) -> None:
        super().__init__()
        self._given = app.given
        self._orders = os.pipe()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.killing.producing", str(self._orders[0])]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            BROKER_VARIABLE: self._given["broker"],
            BACKEND_VARIABLE: self._given["backend"],
            CONF_VARIABLE: json.dumps(self._given["conf"]),
        }

    def inherited_fds(self) -> tuple[int, ...]:
        return (self._orders[0],)

    def order(self, call: str, journal: Journal) -> None:
        """Have a call made; the journal says "called" or "killed"."""
        os.write(self._orders[1], (json.dumps([call, journal.key()]) + "\n").encode())

    def close(self) -> None:
        super().close()
        for fd in self._orders:
            os.close(fd)


def main(orders: IO[str]) -> None:
    """Make calls, each in a process of its own."""
    from tests.support.app import app

    points.install()
    journal_signals()
    children: list[int] = []
    for line in orders:
        call, key = json.loads(line)
        pid = os.fork()
        if pid == 0:
            journal, _ = journal_of(key)
            points.produce(journal)
            CALLS[call](app, journal)
            journal.record("called")
            os._exit(0)
        children.append(pid)
        while children and os.waitpid(-1, os.WNOHANG)[0]:
            children.pop()


if __name__ == "__main__":
    main(os.fdopen(int(sys.argv[1])))
