"""The presence of a process: one heartbeat, from which all its leases hang, and the sweep.

Both are threads: a busy body, or a view, does not keep them. They never touch a worker's consumer connection. A worker
has a presence as long as it lives (:mod:`celery_coalesce.worker.presence`), any other process while it holds a key or
waits for one (:mod:`celery_coalesce.plain_presence`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from celery.exceptions import WorkerLostError

from . import signals
from .calls import decode
from .dispatch import dispatch_again, publish_all
from .endings import (
    Ending,
    announce_drain,
    announce_end,
    announce_outcome,
    end_run,
    stored_ending,
    tell_caller,
    tell_cleared,
)
from .engine import engine_of
from .errors import CoalesceError, LeaseLost, NewerRecord, StoreUnavailable
from .plain import PLAIN
from .records import LostLease
from .states import Outcome
from .stopping import stop_runs
from .views import RunMeta

if TYPE_CHECKING:
    from celery import Celery

    from .records import Lease
    from .signals import EventBus

__all__ = ["WORKER_PRESENCE", "ProcessPresence"]

logger = logging.getLogger("celery_coalesce")

#: Slices of overdue things that one sweep looks at; the next beat goes on.
MOST_SLICES = 1000
#: Seconds between two tries to reach a store that is away.
AWAY_AGAIN = 1.0
#: Seconds that a process which leaves waits for its own threads.
JOIN_FOR = 5.0

#: Where an app keeps the presence of its worker.
WORKER_PRESENCE = "_celery_coalesce_presence"


class ProcessPresence:
    """One process, as the state server knows it.

    Args:
        app: The app.
        name: What the process is known by, besides its pid.
    """

    def __init__(self, app: Celery, name: str) -> None:
        self._app = app
        self._pid = os.getpid()
        #: Unique for this process, on any machine and for ever. The pid is the second to last part.
        self.owner = f"{name}/{self._pid}/{uuid4().hex[:8]}"
        #: The store could not be reached when it was last asked.
        self.store_away = False
        #: Leases by their names, with the process that runs the body: ``None`` before there is one, 0 if none will.
        self._leases: dict[str, tuple[Lease, int | None]] = {}
        self._leases_guard = threading.Lock()
        self._unreported: deque[Callable[[], Any]] = deque()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._wake_beat = threading.Event()
        self._wake_sweep = threading.Event()
        self._sweep_at = 0.0

    @property
    def is_here(self) -> bool:
        """Whether it is this very process, and beats."""
        return bool(self._threads) and not self._ended.is_set() and self._pid == os.getpid()

    def bus(self) -> EventBus:
        """Return where the events of this process go."""
        return engine_of(self._app).producer_bus

    # -- what is told to it ------------------------------------------------------------------------------------------

    def enter(self) -> None:
        """Note that code of this process waits for a lease, or holds one."""

    def leave(self) -> None:
        """Note that it does no more."""

    def noticed(self, error: StoreUnavailable) -> None:
        """Note that the store could not be reached; the heartbeat notices when it is back."""
        if not isinstance(error, NewerRecord):
            self.store_away = True
            self._wake_beat.set()

    def abandoned(self, lease: Lease) -> None:
        """Note a lease whose body is gone, but whose end could not be reported."""
        self._note(lease, 0)

    def _note(self, lease: Lease, pid: int | None) -> None:
        with self._leases_guard:
            self._leases[lease.ref] = (lease, pid)

    def report_later(self, report: Callable[[], Any]) -> None:
        """Have an end reported by the presence's own thread, as soon as the store is back."""
        self._unreported.append(report)
        self._wake_sweep.set()

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
            # As with a broker that is not there yet: it is waited for.
            self._log_away(error)
            self.store_away = True
            wait = AWAY_AGAIN
        for name, step in (("heartbeat", self._beat), ("sweep", self._look)):
            thread = threading.Thread(target=self._run, args=(step, wait), name=f"celery-coalesce-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self, **_: Any) -> None:
        """Stop beating, and say goodbye. What is still held runs out by itself."""
        if self._ended.is_set() or self._pid != os.getpid():
            return
        self._ended.set()
        self._wake_beat.set()
        self._wake_sweep.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=JOIN_FOR)
        try:
            self._goodbye()
        except CoalesceError as error:
            logger.info("No goodbye: %s", error, extra={"action": "no_goodbye"})

    def _goodbye(self) -> None:
        self._report()
        engine_of(self._app).transitions.bury(self.owner, leaving=True)

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
        self._report()
        wait = self._sweep_at - time.monotonic()
        if wait > 0:
            return min(wait, AWAY_AGAIN) if self._unreported else wait
        self._sweep()
        self._reconcile()
        transitions = engine_of(self._app).transitions
        overdue_in = transitions.heartbeat(self.owner)
        # What could not be moved on stays overdue: no busy loop over it.
        wait = AWAY_AGAIN if overdue_in == 0 else (overdue_in or transitions.timing.heartbeat) / 1000
        self._sweep_at = time.monotonic() + wait
        return wait

    # -- leases of this process without a body -------------------------------------------------------------------------

    def _report(self) -> None:
        """Report the ends that could not be reported when they came.

        Raises:
            StoreUnavailable: Nor can they now.
        """
        for _ in range(len(self._unreported)):
            report = self._unreported[0]
            try:
                report()
            except CoalesceError as error:
                if isinstance(error, StoreUnavailable) and not isinstance(error, NewerRecord):
                    raise
                # Behind the others: what the store refuses of one must not keep them.
                logger.warning("The end of a run was refused: %s", error, extra={"action": "report_refused"})
                self._unreported.rotate(-1)
                continue
            except Exception:
                logger.exception("A delayed report failed", extra={"action": "report_failed"})
            self._unreported.popleft()

    def _reconcile(self) -> None:
        """Compare the leases that this process knows with those that hang from it."""
        if known := dict(self._leases):
            self._compare(known, engine_of(self._app).transitions.all_held(self.owner))

    def _compare(self, known: dict[str, tuple[Lease, int | None]], held: set[str]) -> None:
        """Forget leases that have ended, and end those that no body has any more, and whose end nobody has reported.

        Args:
            known: What was known before it was asked what is held.
            held: What hangs from this process.
        """
        for ref, each in known.items():
            with self._leases_guard:
                # The next attempt of a run has the same name, and may have come meanwhile.
                if ref not in held and self._leases.get(ref) is each:
                    del self._leases[ref]
        self._see_to_bodiless({ref: each for ref, each in known.items() if ref in held})

    def _see_to_bodiless(self, held: dict[str, tuple[Lease, int | None]]) -> None:
        """End leases that no body has."""
        for lease, pid in held.values():
            if pid == 0:
                self._end_dead(lease, told=False, again=False)

    def _end_dead(self, lease: Lease, *, told: bool, again: bool) -> None:
        """End, or have run again, what no process of this worker runs any more.

        Args:
            lease: The lease.
            told: Whether Celery tells the run's own caller.
            again: Whether it runs again if its task is acknowledged late.
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
        if ending is None and again and task is not None and task.acks_late:
            dispatch_again(engine, lease)
            return
        if ending is None:
            lost = LeaseLost if lease.task in PLAIN else WorkerLostError
            ending = Ending.failed(lost("the process that ran it was lost"))
            if not told:
                tell_caller(self._app, lease.task, lease.task_id, {}, ending)
            announce_outcome(self._app, lease, ending, self.bus())
        end_run(engine, lease, ending, self.bus())

    # -- the sweep ---------------------------------------------------------------------------------------------------

    def _sees_to(self, what: str) -> bool:
        """Return whether this process is the one that moves on something overdue."""
        return True

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
                elif self._sees_to(process):
                    for ref in transitions.held(process):
                        moved = self._each(self._lose, ref, process) or moved
                    transitions.bury(process)
            for ref in overdue.refs:
                if self._sees_to(ref):
                    moved = self._each(self._wake, ref) or moved
            self._announce(overdue.drains)
            if not moved:
                return

    def _announce(self, drains: tuple[bytes, ...]) -> None:
        for blob in drains:
            announce = partial(announce_drain, engine_of(self._app), blob, self.bus(), by=self.owner)
            try:
                announce()
            except StoreUnavailable:
                self.report_later(announce)
                raise

    def _each(self, move: Callable[..., bool], *what: str) -> bool:
        """Move one thing on; whatever is wrong with it must not keep the others."""
        try:
            return move(*what)
        except NewerRecord as error:
            logger.info("%s is left to others: %s", what[0], error, extra={"action": "newer_record", "ref": what[0]})
            return False
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
            tell_cleared(engine, woken.cleared, self.bus())
        return bool(woken.sent) or woken.cleared is not None

    def _lost(self, lost: LostLease) -> None:
        """Tell of a run whose process is dead, and end it where Celery would not run it again."""
        lease, app = lost.lease, self._app
        task = app.tasks.get(lease.task)
        bus = self.bus()
        logger.warning(
            "Run %s of %s lost its process",
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
            error = LeaseLost(f"the process of run {lease.run} of {lease.task} was not heard of in time")
            ending = Ending.failed(error)
            tell_caller(app, lease.task, lease.task_id, decode(app, lost.call) if lost.call else {}, ending)
            announce_outcome(app, lease, ending, bus)
        elif ending.outcome is Outcome.REVOKED:
            announce_outcome(app, lease, ending, bus)
        if lease.task not in PLAIN:
            announce_end(bus, lease.task_id, ending)
        end_run(engine_of(app), lease, ending, bus)
