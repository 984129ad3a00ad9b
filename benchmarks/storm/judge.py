"""Decides from the log of a storm alone whether the guarantees held.

It knows nothing of how coalescing is built: only who called what and was told what, which bodies ran from when to when
with which arguments, what was announced, and which processes were broken at what time.

Events (each has ``at``, seconds on one clock, and ``pid``; those of a run ``task``, ``key``, ``run``, ``token`` and
``session`` as well):

| event | fields |
|---|---|
| ``rules`` | ``lease``, ``patience``: seconds; ``tasks``: what :func:`benchmarks.storm.tasks.rules` says of each; |
| | ``keeps_messages``: whether the broker loses none if a worker is killed |
| ``call`` | ``call``: its name; ``task``, ``key``, ``callback`` |
| then ``answer`` or ``refused`` | ``call``; ``disposition``, ``run``, ``run_task_id``, ``task_id`` |
| ``revoke`` | ``call``, ``task_id`` |
| ``start``, ``end`` | of a run's body: ``calls`` (its arguments), ``parent`` (process); ``how`` |
| ``success``, ``error``, ``skip``, ``lost``, ``drain`` | of a run, or session: announced |
| ``called back`` | ``call``, ``run`` |
| ``killed`` | ``pids`` |
| ``away`` | ``pids``, ``since``: they stood still, or could not reach the store, until now |
| ``trouble`` | ``since``: something that all depend on was away until now |
| ``settled`` | ``idle``: whether nothing ran or waited any more |
| ``result``, ``residue`` | after that: ``task_id``, ``state``, ``run``; ``keys`` that are left in the store |
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.storm.log import Event

__all__ = ["Storm", "Violation", "judge"]

#: What an accepted call was told.
ACCEPTED = ("dispatched", "queued", "coalesced")
#: The announcements that a run has ended.
OUTCOMES = ("success", "error", "skip")
#: Seconds by which the log may be late: before it writes, a process can lose the processor.
BLUR = 0.05


@dataclass(frozen=True)
class Violation:
    """Something that must not happen, and did."""

    guarantee: str
    what: str

    def __str__(self) -> str:
        return f"{self.guarantee}: {self.what}"


class Lists(dict[Any, list[Any]]):
    """Lists by what they belong to; what has none has an empty one."""

    def __missing__(self, key: Any) -> list[Any]:
        return []

    def add(self, key: Any, value: Any) -> None:
        """Append to a list."""
        self.setdefault(key, []).append(value)


@dataclass
class Body:
    """One attempt of a run, as far as its lease was certainly live."""

    start: Event
    #: When its body returned, its process was killed, or it was first kept from renewing its lease for long.
    until: float = math.inf
    #: Whether somebody has taken its lease away.
    was_lost: bool = False


class Storm:
    """What happened, sorted by what it happened to.

    Args:
        events: The log, in order.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        self.of = Lists()
        for event in events:
            self.of.add(event["event"], event)
        (self.rules,) = self.of["rules"]
        self.tasks: dict[str, dict[str, Any]] = self.rules["tasks"]
        self.calls = {each["call"]: each for each in self.of["call"]}
        self.answers = {each["call"]: each for each in self.of["answer"]}
        self.revoked = {each["call"] for each in self.of["revoke"]}
        self.starts = Lists()
        for each in self.of["start"]:
            self.starts.add(each["run"], each)
        self.ends = Lists()
        for kind in (*OUTCOMES, "lost"):
            for each in self.of[kind]:
                self.ends.add(each["run"], each)
        self.bodies = self._bodies()

    def accepted(self) -> Iterator[tuple[Event, Event]]:
        """Yield every accepted call and its answer."""
        for name, answer in self.answers.items():
            if answer["disposition"] in ACCEPTED:
                yield self.calls[name], answer

    def place(self, event: Event) -> tuple[str, str]:
        """Return what excludes each other: scope and key."""
        return self.tasks[event["task"]]["scope"], event["key"]

    def was_killed(self, event: Event, within: float) -> bool:
        """Return whether the process that wrote an event was killed so soon after it."""
        pids = {event["pid"], event.get("parent")}
        return any(pids & {*kill["pids"]} and -BLUR <= kill["at"] - event["at"] <= within for kill in self.of["killed"])

    def _bodies(self) -> dict[tuple[int, int], Body]:
        bodies = {(each["run"], each["token"]): Body(each) for each in self.of["start"]}
        for end in self.of["end"]:
            bodies[end["run"], end["token"]].until = end["at"]
        for lost in self.of["lost"]:
            # Whoever found it has the run dispatched again, or has taken it over, with a token of its own.
            for start in self.starts[lost["run"]]:
                body = bodies[start["run"], start["token"]]
                if start["token"] <= lost["token"]:
                    body.until, body.was_lost = min(body.until, lost["at"]), True
        troubles = Lists()
        for kill in self.of["killed"]:
            for pid in kill["pids"]:
                troubles.add(pid, (kill["at"], math.inf))
        for away in self.of["away"]:
            # Half a lease is more than a heartbeat: whoever stood still for longer may have lost what it held.
            if away["at"] - away["since"] >= self.rules["lease"] / 2:
                for pid in away["pids"]:
                    troubles.add(pid, (away["since"], away["at"]))
        for body in bodies.values():
            for since, until in (*troubles[body.start["pid"]], *troubles[body.start["parent"]]):
                if until >= body.start["at"]:
                    body.until = min(body.until, max(since, body.start["at"]))
        return bodies


def exclusion(storm: Storm) -> Iterator[Violation]:
    """Never more live leases than a key's or a constraint's limit; nobody ends a run that somebody else has."""
    groups = Lists()
    limits: dict[Any, int] = {}
    for body in storm.bodies.values():
        rule, place = storm.tasks[body.start["task"]], storm.place(body.start)
        groups.add(place, body)
        limits[place] = min(rule["limit"], limits.get(place, rule["limit"]))
        if rule["constraint"]:
            name, limit = rule["constraint"]
            groups.add(name, body)
            limits[name] = limit
    for place, bodies in groups.items():
        bodies.sort(key=lambda body: body.start["at"])
        live: list[Body] = []
        for body in bodies:
            live = [each for each in live if each.until > body.start["at"]]
            live.append(body)
            if len(live) > limits[place]:
                runs = [each.start["run"] for each in live]
                yield Violation("G1", f"{place}: {len(live)} at once at {body.start['at']:.3f}: runs {runs}")
    for run, starts in storm.starts.items():
        for end in storm.ends[run]:
            newer = [each for each in starts if each["token"] > end["token"] and each["at"] < end["at"] - BLUR]
            if newer and end["event"] != "lost":
                yield Violation(
                    "G1", f"run {run}: {end['event']} of token {end['token']} after {newer[0]['token']} began"
                )


def covered(storm: Storm) -> Iterator[Violation]:
    """Every accepted trigger is covered by a run that starts after it and sees its arguments, or ends visibly."""
    seen: dict[str, float] = {}
    for start in storm.of["start"]:
        for call in start["calls"]:
            seen[call] = start["at"]
    members = Lists()
    for call, answer in storm.accepted():
        members.add(answer["run"], (call, answer))
        name, run = call["call"], answer["run"]
        # A worker that dies between the lease and the body is told of, and is no start.
        told = [each["at"] for each in storm.ends[run] if each["event"] != "success"]
        starts = [each["at"] for each in storm.starts[run]]
        visible = bool(told) and not starts
        if storm.tasks[call["task"]]["merges"]:
            if seen.get(name, -1) < call["at"] and not visible and name not in storm.revoked:
                yield Violation("G2", f"call {name} of {call['task']}: no run saw it after it was made")
        elif max(starts, default=-1) < call["at"] and not visible:
            yield Violation("G2", f"call {name} of {call['task']}: its run {run} did not start after it")
    for run, calls in members.items():
        if calls and not storm.tasks[calls[0][0]["task"]]["merges"]:
            yield from _latest(storm, run, calls)


def _latest(storm: Storm, run: int, members: list[tuple[Event, Event]]) -> Iterator[Violation]:
    """The arguments of a run are those of a call after which no other of its calls was made."""
    for start in storm.starts[run]:
        (chosen,) = start["calls"]
        answer = storm.answers.get(chosen)
        if answer is None:
            # Its producer was killed, or never heard of the answer.
            continue
        later = [call["call"] for call, _ in members if call["at"] > answer["at"] and call["at"] < start["at"]]
        if later:
            yield Violation("G2", f"run {run} saw call {chosen}, though {later[0]} was the later one")


def bounded(storm: Storm) -> Iterator[Violation]:
    """Never more runs that were answered with and have not started than there is room for."""
    waits: defaultdict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    for call, answer in storm.accepted():
        rule = storm.tasks[call["task"]]
        if rule["mode"] not in ("queue", "replace"):
            continue
        run = answer["run"]
        begun = [each["at"] for each in (*storm.starts[run], *storm.ends[run])]
        known = waits[call["task"], call["key"]].get(run, (math.inf, 0))
        # Whoever was revoked may have left it to others, as another run.
        if begun and call["call"] not in storm.revoked:
            waits[call["task"], call["key"]][run] = (min(known[0], answer["at"]), min(begun))
    for (task, key), runs in waits.items():
        room = storm.tasks[task]["limit"] + storm.tasks[task]["max_queued"]
        waiting: list[tuple[float, int]] = []
        for run, (since, until) in sorted(runs.items(), key=lambda item: item[1][0]):
            waiting = [each for each in waiting if each[0] > since]
            if until > since:
                waiting.append((until, run))
            if len(waiting) > room:
                yield Violation(
                    "G3", f"{task} {key}: {len(waiting)} wait at {since:.3f}: {[each[1] for each in waiting]}"
                )


def drained(storm: Storm) -> Iterator[Violation]:
    """Every session ends with one drain, after everything else."""
    drains = Lists()
    for drain in storm.of["drain"]:
        drains.add(drain["session"], drain)
    last: dict[int, Event] = {}
    for kind in ("start", "end", *OUTCOMES):
        for each in storm.of[kind]:
            body = storm.bodies.get((each["run"], each["token"]))
            # What a body does after its lease was lost is not the session's any more; of its announcement this window
            # remains, between the last look at the lease and the result.
            if body and each["at"] > body.until + BLUR and body.was_lost:
                continue
            if each["session"] not in last or each["at"] > last[each["session"]]["at"]:
                last[each["session"]] = each
    for session, event in last.items():
        found = drains[session]
        if len(found) > 1:
            yield Violation("G4", f"session {session} of {event['key']}: {len(found)} drains")
        elif found and found[0]["at"] < event["at"] - BLUR:
            yield Violation("G4", f"session {session} of {event['key']}: {event['event']} after its drain")
        elif not found and not _announcer_killed(storm, event):
            yield Violation("G4", f"session {session} of {event['key']}: no drain")


def _announcer_killed(storm: Storm, last: Event) -> bool:
    """Return whether a process may have died between taking a drain and announcing it, which is not made up for."""
    begun = [each for each in storm.starts[last["run"]] if each["token"] == last["token"]]
    return any(storm.was_killed({**each, "at": last["at"]}, within=1) for each in (last, *begun))


def ordered(storm: Storm) -> Iterator[Violation]:
    """Under ``serialize``, runs start in the order in which their calls were accepted."""
    lines = Lists()
    for call, answer in storm.accepted():
        if storm.tasks[call["task"]]["mode"] == "serialize" and storm.starts[answer["run"]]:
            lines.add((call["task"], call["key"]), (call, answer))
    for (task, key), line in lines.items():
        # Of two calls the first is known if the second was made after it had been answered.
        by_start = sorted(line, key=lambda each: storm.starts[each[1]["run"]][0]["at"])
        earliest_answer = math.inf
        for call, answer in reversed(by_start):
            if earliest_answer < call["at"]:
                yield Violation(
                    "G5", f"{task} {key}: run {answer['run']} started before one that was accepted before it"
                )
            earliest_answer = min(earliest_answer, answer["at"])


def nothing_left(storm: Storm) -> Iterator[Violation]:
    """Idle keys hold nothing."""
    for residue in storm.of["residue"]:
        if residue["keys"]:
            yield Violation("G6", f"left behind: {residue['keys'][:20]}")


def never_stuck(storm: Storm) -> Iterator[Violation]:
    """Everything comes to its end, and nothing waits much longer than what was broken meanwhile explains."""
    if not any(each["idle"] for each in storm.of["settled"]):
        yield Violation("G7", "something still runs or waits long after everything works again")
    troubles = [(each["since"], each["at"]) for each in (*storm.of["trouble"], *storm.of["away"])]
    busy = Lists()
    for event in (*storm.of["start"], *storm.of["end"], *(end for ends in storm.ends.values() for end in ends)):
        busy.add(storm.place(event), event["at"])
    for moments in busy.values():
        moments.sort()
    for call, answer in storm.accepted():
        starts = [each["at"] for each in storm.starts[answer["run"]] if each["at"] > call["at"]]
        if not starts:
            continue
        # A key that does anything meanwhile is not stuck, but busy.
        moments = busy[storm.place(call)]
        meanwhile = moments[bisect.bisect_right(moments, call["at"]) : bisect.bisect_left(moments, starts[0])]
        for since, until in itertools.pairwise((call["at"], *meanwhile, starts[0])):
            if until - since <= storm.rules["patience"]:
                continue
            excused = sum(max(0.0, min(until, end) - max(since, begin)) for begin, end in troubles)
            if until - since - excused > storm.rules["patience"]:
                yield Violation(
                    "G7", f"{storm.place(call)}: nothing for {until - since:.1f} s before run {answer['run']}"
                )


def honest(storm: Storm) -> Iterator[Violation]:
    """The result of every call is there, and is that of the run that it was answered with; callbacks were called."""
    results = {each["task_id"]: each for each in storm.of["result"]}
    back = {each["call"] for each in storm.of["called back"]}
    revoked = {each["task_id"] for each in storm.of["revoke"]}
    for name, answer in storm.answers.items():
        result = results.get(answer["task_id"])
        if result is None or result["state"] not in ("SUCCESS", "FAILURE", "REVOKED"):
            yield Violation(
                "G8", f"call {name} was {answer['disposition']}, and its result is {result and result['state']}"
            )
            continue
        is_own = answer["run_task_id"] not in revoked and answer["task_id"] not in revoked
        if result["state"] == "SUCCESS" and is_own and result["run"] != answer["run"]:
            yield Violation("G8", f"call {name} was told run {answer['run']}, and got the value of {result['run']}")
        callback = storm.calls[name].get("callback") and storm.rules["keeps_messages"]
        if result["state"] == "SUCCESS" and callback and name not in back:
            yield Violation("G9", f"call {name} succeeded, and was not called back")


def crashes(storm: Storm) -> Iterator[Violation]:
    """A killed run is run again if it is acknowledged late, and only then."""
    returned = {(end["run"], end["token"]) for end in storm.of["end"]}
    for run, starts in storm.starts.items():
        rule, task = storm.tasks[starts[0]["task"]], starts[0]["task"]
        if not rule["late"] and len(starts) > len({each["attempt"] for each in starts}):
            yield Violation("G9", f"run {run} of {task} was run {len(starts)} times, though acknowledged early")
        gave_up = any(end["event"] == "error" for end in storm.ends[run])
        if rule["late"] and gave_up and not any((run, each["token"]) in returned for each in starts):
            yield Violation("G9", f"run {run} of {task} was killed, and not run again")


CHECKS: tuple[Callable[[Storm], Iterator[Violation]], ...] = (
    exclusion,
    covered,
    bounded,
    drained,
    ordered,
    nothing_left,
    never_stuck,
    honest,
    crashes,
)


def judge(events: Iterable[Event]) -> list[Violation]:
    """Return everything in a log that no storm excuses."""
    storm = Storm(events)
    return [violation for check in CHECKS for violation in check(storm)]
