"""Mistakes that a script could have, and the smallest setup in which each is found.

An explorer that finds nothing proves something only if it would have found what it looks for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from celery_coalesce.store.scripts import SCRIPTS, script
from tests.exploration.bounds import Setup


@dataclass(frozen=True)
class Mutation:
    """A mistake: in every script that has the first text, it becomes the second.

    Args:
        name: What the script does wrong.
        old: The text.
        new: What takes its place.
        found: What the violation says.
        setup: Where it is found.
        only: The script, if not all that have the text.
    """

    name: str
    old: str
    new: str
    found: str
    setup: Setup = field(default_factory=Setup)
    only: str = ""

    def __call__(self, script: str, text: str) -> str:
        """Return a script's text with the mistake in it, if it is one of those."""
        if self.only and self.only != script:
            return text
        return text.replace(self.old, self.new)

    @property
    def changed(self) -> list[str]:
        """The scripts that it changes."""
        return [name for name in SCRIPTS if self(name, script(name).text) != script(name).text]


ONE_WORKER = Setup(workers=1)


def with_one(*kinds: str, **more: object) -> Setup:
    """Return a setup with one worker and one fault of some kinds."""
    return Setup(**{"workers": 1, "faults": 1, "kinds": kinds, **more})  # type: ignore[arg-type]


MUTATIONS = (
    Mutation(
        "the end of a run leaves what waits where it is",
        "  advance(head)\n  write_head(head)\n  return false",
        "  write_head(head)\n  return false",
        "G7: a run waits beside a free slot",
        ONE_WORKER,
    ),
    Mutation(
        "a started run takes further triggers",
        "  close(head, run)\n  if not run.index",
        "  if not run.index",
        "G2: a trigger was merged into a run that has begun",
        ONE_WORKER,
    ),
    Mutation(
        "the end of a run is anybody's to report",
        "  if run.token ~= asked.token then return {'lost'} end\n",
        "",
        "G1: finish was let through",
        with_one("worker stalls", options={"acks_late": True}),
        "finish",
    ),
    Mutation(
        "a run that runs is given to a second message",
        "    return {'duplicate'}\n  end\n  if run.attempt",
        "  end\n  if run.attempt",
        "the leases are not those of the running runs",
        with_one("message twice", workers=2),
    ),
    Mutation(
        "a run is dispatched without a timer",
        "  set_timer(run, run.patience and now + run.patience or lost_at(run))",
        "",
        "has no timer",
        ONE_WORKER,
    ),
    Mutation(
        "a run that is woken has no timer any more",
        "    set_timer(run, lost_at(run))\n",
        "    clear_timer(run)\n",
        "has no timer",
        with_one("message lost"),
    ),
    Mutation(
        "a drain is put aside twice",
        "ARGV[2]) end\n  else",
        "ARGV[2]) redis.call('ZADD', KEYS[11], 0, ' ' .. ARGV[2]) end\n  else",
        "G4: a drain is announced twice",
        ONE_WORKER,
    ),
    Mutation(
        "a drain is not put aside",
        "if asked.announce_in then",
        "if asked.outcome == 'lost' then",
        "G4: sessions",
        ONE_WORKER,
    ),
    Mutation(
        "a session that ends with a run that is taken back has no drain",
        "return {'ended', sent, put_aside(head)}",
        "return {'ended', sent, ''}",
        "G4: sessions",
        with_one("publish fails", options={"limit": 2}),
    ),
    Mutation(
        "a publish that failed takes the triggers with it that have joined",
        "run.triggers == asked.triggers and run.followers == asked.followers",
        "true",
        "G2: trigger",
        with_one("publish fails"),
    ),
    Mutation(
        "a lease is taken from whoever lives",
        "  if expiry and tonumber(expiry) > now then return {'alive'} end\n",
        "",
        "G1: a body runs without a lease",
        with_one("worker stalls"),
    ),
    Mutation(
        "a call that is repeated is a new one",
        "if again then return again, true end\n  local done",
        "local done",
        "accepted twice",
        with_one("reply lost", options={"coalesce": "serialize"}),
    ),
    Mutation(
        "a lost run stays with the dead",
        "  run.owner, run.token, run.claim, run.returned = asked.sweeper, mint(), nil, true\n",
        "  run.returned = true\n",
        "the leases are not those of the running runs",
        with_one("worker dies"),
    ),
    Mutation(
        "runs start in the opposite order",
        "redis.call('ZADD', wait, acceptance(run), run.id)",
        "redis.call('ZADD', wait, -tonumber(acceptance(run)), run.id)",
        "G5",
        Setup(options={"coalesce": "serialize"}, producers=(2, 1), workers=1),
    ),
    Mutation(
        "the later call's arguments are dropped",
        "set('args:' .. run.id, args)\n    run.version",
        "run.version",
        "G2: the run sees",
        ONE_WORKER,
    ),
    Mutation(
        "everybody who waits is let in",
        "  return count < limit\n",
        "  return true\n",
        "G1: there are more active runs than slots",
        ONE_WORKER,
    ),
    Mutation(
        "a run that has ended leaves its timer",
        "  clear_timer(run)\n  redis.call('ZREM', wait, run.id)\nend",
        "  redis.call('ZREM', wait, run.id)\nend",
        "there is a timer of a run that needs none",
        with_one("publish fails"),
    ),
)

_BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def _outside(name: str, found: str, setup: Setup) -> Mutation:
    """Return a mistake that is to be found by what it does to others, the record's own invariants left aside."""
    return replace(_BY_NAME[name], name=f"{name}, from outside", found=found, setup=replace(setup, record=False))


FROM_OUTSIDE = (
    _outside("the end of a run leaves what waits where it is", "G2: nobody covers", ONE_WORKER),
    _outside("everybody who waits is let in", "G1: 2 bodies run at once", Setup()),
    _outside(
        "a run that runs is given to a second message", "G1: a body runs without", with_one("message twice", workers=2)
    ),
    _outside("a run is dispatched without a timer", "G2: nobody covers", with_one("producer dies")),
    _outside("a run that is woken has no timer any more", "G2: nobody covers", with_one("message lost", faults=2)),
    _outside("a lost run stays with the dead", "G2: nobody covers", with_one("worker dies", "sweeper dies", faults=2)),
)
