"""Fixtures of all tests: servers and a worker shared by a test process, factories for one's own.

Servers are started when the first test asks for them, once for every process of pytest-xdist. A
test that kills or pauses something starts its own: `with ValkeyServer(aof=True) as server: ...`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup  # type: ignore[import-untyped]

pytest.register_assert_rewrite("tests.support")

from tests.support.app import HarnessApp  # noqa: E402
from tests.support.app import make_app as _make_app  # noqa: E402
from tests.support.journal import URL_VARIABLE, Journal, connect  # noqa: E402
from tests.support.process import Process  # noqa: E402
from tests.support.rabbit import RabbitServer  # noqa: E402
from tests.support.servers import RedisServer, ValkeyServer  # noqa: E402
from tests.support.worker import WorkerProcess  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice between local processes and containers for `celery_setup`."""
    parser.addoption(
        "--celery-containers",
        choices=("local", "docker"),
        default="local",
        help="what pytest-celery's celery_setup runs in (default: %(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put local processes in the place of pytest-celery's containers."""
    if config.getoption("--celery-containers") == "local":
        from tests.support import local_celery

        config.pluginmanager.register(local_celery, "local-celery")


def pytest_runtest_setup() -> None:
    """Forget the logs of the test before."""
    Process.closed.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Show the logs of all processes of a test that failed."""
    report = yield
    if report.failed:
        logs = Process.closed + [(repr(process), process.tail()) for process in Process.opened]
        report.sections += [(f"log of {description}", log) for description, log in logs if log]
    return report


@pytest.fixture(scope="session")
def journal_server() -> Iterator[ValkeyServer]:
    """The server of the journals, which no test touches; also told to workers."""
    with ValkeyServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv(URL_VARIABLE, server.url())
        yield server


@pytest.fixture(scope="session")
def state_server() -> Iterator[ValkeyServer]:
    """The Valkey that is broker, result backend and store of the shared app."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The system's Redis."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def rabbit() -> Iterator[RabbitServer]:
    """A RabbitMQ; apps of `make_app` have a queue of their own on it."""
    with RabbitServer() as server:
        yield server


@pytest.fixture(scope="session")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the shared worker, for tests that neither need their own settings nor harm it."""
    url = state_server.new_db()
    with _make_app(url, url) as app:
        yield app


@pytest.fixture(scope="session")
def shared_setup(app: HarnessApp, state_server: ValkeyServer) -> Iterator[CeleryTestSetup]:
    """pytest-celery's set-up of the shared app, its broker and result backend, and a prefork worker."""
    from tests.support.local_celery import setup_over

    with WorkerProcess.serving(app, concurrency=4) as process:
        yield setup_over(app, state_server, process)


@pytest.fixture(scope="session")
def worker(shared_setup: CeleryTestSetup) -> WorkerProcess:
    """The shared prefork worker."""
    process: WorkerProcess = shared_setup.worker.container.process
    return process


@pytest.fixture
def journal(journal_server: ValkeyServer) -> Iterator[Journal]:
    """The test's own journal and namespace; its gates open when the test ends."""
    with connect(journal_server.url()) as client:
        journal = Journal(client)
        yield journal
        journal.open_all()


@pytest.fixture
def make_app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[Callable[..., HarnessApp]]:
    """Make an app of the test's own: `make_app(broker=None, backend=None, conf=None)`.

    Broker and result backend are one new, empty database unless given; on RabbitMQ the app gets
    a new queue.
    """
    with ExitStack() as stack:

        def make(
            broker: str | None = None,
            backend: str | None = None,
            conf: Mapping[str, Any] | None = None,
        ) -> HarnessApp:
            url = state_server.new_db()
            own: dict[str, Any] = dict(conf or {})
            if broker and broker.startswith(("amqp", "pyamqp")):
                own.setdefault("task_default_queue", f"test-{uuid.uuid4().hex[:8]}")
            return stack.enter_context(_make_app(broker or url, backend or url, own))

        yield make


@pytest.fixture
def make_worker() -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker of the test's own for an app: `make_worker(app, **WorkerProcess options)`.

    With `wait=False` it returns at once; `worker.wait_ready()` does the rest.
    """
    with ExitStack() as stack:

        def make(app: HarnessApp, *, wait: bool = True, **options: Any) -> WorkerProcess:
            worker = WorkerProcess.serving(app, **options)
            stack.callback(worker.close)
            worker.launch()
            if wait:
                worker.wait_ready()
            return worker

        yield make
