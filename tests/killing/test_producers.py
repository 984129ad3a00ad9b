"""A producer, or who holds a key, is killed at each of its points: what was accepted runs, nothing is stuck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.killing.producing import Producers
from tests.killing.stories import BOUND
from tests.support.app import HarnessApp
from tests.support.journal import Event, Journal, assert_no_overlap, connect
from tests.support.points import Points
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

#: By the call: the points before its trigger was accepted (or after it was taken back), and those from then on.
POINTS = {
    "fresh": ("before:publish", "after:publish after:emit.trigger"),
    "published": ("before:trigger", "after:trigger after:publish.queue after:emit.trigger"),
    "joining": ("before:publish", "after:publish after:emit.trigger"),
    "unpublished": ("before:trigger after:rollback", "after:trigger before:rollback"),
    "batch": (
        "before:triggers",
        "after:triggers after:emit.trigger after:emit.trigger:2 after:emit.trigger:3",
    ),
    "delayed": ("before:trigger", "after:trigger after:publish.queue after:emit.trigger"),
    "hold": (
        """
        before:trigger after:trigger after:start after:start:2 after:gate after:finish after:drain after:emit.drain
        """,
        "",
    ),
}
ALL = [(call, f"producer:{name}") for call, names in POINTS.items() for some in names for name in some.split()]


@dataclass
class Call:
    """A call that is made by a process of its own, on an idle key or a busy one."""

    app: HarnessApp
    journal: Journal
    call: str
    kill: tuple[str, ...]

    def __post_init__(self) -> None:
        self.points = Points(self.journal)
        self.points.arm(*self.kill)

    def prepare(self) -> None:
        """Have a run under way, and another one waiting for it."""
        if self.call in ("joining", "hold"):
            self.app.tasks["queue"].delay(self.journal.key(), 0, gate="a")
            self.journal.wait("start", timeout=BOUND)
        if self.call == "joining":
            self.app.tasks["queue"].delay(self.journal.key(), 1)

    def go_on(self) -> None:
        """Let everything end, once the producer waits, has returned or is dead."""
        wait_until(lambda: self._waits() or self.journal.events("called") or self.journal.events("killed"), BOUND)
        self.journal.open("a", 3)
        self.journal.open("held", 3)
        self.journal.wait(lambda each: each["event"] in ("called", "killed"), timeout=BOUND)

    def _waits(self) -> bool:
        return self.call == "hold" and "producer:after:start" in self.points.trace("producer")

    def starts(self) -> list[Event]:
        """Return the starts of bodies."""
        return self.journal.events("start")

    def check(self, *, accepted: bool) -> None:
        """Check that an accepted call is covered, one that was not is not, and that nothing is left."""
        if accepted:
            self.journal.wait(lambda each: each["event"] == "start" and each["args"][1:] == [2], timeout=BOUND)
        wait_until(self._idle, BOUND, lambda: f"left: {traces(self.app, 'queue', self.journal.key())}")
        values = sorted(each["args"][1] for each in self.starts() if each["key"] in ("key", "other"))
        asked = {"joining": [0, 2] if accepted else [0, 1], "hold": [0]}.get(self.call, [2] if accepted else [])
        assert values == sorted(asked + ([3] if self.call == "batch" and accepted else []))
        assert_no_overlap(self.journal.events())
        drains = [(each["key"], each["session_id"]) for each in self.journal.events("coalesce_drain")]
        assert len(drains) == len(set(drains)), "a session drained twice"
        # The key is as good as new.
        assert self.app.tasks["queue"].delay(self.journal.key(), 9).get(timeout=BOUND) == 9

    def _idle(self) -> bool:
        return not any(traces(self.app, "queue", self.journal.key(key)) for key in ("key", "other"))


@pytest.fixture(scope="module")
def producers(site: HarnessApp, start_worker: Callable[..., WorkerProcess]) -> Iterator[Producers]:
    """A worker, and the process that producers are forked from."""
    worker = start_worker(concurrency=4)
    with Producers(site) as producers:
        worker.wait_ready()
        yield producers


@pytest.fixture(scope="module")
def make_call(
    site: HarnessApp, journal_server: ValkeyServer, producers: Producers
) -> Iterator[Callable[..., dict[str, Call]]]:
    """Have a call made several times together, killed at a point each."""
    with connect(journal_server.url()) as client:

        def make(call: str, *kill: str) -> dict[str, Call]:
            calls = {point: Call(site, Journal(client), call, tuple(filter(None, [point]))) for point in kill}
            for each in calls.values():
                each.prepare()
                producers.order(call, each.journal)
                each.go_on()
            return calls

        yield make


@pytest.mark.parametrize("call", POINTS)
def test_every_boundary_in_a_producer_has_a_name(call: str, make_call: Callable[..., dict[str, Call]]) -> None:
    """Nobody is killed; every point that is passed is one of those above, and every one of them is passed."""
    [made] = make_call(call, "").values()
    assert sorted(made.points.trace("producer")) == sorted(point for each, point in ALL if each == call)


@pytest.fixture(scope="module")
def killed(make_call: Callable[..., dict[str, Call]]) -> Callable[[str, str], Call]:
    """Return the call that was killed at a point."""
    made: dict[str, dict[str, Call]] = {}

    def call_of(call: str, point: str) -> Call:
        if call not in made:
            made[call] = make_call(call, *(each for name, each in ALL if name == call))
        return made[call][point]

    return call_of


@pytest.mark.parametrize(("call", "point"), ALL)
def test_what_a_killed_producer_had_accepted_runs(call: str, point: str, killed: Callable[[str, str], Call]) -> None:
    """From the trigger on it is the record's, whether the call returned or not."""
    made = killed(call, point)
    made.check(accepted=point.removeprefix("producer:") in POINTS[call][1].split())
    assert made.points.missed() == set(), "nobody came to the point"
