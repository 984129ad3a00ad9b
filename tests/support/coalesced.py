"""The coalesced tasks of the test app, and the journal's view of the library's own events."""

from __future__ import annotations

from typing import Any

from celery import Celery

import celery_coalesce.signals
from celery_coalesce import CoalescedTask
from tests.support.journal import journal_of
from tests.support.tasks import retrying, work

#: name -> options; each has the body of `work` (`retry*`: of `retrying`) and its key is `key`.
COALESCED: dict[str, dict[str, Any]] = {
    "queue": {},
    "skip": {"coalesce": "skip"},
    "serialize": {"coalesce": "serialize"},
    "serialize_stop": {"coalesce": "serialize", "coalesce_on_error": "stop"},
    "three": {"coalesce_max_queued": 3},
    "five": {"coalesce_limit": 5},
    "reject": {"coalesce_overflow": "reject"},
    "first": {"coalesce_args": "first"},
    "merge": {"coalesce_args": "SEE merged"},
    "queue_late": {"acks_late": True},
    "queue_rerun": {"acks_late": True, "reject_on_worker_lost": True},
    "queue_ignored": {"ignore_result": True},
    "queue_retry": {},
    "retry_late": {"acks_late": True},
    "other": {},
    "shared_a": {"coalesce_scope": "shared"},
    "shared_b": {"coalesce_scope": "shared"},
}

EVENTS = ("trigger", "start", "step", "success", "error", "skip", "drain", "lost")


def merged(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Add up the values of two calls."""
    return {**later, "value": earlier["value"] + later["value"]}


def define_coalesced_tasks(app: Celery) -> None:
    """Register the coalesced tasks with an app."""
    for name, given in COALESCED.items():
        options = {**given, "coalesce_key": "<key>"}
        if name == "merge":
            options["coalesce_args"] = merged
        body = retrying if "retry" in name else work
        app.task(name=name, shared=False, bind=True, base=CoalescedTask, **options)(body)


def journal_signals() -> None:
    """Record every event of the library in the journal of its key, as `coalesce_start` and so on."""
    for event in EVENTS:
        signal = getattr(celery_coalesce.signals, f"coalesce_{event}")
        signal.connect(_recorder(f"coalesce_{event}"), weak=False, dispatch_uid=f"journal.{event}")


def _recorder(event: str) -> Any:
    def record(meta: Any = None, sender: Any = None, signal: Any = None, **given: Any) -> None:
        try:
            journal, short = journal_of(meta.key)
        except ValueError:
            return
        fields = {**meta.as_dict(), "key": short}
        more = {name: repr(value) for name, value in given.items() if name != "event"}
        journal.record(event, **fields, **more)

    return record
