"""Wherever the state may be kept: a run and its follow-up there, and what is said where it can not be."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import redis
from kombu.exceptions import OperationalError

from celery_coalesce import Coalescer, SettingError, StoreUnavailable
from celery_coalesce.engine import engine_of
from celery_coalesce.plain import SHARE
from celery_coalesce.store.redis import connect as connect_store
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import HOST, free_port, wait_until
from tests.support.rabbit import RabbitServer
from tests.support.servers import RedisServer, Sentinel, ValkeyCluster, ValkeyServer
from tests.support.worker import WorkerProcess

if TYPE_CHECKING:
    from typing_extensions import Self

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

#: Of servers that live for a test.
PASSWORD = "s3cret-p@ss:word/1"
QUOTED = "s3cret-p%40ss%3Aword%2F1"
PLAIN = "s3cret+plain"


@dataclass
class Place:
    """Where one app keeps its state.

    Attributes:
        state: Clients of the servers that may hold it.
        prefix: What all names there begin with.
    """

    state: list[Any]
    broker: str | None = None
    backend: str | None = None
    conf: dict[str, Any] = field(default_factory=dict)
    prefix: str = ""

    def names(self) -> set[str]:
        """Return what is stored there for a namespace, without the namespace's name."""
        own = f"{self.prefix}{{coalesce}}:"
        found = set()
        for client in self.state:
            found |= {name for name in client.scan_iter(count=1000) if "{coalesce}" in name}
        assert all(name.startswith(own) for name in found), found
        return {name.removeprefix(own) for name in found}


def plain(server: RedisServer, **given: Any) -> Place:
    """Broker, result backend and state on one server."""
    return Place([server.client()], server.url(), server.url(), **given)


@contextlib.contextmanager
def of_redis(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The system's Redis."""
    with RedisServer() as server:
        yield plain(server)


@contextlib.contextmanager
def of_valkey_with_prefix_and_password(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A Valkey with a password, and a prefix for all that the broker stores."""
    with ValkeyServer(password=PLAIN) as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        url = f"redis://:{QUOTED}@{HOST}:{server.port}/0"
        client = redis.Redis(port=server.port, password=PASSWORD, decode_responses=True)
        options = {"global_keyprefix": "pre:"}
        yield Place([client], url, url, {"broker_transport_options": options}, "pre:")


@contextlib.contextmanager
def of_tls_broker(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A broker over TLS, by `broker_use_ssl`."""
    with RedisServer(tls=True) as server:
        broker = f"rediss://{HOST}:{server.port}/0"
        secure = {"ssl_cert_reqs": "required", "ssl_ca_certs": str(server.ca)}
        yield Place([server.client()], broker, None, {"broker_use_ssl": secure})


@contextlib.contextmanager
def of_tls_url(request: pytest.FixtureRequest) -> Iterator[Place]:
    """`coalesce_redis_url="rediss://..."`."""
    with RedisServer(tls=True) as server:
        yield Place([server.client()], conf={"coalesce_redis_url": server.url()})


@contextlib.contextmanager
def of_sentinel_broker(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A broker behind a Sentinel, with a password."""
    with Sentinel(password="pw") as sentinel:
        yield Place([sentinel.client()], sentinel.url(), None, {**sentinel.conf})


@contextlib.contextmanager
def of_sentinel_url(request: pytest.FixtureRequest) -> Iterator[Place]:
    """`coalesce_redis_url="sentinel://..."`, in its second database."""
    with Sentinel(password="pw") as sentinel:
        address = f"sentinel://:pw@{HOST}:{sentinel.sentinel.port}"
        url = f"sentinel://{HOST}:{free_port()};{address}/{sentinel.master_name}?db=2"
        yield Place([sentinel.client(2)], conf={"coalesce_redis_url": url})


@contextlib.contextmanager
def of_cluster(request: pytest.FixtureRequest) -> Iterator[Place]:
    """`coalesce_redis_url="redis+cluster://..."`."""
    with ValkeyCluster() as cluster:
        url = cluster.url().replace("redis://", "redis+cluster://")
        yield Place([cluster.client()], conf={"coalesce_redis_url": url})


@contextlib.contextmanager
def of_unix_socket_url(request: pytest.FixtureRequest) -> Iterator[Place]:
    """`coalesce_redis_url="unix://..."`, with a password."""
    with ValkeyServer(password="pw") as server:
        url = f"unix://:pw@{server.unix_socket}?db=3"
        yield Place([server.client(3)], conf={"coalesce_redis_url": url})


@contextlib.contextmanager
def of_unix_socket_broker(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A broker at a Unix socket."""
    with ValkeyServer() as server:
        url = f"redis+socket://{server.unix_socket}?virtual_host=3"
        yield Place([server.client(3)], url)


@contextlib.contextmanager
def of_backend(request: pytest.FixtureRequest) -> Iterator[Place]:
    """RabbitMQ carries the messages, so the result backend holds the state."""
    rabbit: RabbitServer = request.getfixturevalue("rabbit")
    with ValkeyServer() as server:
        yield Place([server.client(4)], rabbit.url, server.url(4))


PLACES = (
    of_redis,
    of_valkey_with_prefix_and_password,
    of_tls_broker,
    of_tls_url,
    of_sentinel_broker,
    of_sentinel_url,
    of_cluster,
    of_unix_socket_url,
    of_unix_socket_broker,
    of_backend,
)


@pytest.mark.parametrize("place_of", PLACES, ids=lambda place: place.__name__)
@pytest.mark.timeout(120)
def test_a_hold_and_a_shared_value(place_of: Any, make_app: MakeApp, request: pytest.FixtureRequest) -> None:
    """Who waits is woken by whoever goes, on every server."""
    with place_of(request) as place, ThreadPoolExecutor(4) as threads:
        coalescer = Coalescer(make_app(place.broker, place.backend, place.conf))
        transitions = engine_of(coalescer.app).transitions
        calls: list[int] = []

        def view() -> Any:
            return transitions.show(SHARE, "key")

        def hold() -> float:
            with coalescer.hold("key", scope="s", timeout=20):
                return time.monotonic()

        def value() -> str:
            calls.append(1)
            wait_until(lambda: sum(run["followers"] for run in view().runs) == 2)
            return "value"

        with coalescer.hold("key", scope="s") as lease:
            waiter = threads.submit(hold)
            wait_until(lambda: len(coalescer.runs()) == 2)
            lease.check()
            left = time.monotonic()
        assert waiter.result(20) - left < 0.8

        shared = [threads.submit(coalescer.share, "key", value) for _ in range(3)]
        assert [each.result(20) for each in shared] == ["value"] * 3
        assert len(calls) == 1
        # A turn that was given to one who had it already goes by itself.
        wait_until(lambda: place.names() <= {"presence", "meta"}, 20, lambda: str(place.names()))


@pytest.mark.parametrize("place_of", PLACES, ids=lambda place: place.__name__)
@pytest.mark.timeout(120)
def test_a_run_and_its_follow_up(
    place_of: Any,
    make_app: MakeApp,
    make_worker: MakeWorker,
    journal: Journal,
    request: pytest.FixtureRequest,
) -> None:
    """The state is where it should be while there is a run, and nothing is left of it afterwards."""
    with place_of(request) as place:
        app = make_app(place.broker, place.backend, place.conf)
        worker = make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        assert queue.delay(journal.key(), 3).run_task_id == second.id
        assert {name.split(":")[0] for name in place.names()} == {
            "rec", "wait", "held", "presence", "meta",
        }  # fmt: skip

        journal.open("g")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 3
        journal.wait("coalesce_drain", timeout=20)
        assert_no_overlap(journal.events())
        assert len(journal.events("start")) == 2
        wait_until(lambda: place.names() <= {"presence", "meta", "history", "seen"}, 10, lambda: str(place.names()))
        worker.stop()
        assert place.names() <= {"meta", "history", "seen"}
        assert_no_password(worker.logs())


@pytest.mark.timeout(120)
def test_a_failover_of_the_sentinel(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer
) -> None:
    """The state moves to the other server with its runs, while one goes on."""
    with Sentinel() as sentinel:
        url = f"sentinel://{HOST}:{sentinel.sentinel.port}/{sentinel.master_name}"
        app = make_app(conf={"coalesce_redis_url": url})
        make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        with sentinel.client() as client:
            client.wait(1, 5000)

        sentinel.kill_master()
        third = wait_until(lambda: attempt(queue, journal.key(), 3), 30)
        journal.open("g")

        assert first.get(timeout=20) == 1
        assert second.get(timeout=20) == 3
        assert third.run_task_id == second.id
        journal.wait("coalesce_drain", timeout=20)
        assert_no_overlap(journal.events())


def attempt(task: Any, *args: Any) -> Any:
    """Make a call, None if the state server is away."""
    with contextlib.suppress(StoreUnavailable):
        return task.delay(*args)
    return None


# What can not be used


def call(app: HarnessApp) -> Any:
    """Make a call that needs the state server."""
    return app.tasks["queue"].delay(f"{uuid.uuid4().hex[:8]}:key")


class Server:
    """Speaks enough of Redis' protocol to tell what it is.

    Args:
        version: The Redis that it passes for.
    """

    def __init__(self, version: str) -> None:
        self.info = f"redis_version:{version}\r\nredis_mode:standalone\r\n"
        self.knows_hello = version >= "6"
        self.listener = socket.create_server((HOST, 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=self.listener.accept()[:1], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with (
            contextlib.suppress(OSError, ValueError),
            connection,
            connection.makefile("rwb") as stream,
        ):
            while line := stream.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int(stream.readline()[1:])
                    words.append(stream.read(size + 2)[:-2].upper())
                stream.write(self._answer(words))
                stream.flush()

    def _answer(self, words: list[bytes]) -> bytes:
        if words[0] == b"INFO":
            text = self.info.encode()
            return b"$%d\r\n%s\r\n" % (len(text), text)
        if words[0] == b"HELLO" and self.knows_hello:
            return b"%1\r\n$5\r\nproto\r\n:3\r\n"
        if words[0] in (b"CLIENT", b"SELECT", b"PING"):
            return b"+OK\r\n"
        return b"-ERR unknown command\r\n"


@pytest.mark.timeout(120)
def test_a_batch_on_a_cluster(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, request: pytest.FixtureRequest
) -> None:
    """Its nodes have heard of no script; all keys of the library are on one of them."""
    with of_cluster(request) as place:
        app = make_app(conf=place.conf)
        queue, calls = app.tasks["queue"], [(journal.key(f"k{n % 3}"), n) for n in range(300)]
        results = queue.batch_delay(calls)
        assert [result.disposition.value for result in results] == ["dispatched"] * 3 + ["coalesced"] * 297
        make_worker(app, concurrency=1)
        assert [result.get(timeout=20) for result in results[-3:]] == [297, 298, 299]


class TestWhatCanNotBeUsed:
    @pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "sentinel"])
    def test_nothing_listens(self, make_app: MakeApp, scheme: str) -> None:
        """An unreachable server: soon, as a dead broker, without its password."""
        port, end = free_port(), "primary" if scheme == "sentinel" else "0"
        app = make_app(conf={"coalesce_redis_url": f"{scheme}://:{QUOTED}@{HOST}:{port}/{end}"})
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=rf"://:\*\*@{HOST}:{port}/{end} can not be reached") as raised:
            call(app)
        assert time.monotonic() - began < 8
        assert isinstance(raised.value, OperationalError)
        assert_no_password(raised.value)

    @pytest.mark.parametrize("where", ["state", "broker", "backend", "unix", "sentinel"])
    def test_a_wrong_password(
        self,
        where: str,
        make_app: MakeApp,
        rabbit: RabbitServer,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The server's refusal is told, and neither the right password nor the wrong one."""
        caplog.set_level(logging.DEBUG)
        with ValkeyServer(password=PLAIN) as server:
            url = f"redis://:{QUOTED}@{HOST}:{server.port}/0"
            if where == "state":
                app = make_app(conf={"coalesce_redis_url": url})
            elif where == "broker":
                app = make_app(url, "cache+memory://")
            elif where == "backend":
                app = make_app(rabbit.url, url)
            elif where == "unix":
                app = make_app(conf={"coalesce_redis_url": f"unix://:{QUOTED}@{server.unix_socket}?db=1"})
            else:
                url = f"sentinel://:{QUOTED}@{HOST}:{server.port}/primary"
                app = make_app(conf={"coalesce_redis_url": url})
            with pytest.raises(OperationalError) as raised:
                call(app)
        assert_no_password(raised.value)
        assert_no_password(caplog.text)

    @pytest.mark.parametrize(
        ("version", "refused"),
        [("6.0.16", True), ("5.0.14", True), ("6.2.0", False), ("7.4.1", False)],
    )
    def test_an_old_server(self, make_app: MakeApp, version: str, refused: bool) -> None:
        """Redis before 6.2 is refused by name, with the remedy."""
        with Server(version) as server:
            app = make_app(conf={"coalesce_redis_url": f"redis://{HOST}:{server.port}/0"})
            with pytest.raises(Exception) as raised:  # noqa: PT011 - it can no more than INFO
                call(app)
        assert isinstance(raised.value, SettingError) == refused
        if refused:
            assert f"is a Redis {version}" in str(raised.value)
            assert "use Redis 6.2 or newer, or Valkey" in str(raised.value)

    @pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random", "volatile-lru", "noeviction"])
    def test_a_server_that_evicts(self, make_app: MakeApp, policy: str, caplog: pytest.LogCaptureFixture) -> None:
        """A warning, once per process, where runs could be forgotten."""
        with ValkeyServer(maxmemory_policy=policy) as server:
            app = make_app(conf={"coalesce_redis_url": server.url()})
            call(app)
            call(app)
        records = [each for each in caplog.records if getattr(each, "action", "") == "evicting_server"]
        assert len(records) == policy.startswith("allkeys")
        if records:
            message = records[0].getMessage()
            assert policy in message
            assert "Set maxmemory-policy noeviction" in message

    def test_a_node_of_a_cluster(self, make_app: MakeApp) -> None:
        """`redis://` where `redis+cluster://` is meant."""
        with ValkeyServer(extra=["--cluster-enabled", "yes", "--databases", "1"]) as server:
            app = make_app(conf={"coalesce_redis_url": server.url()})
            with pytest.raises(SettingError, match=r"is a Cluster node; write redis\+cluster://"):
                call(app)

    def test_a_cluster_url_of_a_plain_server(self, make_app: MakeApp, state_server: ValkeyServer) -> None:
        """`redis+cluster://` where `redis://` is meant."""
        url = state_server.url().replace("redis://", "redis+cluster://")
        app = make_app(conf={"coalesce_redis_url": url})
        with pytest.raises((SettingError, StoreUnavailable), match=r"[Cc]luster"):
            call(app)

    def test_no_redis_anywhere(self, make_app: MakeApp) -> None:
        """Neither URL nor broker nor backend: refused at the call, with the remedy."""
        app = make_app("memory://", "cache+memory://")
        with pytest.raises(SettingError, match="set coalesce_redis_url to a Redis or Valkey server") as raised:
            call(app)
        assert raised.value.setting == "coalesce_redis_url"

    def test_a_worker_without_redis_does_not_start(self, make_app: MakeApp, make_worker: MakeWorker) -> None:
        """It says why."""
        app = make_app("memory://", "cache+memory://")
        worker = make_worker(app, wait=False, pool="solo")
        assert worker.wait(20) != 0
        assert "set coalesce_redis_url" in worker.logs()

    def test_a_tls_server_without_its_authority(self, make_app: MakeApp) -> None:
        """A certificate that is not trusted is told."""
        with RedisServer(tls=True) as server:
            app = make_app(conf={"coalesce_redis_url": f"rediss://{HOST}:{server.port}/0"})
            with pytest.raises(StoreUnavailable, match="certificate"):
                call(app)

    def test_it_is_connected_by_the_first_call(self, make_app: MakeApp) -> None:
        """Reading the settings makes no connection."""
        app = make_app(conf={"coalesce_redis_url": f"redis://{HOST}:{free_port()}/0"})
        app.finalize()
        engine = engine_of(app)
        assert connect_store(app, engine.settings).address.startswith("redis://")


def assert_no_password(said: BaseException | str) -> None:
    """Fail if a password is in a text, or in an error or its causes."""
    texts = [said] if isinstance(said, str) else []
    error = said if isinstance(said, BaseException) else None
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    for text in texts:
        for secret in (PASSWORD, QUOTED, PLAIN):
            assert secret not in text
