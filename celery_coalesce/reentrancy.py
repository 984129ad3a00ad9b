"""Who has a key: code that would wait for itself is refused."""

from __future__ import annotations

import asyncio
import os
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .context import ATTRIBUTE, Run
from .errors import NotReentrant

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["check_free", "holding"]


def _asyncio_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


class _Held:
    """A key that some code has, and who that is."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.over = False
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        self._task = _asyncio_task()

    def is_mine(self) -> bool:
        """Whether the code that asks would wait for itself: the same thread or asyncio task, or a helper thread of it.

        A context is copied into what is begun within it, and may outlast the hold.
        """
        if self.over or self._pid != os.getpid():
            return False
        task = _asyncio_task()
        if self._task is None:
            return self._thread == threading.get_ident()
        return task is None or task is self._task


_held: ContextVar[tuple[_Held, ...]] = ContextVar("celery_coalesce_held", default=())


def check_free(app: Celery, state: str, key: str) -> None:
    """Refuse to wait for a key that this very code has.

    Raises:
        NotReentrant: It runs a task of that key, or holds it.
    """
    task = app.current_worker_task
    run = task.request.__dict__.get(ATTRIBUTE) if task is not None else None
    inside = isinstance(run, Run) and run.lease.state == state
    if inside or any(held.state == state and held.is_mine() for held in _held.get()):
        raise NotReentrant(key)


class holding:  # noqa: N801 - a context manager, read as a verb
    """Note that the code within has a key. Entered and left in one context."""

    def __init__(self, state: str) -> None:
        self._state = state

    def __enter__(self) -> None:
        self._own = _Held(self._state)
        _held.set((*_held.get(), self._own))

    def __exit__(self, *_: object) -> None:
        self._own.over = True
        _held.set(tuple(held for held in _held.get() if not held.over))
