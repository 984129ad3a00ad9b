"""Coalesced tasks whose classes override Celery's hooks, without `super()`."""

from __future__ import annotations

from typing import Any

from celery import Celery, Task
from celery.contrib.django.task import DjangoTask

from celery_coalesce import CoalescedTask
from tests.support import app as support
from tests.support.journal import journal_of
from tests.support.tasks import recorded


def _record(hook: str, task: Task, key: str, **fields: Any) -> None:
    journal, short = journal_of(key)
    journal.record(hook, key=short, task=task.name, task_id=task.request.id, **fields)


class Hooks(CoalescedTask):
    """Every hook, overridden without `super()`."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        _record("before_start", self, args[0], given=task_id)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        _record("on_success", self, args[0], retval=retval)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        _record("on_failure", self, args[0], exc=repr(exc))

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        _record("on_retry", self, args[0])

    def after_return(self, status: str, retval: Any, *call: Any) -> None:
        _, args, _, _ = call
        _record("after_return", self, args[0], status=status)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _record("call", self, args[0])
        return self.run(*args, **kwargs)


class BrokenHooks(CoalescedTask):
    """Hooks that raise."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        raise RuntimeError("on_success")

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        raise RuntimeError("on_failure")

    def after_return(self, status: str, retval: Any, *call: Any) -> None:
        raise RuntimeError("after_return")


class BrokenStart(CoalescedTask):
    """A `before_start` that raises."""

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        raise RuntimeError("before_start")


class OnDjango(CoalescedTask, DjangoTask):
    """A mixin of both."""


class DjangoFirst(DjangoTask, CoalescedTask):
    """The same, the other way round."""


def _work(
    self: Task,
    key: str,
    value: Any = None,
    gate: str | None = None,
    *,
    error: str | None = None,
    retry: bool = False,
) -> Any:
    with recorded(self, key) as journal:
        if gate:
            journal.pass_gate(gate)
        if error:
            raise RuntimeError(error)
        if retry and not self.request.retries:
            raise self.retry(countdown=0)
    return value


def define(app: Celery) -> None:
    """Register the tasks with an app."""
    for name, base in {
        "hooks": Hooks,
        "broken_hooks": BrokenHooks,
        "broken_start": BrokenStart,
        "on_django": OnDjango,
        "django_first": DjangoFirst,
    }.items():
        app.task(shared=False, name=name, bind=True, base=base, coalesce_key="<key>")(_work)

    # A task class belongs to one app: each has its own.
    class ClassBased(Hooks):
        """A task that is a class, with options in its body."""

        name = "class_based"
        coalesce_key = "<key>"

        def run(self, key: str, value: Any = None, gate: str | None = None) -> Any:
            return _work(self, key, value, gate)

    class Derived(ClassBased):
        """A subclass of such a task, with an option of its own."""

        name = "derived"
        coalesce = "skip"

    app.register_task(ClassBased())
    app.register_task(Derived())


if hasattr(support, "app"):  # in a worker
    define(support.app)
