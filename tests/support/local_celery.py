"""pytest-celery's `celery_setup` over local processes instead of containers.

The clusters hold pytest-celery's own nodes; only what these nodes hold is ours: a process with the
few attributes of a container that they use. Registered as a plugin unless the tests run with
`--celery-containers=docker`, which leaves pytest-celery's own fixtures in place.
"""

from __future__ import annotations

import signal
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import celery
import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
from pytest_celery import (  # type: ignore[import-untyped]
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestBackend,
    CeleryTestBroker,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
)

from tests.support.app import HarnessApp, make_app
from tests.support.process import HOST, Process
from tests.support.rabbit import RabbitServer
from tests.support.servers import RedisServer, ValkeyServer
from tests.support.worker import WorkerProcess

PROCESS_COLUMNS = ("pid", "name", "username", "cmdline", "create_time")


class LocalContainer:
    """A process that passes for a container."""

    def __init__(self, process: Process, identity: str = "") -> None:
        self.process = process
        self.id = identity or uuid.uuid4().hex[:12]
        self.name = f"{process.name}-{self.id}"

    @property
    def status(self) -> Literal["running", "exited"]:
        """The state of the process, always current."""
        return "running" if self.process.running else "exited"

    @property
    def celeryconfig(self) -> dict[str, Any]:
        """The settings that Celery needs to use the service."""
        return {}

    def ready(self) -> bool:
        """Tell whether the process runs; it was ready when it was started."""
        return self.process.running

    def reload(self) -> None:
        """Do nothing: `status` is never stale."""

    def logs(self) -> str:
        """Return the log of the process."""
        return self.process.logs()

    def kill(self, signal: str | int = "SIGKILL") -> None:
        """Send a signal, given by name or number."""
        number = _number(signal)
        if number == _number("SIGKILL"):
            self.process.kill()
        else:
            self.process.signal(number)

    def restart(self, timeout: float = 10) -> None:
        """Stop the process within `timeout` seconds, and start it again."""
        self.process.stop(timeout)
        self.process.start()

    def teardown(self) -> None:
        """Kill the process and remove its directory."""
        self.process.close()


class LocalServer(LocalContainer):
    """A broker or result backend."""

    process: RedisServer | RabbitServer

    @property
    def celeryconfig(self) -> dict[str, Any]:
        server = self.process
        is_rabbit = isinstance(server, RabbitServer)
        url, vhost = (server.url, "/") if is_rabbit else (server.url(), "0")  # type: ignore[operator]
        return {
            "url": url,
            "host_url": url,
            "hostname": HOST,
            "port": server.port,
            "vhost": vhost,
        }


class LocalWorkerContainer(LocalContainer):
    """A worker."""

    process: WorkerProcess

    def version(self) -> str:
        """Return the version of Celery."""
        return celery.__version__

    def log_level(self) -> str:
        """Return the log level of the worker."""
        return "INFO"

    def worker_name(self) -> str:
        """Return the worker's name without its host."""
        return self.process.hostname.partition("@")[0]

    def worker_queue(self) -> str:
        """Return the queue of the worker."""
        return self.process.queues[0]


class LocalWorker(CeleryTestWorker):
    """A worker node that lists the processes of its own worker."""

    def get_running_processes_info(
        self, columns: list[str] | None = None, filters: dict[str, str] | None = None
    ) -> list[dict]:
        """Describe the worker and its children, the worker first."""
        process = self.container.process
        infos = []
        for pid in [process.pid, *process.child_pids()] if process.running else []:
            try:
                infos.append(psutil.Process(pid).as_dict(columns or PROCESS_COLUMNS))
            except psutil.NoSuchProcess:
                continue
        wanted = (filters or {}).items()
        return [info for info in infos if all(info.get(k) == v for k, v in wanted)]


def _number(given: str | int) -> int:
    return signal.Signals[given] if isinstance(given, str) else given


def setup_over(app: HarnessApp, server: RedisServer, worker: WorkerProcess) -> CeleryTestSetup:
    """Return pytest-celery's set-up over a running worker and the server that is its broker and result backend."""
    identity = uuid.uuid4().hex[:12]
    container: Any = LocalWorkerContainer(worker, identity)
    return CeleryTestSetup(
        worker_cluster=CeleryWorkerCluster(LocalWorker(container, app)),
        broker_cluster=CeleryBrokerCluster(CeleryTestBroker(LocalServer(server))),
        backend_cluster=CeleryBackendCluster(CeleryTestBackend(LocalServer(server))),
        app=app,
    )


SERVERS = {"valkey": ValkeyServer, "redis": RedisServer, "rabbit": RabbitServer}


@pytest.fixture
def celery_broker_cluster(request: pytest.FixtureRequest) -> Iterator[CeleryBrokerCluster]:
    """A broker of the test's own: Valkey, or what an indirect parameter names in `SERVERS`."""
    with SERVERS[getattr(request, "param", "valkey")]() as server:
        yield CeleryBrokerCluster(CeleryTestBroker(LocalServer(server)))


@pytest.fixture
def celery_backend_cluster(request: pytest.FixtureRequest) -> Iterator[CeleryBackendCluster]:
    """A result backend of the test's own: Valkey, or what an indirect parameter names."""
    with SERVERS[getattr(request, "param", "valkey")]() as server:
        yield CeleryBackendCluster(CeleryTestBackend(LocalServer(server)))


@pytest.fixture
def celery_worker_options() -> dict[str, Any]:
    """Options of `WorkerProcess` for the worker of the set-up; override at will."""
    return {}


@pytest.fixture
def celery_setup_app(celery_setup_config: dict[str, Any]) -> Iterator[HarnessApp]:
    """The test app, configured for the clusters, and current as pytest-celery's own app is."""
    before = celery.current_app
    broker, backend = celery_setup_config["broker_url"], celery_setup_config["result_backend"]
    with make_app(broker, backend) as app:
        app.set_current()
        yield app
    before.set_current()


@pytest.fixture
def celery_worker_cluster(
    celery_setup_app: HarnessApp, celery_worker_options: dict[str, Any], journal_server: RedisServer
) -> Iterator[CeleryWorkerCluster]:
    """One worker of the test's own, with the test app."""
    identity = uuid.uuid4().hex[:12]
    options = {
        "queues": ["celery"],
        "hostname": f"worker@{identity}",
        "include": ["pytest_celery.vendors.worker.tasks"],  # its set-up may call them
        **celery_worker_options,
    }
    with WorkerProcess.serving(celery_setup_app, **options) as process:
        container: Any = LocalWorkerContainer(process, identity)
        yield CeleryWorkerCluster(LocalWorker(container, celery_setup_app))
