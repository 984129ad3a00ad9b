"""`countdown` and `eta`: due when the earliest trigger asked, and no slot held meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from celery_coalesce.engine import engine_of
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.rabbit import RabbitServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def waited(journal: Journal, since: str, key: str = "key") -> float:
    """Return the seconds from an event to the first start of a key."""
    return float(journal.wait("start", key=key, timeout=20)["time"] - journal.wait(since, key=key)["time"])


def mark(journal: Journal, event: str = "called", key: str = "key") -> None:
    """Record a moment."""
    journal.record(event, key=key)


@pytest.mark.parametrize("how", ["countdown", "eta", "eta with a zone", "eta as text"])
def test_run_starts_when_it_is_due(how: str, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Not before, and soon after."""
    due = datetime.now(timezone.utc) + timedelta(seconds=1)
    options = {
        "countdown": {"countdown": 1},
        "eta": {"eta": due.replace(tzinfo=None)},
        "eta with a zone": {"eta": due.astimezone(timezone(timedelta(hours=5)))},
        "eta as text": {"eta": due.isoformat()},
    }[how]
    mark(journal)
    result = app.tasks["queue"].apply_async((journal.key(), 1), **options)

    assert result.get(timeout=20) == 1
    assert 0.8 <= waited(journal, "called") < 6


def test_due_time_in_the_past_is_now(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """As in Celery."""
    past = datetime.now(timezone.utc) - timedelta(hours=1)
    result = app.tasks["queue"].apply_async((journal.key(), 1), eta=past)

    assert result.disposition == "dispatched"
    assert result.get(timeout=20) == 1


def test_earlier_trigger_pulls_the_run_forward(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The earliest due time wins; it is one run, with the latest arguments, for both."""
    task = app.tasks["queue"]
    far = task.apply_async((journal.key(), 1), countdown=3600)
    near = task.apply_async((journal.key(), 2), countdown=0.5)
    assert (far.disposition, near.disposition) == ("queued", "coalesced")
    mark(journal)

    assert far.get(timeout=20) == near.get(timeout=20) == 2
    assert 0.3 <= waited(journal, "called") < 6
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 1


def test_trigger_without_delay_starts_a_waiting_run_at_once(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """`.delay()` after `countdown=3600` runs now, and once."""
    task = app.tasks["queue"]
    task.apply_async((journal.key(), 1), countdown=3600)
    now = task.delay(journal.key(), 2)

    assert now.get(timeout=20) == 2
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 1


def test_later_trigger_does_not_push_the_run_back(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A later due time joins the earlier run."""
    task = app.tasks["queue"]
    mark(journal)
    near = task.apply_async((journal.key(), 1), countdown=0.5)
    far = task.apply_async((journal.key(), 2), countdown=3600)

    assert near.get(timeout=20) == far.get(timeout=20) == 2
    assert waited(journal, "called") < 6


def test_waiting_for_a_due_time_holds_no_slot(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Other runs of the key go on while one waits for its time."""
    task = app.tasks["serialize"]
    later = task.apply_async((journal.key(), "later"), countdown=1)
    now = task.delay(journal.key(), "now")

    assert now.get(timeout=20) == "now"
    assert later.get(timeout=20) == "later"
    journal.wait("coalesce_drain", timeout=20)
    assert [each["args"][1] for each in journal.events("start")] == ["now", "later"]
    assert_no_overlap(journal.events())


def test_due_run_waits_for_the_one_that_runs(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A run that is due while another has the slot is its follow-up."""
    task = app.tasks["queue"]
    running = task.delay(journal.key(), 1, gate="a")
    journal.wait("start")
    due = task.apply_async((journal.key(), 2), countdown=0.3)
    journal.assert_never("start", within=1.0, task_id=due.id)
    journal.open("a")

    assert running.get(timeout=20) == 1
    assert due.get(timeout=20) == 2
    assert_no_overlap(journal.events())


def test_run_not_yet_due_is_no_follow_up(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """The end of a run does not start one that waits for its time."""
    task = app.tasks["queue"]
    task.delay(journal.key(), 1, gate="a")
    journal.wait("start")
    due = task.apply_async((journal.key(), 2), countdown=1.5)
    mark(journal)
    journal.open("a")

    assert due.get(timeout=20) == 2
    second = journal.wait("start", count=2)
    assert second["time"] - journal.wait("called")["time"] >= 1.3
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("coalesce_drain")) == 1


@pytest.fixture
def impatient(make_app: MakeApp, make_worker: MakeWorker) -> HarnessApp:
    """An app with leases of one second, and its worker: due times after 0.7 s have no message."""
    app = make_app(conf={"coalesce_lease": 1, "coalesce_redispatch_after": 60})
    make_worker(app)
    return app


def test_long_countdown_has_no_message_meanwhile(impatient: HarnessApp, journal: Journal) -> None:
    """Nothing is in the broker, nor held by a worker; a timer brings it, in time."""
    mark(journal)
    result = impatient.tasks["queue"].apply_async((journal.key(), 1), countdown=3)
    inspect = impatient.control.inspect(timeout=3)
    (held,) = inspect.scheduled().values()
    (reserved,) = inspect.reserved().values()
    assert held == reserved == []

    assert result.get(timeout=20) == 1
    assert 2.8 <= waited(journal, "called") < 8


def test_long_countdown_is_pulled_forward_and_back_within_reach(impatient: HarnessApp, journal: Journal) -> None:
    """Timers and messages give way to each other."""
    task = impatient.tasks["queue"]
    task.apply_async((journal.key(), 1), countdown=3600)
    task.apply_async((journal.key(), 2), countdown=3)
    last = task.apply_async((journal.key(), 3), countdown=2)
    mark(journal)

    assert last.get(timeout=20) == 3
    assert 1.7 <= waited(journal, "called") < 7
    journal.wait("coalesce_drain", timeout=20)
    journal.assert_never("start", within=1.5, coalesce_run_index=1)
    assert len(journal.events("start")) == 1


def test_many_due_times_of_many_keys_all_come(impatient: HarnessApp, journal: Journal) -> None:
    """Each key's run starts when it is due."""
    task = impatient.tasks["queue"]
    results = [task.apply_async((journal.key(str(n)), n), countdown=0.2 * n) for n in range(15)]

    assert [result.get(timeout=30) for result in results] == list(range(15))
    order = [each["args"][1] for each in journal.events("start")]
    assert sorted(order) == list(range(15))


def test_worker_without_the_message_takes_over_the_timer(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """The worker that was up at the time of the call need not be the one that runs it."""
    app = make_app(conf={"coalesce_lease": 1, "coalesce_redispatch_after": 2})
    first = make_worker(app)
    result = app.tasks["queue"].apply_async((journal.key(), 1), countdown=3)
    first.kill()
    make_worker(app)

    assert result.get(timeout=20) == 1
    assert len(journal.events("start")) == 1


def test_message_held_by_a_killed_worker_comes_back(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A due time within reach, whose message died with its worker, costs one redispatch."""
    app = make_app(conf={"coalesce_lease": 3, "coalesce_redispatch_after": 1})
    first = make_worker(app)
    result = app.tasks["queue"].apply_async((journal.key(), 1), countdown=1.5)
    inspect = app.control.inspect(timeout=3)
    assert any(inspect.scheduled().values())
    first.kill()
    make_worker(app)

    assert result.get(timeout=30) == 1
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 1


def test_followers_wait_with_the_run(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """Calls that join a run that is not due are completed with it."""
    task = app.tasks["queue"]
    task.apply_async((journal.key(), 1), countdown=1)
    joined = task.apply_async((journal.key(), 2), countdown=2, link=app.tasks["collect"].s(key=journal.key("link")))

    assert joined.get(timeout=20) == 2
    journal.wait("end", key="link", timeout=20)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_fractions_of_a_second_work_on_rabbitmq(
    queue_type: str,
    rabbit: RabbitServer,
    make_app: MakeApp,
    make_worker: MakeWorker,
    journal: Journal,
    state_server: object,
) -> None:
    """Native delayed delivery knows whole seconds only; due times are exact all the same."""
    url = state_server.new_db()  # type: ignore[attr-defined]
    conf = {"task_default_queue_type": queue_type, "coalesce_redis_url": url}
    if queue_type == "quorum":
        conf["task_default_exchange_type"] = "topic"
        conf["broker_transport_options"] = {"confirm_publish": True}
    app = make_app(rabbit.url, url, conf)
    make_worker(app)
    mark(journal)
    result = app.tasks["queue"].apply_async((journal.key(), 1), countdown=0.4)

    assert result.get(timeout=30) == 1
    assert waited(journal, "called") >= 0.3
    retried = app.tasks["queue_retry"].delay(journal.key("retry"), countdown=0.4, value=2)
    assert retried.get(timeout=30) == 2


def test_nothing_is_left_of_a_due_time(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """An idle key has neither record nor timer."""
    result = app.tasks["queue"].apply_async((journal.key(), 1), countdown=0.3)
    result.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert engine_of(app).transitions.show("queue", journal.key()) is None
