"""``CoalescedTask``: the base class of a task whose calls coalesce by key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.app.task import Context
from celery.exceptions import Ignore

from . import replacements
from .calling_task import CallingTask
from .calls import HEADER, is_rpc
from .context import ATTRIBUTE, InlineRun, NextAttempt, Run
from .dispatch import publish_all
from .endings import tell_cleared
from .engine import engine_of
from .errors import CoalesceError, OptionError, StoreUnavailable, Superseded
from .install import install
from .policy import Policy
from .records import Lease
from .reports import continue_run
from .result import CoalescedResult

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

__all__ = ["CoalescedTask"]

OURS = "celery_coalesce.worker.request:CoalescedRequest"


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``__call__`` that looks at the run's lease once the body has returned."""

    def guard(self: CoalescedTask, *args: Any, **kwargs: Any) -> Any:
        request = self.request
        run = request.__dict__.get(ATTRIBUTE)
        if run is None and request.is_eager:
            run = self._eager_run(request)
        if run is None or request.called_directly:
            return call(self, *args, **kwargs)
        calls_on = bool(request.callbacks or request.errbacks or request.chain or request.chord)
        return run.execute(partial(call, self), args, kwargs, calls_on)

    guard.__coalesce_guard__ = True  # type: ignore[attr-defined]
    return guard


def _as_celery_calls(self: CoalescedTask, *args: Any, **kwargs: Any) -> Any:
    """Call the body as Celery does.

    Looked up when it is called: in a worker Celery puts another ``Task.__call__`` in the place of its own, which runs
    the body in the request that is there, and not in a copy (_install_stack_protection, celery.app.trace, 5.5-5.7).
    """
    return Task.__call__(self, *args, **kwargs)


class CoalescedTask(CallingTask):
    """A task whose calls for one key collapse into one run now and at most one follow-up, and never overlap.

    ::

        @app.task(base=CoalescedTask, coalesce_key="org:<org_id>")
        def process(org_id): ...

    The options, all validated when the task is bound to its app:

    Attributes:
        coalesce_key: A template over the task's parameters, or a callable with the task's own signature that returns
            the key, or ``None`` for a call that is exempt. Unset: the whole task is one key.
        coalesce_scope: What keys are unique in; the task's name unless tasks share one.
        coalesce: ``"queue"``, ``"skip"``, ``"serialize"`` or ``"replace"``. In a body, ``self.coalesce`` is the run.
        coalesce_max_queued: How many runs of a key may wait.
        coalesce_overflow: ``"merge"`` into the last of these, or ``"reject"``.
        coalesce_args: ``"latest"``, ``"first"`` or ``merge(earlier, later)`` over bound arguments.
        coalesce_limit: How many runs of a key may go on at once.
        coalesce_delay: Debounce: seconds of quiet before a run starts.
        coalesce_max_delay: Seconds from its first trigger after which it starts at the latest.
        coalesce_cooldown: Least seconds from the end of a run to the start of the key's next.
        coalesce_constraints: A :class:`~celery_coalesce.Constraint`, or a list of them.
        coalesce_once: For how many seconds a success counts for further triggers; ``True``: until it is cleared.
        coalesce_should_run: A function with the task's own signature, asked right before the body.
        coalesce_on_error: ``"continue"`` or ``"stop"``: whether a failure ends what waits behind it.
        coalesce_on_retry: ``"hold"``, ``"release"`` or ``"merge"``: what becomes of the key until the retry.
        coalesce_grace: Seconds after which a run that is replaced is terminated; ``None``: never.
        coalesce_labels: Templates by name, which travel with events.
        coalesce_steps: Weights by the name of a step, in their order.
        coalesce_setup: A function without arguments, called once per worker process; its value is every run's.

    .. versionadded:: 0.1
    """

    Request = OURS

    #: What the task declared; ``None`` for Celery's own tasks under ``task_cls=CoalescedTask``.
    coalesce_policy: Policy | None = None

    #: Why the task was refused. Celery registers a task before it is bound: one that was refused must not run as a
    #: plain one.
    coalesce_refused: OptionError | None = None

    # -- declaring ---------------------------------------------------------------------------------------------------

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Bind the task to its app, validate its options, and install what workers need.

        Raises:
            OptionError: An option is unknown, bad, or contradicts another.
        """
        bound = super().bind(app)
        if cls.name is not None:
            try:
                cls._bind_policy()
            except OptionError as error:
                cls.coalesce_refused = error
                raise
            install(app)
        return bound

    @classmethod
    def _bind_policy(cls) -> None:
        options = cls._declared()
        name = str(cls.name)
        if name.startswith("celery.") and not options:
            cls.coalesce_policy = None
        else:
            run = inspect.getattr_static(cls, "run")
            static = isinstance(run, staticmethod)
            cls.coalesce_policy = Policy.declare(name, run.__func__ if static else run, not static, options)
        cls._refuse_other_request()
        if not getattr(cls.__call__, "__coalesce_guard__", False):
            # A subclass overrides __call__, perhaps without super(): the guard goes around it.
            cls.__call__ = _guarded(cls.__call__)  # type: ignore[method-assign]

    @classmethod
    def _declared(cls) -> dict[str, Any]:
        """Take the options out of the class's attributes: ``self.coalesce`` is the run, not the option."""
        kept: dict[str, Any] | None = cls.__dict__.get("_coalesce_declared")
        if kept is not None:
            return kept
        options: dict[str, Any] = {}
        own = set(CoalescedTask.__dict__)
        for ancestor in reversed(cls.__mro__):
            if issubclass(CoalescedTask, ancestor):
                continue
            for name, value in ancestor.__dict__.items():
                if name == "coalesce" and isinstance(value, property):
                    # An ancestor that was bound itself: what it declared is kept beside.
                    options.update(ancestor.__dict__.get("_coalesce_declared") or {})
                elif name == "coalesce" or (name.startswith("coalesce_") and name not in own):
                    options[name] = value.__func__ if isinstance(value, staticmethod) else value
        cls._coalesce_declared = options
        cls.coalesce = CoalescedTask.__dict__["coalesce"]  # type: ignore[method-assign]
        return options

    @classmethod
    def _refuse_other_request(cls) -> None:
        if isinstance(cls.Request, str):
            if cls.Request == OURS:
                return
        else:
            from .worker.request import CoalescedRequest

            if issubclass(cls.Request, CoalescedRequest):
                return
        raise OptionError(
            str(cls.name),
            "Request",
            cls.Request,
            "takes the gate away",
            "derive it from celery_coalesce.worker.request.CoalescedRequest",
        )

    # -- running -----------------------------------------------------------------------------------------------------

    @property
    def coalesce(self) -> InlineRun:
        """The run that the body is in: every field of :class:`~celery_coalesce.RunMeta`, and what it can do.

        That is ``check()``, ``superseded``, ``step()`` and ``setup``.
        """
        run: InlineRun | None = self.request.__dict__.get(ATTRIBUTE)
        if run is None:
            # Celery's own tasks have none.
            self._policy()
            run = InlineRun(self, self.request)
        return run

    def _eager_run(self, request: Context) -> InlineRun | None:
        """Return the run of an eager call whose policies have a say in it, so that tests see what they do."""
        policy = self.coalesce_policy
        if policy is None or not (policy.should_run or policy.steps or policy.setup):
            return None
        run = request.__dict__[ATTRIBUTE] = InlineRun(self, request)
        return run

    def _policy(self) -> Policy:
        self._get_app()
        if self.coalesce_refused is not None:
            raise self.coalesce_refused
        if self.coalesce_policy is None:
            raise CoalesceError(f"{self.name} does not coalesce: it is one of Celery's own tasks")
        return self.coalesce_policy

    def _own_run(self) -> Run | None:
        """Return the run that this very call is made from, if it is made from the body of this task."""
        run = self.request.__dict__.get(ATTRIBUTE)
        return run if isinstance(run, Run) else None

    __call__ = _guarded(_as_celery_calls)

    def on_replace(self, sig: Signature) -> Any:
        """Send the task that replaces this one once this attempt has ended.

        A coalesced task of the same key takes over the run. For anything else the key goes on, and the run's
        followers are completed by the replacement.
        """
        run = self._own_run()
        if run is None or self.request.is_eager:
            return super().on_replace(sig)
        if self._takes_over(run, sig):
            # The caller's own reply queue, for rpc://: Celery would give the replacement the worker's.
            options = {**sig.options, "reply_to": self.request.reply_to}
            run.next_attempt = NextAttempt(sig.task, sig.args, sig.kwargs, options)
            raise Ignore("Replaced by the same key's task, once this attempt has ended")
        followers = run.transitions.followers(run.lease)
        if followers is None:
            run.lost = True
            raise Ignore("The lease was lost")
        run.handed_on = len(followers)
        if is_rpc(self._get_app()):
            sig.set(reply_to=self.request.reply_to)
        if followers:
            replacements.complete_with(run.bus, sig, followers)
        return super().on_replace(sig)

    def retry(self, args: Any = None, kwargs: Any = None, exc: Any = None, *more: Any, **options: Any) -> Any:
        """Retry, as ``celery.app.task.Task.retry``; a run that is superseded ends instead.

        ``autoretry_for`` calls this with whatever the body has raised.
        """
        if isinstance(exc, Superseded):
            raise exc
        return super().retry(args, kwargs, exc, *more, **options)

    def _arguments(self) -> tuple[Sequence[Any], Mapping[str, Any]]:
        return self.request.args or (), self.request.kwargs or {}

    def _takes_over(self, run: Run, sig: Signature) -> bool:
        task = self._get_app().tasks.get(sig.task)
        if not isinstance(task, CoalescedTask) or task.coalesce_policy is None:
            return False
        policy = task.coalesce_policy
        if policy.scope != run.lease.scope or set(sig.options) & {"coalesce_key", "coalesce"}:
            return False
        own = self._policy()
        # The slots that the run has are all that it keeps: who needs others waits for them, as a call of its own.
        if policy.limit != own.limit or policy.needs(sig.args, sig.kwargs) != own.needs(*self._arguments()):
            return False
        return policy.key(sig.args, sig.kwargs) == run.lease.key

    # -- calling -----------------------------------------------------------------------------------------------------

    def AsyncResult(self, task_id: str, **kwargs: Any) -> CoalescedResult:  # noqa: N802 - Celery's name
        """Return the result with a task id."""
        return CoalescedResult(task_id, backend=self.backend, task_name=self.name, app=self._get_app(), **kwargs)

    def _continues(
        self,
        task_id: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> bool:
        """Keep back a retry of a run, which Celery would send before the attempt has ended.

        ``Task.retry`` and, after a lost worker, ``Request._retry_worker_lost`` (celery.worker.request, 5.7) come
        through ``apply_async`` with the same task id and a higher count of retries.
        """
        if not options.get("retries"):
            return False
        attempt = NextAttempt(str(self.name), args or (), kwargs or {}, options)
        run = self._own_run()
        if run is not None and self.request.id == task_id:
            run.next_attempt = attempt
            return True
        lease = Lease.from_header((options.get("headers") or {}).get(HEADER) or {})
        if lease is None or lease.task_id != task_id:
            return False
        # The process that ran it is gone, and with it the attempt.
        if not continue_run(engine_of(self._get_app()), lease, attempt):
            raise StoreUnavailable(f"run {lease.run} has lost its lease, and is not retried")
        return True

    # -- operating ---------------------------------------------------------------------------------------------------

    def clear_key(self, *args: Any, **kwargs: Any) -> int:
        """Forget what is pending of the key that a call with these arguments has.

        A run in progress keeps its slot until it ends. The results of what was pending become ``REVOKED``.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            How many runs were forgotten.

        Raises:
            InvalidKey: The call has no key.
            StoreUnavailable: The state server can not be reached.

        .. versionadded:: 0.1
        """
        policy = self._policy()
        key = policy.key(args, kwargs)
        if key is None:
            return 0
        engine = engine_of(self._get_app())
        cleared = engine.transitions.clear(policy.scope, key, str(self.name), forget=True)
        publish_all(engine, cleared.sent)
        for run in cleared.told_here:
            tell_cleared(engine, run, engine.producer_bus)
        return cleared.count
