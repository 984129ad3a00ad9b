"""Retries: the same run, the same id, the next attempt, sent only once the attempt before has ended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from celery import chain, chord
from celery.exceptions import Retry

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess

pytestmark = pytest.mark.core

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def test_retry_is_the_same_run_with_the_same_id(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Three attempts have one task id, one run and one session, and a token that grows."""
    result = app.tasks["queue_retry"].delay(journal.key(), times=2, value=42)

    assert result.get(timeout=20) == 42
    journal.wait("coalesce_drain", timeout=20)
    starts = journal.events("start")
    assert [each["retries"] for each in starts] == [0, 1, 2]
    assert {each["task_id"] for each in starts} == {result.id}
    assert {each["coalesce_run_id"] for each in starts} == {result.run_id}
    assert {each["coalesce_run_index"] for each in starts} == {0}
    assert [each["coalesce_attempt"] for each in starts] == [0, 1, 2]
    tokens = [each["coalesce_token"] for each in starts]
    assert tokens == sorted(set(tokens))
    assert len(journal.events("coalesce_drain")) == 1
    assert_no_overlap(journal.events())


def test_retry_asked_for_without_leaving_the_body_does_not_overlap(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """`throw=False`: the next attempt is sent once the body has returned, not when it was asked for."""
    app.tasks["retry_and_go_on"].delay(journal.key(), gate="a")
    journal.wait("retry_asked")
    journal.assert_never(lambda each: each["event"] == "start" and each["retries"] == 1, within=0.5)

    journal.open("a")

    journal.wait("start", retries=1, timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert [each["event"] for each in journal.events() if each["event"] in ("start", "end")] == [
        "start", "end", "start", "end",
    ]  # fmt: skip
    assert_no_overlap(journal.events())


@pytest.mark.parametrize("name", ["retry_automatically", "retry_with_backoff"])
def test_automatic_retries_are_attempts_of_one_run(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """`autoretry_for`, with backoff or without, keeps id and run."""
    result = app.tasks[name].delay(journal.key(), 1, 42)

    assert result.get(timeout=20) == 42
    journal.wait("coalesce_drain", timeout=20)
    assert [(each["task_id"], each["retries"]) for each in journal.events("start")] == [
        (result.id, 0), (result.id, 1),
    ]  # fmt: skip
    assert len(journal.events("coalesce_success")) == 1
    assert journal.events("coalesce_error") == []


def test_backoff_is_kept(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The second attempt starts no earlier than the backoff says."""
    app.tasks["retry_with_backoff"].delay(journal.key(), 1)

    second = journal.wait("start", retries=1, timeout=20)

    assert second["time"] - journal.wait("end", retries=0)["time"] >= 0.9


def test_retry_given_up_fails_the_run_and_the_key_goes_on(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """After the last retry the failure is everybody's, and the next run starts."""
    task = app.tasks["retry_with_backoff"]
    failing = task.delay(journal.key(), 9)
    journal.wait("end", retries=1, timeout=20)
    waiting = task.delay(journal.key(), 0, "next")

    with pytest.raises(RuntimeError, match="attempt 2"):
        failing.get(timeout=20)
    assert waiting.get(timeout=20) == "next"
    journal.wait("coalesce_drain", timeout=20)
    assert [each["retries"] for each in journal.events("start")] == [0, 1, 2, 0]
    assert len(journal.events("coalesce_error")) == 1
    assert_no_overlap(journal.events())


def test_waiting_for_a_retry_holds_the_key(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A trigger during the backoff becomes the follow-up of the retried run."""
    task = app.tasks["queue_retry"]
    first = task.delay(journal.key(), times=1, countdown=1, value="first")
    journal.wait("end", retries=0, timeout=20)
    second = task.delay(journal.key(), times=0, value="second")
    assert second.disposition == "queued"

    assert first.get(timeout=20) == "first"
    assert second.get(timeout=20) == "second"

    order = [(each["task_id"], each["retries"]) for each in journal.events("start")]
    assert order == [(first.id, 0), (first.id, 1), (second.id, 0)]
    assert_no_overlap(journal.events())


def test_long_backoff_outlives_no_message(make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
    """A retry further ahead than two heartbeats has no message meanwhile, and still comes in time."""
    app = make_app(conf={"coalesce_lease": 1, "coalesce_redispatch_after": 60})
    make_worker(app)
    result = app.tasks["retry_far_ahead"].delay(journal.key(), countdown=2.5, value=42)

    assert result.get(timeout=30) == 42

    end, start = journal.wait("end", retries=0), journal.wait("start", retries=1)
    assert 2.4 <= start["time"] - end["time"] < 10


def test_followers_wait_for_the_last_attempt(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A joined call with its own id is completed once, by the attempt that returns."""
    app.tasks["queue_retry"].delay(journal.key(), times=0, gate="a")
    journal.wait("start")
    task = app.tasks["queue_retry"]
    task.delay(journal.key(), times=2, value="x")
    link = app.tasks["collect"].s(key=journal.key("link"))
    joined = task.apply_async((journal.key(),), {"times": 2, "value": "y"}, link=link)
    assert joined.disposition == "coalesced"

    journal.open("a")

    assert joined.get(timeout=20) == "y"
    journal.wait("end", key="link", timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    journal.assert_never("start", within=0.3, key="link", retries=1)
    assert len(journal.events("start", key="link")) == 1
    assert len(journal.events("start", key="key")) == 4


def test_retry_may_change_its_arguments(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`self.retry(args=, kwargs=)` gives the next attempt those, and keeps the run."""
    result = app.tasks["retry_with_other_arguments"].delay(journal.key())

    assert result.get(timeout=20) == 2
    assert [each["kwargs"] for each in journal.events("start")] == [{}, {"value": 1}, {"value": 2}]
    assert len({each["coalesce_run_id"] for each in journal.events("start")}) == 1


def test_links_fire_once_after_the_last_attempt(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`link` and a chain survive a retry; the errback does not fire."""
    collect = app.tasks["collect"]
    result = chain(
        app.tasks["queue_retry"]
        .s(journal.key(), times=1, value=7)
        .set(
            link=collect.s(key=journal.key("link")),
            link_error=app.tasks["on_error"].s(key=journal.key("error")),
        ),
        collect.s(key=journal.key("chain")),
    ).apply_async()

    assert result.get(timeout=20) == 7
    journal.wait("end", key="link", timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start", key="link")) == 1
    assert len(journal.events("start", key="chain")) == 1
    assert journal.events("on_error") == []


def test_retries_in_a_chord_count_once(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Members that retry, and one that joins them, give the body one value each."""
    task = app.tasks["queue_retry"]
    header = [task.s(journal.key("a"), times=1, value=1), task.s(journal.key("b"), times=2, value=2)]

    result = chord(header)(app.tasks["collect"].s(key=journal.key("body")))

    assert sorted(result.get(timeout=20)) == [1, 2]
    journal.wait("end", key="body")
    assert len(journal.events("start", key="body")) == 1


def test_retry_raised_by_hand_ends_the_run(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`raise Retry` sends nothing (in Celery, too): the key goes on."""
    app.tasks["retry_by_hand"].delay(journal.key())

    journal.wait("coalesce_drain", timeout=20)
    app.tasks["retry_by_hand"].delay(journal.key())
    journal.wait("end", count=2, outcome=Retry.__name__, timeout=20)


def test_eager_retry_runs_inline(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`.apply()` retries in place."""
    result = app.tasks["queue_retry"].apply((journal.key(),), {"times": 2, "value": 42})

    assert result.get() == 42
    assert [each["retries"] for each in journal.events("start")] == [0, 1, 2]
