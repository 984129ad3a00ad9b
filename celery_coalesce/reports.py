"""The child's reports: that a run starts, how it ends, and what continues it.

Built on Celery's task signals, which fire in the process that runs the body. What they can not see, because that
process is gone, the parent reports (:mod:`celery_coalesce.worker.request`).
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import Ignore, Reject, Retry
from kombu.utils.encoding import safe_repr

from . import replacements, signals
from .calls import HEADER, TIMES, captured, encode, moment
from .context import ATTRIBUTE, NextAttempt, Run
from .dispatch import publish_all
from .endings import Ending, announce_end, announce_outcome, end_run, stop_waiting
from .engine import Engine, engine_of
from .errors import StoreUnavailable, Superseded
from .progress import PROGRESS
from .records import Lease
from .signals import MOST_SHOWN, EventBus
from .states import Outcome
from .stopping import being_stopped

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["continue_run", "on_failure", "on_postrun", "on_prerun", "on_success"]

logger = logging.getLogger("celery_coalesce")

#: Seconds between two tries to report to a store that is away.
REPORT_AGAIN = 1.0

#: Named by Celery's tracer (celery.app.trace, 5.5-5.7), but in no public set.
IGNORED, REJECTED = states.IGNORED, states.REJECTED

#: How a run ends without having succeeded or failed.
UNANNOUNCED = (Outcome.SKIPPED, Outcome.REVOKED)


def _run_of(task: Any) -> Run | None:
    run = task.request.__dict__.get(ATTRIBUTE)
    return run if isinstance(run, Run) else None


def on_prerun(sender: Any, task: Any, **_: Any) -> None:
    """Give the request its run, and announce the start."""
    request = task.request
    header = request.__dict__.get(HEADER)
    lease = Lease.from_header(header) if isinstance(header, dict) else None
    if lease is None or request.is_eager:
        return
    app = task.app
    bus = EventBus(app, lease.monitored, lease.hostname)
    run = Run(task, request, bus, lease, engine_of(app).transitions)
    run.failing = partial(_stop_waiting, app, run)
    request.__dict__[ATTRIBUTE] = run
    if run.begin() and signals.is_watched(signals.coalesce_start, bus):
        signals.emit(signals.coalesce_start, task, bus, run.meta)


def _stop_waiting(app: Celery, run: Run, error: Exception) -> None:
    """Take out what was waiting, if the task's failures do that, before whoever hears of this one can call again."""
    try:
        run.stopped = stop_waiting(engine_of(app), run.lease, Ending.failed(error))
    except StoreUnavailable:
        logger.info("What waits behind run %s is stopped at its end", run.lease.run, extra={"action": "stop_delayed"})


def on_success(sender: Any, result: Any = None, **_: Any) -> None:
    """Announce a success, and before it that all steps are done."""
    run = _run_of(sender)
    if run is not None and not (run.lost or run.skipped) and run.next_attempt is None:
        run.complete_steps()
        if signals.is_watched(signals.coalesce_success, run.bus):
            signals.emit(signals.coalesce_success, sender, run.bus, run.meta, result=result)


def on_failure(sender: Any, exception: Any = None, einfo: Any = None, **_: Any) -> None:
    """Announce a failure of the body. One that only the parent has seen is announced by the parent."""
    run = _run_of(sender)
    if run is None or run.lost or run.next_attempt is not None:
        return
    run.traceback = str(getattr(einfo, "traceback", "") or "") or None
    if isinstance(exception, Superseded):
        announce_outcome(sender.app, run.lease, Ending.failed(exception), run.bus)
        return
    shown = {"exception": safe_repr(exception)[:MOST_SHOWN]}
    signals.emit(signals.coalesce_error, sender, run.bus, run.meta, shown=shown, exception=exception)


def on_postrun(sender: Any, task: Any, retval: Any = None, state: str | None = None, **_: Any) -> None:
    """Report the end of an attempt."""
    run = _run_of(task)
    if run is None:
        return
    if run.lost:
        logger.warning(
            "Run %s of %s has lost its lease, and reports nothing",
            run.lease.run,
            task.name,
            extra={"action": "lease_lost", "run_id": run.lease.run, "task_id": run.lease.task_id},
        )
        return
    if run.next_attempt is not None:
        _report(partial(_continue, task.app, run))
        return
    ending = _ending(task, run, retval, state)
    if ending is not None:
        stopped = state is None and ending.outcome is Outcome.STOPPED
        unheard = ending.outcome in UNANNOUNCED and run.handed_on is None
        if state in (states.RETRY, REJECTED) or unheard or stopped:
            # Neither success nor failure to Celery's signals: this is the first that anybody hears of it.
            announce_outcome(task.app, run.lease, ending, run.bus)
        _report(partial(_end, task, run, ending))


def _ending(task: Any, run: Run, retval: Any, state: str | None) -> Ending | None:
    """Return how the attempt ended, ``None`` if it is the parent's to say."""
    if state == states.SUCCESS:
        return Ending(Outcome.SKIPPED if run.skipped else Outcome.SUCCEEDED, value=retval)
    if state == states.FAILURE:
        return Ending.failed(retval, run.traceback)
    if state == states.RETRY:
        # Retry was raised by hand: nothing was sent that could go on.
        reason = retval.exc if isinstance(retval, Retry) and retval.exc is not None else retval
        return Ending.failed(reason if isinstance(reason, BaseException) else Retry(str(reason)))
    if state == IGNORED:
        if run.handed_on is None:
            _complete_ignored(task, run)
        return Ending(Outcome.SKIPPED)
    if state == REJECTED:
        if isinstance(retval, Reject) and retval.requeue:
            return None
        return Ending.failed(retval if isinstance(retval, BaseException) else Reject(str(retval)))
    error = sys.exc_info()[1]
    if isinstance(error, Exception):
        # A hook of the task has raised out of the tracer, which is on its way to tell (celery.app.trace, 5.5-5.7).
        return Ending.failed(error)
    # No state: the process was told to stop. Where it is a pool child, the parent knows what that was.
    if _is_pool_child(run.lease):
        return None
    from celery.worker import state as worker_state

    if run.lease.run in being_stopped:
        return Ending(Outcome.STOPPED, error=Superseded(task.name, run.lease.key))
    if run.lease.task_id in worker_state.revoked:
        return Ending(Outcome.REVOKED)
    return Ending.failed(Ignore("the body was stopped"))


def _is_pool_child(lease: Lease) -> bool:
    return lease.owner.split("/")[-2] != str(os.getpid())


def _complete_ignored(task: Any, run: Run) -> None:
    """Give a bare ``Ignore`` a result, so that nobody waits for ever.

    A state that the body itself has stored is left alone, but for that of a step.
    """
    request = task.request
    try:
        status = task.backend.get_task_meta(request.id).get("status") if not request.ignore_result else None
        ours = (PROGRESS,) if task.coalesce_policy.steps else ()
        if status in (states.PENDING, states.STARTED, states.RECEIVED, states.RETRY, None, *ours):
            task.backend.mark_as_done(request.id, None, request=request, store_result=status is not None)
    except Exception:
        logger.exception(
            "The result of the ignored task %s could not be stored",
            request.id,
            extra={"action": "ignored_result_failed", "task_id": request.id},
        )
    # An ignored task calls no links, but those that complete another run's followers wait for this one.
    replacements.complete_followers(task.app, request.callbacks or (), None)
    announce_end(run.bus, request.id, Ending(Outcome.SKIPPED))


def _end(task: Any, run: Run, ending: Ending) -> None:
    told = run.handed_on or 0
    if not end_run(engine_of(task.app), run.lease, ending, run.bus, told=told, stopped=run.stopped):
        run.lost = True


def _continue(app: Celery, run: Run) -> None:
    attempt, run.next_attempt = run.next_attempt, None
    try:
        if attempt is not None and not continue_run(engine_of(app), run.lease, attempt):
            run.lost = True
    except StoreUnavailable:
        run.next_attempt = attempt
        raise


def continue_run(engine: Engine, lease: Lease, attempt: NextAttempt) -> bool:
    """Have a run go on with its next attempt; return whether the lease still held."""
    app = engine.app
    options = dict(attempt.options)
    headers = {name: value for name, value in (options.pop("headers", None) or {}).items() if name != HEADER}
    times: dict[str, Any] = {}
    countdown, eta = options.pop("countdown", None), options.pop("eta", None)
    if countdown:
        times["delay"] = int(float(countdown) * 1000)
    elif eta:
        times["due"] = moment(app, eta)
    for name in (*TIMES, "task_id", "redelivered"):
        options.pop(name, None)
    task = app.tasks.get(attempt.task)
    serializer = options.get("serializer") or (task.serializer if task is not None else None)
    given = {**options, "headers": headers, "root_id": options.get("root_id") or lease.task_id}
    call = captured(app, given, app.current_worker_task)
    if not options.get("parent_id"):
        # The attempt that is just ending is no parent of its own successor.
        call.pop("parent_id", None)
    policy = engine.policy_of(attempt.task)
    if policy is not None:
        times["on_retry"] = policy.on_retry
    sent = engine.transitions.retry(
        lease,
        attempt.task,
        encode((attempt.args, attempt.kwargs), serializer),
        encode(call, serializer),
        **times,
    )
    if sent is None:
        return False
    publish_all(engine, sent)
    return True


_unreported: deque[Callable[[], None]] = deque()
_reporting = threading.Lock()


def _report(report: Callable[[], None]) -> None:
    """Report now, or as soon as the store is back.

    Should this process die before, the parent's heartbeat finds the lease.
    """
    try:
        report()
    except StoreUnavailable as error:
        logger.warning("The end of a run could not be reported yet: %s", error, extra={"action": "report_delayed"})
        _unreported.append(report)
        threading.Thread(target=_report_later, name="celery-coalesce-reports", daemon=True).start()


def _report_later() -> None:
    never = threading.Event()
    with _reporting:
        while _unreported:
            try:
                _unreported[0]()
            except StoreUnavailable:
                # Behind the others: it may be its key alone that is refused.
                _unreported.rotate(-1)
                never.wait(REPORT_AGAIN)
            except Exception:
                logger.exception("A delayed report failed", extra={"action": "report_failed"})
                _unreported.popleft()
            else:
                _unreported.popleft()
