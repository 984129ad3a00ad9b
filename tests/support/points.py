"""Kill points: every boundary between two effects of a process on something outside of it has a name.

Between two such effects a process holds nothing but memory, so whoever kills it anywhere kills it at one of these
points. Imported by a worker (`include=["tests.support.points"]`) or a producer, this module wraps the effects from
outside: calls of the store, publishes, acknowledgements, results, signals, the hand-over to the pool, the body.

A point is `<process>:<before|after>:<effect>[:<n>]`: the process is `parent`, `child`, `sweep` (a thread of the
parent) or `producer`, and `n` counts the same effect within a story. A story is what happens to one journal. Its
points are traced, and a process that reaches an armed one records "killed" and kills itself, once.
"""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis
from celery import current_app
from celery.backends.base import Backend
from celery.backends.redis import RedisBackend
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.base import BasePool
from kombu import Message, Producer

from celery_coalesce import CoalescedTask, context, signals
from celery_coalesce.store.redis import RedisStore
from tests.support.journal import URL_VARIABLE, Journal, connect

#: What the points of a process that runs no body go by: set by the test to a story, one after the other.
SITE_VARIABLE = "TEST_POINTS_SITE"

#: Calls of the store that change nothing, or only say that a process is there.
IDLE = frozenset({"heartbeat", "overdue", "show", "keys", "constraints", "history"})

#: After these a process waits for another.
HANDED_ON = (["parent", "pool"], ["parent", "ack"], ["parent", "reject"])

_REACH = """
local story = ARGV[1]
if story == '' then story = redis.call('GET', 'points:site:' .. ARGV[2]) end
if not story then return {'', 0, '', 0} end
local effect, when, n = ARGV[3] .. ':' .. ARGV[4], ARGV[5], tonumber(ARGV[6])
if n == 0 then n = redis.call('HINCRBY', 'points:count:' .. story, effect, 1) end
local name = ARGV[3] .. ':' .. when .. ':' .. ARGV[4] .. (n > 1 and ':' .. n or '')
redis.call('RPUSH', 'points:trace:' .. story, ARGV[7] .. ' ' .. name)
return {story, n, name, redis.call('SREM', 'points:armed:' .. story, name)}
"""


class Points:
    """The points of one story, as its test sees them."""

    def __init__(self, journal: Journal) -> None:
        self._client = journal.client
        self._story = journal.name

    def arm(self, *names: str) -> None:
        """Have the process that reaches a point killed there, once."""
        if names:
            self._client.sadd(f"points:armed:{self._story}", *names)

    def missed(self) -> set[str]:
        """Return the armed points that nobody has reached."""
        missed: Any = self._client.smembers(f"points:armed:{self._story}")
        return set(missed)

    def tell_at(self, *sites: str) -> None:
        """Make what the processes of these sites do, besides running bodies, part of this story."""
        for site in sites:
            self._client.set(f"points:site:{site}", self._story)

    def trace(self, role: str) -> list[str]:
        """Return the points that one kind of process has reached, in their order.

        A point before an effect is left out where the same process came to it straight from the one after another: it
        is the same. After what a parent has handed on, it waits for others: there it is not.
        """
        entries: Any = self._client.lrange(f"points:trace:{self._story}", 0, -1)
        names: list[str] = []
        last = None
        for entry in entries:
            stretch, _, name = entry.partition(" ")
            if not name.startswith(f"{role}:"):
                continue
            follows = last is not None and last[0] == stretch and ":after:" in last[1]
            if last is not None and last[1].split(":")[0:3:2] in HANDED_ON:
                follows = False
            if not (":before:" in name and follows):
                names.append(name)
            last = (stretch, name)
        return names


# -- in the process ------------------------------------------------------------------------------------------------

_loaded_by = os.getpid()
#: A process that is no worker names its story itself.
_own: list[Journal] = []
_site = os.environ.get(SITE_VARIABLE, "")


@functools.cache
def _server() -> redis.Redis:
    return connect(os.environ[URL_VARIABLE])  # fork-safe: its pool compares process ids


def produce(journal: Journal) -> None:
    """Make this process a producer of a story."""
    _own[:] = [journal]


def publish_with(publish: Any) -> None:
    """Have messages published in another way."""
    _originals["publish"] = publish


def _where() -> tuple[str, str, str] | None:
    """Return the kind of this process, the story if it knows it, and what its effects follow one another in."""
    thread = threading.current_thread().name
    if _own:
        return None if thread.startswith("celery-coalesce-") else ("producer", _own[0].name, str(os.getpid()))
    if not _site or thread == "celery-coalesce-heartbeat":
        return None
    if thread == "celery-coalesce-sweep":
        return "sweep", "", str(os.getpid())
    if os.getpid() == _loaded_by:
        return "parent", "", str(os.getpid())
    task = current_app.current_worker_task
    if not isinstance(task, CoalescedTask) or not task.request.args:
        return None
    story, _, _short = str(task.request.args[0]).partition(":")
    return "child", story, f"{os.getpid()}.{task.request.id}.{task.request.retries}"


def _reach(when: str, effect: str, number: int) -> int:
    where = _where()
    if where is None:
        return 0
    role, story, stretch = where
    reply: Any = _server().eval(_REACH, 0, story, _site, role, effect, when, number, stretch)
    name, number, point, armed = reply
    if armed:
        journal = Journal(_server(), name)
        who = {"hostname": _site} if role in ("parent", "sweep") else {"pid": os.getpid()}
        journal.record("killed", point=point, **who)
        if role == "child":
            journal.record("gone", **who)  # of others whoever sees that their children are dead says so
        os.kill(os.getpid(), signal.SIGKILL)
    return int(number)


@contextmanager
def _effect(name: str) -> Iterator[None]:
    number = _reach("before", name, 0)
    yield
    _reach("after", name, number)


def _is_ours(task: str | None) -> bool:
    return isinstance(current_app.tasks.get(task), CoalescedTask)


def _call(self: RedisStore, script: str, keys: Sequence[str], *argv: Any) -> Any:
    if script in IDLE:
        return _originals["call"](self, script, keys, *argv)
    with _effect(script):
        return _originals["call"](self, script, keys, *argv)


def _call_at_once(self: RedisStore, calls: Sequence[tuple[Any, ...]]) -> Any:
    name = "trigger" if calls[0][0] == "publish" else calls[0][0]
    with _effect(f"{name}s"):
        return iter(list(_originals["_call_at_once"](self, calls)))


def _publish(self: Producer, *args: Any, **kwargs: Any) -> Any:
    task = (kwargs.get("headers") or {}).get("task")
    # An event, or an answer to a remote control command; or a message that is to be pushed is only made here.
    if task is None or "conn_or_acquire" in self.channel.__dict__:
        return _originals["publish"](self, *args, **kwargs)
    with _effect(f"publish.{task}"):
        return _originals["publish"](self, *args, **kwargs)


def _push(self: RedisStore, key: str, what: str) -> None:
    with _effect(f"publish.{json.loads(what)['headers']['task']}"):
        _originals["push"](self, key, what)


def _ack(self: Message, *args: Any, **kwargs: Any) -> Any:
    if not _is_ours(self.headers.get("task")):
        return _originals["ack"](self, *args, **kwargs)
    with _effect("ack"):
        return _originals["ack"](self, *args, **kwargs)


def _reject(self: Message, *args: Any, **kwargs: Any) -> Any:
    if not _is_ours(self.headers.get("task")):
        return _originals["reject"](self, *args, **kwargs)
    with _effect("reject"):
        return _originals["reject"](self, *args, **kwargs)


def _store_result(self: Backend, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
    with _effect(f"store.{state}"):
        return _originals["store_result"](self, task_id, result, state, *args, **kwargs)


def _chord_part(self: RedisBackend, request: Any, *args: Any, **kwargs: Any) -> Any:
    if not getattr(request, "chord", None):
        return _originals["on_chord_part_return"](self, request, *args, **kwargs)
    with _effect("chord"):
        return _originals["on_chord_part_return"](self, request, *args, **kwargs)


def _emit(signal: Any, *args: Any, **kwargs: Any) -> Any:
    with _effect(f"emit.{str(signal.name).removeprefix('coalesce_')}"):
        return _originals["emit"](signal, *args, **kwargs)


def _attempt(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _effect("body"):
        return _originals["_attempt"](self, *args, **kwargs)


def _pass_gate(self: Journal, gate: str, *args: Any, **kwargs: Any) -> Any:
    with _effect("gate"):
        return _originals["pass_gate"](self, gate, *args, **kwargs)


def _apply_async(self: BasePool, target: Any, args: Sequence[Any] = (), *more: Any, **options: Any) -> Any:
    if not _is_ours(args[0]):
        return _originals["apply_async"](self, target, args, *more, **options)
    with _effect("pool"):
        return _originals["apply_async"](self, target, args, *more, **options)


def _event_process_exit(self: AsynPool, hub: Any, proc: Any) -> None:
    # The pipe that tells of a child's death is closed before the child can be waited for; where Celery looks too early,
    # it looks again after five seconds (celery.concurrency.asynpool, 5.5-5.7). The tests have not got as many.
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, proc.pid, os.WEXITED | os.WNOWAIT)
    _originals["_event_process_exit"](self, hub, proc)


_originals: dict[str, Any] = {
    "call": RedisStore.call,
    "_call_at_once": RedisStore._call_at_once,
    "push": RedisStore.push,
    "publish": Producer.publish,
    "ack": Message.ack_log_error,
    "reject": Message.reject_log_error,
    "store_result": Backend.store_result,
    "on_chord_part_return": RedisBackend.on_chord_part_return,
    "emit": signals.emit,
    "_attempt": context.InlineRun._attempt,
    "pass_gate": Journal.pass_gate,
    "apply_async": BasePool.apply_async,
    "_event_process_exit": AsynPool._event_process_exit,
}


def install() -> None:
    """Wrap the effects of this process."""
    RedisStore.call = _call  # type: ignore[method-assign]
    RedisStore._call_at_once = _call_at_once  # type: ignore[method-assign]
    RedisStore.push = _push  # type: ignore[method-assign]
    # A body that begins late asks for its lease first: a point that comes and goes with the machine's load.
    context.FRESH_FOR = math.inf
    Producer.publish = _publish
    Message.ack_log_error = _ack
    Message.reject_log_error = _reject
    Backend.store_result = _store_result
    RedisBackend.on_chord_part_return = _chord_part
    signals.emit = _emit
    context.InlineRun._attempt = _attempt  # type: ignore[method-assign]
    Journal.pass_gate = _pass_gate  # type: ignore[method-assign]
    BasePool.apply_async = _apply_async
    AsynPool._event_process_exit = _event_process_exit


if _site:  # in a worker, which is told through its environment
    install()
