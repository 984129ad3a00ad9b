"""The presence of a worker: what every presence does, and what only a process with a consumer and a pool can."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.signals import worker_shutdown
from celery.worker import state as worker_state

from ..dispatch import dispatch_again, publish_all
from ..engine import engine_of
from ..errors import CoalesceError, StoreUnavailable
from ..plain import PLAIN
from ..presence import WORKER_PRESENCE, ProcessPresence
from ..signals import EventBus

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

    from ..records import Lease
    from .ends import ReportingRequest

__all__ = ["Presence", "WorkerPresence", "is_alive", "presence_of"]

logger = logging.getLogger("celery_coalesce")

#: Seconds after which a dead pool process is not going to be reported by Celery any more, which takes up to ten.
DEAD_FOR = 15.0


def presence_of(app: Celery) -> WorkerPresence:
    """Return the presence of the worker that this process is, or was forked from.

    Raises:
        CoalesceError: It is no worker, or the bootstep was not installed in time.
    """
    presence: WorkerPresence | None = app.__dict__.get(WORKER_PRESENCE)
    if presence is None:
        raise CoalesceError("this worker has no presence: the app's tasks were bound after it was built")
    return presence


class Presence(bootsteps.StartStopStep):
    """Starts the presence before the consumer takes its first message.

    It ends with ``worker_shutdown``, after the pool has finished what it runs: a step would be stopped before the pool.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: WorkController, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        self._presence = WorkerPresence(worker)
        worker.app.__dict__[WORKER_PRESENCE] = self._presence
        # Before the pool forks. A store that is not there yet is waited for.
        with contextlib.suppress(StoreUnavailable):
            engine_of(worker.app).transitions.store.connect()

    def start(self, worker: WorkController) -> None:
        """Announce this process.

        Raises:
            SettingError: The state server can not be used.
        """
        self._presence.begin()
        worker_shutdown.connect(self._presence.end, weak=False, dispatch_uid=f"celery_coalesce.{self._presence.owner}")

    def terminate(self, worker: WorkController) -> None:
        """End with the process: no signal tells of a cold shutdown (WorkController.terminate, 5.5-5.7)."""
        atexit.register(self._presence.end)


class WorkerPresence(ProcessPresence):
    """One worker process, as the state server knows it.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: WorkController) -> None:
        super().__init__(worker.app, worker.hostname)
        self._worker = worker
        #: Since when a lease has been without a living process, by the monotonic clock.
        self._dead: dict[str, float] = {}
        #: Since when a lease has been known to the store alone, by its token.
        self._unknown: dict[str, float] = {}
        #: What waits for the pool to take it, by the names of the leases.
        self._waiting: dict[str, ReportingRequest] = {}
        #: Those that a child has and Celery has forgotten, by their tokens.
        self._forgotten: set[str] = set()

    @property
    def consumer(self) -> Any:
        """The worker's consumer, ``None`` before it is there."""
        return getattr(self._worker, "consumer", None)

    def bus(self) -> EventBus:
        """Return where the worker's events go."""
        dispatcher = getattr(self.consumer, "event_dispatcher", None)
        wanted = engine_of(self._app).settings.events
        return EventBus.of_worker(self._app, dispatcher, self._worker.hostname, wanted=wanted)

    def leased(self, lease: Lease, request: ReportingRequest) -> None:
        """Note a lease that hangs from this process, and what the pool is about to be given."""
        self._waiting[lease.ref] = request
        self._note(lease, None)

    def accepted(self, lease: Lease, pid: int | None) -> None:
        """Note which process runs a lease's body."""
        self._waiting.pop(lease.ref, None)
        self._note(lease, pid)

    def _goodbye(self) -> None:
        """Hand back what the pool never took and the gate has not ended."""
        self._report()
        for lease, pid in list(self._leases.values()):
            if pid is None:
                # The broker may have given its message back, but too early: another worker found the run running.
                dispatch_again(engine_of(self._app), lease)
        super()._goodbye()

    def _reconcile(self) -> None:
        known = dict(self._leases)
        held = engine_of(self._app).transitions.all_held(self.owner)
        self._compare(known, held)
        self._see_to_dropped()
        self._give_up_unknown(held)

    def _see_to_dropped(self) -> None:
        """See to what the pool had not accepted when the broker's connection was lost.

        Celery drops it, taking it to be delivered again (AsynPool.flush, celery.concurrency.asynpool, 5.5-5.7): what no
        child has will not run, and of what a child has Celery tells no more. Other pools go on with it.
        """
        for ref, request in list(self._waiting.items()):
            lease, _ = self._leases.get(ref, (None, None))
            if lease is None:
                # It was ended at the gate.
                self._waiting.pop(ref, None)
            elif request not in worker_state.reserved_requests and hasattr(request.job, "_payload"):
                child = request.job._write_to
                if child is not None:
                    self._forgotten.add(lease.token)
                    self.accepted(lease, child.pid)
                    continue
                logger.warning(
                    "Run %s of %s was dropped with the broker's connection, and is dispatched again",
                    lease.run,
                    lease.task,
                    extra={"action": "dropped_lease", "run_id": lease.run, "task_id": lease.task_id},
                )
                engine = engine_of(self._app)
                sent = engine.transitions.requeue(lease)
                # Not before: the store may be away, as the broker was. Nor later: the run may come back to this worker.
                self._waiting.pop(ref, None)
                publish_all(engine, sent or ())

    def _give_up_unknown(self, held: set[str]) -> None:
        """Have dispatched again what this process holds and knows nothing of: the answer that gave it was lost.

        The gate asks again for the message that it has, and gets the same answer; this is for one that is gone: back to
        the broker, or lost. No body has begun.
        """
        engine = engine_of(self._app)
        transitions = engine.transitions
        unknown: dict[str, float] = {}
        for ref in held - self._leases.keys():
            lease = transitions.lease_of(ref, self.owner)
            if lease is None or lease.task in PLAIN:
                continue
            # By its token: a run's next attempt has the same name.
            since = unknown[lease.token] = self._unknown.get(lease.token, time.monotonic())
            if time.monotonic() - since >= transitions.timing.lease / 1000 and ref not in self._leases:
                logger.warning(
                    "Run %s of %s was given to this worker, which has not heard of it",
                    lease.run,
                    lease.task,
                    extra={"action": "unknown_lease", "run_id": lease.run, "task_id": lease.task_id},
                )
                dispatch_again(engine, lease)
        self._unknown = unknown

    def _see_to_bodiless(self, held: dict[str, tuple[Lease, int | None]]) -> None:
        """End also those whose pool child is gone without a word.

        It died with a report that waited for the store, or when Celery had forgotten that it had one.
        """
        super()._see_to_bodiless(held)
        dead: dict[str, float] = {}
        for ref, (_, pid) in held.items():
            if pid and pid != os.getpid() and not is_alive(pid):
                dead[ref] = self._dead.get(ref, time.monotonic())
        self._dead = dead
        for ref, since in dead.items():
            if time.monotonic() - since >= DEAD_FOR:
                lease, _ = held[ref]
                self._end_dead(lease, told=lease.token not in self._forgotten, again=True)
        self._forgotten &= {lease.token for lease, _ in held.values()}


def is_alive(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
