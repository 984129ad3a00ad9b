"""The run that a task's body is in: ``self.coalesce``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore

from .errors import LeaseLost, StoreUnavailable
from .records import Lease, RunMeta
from .states import Mode

if TYPE_CHECKING:
    from .signals import EventBus
    from .transitions import Transitions

__all__ = ["ATTRIBUTE", "InlineRun", "NextAttempt", "Run"]

#: Where a request keeps its run.
ATTRIBUTE = "coalesce_run"

#: Seconds between two questions to a store that is away, and for how long they are asked.
ASK_AGAIN, ASK_FOR = 1.0, 3600.0


@dataclass(frozen=True)
class NextAttempt:
    """What continues a run once this attempt has ended: a retry, or the task that replaces it."""

    task: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    options: Mapping[str, Any]


class InlineRun:
    """``self.coalesce`` of a body that was called directly or eagerly: no lease, nothing to lose.

    Attributes:
        meta: The run's metadata.
    """

    def __init__(self, meta: RunMeta) -> None:
        self.meta = meta

    def __getattr__(self, name: str) -> Any:
        if name == "meta":
            raise AttributeError(name)
        return getattr(self.meta, name)

    @property
    def superseded(self) -> bool:
        """Whether a newer trigger waits; nothing does, without a lease."""
        return False

    def check(self) -> None:
        """Do nothing: there is no lease."""


class Run(InlineRun):
    """``self.coalesce`` of a body that a worker runs. Has every field of :class:`~celery_coalesce.RunMeta`.

    Args:
        transitions: The engine.
        lease: The run's lease.
        bus: Where its events go.
    """

    def __init__(self, transitions: Transitions, lease: Lease, bus: EventBus) -> None:
        super().__init__(RunMeta.of(lease))
        self.lease = lease
        self.bus = bus
        self.transitions = transitions
        #: The lease was refused: nothing of this attempt may be stored, published or reported.
        self.lost = False
        #: What continues the run.
        self.next_attempt: NextAttempt | None = None
        #: Followers that were handed on to a replacement, and are not this attempt's to tell.
        self.handed_on: int | None = None
        self.traceback: str | None = None
        self._in_body = False

    def check(self) -> None:
        """Ask whether this run still has its lease.

        Call it in a long body before anything that must not be done by two runs at once.

        Raises:
            LeaseLost: It has not. The key may have gone on; end the body.
            StoreUnavailable: The state server can not be asked.

        .. versionadded:: 0.1
        """
        if self.lost or not self.transitions.check(self.lease):
            self.lost = True
            raise LeaseLost(
                f"run {self.lease.run} of {self.lease.task} ({self.lease.key!r}) has lost its lease "
                f"(token {self.lease.token})"
            )

    @property
    def superseded(self) -> bool:
        """Whether a newer trigger of the key waits for this run to end. Asks the state server.

        A long body may end early then: what it would still do, the next run does with newer arguments. Under
        ``coalesce="replace"`` it is stopped ``coalesce_grace`` seconds later.

        Raises:
            LeaseLost: The run has lost its lease.
            StoreUnavailable: The state server can not be asked.

        .. versionadded:: 0.1
        """
        answer = None if self.lost else self.transitions.superseded(self.lease)
        if answer is None:
            self.check()
        return bool(answer)

    def execute(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], calls_on: bool) -> Any:
        """Run the body, and look at the lease before anything that follows from it.

        Args:
            body: What to run.
            args: Its arguments.
            kwargs: Its keyword arguments.
            calls_on: Whether callbacks, a chain or a chord follow: what they call comes after this run, and is not
                answered with it.

        Raises:
            Ignore: The lease was lost: Celery shall neither store nor call anything.
        """
        if self._in_body:
            return body(*args, **kwargs)
        self._in_body = True
        try:
            value = body(*args, **kwargs)
        except Exception as error:
            self._returned(calls_on)
            if self.lost:
                raise Ignore(str(error)) from error
            raise
        finally:
            self._in_body = False
        self._returned(calls_on)
        return value

    def _returned(self, calls_on: bool) -> None:
        """Ask for the lease where it could have been lost, and say that the body has returned where that matters.

        A lease lasts as long as the presence that it hangs from, which was renewed when the lease was given: a
        shorter run can not have lost it. And only a ``skip`` trigger looks at whether a body has returned: one that
        comes from this run's callbacks, or from a caller that has seen the result of a single flight.
        """
        overdue = time.monotonic() - self.lease.leased_at >= self.transitions.timing.lease / 1000
        matters = calls_on or self.lease.mode == Mode.SKIP
        if self.lost or not (matters or overdue):
            if self.lost:
                raise Ignore("the lease was lost")
            return
        never = threading.Event()
        for _ in range(int(ASK_FOR / ASK_AGAIN)):
            try:
                if self.transitions.check(self.lease, returned=True):
                    return
                break
            except StoreUnavailable:
                # Not knowing is no leave to go on: whoever holds the key now must not meet this run's callbacks.
                never.wait(ASK_AGAIN)
        self.lost = True
        raise Ignore(f"run {self.lease.run} has lost its lease")
