"""Measure, and print what was found."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.bench import Bench
from benchmarks.speed.report import as_json, growth_rows, surroundings, table
from benchmarks.speed.servers import redis_server

SECTIONS = ("producer", "rabbitmq", "worker", "latency", "burst", "memory", "imports", "scale")


def arguments() -> argparse.Namespace:
    """Return what the command was given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--rounds", type=int, default=10, help="10 by default; quick sections make more of them")
    parser.add_argument("--redis", metavar="URL", help="an empty database to use, of a server that is quiet otherwise")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures there")
    parser.add_argument("--plots", metavar="DIRECTORY", type=Path, help="draw the figures of `scale` there")
    parser.add_argument("--full", action="store_true", help="`scale` to a million keys, and 100,000 leases")
    given = parser.parse_args()
    unknown = [name for name in given.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    if given.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {given.rounds}")
    return given


def say(text: str) -> None:
    """Tell whoever waits what is going on."""
    print(f"... {text}", flush=True)


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Measure the sections, print each as it is done, and return all figures."""
    bench = Bench(given.rounds, given.redis, say)
    with redis_server(given.redis) as server:
        around = surroundings(server.version())
    print("  ".join(f"{name} {value}" for name, value in around.items()))
    found: dict[str, Any] = {"with": around, "rounds": given.rounds, "sections": {}, "figures": {}}
    for name in given.sections or SECTIONS:
        say(name)
        began = time.monotonic()
        section = importlib.import_module(f"benchmarks.speed.{name}")
        if name == "scale":
            sizes = {"most_keys": 10**6, "most_leases": 10**5} if given.full else {}
            found["figures"] = section.measure(say, **sizes)
            rows = growth_rows(found["figures"])
        else:
            rows = section.measure(bench)
        found["sections"][name] = as_json(rows)
        print(table(name, rows, time.monotonic() - began), end="\n\n", flush=True)
    return found


def main() -> None:
    """Measure, write and draw."""
    given = arguments()
    found = measured(given)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.plots:
        from benchmarks.speed import plots

        given.plots.mkdir(parents=True, exist_ok=True)
        plots.draw(found["figures"], given.plots)


if __name__ == "__main__":
    main()
