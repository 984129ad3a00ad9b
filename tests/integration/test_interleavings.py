"""Generated interleavings of producers, workers, deaths, losses and sweeps against a real server.

Hypothesis makes up what happens; after every step the record's invariants hold (see the driver), and at the end, when
everybody who can has done his part, every accepted trigger has been covered and nothing is left.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from celery_coalesce.records import Accepted, Envelope, Finished, Followers, Lease
from celery_coalesce.states import Answer, Disposition
from tests.integration.driver import Driver
from tests.support.servers import ValkeyServer
from tests.support.stories import tell_stories

KEYS = ("a", "b")
OWNERS = ("w/1/a", "w/2/b", "w/3/c")


@dataclass
class Message:
    """A message in the broker, or in a worker's hands."""

    envelope: Envelope
    value: Any


@dataclass
class Held:
    """A run in a worker's hands."""

    lease: Lease
    message: Message
    late: bool


@dataclass
class Expected:
    """What is known of a run that triggers were told of."""

    #: The arguments of the last trigger that was accepted for it.
    latest: Any
    #: The triggers that it is to cover.
    triggers: set[int] = field(default_factory=set)


class Interleavings(RuleBasedStateMachine):
    """One namespace, two keys, three workers."""

    client: redis.Redis

    def __init__(self) -> None:
        super().__init__()
        self.drive = Driver(self.client, f"test-{uuid.uuid4().hex[:8]}")
        self.broker: list[Message] = []
        self.held: list[Held] = []
        self.stale: list[Lease] = []
        self.cleared: list[Lease] = []
        self.expected: dict[str, Expected] = {}
        self.open: set[int] = set()  # triggers that were accepted, and not covered yet
        self.tokens: dict[str, int] = {}
        self.drained: dict[str, int] = {}
        self.counter = 0

    @initialize(twice=st.booleans())
    def begin(self, twice: bool) -> None:
        self.drive.store.twice = twice
        for owner in OWNERS:
            self.drive.engine.heartbeat(owner)

    # Producers

    @rule(
        key=st.sampled_from(KEYS),
        mode=st.sampled_from(["queue", "queue", "queue", "serialize", "skip"]),
        task=st.sampled_from(["one", "two"]),
        many=st.integers(1, 2),
        delay=st.sampled_from([None, None, None, 3]),
        follower=st.booleans(),
        fate=st.sampled_from(["published", "published", "published", "died", "failed"]),
    )
    def trigger(self, key: str, mode: str, task: str, many: int, delay: int | None, follower: bool, fate: str) -> None:
        self.counter += 1
        number = self.counter
        options: dict[str, Any] = {"coalesce": mode, "scope": "shared", "task": task}
        if mode == "queue":
            options["max_queued"] = many
        given: dict[str, Any] = {"delay": delay, "follower": b"%d" % number if follower else b""}
        with self.drive.once(delay is not None):
            accepted = self.drive.trigger(number, key=key, given=given, **options)
        assert isinstance(accepted, Accepted)
        if accepted.disposition is Disposition.SKIPPED:
            return
        expected = self.expected.setdefault(accepted.run, Expected(number))
        expected.latest = number
        expected.triggers.add(number)
        self.open.add(number)
        for envelope in accepted.sent:
            if fate != "died":
                self.send(envelope)
        if accepted.delay is None or accepted.disposition is Disposition.COALESCED:
            return
        envelope = Envelope(
            self.drive.state(key, "shared"), accepted.run, accepted.task_id, task, 0, 0, accepted.delay,
            json.dumps(number).encode(), b"",
        )  # fmt: skip
        if fate == "published":
            self.send(envelope)
        elif fate == "failed":
            with self.drive.once():
                back = self.drive.take_back(envelope, key=key, scope="shared")
            if envelope.run not in self.runs(key):
                self.expected.pop(envelope.run)
                self.open.discard(number)  # the caller got an error: it was not accepted
            for each in back.sent:
                self.send(each)

    def runs(self, key: str) -> dict[str, Any]:
        return self.drive.shown(key, "shared")

    def send(self, envelope: Envelope) -> None:
        self.broker.append(Message(envelope, json.loads(envelope.args)))

    # Workers

    @precondition(lambda self: self.broker)
    @rule(
        data=st.data(),
        owner=st.sampled_from(OWNERS),
        late=st.booleans(),
        again=st.sampled_from([False, False, True]),
        revoked=st.sampled_from([False, False, False, True]),
    )
    def deliver(self, data: Any, owner: str, late: bool, again: bool, revoked: bool) -> None:
        position = data.draw(st.integers(0, len(self.broker) - 1))
        message = self.broker[position] if again else self.broker.pop(position)
        self.gate(message, owner, late, revoked)

    def gate(self, message: Message, owner: str, late: bool = False, revoked: bool = False) -> None:
        envelope = message.envelope
        started = self.drive.start(envelope, owner, late=late, revoked=revoked)
        assert started.answer is not Answer.UNKNOWN
        if started.answer is Answer.EARLY:
            self.broker.append(message)
        elif started.answer is Answer.CARRY:
            self.carry(envelope)
        elif started.lease is not None:
            self.started(Held(started.lease, message, late))

    def carry(self, envelope: Envelope) -> None:
        old = self.expected.pop(envelope.run)
        before = set(self.all_runs())
        for each in self.drive.engine.carry(envelope, f"carried-{self.counter}-{envelope.run}", b""):
            self.send(each)
        (new,) = set(self.all_runs()) - before
        self.expected[new] = old

    def all_runs(self) -> dict[str, Any]:
        found = {**self.runs("a"), **self.runs("b")}
        found.pop("head", None)
        return found

    def started(self, held: Held) -> None:
        lease = held.lease
        assert int(lease.token) > self.tokens.get(lease.key, 0), "tokens do not grow"
        self.tokens[lease.key] = int(lease.token)
        expected = self.expected[lease.run]
        value = json.loads(lease.args) if lease.args else held.message.value
        assert value == expected.latest, f"run {lease.run} got {value}, not {expected.latest}"
        self.open -= expected.triggers
        self.held.append(held)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "finish", "retry", "later", "requeue", "returned"]))
    def end(self, data: Any, how: str) -> None:
        position = data.draw(st.integers(0, len(self.held) - 1))
        held = self.held[position]
        lease = held.lease
        if how == "returned":
            assert self.drive.engine.check(lease, returned=True)
            return
        self.held.pop(position)
        if how == "finish" or lease.answer != Answer.RUNNING:
            self.finish(lease)
        elif how == "requeue":
            with self.drive.once():
                assert self.drive.engine.requeue(lease) is not None
            self.broker.append(held.message)
            self.stale.append(lease)
        else:
            value = held.message.value if not lease.args else json.loads(lease.args)
            delay = 3 if how == "later" else None
            blob = json.dumps(value).encode()
            with self.drive.once(delay is not None):
                sent = self.drive.engine.retry(lease, lease.task, blob, b"", delay=delay)
            assert sent is not None
            for envelope in sent:
                self.send(envelope)
            self.stale.append(lease)

    def finish(self, lease: Lease) -> None:
        told = 0
        while not isinstance(reply := self.drive.engine.finish(lease, told=told), Finished):
            assert isinstance(reply, Followers), "a lease was lost that nobody took"
            told += len(reply.blobs)
        for envelope in reply.sent:
            self.send(envelope)
        if reply.drained:
            self.drained[lease.session] = self.drained.get(lease.session, 0) + 1
        self.stale.append(lease)

    # Deaths, losses and sweeps

    @precondition(lambda self: self.broker)
    @rule(data=st.data())
    def lose_a_message(self, data: Any) -> None:
        self.broker.pop(data.draw(st.integers(0, len(self.broker) - 1)))

    @rule(owner=st.sampled_from(OWNERS), sweeper=st.sampled_from(OWNERS), dies=st.sampled_from([False, False, True]))
    def kill_a_worker(self, owner: str, sweeper: str, dies: bool) -> None:
        if owner == sweeper:
            return
        self.drive.silent(owner)
        for held in [each for each in self.held if each.lease.owner == owner]:
            if held.late:
                self.broker.append(held.message)
        if not dies:
            self.sweep(owner, sweeper)
        else:
            # The sweeper dies as well, once it has taken the leases: a third one comes.
            third = next(each for each in OWNERS if each not in (owner, sweeper))
            for ref in self.drive.engine.held(owner):
                self.drive.engine.lose(ref, owner, sweeper)
            self.drive.silent(sweeper)
            self.sweep(owner, third)
            self.sweep(sweeper, third)
            self.drive.engine.heartbeat(sweeper)
        self.drive.engine.heartbeat(owner)  # one of the same name comes

    def sweep(self, owner: str, sweeper: str) -> None:
        for ref in self.drive.engine.held(owner):
            lost = self.drive.engine.lose(ref, owner, sweeper)
            assert lost is not None
            if lost.sent:
                for envelope in lost.sent:
                    self.send(envelope)
            else:
                self.finish(lost.lease)
        self.drive.engine.bury(owner)
        gone = [each for each in self.held if not self.drive.engine.check(each.lease)]
        self.stale += [each.lease for each in gone]
        self.held = [each for each in self.held if each not in gone]

    @rule(data=st.data(), dies=st.sampled_from([False, False, True]))
    def a_timer_is_over(self, data: Any, dies: bool) -> None:
        timers: Any = self.client.zrange(self.drive.names.timers, 0, -1)
        if timers:
            ref = data.draw(st.sampled_from(sorted(timers))).decode()
            self.wake(ref, dies)

    def wake(self, ref: str, dies: bool = False) -> None:
        self.client.zadd(self.drive.names.timers, {ref: self.drive.clock() - 1}, xx=True)
        with self.drive.once():
            woken = self.drive.engine.wake(ref)
        if dies:
            return
        for envelope in woken.sent:
            self.send(envelope)
        if woken.cleared is not None:
            self.finish(woken.cleared.lease)

    @rule(key=st.sampled_from(KEYS), task=st.sampled_from([None, "one"]), dies=st.booleans())
    def clear(self, key: str, task: str | None, dies: bool) -> None:
        with self.drive.once():
            reply = self.drive.engine.clear("shared", key, task)
        for run in [each for each in self.runs(key).values() if each.get("state") == "cleared"]:
            gone = self.expected.pop(run["id"], None)
            if gone is not None:
                self.open -= gone.triggers  # they end visibly
        for envelope in reply.sent:
            self.send(envelope)
        if not dies:
            for cleared in reply.told_here:
                self.finish(cleared.lease)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def a_stale_token_is_refused(self, data: Any) -> None:
        lease = data.draw(st.sampled_from(self.stale))
        with self.drive.once():
            before = self.drive.snapshot()
            assert not self.drive.engine.check(lease, returned=True)
            # The last requeue, retry or finish may be answered again; it changes nothing.
            self.drive.engine.requeue(lease)
            self.drive.engine.retry(lease, lease.task, b"0", b"")
            self.drive.engine.finish(lease)
            assert self.drive.snapshot() == before

    # What is always true

    @invariant()
    def no_key_has_two_runs(self) -> None:
        for key in KEYS:
            running = [run for run in self.runs(key).values() if run.get("state") == "running"]
            assert len(running) <= 1

    @invariant()
    def waiting_is_bounded(self) -> None:
        for key in KEYS:
            for runs in ((self.runs(key).get("head") or {}).get("open") or {}).values():
                assert len(runs) <= 2

    @invariant()
    def every_open_trigger_has_its_run(self) -> None:
        covered = {number for run in self.all_runs() for number in self.expected.get(run, Expected(0)).triggers}
        assert self.open <= covered, f"lost: {self.open - covered}"

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.drive.drop()

    def settle(self) -> None:
        """Let everybody who can do his part, until nothing is left."""
        self.drive.store.twice = False
        for _ in range(200):
            for held in self.held:
                self.finish(held.lease)
            self.held = []
            messages, self.broker = self.broker, []
            for message in messages:
                self.gate(message, OWNERS[0])
            if not self.broker and not self.held:
                if not self.all_runs():
                    break
                timers: Any = self.client.zrange(self.drive.names.timers, 0, -1)
                for ref in timers:
                    self.wake(ref.decode())
        assert self.all_runs() == {}
        assert self.open == set()
        for owner in OWNERS:
            self.drive.engine.bury(owner, leaving=True)
        assert self.drive.left() == []
        assert all(count == 1 for count in self.drained.values()), "a session has drained twice"


@pytest.fixture
def machine(state_server: ValkeyServer) -> Iterator[type[Interleavings]]:
    """The machine, over the shared server."""
    with state_server.client(decode_responses=False) as client:
        yield type("Machine", (Interleavings,), {"client": client})


@pytest.mark.timeout(300)
def test_whatever_happens_no_promise_is_broken(machine: type[Interleavings]) -> None:
    """G1, G2, G3, G4 and G6, over made-up stories."""
    tell_stories(machine, 25)
