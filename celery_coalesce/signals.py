"""The events of a key, as Celery signals and on Celery's event bus.

A signal is sent in the process where the thing happens, with ``sender`` the task and ``meta`` what it happened to.
The same goes out as ``coalesce-start`` and so on wherever task events are on (a worker's ``-E``, a producer's
``task_send_sent_event``), for Flower, ``celery events`` and any ``EventReceiver``.

Per session: start, (success | error), [start ...], drain. A run with steps tells them in between.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from celery.utils.dispatch import Signal

if TYPE_CHECKING:
    from celery import Celery

    from .views import RunMeta, TriggerMeta

__all__ = [
    "MOST_SHOWN",
    "EventBus",
    "coalesce_drain",
    "coalesce_error",
    "coalesce_lost",
    "coalesce_skip",
    "coalesce_start",
    "coalesce_step",
    "coalesce_success",
    "coalesce_trigger",
    "emit",
    "is_watched",
]

logger = logging.getLogger("celery_coalesce")

#: Of an exception or a result an event shows this many characters, as Celery's own events do.
MOST_SHOWN = 1024

#: A call was made. In the producer; ``meta`` is a :class:`~celery_coalesce.TriggerMeta`, ``unused`` the ``(args,
#: kwargs)`` that no run will see because of this call, or ``None``.
coalesce_trigger = Signal(name="coalesce_trigger", providing_args={"meta", "unused"})

#: A run has its lease and is about to begin. In the process that runs it.
coalesce_start = Signal(name="coalesce_start", providing_args={"meta"})

#: A run has succeeded; ``result`` is its value.
coalesce_success = Signal(name="coalesce_success", providing_args={"meta", "result"})

#: A run has failed, or its process died; ``exception`` says why.
coalesce_error = Signal(name="coalesce_error", providing_args={"meta", "exception"})

#: A run begins a step (``step``), or has succeeded with all of them (``None``). ``progress`` is per cent, ``done`` and
#: ``left`` are the names of the steps before and after. In the process that runs it.
coalesce_step = Signal(name="coalesce_step", providing_args={"meta", "step", "progress", "done", "left"})

#: A run has ended without having done anything: ``coalesce_should_run`` said no, its body raised ``Ignore``, or it was
#: revoked or expired (``outcome``).
coalesce_skip = Signal(name="coalesce_skip", providing_args={"meta", "outcome"})

#: A session is over: nothing runs, nothing waits.
coalesce_drain = Signal(name="coalesce_drain", providing_args={"meta"})

#: A run's worker was not heard of in time. In the worker that noticed; ``again`` tells whether the run is dispatched
#: again.
coalesce_lost = Signal(name="coalesce_lost", providing_args={"meta", "again"})


class EventBus(NamedTuple):
    """Celery's event bus, as one process may use it."""

    app: Celery
    enabled: bool
    #: The worker's name; ``None`` in a producer.
    hostname: str | None = None

    @classmethod
    def of_worker(cls, app: Celery, dispatcher: Any, hostname: str, *, wanted: bool) -> EventBus:
        """Return a worker's bus.

        Its dispatcher is there without ``-E`` too, for the worker's own heartbeats: task events are on if it sends
        that group (celery.worker.consumer.events.Events, 5.5-5.7).
        """
        groups = getattr(dispatcher, "groups", None)
        enabled = bool(dispatcher and dispatcher.enabled and (not groups or "task" in groups))
        return cls(app, enabled and wanted, hostname)

    def send(self, kind: str, **fields: Any) -> None:
        """Send an event, if events are on. One that can not be sent is logged: it never stops a run."""
        if not self.enabled:
            return
        try:
            with self.app.events.default_dispatcher(hostname=self.hostname) as dispatcher:
                dispatcher.send(kind, retry=False, **fields)
        except Exception as error:
            logger.warning(
                "The event %s could not be sent: %r",
                kind,
                error,
                extra={"action": "event_failed", "event": kind},
            )


def is_watched(signal: Signal, bus: EventBus) -> bool:
    """Return whether anybody would notice a signal."""
    return bool(signal.receivers) or bus.enabled


def emit(
    signal: Signal,
    sender: object,
    bus: EventBus,
    meta: RunMeta | TriggerMeta,
    shown: dict[str, Any] | None = None,
    **given: Any,
) -> None:
    """Send a signal, and the same on the bus.

    Args:
        signal: The signal.
        sender: The task.
        bus: Where its event goes.
        meta: What it happened to.
        shown: Further fields of the event. An application's arguments go to signals alone.
        given: Further arguments of the signal.
    """
    if signal.receivers:
        signal.send(sender=sender, meta=meta, **given)
    if bus.enabled:
        fields = meta.as_dict()
        # An event's own fields are called type and timestamp.
        if "type" in fields:
            fields["key_type"] = fields.pop("type")
        bus.send(str(signal.name).replace("_", "-"), **fields, **(shown or {}))
