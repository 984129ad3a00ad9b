"""What a call costs, Redis being broker and state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from benchmarks.speed.bench import Bench
from benchmarks.speed.caller import WARM, Caller
from benchmarks.speed.contenders import ALL, HEIMDALL, ONCE, OURS, PLAIN, SINGLETON, Setup
from benchmarks.speed.report import Row, row
from benchmarks.speed.rounds import take_turns
from benchmarks.speed.servers import Server, redis_server

CALLS, BATCH = 200, 1000
#: A duplicate waits for a second there.
SLOW = {"number": 1, "warm": 1}
SLOW_ROUNDS = 3

Figures = dict[str, list[dict[str, float]]]


def measure(bench: Bench) -> list[Row]:
    """Measure with results off, then on."""
    with redis_server(bench.redis) as server:
        rows = _without_results(bench, server)
        bench.say("with results")
        return rows + _with_results(bench, server)


def _without_results(bench: Bench, server: Server) -> list[Row]:
    with ExitStack() as stack:
        callers = {name: stack.enter_context(Caller(Setup(name, server.url, server.url))) for name in ALL}
        parts = {f"{name} fresh": _part(server, callers[name], "fresh", CALLS) for name in ALL}
        parts["floor"] = _part(server, callers[PLAIN], "floor", CALLS)
        parts |= {f"{name} again": _part(server, callers[name], "again", CALLS) for name in (OURS, ONCE, SINGLETON)}
        for batch in ("batch_fresh", "batch_again", "batch_each_again"):
            parts[batch] = _part(server, callers[OURS], batch, BATCH)
        parts["batch_fresh"]()  # the first of a process loads a script
        found = take_turns(bench.rounds, parts)
        bench.say("a duplicate of heimdall")
        slow = {name: parts[name] for name in ("plain fresh",)}
        slow["heimdall again"] = partial(_measured, server, callers[HEIMDALL], "again", SLOW)
        beside = take_turns(min(SLOW_ROUNDS, bench.rounds), slow)
    return [*_rows(found, ""), _slow_row(beside), *_cpu_rows(found)]


def _with_results(bench: Bench, server: Server) -> list[Row]:
    names = (PLAIN, OURS, ONCE, SINGLETON)
    with ExitStack() as stack:
        setups = {name: Setup(name, server.url, server.url, results=server.url) for name in names}
        callers = {name: stack.enter_context(Caller(setup)) for name, setup in setups.items()}
        parts = {f"{name} fresh": _part(server, callers[name], "fresh", CALLS) for name in names}
        parts["ours again"] = _part(server, callers[OURS], "again", CALLS)
        found = take_turns(bench.rounds, parts)
    return _rows(found, ", results on")


def _part(server: Server, caller: Caller, operation: str, number: int) -> Callable[[], dict[str, float]]:
    return partial(_measured, server, caller, operation, {"number": number})


def _measured(server: Server, caller: Caller, operation: str, options: dict[str, int]) -> dict[str, float]:
    server.clear()
    before = server.cpu()
    found: dict[str, float] = caller(operation, **options)
    calls = options["number"] + options.get("warm", 0 if "batch" in operation else WARM)
    if operation == "batch_each_again":
        calls *= 2
    found["redis"] = 1e6 * (server.cpu() - before) / calls
    return found


def _of(found: Figures, part: str, figure: str = "wall") -> list[float]:
    return [each[figure] for each in found[part]]


def _rows(found: Figures, suffix: str) -> list[Row]:
    plain = ("plain", _of(found, "plain fresh"))
    rows = []

    def add(part: str, what: str, beside: tuple[str, Sequence[float]] = plain, most: Sequence[float] = ()) -> None:
        if part in found:
            rows.append(row(what + suffix, _of(found, part), "us", beside=beside, most=most))

    add("plain fresh", "plain, fresh key")
    add("ours fresh", "ours, fresh key", most=(1.15, 1.0))
    for name in (ONCE, SINGLETON, HEIMDALL):
        add(f"{name} fresh", f"{name}, fresh key")
    add("floor", "floor: one EVALSHA")
    add("ours again", "ours, coalesces", most=(0.3,))
    if "floor" in found:
        add("ours again", "ours, coalesces, beside the floor", ("floor", _of(found, "floor")), (1.3,))
    for name in (ONCE, SINGLETON):
        add(f"{name} again", f"{name}, duplicate")
    add("batch_fresh", f"ours, batch of {BATCH:,} fresh keys, each", most=(0.7,))
    add("batch_again", f"ours, batch of {BATCH:,} of one queued key, each", most=(0.05,))
    add("batch_each_again", f"ours, batch of {BATCH:,} queued keys, each")
    return rows


def _slow_row(found: Figures) -> Row:
    return row("heimdall, duplicate", _of(found, "heimdall again"), "us", beside=("plain", _of(found, "plain fresh")))


def _cpu_rows(found: Figures) -> list[Row]:
    rows = []
    for figure, what in (("cpu", "CPU of the producer"), ("redis", "CPU of Redis")):
        beside = ("plain", _of(found, "plain fresh", figure))
        rows += [row(f"{what}: {part}", _of(found, part, figure), "us", beside=beside) for part in found]
    return rows
