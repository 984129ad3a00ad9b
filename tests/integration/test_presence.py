"""What a worker's presence knows of its leases, however many it has."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.records import Envelope, Lease
from celery_coalesce.states import RunState
from celery_coalesce.transitions.sweeping import SLICE
from celery_coalesce.worker.presence import WorkerPresence
from tests.support.app import HarnessApp
from tests.support.journal import Journal

MakeApp = Callable[..., HarnessApp]

#: More than one look of a sweep returns.
MANY = SLICE + 50


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
        presence.leased(lease)
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
