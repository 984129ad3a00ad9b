"""Coalesced tasks that have themselves replaced."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task, chain, group
from celery.exceptions import Ignore, Reject

from celery_coalesce import CoalescedTask
from tests.support import app as support
from tests.support.tasks import recorded


def define(app: Celery) -> None:
    """Register the tasks with an app."""

    def task(body: Any, **options: Any) -> None:
        name = options.pop("name", body.__name__)
        app.task(shared=False, name=name, bind=True, base=CoalescedTask, coalesce_key="<key>", **options)(body)

    task(replaced_by_itself)
    task(replaced_by_another, coalesce_scope="shared")
    task(replaced_by_plain)
    task(replaced_by_group)
    task(replaced_by_chain)
    task(replaced_by_chord)
    task(replaced_by_failure)
    task(ignoring)
    task(ignoring_with_a_state)
    task(rejecting)
    task(rejecting, name="rejecting_late", acks_late=True)


def replaced_by_itself(self: Task, key: str, value: int = 0, gate: str | None = None) -> int:
    """Be replaced by the same task with the next value, until it is 2."""
    with recorded(self, key) as journal:
        if gate and not value:
            journal.pass_gate(gate)
        if value < 2:
            return self.replace(self.s(key, value + 1))
    return value


def replaced_by_another(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Be replaced by another coalesced task of the same scope and key."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        return self.replace(self.app.tasks["shared_b"].s(key, value))


def _plain(self: Task, key: str, value: Any, gate: str | None = None) -> Any:
    return self.app.tasks["work"].s(f"{key}-plain", value, gate)


def replaced_by_plain(
    self: Task, key: str, value: Any = None, gate: str | None = None, plain_gate: str | None = None
) -> Any:
    """Be replaced by a task that does not coalesce."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        return self.replace(_plain(self, key, value, plain_gate))


def replaced_by_group(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Be replaced by a group of two."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        return self.replace(group(_plain(self, key, value), _plain(self, key, value)))


def replaced_by_chain(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Be replaced by a chain of two."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        last = self.app.tasks["collect"].s(key=f"{key}-last")
        return self.replace(chain(_plain(self, key, value), last))


def replaced_by_chord(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Be replaced by a chord."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        body = self.app.tasks["collect"].s(key=f"{key}-body")
        return self.replace(group(_plain(self, key, value), _plain(self, key, value)) | body)


def replaced_by_failure(self: Task, key: str, kind: str = "task", gate: str | None = None) -> Any:
    """Be replaced by something that fails."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        collect = self.app.tasks["collect"].s(key=f"{key}-last")
        fails, works = self.app.tasks["work"].si(f"{key}-plain", error="boom"), _plain(self, key, 1)
        by = {
            "task": fails,
            "group": group(works, fails),
            "chain": chain(fails, collect),
            "chain's end": chain(works, fails),
            "chord": group(works, fails) | collect,
            "chord's body": group(works, works) | fails,
        }
        return self.replace(by[kind])


def ignoring(self: Task, key: str, gate: str | None = None) -> None:
    """Raise a bare `Ignore`."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        raise Ignore


def ignoring_with_a_state(self: Task, key: str) -> None:
    """Store a state of its own, as Celery's documentation recommends, then `Ignore`."""
    with recorded(self, key):
        self.update_state(state="CUSTOM", meta={"why": "because"})
        raise Ignore


def rejecting(self: Task, key: str, requeue: bool = False, gate: str | None = None) -> str:
    """Reject the message the first time that the journal hears of it."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        if len(journal.events("start", key=key.partition(":")[2])) == 1 or not requeue:
            raise Reject("not now", requeue=requeue)
    return "done"


if hasattr(support, "app"):  # in a worker
    define(support.app)
