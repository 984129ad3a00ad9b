"""Callers in processes of their own: run as `COUNT FUNCTION KEY OPTIONS`, by `Callers`.

All of them come to the gate "go" before the first calls, so that they call at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.journal import Journal, journal_of
from tests.support.process import Process


def call(app: HarnessApp, journal: Journal, caller: int, options: dict[str, Any]) -> None:
    """Call a task with the caller's number, and record what came of it."""
    journal.record("ready", caller=caller)
    journal.pass_gate("go")
    result = app.tasks["skip"].delay(journal.key(), caller, **options)
    told = {"caller": caller, "task_id": result.id, "disposition": result.disposition}
    journal.record("called", **told)
    try:
        value = result.get(timeout=20)
    except Exception as error:
        journal.record("got", **told, type=type(error).__qualname__, args=error.args)
    else:
        journal.record("got", **told, value=value)


def read(app: HarnessApp, journal: Journal, caller: int, options: dict[str, Any]) -> None:
    """Read through a cache: on a miss, have the value loaded from the source and keep it."""
    cache = f"cache:{journal.name}"
    value = journal.client.get(cache)
    journal.record("ready", caller=caller, missed=value is None)
    journal.pass_gate("go")
    if value is None:
        result = app.tasks["skip"].delay(journal.key(), f"loaded for {caller}", **options)
        journal.record("called", caller=caller)
        value = result.get(timeout=20)
        journal.client.set(cache, value)
    journal.record("got", caller=caller, value=value)


FUNCTIONS = {"call": call, "read": read}


class Callers(Process):
    """Callers of an app, each in a process of its own."""

    name = "callers"

    def __init__(self, app: HarnessApp, journal: Journal, count: int, function: str, **options: Any) -> None:
        super().__init__()
        self._given = app.given
        self._arguments = [str(count), function, journal.key(), json.dumps(options)]

    def command(self) -> list[str]:
        return [sys.executable, "-m", "tests.conformance.pc_callers", *self._arguments]

    def environment(self) -> dict[str, str]:
        return super().environment() | {
            BROKER_VARIABLE: self._given["broker"],
            BACKEND_VARIABLE: self._given["backend"],
            CONF_VARIABLE: json.dumps(self._given["conf"]),
        }


def main(count: int, function: str, key: str, options: dict[str, Any]) -> int:
    """Fork the callers and return how many failed."""
    from tests.support.app import app

    journal, _ = journal_of(key)
    children = []
    for caller in range(count):
        if (pid := os.fork()) == 0:
            FUNCTIONS[function](app, journal, caller, options)
            os._exit(0)
        children.append(pid)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])))
