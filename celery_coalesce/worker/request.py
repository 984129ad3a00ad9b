"""The gate: what becomes of a message of a coalesced task, before it can take a place in the pool.

The gate is asked right before the pool: ``Request.execute_using_pool`` of ``create_request_cls``
(celery.worker.request, 5.5-5.7) calls ``revoked()``, and hands the request to the pool only if that is false. It is
the one method on that way that a subclass keeps.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime, timezone
from typing import Any

from billiard.einfo import ExceptionInfo
from celery.signals import task_received
from celery.utils import uuid
from celery.utils.saferepr import saferepr
from celery.worker import state as worker_state

from .. import signals
from ..calls import HEADER, decode, encode, eta_here, follower_of, message_call, moment, without_callbacks
from ..dispatch import named_run, publish_all
from ..endings import Ending, announce_end, announce_outcome, done_once, end_run, tell_caller
from ..engine import Engine, engine_of
from ..errors import CoalesceError, QueueFull, StoreUnavailable
from ..keys import state_id
from ..policy import Policy
from ..records import Accepted, Envelope, Known, Lease, Trigger
from ..states import Answer, Disposition, Outcome, RunState
from ..stopping import stop_runs
from ..transitions import new_nonce
from ..triggering import Asking, accept, report
from . import commands  # noqa: F401 - the worker has them as soon as it has a coalesced task
from .ends import ReportingRequest
from .presence import presence_of

__all__ = ["CoalescedRequest"]

logger = logging.getLogger("celery_coalesce")

#: Seconds until a message that met a store that is away is brought to the gate again.
GATE_AGAIN = 1.0


class CoalescedRequest(ReportingRequest):
    """A message of a coalesced task, in the worker's main process."""

    #: The same question again, where the answer was lost, gets the same answer.
    _claim = ""
    #: When it was asked first, on the monotonic clock: the lease lasts from then on, however late the answer came.
    _asked_at = 0.0
    #: Celery asks whether the task is revoked, but shall not act on it yet.
    _asking = False
    #: What Celery would have announced.
    _verdict: tuple[Any, ...] | None = None
    #: Past the strategy's own question at receipt (celery.worker.strategy.default, 5.5-5.7), on the way to the pool.
    _received = False
    #: The request of the same id whose place it took when it was received.
    _before: Any = None
    #: The gate has sent the request on, or away.
    _decided = False
    #: The prefetch count that was raised while the gate keeps the message back.
    _held_from: Any = None
    _eta: Any

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self._eta = eta_here(self._eta, self._request_dict.get(HEADER))

    # -- the gate ----------------------------------------------------------------------------------------------------

    def revoked(self) -> bool:
        """Return whether the request must not go to the pool: revoked, or not admitted by its key."""
        if self._decided:
            return bool(super().revoked())
        if self._exempt():
            return self._leave_to_celery()
        if not self._received:
            # What is to be done with a revoked or expired run is for the record to say, at the gate.
            return False
        if self not in worker_state.reserved_requests or _is_stopping():
            # The connection that brought it was lost while it was held, or the pool takes no more. It is brought
            # again; if an answer was lost that gave its run a lease, the worker's own sweep has the run dispatched.
            self._release()
            return True
        if presence_of(self.app).store_away:
            # The heartbeat asks whether the store is back: the worker's event loop does not wait for it.
            self._hold(GATE_AGAIN)
            return True
        try:
            return self._admit(engine_of(self.app))
        except StoreUnavailable as error:
            self._keep(error)
        except Exception as error:
            # Whatever a message or a record holds, it must not take the worker down.
            self._fail(error)
        return True

    def _exempt(self) -> bool:
        header = self._request_dict.get(HEADER)
        return self.task.coalesce_policy is None or (isinstance(header, dict) and header.get("exempt") is True)

    def _leave_to_celery(self) -> bool:
        """Return whether a message without a run is revoked; if it claims to have a lease, nobody shall believe it."""
        self._decided = True
        self._request_dict[HEADER] = {"exempt": True}
        return bool(super().revoked())

    def _keep(self, error: StoreUnavailable) -> None:
        """Keep the message while the store is away."""
        presence_of(self.app).noticed(error)
        logger.warning(
            "Task %s[%s] waits for the state server: %s",
            self.name,
            self.id,
            error,
            extra={"action": "gate_away", "task_id": self.id},
        )
        self._hold(GATE_AGAIN)

    def _admit(self, engine: Engine) -> bool:
        if self.task.coalesce_refused is not None:
            raise self.task.coalesce_refused
        envelope = named_run(self._request_dict.get(HEADER), self.id, self._type)
        if envelope is not None:
            answer = self._start(engine, envelope)
            if answer is not Answer.UNKNOWN:
                return answer is not Answer.RUNNING
        return self._admit_as_trigger(engine)

    def _start(self, engine: Engine, envelope: Envelope) -> Answer:
        """Ask for the run's lease, and do what the answer says."""
        presence = presence_of(self.app)
        revoked = self._would_be_revoked()
        if not self._claim:
            self._claim, self._asked_at = new_nonce(), time.monotonic()
        started = engine.transitions.start(
            envelope,
            owner=presence.owner,
            claim=self._claim,
            late=bool(self.task.acks_late),
            revoked=revoked,
        )
        answer = started.answer
        if started.lease is not None:
            self._take(started.lease)
            if answer is Answer.SKIPPED:
                self._end_skipped(engine, started.done)
            elif answer is not Answer.RUNNING:
                self._end_unstarted(engine, answer)
        elif answer is Answer.STOP:
            stop_runs(self.app, started.stops)
            self._drop(answer.value)
        elif answer is Answer.EARLY:
            self._hold(started.wait / 1000)
        elif answer is Answer.CARRY:
            call = decode(self.app, started.call) if started.call else {}
            kept = without_callbacks(call)
            blob = encode(kept, kept.get("serializer") or self.task.serializer) if kept else b""
            sent = engine.transitions.carry(envelope, uuid(), blob)
            self._announce()
            self._release()
            publish_all(engine, sent)
        elif answer is not Answer.UNKNOWN:
            self._drop(answer.value)
        publish_all(engine, started.sent)
        return answer

    def _take(self, lease: Lease) -> None:
        """Make the request the run's: its lease, arguments, expiry and whether its result is wanted."""
        self._release()
        self._decided = True
        bus = self._bus()
        self._lease = lease
        presence_of(self.app).leased(lease, self)
        request = self._request_dict
        request[HEADER] = lease.as_header(hostname=self._hostname, monitored=bus.enabled, leased_at=self._asked_at)
        request["ignore_result"] = self._ignore_result = not lease.store
        if lease.expires is not None:
            request["expires"] = datetime.fromtimestamp(lease.expires / 1000, timezone.utc).isoformat()
        if lease.args:
            args, kwargs = decode(self.app, lease.args)
            _, _, embed = self._payload
            # A decoded body, as of protocol 1 (trace_task_ret, celery.app.trace, 5.5-5.7).
            self._payload: Any = (args, kwargs, embed)
            self._body = self._payload
            self._content_type = self._content_encoding = None
            self._args, self._kwargs = args, kwargs
            amqp = self.app.amqp
            self._argsrepr = saferepr(args, amqp.argsrepr_maxsize)
            self._kwargsrepr = saferepr(kwargs, amqp.kwargsrepr_maxsize)
            request.update(args=args, kwargs=kwargs, argsrepr=self._argsrepr, kwargsrepr=self._kwargsrepr)

    def _end_unstarted(self, engine: Engine, answer: Answer) -> None:
        """End a run that was revoked, or has expired, before it began."""
        lease = self._lease
        if lease is None:
            return
        expired = answer is Answer.EXPIRED
        if self._verdict is None:
            self._verdict = ("expired" if expired else "revoked", False, None, expired)
        ending = Ending(Outcome.EXPIRED if expired else Outcome.REVOKED)
        self._announce()
        bus = self._bus()
        announce_outcome(self.app, lease, ending, bus)
        self._report(lambda: end_run(engine, lease, ending, bus))

    def _end_skipped(self, engine: Engine, done: str) -> None:
        """End a run that need not begin: another has done it once and for all, and its value is this one's."""
        lease = self._lease
        if lease is None:
            return
        ending = self._tell_done(done)
        worker_state.task_ready(self)
        self.acknowledge()
        bus = self._bus()
        announce_outcome(self.app, lease, ending, bus)
        announce_end(bus, self.id, ending)
        self._report(lambda: end_run(engine, lease, ending, bus))

    def _admit_as_trigger(self, engine: Engine) -> bool:
        """Treat a message that carries no run as a call.

        It comes from ``send_task``, beat, another language, or from before the store was lost.
        """
        if self._would_be_revoked():
            return self._leave_to_celery()
        policy: Policy = self.task.coalesce_policy
        arguments = (list(self._args), dict(self._kwargs))
        key = policy.key(*arguments) if self._fits(arguments) else None
        if key is None:
            return self._leave_to_celery()
        accepted = self._accept(engine, policy, key, arguments)
        if isinstance(accepted, Accepted) and not self._is_its_own(accepted):
            self._join(policy, key, accepted)
            return True
        if accepted is None:
            self._drop(Answer.GONE.value)
            return True
        attempt = accepted.attempt if isinstance(accepted, Known) else 0
        envelope = Envelope(state_id(policy.scope, key), accepted.run, self.id, self._type, attempt, 0, 0, b"", b"")
        return self._start(engine, envelope) is not Answer.RUNNING

    @staticmethod
    def _is_its_own(accepted: Accepted) -> bool:
        """Return whether the message is that of the run that it has made: one to start, now or at a time."""
        waits = accepted.disposition is Disposition.QUEUED and accepted.delay is not None
        return accepted.disposition is Disposition.DISPATCHED or waits

    def _fits(self, arguments: tuple[Any, Any]) -> bool:
        """Return whether the body can be called; if not, its own TypeError says more than a key could."""
        try:
            self.task.coalesce_policy.parameters.bind(*arguments)
        except TypeError:
            return False
        return True

    def _accept(self, engine: Engine, policy: Policy, key: str, arguments: tuple[Any, Any]) -> Accepted | Known | None:
        call = self._call()
        serializer = self.task.serializer
        expires = self._request_dict.get("expires")
        trigger = Trigger(
            task_id=self.id,
            key=key,
            args=encode([*arguments], serializer),
            call=encode(call, serializer) if call else b"",
            follower=encode(follower_of(self._type, self.id, call, received=True), serializer),
            store=not self._ignore_result,
            times={"expires": moment(self.app, expires)} if expires else {},
            message=self.id,
            watch=signals.is_watched(signals.coalesce_trigger, self._bus()),
            needs=policy.needs(*arguments),
            labels=policy.labels_of(*arguments),
        )
        accepted = accept(engine, Asking(policy, trigger, arguments, serializer))
        if isinstance(accepted, Accepted):
            report(self._bus(), policy, trigger, accepted, arguments)
            publish_all(engine, accepted.sent)
        return accepted

    def _join(self, policy: Policy, key: str, accepted: Accepted) -> None:
        """Let go of a message whose work another run does, or will do."""
        if accepted.disposition is Disposition.REJECTED:
            self._fail(QueueFull(policy.task, key, int(accepted.run)))
            return
        if accepted.run_state is RunState.ENDED:
            self._tell_done(accepted.task_id)
        self._drop(accepted.disposition.value)

    def _call(self) -> dict[str, Any]:
        """Return what else the message's call was given."""
        return message_call({**self._request_dict, **(self._payload[2] or {})})

    def _tell_done(self, task_id: str) -> Ending:
        """Tell the message's caller that another run has done it once and for all."""
        ending = done_once(self.app, self._type, task_id)
        call = {**self._call(), "ignore_result": self._ignore_result}
        tell_caller(self.app, self._type, self.id, call, ending)
        return ending

    # -- what becomes of the message ---------------------------------------------------------------------------------

    def _would_be_revoked(self) -> bool:
        self._asking, self._verdict = True, None
        try:
            return bool(super().revoked())
        finally:
            self._asking = False

    def _announce_revoked(self, reason: str, *details: Any) -> None:
        if self._asking:
            self._verdict = (reason, *details)
            return
        super()._announce_revoked(reason, *details)

    def _announce(self) -> None:
        """Do what Celery does with a revoked task: store it, acknowledge it, tell of it."""
        self._decided = True
        verdict = self._verdict or ("revoked", False, None, False)
        self._announce_revoked(*verdict)

    def _drop(self, why: str) -> None:
        """Acknowledge a message that has nothing to do."""
        self._decided = True
        self._release()
        logger.info(
            "Task %s[%s] needs no run of its own: %s",
            self.name,
            self.id,
            why,
            extra={"action": "message_dropped", "task_id": self.id, "why": why},
        )
        worker_state.task_ready(self)
        if self._before in worker_state.active_requests:
            # Of the same id, and under way: Celery finds it by that id, to terminate it.
            worker_state.requests[self.id] = self._before
        self.acknowledge()
        # Monitors wait for the end of what they saw arrive. Both states rank below those of a run of the same id that
        # goes on, or has ended (celery.events.state). In line with the message's own events, which the dispatcher of a
        # worker buffers.
        if why == Answer.GONE:
            self.send_event("task-revoked", terminated=False, signum=None, expired=False)
        else:
            self.send_event("task-rejected", requeue=False)

    def _fail(self, error: Exception) -> None:
        """End a message that can not be admitted as Celery ends a task that raised."""
        self._decided = True
        self._release()
        lease, self._lease = self._lease, None
        try:
            raise error
        except Exception:
            info = ExceptionInfo()
        super().on_failure(info, return_ok=False)
        self.acknowledge()
        if lease is not None:
            engine, bus, ending = engine_of(self.app), self._bus(), Ending.failed(error)
            self._report(lambda: end_run(engine, lease, ending, bus))

    def _hold(self, seconds: float) -> None:
        """Keep the message, unacknowledged, and bring it to the gate again later.

        It takes no place in the prefetch count.
        """
        consumer = presence_of(self.app).consumer
        if consumer is None:
            raise CoalesceError("a message came to the gate before the worker's consumer was there")
        if self._held_from is None:
            self._held_from = consumer.qos
            self._held_from.increment_eventually()
        # The timer's entry keeps the request alive: reserved_requests holds it weakly.
        consumer.timer.call_after(seconds, consumer.on_task_request, (self,))

    def _release(self) -> None:
        # The count of the connection that brought the message, which may not be today's.
        if self._held_from is not None:
            self._held_from.decrement_eventually()
            self._held_from = None


@task_received.connect(weak=False, dispatch_uid="celery_coalesce.received")
def _note_receipt(request: Any = None, **_: Any) -> None:
    if isinstance(request, CoalescedRequest):
        request._received = True
        request._before = worker_state.requests.get(request.id)


def _is_stopping() -> bool:
    """Return whether this worker has been told to stop, at once or when its tasks have ended."""
    stop, terminate = worker_state.should_stop, worker_state.should_terminate
    return (stop is not None and stop is not False) or (terminate is not None and terminate is not False)
