"""Coalesced tasks with delays, cooldowns, constraints, and ways to fail, retry and be replaced."""

from __future__ import annotations

import threading
from typing import Any

from celery import Celery, Task

from celery_coalesce import CoalescedTask, Constraint, Superseded
from tests.support import app as support
from tests.support.tasks import recorded, retrying, work

#: name -> options, of tasks with the body of `work`, or (`retry`) of `retrying`.
TASKS: dict[str, dict[str, Any]] = {
    "debounced": {"coalesce_delay": 1},
    "debounced_briefly": {"coalesce_delay": 0.4},
    "rested": {"coalesce_cooldown": 1},
    "limited": {"coalesce_constraints": Constraint("limited", limit=1)},
    "limited_late": {"coalesce_constraints": Constraint("limited", limit=1), "acks_late": True},
    "once": {"coalesce_once": True},
    "stop": {"coalesce": "serialize", "coalesce_on_error": "stop"},
    "stop_late": {"coalesce": "serialize", "coalesce_on_error": "stop", "acks_late": True},
    "retry_released": {"coalesce_on_retry": "release"},
    "retry_merged": {"coalesce_on_retry": "merge"},
    "replaced_retry": {"coalesce": "replace", "coalesce_grace": 1},
}


def define(app: Celery) -> None:
    """Register the tasks with an app."""
    common: dict[str, Any] = {"shared": False, "bind": True, "base": CoalescedTask, "coalesce_key": "<key>"}
    for name, options in TASKS.items():
        app.task(name=name, **common, **options)(retrying if "retry" in name else work)
    for name, grace in (("replaced_soon", 1), ("replaced_never", None)):
        app.task(name=name, coalesce="replace", coalesce_grace=grace, **common)(stubborn)
    app.task(name="calling_another", **common)(calling_another)
    app.task(name="replaced_willingly", coalesce="replace", coalesce_grace=60, **common)(willing)


def stubborn(self: Task, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Do `work`, whatever comes."""
    return work(self, key, value, gate)


def calling_another(self: Task, key: str) -> str:
    """Call a plain task, and return its id."""
    with recorded(self, key):
        return str(self.app.tasks["work"].delay(f"{key} child", 1).id)


def willing(self: CoalescedTask, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Wait until a newer trigger is there, if a gate is named, and give way to it."""
    with recorded(self, key):
        never = threading.Event()
        while gate and not never.wait(0.02):
            if self.coalesce.superseded:
                raise Superseded(str(self.name), key)
    return value


if hasattr(support, "app"):  # in a worker
    define(support.app)
