"""The judge of a storm is judged itself: forged logs, each with one thing in it that must not have happened."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.storm.judge import judge
from benchmarks.storm.log import Event, in_order

QUEUE = {
    "scope": "task",
    "mode": "queue",
    "limit": 1,
    "max_queued": 1,
    "merges": False,
    "late": False,
    "constraint": None,
}
TASKS = {
    "task": QUEUE,
    "merged": QUEUE | {"scope": "merged", "merges": True},
    "late": QUEUE | {"scope": "late", "late": True},
    "line": QUEUE | {"scope": "line", "mode": "serialize"},
    "pair": QUEUE | {"scope": "pair", "constraint": ["together", 1]},
}


class Forger:
    """Writes a log. Times are seconds; a run's token is ten times its number, unless said otherwise."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.add(0, "rules", tasks=TASKS, lease=5, patience=20, keeps_messages=True)
        self.settled = self.add(1000, "settled", idle=True)
        self.left = self.add(1000, "residue", keys=[])

    def add(self, at: float, event: str, **fields: Any) -> Event:
        """Write an event."""
        self.events.append({"at": at, "event": event, "pid": 1, **fields})
        return self.events[-1]

    def call(self, name: str, at: float, run: int, **given: Any) -> None:
        """Write that a call was made and answered, half a second later; and its result."""
        fields = {"task": "task", "key": "k", "disposition": "dispatched", "state": "SUCCESS", **given}
        self.add(at, "call", call=name, task=fields["task"], key=fields["key"], callback=fields.get("callback"))
        told = {"run": run, "task_id": f"id-{name}", "run_task_id": f"run-{run}"}
        self.add(at + 0.5, "answer", call=name, disposition=fields["disposition"], **told)
        self.add(1000, "result", task_id=f"id-{name}", state=fields["state"], run=fields.get("value", run))

    def run(self, number: int, begin: float, end: float | None, calls: list[str], **given: Any) -> None:
        """Write that a run began, and, unless it never did, returned and was announced."""
        about = {"task": "task", "key": "k", "token": 10 * number, "session": 1, "pid": number, **given, "run": number}
        self.add(begin, "start", **{"attempt": 0, "parent": 0, **about}, calls=calls)
        if end is not None:
            self.add(end, "end", how="returned", **about)
            self.add(end + 0.01, "success", **about)

    def drain(self, at: float, session: int = 1, run: int = 1, **given: Any) -> None:
        """Write that a session was over."""
        self.add(at, "drain", **{"task": "task", "key": "k", **given}, run=run, token=10 * run, session=session)

    def verdict(self) -> list[str]:
        """Return the guarantees that were broken."""
        return [violation.guarantee for violation in judge(in_order(self.events))]


@pytest.fixture
def forger() -> Forger:
    return Forger()


def one_session(forger: Forger, task: str = "task") -> None:
    """Two calls, two runs, one drain."""
    forger.call("a", 1, run=1, task=task)
    forger.call("b", 3, run=2, task=task, disposition="queued")
    forger.run(1, 2, 5, ["a"], task=task)
    forger.run(2, 6, 7, ["b"], task=task)
    forger.drain(8, run=2, task=task)


@pytest.mark.parametrize("task", TASKS)
def test_what_should_happen_is_no_violation(forger: Forger, task: str) -> None:
    """The judge finds nothing where there is nothing."""
    one_session(forger, task)
    assert forger.verdict() == []


class TestExclusion:
    def test_two_bodies_of_a_key_at_once(self, forger: Forger) -> None:
        """An overlap is found."""
        forger.run(1, 2, 5, ["a"])
        forger.run(2, 4, 6, ["b"])
        forger.drain(8)
        assert forger.verdict() == ["G1"]

    def test_two_tasks_of_a_scope_at_once(self, forger: Forger) -> None:
        """Whose key it is, is the scope's to say."""
        forger.events[0]["tasks"] = TASKS | {"late": TASKS["late"] | {"scope": "task"}}
        forger.run(1, 2, 5, ["a"])
        forger.run(2, 4, 6, ["b"], task="late")
        forger.drain(8)
        assert forger.verdict() == ["G1"]

    def test_more_than_a_constraint_allows(self, forger: Forger) -> None:
        """Runs of two keys overlap that share a name."""
        forger.run(1, 2, 5, ["a"], task="pair")
        forger.run(2, 4, 6, ["b"], task="pair", key="other", session=2)
        forger.drain(8, task="pair")
        forger.drain(8, session=2, task="pair")
        assert forger.verdict() == ["G1"]

    def test_the_end_of_somebody_elses_run(self, forger: Forger) -> None:
        """A worker that came back announces the end of a run that another one has by now."""
        forger.run(1, 2, None, ["a"], task="late")
        forger.add(9, "away", pids=[1], since=2.5)
        forger.run(1, 8, 12, ["a"], task="late", token=11)
        forger.add(10, "success", task="late", key="k", run=1, token=10, session=1)
        forger.drain(13, task="late")
        assert forger.verdict() == ["G1"]

    @pytest.mark.parametrize(
        "trouble",
        [
            {"event": "killed", "at": 3, "pids": [1]},
            {"event": "away", "at": 9, "pids": [1], "since": 3},
            {"event": "lost", "at": 3, "task": "task", "key": "k", "run": 1, "token": 15, "session": 1},
        ],
        ids=lambda trouble: trouble["event"],
    )
    def test_a_body_that_has_lost_its_lease_excludes_nobody(self, forger: Forger, trouble: dict[str, Any]) -> None:
        """Killed, or kept from renewing its lease for long enough, or declared lost."""
        forger.run(1, 2, 9.5, ["a"])
        forger.run(2, 4, 6, ["b"])
        forger.drain(10)
        assert forger.verdict() == ["G1"]
        forger.add(**trouble)
        assert forger.verdict() == []

    def test_a_short_absence_is_no_excuse(self, forger: Forger) -> None:
        """Within half a lease nothing is lost."""
        forger.run(1, 2, 9, ["a"])
        forger.run(2, 4, 6, ["b"])
        forger.add(5, "away", pids=[1], since=3)
        forger.drain(10)
        assert forger.verdict() == ["G1"]


class TestCovered:
    def test_a_trigger_that_no_run_saw(self, forger: Forger) -> None:
        """Its run was over before it was made."""
        forger.run(1, 2, 3, ["a"])
        forger.call("a", 1, run=1)
        forger.call("b", 5, run=1, disposition="coalesced")
        forger.drain(9)
        assert forger.verdict() == ["G2"]

    def test_arguments_that_were_not_merged(self, forger: Forger) -> None:
        """Its run started after it, without what it asked for."""
        forger.call("a", 1, run=1, task="merged")
        forger.call("b", 2, run=1, task="merged", disposition="coalesced")
        forger.run(1, 3, 4, ["a"], task="merged")
        forger.drain(9, task="merged")
        assert forger.verdict() == ["G2"]

    def test_arguments_that_were_not_the_latest(self, forger: Forger) -> None:
        """The run saw the first call's, though the second was made after that had been answered."""
        forger.call("a", 1, run=1)
        forger.call("b", 2, run=1, disposition="coalesced")
        forger.run(1, 3, 4, ["a"])
        forger.drain(9)
        assert forger.verdict() == ["G2"]

    def test_a_trigger_that_was_forgotten(self, forger: Forger) -> None:
        """Nothing was ever heard of its run."""
        forger.call("a", 1, run=1)
        assert "G2" in forger.verdict()

    def test_who_dies_before_the_body_is_told_of(self, forger: Forger) -> None:
        """A run that was lost with its lease, before its body began, has ended visibly."""
        forger.call("a", 1, run=1, state="FAILURE")
        forger.add(7, "error", task="task", key="k", run=1, token=10, session=1)
        forger.drain(9)
        assert forger.verdict() == []


class TestBounded:
    def test_too_many_waiting_runs(self, forger: Forger) -> None:
        """One is dispatched into the free slot, one waits; the third is one too many."""
        for number in (1, 2, 3):
            forger.call(f"c{number}", number, run=number, disposition="queued")
            forger.run(number, 10 * number, 10 * number + 1, [f"c{number}"])
        forger.drain(40, run=3)
        assert forger.verdict() == ["G3"]


class TestDrain:
    def test_a_second_drain(self, forger: Forger) -> None:
        """It is announced once."""
        one_session(forger)
        forger.drain(9)
        assert forger.verdict() == ["G4"]

    def test_a_drain_before_the_end(self, forger: Forger) -> None:
        """It is announced after everything else."""
        forger.run(1, 2, 5, ["a"])
        forger.drain(4)
        assert forger.verdict() == ["G4"]

    def test_no_drain(self, forger: Forger) -> None:
        """It is announced."""
        forger.run(1, 2, 5, ["a"])
        assert forger.verdict() == ["G4"]

    def test_a_drain_dies_with_whoever_was_about_to_announce_it(self, forger: Forger) -> None:
        """Never twice means: perhaps not at all, if exactly that process is killed at exactly that time."""
        forger.run(1, 2, 5, ["a"])
        forger.add(5.1, "killed", pids=[1])
        assert forger.verdict() == []

    def test_what_a_body_does_after_its_lease_was_lost_is_not_the_sessions(self, forger: Forger) -> None:
        """It stood still, its run was run again, and the session is over when it goes on."""
        about = {"task": "late", "key": "k", "run": 1, "session": 1}
        forger.run(1, 2, None, ["a"], task="late")
        forger.add(8, "lost", token=10, **about)
        forger.run(1, 9, 10, ["a"], task="late", token=11, pid=2)
        forger.drain(11, task="late")
        forger.add(12, "end", token=10, how="returned", **about)
        forger.add(12, "away", pids=[1], since=2.5)
        assert forger.verdict() == []


class TestOrder:
    def test_a_run_that_overtakes(self, forger: Forger) -> None:
        """The second call was made after the first was answered, and ran before it."""
        forger.call("a", 1, run=1, task="line")
        forger.call("b", 2, run=2, task="line", disposition="queued")
        forger.run(2, 3, 4, ["b"], task="line")
        forger.run(1, 5, 6, ["a"], task="line")
        forger.drain(9, task="line")
        assert forger.verdict() == ["G5"]

    def test_of_two_calls_at_once_either_may_be_first(self, forger: Forger) -> None:
        """Nobody knows which was accepted first."""
        forger.call("a", 1, run=1, task="line")
        forger.call("b", 1.2, run=2, task="line", disposition="queued")
        forger.run(2, 3, 4, ["b"], task="line")
        forger.run(1, 5, 6, ["a"], task="line")
        forger.drain(9, task="line")
        assert forger.verdict() == []


class TestTheEnd:
    def test_something_is_left_behind(self, forger: Forger) -> None:
        """An idle key holds nothing."""
        forger.left["keys"] = ["rec:abc"]
        assert forger.verdict() == ["G6"]

    def test_it_never_settles(self, forger: Forger) -> None:
        """Something still runs or waits."""
        forger.settled["idle"] = False
        assert forger.verdict() == ["G7"]

    def test_a_key_does_nothing_for_long(self, forger: Forger) -> None:
        """A call waits, and nothing of its key runs."""
        forger.call("a", 1, run=1)
        forger.run(1, 31, 32, ["a"])
        forger.drain(33)
        assert forger.verdict() == ["G7"]
        forger.add(21, "trouble", since=2)
        assert forger.verdict() == []

    @pytest.mark.parametrize("state", ["PENDING", "STARTED", "RETRY"])
    def test_a_result_that_never_comes(self, forger: Forger, state: str) -> None:
        """Whoever waits for it would wait for ever."""
        forger.call("a", 1, run=1, state=state)
        forger.run(1, 2, 3, ["a"])
        forger.drain(4)
        assert forger.verdict() == ["G8"]

    def test_the_value_of_another_run(self, forger: Forger) -> None:
        """The receipt named a run, and the result is another's."""
        forger.call("a", 1, run=1, value=7)
        forger.run(1, 2, 3, ["a"])
        forger.drain(4)
        assert forger.verdict() == ["G8"]

    def test_a_callback_that_is_not_called(self, forger: Forger) -> None:
        """The call has succeeded, and its link was not called."""
        forger.call("a", 1, run=1, callback=True)
        forger.run(1, 2, 3, ["a"])
        forger.drain(4)
        assert forger.verdict() == ["G9"]

    def test_a_killed_run_that_is_run_again_though_acknowledged_early(self, forger: Forger) -> None:
        """Celery would not."""
        forger.run(1, 2, None, ["a"])
        forger.add(3, "killed", pids=[1])
        forger.run(1, 5, 6, ["a"], token=11)
        forger.drain(7)
        assert forger.verdict() == ["G9"]

    def test_a_killed_run_that_is_not_run_again_though_acknowledged_late(self, forger: Forger) -> None:
        """Celery would."""
        forger.run(1, 2, None, ["a"], task="late")
        forger.add(3, "killed", pids=[1])
        forger.add(4, "error", task="late", key="k", run=1, token=10, session=1)
        forger.drain(5, task="late")
        assert forger.verdict() == ["G9"]
