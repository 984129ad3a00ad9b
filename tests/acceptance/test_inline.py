"""`task_always_eager`, `.apply()` and a direct call: inline, and without any Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from celery.result import EagerResult

from tests.support.app import HarnessApp
from tests.support.journal import Journal

MakeApp = Callable[..., HarnessApp]
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def offline(make_app: MakeApp) -> HarnessApp:
    """An app whose broker, backend and state server do not exist."""
    return make_app(NOWHERE, "cache+memory://", {"coalesce_redis_url": NOWHERE, "broker_connection_retry": False})


@pytest.fixture
def eager(make_app: MakeApp) -> HarnessApp:
    """The same, eager."""
    conf = {"coalesce_redis_url": NOWHERE, "task_always_eager": True, "task_store_eager_result": False}
    return make_app(NOWHERE, "cache+memory://", conf)


@pytest.mark.parametrize("name", ["queue", "skip", "serialize", "reject", "merge", "queue_late"])
def test_direct_call_runs_the_body(name: str, offline: HarnessApp, journal: Journal) -> None:
    """Calling the task calls its body."""
    assert offline.tasks[name](journal.key(), 42) == 42
    assert journal.wait("end")["outcome"] == "returned"


@pytest.mark.parametrize("name", ["queue", "skip", "serialize", "reject", "merge", "queue_late"])
def test_apply_runs_inline(name: str, offline: HarnessApp, journal: Journal) -> None:
    """`.apply()` returns an EagerResult, and reports failures in it."""
    task = offline.tasks[name]
    result = task.apply((journal.key(), 42))

    assert isinstance(result, EagerResult)
    assert result.get() == 42
    failed = task.apply((journal.key(),), {"error": "boom"})
    assert failed.failed()
    with pytest.raises(RuntimeError, match="boom"):
        failed.get()


def test_eager_calls_all_run(eager: HarnessApp, journal: Journal) -> None:
    """Every call is a run of its own, in the caller."""
    task = eager.tasks["queue"]
    results: list[Any] = [task.delay(journal.key(), n) for n in range(3)]

    assert [result.get() for result in results] == [0, 1, 2]
    assert len(journal.events("start")) == 3


def test_eager_canvas(eager: HarnessApp, journal: Journal) -> None:
    """Links, chains, groups and chords."""
    task, collect, multiply = eager.tasks["queue"], eager.tasks["collect"], eager.tasks["multiply"]
    task.apply_async((journal.key(), 1), link=collect.s(key=journal.key("link")))
    assert journal.wait("start", key="link")["args"] == [1]
    assert chain(task.s(journal.key(), 2), multiply.s(5)).apply_async().get() == 10
    assert group(task.s(journal.key(), n) for n in range(3)).apply_async().get() == [0, 1, 2]
    body = collect.s(key=journal.key("body"))
    assert chord([task.s(journal.key(), n) for n in range(2)])(body).get() == [0, 1]


def test_eager_call_from_an_eager_body(eager: HarnessApp, journal: Journal) -> None:
    """A body that calls another coalesced task."""
    eager.tasks["calling"].delay(journal.key(), other=journal.key("other")).get()
    journal.wait("end", key="other")


def test_per_call_options_are_accepted_and_checked(eager: HarnessApp, journal: Journal) -> None:
    """As for a real call."""
    from celery_coalesce.errors import OptionError

    task = eager.tasks["queue"]
    assert task.apply_async((journal.key(), 1), coalesce="skip", coalesce_key="x").get() == 1
    assert task.apply_async((journal.key(), 1), coalesce_key=None).get() == 1
    with pytest.raises(OptionError):
        task.apply_async((journal.key(), 1), coalesce="sometimes")


@pytest.mark.parametrize("how", ["call", "apply", "eager"])
def test_bodys_own_view_of_its_run(how: str, eager: HarnessApp, journal: Journal) -> None:
    """`self.coalesce` is there inline: key and scope are real, `check()` passes."""
    task = eager.tasks["queue"]
    {
        "call": lambda: task(journal.key(), 1),
        "apply": lambda: task.apply((journal.key(), 1)),
        "eager": lambda: task.delay(journal.key(), 1),
    }[how]()

    start = journal.wait("start")
    assert start["coalesce_key"] == journal.key()
    assert start["coalesce_scope"] == "queue"


def test_check_passes_inline(eager: HarnessApp, journal: Journal) -> None:
    """There is no lease to lose."""
    journal.open("a")
    eager.tasks["checking"].apply((journal.key(), "a")).get()
    assert [each["held"] for each in journal.events("checked")] == [True, True]


def test_nested_direct_call_in_a_workers_body(app: HarnessApp, worker: Any, journal: Journal) -> None:
    """A coalesced body may call itself, or another coalesced task, as a function."""
    result = app.tasks["nesting"].delay(journal.key())

    assert result.get(timeout=20) == ["inner", "inner", "inner"]
    journal.wait("coalesce_drain", key="key", timeout=20)
    assert len(journal.events("coalesce_start")) == 1
