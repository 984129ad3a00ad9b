"""Publishing: the message that wakes a worker for a run.

A message carries the run's id in its ``coalesce`` header, never an expiry (the record holds it: a broker that drops a
message in silence would cost a minute), and everything that the run's own ``apply_async`` was given.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery import Task

from .calls import HEADER, UNREADABLE, decode, eta_header, options_of
from .errors import CoalesceError
from .plain import PLAIN, give_turn
from .records import Advance, Envelope

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .records import Lease, Sent

__all__ = ["dispatch_again", "named_run", "publish_all", "run_header"]

logger = logging.getLogger("celery_coalesce")

#: What ids of records and runs look like.
STATE, RUN = re.compile(r"[a-z2-7]{26}"), re.compile(r"[0-9]{1,20}")


def run_header(
    state: str, run: str, task_id: str, *, attempt: int = 0, version: int = 0, wait: int = 0
) -> dict[str, Any]:
    """Return the header by which a message names its run, and the arguments that it carries.

    Args:
        state: The key's state id.
        run: The run.
        task_id: Its task id. Who hands the headers of its request on to another call hands on another's.
        attempt: The run's attempt that it wakes.
        version: Of its arguments.
        wait: Milliseconds that it waits.
    """
    header = {"state": state, "run": run, "id": task_id, "attempt": attempt, "version": version}
    return {**header, "wait": wait} if wait > 0 else header


def named_run(header: object, task_id: str, task: str) -> Envelope | None:
    """Return the run that a message names, ``None`` if what it names can be no run, or not the message's own.

    Args:
        header: What :func:`run_header` returned, or whatever somebody else has put there.
        task_id: The message's task id.
        task: Its task.
    """
    if not isinstance(header, dict):
        return None
    state, run = header.get("state"), header.get("run")
    attempt, version = header.get("attempt"), header.get("version")
    if not (isinstance(state, str) and isinstance(run, str)):
        return None
    if not (isinstance(attempt, int) and isinstance(version, int)):
        return None
    if not (STATE.fullmatch(state) and RUN.fullmatch(run)) or header.get("id", task_id) != task_id:
        return None
    return Envelope(state, run, task_id, task, attempt, version, 0, b"", b"")


def publish_all(engine: Engine, sent: Iterable[Sent]) -> None:
    """Do what a transition leaves to others: publish messages, and advance other keys.

    What can not be published is noted, and tried again by the sweep; it advances what is not advanced here, too.
    """
    left = deque(sent)
    while left:
        each = left.popleft()
        if not isinstance(each, Advance):
            left.extend(_published(engine, each))
            continue
        try:
            left.extend(engine.transitions.advance(each.state))
        except CoalesceError:
            logger.warning(
                "A key that was given way to could not be advanced yet",
                exc_info=True,
                extra={"action": "advance_failed", "state_id": each.state},
            )


def dispatch_again(engine: Engine, lease: Lease) -> None:
    """Have a run wait for another message, and publish that: its body has not begun, or it is to run again.

    Raises:
        StoreUnavailable: The run goes on being this lease's; call again.
    """
    publish_all(engine, engine.transitions.requeue(lease) or ())


def _published(engine: Engine, envelope: Envelope) -> Iterable[Sent]:
    """Publish one message; return what is sent in its place if it can not be made."""
    if envelope.task in PLAIN:
        give_turn(engine, envelope)
        return ()
    try:
        _publish(engine, envelope)
    except UNREADABLE as error:
        # Nothing that time mends.
        logger.exception(
            "Run %s of %s can not be published",
            envelope.run,
            envelope.task,
            extra={"action": "unpublishable", "run_id": envelope.run, "task_id": envelope.task_id},
        )
        return engine.transitions.withdraw(envelope, repr(error))
    except Exception:
        # Whatever stands in the way (broker, router, serializer): the run is accepted, and stays in its record.
        logger.exception(
            "Run %s of %s could not be published",
            envelope.run,
            envelope.task,
            extra={"action": "publish_failed", "run_id": envelope.run, "task_id": envelope.task_id},
        )
        try:
            engine.transitions.unpublished(envelope)
        except CoalesceError:
            logger.warning(
                "Run %s of %s will be published again once its timer is over",
                envelope.run,
                envelope.task,
                extra={"action": "unpublished_unnoted", "run_id": envelope.run},
            )
    return ()


def _publish(engine: Engine, envelope: Envelope) -> None:
    """Publish one run's message in the name of the call that made it, whoever publishes it."""
    app = engine.app
    args, kwargs = decode(app, envelope.args)
    options = options_of(decode(app, envelope.call)) if envelope.call else {}
    if not _pushed(engine, envelope, args, kwargs, options):
        _send(app, envelope, args, kwargs, options)


def _pushed(
    engine: Engine, envelope: Envelope, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
) -> bool:
    """Push the message on the state server's connection, if that is all that publishing would do.

    Kombu makes a client for each message, which takes longer than the message itself.
    """
    broker = engine.broker
    if broker is None or not broker.may_push():
        return False
    with engine.app.producer_or_acquire() as producer:

        def publish(run: str) -> None:
            given = {**options, "producer": producer, "retry": False}
            _send(engine.app, envelope._replace(run=run), args, kwargs, given)

        push = broker.push_of(producer, publish)
    if push is None:
        return False
    engine.transitions.store.push(push.queue, f"{push.before}{envelope.run}{push.after}")
    return True


def _send(
    app: Celery, envelope: Envelope, args: Sequence[Any], kwargs: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    task = app.tasks.get(envelope.task)
    headers = {
        **(given.get("headers") or {}),
        HEADER: run_header(
            envelope.state,
            envelope.run,
            envelope.task_id,
            attempt=envelope.attempt,
            version=envelope.version,
            wait=envelope.delay,
        ),
        # The publisher is not the caller: celery.app.base.Celery.send_task (5.5-5.7) would make the task that it is
        # just running the parent, and open a subscription for a result that nobody waits for here.
        "parent_id": given.get("parent_id"),
        "ignore_result": given.get("ignore_result", task.ignore_result if task is not None else None),
    }
    if envelope.delay > 0:
        headers["eta"] = eta_header(envelope.delay)
    options = {
        "priority": None,
        **given,
        "headers": headers,
        "task_id": envelope.task_id,
        "root_id": given.get("root_id") or envelope.task_id,
        "add_to_parent": False,
        "ignore_result": True,
    }
    if task is None:
        app.send_task(envelope.task, args, kwargs, **options)
    else:
        if options["priority"] is None:
            options["priority"] = task.priority
        Task.apply_async(task, args, kwargs, **options)
