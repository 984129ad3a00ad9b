"""What workers ask while nothing is wrong, and what it costs to sweep what a dead one has left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.speed.pinging import pinged
from benchmarks.speed.sites import TASK, Say, Site, body, transitions_of
from celery_coalesce import CoalescedTask
from tests.support.process import wait_until
from tests.support.servers import RedisServer

#: Seconds for which workers are watched that have nothing to do, and their lease.
IDLE_FOR, IDLE_LEASE = 6, 3
#: Microseconds from which on a command of a sweep is noted by the server.
SLOW = 1000


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
