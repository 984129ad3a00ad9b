"""Whether a cost grows: with keys, pending runs, followers, workers and waiters; and what a heartbeat and a sweep cost.

Costs are the server's own time, as its ``INFO commandstats`` counts it call by call: free of the client's noise. Every
size has a server of its own, filled once. The rounds go over all of them in turn, so that whatever else the machine
does meets every size alike; a cost is the median over all calls of its kind.
"""

from __future__ import annotations

import itertools
import json
import logging
import select
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import redis
from celery import Celery

from celery_coalesce import CoalescedTask, Constraint
from celery_coalesce.calls import encode
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from celery_coalesce.options import Need
from celery_coalesce.policy import Policy
from celery_coalesce.records import Accepted, Advance, Envelope, Finished, Lease, Trigger
from celery_coalesce.states import Answer
from celery_coalesce.store import MOST_AT_ONCE
from celery_coalesce.worker.presence import WorkerPresence
from tests.support.process import wait_until
from tests.support.servers import RedisServer

Say = Callable[[str], None]
Asked = tuple[Policy, Trigger, None]

TASK = "scale"
ROUNDS = 15
#: Calls of each kind in a round.
CALLS = 20
WORKERS = [1, 10, 50]
#: Seconds for which workers are watched that have nothing to do, and their lease.
IDLE_FOR, IDLE_LEASE = 6, 3
#: Microseconds from which on a command of a sweep is noted by the server.
SLOW = 1000


def body(key: str) -> None:
    """Take what the triggers pass."""


def policy(**options: Any) -> Policy:
    return Policy.declare(TASK, body, False, {"coalesce_key": "<key>", **options})


QUEUE, SERIALIZE = policy(), policy(coalesce="serialize")
NEEDED = policy(coalesce_constraints=[Constraint("provider", limit=1)]).needs(("k",), {})


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


class Growing:
    """Something that there may be much of: how it is set up, and a round of calls that leaves as much of it."""

    #: What it is called in the results, what its sizes count, and the figure's title.
    name: str
    label: str
    title: str
    #: Seconds after which a message counts as lost, and for which a batch is remembered: a minute in production.
    redispatch = 60.0

    def __init__(self, site: Site, size: int) -> None:
        self.site = site
        self.size = size
        self.set_up()

    def set_up(self) -> None:
        """Make as much of it as there is to be."""

    def round(self) -> None:
        """Make some calls of each kind."""
        raise NotImplementedError

    def on_fresh_keys(self, owners: Sequence[str] = ("w/1/a",)) -> None:
        """Trigger, coalesce, start and finish on keys of their own."""
        site, names = self.site, self.site.names(CALLS)
        messages = [site.measured("fresh trigger", site.trigger, site.asking(name)) for name in names]
        for name in names:
            site.measured("coalescing trigger", site.trigger, site.asking(name))
        owner = itertools.cycle(owners)
        leases = [site.measured("start", site.start, message, next(owner)) for message in messages]
        for lease in leases:
            site.measured("finish", site.finish, lease)
        for _ in range(CALLS):
            site.measured("heartbeat", site.transitions.heartbeat, next(owner))


class Keys(Growing):
    name, label, title = "keys", "other keys pending", "Cost by the number of keys pending"

    def set_up(self) -> None:
        self.site.fill(self.site.asking(name) for name in self.site.names(self.size))

    def round(self) -> None:
        self.on_fresh_keys()


class Workers(Growing):
    name, label, title = "workers", "workers present", "Cost by the number of workers"

    def set_up(self) -> None:
        self._owners = [f"w{number}/1/a" for number in range(self.size)]

    def round(self) -> None:
        for owner in self._owners:
            self.site.transitions.heartbeat(owner)
        self.on_fresh_keys(self._owners)


class Pending(Growing):
    name, label, title = "pending", "pending runs of the key", 'Cost by the pending runs of one key ("serialize")'
    redispatch = 1.0

    def set_up(self) -> None:
        calls = (self.site.asking("k", SERIALIZE) for _ in range(self.size + 1))
        (self._next,) = self.site.fill(calls)
        self.site.forget_batches()

    def round(self) -> None:
        site = self.site
        # Behind all others, where a call of the other mode finds it.
        site.trigger(site.asking("k"))
        for _ in range(CALLS):
            site.measured("coalescing trigger", site.trigger, site.asking("k"))
        for _ in range(CALLS):
            site.measured("fresh trigger", site.trigger, site.asking("k", SERIALIZE))
            self._go_on()
        # It leaves as many as it found.
        self._go_on()

    def _go_on(self) -> None:
        lease = self.site.measured("start", self.site.start, self._next)
        (self._next,) = self.site.measured("finish", self.site.finish, lease).sent


class Followed(Growing):
    name, label, title = "followers", "followers of the run", "Cost by the followers of a run"
    redispatch = 1.0

    def set_up(self) -> None:
        site = self.site
        # Where a follower more counts, each call finds a run that has had none of the others.
        names = site.names(CALLS * (1 + ROUNDS) if self.size < CALLS else 1)
        messages = site.fill(site.asking(name) for name in names)
        # A record remembers the last calls: those of few followers as many as those of many.
        site.fill(site.asking(name) for name in names for _ in range(8))
        site.fill(self._following(name) for name in names for _ in range(self.size))
        site.forget_batches()
        site.fill(site.asking(name) for name in names)
        for message in messages:
            site.transitions.requeue(site.start(message))
        self._runs = itertools.cycle(zip(names, messages, strict=True))

    def _following(self, name: str) -> Asked:
        return self.site.asking(name, follower=b"a caller that has an id, callbacks and a chain of its own")

    def round(self) -> None:
        site = self.site
        for name, message in itertools.islice(self._runs, CALLS):
            site.measured("coalescing trigger", site.trigger, self._following(name))
            lease = site.measured("start", site.start, message)
            site.transitions.requeue(lease)


class Waiters(Growing):
    name, label, title = "waiters", "runs in the constraint's line", "Cost by the waiters of a constraint"

    def set_up(self) -> None:
        names = self.site.names(self.size + 1)
        (message,) = self.site.fill(self._needing(name) for name in names)
        self._lease = self.site.start(message)

    def _needing(self, name: str) -> Asked:
        return self.site.asking(name, needs=NEEDED)

    def round(self) -> None:
        site = self.site
        for name in site.names(CALLS):
            site.measured("fresh trigger", site.trigger, self._needing(name))
            site.measured("coalescing trigger", site.trigger, self._needing(name))
            (nudged,) = site.measured("finish", site.finish, self._lease).sent
            assert isinstance(nudged, Advance)
            behind, message = site.measured("advance", site.transitions.advance, nudged.state)
            # Whoever has become the first in line is looked at as well, and finds no slot.
            assert not site.measured("advance, in vain", site.transitions.advance, behind.state)
            self._lease = site.measured("start", site.start, message)


def grown(kind: type[Growing], sizes: Sequence[int], say: Say) -> dict[str, Any]:
    """Measure one kind of growing at several sizes."""
    with ExitStack() as stack:
        found = []
        for size in sizes:
            found.append(kind(Site(stack, redispatch=kind.redispatch), size))
            say(f"{kind.name}: {size} are there")
        for number in range(1 + ROUNDS):
            for each in found:
                each.round()
                if number == 0:
                    # It has made the scripts known.
                    each.site.spent.clear()
        costs = [each.site.costs() for each in found]
    series = {what: [cost[what] for cost in costs] for what in costs[0]}
    ratios = {what: round(values[-1] / values[0], 2) for what, values in series.items()}
    for what, values in series.items():
        say(f"{kind.name}: {what}: {', '.join(f'{value:.0f}' for value in values)} us, x {ratios[what]:.2f}")
    shown = {"title": kind.title, "xlabel": kind.label, "ylabel": "us on the server"}
    return {"x": list(sizes), "series": series, "ratios": ratios, **shown}


def counted(site: Site) -> Counter[str]:
    """Return a count of what is asked of a site's store from now on, by name."""
    asked: Counter[str] = Counter()
    store: Any = site.transitions.store

    def counting(ask: Callable[..., Any], name: str | None = None) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            asked[name or given[0]] += 1
            return ask(*given)

        return count

    store.call, store.members = counting(store.call), counting(store.members, "held")
    return asked


def idle(workers: int, say: Say) -> dict[str, float]:
    """Return what a worker asks per heartbeat while nothing is wrong, by name."""
    with ExitStack() as stack:
        site = Site(stack, lease=IDLE_LEASE)
        asked = counted(site)
        for number in range(workers):
            presence = site.worker(f"w{number}")
            stack.callback(presence.end)
            presence.begin()
        time.sleep(1)
        asked.clear()
        time.sleep(IDLE_FOR)
        beats = workers * IDLE_FOR * 1000 / site.transitions.timing.heartbeat
        found = {name: round(count / beats, 2) for name, count in sorted(asked.items())}
    say(f"idle: {workers} workers: per heartbeat and worker {found}")
    return found


def sweep(leases: int, *, late: bool, say: Say) -> dict[str, Any]:
    """Have the leases of a dead worker swept, as a worker's own threads do it.

    Args:
        leases: How many there are.
        late: Whether the task is acknowledged late: runs are dispatched again. Else they end as lost.
        say: Told how it goes.
    """
    with ExitStack() as stack:
        broker, bystander = stack.enter_context(RedisServer()), stack.enter_context(RedisServer())
        site = Site(stack, broker=broker.url(1), lease=1)
        site.app.conf.update(result_backend=broker.url(2), task_acks_late=late)
        site.app.task(name=TASK, base=CoalescedTask, coalesce_key="<key>", shared=False)(body)
        messages = site.fill(site.asking(name) for name in site.names(leases))
        for message in messages:
            site.start(message, "dead/1/a", late=late)
        say(f"sweep: {leases} leases are there")
        client, held = site.client, site.transitions.store.names.held("dead/1/a")
        wait_until(lambda: "dead/1/a" in site.transitions.overdue().processes, 10, "its presence does not run out")
        client.config_set("slowlog-log-slower-than", SLOW, "slowlog-max-len", 100_000)
        client.slowlog_reset()
        client.config_resetstat()
        sweeper = site.worker("sweeper")
        with pinged({"state": site.server.url(), "idle": bystander.url()}) as pings:
            began = time.monotonic()
            sweeper.begin()
            try:
                wait_until(lambda: not client.exists(held), 60 + leases / 50, "the leases are not swept")
                took = time.monotonic() - began
            finally:
                sweeper.end()
        spent = transitions_of(client)
        slow: Any = client.slowlog_get(100_000)
    found = {
        "leases": leases,
        "leases_per_second": round(leases / took),
        "script_us": round(sum(usec for _, usec in spent) / sum(calls for calls, _ in spent), 1),
        "slower_than_1_ms": len(slow),
        "longest_command_us": max((entry["duration"] for entry in slow), default=None),
        "ping_us": pings,
    }
    say(f"sweep: {'dispatched again' if late else 'ended as lost'}: {found}")
    return found


@contextmanager
def pinged(urls: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Have another process ask servers for a PING in turn; filled at the end with how long they took."""
    found: dict[str, Any] = {}
    command = [sys.executable, "-m", "benchmarks.speed.scale", json.dumps(urls)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield found
            found |= json.loads(process.communicate(timeout=30)[0])
        finally:
            process.kill()


def ping(urls: dict[str, str]) -> None:
    """Ask servers for a PING in turn until the standard input is closed, and print what it took in microseconds."""
    clients = {name: redis.Redis.from_url(url) for name, url in urls.items()}
    taken: dict[str, list[float]] = {name: [] for name in clients}
    for client in clients.values():
        client.ping()
    print("ready", flush=True)
    for _ in range(5_000_000):
        if select.select([sys.stdin], [], [], 0.0005)[0]:
            break
        for name, client in clients.items():
            began = time.perf_counter()
            client.ping()
            taken[name].append((time.perf_counter() - began) * 1e6)
    found = {}
    for name, times in taken.items():
        cut = statistics.quantiles(times, n=1000)
        found[name] = {"median": round(cut[499]), "p99": round(cut[989]), "worst": round(max(times))}
    print(json.dumps(found))


def measure(say: Say, *, most_keys: int = 10**5, most_leases: int = 10**4) -> dict[str, Any]:
    """Measure what should not grow.

    Args:
        say: Told how it goes.
        most_keys: The largest number of keys, and, up to 100,000, of anything else. A million takes minutes.
        most_leases: How many leases are swept.

    Returns:
        Figures by name, each with ``x``, ``series``, ``ratios`` of the last to the first, and what is written at them;
        and ``idle`` and ``sweep``, which are numbers.
    """
    sizes = [1, *(10**power for power in range(3, 7) if 10**power <= most_keys)]
    fewer = [size for size in sizes if size <= 10**5]
    kinds = [(Keys, sizes), (Pending, fewer), (Followed, fewer), (Workers, WORKERS), (Waiters, fewer)]
    found: dict[str, Any] = {kind.name: grown(kind, given, say) for kind, given in kinds}
    logger = logging.getLogger("celery_coalesce")
    level = logger.level
    # A line for each lost run is what an operator wants, and not what is measured.
    logger.setLevel(logging.ERROR)
    try:
        found["idle"] = {"workers": WORKERS, "per_heartbeat": [idle(workers, say) for workers in WORKERS]}
        found["sweep"] = {
            "ended as lost": sweep(most_leases, late=False, say=say),
            "dispatched again": sweep(most_leases, late=True, say=say),
        }
    finally:
        logger.setLevel(level)
    return found


if __name__ == "__main__":
    ping(json.loads(sys.argv[1]))
