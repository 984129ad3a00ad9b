"""What TB workers have beyond the test app: tasks with constraints, labels, steps, a set-up, and a question first."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from celery.exceptions import Ignore
from celery.schedules import schedstate, schedule

from celery_coalesce import CoalescedTask, Constraint
from tests.support import app as support
from tests.support.journal import Journal, journal_of
from tests.support.tasks import recorded, work

STEPS = {"build": 30, "test": 20, "deploy": 50}

#: Where beats are told the key of their tick, and the file that says when: in seconds since the epoch.
TICKS_VARIABLE = "TEST_TICKS"
#: Seconds between the ticks of a schedule.
EVERY = 2
#: Seconds for which a tick that has run needs no other run.
TICK_COUNTS = 4


def define(app: Celery) -> None:
    """Register the tasks with an app."""

    def task(name: str, body: Callable[..., Any], **options: Any) -> None:
        options.setdefault("coalesce_key", "<key>")
        app.task(name=name, shared=False, bind=True, base=CoalescedTask, **options)(body)

    task("provided", provided, coalesce_constraints=Constraint("provider:<provider>"))
    task("provided_otherwise", provided_otherwise, coalesce_constraints=Constraint(provider_of))
    task("sometimes", provided, coalesce_key=key_of)
    task("slots", provided, coalesce_constraints=Constraint("slots:<provider>", limit=3))
    task("resting", provided, coalesce_constraints=Constraint("resting:<provider>", cooldown=1))
    task("both", provided, coalesce_constraints=[Constraint("provider:<provider>"), Constraint("other")])
    task("only_other", provided, coalesce_constraints=Constraint("other"))
    task("quiet", work, coalesce_delay=0.6, coalesce_max_delay=1.5)
    task("buffer", work, coalesce_limit=5)
    task("done_once", work, coalesce_once=True)
    task("asked", asked, coalesce_should_run=shall_run)
    task("asked_ignored", asked, coalesce_should_run=shall_run, ignore_result=True)
    task("asked_rests", asked, coalesce_should_run=shall_run, coalesce_cooldown=600)
    task("asked_once", asked, coalesce_should_run=shall_run, coalesce_once=True)
    task("asked_retry", asked_retry, coalesce_should_run=shall_run_again)
    task("labelled", labelled, coalesce_labels={"tenant": "<tenant>", "plan": "of <plan>"})
    task("stepping", stepping, coalesce_steps=STEPS)
    task("stepping_ignored", stepping, coalesce_steps=STEPS, ignore_result=True)
    task("stepping_retry", stepping_retry, coalesce_steps=STEPS)
    task("prepared", prepared, coalesce_setup=prepare)
    task("prepared_too", prepared, coalesce_setup=prepare)
    task("prepared_otherwise", prepared, coalesce_setup=prepare_otherwise)
    task("prepared_late", prepared, coalesce_setup=prepare_late)
    task("append", append)
    task("tick", work, coalesce="skip", coalesce_once=TICK_COUNTS)

    @app.task(
        name="asked_unbound", shared=False, base=CoalescedTask, coalesce_key="<key>", coalesce_should_run=shall_run
    )
    def asked_unbound(key: str, value: Any = None, gate: str | None = None) -> Any:
        journal_of(key)[0].record("unbound", value=value)
        return value

    class AskedClass(CoalescedTask):
        name = "asked_class"
        coalesce_key = "<key>"
        coalesce_should_run = staticmethod(shall_run)

        def run(self, key: str, value: Any = None, gate: str | None = None) -> Any:
            with recorded(self, key):
                return value

    app.register_task(AskedClass())


def provided(
    self: CoalescedTask, key: str, value: Any = None, provider: str | None = "default", gate: str | None = None
) -> Any:
    """Do `work` with a provider; the value "fail" fails."""
    return work(self, key, value, gate, error="as asked" if value == "fail" else None)


def provided_otherwise(self: CoalescedTask, key: str, provider: str = "default", gate: str | None = None) -> Any:
    """Do `work` with a provider, which is another parameter of another task."""
    return work(self, key, provider, gate)


def provider_of(key: str, provider: str, gate: str | None = None) -> str | None:
    """Return the constraint of a call of `provided_otherwise`."""
    return None if provider == "none" else f"provider:{provider}"


def key_of(key: str, value: Any, provider: str | None, gate: str | None) -> str | None:
    """Return the key of a call of `sometimes`: none without a provider, and no good one with an empty one."""
    return None if provider is None else provider and key


# coalesce_should_run


def pointless(journal: Journal) -> str:
    """Return the name of what says that nothing is left to be done."""
    return f"pointless:{journal.name}"


def shall_run(key: str, value: Any, gate: str | None) -> Any:
    """Say no to the value "no", raise on "raise", and ask elsewhere whether anything is left to be done."""
    journal, short = journal_of(key)
    journal.record("asked", key=short, value=value, gate=gate)
    if value == "raise":
        raise LookupError("not to be known")
    return "" if value == "no" else not journal.client.exists(pointless(journal))


def asked(self: CoalescedTask, key: str, value: Any = None, gate: str | None = None) -> Any:
    """Wait at a gate, if one is named; the value "all" does the work of all that wait."""
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        if value == "all":
            journal.client.set(pointless(journal), 1)
    return value


def shall_run_again(key: str, times: int) -> bool:
    """Say yes so many times."""
    journal, short = journal_of(key)
    journal.record("asked", key=short)
    return len(journal.events("asked")) <= times


def asked_retry(self: CoalescedTask, key: str, times: int) -> None:
    """Retry for ever."""
    with recorded(self, key):
        raise self.retry(countdown=0, max_retries=None)


# Labels


def labelled(
    self: CoalescedTask,
    key: str,
    tenant: str,
    plan: str | None = None,
    gate: str | None = None,
    error: str | None = None,
) -> Any:
    """Do `work` for a tenant."""
    return work(self, key, tenant, gate, error)


# coalesce_steps


def stepping(self: CoalescedTask, key: str, steps: list[str], gate: str | None = None, error: str | None = None) -> str:
    """Go through steps, and wait at the gate within each."""
    with recorded(self, key) as journal:
        for step in steps:
            self.coalesce.step(step)
            journal.record("stepped", key=key.partition(":")[2], step=step, task_id=self.request.id)
            if gate:
                journal.pass_gate(gate)
        if error:
            raise Ignore if error == "ignore" else RuntimeError(error)
    return "stepped"


def stepping_retry(self: CoalescedTask, key: str, times: int = 1) -> str:
    """Retry from the midst of the steps."""
    with recorded(self, key):
        self.coalesce.step("build")
        if self.request.retries < times:
            raise self.retry(countdown=0)
        self.coalesce.step("deploy")
    return "stepped"


# coalesce_setup

_calls: Counter[tuple[int, str]] = Counter()


def _made(name: str) -> dict[str, Any]:
    _calls[os.getpid(), name] += 1
    return {"name": name, "id": uuid4().hex, "pid": os.getpid(), "at": time.monotonic()}


def prepare() -> dict[str, Any]:
    """Set up what two tasks need."""
    return _made("prepare")


def prepare_otherwise() -> dict[str, Any]:
    """Set up something else."""
    return _made("prepare_otherwise")


def prepare_late() -> dict[str, Any]:
    """Fail the first time in each process."""
    made = _made("prepare_late")
    if _calls[os.getpid(), "prepare_late"] == 1:
        raise ConnectionError("not set up yet")
    return made


def prepared(self: CoalescedTask, key: str, gate: str | None = None) -> dict[str, Any]:
    """Return what was set up, where, and how often that was done."""
    began = time.monotonic()
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        setup: dict[str, Any] = self.coalesce.setup
        assert setup is self.coalesce.setup
    calls = _calls[os.getpid(), setup["name"]]
    return {**setup, "ran_in": os.getpid(), "thread": threading.get_ident(), "began": began, "calls": calls}


# Canvas


def append(
    self: CoalescedTask, before: list[Any], key: str, value: Any, gate: str | None = None, error: str | None = None
) -> list[Any]:
    """Return what came before, and a value more."""
    return [*before, work(self, key, value, gate, error)]


# Beat


class Moments(schedule):
    """A schedule of given moments, the same for every beat, as a crontab is.

    They are read from a file, one in a line, so that they can be set once the beats are up.
    """

    def __init__(self, path: str, app: Celery | None = None) -> None:
        super().__init__(timedelta(0), app=app)
        self.path = path

    def remaining_estimate(self, last_run_at: datetime) -> timedelta:
        """Return how long it is until the next moment."""
        left = [moment for moment in read_moments(self.path) if moment > last_run_at.timestamp()]
        return timedelta(seconds=min(left) - self.now().timestamp()) if left else timedelta(days=1)

    def is_due(self, last_run_at: datetime) -> Any:
        """Return whether the next moment has come, and when to ask again."""
        left = self.remaining_estimate(last_run_at).total_seconds()
        return schedstate(is_due=left <= 0, next=0.05)

    def __reduce__(self) -> Any:
        return type(self), (self.path,)


def read_moments(path: str) -> list[float]:
    """Return the moments of a file, none if it is not there yet."""
    file = Path(path)
    return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


if hasattr(support, "app"):  # in a worker, or a beat
    define(support.app)
    if TICKS_VARIABLE in os.environ:
        _key, _path = os.environ[TICKS_VARIABLE].split(",")
        support.app.conf.beat_schedule = {
            "tick": {"task": "tick", "schedule": Moments(_path), "args": (_key, "ticked")},
            "plain_tick": {"task": "queue", "schedule": EVERY, "args": (f"{_key} plain", "ticked")},
        }
