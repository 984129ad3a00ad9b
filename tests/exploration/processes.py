"""The processes as step machines: the package's own Python, stopped before each thing that it does to the world.

A process is what it does (a function of this module), what it was given, and the answers that it has got so far. To
find out what it does next it is run from the start, each effect answered from that log; the first that has no answer
yet is its next step, and unwinds it. So a process that waits is a plain value: it can be copied, compared, and gone on
with in as many ways as there are answers.

Nothing of the package is rewritten here: producers call `apply_async`, messages come to the worker's own `Request`
and Celery's own tracer, whose signals report the end; the sweep is the presence's own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.trace import build_tracer
from celery.backends.base import BaseBackend
from celery.exceptions import Retry, WorkerLostError
from celery.worker import state as worker_state
from kombu.exceptions import OperationalError
from kombu.message import Message

from celery_coalesce import CoalescedTask
from celery_coalesce.broker import Broker
from celery_coalesce.engine import Engine
from celery_coalesce.keys import Names
from celery_coalesce.presence import WORKER_PRESENCE
from celery_coalesce.records import Push, Timing
from celery_coalesce.settings import Settings
from celery_coalesce.signals import EventBus, coalesce_drain
from celery_coalesce.transitions import Transitions
from celery_coalesce.worker.presence import WorkerPresence
from celery_coalesce.worker.request import CoalescedRequest
from tests.exploration.snapshots import QUEUE, pack

NAMES = Names("", "explored")

#: What a process does next: a word and what goes with it.
Effect = list[Any]
#: An answer that is raised in the process.
FAILS = "!"

#: What stands for a run's id in a message that is made before the run.
RUN = "the run's id"

#: What of a request is told twice, or by nobody looked at.
LEFT_OUT = ("args", "kwargs", "argsrepr", "kwargsrepr", "properties", "delivery_info", "reply_to", "correlation_id")

#: The patches that make a process depend on nothing but its log.
_MADE_UP = (
    "celery_coalesce.transitions.base.new_nonce",
    "celery_coalesce.transitions.running.new_nonce",
    "celery_coalesce.worker.request.new_nonce",
)
_IDS = ("celery_coalesce.calling.uuid", "celery_coalesce.worker.request.uuid")
_ETAS = ("celery_coalesce.dispatch.eta_header", "celery_coalesce.calling.eta_header")


class MadeUp(Exception):
    """What a body raises that is to fail."""


class Suspended(BaseException):
    """The process waits for an answer: unwinds it, through whatever it would do about an error."""


class Stage:
    """Where one process at a time is played."""

    def __init__(self) -> None:
        self._log: list[Any] = []
        self._next = 0
        self._wanted: Effect | None = None
        self.name = ""
        self.act = ""
        #: Where messages go that are made and not published.
        self.made: list[Any] | None = None
        self._made = itertools.count()
        #: What the process takes for the time, in seconds: it is only ever subtracted.
        self.clock = 0.0

    def play(self, act: Callable[..., Any], given: Sequence[Any], name: str, log: list[Any]) -> tuple[str, Any]:
        """Run a process to its next effect, or its end.

        Returns:
            ``wants`` and the effect, or ``ends`` and what it returns.
        """
        self._log, self._next, self._wanted = log, 0, None
        self.name, self._made, self.clock, self.made = name, itertools.count(), 0.0, None
        self.act = act.__name__
        try:
            ended = act(*given)
        except Suspended:
            return "wants", self._wanted
        if self._wanted is not None:
            return "wants", self._wanted
        return "ends", ended

    def effect(self, word: str, *what: Any) -> Any:
        """Do something to the world, and return the answer."""
        if self._wanted is None and self._next < len(self._log):
            answer = self._log[self._next]
            self._next += 1
            if answer == FAILS:
                raise OperationalError("made up: the broker is away")
            return answer
        if self._wanted is None:
            self._wanted = [word, *what]
        raise Suspended

    def made_up(self) -> str:
        """Return what no other call is known by."""
        return f"{self.name}.{next(self._made)}"


STAGE = Stage()


class EffectStore:
    """The store, as processes see it."""

    names = NAMES

    def call(self, script: str, keys: Sequence[str], *argv: Any) -> Any:
        return STAGE.effect("call", script, list(keys), list(argv))

    def call_many(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
        for name, keys, *argv in calls:
            yield self.call(name, keys, *argv)

    def members(self, key: str, most: int | None = None) -> list[str]:
        return list(STAGE.effect("members", key))

    def push(self, key: str, what: str) -> None:
        STAGE.effect("publish", *json.loads(what))

    def is_at(self, pool: Any) -> bool:
        return False

    def connect(self) -> None:
        """Nothing is connected to."""


class EffectBackend(BaseBackend):
    """The result backend, as processes see it."""

    persistent = True

    def _store_result(self, task_id: str, result: Any, state: str, *_: Any, **__: Any) -> None:
        STAGE.effect("store", task_id, state, json.dumps(result))

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        status, result = STAGE.effect("read", task_id)
        found: dict[str, Any] = self.meta_from_decoded(
            {"task_id": task_id, "status": status, "result": json.loads(result), "traceback": None}
        )
        return found


class StageBroker(Broker):
    """Has scripts push messages; remembers nothing, so that a process is what its log says."""

    def push_of(self, producer: Any, publish: Callable[[str], Any]) -> Push:
        """Return what publishing would put into the queue."""
        STAGE.made = []
        publish(RUN)
        [message], STAGE.made = STAGE.made, None
        before, _, after = json.dumps(message).partition(RUN)
        return Push(NAMES.meta.replace("meta", QUEUE), before, after)

    def was_busy(self, state: str) -> bool:
        """Return that it was not."""
        return False


def _publish(producer: Any, name: str, message: Any, **options: Any) -> None:
    headers, _, body, _ = message
    headers = {**headers, **(options.get("headers") or {})}
    eta = headers.pop("eta", None)
    delay = int(eta.removeprefix("in:")) if eta else 0
    kept = {field: headers[field] for field in ("id", "task", "retries", "root_id", "coalesce", "ignore_result")}
    args, kwargs, embedded = body
    body = [args, kwargs, {field: what for field, what in embedded.items() if what is not None}]
    told = [kept["id"], delay, json.dumps(kept, sort_keys=True), json.dumps(body, sort_keys=True)]
    if STAGE.made is None:
        STAGE.effect("publish", *told)
    else:
        STAGE.made.append(told)


@contextlib.contextmanager
def _producer(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(connection=SimpleNamespace(_reraise_as_library_errors=contextlib.nullcontext))


def _made_up_nonce() -> str:
    return STAGE.made_up()


def _made_up_id() -> str:
    return f"id-{STAGE.made_up()}"


def _relative_eta(delay: int) -> str:
    return f"in:{delay}"


@contextlib.contextmanager
def on_stage() -> Iterator[None]:
    """Take away from the package whatever would make two plays of the same log differ."""
    with contextlib.ExitStack() as stack:
        for name in _MADE_UP:
            stack.enter_context(mock.patch(name, _made_up_nonce))
        for name in _IDS:
            stack.enter_context(mock.patch(name, _made_up_id))
        for name in _ETAS:
            stack.enter_context(mock.patch(name, _relative_eta))
        for module in ("context", "worker.request"):
            clock = SimpleNamespace(monotonic=lambda: STAGE.clock)
            stack.enter_context(mock.patch(f"celery_coalesce.{module}.time", clock))

        # Somebody has to listen, for a drain to be announced.
        def heard(**_: Any) -> None:
            """It was taken out of the store by then, which is what counts."""

        def who() -> str:
            return f"{STAGE.act} {STAGE.name}"

        stack.enter_context(mock.patch("celery_coalesce.endings._this_process", who))
        coalesce_drain.connect(heard, weak=False, dispatch_uid="exploration")
        stack.callback(coalesce_drain.disconnect, dispatch_uid="exploration")
        yield


def make_app(options: dict[str, Any]) -> Any:
    """Return the task that is explored, of an app that has nothing but effects around it."""
    app = Celery("explored", broker="memory://", set_as_current=False)
    app.conf.update(coalesce_redis_url="redis://127.0.0.1:1/0", result_cache_max=-1, worker_hijack_root_logger=False)
    app.__dict__["amqp"] = app.amqp
    app.amqp.__dict__["send_task_message"] = _publish
    app.producer_or_acquire = _producer
    store = EffectStore()
    broker = StageBroker(store) if options.pop("shortcuts", False) else None
    engine = Engine(app, Settings.of(app), Transitions(store, Timing()), EventBus(app, False), broker)
    app.__dict__["_celery_coalesce_engine"] = engine

    def run(self: Any, value: int) -> int:
        ends = _body(self.request.coalesce_run.lease.run, self.request.retries, value)
        if ends == "retry":
            raise self.retry(countdown=5, max_retries=None)
        if ends == "fail":
            raise MadeUp(value)
        return value

    given = {name if name in ("coalesce", "acks_late") else f"coalesce_{name}": what for name, what in options.items()}
    given.update(base=CoalescedTask, name="explored", shared=False, backend=EffectBackend(app))
    task = app.task(run, bind=True, **given)
    app.finalize()
    task.__trace__ = build_tracer(task.name, task, app=app, hostname="w")
    return task


def _body(run: str, attempt: int, value: int) -> str:
    STAGE.effect("body begins", run, attempt, value)
    ends, lasted = STAGE.effect("body ends", run, attempt, value)
    STAGE.clock += lasted
    return str(ends)


class Acts:
    """What the processes do, with one task.

    Args:
        task: The task.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        self._app = task._get_app()
        self._played: dict[bytes, tuple[str, Any]] = {}
        self.plays = 0

    def play(self, act: str, given: Sequence[Any], name: str, log: list[Any]) -> tuple[str, Any]:
        """Return what a process does next; see :meth:`Stage.play`."""
        asked = pack([act, given, name, log])
        known = self._played.get(asked)
        if known is None:
            self.plays += 1
            known = self._played[asked] = STAGE.play(getattr(self, act), given, name, log)
        return known

    def producer(self, value: int, options: dict[str, Any]) -> list[str]:
        """A call: returns the ids under which its caller waits."""
        try:
            result = self._task.apply_async((value,), **options)
        except OperationalError:
            return []
        return [result.id]

    def worker(self, owner: str, headers: str, body: str) -> None:
        """A message in a worker's main process, from its receipt until it is done with."""
        app, task = self._app, self._task
        presence = self._presence(owner)
        held: list[float] = []
        timer = SimpleNamespace(call_after=lambda seconds, *_: held.append(seconds))
        qos = SimpleNamespace(increment_eventually=lambda: None, decrement_eventually=lambda: None)
        presence._worker.consumer = SimpleNamespace(timer=timer, qos=qos, pool=None, event_dispatcher=None)
        message = Message(
            body=body, headers=json.loads(headers), content_type="application/json", content_encoding="utf-8"
        )
        request = CoalescedRequest(
            message,
            app=app,
            task=task,
            hostname="w",
            on_ack=lambda *_: STAGE.effect("ack"),
            on_reject=lambda logger, errors, requeue: STAGE.effect("reject", bool(requeue)),
        )
        request._received = True
        worker_state.reserved_requests.add(request)
        while request.revoked():
            if not held:
                return
            STAGE.effect("hold", int(held.pop() * 1000))
        given = {field: what for field, what in request.request_dict.items() if field not in LEFT_OUT}
        dumped = json.dumps([given, request._payload[:2]], sort_keys=True)
        STAGE.effect("pool", dumped)
        request.on_accepted(None, 0.0)
        how, value = STAGE.effect("child")
        if how == "died":
            request.on_failure(_info(WorkerLostError("made up: the child was killed")))
        elif how == "SUCCESS":
            request.on_success((False, value, 0.0))
        else:
            request.on_success((True, _info(Retry() if how == "RETRY" else MadeUp(value)), 0.0))

    def child(self, owner: str, dumped: str) -> list[Any]:
        """A run in a pool child: returns how it ended for the parent."""
        self._presence(owner)
        request, (args, kwargs) = json.loads(dumped)
        request["is_eager"] = False
        retval, info, _, _ = self._task.__trace__(request["id"], args, kwargs, request)
        return ["SUCCESS", retval] if info is None else [info.state, args[0]]

    def sweep(self, owner: str) -> None:
        """One look of a worker's sweep."""
        self._presence(owner)._sweep()

    def beat(self, owner: str) -> None:
        """One heartbeat."""
        self._app.__dict__["_celery_coalesce_engine"].transitions.heartbeat(owner)

    def _presence(self, owner: str) -> WorkerPresence:
        worker: Any = SimpleNamespace(app=self._app, hostname="w", consumer=None)
        presence = WorkerPresence(worker)
        presence.owner = owner
        self._app.__dict__[WORKER_PRESENCE] = presence
        return presence


def _info(error: BaseException) -> Any:
    try:
        raise error
    except BaseException:
        return ExceptionInfo()
