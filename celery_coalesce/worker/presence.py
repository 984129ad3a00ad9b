"""The presence of a worker process: one heartbeat, from which all its leases hang, and the sweep.

Threads of the main process, so that a solo worker keeps its leases while its only thread is in a body. They never
touch the broker's consumer connection.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery import bootsteps
from celery.exceptions import WorkerLostError
from celery.signals import worker_shutdown

from .. import signals
from ..calls import decode
from ..dispatch import publish_all
from ..endings import (
    Ending,
    announce_drain,
    announce_end,
    announce_outcome,
    end_run,
    stored_ending,
    tell_caller,
    tell_cleared,
)
from ..engine import engine_of
from ..errors import CoalesceError, LeaseLost, StoreUnavailable
from ..records import LostLease, RunMeta
from ..signals import EventBus
from ..states import Outcome
from ..transitions.sweeping import SLICE
from .stopping import stop_runs

if TYPE_CHECKING:
    from celery import Celery
    from celery.worker import WorkController

    from ..records import Lease

__all__ = ["Presence", "PresenceThread", "is_alive", "presence_of"]

logger = logging.getLogger("celery_coalesce")

_ATTRIBUTE = "_celery_coalesce_presence"

#: Slices of overdue things that one sweep looks at; the next beat goes on.
MOST_SLICES = 1000
#: Seconds after which a dead pool process is not going to be reported by Celery any more, which takes up to ten.
DEAD_FOR = 15.0
#: Seconds between two tries to reach a store that is away.
AWAY_AGAIN = 1.0


def presence_of(app: Celery) -> PresenceThread:
    """Return the presence of the worker that this process is, or was forked from.

    Raises:
        CoalesceError: It is no worker, or the bootstep was not installed in time.
    """
    presence: PresenceThread | None = app.__dict__.get(_ATTRIBUTE)
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
        self.thread = PresenceThread(worker)
        worker.app.__dict__[_ATTRIBUTE] = self.thread
        # Before the pool forks. A store that is not there yet is waited for.
        with contextlib.suppress(StoreUnavailable):
            engine_of(worker.app).transitions.store.connect()

    def start(self, worker: WorkController) -> None:
        """Announce this process.

        Raises:
            SettingError: The state server can not be used.
        """
        self.thread.begin()
        worker_shutdown.connect(self.thread.end, weak=False, dispatch_uid=f"celery_coalesce.{self.thread.owner}")


class PresenceThread:
    """One worker process, as the state server knows it.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: WorkController) -> None:
        self._worker = worker
        self._app = worker.app
        #: Unique for this process, on any machine and for ever. The pid is the second to last part.
        self.owner = f"{worker.hostname}/{os.getpid()}/{uuid4().hex[:8]}"
        #: The store could not be reached when it was last asked.
        self.store_away = False
        self._leases: dict[str, tuple[Lease, int | None]] = {}
        #: Since when a lease has been without a living process, by the monotonic clock.
        self._dead: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._wake_beat = threading.Event()
        self._wake_sweep = threading.Event()
        self._sweep_at = 0.0

    @property
    def consumer(self) -> Any:
        """The worker's consumer, ``None`` before it is there."""
        return getattr(self._worker, "consumer", None)

    # -- what the gate asks and tells ---------------------------------------------------------------------------------

    def noticed_away(self) -> None:
        """Note that the store could not be reached; the heartbeat notices when it is back."""
        self.store_away = True
        self._wake_beat.set()

    def leased(self, lease: Lease) -> None:
        """Note a lease that hangs from this process."""
        self._leases[lease.ref] = (lease, None)

    def accepted(self, lease: Lease, pid: int) -> None:
        """Note which process runs a lease's body."""
        self._leases[lease.ref] = (lease, pid)

    def abandoned(self, lease: Lease) -> None:
        """Note a lease whose body is gone, but whose end could not be reported."""
        self._leases[lease.ref] = (lease, 0)

    # -- the threads -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Beat once, so that the first lease finds a presence, and go on beating.

        The sweep has a thread of its own: it publishes, stores results and calls receivers, and may take longer than
        a lease.
        """
        wait = 0.0
        try:
            engine_of(self._app).transitions.heartbeat(self.owner)
        except StoreUnavailable as error:
            # As with a broker that is not there yet: the worker waits for it.
            self._log_away(error)
            self.store_away = True
            wait = AWAY_AGAIN
        for name, step in (("heartbeat", self._beat), ("sweep", self._look)):
            thread = threading.Thread(target=self._run, args=(step, wait), name=f"celery-coalesce-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self, **_: Any) -> None:
        """Stop beating, hand back what the pool never took, and say goodbye. What is still held runs out by itself."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._wake_beat.set()
        self._wake_sweep.set()
        for thread in self._threads:
            thread.join(timeout=5)
        transitions = engine_of(self._app).transitions
        try:
            for lease, pid in list(self._leases.values()):
                if pid is None:
                    # Not acknowledged: the broker gives its message back.
                    transitions.requeue(lease)
            transitions.bury(self.owner, leaving=True)
        except CoalesceError as error:
            logger.info("No goodbye: %s", error, extra={"action": "no_goodbye"})

    def _run(self, step: Callable[[], float], wait: float) -> None:
        """Take a step again and again, each after the seconds that the last one named."""
        wake = self._wake_beat if step == self._beat else self._wake_sweep
        while not self._ended.is_set():
            wake.wait(wait)
            wake.clear()
            if self._ended.is_set():
                return
            try:
                wait = step()
            except StoreUnavailable as error:
                self._log_away(error)
                wait = AWAY_AGAIN
            except Exception:
                logger.exception("The heartbeat failed", extra={"action": "heartbeat_failed"})
                wait = AWAY_AGAIN

    def _log_away(self, error: StoreUnavailable) -> None:
        logger.warning("The state server is away: %s", error, extra={"action": "store_away"})

    def _beat(self) -> float:
        """Renew the presence, and have the sweep look when something is due before the next beat."""
        transitions = engine_of(self._app).transitions
        interval = transitions.timing.heartbeat / 1000
        try:
            overdue_in = transitions.heartbeat(self.owner)
        except StoreUnavailable:
            self.store_away = True
            raise
        self.store_away = False
        self._sweep_at = time.monotonic() + (interval if overdue_in is None else min(overdue_in / 1000, interval))
        self._wake_sweep.set()
        return interval

    def _look(self) -> float:
        """Do what is overdue; return the seconds until something may be."""
        wait = self._sweep_at - time.monotonic()
        if wait > 0:
            return wait
        self._reconcile()
        self._sweep()
        transitions = engine_of(self._app).transitions
        overdue_in = transitions.heartbeat(self.owner)
        # What could not be moved on stays overdue: no busy loop over it.
        wait = AWAY_AGAIN if overdue_in == 0 else (overdue_in or transitions.timing.heartbeat) / 1000
        self._sweep_at = time.monotonic() + wait
        return wait

    def _bus(self) -> EventBus:
        dispatcher = getattr(self.consumer, "event_dispatcher", None)
        wanted = engine_of(self._app).settings.events
        return EventBus.of_worker(self._app, dispatcher, self._worker.hostname, wanted=wanted)

    # -- leases of this process without a body -------------------------------------------------------------------------

    def _reconcile(self) -> None:
        """End leases whose pool child is gone without a word: it died with a report that waited for the store."""
        known = dict(self._leases)
        if not known:
            return
        transitions = engine_of(self._app).transitions
        held = set(transitions.held(self.owner))
        if len(held) >= SLICE:
            # More than one look returns: those that are missing may be held all the same.
            return
        dead: dict[str, float] = {}
        for ref, (lease, pid) in known.items():
            if ref not in held:
                self._leases.pop(ref, None)
            elif pid is not None and pid != os.getpid() and (pid == 0 or not is_alive(pid)):
                dead[ref] = self._dead.get(ref, time.monotonic())
                if pid == 0 or time.monotonic() - dead[ref] >= DEAD_FOR:
                    self._end_dead(lease, told=pid != 0)
        self._dead = dead

    def _end_dead(self, lease: Lease, *, told: bool) -> None:
        """End, or have run again, what no process of this worker runs any more.

        Args:
            lease: The lease.
            told: Whether Celery tells the run's own caller.
        """
        engine = engine_of(self._app)
        task = self._app.tasks.get(lease.task)
        logger.warning(
            "Run %s of %s was held by a process that is gone",
            lease.run,
            lease.task,
            extra={"action": "dead_child", "run_id": lease.run, "task_id": lease.task_id},
        )
        ending = stored_ending(self._app, lease.task, lease.task_id)
        if ending is None and told and task is not None and task.acks_late:
            publish_all(engine, engine.transitions.requeue(lease) or ())
            return
        if ending is None:
            ending = Ending.failed(WorkerLostError("the pool process was lost"))
            if not told:
                tell_caller(self._app, lease.task, lease.task_id, {}, ending)
            announce_outcome(self._app, lease, ending, self._bus())
        end_run(engine, lease, ending, self._bus())

    # -- the sweep ---------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Move on whatever dead processes, messages and clocks have left."""
        transitions = engine_of(self._app).transitions
        for _ in range(MOST_SLICES):
            overdue = transitions.overdue()
            if not overdue or self._ended.is_set():
                return
            moved = False
            for process in overdue.processes:
                if process == self.owner:
                    # Late, but here: renewed before anybody else comes to it.
                    transitions.heartbeat(self.owner)
                    continue
                for ref in transitions.held(process):
                    moved = self._each(self._lose, ref, process) or moved
                transitions.bury(process)
            for ref in overdue.refs:
                moved = self._each(self._wake, ref) or moved
            for blob in overdue.drains:
                announce_drain(engine_of(self._app), blob, self._bus())
            if not moved:
                return

    def _each(self, move: Callable[..., bool], *what: str) -> bool:
        """Move one thing on; whatever is wrong with it must not keep the others."""
        try:
            return move(*what)
        except StoreUnavailable:
            raise
        except Exception:
            logger.exception("%s could not be moved on", what[0], extra={"action": "sweep_failed", "ref": what[0]})
            return False

    def _lose(self, ref: str, process: str) -> bool:
        lost = engine_of(self._app).transitions.lose(ref, process, self.owner)
        if lost is None:
            return False
        if not lost.sent:
            # This process's now: if it can not be ended here and at once, the next beats try again.
            self.abandoned(lost.lease)
        self._lost(lost)
        return True

    def _wake(self, ref: str) -> bool:
        engine = engine_of(self._app)
        woken = engine.transitions.wake(ref)
        publish_all(engine, woken.sent)
        if woken.reason in ("lost", "unpublished"):
            logger.warning(
                "Run %s was published again: its message was %s",
                ref.split("/")[1],
                woken.reason,
                extra={"action": "redispatched", "reason": woken.reason, "run_id": ref.split("/")[1]},
            )
        stop_runs(self._app, woken.stops)
        if woken.cleared is not None:
            tell_cleared(engine, woken.cleared, self._bus())
        return bool(woken.sent) or woken.cleared is not None

    def _lost(self, lost: LostLease) -> None:
        """Tell of a run whose worker is dead, and end it where Celery would not run it again."""
        lease, app = lost.lease, self._app
        task = app.tasks.get(lease.task)
        bus = self._bus()
        logger.warning(
            "Run %s of %s lost its worker",
            lease.run,
            lease.task,
            extra={
                "action": "run_lost",
                "run_id": lease.run,
                "task_id": lease.task_id,
                "again": bool(lost.sent),
            },
        )
        meta = RunMeta.of(lease)
        signals.emit(signals.coalesce_lost, task, bus, meta, shown={"again": bool(lost.sent)}, again=bool(lost.sent))
        if lost.sent:
            publish_all(engine_of(app), lost.sent)
            return
        ending = stored_ending(app, lease.task, lease.task_id)
        if ending is None:
            error = LeaseLost(f"the worker of run {lease.run} of {lease.task} was not heard of in time")
            ending = Ending.failed(error)
            tell_caller(app, lease.task, lease.task_id, decode(app, lost.call) if lost.call else {}, ending)
            announce_outcome(app, lease, ending, bus)
        elif ending.outcome is Outcome.REVOKED:
            announce_outcome(app, lease, ending, bus)
        announce_end(bus, lease.task_id, ending)
        end_run(engine_of(app), lease, ending, bus)


def is_alive(pid: int) -> bool:
    """Return whether a process exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
