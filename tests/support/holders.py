"""Plain code in processes of its own, which can be killed or suspended: run as `FUNCTION KEY OPTIONS`, by `Holder`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from celery_coalesce import CoalesceError, Coalescer
from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.journal import Journal, journal_of
from tests.support.process import Process


def hold(app: HarnessApp, journal: Journal, key: str, scope: str, timeout: float = 30, gate: str = "held") -> None:
    """Hold a key until the gate opens, and tell whether it still does."""
    journal.record("waits", pid=os.getpid())
    with Coalescer(app).hold(journal.key(key), scope=scope, timeout=timeout) as lease:
        journal.record("held", pid=os.getpid(), token=lease.token)
        journal.pass_gate(gate, timeout=60)
        _check(journal, lease)
    journal.record("left", pid=os.getpid())


def fork(app: HarnessApp, journal: Journal, key: str, scope: str) -> None:
    """Fork while a key is held: the child leaves the block, and holds something itself."""
    coalescer = Coalescer(app)
    with coalescer.hold(journal.key(key), scope=scope) as lease:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            _check(journal, lease)
    if child == 0:
        try:
            with coalescer.hold(journal.key(key), scope=scope, timeout=0.5):
                journal.record("bad")
        except CoalesceError as error:
            journal.record("refused", error=type(error).__name__)
        with coalescer.hold(journal.key("other"), scope=scope) as own:
            threads = [thread.name for thread in threading.enumerate()]
            journal.record("forked", token=own.token, threads=sorted(threads))
        os._exit(0)


def share(app: HarnessApp, journal: Journal, key: str, timeout: float = 30, error: str | None = None) -> None:
    """Come to the gate "go", share a value that waits at the gate "fn", and tell what came of it."""
    pid = os.getpid()

    def fn() -> Any:
        journal.record("called", pid=pid)
        journal.pass_gate("fn", timeout=60)
        if error:
            raise ZeroDivisionError(error, 7)
        return {"by": pid}

    journal.record("ready", pid=pid)
    journal.pass_gate("go", timeout=60)
    journal.record("asks", pid=pid)
    try:
        value = Coalescer(app).share(journal.key(key), fn, timeout=timeout)
    except Exception as failed:
        journal.record("got", pid=pid, error=type(failed).__name__, args=failed.args)
    else:
        journal.record("got", pid=pid, value=value)


def _check(journal: Journal, lease: Any) -> None:
    try:
        lease.check()
    except CoalesceError as error:
        journal.record("checked", pid=os.getpid(), error=type(error).__name__)
    else:
        journal.record("checked", pid=os.getpid(), error=None)


FUNCTIONS: dict[str, Callable[..., None]] = {"hold": hold, "fork": fork, "share": share}


class Holder(Process):
    """A process that runs one of the functions of this module."""

    name = "holder"

    def __init__(self, app: HarnessApp, journal: Journal, function: str, key: str = "key", **options: Any) -> None:
        super().__init__()
        self._given = app.given
        self._arguments = [function, journal.key(key), json.dumps(options)]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.support.holders", *self._arguments]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            BROKER_VARIABLE: self._given["broker"],
            BACKEND_VARIABLE: self._given["backend"],
            CONF_VARIABLE: json.dumps(self._given["conf"]),
        }


def main(function: str, key: str, options: dict[str, Any]) -> None:
    """Run a function."""
    from tests.support.app import app

    journal, short = journal_of(key)
    FUNCTIONS[function](app, journal, short, **options)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
