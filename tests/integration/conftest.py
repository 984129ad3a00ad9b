"""Fixtures of the integration tests."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_coalesce.records import Timing
from tests.integration.driver import Driver
from tests.integration.sites import LEASE, Site
from tests.support.app import HarnessApp
from tests.support.process import HOST
from tests.support.proxy import TCPProxy
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


@pytest.fixture
def make_driver(state_server: ValkeyServer) -> Iterator[Callable[..., Driver]]:
    """Make a driver with a namespace of its own: `make_driver(**Timing's fields)`."""
    with state_server.client(decode_responses=False) as client:
        drivers: list[Driver] = []

        def make(**timing: Any) -> Driver:
            clocked = timing.pop("clocked", False)
            drivers.append(Driver(client, f"test-{uuid.uuid4().hex[:8]}", Timing(**timing), clocked=clocked))
            return drivers[-1]

        yield make
        try:
            for driver in drivers:
                driver.end_all()
        finally:
            for driver in drivers:
                driver.drop()


@pytest.fixture(params=["once", "twice"])
def drive(make_driver: Callable[..., Driver], request: pytest.FixtureRequest) -> Driver:
    """A driver; in the second of two runs of each test it sends every transition twice."""
    driver = make_driver()
    driver.store.twice = request.param == "twice"
    return driver


@pytest.fixture
def make_site(
    make_app: Callable[..., HarnessApp], make_worker: Callable[..., WorkerProcess]
) -> Iterator[Callable[..., Site]]:
    """Make a site: `make_site(aof=False, broker=None, backend=None, **settings)`."""
    with contextlib.ExitStack() as stack:

        def make(aof: bool = False, broker: str | None = None, **settings: Any) -> Site:
            state = stack.enter_context(ValkeyServer(aof=aof))
            ours = stack.enter_context(TCPProxy(state.port))
            theirs = stack.enter_context(TCPProxy(state.port))
            conf = {
                "coalesce_redis_url": f"redis://{HOST}:{ours.port}/0",
                "coalesce_lease": LEASE,
                **settings,
            }
            return Site(state, ours, theirs, make_app(broker, None, conf), make_worker)

        yield make


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Site:
    """A site with default settings."""
    return make_site()
