"""What a worker's presence knows of its leases, however many it has."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from celery.exceptions import WorkerLostError
from celery.worker import state as worker_state

from celery_coalesce import StoreUnavailable
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope, Lease
from celery_coalesce.states import RunState
from celery_coalesce.transitions.sweeping import SLICE
from celery_coalesce.worker.presence import DEAD_FOR, WorkerPresence
from tests.integration.unborn import VARIABLE
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

#: More than one look of a sweep returns.
MANY = SLICE + 50


class Waiting:
    """A request that the pool has not accepted yet.

    Args:
        job: What the pool was given.
    """

    def __init__(self, job: Any = None) -> None:
        self.job = job


class Clock:
    """The monotonic clock, as the presence reads it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def app(make_app: MakeApp) -> HarnessApp:
    """An app without a worker."""
    return make_app()


@pytest.fixture
def presence(app: HarnessApp) -> WorkerPresence:
    """The presence of a worker that is not there."""
    made = WorkerPresence(cast("Any", SimpleNamespace(app=app, hostname="w")))
    engine_of(app).transitions.heartbeat(made.owner)
    return made


@pytest.fixture
def leases(app: HarnessApp, presence: WorkerPresence, journal: Journal) -> list[Lease]:
    """Its many leases, of which it knows."""
    transitions = engine_of(app).transitions
    keys = [journal.key(str(n)) for n in range(MANY)]
    found = []
    for key, result in zip(keys, app.tasks["queue"].batch_delay([(key,) for key in keys]), strict=True):
        run = Envelope(state_id("queue", key), str(result.run_id), result.id, "queue", 0, 0, 0, b"", b"")
        lease = transitions.start(run, owner=presence.owner, claim=key, late=False, revoked=False).lease
        assert lease is not None
        presence.leased(lease, cast("Any", Waiting()))
        found.append(lease)
    return found


def test_those_that_have_ended_are_forgotten(app: HarnessApp, presence: WorkerPresence, leases: list[Lease]) -> None:
    """Else a busy worker with many would remember all that it ever ran."""
    for lease in leases[:10]:
        engine_of(app).transitions.finish(lease)
    presence._reconcile()
    assert presence._leases.keys() == {lease.ref for lease in leases[10:]}


def test_one_without_a_body_is_ended(app: HarnessApp, presence: WorkerPresence, leases: list[Lease]) -> None:
    """Its body is gone, and its end could not be reported when it came."""
    presence.abandoned(leases[-1])
    presence._reconcile()
    assert engine_of(app).transitions.show("queue", leases[-1].key) is None
    assert engine_of(app).transitions.show("queue", leases[0].key) is not None


class TestDroppedByThePool:
    """The broker's connection was lost before the pool had accepted it."""

    @staticmethod
    def drop(presence: WorkerPresence, lease: Lease, job: Any) -> None:
        presence.leased(lease, cast("Any", Waiting(job)))
        presence._reconcile()

    @staticmethod
    def state(app: HarnessApp, lease: Lease) -> Any:
        view = engine_of(app).transitions.show("queue", lease.key)
        assert view is not None
        return view.runs[0]["state"]

    def test_what_no_child_has_is_dispatched_again(
        self, app: HarnessApp, presence: WorkerPresence, leases: list[Lease]
    ) -> None:
        """Nobody would run it."""
        self.drop(presence, leases[0], SimpleNamespace(_payload=b"", _write_to=None))
        assert self.state(app, leases[0]) == RunState.DISPATCHED
        assert self.state(app, leases[1]) == RunState.RUNNING

    def test_it_is_tried_again_while_the_store_is_away(
        self, app: HarnessApp, presence: WorkerPresence, leases: list[Lease], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it may be together with the broker."""
        transitions = engine_of(app).transitions

        def away(lease: Lease) -> None:
            raise StoreUnavailable("made up")

        with monkeypatch.context() as patched:
            patched.setattr(transitions, "requeue", away)
            with pytest.raises(StoreUnavailable):
                self.drop(presence, leases[0], SimpleNamespace(_payload=b"", _write_to=None))
        presence._reconcile()
        assert self.state(app, leases[0]) == RunState.DISPATCHED

    def test_what_a_child_has_is_watched(
        self, app: HarnessApp, presence: WorkerPresence, leases: list[Lease], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It goes on for as long as the child lives, and is ended when that is gone."""
        clock = Clock()
        monkeypatch.setattr("celery_coalesce.worker.presence.time", clock)
        child = SimpleNamespace(pid=os.getpid())
        self.drop(presence, leases[0], SimpleNamespace(_payload=b"", _write_to=child))
        clock.now += DEAD_FOR
        presence._reconcile()
        assert self.state(app, leases[0]) == RunState.RUNNING
        monkeypatch.setattr("celery_coalesce.worker.presence.is_alive", lambda pid: False)
        monkeypatch.setattr("celery_coalesce.worker.presence.os", SimpleNamespace(getpid=lambda: 0))
        presence._reconcile()
        clock.now += DEAD_FOR
        presence._reconcile()
        assert engine_of(app).transitions.show("queue", leases[0].key) is None
        with pytest.raises(WorkerLostError):
            app.AsyncResult(leases[0].task_id).get(timeout=5)

    @pytest.mark.parametrize("job", [None, object()], ids=["not given yet", "another pool's"])
    def test_what_still_waits_is_left(
        self, job: Any, app: HarnessApp, presence: WorkerPresence, leases: list[Lease]
    ) -> None:
        """The queue of a pool of threads outlives the connection."""
        self.drop(presence, leases[0], job)
        assert self.state(app, leases[0]) == RunState.RUNNING

    def test_what_has_its_connection_is_left(
        self, app: HarnessApp, presence: WorkerPresence, leases: list[Lease]
    ) -> None:
        """It is on its way to a child."""
        request = Waiting(SimpleNamespace(_payload=b"", _write_to=None))
        worker_state.reserved_requests.add(request)
        presence.leased(leases[0], cast("Any", request))
        presence._reconcile()
        assert self.state(app, leases[0]) == RunState.RUNNING

    def test_a_worker_s_pool_drops_it(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """Between the lease and the child's pipe: the run is dispatched again, and goes on once."""
        app = make_app(conf={"coalesce_lease": 2})
        worker = make_worker(app, include=["tests.integration.dropping"])
        result = app.tasks["queue"].delay(journal.key("dropped"), 1)
        assert result.get(timeout=30) == 1
        assert "was dropped with the broker's connection" in worker.logs()
        assert len(journal.events("start", key="dropped")) == 1


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGQUIT], ids=["warm", "cold"])
def test_what_no_child_had_taken_when_it_stopped_goes_on_elsewhere(
    stop: signal.Signals, make_app: MakeApp, make_worker: MakeWorker, journal: Journal, tmp_path: Path
) -> None:
    """Its message was acknowledged, and its body has not begun."""
    app, late = make_app(), tmp_path / "late"
    worker = make_worker(app, concurrency=1, include=["tests.integration.unborn"], env={VARIABLE: str(late)})
    queue = app.tasks["queue"]
    pid = queue.delay(journal.key("warm"), 0).get(timeout=20) or worker.child_pids()[0]
    late.touch()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: worker.child_pids() not in ([], [pid]), 20)
    result = queue.delay(journal.key(), 1)
    transitions = engine_of(app).transitions

    def leased() -> bool:
        view = transitions.show("queue", journal.key())
        return view is not None and view.runs[0]["state"] == RunState.RUNNING

    wait_until(leased, 20)
    worker.signal(stop)
    if stop == signal.SIGTERM:
        # Without a child it would wait for one.
        late.unlink()
    worker.wait(30)
    make_worker(app)
    assert result.get(timeout=20) == 1
    assert len(journal.events("start", key="key")) == 1


def test_one_that_it_has_not_heard_of_is_dispatched_again(
    app: HarnessApp, presence: WorkerPresence, leases: list[Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that gave it was lost, and with it the message: a lease later."""
    clock = Clock()
    monkeypatch.setattr("celery_coalesce.worker.presence.time", clock)
    unheard = leases[MANY // 2]
    del presence._leases[unheard.ref]
    states = []
    for _ in range(2):
        presence._reconcile()
        view = engine_of(app).transitions.show("queue", unheard.key)
        assert view is not None
        states += [run["state"] for run in view.runs]
        clock.now += engine_of(app).settings.lease
    assert states == [RunState.RUNNING, RunState.DISPATCHED]
