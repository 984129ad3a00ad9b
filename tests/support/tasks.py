"""The tasks of the test app: each tells the journal of its key what it does.

A task records "start" and, whatever happens short of SIGKILL, "end"; between the two it may wait
at a gate. Both events carry `key, task, task_id, run, pid, hostname, retries`, where `run` is a
number of its own for every execution of a body; "start" also `args` and `kwargs` as given, "end" an
`outcome`: "returned", or the name of the exception's class.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery, Task

from celery_coalesce import CoalescedTask
from tests.support.journal import Journal, journal_of


def define_tasks(app: Celery, base: type[Task] = Task) -> None:
    """Register the test tasks with an app, on a task class; `app.tasks["work"]` is one of them."""

    def task(name: str, body: Any, **options: Any) -> None:
        app.task(name=name, shared=False, bind=True, base=base, **options)(body)

    task("work", work)
    task("late", work, acks_late=True)
    task("rerun", work, acks_late=True, reject_on_worker_lost=True)
    task("ignored", work, ignore_result=True)
    task("retrying", retrying)
    app.task(name="collect", shared=False, bind=True)(collect)
    app.task(name="on_error", shared=False, bind=True)(on_error)


@contextmanager
def recorded(task: Task, key: str) -> Iterator[Journal]:
    """Record the start and the end of a task's body."""
    journal, short = journal_of(key)
    request = task.request
    run = {
        "key": short,
        "task": task.name,
        "task_id": request.id,
        "run": uuid.uuid4().hex[:8],
        "pid": os.getpid(),
        "hostname": request.hostname,
        "retries": request.retries,
    }
    if isinstance(task, CoalescedTask):
        run |= {f"coalesce_{name}": value for name, value in task.coalesce.meta.as_dict().items()}
    journal.record("start", **run, args=request.args, kwargs=request.kwargs)
    outcome = "returned"
    try:
        yield journal
    except BaseException as exc:
        outcome = type(exc).__name__
        raise
    finally:
        journal.record("end", **run, outcome=outcome)


def work(self: Task, key: str, value: Any = None, gate: str | None = None, error: str | None = None) -> Any:
    """Wait at a gate, if one is named; then fail with `error`, or return `value`."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        if error:
            raise RuntimeError(error)
    return value


def retrying(
    self: Task,
    key: str,
    times: int = 1,
    countdown: float = 0,
    value: Any = None,
    gate: str | None = None,
) -> Any:
    """Retry `times` times after `countdown` seconds; each attempt waits at the gate first."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        if self.request.retries < times:
            raise self.retry(countdown=countdown, max_retries=times)
    return value


def collect(self: Task, result: Any = None, *, key: str) -> Any:
    """Return what came before; for links, chains and the bodies of chords."""
    with recorded(self, key):
        return result


def on_error(self: Task, task_id: str, *, key: str) -> None:
    """Record the task id that a `link_error` callback is given."""
    journal, short = journal_of(key)
    journal.record("on_error", key=short, failed=task_id)
