"""The whole system as a value: the store, the broker, the result backend, every process, and what may happen next.

Every step is one thing that one process does to the rest of the world; between two of them anything else may come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from celery_coalesce.records import Timing
from tests.exploration.bounds import Setup
from tests.exploration.checks import Checks
from tests.exploration.explorer import Violation
from tests.exploration.names import NEW, normal
from tests.exploration.processes import FAILS, NAMES, Acts, Effect
from tests.exploration.snapshots import NOW, QUEUE, Snapshots, aged, pack, unpack

LEASE = Timing().lease

#: A step that is to be taken: its name, and what it does to a copy of the state.
Move = tuple[str, Callable[[dict[str, Any]], None]]


#: One that goes wrong: of which kind it is comes first.
Fault = tuple[str, str, Callable[[dict[str, Any]], None]]


class System:
    """What may happen.

    Args:
        setup: What is explored.
        acts: What its processes do.
        snapshots: Their store.
    """

    def __init__(self, setup: Setup, acts: Acts, snapshots: Snapshots) -> None:
        self._setup = setup
        self._acts = acts
        self._snapshots = snapshots
        self._checks = Checks(setup)

    def start(self) -> bytes:
        """Return the state in which nothing has happened yet."""
        owners = [f"18000000000{number:05}" for number in range(self._setup.workers + 1)]
        state: dict[str, Any] = {
            "workers": [[f"{owner}/1/a", False, None, None] for owner in owners[:-1]],
            "sweeper": [f"{owners[-1]}/1/a", None],
            "producers": [[1, calls, None] for calls in self._setup.producers],
            "queue": [],
            "results": {},
            "db": pack({"presence": {f"{owner}/1/a".encode(): NOW + LEASE for owner in owners}}),
            "faults": self._setup.faults,
            "ghost": self._checks.nothing(),
        }
        return normal(state)

    def steps(self, packed: bytes) -> Iterator[tuple[str, bytes]]:
        """Yield what may happen in a state, and where that leads.

        Raises:
            Violation: The state is wrong, or what happens is.
        """
        state = unpack(packed)
        at_work = list(self._at_work(state))
        moves = [*self._working(state, at_work), *self._ordinary(state)]
        moment = self._next_moment(state)
        if not moves and moment:
            moves.append(("time passes", lambda new: self._wait(new, moment)))
        self._checks.state(state, ends=not moves)
        if state["faults"] and moves:
            moves += self._faulty(state, at_work, moment)
        for name, move in moves:
            new = unpack(packed)
            try:
                move(new)
                self._checks.settle(new)
                yield name, normal(new)
            except Violation as violation:
                raise Violation(violation.what, [name]) from violation

    # -- what goes on by itself --------------------------------------------------------------------------------------

    def _working(self, state: dict[str, Any], at_work: list[tuple[str, int, Effect]]) -> Iterator[Move]:
        """Yield the next step of each process that need not wait."""
        for act, number, effect in at_work:
            waits = effect[0] == "child" or (effect[0] == "hold" and state["workers"][number][2][4] > NOW)
            if not waits:
                name = f"{_shown(act, number)}: {effect[1] if effect[0] == 'call' else effect[0]}"
                yield name, lambda new, a=act, n=number, e=effect: self._take(new, a, n, e)

    def _ordinary(self, state: dict[str, Any]) -> Iterator[Move]:
        """Yield what begins something: a message that is received, a look of the sweep, a heartbeat that was missed."""
        for number, (_, stalls, main, _) in enumerate(state["workers"]):
            name = f"w{number + 1}"
            if stalls:
                yield f"{name}: heartbeat", lambda new, n=number: self._beat(new, n)
            if main is not None:
                continue
            for place, message in enumerate(state["queue"]):
                if message[1] <= NOW and message not in state["queue"][:place]:
                    yield f"{name}: receive {message[0]}", lambda new, n=number, p=place: self._receive(new, n, p)
        if state["sweeper"][1] is None and self._is_overdue(state):
            yield "sweep", self._sweep

    def _is_overdue(self, state: dict[str, Any]) -> bool:
        db = unpack(state["db"])
        own = state["sweeper"][0].encode()
        expired = any(at <= NOW for owner, at in db.get("presence", {}).items() if owner != own)
        return expired or any(at <= NOW for index in ("timers", "drains") for at in db.get(index, {}).values())

    def _next_moment(self, state: dict[str, Any]) -> int:
        """Return in how many milliseconds something will be due that is not now; 0: never."""
        db = unpack(state["db"])
        here = {worker[0].encode() for worker in state["workers"] if not worker[1]} | {state["sweeper"][0].encode()}
        times = [at for index in ("timers", "drains") for at in db.get(index, {}).values()]
        times += [at for owner, at in db.get("presence", {}).items() if owner not in here]
        times += [message[1] for message in state["queue"]]
        times += [worker[2][4] for worker in state["workers"] if worker[2] is not None]
        return min((at - NOW for at in times if at > NOW), default=0)

    def _wait(self, state: dict[str, Any], passed: int) -> None:
        """Let time pass. Whoever lives has sent its heartbeats meanwhile."""
        db = unpack(aged(state["db"], passed))
        db.get("meta", {}).pop(b"beat", None)
        here = [worker[0] for worker in state["workers"] if not worker[1]] + [state["sweeper"][0]]
        for owner in here:
            db["presence"][owner.encode()] = NOW + LEASE
        state["db"] = pack(db)
        for message in state["queue"]:
            message[1] = max(message[1] - passed, NOW) if message[1] else 0
        for worker in state["workers"]:
            if worker[2] is not None and worker[2][4]:
                worker[2][4] = max(worker[2][4] - passed, NOW)
            if worker[3] is not None and worker[3][0] == "lives" and passed >= LEASE:
                worker[3][5] = True

    # -- processes ---------------------------------------------------------------------------------------------------

    def _play(self, state: dict[str, Any], act: str, number: int) -> tuple[str, Any]:
        if act == "producer":
            call, _, log = state["producers"][number]
            value = self._value(number, call)
            given: list[Any] = [value, {"task_id": f"own-{value}"} if self._setup.follows else {}]
            return self._acts.play(act, given, f"p{value}", log or [])
        if act == "sweep":
            owner, (birth, log) = state["sweeper"]
            return self._acts.play(act, [owner], birth, log)
        owner, _, main, child = state["workers"][number]
        if act == "worker":
            return self._acts.play(act, [owner, main[1][2], main[1][3]], main[0], main[3])
        return self._acts.play(act, [owner, child[2]], child[1], child[3])

    @staticmethod
    def _value(producer: int, call: int) -> int:
        return 10 * (producer + 1) + call

    def _wants(self, state: dict[str, Any], act: str, number: int) -> Effect:
        how, effect = self._play(state, act, number)
        if how != "wants":
            raise Violation(f"{act} has ended, and was not noticed")
        return list(effect)

    def _take(self, state: dict[str, Any], act: str, number: int, effect: Effect, *, fails: bool = False) -> None:
        """Take a process's next step, and those after it that are its own affair."""
        answer = FAILS if fails else self._perform(state, act, number, effect)
        self._answer(state, act, number, answer)

    def _answer(self, state: dict[str, Any], act: str, number: int, answer: Any) -> None:
        self._log(state, act, number).append(answer)
        how, what = self._play(state, act, number)
        if how == "ends":
            self._ended(state, act, number, what)
        elif what[0] == "pool":
            worker = state["workers"][number]
            worker[3] = ["lives", f"{worker[2][0]}c", what[1], [], False, False, worker[1]]
            self._answer(state, act, number, None)
        elif what[0] == "hold":
            state["workers"][number][2][4] = NOW + what[1]
        elif what[0] == "child" and state["workers"][number][3][0] != "lives":
            self._child_told(state, number)

    def _child_told(self, state: dict[str, Any], number: int) -> None:
        child, state["workers"][number][3] = state["workers"][number][3], None
        self._answer(state, "worker", number, child[1])

    def _log(self, state: dict[str, Any], act: str, number: int) -> list[Any]:
        if act == "producer":
            producer = state["producers"][number]
            producer[2] = producer[2] or []
            return producer[2]  # type: ignore[no-any-return]
        if act == "sweep":
            return state["sweeper"][1][1]  # type: ignore[no-any-return]
        return state["workers"][number][2 if act == "worker" else 3][3]  # type: ignore[no-any-return]

    def _ended(self, state: dict[str, Any], act: str, number: int, what: Any) -> None:
        if act == "producer":
            producer = state["producers"][number]
            self._checks.returned(state, self._value(number, producer[0]), what)
            producer[:] = [producer[0] + 1, producer[1] - 1, None]
        elif act == "sweep":
            state["sweeper"][1] = None
        elif act == "worker":
            main = state["workers"][number][2]
            state["workers"][number][2] = None
            if not main[2]:
                raise Violation("a message was let go of, and not acknowledged")
        else:
            self._child_ended(state, number, what)

    def _child_ended(self, state: dict[str, Any], number: int, how: list[Any]) -> None:
        state["workers"][number][3] = ["ended", how]
        if self._wants(state, "worker", number)[0] == "child":
            self._child_told(state, number)

    def _receive(self, state: dict[str, Any], number: int, place: int) -> None:
        message = state["queue"].pop(place)
        message[1] = 0
        state["workers"][number][2] = [NEW, message, False, [], 0]

    def _sweep(self, state: dict[str, Any]) -> None:
        state["sweeper"][1] = [NEW, []]
        self._take(state, "sweep", 0, self._wants(state, "sweep", 0))

    def _beat(self, state: dict[str, Any], number: int) -> None:
        owner = state["workers"][number][0]
        keys = (NAMES.meta, NAMES.presence, NAMES.timers, NAMES.drains)
        asked = json.dumps({"owner": owner, "lease": LEASE})
        state["db"], _ = self._snapshots.call(state["db"], "heartbeat", keys, [asked])
        state["workers"][number][1] = False

    # -- effects -----------------------------------------------------------------------------------------------------

    def _perform(self, state: dict[str, Any], act: str, number: int, effect: Effect) -> Any:
        word, *what = effect
        if word == "call":
            return self._call(state, act, number, what)
        if word == "publish":
            task_id, delay, headers, body = what
            state["queue"].append([task_id, NOW + delay if delay else 0, headers, body])
        elif word == "store":
            state["results"][what[0]] = what[1:]
        elif word == "read":
            return state["results"].get(what[0], ["PENDING", "null"])
        elif word == "members":
            found = unpack(state["db"]).get(what[0].split(":", 1)[1], {})
            return sorted(member.decode() for member in found)
        elif word in ("ack", "reject"):
            state["workers"][number][2][2] = True
            if word == "reject" and what[0]:
                state["queue"].append(state["workers"][number][2][1])
        elif word == "body begins":
            child = state["workers"][number][3]
            child[4] = True
            self._checks.begins(state, *what)
        elif word == "body ends":
            child = state["workers"][number][3]
            child[4] = False
            _, attempt, _ = what
            ends = self._setup.ends[min(attempt, len(self._setup.ends) - 1)]
            return [ends, LEASE / 1000 if child[5] else 0]
        return None

    def _call(self, state: dict[str, Any], act: str, number: int, what: list[Any]) -> Any:
        script, keys, argv = what
        before = state["db"]
        state["db"], reply = self._snapshots.call(before, script, keys, argv)
        if script == "publish":
            db = unpack(state["db"])
            state["queue"] += [json.loads(message) for message in db.pop(QUEUE, {})]
            state["db"] = pack(db)
        asked = json.loads(argv[0])
        value = self._value(number, state["producers"][number][0]) if act == "producer" else 0
        self._checks.called(state, script, asked, reply, before, value)
        return reply

    # -- faults ------------------------------------------------------------------------------------------------------

    def _faulty(self, state: dict[str, Any], at_work: list[tuple[str, int, Effect]], moment: int) -> Iterator[Move]:
        for kind, name, move in (*self._of_processes(at_work), *self._faults(state, moment)):
            if kind in self._setup.kinds:

                def fault(new: dict[str, Any], move: Callable[[dict[str, Any]], None] = move) -> None:
                    new["faults"] -= 1
                    move(new)

                yield f"FAULT {name}", fault

    def _of_processes(self, at_work: list[tuple[str, int, Effect]]) -> Iterator[Fault]:
        for act, number, effect in at_work:
            shown = _shown(act, number)
            if effect[0] == "call":
                name = f"{shown}: {effect[1]}, its reply is lost"
                yield "reply lost", name, lambda new, a=act, n=number, e=effect: self._perform(new, a, n, e)
            elif effect[0] == "publish":
                name = f"{shown}: publish fails"
                yield "publish fails", name, lambda new, a=act, n=number, e=effect: self._take(new, a, n, e, fails=True)

    def _faults(self, state: dict[str, Any], moment: int) -> Iterator[Fault]:
        for number, (_, _, log) in enumerate(state["producers"]):
            if log:
                yield "producer dies", f"p{number + 1} dies", lambda new, n=number: self._kill_producer(new, n)
        for number, (owner, stalls, main, child) in enumerate(state["workers"]):
            shown = f"w{number + 1}"
            if main is None:
                continue
            yield "worker dies", f"{shown} dies", lambda new, n=number: self._kill_worker(new, n)
            if child is not None and child[0] == "lives":
                yield (
                    "child dies",
                    f"{shown}'s child dies",
                    lambda new, n=number: self._child_ended(new, n, ["died", None]),
                )
            left = unpack(state["db"])["presence"].get(owner.encode(), NOW) - NOW
            if not stalls and left > 0:
                yield "worker stalls", f"{shown} stalls", lambda new, n=number, ms=left: self._stall(new, n, ms)
        if state["sweeper"][1] is not None:
            yield "sweeper dies", "sweeper dies", self._kill_sweeper
        for place, message in enumerate(state["queue"]):
            if message not in state["queue"][:place]:
                shown = f"message {message[0]}"
                yield "message lost", f"{shown} is lost", lambda new, p=place: new["queue"].pop(p) and None
                yield "message twice", f"{shown} is sent twice", lambda new, m=message: new["queue"].append(list(m))
        if moment:
            yield "all is slow", "time passes", lambda new: self._wait(new, moment)

    def _at_work(self, state: dict[str, Any]) -> Iterator[tuple[str, int, Effect]]:
        for number, (_, calls, _) in enumerate(state["producers"]):
            if calls:
                yield "producer", number, self._wants(state, "producer", number)
        for number, (_, _, main, child) in enumerate(state["workers"]):
            if main is not None:
                yield "worker", number, self._wants(state, "worker", number)
            if child is not None and child[0] == "lives":
                yield "child", number, self._wants(state, "child", number)
        if state["sweeper"][1] is not None:
            yield "sweep", 0, self._wants(state, "sweep", 0)

    def _kill_producer(self, state: dict[str, Any], number: int) -> None:
        state["producers"][number] = [0, 0, None]

    def _kill_worker(self, state: dict[str, Any], number: int) -> None:
        """Kill a worker and its child; another one is started. Its message goes back, if the broker has kept it."""
        _, _, main, _ = state["workers"][number]
        if not (main[2] or self._setup.shortcuts):
            state["queue"].append(main[1])
        state["workers"][number] = [self._appears(state), False, None, None]

    def _kill_sweeper(self, state: dict[str, Any]) -> None:
        state["sweeper"] = [self._appears(state), None]

    def _appears(self, state: dict[str, Any]) -> str:
        owner = f"{NEW}/1/a"
        db = unpack(state["db"])
        db["presence"][owner.encode()] = NOW + LEASE
        state["db"] = pack(db)
        return owner

    def _stall(self, state: dict[str, Any], number: int, passed: int) -> None:
        """Let a worker miss its heartbeats until its presence is over; then it goes on as if nothing had been."""
        worker = state["workers"][number]
        worker[1] = True
        if worker[3] is not None and worker[3][0] == "lives":
            worker[3][6] = True
        self._wait(state, passed)


def _shown(act: str, number: int) -> str:
    return {"producer": f"p{number + 1}", "worker": f"w{number + 1}", "child": f"w{number + 1}'s child"}.get(act, act)
