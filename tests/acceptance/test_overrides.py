"""Tasks that override Celery's hooks without `super()`: they still work, or fail at decoration with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, Task
from celery.app.task import Task as PlainTask
from celery.worker.request import Request

from celery_coalesce import CoalescedTask
from celery_coalesce.errors import OptionError
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def hooks(journal: Journal, key: str = "key") -> list[str]:
    """Return the hooks that a key's tasks have called, in order."""
    names = ("before_start", "call", "start", "end", "on_success", "on_failure", "on_retry", "after_return")
    return [each["event"] for each in journal.events(key=key) if each["event"] in names]


SUCCEEDED = ["before_start", "call", "start", "end", "on_success", "after_return"]
FAILED = ["before_start", "call", "start", "end", "on_failure", "after_return"]


@pytest.mark.parametrize("name", ["hooks", "class_based"])
def test_hooks_are_called_as_in_celery_and_the_key_goes_on(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Every hook once, in Celery's order, for a run and its follow-up; nothing overlaps."""
    task = app.tasks[name]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    third = task.delay(journal.key(), 3)
    assert third.coalesced
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 3
    journal.wait("coalesce_drain", timeout=20)
    assert hooks(journal) == SUCCEEDED * 2
    assert_no_overlap(journal.events())


def test_hooks_of_a_failure(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`on_failure` and `after_return`, and the key goes on."""
    failing = app.tasks["hooks"].delay(journal.key(), error="boom")

    with pytest.raises(RuntimeError, match="boom"):
        failing.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert hooks(journal) == FAILED


def test_hooks_of_a_retry(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`on_retry` of the attempt; the next one is the same run."""
    result = app.tasks["hooks"].delay(journal.key(), 1, retry=True)

    assert result.get(timeout=20) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert hooks(journal) == ["before_start", "call", "start", "end", "on_retry", *SUCCEEDED]
    assert len({each["coalesce_run_id"] for each in journal.events("start")}) == 1


def test_hooks_that_raise_do_not_hold_the_key(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A broken `on_success`, `on_failure` or `after_return` is not the key's loss, nor its followers'."""
    task = app.tasks["broken_hooks"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    task.delay(journal.key(), error="boom")
    joined = task.apply_async((journal.key(),), {"error": "boom"}, task_id=f"{journal.name}-f")
    journal.open("a")

    assert first.get(timeout=20) == 1
    with pytest.raises(RuntimeError):
        joined.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)


def test_before_start_that_raises_fails_the_run(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """As in Celery; the body never began, and the key goes on."""
    task = app.tasks["broken_start"]
    for n in range(2):
        with pytest.raises(RuntimeError, match="before_start"):
            task.delay(journal.key(), n).get(timeout=20)
        journal.wait("coalesce_drain", count=n + 1, timeout=20)
    assert journal.events("start") == []


def test_subclass_has_its_own_options(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A class-based task inherits the key, and declares another mode."""
    task = app.tasks["derived"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    assert second.disposition == "skipped"
    journal.open("a")

    assert first.get(timeout=20) == second.get(timeout=20) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert hooks(journal) == SUCCEEDED


@pytest.mark.parametrize("name", ["on_django", "django_first"])
def test_mixin_with_django_task_coalesces(name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`celery.contrib.django.task.DjangoTask` beside `CoalescedTask`, in either order."""
    task = app.tasks[name]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    calls = [task.delay(journal.key(), n) for n in (2, 3)]
    assert [call.disposition for call in calls] == ["queued", "coalesced"]
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert [call.get(timeout=20) for call in calls] == [3, 3]
    assert callable(task.delay_on_commit)
    assert callable(task.apply_async_on_commit)


def test_task_cls_rebases_every_task(make_app: MakeApp, journal: Journal) -> None:
    """`Celery(task_cls=CoalescedTask)`: Celery's own tasks stay as they are."""
    with Celery("rebased", broker="memory://", task_cls=CoalescedTask, set_as_current=False) as app:

        @app.task(shared=False, coalesce_key="<key>")
        def mine(key: str) -> str:
            return key

        app.finalize()
        assert isinstance(mine._get_current_object(), CoalescedTask)
        assert app.tasks["celery.chord"].coalesce_policy is None
        assert mine("x") == "x"


def test_request_class_that_takes_the_gate_away_is_refused() -> None:
    """At decoration, with the remedy."""

    class Own(Request):
        """Not derived from the library's."""

    def declare(app: Celery) -> None:
        @app.task(shared=False, base=CoalescedTask, Request=Own)
        def refused() -> None: ...

        app.finalize()

    app = Celery("refusing", broker="memory://", set_as_current=False)
    with app, pytest.raises(OptionError, match="CoalescedRequest"):
        declare(app)


def test_task_that_is_no_coalesced_task_is_left_alone(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Plain tasks in the same app neither coalesce nor change."""
    plain: Any = app.tasks["work"]
    assert isinstance(plain, PlainTask | Task)
    results = [plain.delay(journal.key(), n) for n in range(3)]

    assert [result.get(timeout=20) for result in results] == [0, 1, 2]
    assert journal.events("coalesce_trigger") == []
