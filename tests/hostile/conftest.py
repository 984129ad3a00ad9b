"""A worker that takes whatever comes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.app import HarnessApp, make_app
from tests.support.journal import Journal
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


@pytest.fixture(scope="session")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of that worker."""
    url = state_server.new_db()
    with make_app(url, url, {"coalesce_lease": 3, "coalesce_redispatch_after": 2}) as app:
        yield app


@pytest.fixture(scope="session")
def worker(app: HarnessApp) -> Iterator[WorkerProcess]:
    """That worker."""
    with WorkerProcess.serving(app, concurrency=3) as worker:
        yield worker


@pytest.fixture(autouse=True)
def open_gates(journal: Journal) -> Iterator[None]:
    """Let nobody wait at a gate whose test is over."""
    yield
    journal.open_all()
