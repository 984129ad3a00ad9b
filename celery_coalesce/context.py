"""The run that a task's body is in: ``self.coalesce``."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from celery.exceptions import Ignore, TaskPredicate

from . import signals
from .errors import InvalidKey, LeaseLost, StoreUnavailable
from .keys import state_id
from .progress import PROGRESS, Progress
from .records import Cleared, Lease
from .setups import value_of
from .signals import EventBus
from .states import Mode
from .views import RunMeta

if TYPE_CHECKING:
    from celery.app.task import Context

    from .policy import Policy
    from .transitions import Transitions

__all__ = ["ATTRIBUTE", "InlineRun", "NextAttempt", "Run"]

logger = logging.getLogger("celery_coalesce")

#: Where a request keeps its run.
ATTRIBUTE = "coalesce_run"

#: A body that begins so many seconds after its lease was asked for, asks again first. It may have waited in a thread
#: pool's queue, or stood still; or be a message that the prefork pool has taken back from a child that died, and given
#: to another, though the first had ended the run (AsynPool.on_job_process_down, celery.concurrency.asynpool, 5.5-5.7).
FRESH_FOR = 0.1
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
    """``self.coalesce`` of a body that was called directly or eagerly, or is exempt: no lease, nothing to lose.

    Args:
        task: Its task.
        request: Its request.
        bus: Where its events go; nowhere, if not given.
    """

    def __init__(self, task: Any, request: Context, bus: EventBus | None = None) -> None:
        self.bus = bus or EventBus(task.app, enabled=False)
        #: ``coalesce_should_run`` had the body left out.
        self.skipped = False
        self._task = task
        self._policy: Policy = task.coalesce_policy
        self._request = request
        self._in_body = False

    @cached_property
    def meta(self) -> RunMeta:
        """The run's metadata. Made when it is first asked for, which most bodies never do."""
        policy, request = self._policy, self._request
        args, kwargs = request.args or (), request.kwargs or {}
        try:
            key, labels = policy.key(args, kwargs) or "", policy.labels_of(args, kwargs)
        except InvalidKey:
            # Exempt, or with a key of its own, the call needed none from its arguments.
            key, labels = "", {}
        return RunMeta(
            key=key,
            scope=policy.scope,
            type="task" if policy.whole_task else "key",
            name=policy.task,
            task_id=request.id or "",
            state_id=state_id(policy.scope, key),
            session_id=0,
            run_id=0,
            run_index=0,
            attempt=request.retries or 0,
            token=0,
            triggers=1,
            labels=labels,
        )

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

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def setup(self) -> Any:
        """What ``coalesce_setup`` returned in this process; ``None`` without that option.

        It is called once per process (a child of the prefork pool, or the worker itself), before the first run of any
        task that names it. A run that finds it raising fails, and the next one tries again.

        .. versionadded:: 0.1
        """
        if self._policy.setup is None:
            return None
        try:
            return value_of(self._policy.setup)
        except AttributeError as error:
            # From a property Python would take it for the attribute's own absence, and ask __getattr__.
            raise RuntimeError(f"{self._policy.task}: coalesce_setup raised {error!r}") from error

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self, name: str) -> None:
        """Say which of the task's ``coalesce_steps`` begins now.

        While the run is in a step its result has the state ``PROGRESS``, unless results are ignored, and ``step``,
        ``progress`` (per cent), ``done`` and ``left`` (names of steps) as its ``info``. The signal ``coalesce_step``
        and the event ``coalesce-step`` tell the same, and once more, with 100 per cent and no step, when the run has
        succeeded. The steps before the active one count whole, the active one half. Costs a round trip to the state
        server and one to the result backend; where the state server is away, the step goes unreported. A call that
        joined the run under a task id of its own has no progress; its result's ``run_task_id`` has.

        Args:
            name: The step.

        Raises:
            UnknownStep: The task declares no such step.
            LeaseLost: The run has lost its lease; nothing was stored or sent.

        .. versionadded:: 0.1
        """
        progress = Progress.at(self._policy.task, self._policy.steps, name)
        if not self._may_tell():
            return
        request = self._request
        if self._stored(request):
            self._task.backend.store_result(request.id, progress.as_dict(), PROGRESS, request=request)
        self._tell(progress)

    def complete_steps(self) -> None:
        """Tell that all steps are done, if the task has any."""
        if self._policy.steps:
            self._tell(Progress.complete(self._policy.steps))

    def _may_tell(self) -> bool:
        return True

    def _stored(self, request: Context) -> bool:
        """Return whether Celery stores results of this run while it goes on."""
        if request.called_directly or request.ignore_result:
            return False
        return not request.is_eager or bool(self._task.app.conf.task_store_eager_result)

    def _tell(self, progress: Progress) -> None:
        fields = progress.as_dict()
        signals.emit(signals.coalesce_step, self._task, self.bus, self.meta, shown=fields, **fields)

    # -- the body ----------------------------------------------------------------------------------------------------

    def execute(
        self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], calls_on: bool = False
    ) -> Any:
        """Run the body as the task's policies have it, and look at the lease before anything that follows from it.

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
            # The body has called itself, as a function.
            return body(*args, **kwargs)
        self._in_body = True
        try:
            value = self._attempt(body, args, kwargs)
        except Exception as error:
            self._failed(error, calls_on)
            raise
        finally:
            self._in_body = False
        self._succeeded(calls_on)
        return value

    def _failed(self, error: Exception, calls_on: bool) -> None:
        """Do what comes between the body's failure and whoever hears of it."""

    def _succeeded(self, calls_on: bool) -> None:
        """Do what comes between the body's end and whoever hears of it."""
        if not self.skipped:
            self.complete_steps()

    def _attempt(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Set the process up, ask whether the body shall run, and run it."""
        policy = self._policy
        if policy.setup is not None:
            value_of(policy.setup)
        if policy.should_run is not None and not self._should_run(policy.should_run, args, kwargs):
            self.skipped = True
            return None
        return body(*args, **kwargs)

    def _should_run(self, asked: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        # A call without a key is exempt: a plain Celery call.
        if not self.meta.key:
            return True
        # Bound first, so that the task's defaults count even where the function has none.
        parameters = self._policy.parameters
        args, kwargs = parameters.unbind(parameters.bind(args, kwargs))
        return bool(asked(*args, **kwargs))


class Run(InlineRun):
    """``self.coalesce`` of a body that a worker runs. Has every field of :class:`~celery_coalesce.RunMeta`.

    Args:
        task: Its task.
        request: Its request.
        bus: Where its events go.
        lease: The run's lease.
        transitions: The engine.
    """

    def __init__(self, task: Any, request: Context, bus: EventBus, lease: Lease, transitions: Transitions) -> None:
        super().__init__(task, request, bus)
        self.lease = lease
        self.transitions = transitions
        #: The lease was refused: nothing of this attempt may be stored, published or reported.
        self.lost = False
        #: What continues the run.
        self.next_attempt: NextAttempt | None = None
        #: Followers that were handed on to a replacement, and are not this attempt's to tell.
        self.handed_on: int | None = None
        self.traceback: str | None = None
        #: What is done about a failure before anybody can know of it, and what that has taken out of the queue.
        self.failing: Callable[[Exception], None] | None = None
        self.stopped: tuple[Cleared, ...] | None = None

    @cached_property
    def meta(self) -> RunMeta:
        """The run's metadata."""
        return RunMeta.of(self.lease)

    @property
    def _age(self) -> float:
        """Seconds since the lease was asked for."""
        return time.monotonic() - self.lease.leased_at

    def begin(self) -> bool:
        """Return whether the body may begin, as far as is known: not with a lease that was lost on the way to it."""
        if self._age >= FRESH_FOR:
            try:
                self.lost = not self.transitions.check(self.lease)
            except StoreUnavailable as error:
                # It is asked again before anything follows from the body.
                logger.info("Run %s begins unasked: %s", self.lease.run, error, extra={"action": "begins_unasked"})
        return not self.lost

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
        """Whether a newer trigger waits to which this run could leave its work. Asks the state server.

        One of the same task, under ``coalesce="queue"`` or ``"replace"``: a long body may end early then, and what it
        would still do, the next run does with newer arguments. Under ``"replace"`` it is stopped ``coalesce_grace``
        seconds later. Always false under ``"serialize"`` and ``"skip"``, where no other run does this one's work.

        Raises:
            LeaseLost: The run has lost its lease.
            StoreUnavailable: The state server can not be asked.

        .. versionadded:: 0.1
        """
        answer = None if self.lost else self.transitions.superseded(self.lease)
        if answer is None:
            self.check()
        return bool(answer)

    def _may_tell(self) -> bool:
        """Return whether a step may be reported: not in the key's name once that has gone on."""
        try:
            self.check()
        except StoreUnavailable as error:
            logger.warning(
                "A step of run %s of %s goes unreported: %s",
                self.lease.run,
                self.lease.task,
                error,
                extra={"action": "step_unreported", "run_id": self.lease.run, "task_id": self.lease.task_id},
            )
            return False
        return True

    def _attempt(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.lost:
            raise Ignore(f"run {self.lease.run} has lost its lease before it began")
        return super()._attempt(body, args, kwargs)

    def _failed(self, error: Exception, calls_on: bool) -> None:
        self._returned(calls_on)
        if self.lost:
            raise Ignore(str(error)) from error
        if self.failing is not None and not isinstance(error, TaskPredicate):
            self.failing(error)

    def _succeeded(self, calls_on: bool) -> None:
        self._returned(calls_on)

    def _returned(self, calls_on: bool) -> None:
        """Ask for the lease where it could have been lost, and say that the body has returned where that matters.

        A lease lasts as long as the presence that it hangs from, which was renewed when the lease was given: a
        shorter run can not have lost it. And only a ``skip`` trigger looks at whether a body has returned: one that
        comes from this run's callbacks, or from a caller that has seen the result of a single flight.
        """
        overdue = self._age >= self.transitions.timing.lease / 1000
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
