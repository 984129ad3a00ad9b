"""The harness itself, with plain Celery tasks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest
import redis
from celery import chord, group
from celery.exceptions import WorkerLostError
from pytest_celery import CeleryTestSetup  # type: ignore[import-untyped]
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import ROOT, ProcessDied, require, wait_until
from tests.support.proxy import TCPProxy
from tests.support.rabbit import RabbitServer
from tests.support.servers import RedisServer, Sentinel, ValkeyCluster, ValkeyServer
from tests.support.worker import WorkerProcess

NEVER = Retry(NoBackoff(), 0)
MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]


def run_one(app: HarnessApp, journal: Journal) -> Any:
    """Run a task through an app's broker and backend and return its result."""
    return app.tasks["work"].delay(journal.key(), 42).get(timeout=20)


class TestSharedWorker:
    def test_records_start_and_end_of_a_task(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A task's journal tells where it ran, with what, and how it ended."""
        result = app.tasks["work"].delay(journal.key("org:7"), value=3)

        start = journal.wait("start", key="org:7")
        end = journal.wait("end", key="org:7")
        assert result.get(timeout=10) == 3
        assert start["task_id"] == end["task_id"] == result.id
        assert start["kwargs"] == {"value": 3}
        assert start["hostname"] == worker.hostname
        assert start["pid"] in worker.child_pids()
        assert end["outcome"] == "returned"

    def test_gate_holds_a_task_until_it_is_opened(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A held task ends only after its gate was opened."""
        app.tasks["work"].delay(journal.key(), gate="g")
        journal.wait("start")
        journal.assert_never("end", within=0.2)

        journal.open("g")

        journal.wait("end")

    def test_failure_and_retry_end_with_their_exceptions(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """The end of every attempt names the exception that ended it."""
        app.tasks["work"].apply_async((journal.key("f"),), {"error": "boom"}, link_error=on_error(app, journal))
        app.tasks["retrying"].delay(journal.key("r"), times=2)

        assert journal.wait("end", key="f")["outcome"] == "RuntimeError"
        journal.wait("on_error", key="on_error")
        journal.wait("end", key="r", count=3)
        outcomes = [each["outcome"] for each in journal.events("end", key="r")]
        assert outcomes == ["Retry", "Retry", "returned"]

    def test_chord_body_is_journalled(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A chord's body finds the journal by its own key."""
        work, collect = app.tasks["work"], app.tasks["collect"]
        header = group(work.s(journal.key(f"h{n}"), n) for n in range(3))

        result = chord(header)(collect.s(key=journal.key("body")))

        assert sorted(result.get(timeout=10)) == [0, 1, 2]
        journal.wait("end", key="body")

    def test_overlap_is_found(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Two plain tasks of one key overlap, which the helper reports; two keys do not."""
        for key in ("same", "same", "other"):
            app.tasks["work"].delay(journal.key(key), gate="g")
        journal.wait("start", count=3)
        journal.open("g", 3)
        journal.wait("end", count=3)

        with pytest.raises(AssertionError, match="overlap"):
            assert_no_overlap(journal.events())
        assert_no_overlap(journal.events(), limit=2)

    def test_two_journals_never_meet(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """A journal sees the tasks of its own keys alone."""
        other = Journal(journal.client)
        app.tasks["work"].delay(other.key())
        other.wait("end")
        assert journal.events() == []


def on_error(app: HarnessApp, journal: Journal) -> Any:
    """Return an error callback that is journalled under the key "on_error"."""
    return app.tasks["on_error"].s(key=journal.key("on_error"))


class TestOwnWorker:
    @pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
    def test_every_pool_runs_tasks(
        self, pool: str, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Workers of every pool get ready, run tasks side by side (but solo), and stop warmly."""
        app = make_app()
        worker = make_worker(app, pool=pool, concurrency=2)
        together = 1 if pool == "solo" else 2

        results = [app.tasks["work"].delay(journal.key(), n, gate="g") for n in range(2)]
        journal.wait("start", count=together)
        journal.assert_never("end", within=0.1)
        journal.open("g", 2)

        assert [result.get(timeout=20) for result in results] == [0, 1]
        assert_no_overlap(journal.events(), limit=together)
        assert worker.stop() == 0

    def test_killed_worker_takes_its_children_along(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """After SIGKILL of the parent the run has no end, and a restart serves again."""
        app = make_app()
        worker = make_worker(app)
        app.tasks["work"].delay(journal.key("lost"), gate="never")
        pid = journal.wait("start")["pid"]

        worker.kill()

        wait_until(lambda: not psutil.pid_exists(pid), 5)
        assert worker.returncode == -signal.SIGKILL
        journal.record("gone", pid=pid)
        worker.restart()
        app.tasks["work"].delay(journal.key("lost"))
        journal.wait("end", key="lost")
        assert_no_overlap(journal.events())

    def test_killed_child_is_a_lost_worker(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """The pid in the journal is that of the pool child."""
        app = make_app()
        make_worker(app)
        result = app.tasks["work"].delay(journal.key(), gate="never")

        os.kill(journal.wait("start")["pid"], signal.SIGKILL)

        with pytest.raises(WorkerLostError):
            result.get(timeout=20)

    def test_paused_worker_does_nothing_until_resumed(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """A pause freezes parent and children; a resume loses nothing."""
        app = make_app()
        worker = make_worker(app)
        worker.pause()
        app.tasks["work"].delay(journal.key())
        journal.assert_never("start", within=0.3)

        worker.resume()

        journal.wait("end")

    def test_dead_worker_fails_fast_with_its_log(self, make_app: MakeApp, make_worker: MakeWorker) -> None:
        """A worker that can not start is reported with the reason, not waited for."""
        with pytest.raises(ProcessDied, match="no-such-option"):
            make_worker(make_app(), extra_args=["--no-such-option"])

    def test_settings_and_queues_reach_the_worker(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """Conf of the app and of the worker, queues and hostname are what was asked for."""
        app = make_app(conf={"task_default_queue": "mine"})
        worker = make_worker(app, queues=["mine"], hostname="me@here", conf={"task_time_limit": 9})

        assert run_one(app, journal) == 42
        inspect: Any = app.control.inspect([worker.hostname], timeout=3)
        assert inspect.conf()["me@here"]["task_time_limit"] == 9
        assert [queue["name"] for queue in inspect.active_queues()["me@here"]] == ["mine"]

    def test_workers_start_side_by_side(self, make_app: MakeApp, make_worker: MakeWorker) -> None:
        """Two workers of one app are started before the first is waited for."""
        app = make_app()
        workers = [make_worker(app, wait=False) for _ in range(2)]
        for worker in workers:
            worker.wait_ready()
        wait_until(lambda: len(app.control.ping(timeout=1, limit=2) or ()) == 2)


class TestServers:
    @pytest.mark.parametrize("server_cls", [ValkeyServer, RedisServer])
    def test_redis_family_runs_tasks(
        self,
        server_cls: type[RedisServer],
        make_app: MakeApp,
        make_worker: MakeWorker,
        journal: Journal,
    ) -> None:
        """Password and database numbers reach Celery through the URL."""
        with server_cls(password="se:cret@1") as server:
            app = make_app(server.url(1), server.url(2))
            make_worker(app)
            assert run_one(app, journal) == 42

    def test_tls_is_verified(self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal) -> None:
        """Celery runs over TLS with a certificate that it verifies."""
        with ValkeyServer(tls=True, password="secret") as server:
            app = make_app(server.url(), server.url())
            make_worker(app)
            assert run_one(app, journal) == 42
            with pytest.raises(redis.ConnectionError):
                redis.Redis.from_url(f"rediss://:secret@127.0.0.1:{server.port}").ping()

    def test_aof_survives_a_kill(self) -> None:
        """With `aof` what was acknowledged is there after SIGKILL and restart."""
        with ValkeyServer(aof=True) as server:
            server.client().set("a", 1)
            server.kill()
            server.restart()
            assert server.client().get("a") == "1"

    def test_paused_server_does_not_answer(self) -> None:
        """A paused server keeps its connections and says nothing."""
        with ValkeyServer() as server:
            client = server.client(socket_timeout=0.2)
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.ping()
            server.resume()
            assert server.client().ping()

    def test_new_db_is_empty_and_apart(self, state_server: ValkeyServer) -> None:
        """Every new database is another one."""
        urls = {state_server.new_db() for _ in range(50)}
        assert len(urls) == 50
        assert all(redis.Redis.from_url(url).dbsize() == 0 for url in urls)

    @pytest.mark.parametrize("password", [None, "secret"])
    def test_sentinel_fails_over(
        self,
        password: str | None,
        make_app: MakeApp,
        make_worker: MakeWorker,
        journal: Journal,
    ) -> None:
        """A worker goes on after its master was replaced."""
        with Sentinel(password=password) as sentinel:
            app = make_app(sentinel.url(), sentinel.url(), conf=sentinel.conf)
            make_worker(app)
            assert run_one(app, journal) == 42
            old = sentinel.master.port

            sentinel.failover()

            assert sentinel.master.port != old
            assert sentinel.client().role()[0] == "master"
            assert run_one(app, journal) == 42

    def test_sentinel_replaces_a_dead_master(self) -> None:
        """What was replicated is there after the master was killed."""
        with Sentinel() as sentinel:
            sentinel.client().set("a", 1)
            sentinel.client().wait(1, 5000)
            sentinel.kill_master()
            assert sentinel.client().get("a") == "1"

    def test_cluster_serves_all_slots(self) -> None:
        """A client reads and writes over all nodes."""
        with ValkeyCluster(3) as cluster:
            client = cluster.client()
            for n in range(100):
                client.set(f"key{n}", n)
            assert [client.get(f"key{n}") for n in range(100)] == [str(n) for n in range(100)]
            assert all(node.client().dbsize() for node in cluster.nodes)

    @pytest.mark.timeout(120)
    @pytest.mark.parametrize("queue_type", ["classic", "quorum"])
    def test_rabbit_runs_tasks(
        self,
        queue_type: str,
        rabbit: RabbitServer,
        make_app: MakeApp,
        make_worker: MakeWorker,
        journal: Journal,
    ) -> None:
        """Classic and quorum queues of RabbitMQ carry tasks, at once and delayed."""
        conf: dict[str, Any] = {"task_default_queue_type": queue_type}
        if queue_type == "quorum":
            conf["broker_transport_options"] = {"confirm_publish": True}
        app = make_app(rabbit.url, conf=conf)
        make_worker(app)
        assert run_one(app, journal) == 42
        app.tasks["work"].apply_async((journal.key("late"),), countdown=1)
        journal.wait("end", key="late")

    @pytest.mark.timeout(120)
    def test_rabbit_keeps_its_queues_over_a_restart(
        self, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """A message that waits in RabbitMQ is there after SIGKILL and restart."""
        with RabbitServer() as server:
            app = make_app(server.url, conf={"broker_transport_options": {"confirm_publish": True}})
            app.tasks["work"].delay(journal.key())
            server.kill()
            server.restart()
            make_worker(app)
            journal.wait("end")


class TestCelerySetup:
    @pytest.fixture(autouse=True)
    def local_only(self, pytestconfig: pytest.Config) -> None:
        """Containers have pytest-celery's own app, which these tests are not about."""
        if pytestconfig.getoption("--celery-containers") != "local":
            pytest.skip("the set-up runs in containers")

    @pytest.mark.parametrize("celery_broker_cluster", ["valkey", "redis", "rabbit"], indirect=True)
    def test_stock_setup_runs_over_local_processes(self, celery_setup: CeleryTestSetup, journal: Journal) -> None:
        """pytest-celery's set-up is ready by each of its own checks, and runs our tasks."""
        assert celery_setup.ready(ping=True, control=True, docker=True)
        assert run_one(celery_setup.app, journal) == 42
        celery_setup.worker.assert_log_exists("succeeded in")
        assert celery_setup.worker.hostname() == journal.wait("start")["hostname"]

    def test_nodes_are_killed_and_restarted(self, celery_setup: CeleryTestSetup, journal: Journal) -> None:
        """Worker and broker come back after a kill, where they were."""
        worker = celery_setup.worker
        pids = {info["pid"] for info in worker.get_running_processes_info(["pid"])}
        assert len(pids) == 3

        worker.kill()
        assert worker.container.status == "exited"
        celery_setup.broker.restart(force=True)
        worker.restart()

        assert not pids & {info["pid"] for info in worker.get_running_processes_info()}
        assert run_one(celery_setup.app, journal) == 42


class TestProxy:
    def test_cut_and_heal(self, state_server: ValkeyServer) -> None:
        """A cut closes connections and refuses new ones until it is healed."""
        with TCPProxy(state_server.port) as proxy:
            client = redis.Redis(port=proxy.port, retry=NEVER)
            assert client.ping()
            proxy.cut()
            for _ in range(2):
                with pytest.raises(redis.ConnectionError):
                    client.ping()
            proxy.heal()
            assert client.ping()

    def test_dropped_reply_means_that_the_server_has_acted(self, state_server: ValkeyServer, journal: Journal) -> None:
        """The server has run the command whose reply is lost."""
        direct = state_server.client()
        with TCPProxy(state_server.port) as proxy:
            client = redis.Redis(port=proxy.port, socket_timeout=0.3, retry=NEVER)
            client.ping()
            proxy.drop_replies = True
            with pytest.raises(redis.TimeoutError):
                client.incr(journal.key("n"))
            assert proxy.dropped.wait(5)
            assert direct.get(journal.key("n")) == "1"
            proxy.drop_replies = False
            assert client.incr(journal.key("n")) == 2
        direct.delete(journal.key("n"))

    def test_delay_holds_what_is_sent(self, state_server: ValkeyServer) -> None:
        """A delay longer than the client's patience is a time-out."""
        with TCPProxy(state_server.port) as proxy:
            client = redis.Redis(port=proxy.port, socket_timeout=0.2, retry=NEVER)
            assert client.ping()
            proxy.delay = 5
            with pytest.raises(redis.TimeoutError):
                client.ping()


class TestProcesses:
    def test_nothing_outlives_a_killed_test_process(self, tmp_path: Path) -> None:
        """The servers of a SIGKILLed process die with it."""
        script = (
            "import signal\n"
            "from tests.support.servers import ValkeyServer\n"
            "print(ValkeyServer().start().pid, flush=True)\n"
            "signal.pause()\n"
        )
        if sys.platform != "linux":
            pytest.skip("the kernel does this on Linux alone")
        parent = subprocess.Popen(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)

        parent.kill()
        parent.communicate(timeout=10)

        wait_until(lambda: not psutil.pid_exists(pid), 5)

    def test_normal_exit_closes_what_was_left_open(self) -> None:
        """A server that nobody closed is gone, with its directory, after a normal exit."""
        script = (
            "from tests.support.servers import ValkeyServer\n"
            "server = ValkeyServer().start()\n"
            "print(server.pid, server.directory)\n"
        )
        output = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, timeout=20, check=True
        )
        pid, directory = output.stdout.split()
        assert not psutil.pid_exists(int(pid))
        assert not os.path.exists(directory)

    def test_processes_are_started_in_the_main_thread(self) -> None:
        """A start in a thread is refused, as the kernel would end the process with the thread."""
        errors: list[Exception] = []

        def start() -> None:
            try:
                ValkeyServer().start()
            except RuntimeError as exc:
                errors.append(exc)

        thread = threading.Thread(target=start)
        thread.start()
        thread.join(10)
        assert "main thread" in str(errors[0])

    def test_port_stays_the_same_over_a_restart(self) -> None:
        """Clients find a restarted server where it was."""
        with ValkeyServer() as server:
            port, pid = server.port, server.pid
            server.restart()
            assert (server.port, server.pid != pid) == (port, True)
            socket.create_connection(("127.0.0.1", port), 1).close()

    @pytest.mark.parametrize(("ci", "outcome"), [("", "skip"), ("true", "fail")])
    def test_absent_service_skips_here_and_fails_in_ci(
        self, ci: str, outcome: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only CI insists on every service."""
        monkeypatch.setenv("CI", ci)
        expected = getattr(pytest, outcome).Exception
        with pytest.raises(expected, match="no-such-server is not installed"):
            require("no-such-server")
