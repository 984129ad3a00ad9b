"""Telling everybody that a run has ended: its followers, its own callers where Celery does not, and monitors.

A follower is told before the run's slot is passed on, and crossed off only afterwards; so it may be told twice, and
never not at all.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import group, states
from celery.canvas import maybe_signature
from celery.exceptions import TaskRevokedError
from kombu.utils.encoding import safe_repr

from . import signals
from .calls import UNREADABLE, decode, request_context
from .dispatch import publish_all
from .errors import LeaseLost, PredecessorFailed, StoreError, Superseded
from .plain import PLAIN, answer
from .records import Ended, Finished
from .states import OnError, Outcome
from .views import RunMeta, pack_drain

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .records import Cleared, Lease
    from .signals import EventBus

__all__ = [
    "Ending",
    "announce_drain",
    "announce_end",
    "announce_outcome",
    "done_once",
    "end_run",
    "stop_waiting",
    "stored_ending",
    "take_back",
    "tell_caller",
    "tell_cleared",
    "tell_follower",
]

#: Why a run was taken out that a newer trigger replaces (store/lua/lib/stopping.lua).
SUPERSEDED = "superseded"

logger = logging.getLogger("celery_coalesce")


class Ending(NamedTuple):
    """How a run ended, and with what."""

    outcome: Outcome
    value: Any = None
    error: BaseException | None = None
    traceback: str | None = None

    @classmethod
    def failed(cls, error: BaseException, traceback: str | None = None) -> Ending:
        """A run that raised, or whose process died."""
        if isinstance(error, Superseded):
            return cls(Outcome.STOPPED, error=error, traceback=traceback)
        return cls(Outcome.FAILED, error=error, traceback=traceback)

    @property
    def state(self) -> str:
        """The Celery state that callers see."""
        if self.outcome in (Outcome.REVOKED, Outcome.EXPIRED) or isinstance(self.error, TaskRevokedError):
            return str(states.REVOKED)
        return str(states.FAILURE if self.error is not None else states.SUCCESS)

    @property
    def failure(self) -> bool:
        """Whether the run itself went wrong, and nobody had stopped it."""
        return self.outcome in (Outcome.FAILED, Outcome.LOST)


def end_run(
    engine: Engine,
    lease: Lease,
    ending: Ending,
    bus: EventBus,
    *,
    told: int = 0,
    stopped: tuple[Cleared, ...] | None = None,
) -> bool:
    """Tell a run's followers, end it, publish what takes its place, and announce the session's drain.

    Args:
        engine: The app's engine.
        lease: The run's lease.
        ending: How it ended.
        bus: Where its events go.
        told: How many of its followers need not be told any more.
        stopped: What its failure has taken out of the queue, if that was done when its body raised.

    Returns:
        Whether the lease still held.

    Raises:
        StoreUnavailable: The run goes on being this lease's; call again.
    """
    if stopped is None:
        stopped = stop_waiting(engine, lease, ending)
    ended = _ended(engine, lease, ending)
    watched = signals.is_watched(signals.coalesce_drain, bus)
    drain = RunMeta.of(lease) if watched or _is_watched_elsewhere(engine, lease.task, lease.scope, bus) else None
    while True:
        reply = engine.transitions.finish(lease, told=told, ended=ended, drain=drain, announced=watched)
        if reply is None:
            if drain is not None and watched:
                # The answers may have been lost that this run was ended, or that its drain was taken.
                announce_drain(engine, pack_drain(drain), bus, by=_this_process())
            return False
        if isinstance(reply, Finished):
            publish_all(engine, reply.sent)
            for run in stopped:
                tell_cleared(engine, run, bus)
            if reply.drain and watched:
                announce_drain(engine, reply.drain, bus, by=_this_process())
            return True
        for blob in reply.blobs:
            if lease.task in PLAIN:
                answer(engine, blob, ending.value, _shared_error(ending))
            else:
                tell_follower(bus, blob, ending)
            told += 1


def take_back(engine: Engine, run: RunMeta, bus: EventBus, *, followers: int = 0) -> bool:
    """Take back a run that has not begun, unless others have joined it; announce the drain, should the session end so.

    Args:
        engine: The app's engine.
        run: The run, as far as whoever made it knows; with as many triggers as are the caller's own.
        bus: Where its events go.
        followers: How many of its followers are the caller's own.

    Returns:
        Whether it was taken back.

    Raises:
        CoalesceError: The state server can not be reached, or refused.
    """
    watched = signals.is_watched(signals.coalesce_drain, bus)
    drain = watched or _is_watched_elsewhere(engine, run.name, run.scope, bus)
    undone = engine.transitions.rollback(run, followers=followers, drain=drain, announced=watched)
    publish_all(engine, undone.sent)
    if undone.drain and watched:
        announce_drain(engine, undone.drain, bus, by=_this_process())
    return undone.undone


def _is_watched_elsewhere(engine: Engine, task: str, scope: str, bus: EventBus) -> bool:
    """Return whether a worker has to announce a drain: a producer knows nothing of who listens there."""
    return bus.hostname is None and (task not in PLAIN or engine.has_task(scope))


def _ended(engine: Engine, lease: Lease, ending: Ending) -> Ended | None:
    """Return what a run's record and its task's history take from its end."""
    if lease.task in PLAIN and lease.began:
        rest = engine.longest_rest(lease.scope) if ending.outcome is not Outcome.SKIPPED else 0.0
        return Ended(None, rests=bool(rest), cooldown=rest, rest=rest)
    policy = engine.policy_of(lease.task)
    if policy is None or not lease.began:
        return None
    rests = ending.outcome is not Outcome.SKIPPED
    return Ended(
        outcome=ending.outcome,
        error=safe_repr(ending.error)[: signals.MOST_SHOWN] if ending.failure else None,
        rests=rests,
        once=policy.once if ending.outcome is Outcome.SUCCEEDED else None,
        cooldown=policy.cooldown,
        rest=engine.longest_rest(policy.scope) if rests else 0.0,
    )


def stop_waiting(engine: Engine, lease: Lease, ending: Ending) -> tuple[Cleared, ...]:
    """Take what waits behind a failed run out of the queue, if its task says so, while it still holds its slot."""
    if not (ending.failure and lease.began):
        return ()
    policy = engine.policy_of(lease.task)
    if policy is None or policy.on_error is not OnError.STOP:
        return ()
    why = f"run {lease.run} failed with {safe_repr(ending.error)[: signals.MOST_SHOWN]}"
    cleared = engine.transitions.clear(lease.scope, lease.key, lease.task, outcome=Outcome.STOPPED, why=why, by=lease)
    publish_all(engine, cleared.sent)
    return cleared.told_here


def tell_follower(bus: EventBus, blob: bytes, ending: Ending) -> None:
    """Complete one follower. What is wrong with one caller's call must not keep the key from everybody else."""
    try:
        follower = decode(bus.app, blob)
        tell_caller(bus.app, follower["task"], follower["task_id"], follower, ending)
        if follower.get("received"):
            announce_end(bus, follower["task_id"], ending)
    except Exception:
        logger.exception("A follower could not be completed", extra={"action": "follower_failed"})


def _shared_error(ending: Ending) -> BaseException | None:
    """Return what the callers get that share a run's value, if they do not get that."""
    if ending.outcome is Outcome.SUCCEEDED or isinstance(ending.error, Exception):
        return ending.error
    # Whatever stopped that caller (SystemExit, KeyboardInterrupt) is not to stop others.
    return LeaseLost(f"the caller that was to give the value has not: {ending.error or ending.outcome!r}")


def tell_caller(app: Celery, task_name: str, task_id: str, call: Mapping[str, Any], ending: Ending) -> None:
    """Complete one call as Celery's tracer would have: callbacks and chain, result, chord."""
    if task_name in PLAIN:
        # It asks the record itself, or is gone.
        return
    task = app.tasks.get(task_name)
    backend = task.backend if task is not None else app.backend
    context = request_context(task_name, task_id, call)
    ignored = call.get("ignore_result")
    if ignored is None:
        ignored = bool(task.ignore_result) if task is not None else False
        context.ignore_result = ignored
    if ending.state == states.SUCCESS:
        try:
            _call_back(app, context, ending.value)
        except Exception as error:
            # As the tracer: a callback that can not be sent fails the call that brought it.
            logger.exception(
                "The callbacks of %s could not be sent",
                task_id,
                extra={"action": "callbacks_failed", "task_id": task_id},
            )
            ending = Ending.failed(error)
        else:
            backend.mark_as_done(task_id, ending.value, request=context, store_result=not ignored)
            return
    store = not ignored or bool(task is not None and task.store_errors_even_if_ignored)
    if isinstance(ending.error, Superseded):
        backend.mark_as_failure(task_id, ending.error, request=context, store_result=store, state=states.REVOKED)
        return
    if ending.state == states.REVOKED:
        backend.mark_as_revoked(task_id, ending.outcome.value, request=context, store_result=store)
        return
    backend.mark_as_failure(task_id, ending.error, traceback=ending.traceback, request=context, store_result=store)


def tell_cleared(engine: Engine, cleared: Cleared, bus: EventBus) -> None:
    """Tell the callers of a run that was taken out of the queue, and forget it."""
    app, lease, ending = engine.app, cleared.lease, _cleared_ending(cleared)
    call: dict[str, Any] = {}
    if cleared.why:
        announce_outcome(app, lease, ending, bus)
    try:
        call = decode(app, cleared.call) if cleared.call else {}
    except UNREADABLE:
        logger.exception("The call of run %s can not be read", lease.run, extra={"action": "unreadable_call"})
    tell_caller(app, lease.task, lease.task_id, call, ending)
    if cleared.received:
        announce_end(bus, lease.task_id, ending)
    end_run(engine, lease, ending, bus)


def _cleared_ending(cleared: Cleared) -> Ending:
    lease = cleared.lease
    if lease.task in PLAIN:
        return Ending(cleared.outcome, error=LeaseLost(cleared.why or "it was cleared before its turn came"))
    if cleared.outcome is Outcome.STOPPED and cleared.why == SUPERSEDED:
        return Ending(Outcome.STOPPED, error=Superseded(lease.task, lease.key))
    if cleared.outcome is Outcome.STOPPED:
        return Ending(Outcome.STOPPED, error=PredecessorFailed(lease.task, lease.key, cleared.why))
    if cleared.outcome is Outcome.FAILED:
        return Ending.failed(StoreError(f"run {lease.run} of {lease.task} can not be published: {cleared.why}"))
    return Ending(cleared.outcome)


def _call_back(app: Celery, context: Any, value: Any) -> None:
    """Publish a call's links and the next step of its chain, as build_tracer (celery.app.trace, 5.5-5.7) does."""
    lineage = {"parent_id": context.id, "root_id": context.root_id}
    links = [maybe_signature(link, app=app) for link in context.callbacks or ()]
    for link in links:
        if isinstance(link, group):
            link.apply_async((value,), **lineage)
    plain = [link for link in links if not isinstance(link, group)]
    if len(plain) > 1:
        group(plain, app=app).apply_async((value,), **lineage)
    elif plain:
        plain[0].apply_async((value,), **lineage)
    if context.chain:
        step = maybe_signature(context.chain[-1], app=app)
        step.apply_async((value,), chain=context.chain[:-1], **lineage)


def stored_ending(app: Celery, task_name: str, task_id: str) -> Ending | None:
    """Return how a run ended by what its result says, ``None`` if it says nothing final."""
    if task_name in PLAIN:
        return None
    task = app.tasks.get(task_name)
    backend = task.backend if task is not None else app.backend
    if not getattr(backend, "persistent", False):
        return None
    try:
        meta = backend.get_task_meta(task_id)
    except Exception:
        # Without a backend that answers there is nothing to be known; the caller has an ending of its own.
        logger.debug("No stored result of %s", task_id, exc_info=True, extra={"action": "no_stored_result"})
        return None
    status, result = meta.get("status"), meta.get("result")
    if status == states.SUCCESS:
        return Ending(Outcome.SUCCEEDED, value=result)
    if status == states.FAILURE and isinstance(result, BaseException):
        return Ending.failed(result, meta.get("traceback"))
    if status == states.REVOKED:
        return Ending(Outcome.REVOKED, error=TaskRevokedError("revoked"))
    return None


def done_once(app: Celery, task_name: str, task_id: str) -> Ending:
    """Return the end of a run that need not begin, because another has done it: with that one's value.

    Args:
        app: The app.
        task_name: The task.
        task_id: The other run's task id. ``None`` is the value if its result is not stored any more.
    """
    done = stored_ending(app, task_name, task_id)
    return Ending(Outcome.SKIPPED, value=done.value if done is not None else None)


def _this_process() -> str:
    # With the run's token unique: all who report its end are processes of one machine.
    return str(os.getpid())


def announce_drain(engine: Engine, blob: bytes, bus: EventBus, *, by: str) -> None:
    """Announce a recorded drain, unless another process has.

    Args:
        engine: The app's engine.
        blob: The drain.
        bus: Where it is announced.
        by: The process that takes it.

    Raises:
        StoreUnavailable: It may have been taken; the same call again announces it.
    """
    meta = engine.transitions.take_drain(blob, by)
    if meta is not None:
        signals.emit(signals.coalesce_drain, engine.app.tasks.get(meta.name), bus, meta)


def announce_outcome(app: Celery, lease: Lease, ending: Ending, bus: EventBus) -> None:
    """Send the signal of a task's run that did not succeed."""
    if lease.task in PLAIN:
        return
    task, meta = app.tasks.get(lease.task), RunMeta.of(lease)
    if ending.failure:
        shown = {"exception": safe_repr(ending.error)[: signals.MOST_SHOWN]}
        signals.emit(signals.coalesce_error, task, bus, meta, shown=shown, exception=ending.error)
    elif ending.outcome is not Outcome.SUCCEEDED:
        shown = {"outcome": ending.outcome.value}
        signals.emit(signals.coalesce_skip, task, bus, meta, shown=shown, outcome=ending.outcome)


def announce_end(bus: EventBus, task_id: str, ending: Ending) -> None:
    """Tell monitors that a message they saw arrive has come to its end.

    Only a worker may: an event of the task group makes its sender a worker in the eyes of ``celery.events.state`` and
    Flower.
    """
    if bus.hostname is None:
        return
    if ending.state == states.SUCCESS:
        bus.send("task-succeeded", uuid=task_id, result=safe_repr(ending.value)[: signals.MOST_SHOWN], runtime=0.0)
    elif ending.state == states.REVOKED:
        expired = ending.outcome is Outcome.EXPIRED
        bus.send("task-revoked", uuid=task_id, terminated=False, signum=None, expired=expired)
    else:
        bus.send(
            "task-failed",
            uuid=task_id,
            exception=safe_repr(ending.error)[: signals.MOST_SHOWN],
            traceback=ending.traceback or "",
        )
