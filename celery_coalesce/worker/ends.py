"""The parent's reports of a run's end: of those that the process which ran it can not tell.

Idempotent with the child's by the lease's token: whoever comes second is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from celery import states
from celery.exceptions import Reject, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request

from ..dispatch import dispatch_again
from ..endings import SUPERSEDED, Ending, announce_outcome, end_run, stored_ending
from ..engine import Engine, engine_of
from ..errors import StoreUnavailable, Superseded
from ..records import Lease
from ..signals import EventBus
from ..states import Outcome
from ..stopping import being_stopped
from .presence import is_alive, presence_of

__all__ = ["ReportingRequest"]

logger = logging.getLogger("celery_coalesce")

#: Seconds between two looks at a pool child that is being killed.
DEATH_AGAIN = 0.05


class ReportingRequest(Request):
    """A request that reports the end of its run where its pool process can not."""

    #: The lease that the gate got, until its end has been reported by this process.
    _lease: Lease | None = None
    #: A newer trigger replaces the run, which is being terminated for it; and its callers have been told.
    superseded = False
    _told_superseded = False
    #: The outcome has been announced: once, however often the end has to be reported.
    _outcome_told = False
    #: The pool process has returned the attempt's end, and lives on.
    _returned = False
    #: What the pool was given and has not accepted yet.
    job: Any = None
    _job_reference: Any = None

    def _bus(self) -> EventBus:
        wanted = bool(self.task.send_events) and engine_of(self.app).settings.events
        return EventBus.of_worker(self.app, self._eventer, self._hostname, wanted=wanted)

    @property
    def _apply_result(self) -> Any:
        """Celery's weak reference to what the pool was given (celery.worker.request, 5.5-5.7)."""
        return self._job_reference

    @_apply_result.setter
    def _apply_result(self, reference: Any) -> None:
        self._job_reference = reference
        # Celery forgets it when the broker's connection is lost, and nobody knows whether a child has it.
        if reference is not None and self._lease is not None and self.worker_pid is None:
            self.job = reference()

    def supersede(self, pool: Any, run: str) -> dict[str, str]:
        """Terminate the run, if this request still has it and the pool can."""
        if self._lease is None or self._lease.run != run:
            return {"error": f"run {run} has ended"}
        self.superseded = True
        being_stopped.add(run)
        try:
            self.terminate(pool)
        except NotImplementedError:
            # Its body can see that it is superseded, and that is all there is.
            self.superseded = False
            being_stopped.discard(run)
            return {"error": "this pool can not terminate a task"}
        return {"ok": f"run {run} is being stopped"}

    @property
    def store_errors(self) -> bool:
        """Whether Celery stores an error: not a second one for a run that is superseded."""
        return bool(super().store_errors) and not self._told_superseded

    def _announce_revoked(self, reason: str, *details: Any) -> None:
        if self.superseded and not self._told_superseded:
            if self.store_errors:
                error = Superseded(self._type, self._lease.key if self._lease else "")
                self.task.backend.store_result(self.id, error, states.REVOKED, request=self._context)
            self._told_superseded = True
        super()._announce_revoked(SUPERSEDED if self.superseded else reason, *details)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Note which process runs the body."""
        self.job = None
        if self._lease is not None:
            presence_of(self.app).accepted(self._lease, self._process(pid))
        try:
            super().on_accepted(pid, time_accepted)
        except NotImplementedError:
            # It was to be terminated before it began, and this pool can not: the body runs.
            self.superseded, self._terminate_on_ack = False, None
            if self._lease is not None:
                being_stopped.discard(self._lease.run)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Report the end of a run whose process can not: killed, terminated, out of time."""
        # What the process itself returned ends the attempt, not the process.
        self._returned = return_ok
        super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        if return_ok or self._lease is None:
            return
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, Reject):
            return
        self._once_dead(lambda: self._end_killed(error))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Report the end of a run that is killed for its hard time limit."""
        super().on_timeout(soft, timeout)
        if not soft and self._lease is not None:
            self._once_dead(lambda: self._end_killed(TimeLimitExceeded(timeout)))

    def reject(self, requeue: bool = False) -> None:
        """Give the message back only when the run waits for it, and its process is gone."""
        if self._lease is None:
            super().reject(requeue=requeue)
        elif requeue and not self.acknowledged:
            # Held back from Celery's other calls until the process is gone.
            self._once_dead(self._requeue)
        else:
            super().reject(requeue=requeue)
            if requeue:
                # Acknowledged early, it can not come back: for Celery this task has vanished.
                self._once_dead(lambda: self._end_killed(Reject("rejected after it was acknowledged")))

    def _requeue(self) -> None:
        lease = self._settle()
        if lease is None:
            return
        engine = engine_of(self.app)
        try:
            engine.transitions.requeue(lease)
        except StoreUnavailable:
            # The message comes back all the same, and is a duplicate until then.
            presence_of(self.app).report_later(lambda: dispatch_again(engine, lease))
        super().reject(requeue=True)

    def _end_killed(self, error: BaseException) -> None:
        """End, or give another try to, a run whose process is gone."""
        lease = self._settle()
        if lease is None:
            return
        engine = engine_of(self.app)
        bus = self._bus()
        if isinstance(error, Terminated) and self._already_cancelled and self.task.acks_late:
            # The connection was lost, and the broker gives the message back; whether before or after this, nobody
            # knows.
            self._report(lambda: dispatch_again(engine, lease))
            return
        if isinstance(error, Reject):
            ending = self._untold(error)
        elif isinstance(error, Terminated) and self._already_cancelled:
            ending = self._untold(WorkerLostError("the worker was shut down"))
        elif self.superseded:
            ending = Ending(Outcome.STOPPED, error=Superseded(lease.task, lease.key))
        elif self._already_revoked or isinstance(error, Terminated):
            ending = Ending(Outcome.REVOKED)
        else:
            # Celery 5.7 keeps a success that was stored before the process died.
            ending = stored_ending(self.app, self._type, self.id) or Ending.failed(error)
        self._report(lambda: self._end(engine, lease, ending, bus))

    def _untold(self, error: BaseException) -> Ending:
        """Store the failure of a run whose callers Celery leaves waiting.

        After a cold shutdown it has stored RETRY and sends nothing (Request.cancel, celery.worker.request, 5.5-5.7); a
        message that is to be given back after it was acknowledged just vanishes.
        """
        ending = stored_ending(self.app, self._type, self.id)
        if ending is None:
            ending = Ending.failed(error)
            store = self.store_errors
            self.task.backend.mark_as_failure(self.id, error, request=self._context, store_result=store)
        return ending

    def _end(self, engine: Engine, lease: Lease, ending: Ending, bus: EventBus) -> None:
        if not engine.transitions.check(lease):
            # A retry after a lost worker (_retry_worker_lost, celery.worker.request, 5.7) has moved the run on already.
            return
        if not self._outcome_told:
            announce_outcome(self.app, lease, ending, bus)
            self._outcome_told = True
        end_run(engine, lease, ending, bus)

    def _settle(self) -> Lease | None:
        """Return the lease, once: whatever else Celery reports of this request is its echo."""
        lease, self._lease = self._lease, None
        if lease is not None:
            being_stopped.discard(lease.run)
        return lease

    def _process(self, pid: int | None) -> int | None:
        """Return the process that runs the body: gevent and eventlet give a greenlet's id for it."""
        pool = getattr(presence_of(self.app).consumer, "pool", None)
        return os.getpid() if getattr(pool, "is_green", False) else pid

    def _once_dead(self, report: Callable[[], None]) -> None:
        """Report once the pool child that ran the body is gone.

        A hard time limit is announced before the process is killed.
        """
        pid = self._process(self.worker_pid)
        consumer = presence_of(self.app).consumer
        if self._returned or pid is None or pid == os.getpid() or not is_alive(pid) or consumer is None:
            report()
            return
        consumer.timer.call_after(DEATH_AGAIN, self._once_dead, (report,))

    def _report(self, report: Callable[[], Any]) -> None:
        try:
            report()
        except StoreUnavailable as error:
            logger.warning(
                "The end of task %s[%s] could not be reported yet: %s",
                self.name,
                self.id,
                error,
                extra={"action": "report_delayed", "task_id": self.id},
            )
            presence_of(self.app).report_later(report)
