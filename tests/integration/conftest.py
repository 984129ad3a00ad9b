"""Fixtures of the integration tests."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_coalesce.records import Timing
from tests.integration.driver import Driver
from tests.support.servers import ValkeyServer


@pytest.fixture
def make_driver(state_server: ValkeyServer) -> Iterator[Callable[..., Driver]]:
    """Make a driver with a namespace of its own: `make_driver(**Timing's fields)`."""
    with state_server.client(decode_responses=False) as client:
        drivers: list[Driver] = []

        def make(**timing: Any) -> Driver:
            drivers.append(Driver(client, f"test-{uuid.uuid4().hex[:8]}", Timing(**timing)))
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
