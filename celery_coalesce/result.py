"""What a call returns."""

from __future__ import annotations

from typing import Any

from celery.result import AsyncResult

from .states import Disposition

__all__ = ["CoalescedResult"]


class CoalescedResult(AsyncResult):
    """The result of a call to a :class:`~celery_coalesce.CoalescedTask`: that of the run that covers it.

    ``get()`` returns that run's value. A call that brought its own task id or callbacks keeps its id, and is
    completed with the covering run.

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

    @property
    def coalesced(self) -> bool:
        """Whether the call is covered by a run that another call made."""
        return self.disposition in (Disposition.COALESCED, Disposition.SKIPPED)

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

    def __copy__(self) -> CoalescedResult:
        copy: CoalescedResult = super().__copy__()
        return copy.described(self.disposition, self.key, self.run_id, self.run_task_id)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.__reduce_args__(), self.disposition, self.key, self.run_id, self.run_task_id)


def _rebuild(
    args: tuple[Any, ...],
    disposition: Disposition | None,
    key: str | None,
    run_id: int | None,
    run_task_id: str | None,
) -> CoalescedResult:
    return CoalescedResult(*args).described(disposition, key, run_id, run_task_id)
