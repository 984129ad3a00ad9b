"""What must be true: of every state, of what is done in it, and of the states in which nothing is left to do.

The guarantees G1-G7 are those of the README. What a state alone does not tell (which calls were accepted, and which of
them some run has covered since) is remembered in its `ghost`, which no process sees.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from tests.exploration.explorer import Violation
from tests.exploration.snapshots import NOW, pack, unpack

if TYPE_CHECKING:
    from tests.exploration.bounds import Setup

#: States of a result that nothing follows.
FINAL = ("SUCCESS", "FAILURE", "REVOKED")
#: What only the holder of a lease may do, and the word by which it is refused.
HOLDERS = ("finish", "retry", "requeue", "check")

Run = dict[bytes, Any]
Ghost = dict[str, Any]


class Checks:
    """The guarantees, for one task.

    Args:
        setup: What is explored.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        options = setup.options
        self._mode = options.get("coalesce", "queue")
        self._limit = options.get("limit", 1)
        self._most_queued = options.get("max_queued", 1)
        self._late = options.get("acks_late", False)
        self._latest = options.get("args", "latest") == "latest"

    def nothing(self) -> Ghost:
        """Return what is remembered at the start."""
        return {
            # Of each accepted trigger that no run has covered yet, in their order: value, run, task id, and whether it
            # was covered before, and is made again only because its reply was lost until its run had ended.
            "open": [],
            "accepted": {},  # value -> run
            "begun": [],  # run and attempt of each body that has begun, while its run is there
            "sessions": [],
            "announced": [],
            "waits": [],  # task ids whose callers wait
        }

    # -- what is done ------------------------------------------------------------------------------------------------

    def called(
        self, state: dict[str, Any], script: str, asked: dict[str, Any], reply: Any, before: bytes, value: int
    ) -> None:
        """Look at what a script has done."""
        if script in ("trigger", "publish"):
            text = reply if isinstance(reply, bytes) else reply[0]
            self._triggered(state, text.split(b" ", 4), before, value)
        elif state["db"] == before:
            return
        elif script == "start" and reply[0] == b"running":
            last = int(unpack(before)["meta"][b"last"])
            token = json.loads(reply[1])["token"]
            if int(token) <= last:
                raise Violation(f"G1: the fencing token {token!r} does not grow")
        elif script in HOLDERS and reply[0] != b"lost":
            run = runs_of(before).get(asked["run"].encode())
            if run is None or run.get(b"token") != asked["token"].encode():
                raise Violation(f"G1: {script} was let through with a token that is not the lease's")
        elif script == "drain" and reply[0] == b"drained":
            # Whoever is told so again has asked before in the same name, and has changed nothing.
            self._announced(state, unpack(before), unpack(state["db"]))
        elif script == "rollback" and reply[0] == b"ended":
            self._rolled_back(state, reply, before, value)

    def _triggered(self, state: dict[str, Any], told: list[bytes], before: bytes, value: int) -> None:
        ghost, run = state["ghost"], told[1].decode()
        head = head_of(state["db"])
        if head is not None and head[b"session"].decode() not in ghost["sessions"]:
            ghost["sessions"].append(head[b"session"].decode())
        if told[0] not in (b"dispatched", b"queued", b"coalesced") or ghost["accepted"].get(value) == run:
            return
        # Once its run has gone a call that is made again can not be known again.
        if ghost["accepted"].get(value, "").encode() in runs_of(before):
            raise Violation("a call was accepted twice")
        if b"index" in runs_of(state["db"])[told[1]]:
            raise Violation("G2: a trigger was merged into a run that has begun")
        again = value in ghost["accepted"] and not any(each[0] == value for each in ghost["open"])
        ghost["accepted"][value] = run
        ghost["open"] = [each for each in ghost["open"] if each[0] != value] + [[value, run, told[4].decode(), again]]

    def _rolled_back(self, state: dict[str, Any], reply: list[Any], before: bytes, value: int) -> None:
        ghost = state["ghost"]
        ghost["open"] = [each for each in ghost["open"] if each[0] != value]
        ghost["accepted"].pop(value, None)
        head = head_of(before)
        if head_of(state["db"]) is None and head is not None:
            session = head[b"session"].decode()
            if not head[b"index"]:
                # No run has begun in it: it was none.
                ghost["sessions"].remove(session)

    def begins(self, state: dict[str, Any], run: str, attempt: int, value: int) -> None:
        """Look at a body that begins."""
        ghost = state["ghost"]
        if [run, attempt] in ghost["begun"] and not (self._late and state["faults"] < self._setup.faults):
            raise Violation("an attempt's body has begun twice")
        ghost["begun"] = sorted({(run, attempt), *map(tuple, ghost["begun"])})
        covered = [each for each in ghost["open"] if each[1] == run]
        if covered and self._latest and covered[-1][0] != value:
            raise Violation(f"G2: the run sees {value}, and not the latest of {covered}")
        if covered and self._mode == "serialize" and ghost["open"][0] != covered[0]:
            raise Violation(f"G5: {covered[0][0]} begins before {ghost['open'][0][0]}")
        ghost["open"] = [each for each in ghost["open"] if each[1] != run]

    def _announced(self, state: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
        """Look at a drain that is announced: taken out of the store by who does."""
        ghost = state["ghost"]
        [blob] = set(before["drains"]) - set(after.get("drains", {}))
        name = str(json.loads(blob)["session_id"])
        if name in ghost["announced"]:
            raise Violation("G4: a drain is announced twice")
        head = head_of(state["db"])
        if head is not None and head[b"session"].decode() == name:
            raise Violation("G4: a drain is announced before its session has ended")
        ghost["announced"].append(name)

    def returned(self, state: dict[str, Any], value: int, ids: list[str]) -> None:
        """Note under which ids a caller waits from now on."""
        waits = state["ghost"]["waits"]
        state["ghost"]["waits"] = sorted({*waits, *ids})

    def settle(self, state: dict[str, Any]) -> None:
        """Look at the triggers whose run has gone: none may go without a body, or a result that says why."""
        ghost, runs = state["ghost"], runs_of(state["db"])
        left = []
        for each in ghost["open"]:
            if each[1].encode() in runs:
                left.append(each)
            elif not each[3] and state["results"].get(each[2], [""])[0] not in ("FAILURE", "REVOKED"):
                raise Violation(f"G2: trigger {each[0]} is covered by no run, and nobody is told")
        ghost["open"] = left
        ghost["begun"] = [list(each) for each in ghost["begun"] if each[0].encode() in runs]
        self._forget(state)

    def _forget(self, state: dict[str, Any]) -> None:
        """Leave out what has come to its end, and what nothing names any more: no step could tell the difference."""
        ghost, results = state["ghost"], state["results"]
        under_way = {10 * (number + 1) + call for number, (call, calls, _) in enumerate(state["producers"]) if calls}
        ghost["accepted"] = {value: run for value, run in ghost["accepted"].items() if value in under_way}
        if not (ghost["announced"] or results):
            return
        named = pack([state[part] for part in ("workers", "sweeper", "producers", "queue", "db")])
        for session in [each for each in ghost["announced"] if each.encode() not in named]:
            ghost["announced"].remove(session)
            ghost["sessions"].remove(session)
        kept = {each[2] for each in ghost["open"]}
        for task_id in [each for each, result in results.items() if result[0] in FINAL]:
            if task_id in ghost["waits"]:
                ghost["waits"].remove(task_id)
            if task_id.encode() not in named and task_id not in kept:
                del results[task_id]

    # -- states ------------------------------------------------------------------------------------------------------

    def state(self, state: dict[str, Any], *, ends: bool) -> None:
        """Look at a state; `ends`: nothing can happen in it any more."""
        if self._setup.record and (found := wrong(state["db"], self._limit)):
            raise Violation(found[0])
        runs = runs_of(state["db"])
        pending = sum(run[b"state"] == b"pending" and b"index" not in run for run in runs.values())
        if self._mode == "queue" and pending > self._most_queued:
            raise Violation(f"G3: {pending} runs wait")
        self._exclusion(state, runs)
        if ends:
            self._nothing_left(state)

    def _exclusion(self, state: dict[str, Any], runs: dict[bytes, Run]) -> None:
        bodies = 0
        for owner, _, _, child in state["workers"]:
            if child is None or child[0] != "lives" or not child[4]:
                continue
            token, run = lease_of(child[2])
            held = runs.get(run, {})
            holds = held.get(b"token") == token and held.get(b"owner") == owner.encode()
            if not (child[6] or holds):
                raise Violation("G1: a body runs without a lease, and its worker has missed no heartbeat")
            expires = unpack(state["db"])["presence"].get(owner.encode(), 0)
            bodies += not child[6] or (holds and expires > NOW)
        if bodies > self._limit:
            raise Violation(f"G1: {bodies} bodies run at once")

    def _nothing_left(self, state: dict[str, Any]) -> None:
        ghost, db = state["ghost"], unpack(state["db"])
        busy = [worker for worker in state["workers"] if worker[2] or worker[3]]
        calls = [producer for producer in state["producers"] if producer[1]]
        if busy or calls or state["queue"] or state["sweeper"][1]:
            raise Violation("G7: somebody waits for ever")
        if ghost["open"]:
            raise Violation(f"G2: nobody covers {ghost['open']}")
        if sorted(ghost["announced"]) != sorted(ghost["sessions"]):
            raise Violation(f"G4: sessions {ghost['sessions']}, drains {ghost['announced']}")
        owners = {worker[0].encode() for worker in state["workers"]} | {state["sweeper"][0].encode()}
        if set(db) - {"meta", "presence", "seen"} or set(db["presence"]) - owners:
            raise Violation(f"G6: left are {db}")
        for task_id in ghost["waits"]:
            if state["results"].get(task_id, [""])[0] not in FINAL:
                raise Violation(f"G8: nobody answers {task_id}")


def _record(db: bytes) -> dict[bytes, Any]:
    return next((content for name, content in unpack(db).items() if name.startswith("rec:")), {})


@cache
def head_of(db: bytes) -> Run | None:
    """Return the record's head, if there is a record."""
    return _record(db).get(b"head")


@cache
def runs_of(db: bytes) -> dict[bytes, Run]:
    """Return the runs of the record."""
    return {name[4:]: run for name, run in _record(db).items() if name.startswith(b"run:")}


@cache
def lease_of(dumped: str) -> tuple[bytes, bytes]:
    """Return token and run of the lease that a pool child was given."""
    lease = json.loads(dumped)[0]["coalesce"]
    return lease["token"].encode(), lease["run"].encode()


@cache
def wrong(db: bytes, limit: int) -> list[str]:
    """Return what is not as design.md says of a record."""
    content = unpack(db)
    head, runs = head_of(db), runs_of(db)
    wait: dict[bytes, Any] = next((members for name, members in content.items() if name.startswith("wait:")), {})
    timers = {ref.split(b"/")[1] for ref in content.get("timers", {})}
    held = {
        (name.removeprefix("held:").encode(), ref.split(b"/")[1])
        for name, refs in content.items()
        if name.startswith("held:")
        for ref in refs
    }
    found = []
    if head is None:
        if runs or wait or held:
            found.append("something is left of a record that is gone")
        return found
    states = {name: run[b"state"] for name, run in runs.items()}
    active = {name for name, is_in in states.items() if is_in in (b"dispatched", b"running", b"retrying")}
    pending = {name for name, is_in in states.items() if is_in == b"pending"}
    if head[b"runs"] != len(runs) or not runs:
        found.append("the head does not count its runs")
    if set(head[b"active"]) != active:
        found.append("the active runs are not those that hold a slot")
    if len(active) > limit:
        found.append("G1: there are more active runs than slots")
    if not set(wait) <= pending or pending - set(wait) - timers:
        found.append("a pending run neither waits nor has a timer")
    if any(name not in timers for name, is_in in states.items() if is_in in (b"dispatched", b"retrying", b"cleared")):
        found.append("G7: a run that a message or a clock moves on has no timer")
    running = {(run[b"owner"], name) for name, run in runs.items() if run[b"state"] == b"running"}
    if held != running:
        found.append("the leases are not those of the running runs")
    if timers & {name for _, name in running} or timers - set(runs):
        found.append("there is a timer of a run that needs none")
    if wait and len(active) < limit and next(iter(wait)) not in timers:
        found.append("G7: a run waits beside a free slot")
    return found
