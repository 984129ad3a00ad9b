"""Stories to be killed in: calls of one key, and what has to be true of it whoever was killed.

Every story has a run, triggers that come while it goes on, and a follow-up. Its bodies wait at a gate until all calls
were made, so that the same kill always meets the same story.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
from celery import chord
from celery.exceptions import WorkerLostError
from celery.result import AsyncResult

from celery_coalesce import TriggerMeta
from celery_coalesce.errors import PredecessorFailed
from tests.support.app import HarnessApp
from tests.support.journal import Event, Journal, assert_no_overlap
from tests.support.points import Points
from tests.support.process import wait_until
from tests.support.traces import traces
from tests.support.worker import WorkerProcess

#: Seconds. A worker beats three times in a lease.
LEASE = 2
REDISPATCH = 2
CONF = {"coalesce_lease": LEASE, "coalesce_redispatch_after": REDISPATCH}
#: Seconds from a kill to an idle key: a lease and a lost message at worst, on a machine that has other things to do.
BOUND = 4 * (LEASE + REDISPATCH)

#: Whoever is killed between taking a drain out of the store and telling of it takes the news along: never twice.
DRAIN_TAKEN = ("after:drain", "before:emit.drain", "after:drain:2", "before:emit.drain:2")


@dataclass
class Called:
    """A call that returned."""

    value: int
    result: Any
    run: int
    disposition: str
    linked: bool = False


@dataclass
class Story:
    """One key's story.

    Attributes:
        task: The name of its task.
        triggers: What became of every call, by its task id.
        kill: The points at which a process is killed, in the order in which they are reached.
        worker_of: The workers, by their names.
    """

    app: HarnessApp
    journal: Journal
    task: str
    triggers: dict[str, TriggerMeta]
    kill: tuple[str, ...] = ()
    worker_of: dict[str, WorkerProcess] = field(default_factory=dict)
    calls: list[Called] = field(default_factory=list)
    body: AsyncResult | None = None
    _went_on: bool = False

    def __post_init__(self) -> None:
        self.points = Points(self.journal)
        self._arm()

    def _arm(self) -> None:
        self.points.arm(*self.kill)

    # -- telling it --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the first call."""
        self._call(1, linked=True)

    def has_begun(self) -> bool:
        """Return whether its run has started, or whoever was to run it is dead."""
        return any(each["event"] in ("start", "killed") for each in self.journal.events())

    def go_on(self) -> None:
        """Make the calls that come while its run goes on, and let all runs go on."""
        if self.task == "serialize_stop":
            self._call(2, linked=True)
        else:
            self._call(2)
        if self.task in ("queue", "queue_rerun"):
            self._call(3, linked=True)
            self._call_in_chord(4)
        self._let_go()

    def _let_go(self) -> None:
        self.journal.open("a", 12)

    def is_told(self) -> bool:
        """Do what comes next, if it is time; return whether that was all."""
        if not self._went_on and self.has_begun():
            self.go_on()
            self._went_on = True
        return self._went_on

    def is_gone(self, hostname: str) -> None:
        """Note that a worker is dead, once its children are."""
        pids = {each["pid"] for each in self.journal.events("start", hostname=hostname)}
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), 5, f"children of {hostname} have outlived it")
        self.journal.record("gone", hostname=hostname)

    def is_over(self) -> bool:
        """Return whether everything has happened."""
        return self._went_on and not self.points.missed() and self._is_idle()

    def _options(self, value: int) -> dict[str, Any]:
        options: dict[str, Any] = {"gate": "a"}
        if self.task == "serialize_stop" and value == 1:
            options["error"] = "boom"
        if "retry" in self.task:
            options |= {"times": 1, "value": value}
        return options

    def _args(self, value: int) -> tuple[Any, ...]:
        return (self.journal.key(),) if "retry" in self.task else (self.journal.key(), value)

    def _call(self, value: int, *, linked: bool = False) -> None:
        callbacks: dict[str, Any] = {}
        if linked:
            callbacks["link"] = self.app.tasks["collect"].s(key=self.journal.key("link"))
            callbacks["link_error"] = self.app.tasks["on_error"].s(key=self.journal.key("error"))
        self.journal.record("calling", value=value)
        result = self.app.tasks[self.task].apply_async(self._args(value), self._options(value), **callbacks)
        self.calls.append(Called(value, result, result.run_id, result.disposition, linked))

    def _call_in_chord(self, value: int) -> None:
        member = self.app.tasks[self.task].signature(self._args(value), self._options(value), immutable=True)
        other = self.app.tasks["work"].si(self.journal.key("member"), value + 1)
        self.journal.record("calling", value=value)
        self.body = chord([member, other])(self.app.tasks["collect"].s(key=self.journal.key("body")))
        result = self.body.parent.results[0]
        trigger = self.triggers[result.id]
        self.calls.append(Called(value, result, trigger.run_id, trigger.disposition))

    # -- what has to be true -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Wait until the key is idle, and check every guarantee."""
        self._becomes_idle()
        events = self.journal.events()
        assert_no_overlap(each for each in events if each.get("key") == "key" or each["event"] == "gone")
        self._is_covered(events)
        self._is_bounded(events)
        self._drained_once(events)
        self._told_everybody()
        self._in_time(self.journal.events())

    def _becomes_idle(self) -> None:
        """Wait until nothing is left (G6, G7)."""
        if not self._takes_news_along():
            self.journal.wait("coalesce_drain", key="key", timeout=BOUND)
        wait_until(self._is_idle, BOUND, lambda: f"left behind: {traces(self.app, self.task, self.journal.key())}")

    def _is_idle(self) -> bool:
        return not traces(self.app, self.task, self.journal.key()) and all(each.result.ready() for each in self.calls)

    def _takes_news_along(self) -> bool:
        return any(point.partition(":")[2] in DRAIN_TAKEN for point in self.kill)

    def _is_covered(self, events: list[Event]) -> None:
        """Every call is covered by a run that started after it and saw its arguments, or ends visibly (G2, G8)."""
        lost = set()
        for called in self.calls:
            newest = max(each.value for each in self.calls if each.run == called.run)
            at = next(
                n for n, each in enumerate(events) if (each["event"], each.get("value")) == ("calling", called.value)
            )
            outcome = called.result.result
            if called.result.state == "SUCCESS":
                seen = [
                    _value(each)
                    for each in events[at:]
                    if (each["event"], each.get("key")) == ("start", "key") and each["coalesce_run_id"] == called.run
                ]
                assert newest in seen, f"call {called.value} is covered by no run after it: {events}"
                assert outcome == newest
            elif self.task == "serialize_stop":
                self._is_stopped(called, outcome)
            else:
                assert isinstance(outcome, WorkerLostError), outcome
                assert self.may_lose, f"call {called.value} is lost"
                lost.add(called.run)
        assert len(lost) <= self._kills(events), f"{len(lost)} runs were lost by {self.kill}"

    def _is_stopped(self, called: Called, outcome: object) -> None:
        if called.value == 1:
            assert isinstance(outcome, RuntimeError | WorkerLostError), outcome
        else:
            assert isinstance(outcome, PredecessorFailed | WorkerLostError), outcome

    @staticmethod
    def _kills(events: list[Event]) -> int:
        return sum(each["event"] == "killed" for each in events)

    @property
    def may_lose(self) -> bool:
        """Whether Celery does not run again what is killed."""
        return not self.runs_again

    @property
    def runs_again(self) -> bool:
        """Whether Celery runs again what is killed in this way."""
        of_child = any(point.startswith("child:") for point in self.kill)
        return self.task == "queue_rerun" or (self.task == "retry_late" and not of_child)

    def _is_bounded(self, events: list[Event]) -> None:
        """A run and one follow-up, another for calls that came after a run was lost; one attempt more per kill (G3)."""
        starts = [each for each in events if (each["event"], each.get("key")) == ("start", "key")]
        runs = {each["coalesce_run_id"] for each in starts}
        queued = sum(called.disposition == "queued" for called in self.calls)
        dispatched = sum(called.disposition == "dispatched" for called in self.calls)
        kills = self._kills(events)
        assert len(runs) <= queued + dispatched <= 2 + kills
        attempts = 2 if "retry" in self.task else 1
        again = kills if self.runs_again else 0
        # The pool itself hands a job whose child died to another, if it has not heard yet that it was accepted.
        tokens = {each["coalesce_token"] for each in starts}
        assert len(tokens) <= attempts * len(runs) + again, starts
        assert len(starts) <= len(tokens) + kills, starts

    def _drained_once(self, events: list[Event]) -> None:
        """Every session ends with one drain, the last of all (G4)."""
        drains = [each["session_id"] for each in events if each["event"] == "coalesce_drain"]
        assert len(drains) == len(set(drains)), "a session drained twice"
        sessions = {each["coalesce_session_id"] for each in events if each["event"] == "start" and each["key"] == "key"}
        missing = sessions - set(drains)
        assert len(missing) <= self._takes_news_along(), "a session has not drained"

    def _told_everybody(self) -> None:
        """Callbacks, errbacks and chords, at least once each (G9)."""
        for called in self.calls:
            if called.linked:
                succeeded = called.result.state == "SUCCESS"
                event = ("start", "link") if succeeded else ("on_error", "error")
                self.journal.wait(event[0], key=event[1], timeout=BOUND)
        if self.body is not None:
            body = self.body
            member = self.calls[-1].result
            if member.state == "SUCCESS":
                told = self.journal.wait("start", key="body", timeout=BOUND)
                assert told["args"][0] in ([member.result, 5], [5, member.result])
            wait_until(body.ready, BOUND, "the chord's body has no result")

    def _in_time(self, events: list[Event]) -> None:
        """The key came free within a bound (G7)."""
        killed = [each["time"] for each in events if each["event"] == "killed"]
        drained = [each["time"] for each in events if each["event"] == "coalesce_drain"]
        if killed and drained:
            took = max(drained) - max(killed)
            assert took < 2 * BOUND, f"the key came free {took} s after the kill"


@dataclass
class Abandoned(Story):
    """A story whose worker is killed in the body of its follow-up, before any other point counts."""

    _abandoned: bool = False

    def _arm(self) -> None:
        """Not yet: a sweep may still be at what the last story's worker has left."""

    def _let_go(self) -> None:
        self.journal.open("a")

    def is_told(self) -> bool:
        if super().is_told() and not self._abandoned:
            starts = [each for each in self.journal.events("start", key="key") if each["coalesce_run_index"] == 1]
            if starts:
                super()._arm()
                self.worker_of[starts[0]["hostname"]].kill()
                self.journal.record("killed", point="worker")
                self.is_gone(starts[0]["hostname"])
                self.journal.open("a", 12)
                self._abandoned = True
        return self._abandoned

    def is_over(self) -> bool:
        return self._abandoned and super().is_over()


def _value(start: Event) -> Any:
    return start["kwargs"].get("value", start["args"][1] if len(start["args"]) > 1 else None)


def tell_alone(story: Story) -> Story:
    """Tell a story and check it."""
    tell([story])
    story.check()
    return story


def tell(stories: Iterable[Story], together: int = 6) -> None:
    """Tell stories, a few at a time: more would wait for each other. What is wrong with one its own check says."""
    left = deque(stories)
    now: dict[int, tuple[Story, float]] = {}

    def all_over() -> bool:
        for number, (story, since) in list(now.items()):
            if (story.is_told() and story.is_over()) or time.monotonic() - since > 2 * BOUND:
                del now[number]
        while left and len(now) < together:
            story = left.popleft()
            now[id(story)] = story, time.monotonic()
            story.begin()
        return not now

    wait_until(all_over, 110, lambda: f"still told: {[story.kill for story, _ in now.values()]}")


def pinned(role: str, points: str) -> Callable[[str], list[str]]:
    """Return what gives the points of one kind of process in a task's story."""
    return lambda task: [f"{role}:{point}" for point in points.format(task=task).split()]
