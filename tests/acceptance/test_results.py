"""Results: ignored, without a backend, and over `rpc://`. Nothing but results depends on the result backend."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group

from celery_coalesce.engine import engine_of
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.rabbit import RabbitServer
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def held(app: HarnessApp, journal: Journal, name: str = "queue") -> Any:
    """Start a run that waits at the gate "a"."""
    result = app.tasks[name].delay(journal.key(), 0, gate="a")
    journal.wait("start", key="key", timeout=20)
    return result


class TestIgnoreResult:
    def test_task_that_ignores_its_results_coalesces(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """Nothing is stored; links fire and the key goes on."""
        held(app, journal, "queue_ignored")
        task = app.tasks["queue_ignored"]
        waiting = task.delay(journal.key(), 1)
        joined = task.apply_async((journal.key(), 2), link=app.tasks["collect"].s(key=journal.key("link")))
        journal.open("a")

        assert journal.wait("start", key="link", timeout=20)["args"] == [2]
        journal.wait("coalesce_drain", key="key", timeout=20)
        assert waiting.state == joined.state == "PENDING"
        with app.backend.client as client:
            assert not [key for key in client.scan_iter("celery-task-meta-*") if joined.id in str(key)]
        assert_no_overlap(journal.events())

    def test_result_is_stored_if_one_trigger_wants_it(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A run whose own call ignores its result stores it for one that joined."""
        held(app, journal)
        task = app.tasks["queue"]
        careless = task.apply_async((journal.key(), 1), ignore_result=True)
        wanting = task.delay(journal.key(), 2)
        assert careless.disposition == "queued"
        journal.open("a")

        assert wanting.get(timeout=20) == 2

    def test_result_of_a_call_that_ignores_it_is_not_stored(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """For the first run, and for a follow-up."""
        first = app.tasks["queue"].apply_async((journal.key(), 0), {"gate": "a"}, ignore_result=True)
        journal.wait("start", timeout=20)
        second = app.tasks["queue"].apply_async((journal.key(), 1), ignore_result=True)
        journal.open("a")
        journal.wait("coalesce_drain", timeout=20)

        assert [app.AsyncResult(each.id).state for each in (first, second)] == ["PENDING", "PENDING"]

    def test_call_can_want_the_result_of_a_task_that_ignores_them(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """`ignore_result=False` of one call, also where it joins."""
        task = app.tasks["queue_ignored"]
        held(app, journal, "queue_ignored")
        task.delay(journal.key(), 1)
        wanting = task.apply_async((journal.key(), 2), ignore_result=False)
        journal.open("a")

        assert wanting.get(timeout=20) == 2

    def test_joined_caller_that_ignores_its_own_result_gets_none_stored(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A follower's `ignore_result` counts for its own id."""
        held(app, journal)
        task = app.tasks["queue"]
        own = task.delay(journal.key(), 1)
        joined = task.apply_async((journal.key(), 2), task_id=f"{journal.name}-f", ignore_result=True)
        journal.open("a")

        assert own.get(timeout=20) == 2
        journal.wait("coalesce_drain", timeout=20)
        assert app.AsyncResult(joined.id).state == "PENDING"

    def test_chord_counts_members_whose_results_are_ignored(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """As in Celery, the chord still fires."""
        held(app, journal)
        task = app.tasks["queue"]
        header = [task.s(journal.key(), n).set(ignore_result=True) for n in range(2)]
        chord(header)(app.tasks["collect"].si(key=journal.key("body")))
        journal.open("a")

        journal.wait("end", key="body", timeout=20)
        assert len(journal.events("start", key="body")) == 1


@pytest.fixture(scope="class")
def bare(state_server: ValkeyServer, journal_server: ValkeyServer) -> Any:
    """An app without a result backend, and its worker."""
    from tests.acceptance.conftest import INCLUDE, with_tasks
    from tests.support.app import make_app

    with make_app(state_server.new_db(), "disabled://") as app:
        with_tasks(app)
        with WorkerProcess.serving(app, include=INCLUDE) as worker:
            yield app, worker


class TestNoBackend:
    def test_runs_coalesce_and_follow_each_other(self, bare: Any, journal: Journal) -> None:
        """Everything but results."""
        app, _ = bare
        held(app, journal)
        task = app.tasks["queue"]
        calls = [task.delay(journal.key(), n) for n in range(1, 4)]
        assert [call.coalesced for call in calls] == [False, True, True]
        journal.open("a")

        journal.wait("coalesce_drain", timeout=20)
        assert [each["args"][1] for each in journal.events("start")] == [0, 3]
        assert_no_overlap(journal.events())

    def test_links_chains_and_retries_work(self, bare: Any, journal: Journal) -> None:
        """Callbacks of runs and of followers."""
        app, _ = bare
        held(app, journal)
        task, collect = app.tasks["queue"], app.tasks["collect"]
        task.apply_async((journal.key(), 1), link=collect.s(key=journal.key("own")))
        task.apply_async((journal.key(), 2), link=collect.s(key=journal.key("link")))
        chain(task.si(journal.key(), 3), collect.s(key=journal.key("chain"))).apply_async()
        app.tasks["queue_retry"].delay(journal.key("retry"))
        journal.open("a")

        for key in ("own", "link", "chain"):
            assert journal.wait("start", key=key, timeout=20)["args"] == [3]
        journal.wait("coalesce_drain", key="retry", timeout=20)
        journal.wait("coalesce_drain", key="key", timeout=20)

    def test_failures_and_ignores_end_their_runs(self, bare: Any, journal: Journal) -> None:
        """A failing run calls its followers' errbacks."""
        app, _ = bare
        held(app, journal)
        task = app.tasks["queue"]
        task.apply_async((journal.key(),), {"error": "boom"})
        task.apply_async(
            (journal.key(),), {"error": "boom"}, link_error=app.tasks["on_error"].s(key=journal.key("error"))
        )
        app.tasks["ignoring"].delay(journal.key("ignoring"))
        journal.open("a")

        journal.wait("on_error", key="error", timeout=20)
        journal.wait("coalesce_drain", key="key", timeout=20)
        journal.wait("coalesce_drain", key="ignoring", timeout=20)

    def test_killed_child_frees_its_key(self, bare: Any, journal: Journal) -> None:
        """What can not be stored does not hold the key."""
        app, _ = bare
        app.tasks["exiting"].delay(journal.key())

        journal.wait("coalesce_drain", timeout=20)
        assert engine_of(app).transitions.show("exiting", journal.key()) is None


@pytest.fixture(scope="class")
def remote(rabbit: RabbitServer, state_server: ValkeyServer, journal_server: ValkeyServer) -> Any:
    """An app on RabbitMQ with `rpc://`, and its worker."""
    from tests.acceptance.conftest import INCLUDE, with_tasks
    from tests.support.app import make_app

    conf = {"coalesce_redis_url": state_server.new_db(), "task_default_queue": "remote"}
    with make_app(rabbit.url, "rpc://", conf) as app:
        with_tasks(app)
        with WorkerProcess.serving(app, include=INCLUDE) as worker:
            yield app, worker


class TestRpc:
    """Over `rpc://` a result goes to its caller's own queue alone: every joined caller is a follower."""

    def test_every_joined_caller_gets_its_result(self, remote: Any, journal: Journal) -> None:
        """Under an id of its own."""
        app, _ = remote
        first = held(app, journal)
        calls = [app.tasks["queue"].delay(journal.key(), n) for n in range(1, 5)]
        assert len({call.id for call in calls}) == 4
        journal.open("a")

        assert first.get(timeout=20) == 0
        assert [call.get(timeout=20) for call in calls] == [4] * 4

    def test_joined_callers_in_other_threads_get_theirs(self, remote: Any, journal: Journal) -> None:
        """Each has a reply queue of its own."""
        app, _ = remote
        held(app, journal)
        app.tasks["queue"].delay(journal.key(), 1)
        values: list[Any] = []
        called = threading.Barrier(4)

        def call() -> None:
            result = app.tasks["queue"].delay(journal.key(), 9)
            called.wait(20)
            values.append(result.get(timeout=20))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        called.wait(20)
        journal.open("a")
        for thread in threads:
            thread.join(30)
        assert values == [9, 9, 9]

    def test_skipped_callers_get_their_result(self, remote: Any, journal: Journal) -> None:
        """Single flight."""
        app, _ = remote
        first = held(app, journal, "skip")
        calls = [app.tasks["skip"].delay(journal.key(), n) for n in range(1, 4)]
        journal.open("a")

        assert [each.get(timeout=20) for each in (first, *calls)] == [0] * 4

    def test_failure_reaches_every_caller(self, remote: Any, journal: Journal) -> None:
        """The exception, too."""
        app, _ = remote
        held(app, journal)
        calls = [app.tasks["queue"].delay(journal.key(), error="boom") for _ in range(2)]
        journal.open("a")

        for call in calls:
            with pytest.raises(RuntimeError, match="boom"):
                call.get(timeout=20)

    def test_groups_resolve(self, remote: Any, journal: Journal) -> None:
        """Members of one key."""
        app, _ = remote
        held(app, journal)
        result = group(app.tasks["queue"].s(journal.key(), n) for n in range(3)).apply_async()
        journal.open("a")

        assert result.get(timeout=20) == [2, 2, 2]

    def test_chains_that_meet_on_one_key_answer(self, remote: Any, journal: Journal) -> None:
        """The last step's result reaches the caller of each chain."""
        app, _ = remote
        held(app, journal)
        multiply = app.tasks["multiply"]
        results = [chain(app.tasks["queue"].si(journal.key(), n), multiply.s(10)).apply_async() for n in (1, 2)]
        journal.open("a")

        assert [result.get(timeout=20) for result in results] == [20, 20]

    def test_retried_run_answers(self, remote: Any, journal: Journal) -> None:
        """The reply queue of the call survives a retry."""
        app, _ = remote
        result = app.tasks["queue_retry"].delay(journal.key(), value=7)

        assert result.get(timeout=20) == 7

    def test_replaced_run_answers(self, remote: Any, journal: Journal) -> None:
        """And a replacement, by the same key and by another task."""
        app, _ = remote
        assert app.tasks["replaced_by_itself"].delay(journal.key()).get(timeout=20) == 2
        assert app.tasks["replaced_by_plain"].delay(journal.key(), 5).get(timeout=20) == 5


def test_what_a_body_calls_is_its_child(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """As of any Celery task: the trail that `collect` and `get_leaf` follow."""
    result = app.tasks["calling_another"].delay(journal.key())
    child = result.get(timeout=20)
    assert [each.id for each in result.children or ()] == [child]
    assert result.get_leaf() == 1
