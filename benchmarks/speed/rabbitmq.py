"""What a call costs with RabbitMQ as the broker; Redis holds the state."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from kombu import Connection

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import Caller
from benchmarks.speed.contenders import ONCE, OURS, PLAIN, Setup
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns
from benchmarks.speed.servers import Server, rabbit_server, redis_server

CONTENDERS = (PLAIN, OURS, ONCE)
CALLS = 300


def measure(bench: Bench) -> list[Row]:
    """Measure, where RabbitMQ is installed."""
    with rabbit_server() as broker:
        if broker is None:
            bench.say("left out: rabbitmq-server is not installed")
            return []
        with redis_server(bench.redis) as server:
            return _rows(_measured(bench, broker, server))


def _measured(bench: Bench, broker: str, server: Server) -> dict[str, list[float]]:
    with ExitStack() as stack:
        callers = {name: stack.enter_context(Caller(Setup(name, broker, server.url))) for name in CONTENDERS}

        def part(name: str, operation: str) -> Callable[[], float]:
            return partial(_round, broker, server, callers[name], (operation, f"speed.{name}"))

        parts = {name: part(name, "fresh") for name in CONTENDERS}
        parts |= {"floor": part(PLAIN, "floor"), "again": part(OURS, "again")}
        take_turns(1, parts)
        return take_turns(bench.rounds, parts)


def _round(broker: str, server: Server, caller: Caller, what: tuple[str, str]) -> float:
    operation, queue = what
    server.clear()
    wall: float = caller(operation, number=CALLS)["wall"]
    if operation != "floor":
        with Connection(broker) as connection:
            connection.default_channel.queue_purge(queue)
    return wall


def _rows(found: dict[str, list[float]]) -> list[Row]:
    beside = ("plain", found[PLAIN])
    sums = [plain + floor for plain, floor in zip(found[PLAIN], found["floor"], strict=True)]
    return [
        row("plain, fresh key", found[PLAIN], "us", beside=beside),
        row("ours, fresh key", found[OURS], "us", beside=beside),
        row("once, fresh key", found[ONCE], "us", beside=beside),
        row("floor: one EVALSHA", found["floor"], "us", beside=beside),
        row("ours, fresh key, beside plain and the floor", found[OURS], "us", beside=("sum", sums), most=(1.15,)),
        row("ours, coalesces", found["again"], "us", beside=beside),
    ]
