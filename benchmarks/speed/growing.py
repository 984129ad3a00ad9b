"""What there may be much of, and what a call costs beside it.

Costs are the server's own time, as its ``INFO commandstats`` counts it call by call: free of the client's noise. Every
size has a server of its own, filled once. The rounds go over all of them in turn, so that whatever else the machine
does meets every size alike; a cost is the median over all calls of its kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.speed.sites import Asked, Say, Site, policy
from celery_coalesce import Constraint
from celery_coalesce.records import Advance

ROUNDS = 15
#: Calls of each kind in a round.
CALLS = 20

SERIALIZE = policy(coalesce="serialize")
NEEDED = policy(coalesce_constraints=[Constraint("provider", limit=1)]).needs(("k",), {})


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
