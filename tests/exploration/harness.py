"""Explores a setup on an embedded server of its own."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import redis

from tests.exploration.bounds import Setup
from tests.exploration.explorer import Graph, explore
from tests.exploration.processes import NAMES, Acts, make_app, on_stage
from tests.exploration.snapshots import Snapshots
from tests.exploration.system import System
from tests.support.servers import ValkeyServer

#: Changes the text of a script, given its name.
Mutate = Callable[[str, str], str]


@dataclass(frozen=True)
class Counts:
    """What was explored."""

    graph: Graph
    #: How many ways lead from the start to an end, ``None`` if some go in circles.
    interleavings: int | None
    seconds: float

    def __str__(self) -> str:
        ways = "circles" if self.interleavings is None else f"{self.interleavings:,}"
        graph = self.graph
        return f"{graph.states:>9,} {graph.transitions:>10,} {ways:>26} {graph.depth:>6} {self.seconds:>8.1f}"


def explored(setup: Setup, *, mutate: Mutate = lambda name, text: text, most: int = 10_000_000) -> Counts:
    """Explore a setup, and return how much there was.

    Args:
        setup: The setup.
        mutate: Puts a mistake into the scripts.
        most: How many states there may be.

    Raises:
        Violation: A state, or what is done in one, is wrong; or there is a state from which no end can be reached.
        OverflowError: There are more states.
    """
    began = time.monotonic()
    with ValkeyServer() as server, on_stage(), _undisturbed():
        client = redis.Redis(unix_socket_path=str(server.unix_socket), protocol=2)
        acts = Acts(make_app({"key": "k", "shortcuts": setup.shortcuts, **setup.options}))
        system = System(setup, acts, Snapshots(client, NAMES, mutate))
        graph = explore(system.start(), system.steps, most)
        client.close()
    graph.check_drains()
    return Counts(graph, graph.interleavings(), time.monotonic() - began)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the package from telling of deaths by the thousand, and Python from looking for garbage in what is kept."""
    logger = logging.getLogger("celery_coalesce")
    disabled, logger.disabled = logger.disabled, True
    gc.disable()
    try:
        yield
    finally:
        logger.disabled = disabled
        gc.enable()
        gc.collect()
