"""What a call returns."""

from __future__ import annotations

from typing import Any

from celery import states
from celery.result import AsyncResult

from .errors import QueueFull
from .states import Disposition

__all__ = ["CoalescedResult"]


class CoalescedResult(AsyncResult):
    """The result of a call to a :class:`~celery_coalesce.CoalescedTask`: that of the run that covers it.

    ``get()`` returns that run's value. A call that brought its own task id or callbacks keeps its id, and is
    completed with the covering run. Of a call that was rejected in a batch ``get()`` raises
    :exc:`~celery_coalesce.QueueFull`. Of one that was skipped because ``coalesce_once`` had been done, it returns the
    value of the run that did it, ``None`` if that is not stored any more.

    Attributes:
        disposition: What became of the call; ``None`` if the result was looked up by its id.
        key: The call's key, ``None`` if it was exempt.
        run_id: The run that covers it; ``None`` if the call was exempt, or was published without coalescing.
        run_task_id: That run's task id.

    .. versionadded:: 0.1
    """

    disposition: Disposition | None = None
    key: str | None = None
    run_id: int | None = None
    run_task_id: str | None = None
    #: Why there will be no run.
    _refusal: QueueFull | None = None
    #: Whether the run had ended when the call was made: what is not stored now never will be.
    _is_done = False
    _meta: dict[str, Any] | None = None

    @property
    def coalesced(self) -> bool:
        """Whether the call is covered by a run that another call made."""
        return self.disposition in (Disposition.COALESCED, Disposition.SKIPPED)

    @property
    def _cache(self) -> dict[str, Any] | None:
        """What is known of the end.

        ``AsyncResult`` and the result consumers of backends (celery.result, celery.backends.asynchronous, 5.5-5.7)
        look here before they wait.
        """
        if self._meta is None and self._refusal is not None:
            self._maybe_set_cache(_ended(states.FAILURE, self._refusal))
        elif self._meta is None and self._is_done:
            stored = self.backend.get_task_meta(self.id)
            gone = stored["status"] not in states.READY_STATES
            self._maybe_set_cache(_ended(states.SUCCESS, None) if gone else stored)
        return self._meta

    @_cache.setter
    def _cache(self, meta: dict[str, Any] | None) -> None:
        self._meta = meta

    def described(
        self,
        disposition: Disposition | None,
        key: str | None,
        run_id: int | None = None,
        run_task_id: str | None = None,
    ) -> CoalescedResult:
        """Set what became of the call, and return the result."""
        self.disposition = disposition
        self.key = key
        self.run_id = run_id
        self.run_task_id = run_task_id or self.id
        return self

    def refused(self, refusal: QueueFull) -> CoalescedResult:
        """Set why there will be no run, and return the result: it is a failure from now on."""
        self._refusal = refusal
        self.ignored = False
        return self

    def done(self) -> CoalescedResult:
        """Set that the run had ended when the call was made, and return the result: nothing waits for it."""
        self._is_done = True
        return self

    def raise_if_refused(self) -> CoalescedResult:
        """Return the result of a call that was not rejected.

        Raises:
            QueueFull: It was.
        """
        if self._refusal is not None:
            raise self._refusal
        return self

    def __copy__(self) -> CoalescedResult:
        copy: CoalescedResult = super().__copy__()
        return copy._as(self._told())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.__reduce_args__(), *self._told())

    def _told(self) -> tuple[Any, ...]:
        return self.disposition, self.key, self.run_id, self.run_task_id, self._refusal, self._is_done

    def _as(self, told: tuple[Any, ...]) -> CoalescedResult:
        *described, refusal, is_done = told
        self.described(*described)
        if refusal is not None:
            self.refused(refusal)
        self._is_done = is_done
        return self


def _ended(status: str, result: Any) -> dict[str, Any]:
    return {"status": status, "result": result, "traceback": None, "children": []}


def _rebuild(args: tuple[Any, ...], *told: Any) -> CoalescedResult:
    return CoalescedResult(*args)._as(told)
