"""`acks_late`, redelivery, `reject_on_worker_lost` and `Reject`: one run, whatever the broker delivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from celery.exceptions import Reject

from celery_coalesce.engine import engine_of
from tests.support.app import HarnessApp, redeliver
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.rabbit import RabbitServer
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


#: Messages that a worker has are kept by the broker, and so can come twice.
KEPT = {"coalesce_broker_shortcuts": False}


def dropped(worker: WorkerProcess) -> int:
    """Return how many messages the worker has found to have nothing to do."""
    return worker.logs().count("needs no run of its own")


@pytest.mark.parametrize("name", ["queue_late", "skip_late", "serialize_late"])
def test_message_delivered_again_while_its_run_goes_on_makes_no_second_run(
    name: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A visibility timeout shorter than the run: the copies are acknowledged and do nothing."""
    app = make_app(conf={**KEPT, "broker_transport_options": {"visibility_timeout": 3}})
    worker = make_worker(app)
    result = app.tasks[name].apply_async(
        (journal.key(), 1), {"gate": "a"}, link=app.tasks["collect"].s(key=journal.key("link"))
    )
    journal.wait("start", timeout=20)
    redeliver(app)
    wait_until(lambda: dropped(worker) == 1, 20)
    journal.open("a", 2)

    assert result.get(timeout=20) == 1
    journal.wait("end", key="link", timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    journal.assert_never("start", within=0.5, retries=1)
    assert len(journal.events("start", key="key")) == 1
    assert len(journal.events("start", key="link")) == 1


def test_message_delivered_again_after_its_run_does_nothing(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """A copy that comes after the end is acknowledged, and its result is left alone."""
    app = make_app(conf=KEPT)
    worker = make_worker(app, concurrency=1)
    task = app.tasks["queue_late"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    redeliver(app)
    wait_until(lambda: worker.logs().count(f"[{first.id}] received") == 2, 20)
    journal.open("a", 2)

    assert first.get(timeout=20) == 1
    wait_until(lambda: dropped(worker) == 1, 20)
    assert first.get(timeout=5) == 1
    assert first.state == "SUCCESS"
    journal.assert_never("start", within=0.5, coalesce_run_index=1)
    assert len(journal.events("start", key="key")) == 1


def test_pending_runs_message_is_not_multiplied_by_redelivery(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Redelivery of the running run's message neither starts nor doubles the pending one."""
    app = make_app(conf=KEPT)
    worker = make_worker(app)
    task = app.tasks["queue_late"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    redeliver(app)
    wait_until(lambda: dropped(worker) >= 1, 20)
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 2
    journal.wait("coalesce_drain", timeout=20)
    assert len(journal.events("start")) == 2
    assert_no_overlap(journal.events())


@pytest.mark.parametrize("name", ["rejecting", "rejecting_late"])
def test_reject_without_requeue_fails_the_run(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The result is a failure, the errback of a joined call fires, and the key goes on."""
    task = app.tasks[name]
    task.delay(journal.key(), gate="a")
    journal.wait("start", timeout=20)
    waiting = task.delay(journal.key())
    joined = task.apply_async((journal.key(),), link_error=app.tasks["on_error"].s(key=journal.key("error")))
    journal.open("a")

    for result in (waiting, joined):
        with pytest.raises(Reject):
            result.get(timeout=20)
    assert journal.wait("on_error", timeout=20)["failed"] == joined.id
    journal.wait("coalesce_drain", key="key", timeout=20)
    assert len(journal.events("start")) == 2
    assert_no_overlap(journal.events())


def test_reject_with_requeue_runs_the_same_run_again(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A late acknowledged message that is given back is the same run, before what waits behind it."""
    task = app.tasks["rejecting_late"]
    first = task.delay(journal.key(), requeue=True, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), requeue=True, gate="a")
    journal.open("a", 3)

    assert first.get(timeout=20) == "done"
    assert second.get(timeout=20) == "done"
    journal.wait("coalesce_drain", timeout=20)
    starts = journal.events("start")
    assert [each["task_id"] for each in starts] == [first.id, first.id, second.id]
    assert starts[0]["coalesce_run_id"] == starts[1]["coalesce_run_id"]
    assert_no_overlap(journal.events())


def test_reject_with_requeue_after_an_early_acknowledgement_frees_the_key(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """There is no message left to give back (in Celery the task vanishes): the run fails, the key goes on."""
    task = app.tasks["rejecting"]
    first = task.delay(journal.key(), requeue=True, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), requeue=True)
    journal.open("a")

    assert second.get(timeout=20) == "done"
    with pytest.raises(Reject):
        first.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)


def test_failure_that_is_not_acknowledged_frees_the_key(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """`acks_on_failure_or_timeout=False`: the message is rejected, the run has failed, the key goes on."""
    task = app.tasks["not_on_failure"]
    first = task.delay(journal.key(), error="boom")

    with pytest.raises(RuntimeError, match="boom"):
        first.get(timeout=20)
    journal.wait("coalesce_drain", timeout=20)
    assert task.delay(journal.key(), 2).get(timeout=20) == 2


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("name", ["late_again", "beating_rerun"])
def test_redelivery_by_rabbitmq_is_the_same_run(
    name: str,
    queue_type: str,
    rabbit: RabbitServer,
    state_server: ValkeyServer,
    make_app: MakeApp,
    make_worker: MakeWorker,
    journal: Journal,
) -> None:
    """A killed worker's message comes back at once, before its lease has run out: one run, after it."""
    url = state_server.new_db()
    conf: dict[str, Any] = {"task_default_queue_type": queue_type, "coalesce_redis_url": url}
    app = make_app(rabbit.url, url, {**conf, "coalesce_lease": 2, "coalesce_redispatch_after": 2})
    first_worker = make_worker(app)
    kwargs = {"gate": "never"} if name == "late_again" else {}
    result = app.tasks[name].delay(journal.key(), 1, **kwargs)
    pid = journal.wait("start", timeout=20)["pid"]
    second = app.tasks[name].delay(journal.key(), 2)
    first_worker.kill()
    journal.record("gone", pid=pid)
    make_worker(app)

    assert result.get(timeout=30) == 1
    assert second.get(timeout=30) == 2
    journal.wait("coalesce_drain", timeout=20)
    assert [each["task_id"] for each in journal.events("start")] == [result.id, result.id, second.id]
    assert engine_of(app).transitions.show(name, journal.key()) is None
    assert_no_overlap(journal.events())


def test_connection_loss_lets_the_run_go_on(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
) -> None:
    """The broker's connection breaks during a late acknowledged run: one run, and its follow-up."""
    app = make_app()
    worker = make_worker(app)
    task = app.tasks["queue_late"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start", timeout=20)
    second = task.delay(journal.key(), 2)
    with state_server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: "Connection to broker lost" in worker.logs(), 20)
    journal.open("a", 3)

    journal.wait("coalesce_drain", timeout=30)
    # Read anew: the connection over which this process heard of results was broken as well.
    assert [app.backend.get_task_meta(each.id)["result"] for each in (first, second)] == [1, 2]
    assert [each["task_id"] for each in journal.events("start")] == [first.id, second.id]
    assert_no_overlap(journal.events())


def test_connection_loss_that_cancels_late_runs(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
) -> None:
    """`worker_cancel_long_running_tasks_on_connection_loss`: killed and run again, never beside itself."""
    app = make_app(
        conf={
            "worker_cancel_long_running_tasks_on_connection_loss": True,
            "coalesce_lease": 3,
            "coalesce_redispatch_after": 2,
        }
    )
    worker = make_worker(app)
    task = app.tasks["beating_late"]
    first = task.delay(journal.key(), 1)
    pid = journal.wait("beat", timeout=20) and journal.wait("start")["pid"]
    second = task.delay(journal.key(), 2)
    with state_server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)
    wait_until(lambda: "Connection to broker lost" in worker.logs(), 20)
    journal.wait("start", count=2, timeout=30)
    journal.record("noted", pid=pid)

    journal.wait("coalesce_drain", timeout=30)
    # As above.
    assert [app.backend.get_task_meta(each.id)["result"] for each in (first, second)] == [1, 2]
    assert [each["task_id"] for each in journal.events("start")] == [first.id, first.id, second.id]
    events = [each["event"] for each in journal.events() if each["event"] in ("beat", "start")]
    assert "beat" not in events[events.index("start", 1) :]
