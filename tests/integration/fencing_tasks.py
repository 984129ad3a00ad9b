"""The task of the fencing recipe, with the statements and the function of docs/fencing.md themselves."""

from __future__ import annotations

import re
import sqlite3
from typing import Any

from celery import Celery

from celery_coalesce import CoalescedTask, LeaseLost
from tests.support import app as support
from tests.support.process import ROOT
from tests.support.tasks import recorded

PAGE = (ROOT / "docs" / "fencing.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the page's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


TABLE, UPDATE, INSERT = blocks("sql")
WRITE, _task, MODEL, DJANGO = blocks("python")

_defined: dict[str, Any] = {}
exec(WRITE, _defined)
write = _defined["write"]


def define(app: Celery) -> None:
    """Register the task with an app."""
    app.task(name="settle", shared=False, bind=True, base=CoalescedTask, coalesce_key="<key>")(settle)


def settle(self: CoalescedTask, key: str, path: str, statement: str, total: int, gate: str | None = None) -> None:
    """Wait at a gate, if one is named, and write a total with the run's token."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        with sqlite3.connect(path) as connection:
            try:
                write(connection, statement, 7, total, self.coalesce.token)
            except LeaseLost as error:
                journal.record("refused", total=total, error=str(error), token=self.coalesce.token)
                raise


if hasattr(support, "app"):  # in a worker
    define(support.app)
