"""The shared app and worker of the acceptance tests, which also know the tasks of this directory.

Apps of `make_app` know them as well, and workers of `make_worker` include them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.acceptance import (
    around_tasks,
    batch_tasks,
    holding_tasks,
    override_tasks,
    policy_tasks,
    replace_tasks,
    retry_tasks,
)
from tests.support.app import HarnessApp
from tests.support.app import make_app as make_harness_app
from tests.support.holders import Holder
from tests.support.journal import Journal
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

TASKS = (around_tasks, batch_tasks, holding_tasks, override_tasks, policy_tasks, replace_tasks, retry_tasks)
INCLUDE = [module.__name__ for module in TASKS]


def with_tasks(app: HarnessApp) -> HarnessApp:
    """Register the tasks of this directory with an app."""
    for module in TASKS:
        module.define(app)
    return app


@pytest.fixture(scope="session")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the shared worker, for tests that neither need their own settings nor harm it."""
    url = state_server.new_db()
    with make_harness_app(url, url) as app:
        yield with_tasks(app)


@pytest.fixture(scope="session")
def worker(app: HarnessApp) -> Iterator[WorkerProcess]:
    """The shared prefork worker."""
    with WorkerProcess.serving(app, concurrency=4, include=INCLUDE) as worker:
        yield worker


@pytest.fixture(scope="session")
def single_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the worker that runs one task at a time; it notices a lost message soon."""
    url = state_server.new_db()
    with make_harness_app(url, url, {"coalesce_lease": 3, "coalesce_redispatch_after": 2}) as app:
        yield with_tasks(app)


@pytest.fixture(scope="session")
def single_worker(single_app: HarnessApp) -> Iterator[WorkerProcess]:
    """The shared worker that runs one task at a time."""
    with WorkerProcess.serving(single_app, concurrency=1, include=INCLUDE) as worker:
        yield worker


@pytest.fixture
def busy(single_app: HarnessApp, single_worker: WorkerProcess, journal: Journal) -> tuple[HarnessApp, WorkerProcess]:
    """An app whose only worker waits at the gate "busy": what is sent now is queued, until it opens."""
    single_app.tasks["work"].delay(journal.key("busy"), gate="busy")
    journal.wait("start", key="busy", timeout=20)
    return single_app, single_worker


@pytest.fixture
def make_app(make_app: Callable[..., HarnessApp]) -> Callable[..., HarnessApp]:
    """Make an app of the test's own: `make_app(broker=None, backend=None, conf=None)`."""

    def make(*args: Any, **kwargs: Any) -> HarnessApp:
        return with_tasks(make_app(*args, **kwargs))

    return make


@pytest.fixture
def make_worker(make_worker: Callable[..., WorkerProcess]) -> Callable[..., WorkerProcess]:
    """Start a worker of the test's own for an app: `make_worker(app, **WorkerProcess options)`."""

    def make(app: HarnessApp, **options: Any) -> WorkerProcess:
        return make_worker(app, include=INCLUDE, **options)

    return make


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for those who wait or call."""
    with ThreadPoolExecutor(32) as executor:
        yield executor


@pytest.fixture
def start_holder() -> Iterator[Callable[..., Holder]]:
    """Start a process of plain code: `start_holder(app, journal, function, key, **options)`."""
    with ExitStack() as stack:

        def start(*args: Any, **options: Any) -> Holder:
            holder = Holder(*args, **options)
            stack.callback(holder.close)
            holder.launch()
            return holder

        yield start
