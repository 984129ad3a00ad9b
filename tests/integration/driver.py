"""Drives the engine by hand: every transition against a real server, without a worker.

The driver's store sends every transition twice when told so, the very same command again, as a client does whose first
reply was lost; so every test of the transitions is also one of their idempotence. After each it checks what design.md
says is always true of a record.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import redis

from celery_coalesce.errors import StoreError
from celery_coalesce.keys import Names, state_id
from celery_coalesce.policy import Policy
from celery_coalesce.records import (
    Accepted,
    Envelope,
    Finished,
    Followers,
    Known,
    Lease,
    MergeWanted,
    RolledBack,
    Started,
    Timing,
    Trigger,
)
from celery_coalesce.states import Answer, RunState
from celery_coalesce.store.redis import RedisStore
from celery_coalesce.transitions import Transitions
from celery_coalesce.views import RunMeta
from tests.integration.clock import ClockedStore
from tests.support.process import wait_until

#: Fields of `meta` that belong to the namespace, not to a key.
RESTS = {"meta", "history"}
#: What is answered to a call that ended a session, repeated.
FORGETS = {"finish": b"lost", "rollback": b"gone"}
#: What goes by itself, or with its worker.
LATER = {"presence", "seen", "drains", "kept", "resting"}
#: What became of a trigger; the number before the last part is how long its message waits.
WAITS = re.compile(rb"([a-z]+ \d+ [a-z]+) (-?\d+) (.*)")
#: Fields of a trigger that go into its `times`.
TIMES = ("delay", "due", "ttl", "expires")


class Twice:
    """A store that can send every transition twice, and that remembers what it was told.

    Args:
        store: The real one.
        snapshot: Returns all that is stored, to be compared after the second time.
        exists: Tells whether there is a key of that name.
        check: Fails if a record is not as it should be; given the names of its four keys.

    Attributes:
        twice: Whether every transition is sent a second time. The second reply is the one that counts, as for a
            client that lost the first; it must equal the first, and must not change anything.
        checked: Whether the record is looked at after each; not worth its time where there are hundreds of calls.
        calls: (script, keys, argv) of every call, oldest first; a repeated one counts once.
    """

    def __init__(
        self,
        store: RedisStore,
        snapshot: Callable[[], Any],
        exists: Callable[[str], Any],
        check: Callable[[Sequence[str]], None],
    ) -> None:
        self.store = store
        self.names = store.names
        self._exists = exists
        self._check = check
        self.twice = False
        self.checked = True
        self.calls: list[tuple[str, tuple[str, ...], tuple[Any, ...]]] = []
        self._snapshot = snapshot

    def call(self, script: str, keys: Sequence[str], *argv: str | bytes | int) -> list[Any]:
        """Run a transition, twice if so told, and return its last reply."""
        self.calls.append((script, tuple(keys), argv))
        first = self.store.call(script, keys, *argv)
        if self.checked and script != "show" and len(keys) >= len(self.names.record("")) and keys[2] == self.names.meta:
            self._check(keys)
        if not self.twice or script == "show":
            return first
        before = self._snapshot()
        second = self.store.call(script, keys, *argv)
        if script in FORGETS and first[0] == b"ended" and not self._exists(keys[0]):
            # The record went with its last run, and with it the memory of this call. Nothing was dispatched; a
            # drain that nobody heard of is announced by the sweep.
            assert second == [FORGETS[script]]
            second = first
        if first[0] == b"early" and second[0] != b"early":
            # Its time has come between the two.
            return second
        assert same(second, first), f"{script}: repeated, it answers {second!r}, not {first!r}"
        assert same(self._snapshot(), before), f"{script}: repeated, it changes the store"
        return second

    def call_many(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
        """Run transitions; if so told all of them twice, as a client does that lost the replies."""
        self.calls += [(script, tuple(keys), tuple(argv)) for script, keys, *argv in calls]
        first = list(self.store.call_many(calls))
        if self.checked:
            for keys in {tuple(call[1]) for call in calls}:
                self._check(keys)
        if self.twice:
            before = self._snapshot()
            second = list(self.store.call_many(calls))
            assert same(second, first), f"repeated, they answer {second!r}, not {first!r}"
            assert same(self._snapshot(), before), "repeated, they change the store"
        yield from first

    def replay(self, position: int = -1) -> list[Any]:
        """Send an earlier call once more and return its reply."""
        script, keys, argv = self.calls[position]
        return self.store.call(script, keys, *argv)

    def members(self, key: str, most: int | None = None) -> list[str]:
        """Return some members of a set."""
        return self.store.members(key, most)


def same(one: Any, other: Any) -> bool:
    """Compare two replies or snapshots; numbers above 20 are times, which go on between them."""
    if isinstance(one, bytes) and isinstance(other, bytes):
        texts = [WAITS.fullmatch(text) for text in (one, other)]
        one, other = (
            [text[1], int(text[2]), text[3]] if text else each for text, each in zip(texts, (one, other), strict=True)
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float) and one > 20 and other > 20:
        return abs(one - other) < 5000
    return bool(one == other)


def body(key: str = "k", value: Any = None) -> None:
    """Take what the driver's triggers pass."""


def in_order(replies: Iterable[tuple[int, Any]]) -> list[Any]:
    """Return what became of calls in the calls' order."""
    return [reply for _, reply in sorted(replies, key=lambda each: each[0])]


class Driver:
    """One namespace of a server.

    Attributes:
        engine: The engine.
        store: What it speaks through.
        clocked: The clock of the test's own, if it has one.
    """

    def __init__(
        self, client: redis.Redis, namespace: str, timing: Timing | None = None, *, clocked: bool = False
    ) -> None:
        self.client = client
        self.names = Names("", namespace)
        self.clocked = ClockedStore(client, self.names) if clocked else None
        store = self.clocked or RedisStore(lambda: client, self.names, "test server")
        self.store = Twice(store, self.snapshot, client.exists, self.check)
        self.engine = Transitions(self.store, timing or Timing())
        #: Looks without being watched.
        self._beside = Transitions(store, timing or Timing())
        self._ids = itertools.count(1)

    # What the processes do

    def policy(self, task: str = "task", **options: Any) -> Policy:
        """Return a task's options."""
        given = {name if name == "coalesce" else f"coalesce_{name}": value for name, value in options.items()}
        return Policy.declare(task, body, False, {"coalesce_key": "<key>", **given})

    def trigger(
        self,
        value: Any = None,
        *,
        key: str = "k",
        task: str = "task",
        merging: MergeWanted | None = None,
        given: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Make a call; `options` are the task's without their prefix, `given` the fields of the trigger."""
        fields = {
            "task_id": f"id-{next(self._ids)}",
            "args": json.dumps(value).encode(),
            **(given or {}),
        }
        times = {name: fields.pop(name) for name in TIMES if name in fields}
        fields["times"] = {name: time for name, time in times.items() if time is not None}
        policy = self.policy(task, **options)
        named = (key, value)
        fields.setdefault("needs", policy.needs(named, {}))
        fields.setdefault("labels", policy.labels_of(named, {}))
        return self.engine.trigger(policy, Trigger(key=key, **fields), merging)

    def triggers(self, asked: Sequence[Any]) -> list[Any]:
        """Make calls in one go; return their answers in the calls' order."""
        return in_order(self.engine.triggers(asked))

    def follow(self, many: int) -> None:
        """Make calls that join, each with a follower of its own: b"1" and on."""
        with self.in_bulk():
            for n in range(1, many + 1):
                self.trigger(n, given={"follower": b"%d" % n})

    @contextmanager
    def in_bulk(self) -> Iterator[None]:
        """Send every transition once, and do not look at the record after each."""
        kept = self.store.twice, self.store.checked
        self.store.twice = self.store.checked = False
        yield
        self.store.twice, self.store.checked = kept

    @contextmanager
    def once(self, but: bool = True) -> Iterator[None]:
        """Send every transition once, where the answer, repeated, would be another."""
        twice, self.store.twice = self.store.twice, self.store.twice and not but
        yield
        self.store.twice = twice

    def check_lease(self, lease: Lease) -> bool:
        """Return whether a lease still holds."""
        return self.engine.check(lease)

    def state(self, key: str = "k", scope: str = "task") -> str:
        """Return a key's state id."""
        return state_id(scope, key)

    def envelope(self, accepted: Accepted | Known, key: str = "k", **changed: Any) -> Envelope:
        """Return what the message of a trigger's run says."""
        attempt = accepted.attempt if isinstance(accepted, Known) else 0
        state = self.state(key, changed.pop("scope", "task"))
        envelope = Envelope(state, accepted.run, accepted.task_id, "task", attempt, 0, 0, b"", b"")
        return envelope._replace(**changed)

    def start(self, envelope: Envelope, owner: str = "w/1/a", claim: str = "", **changed: Any) -> Started:
        """Bring a message to the gate."""
        given = {"late": False, "revoked": False, **changed}
        return self.engine.start(envelope, owner=owner, claim=claim or f"claim-{next(self._ids)}", **given)

    def run(self, accepted: Any, key: str = "k", owner: str = "w/1/a", **changed: Any) -> Lease:
        """Start a trigger's run, which must be startable, and return its lease."""
        of = {name: changed.pop(name) for name in ("scope", "task") if name in changed}
        envelope = accepted if isinstance(accepted, Envelope) else self.envelope(accepted, key, **of)
        started = self.start(envelope, owner, **changed)
        assert started.answer is Answer.RUNNING, started
        assert started.lease is not None
        return started.lease

    def take_back(self, accepted: Any, key: str = "k", scope: str = "task", **given: Any) -> RolledBack:
        """Take back a run whose publish failed; `given` are fields of its metadata, and arguments of the rollback."""
        known = {name: given.pop(name) for name in ("triggers", "labels") if name in given}
        policy = self.policy(scope=scope)
        return self.engine.rollback(RunMeta.unstarted(policy, key, accepted, **known), **given)

    def finish(self, lease: Lease, **options: Any) -> Finished:
        """End a run that has no followers, under a lease that holds."""
        reply = self.engine.finish(lease, **options)
        assert isinstance(reply, Finished), reply
        return reply

    def finish_all(self, lease: Lease, most: int = 1000) -> list[list[bytes]]:
        """End a run as its child does; return the slices of its followers."""
        slices: list[list[bytes]] = []
        for _ in range(most):
            reply = self.engine.finish(lease, told=sum(map(len, slices)))
            if isinstance(reply, Finished):
                return slices
            assert isinstance(reply, Followers)
            slices.append(list(reply.blobs))
        raise AssertionError("it does not end")

    def drain_meta(self, lease: Lease) -> RunMeta:
        """Return what a drain is announced with."""
        return RunMeta.of(lease)

    # What is stored

    def keys(self) -> list[str]:
        """Return the names of all keys of the namespace, without it."""
        prefix = f"{{{self.names.namespace}}}:"
        found: Any = self.client.scan_iter(match=f"{_escaped(prefix)}*", count=1000)
        return sorted(key.decode().removeprefix(prefix) for key in found)

    def left(self) -> list[str]:
        """Return what is stored for keys, which is nothing when all are idle and no worker lives."""
        return [name for name in self.keys() if name not in RESTS]

    def snapshot(self) -> dict[str, Any]:
        """Return all that is stored, scores and packed values as they are."""
        found: dict[str, Any] = {}
        readers: dict[bytes, Callable[[str], Any]] = {
            b"hash": lambda name: {f: _unordered(f, v) for f, v in self.client.hgetall(name).items()},
            b"zset": lambda name: dict(self.client.zrange(name, 0, -1, withscores=True)),
            b"set": self.client.smembers,
        }
        for name in self.keys():
            full = f"{{{self.names.namespace}}}:{name}"
            kind: Any = self.client.type(full)
            found[name] = readers[kind](full)
        meta = found.get("meta", {})
        for field in (b"beat", b"grace"):
            if field in meta:
                meta[field] = int(meta[field])
        return found

    def shown(self, key: str = "k", scope: str = "task") -> dict[str, Any]:
        """Return a key's runs by id, with the head under ``"head"``; empty if the key is idle."""
        view = self.engine.show(scope, key)
        if view is None:
            return {}
        return {"head": view.head, **{run["id"]: run for run in view.runs}}

    def timer(self, run: str, key: str = "k", scope: str = "task") -> float | None:
        """Return how many milliseconds from now a run's timer is over, ``None`` if it has none."""
        at: Any = self.client.zscore(self.names.timers, f"{self.state(key, scope)}/{run}")
        return None if at is None else at - self.clock()

    def waiting(self, key: str = "k", scope: str = "task") -> list[str]:
        """Return the runs that are due and wait for a slot, in their order."""
        found: Any = self.client.zrange(self.names.record(self.state(key, scope))[1], 0, -1)
        return [run.decode() for run in found]

    def presence(self, owner: str) -> float | None:
        """Return how many milliseconds from now a presence runs out."""
        at: Any = self.client.zscore(self.names.presence, owner)
        return None if at is None else at - self.clock()

    def clock(self) -> float:
        """Return the server's clock in milliseconds."""
        if self.clocked is not None:
            return self.clocked.now
        seconds, micros = self.client.time()  # type: ignore[misc]
        return float(seconds * 1000 + micros / 1000)

    # What is always true

    def check(self, keys: Sequence[str]) -> None:
        """Fail if a record breaks an invariant of design.md's.

        Args:
            keys: The names of its keys.
        """
        record, wait, _, timers = keys[:4]
        state = record.rsplit(":", 1)[1]
        fields: set[bytes] = set(self.client.hkeys(record))  # type: ignore[arg-type]
        found: Any = self.client.zrange(timers, 0, -1)
        timed = {ref.decode().split("/")[1] for ref in found if ref.decode().startswith(f"{state}/")}
        waiting = [run.decode() for run in self.client.zrange(wait, 0, -1)]  # type: ignore[union-attr]
        if not fields:
            assert not waiting, "runs wait, and there is no record"
            assert not timed, f"timers without a record: {timed}"
            return
        assert state in self._beside.busy(), "a key with a record is not listed"
        reply = self.store.store.call("show", keys, json.dumps({"state": state}))
        view = json.loads(reply[2])
        head, runs = view["head"], {run["id"]: run for run in view["runs"]}
        by_state = {word: {i for i, run in runs.items() if run["state"] == word} for word in RunState}
        taken = by_state[RunState.DISPATCHED] | by_state[RunState.RUNNING] | by_state[RunState.RETRYING]
        assert head["runs"] == len(runs) > 0, "runs are not counted"
        assert set(head["active"]) == taken, "a slot is held by what does not go on, or the other way round"
        assert set(waiting) <= by_state[RunState.PENDING], "something waits that is not pending"
        moved = (taken - by_state[RunState.RUNNING]) | by_state[RunState.CLEARED]
        assert timed - set(waiting) == moved | (by_state[RunState.PENDING] - set(waiting)), "a timer too many, or few"
        for run in by_state[RunState.RUNNING]:
            holder = self.names.held(runs[run]["owner"])
            assert self.client.sismember(holder, f"{state}/{run}"), "a running run without a holder"
        if waiting:
            first = runs[waiting[0]]
            limits = [*head["active"].values(), first["limit"]]
            full = len(head["active"]) >= min(limits)
            assert full or first.get("lined") or waiting[0] in timed, "a free slot met a waiting run"
        for run in runs.values():
            self._check_constraints(run, f"{state}/{run['id']}", run["id"] in taken, keys)
        for names in (head["open"] or {}).values():
            for run in names:
                assert runs[run]["state"] in ("pending", "dispatched", "retrying"), "an open run that cannot be joined"
        blobs = {field.split(b":")[1].decode() for field in fields if field.startswith((b"args:", b"call:"))}
        assert blobs <= set(runs), "what is left of a run that is gone"

    def _check_constraints(self, run: Mapping[str, Any], ref: str, taken: bool, keys: Sequence[str]) -> None:
        """Fail unless a run holds the slots of its constraints, or stands in their lines, as its state says."""
        slots, lines = keys[6:8]
        for need in run.get("needs") or ():
            holds = self.client.zscore(slots, f"{need['id']}/{ref}") is not None
            assert holds == taken, "a constraint's slot is held by who has none of the key, or the other way round"
            place = f"{need['id']}/{int(run['seq']):020}/{ref}"
            lined = self.client.zscore(lines, place) is not None
            assert lined == bool(run.get("lined")), "a run does not stand where it says"

    def end_all(self) -> None:
        """Let all that goes on come to its end; fail if something is left though nothing waits for its time."""
        records = [name.removeprefix("rec:") for name in self.keys() if name.startswith("rec:")]
        with self.in_bulk(), suppress(StoreError):
            ended = [self._end(state) for state in records]
            if all(ended):
                assert [name for name in self.left() if name.split(":")[0] not in LATER] == []

    def _end(self, state: str) -> bool:
        """End a record's runs, one after the other; return whether none is left."""
        keys = self.names.record(state)
        while self.client.exists(keys[0]):
            view = json.loads(self.store.call("show", keys, json.dumps({"state": state}))[2])
            runs = {word: [run for run in view["runs"] if run["state"] == word] for word in RunState}
            held = runs[RunState.RUNNING] + runs[RunState.CLEARED]
            coming = runs[RunState.DISPATCHED] + runs[RunState.RETRYING]
            for run in held:
                self.finish_all(
                    Lease(
                        state, run["id"], run["task_id"], run["task"], run["attempt"], run["token"],
                        view["head"]["session"], 0, 1, "", "", run.get("owner", ""),
                    )
                )  # fmt: skip
            for run in coming:
                given = (run["task_id"], run["task"], run["attempt"], run["version"], 0, b"", b"")
                lease = self.start(Envelope(state, run["id"], *given)).lease
                if lease is None:
                    return False
                self.finish_all(lease)
            if not held and not coming:
                return False
        return True

    # The clock goes on

    def pass_time(self, milliseconds: float) -> None:
        """Wait until the server's clock has gone on, or move the test's own."""
        if self.clocked is not None:
            self.clocked.set(self.clocked.now + int(milliseconds))
            return
        end = self.clock() + milliseconds
        wait_until(lambda: self.clock() >= end)

    def past(self, run: str, key: str = "k", scope: str = "task") -> str:
        """Let a run's timer be over, and return its name in the timers."""
        ref = f"{self.state(key, scope)}/{run}"
        assert self.client.zscore(self.names.timers, ref) is not None, "it has no timer"
        self.client.zadd(self.names.timers, {ref: self.clock() - 1}, xx=True)
        return ref

    def silent(self, owner: str) -> None:
        """Let a presence run out."""
        self.client.zadd(self.names.presence, {owner: self.clock() - 1})

    def drop(self) -> None:
        """Remove what is left of the namespace."""
        names = [f"{{{self.names.namespace}}}:{name}" for name in self.keys()]
        if names:
            self.client.delete(*names)


def _unordered(field: bytes, value: bytes) -> bytes:
    """Return a packed value without the order of its fields, which Lua does not keep."""
    return bytes(sorted(value)) if field == b"head" or field.startswith(b"run:") else value


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "[]*?\\^" else c for c in text)
