"""A state server of its own, what processes ask of it, and what that costs it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import redis
from celery import Celery

from celery_coalesce.calls import encode
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.options import Need
from celery_coalesce.policy import Policy
from celery_coalesce.records import Accepted, Envelope, Finished, Lease, Trigger
from celery_coalesce.states import Answer
from celery_coalesce.store import MOST_AT_ONCE
from celery_coalesce.worker.presence import WorkerPresence
from tests.support.servers import RedisServer

Say = Callable[[str], None]
Asked = tuple[Policy, Trigger, None]

TASK = "scale"


def body(key: str) -> None:
    """Take what the triggers pass."""


def policy(**options: Any) -> Policy:
    return Policy.declare(TASK, body, False, {"coalesce_key": "<key>", **options})


QUEUE = policy()


class Site:
    """A state server of its own, and what processes ask of it."""

    def __init__(
        self, stack: ExitStack, *, broker: str = "memory://", lease: float = 30, redispatch: float = 60
    ) -> None:
        self.server = stack.enter_context(RedisServer())
        self.client: redis.Redis = stack.enter_context(self.server.client())
        self.app = Celery("scale", broker=broker, set_as_current=False)
        times = {"coalesce_lease": lease, "coalesce_redispatch_after": redispatch}
        self.app.conf.update(coalesce_redis_url=self.server.url(), **times)
        self.transitions = engine_of(self.app).transitions
        self._numbers = itertools.count()
        #: Microseconds of every call that counts, by what it did.
        self.spent: dict[str, list[int]] = defaultdict(list)

    def names(self, many: int) -> list[str]:
        """Return keys that nobody has used."""
        return [f"key:{next(self._numbers)}" for _ in range(many)]

    def asking(self, key: str, policy: Policy = QUEUE, *, follower: bytes = b"", needs: tuple[Need, ...] = ()) -> Asked:
        """Return a call as the engine takes it."""
        args = encode(((key,), {}), "json")
        trigger = Trigger(f"id-{next(self._numbers)}", key, args, follower=follower, needs=needs)
        return policy, trigger, None

    def fill(self, asked: Iterable[Asked]) -> list[Envelope]:
        """Accept many triggers, and return the messages of the runs that may go at once."""
        found, asked = [], iter(asked)
        while each := list(itertools.islice(asked, MOST_AT_ONCE)):
            for position, accepted in self.transitions.triggers(each):
                if isinstance(accepted, Accepted) and accepted.delay == 0:
                    found.append(self.message(each[position], accepted))
        return found

    def forget_batches(self) -> None:
        """Wait until a record need not remember the batch that it was filled with."""
        time.sleep(1.1 * self.transitions.timing.redispatch / 1000)

    def message(self, asked: Asked, accepted: Accepted) -> Envelope:
        state = state_id(TASK, asked[1].key)
        return Envelope(state, accepted.run, accepted.task_id, TASK, 0, 0, 0, b"", b"")

    def trigger(self, asked: Asked) -> Envelope:
        """Make a call, and return the message of the run that covers it."""
        accepted = self.transitions.trigger(*asked)
        assert isinstance(accepted, Accepted), accepted
        return self.message(asked, accepted)

    def start(self, message: Envelope, owner: str = "w/1/a", *, late: bool = False) -> Lease:
        """Bring a message to the gate, and return the lease."""
        claim = f"claim-{next(self._numbers)}"
        started = self.transitions.start(message, owner=owner, claim=claim, late=late, revoked=False)
        assert started.answer is Answer.RUNNING, started
        assert started.lease is not None
        return started.lease

    def finish(self, lease: Lease) -> Finished:
        """End a run without followers."""
        finished = self.transitions.finish(lease)
        assert isinstance(finished, Finished), finished
        return finished

    def worker(self, hostname: str) -> WorkerPresence:
        """Return a worker as the state server knows it; it consumes nothing."""
        worker: Any = SimpleNamespace(app=self.app, hostname=hostname)
        return WorkerPresence(worker)

    def measured(self, what: str, act: Callable[..., Any], *given: Any) -> Any:
        """Do one thing, note what it cost the server, and return its result."""
        before = self._used()
        result = act(*given)
        self.spent[what].append(self._used() - before)
        return result

    def _used(self) -> int:
        return sum(usec for _, usec in transitions_of(self.client))

    def costs(self) -> dict[str, float]:
        """Return what each kind of call costs, in microseconds."""
        return {what: round(statistics.median(spent), 1) for what, spent in self.spent.items()}


def transitions_of(client: Any) -> list[tuple[int, int]]:
    """Return how many transitions a server has run as scripts and as functions, and the microseconds that they took."""
    stats: Any = client.info("commandstats")
    found = [stats[name] for name in ("cmdstat_evalsha", "cmdstat_fcall") if name in stats]
    return [(int(each["calls"]), int(each["usec"])) for each in found]
