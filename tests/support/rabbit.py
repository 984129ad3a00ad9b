"""A private RabbitMQ: own node name, ports, epmd, cookie and directories."""

from __future__ import annotations

import socket

from tests.support.process import HOST, Process, free_port, require

DEBIAN = "/usr/lib/rabbitmq/bin"  # not /usr/sbin, whose wrapper changes the user


class _PortMapper(Process):
    """An epmd in the foreground, so that Erlang does not leave a daemon behind."""

    name = "epmd"

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()

    def command(self) -> list[str]:
        return [require("epmd"), "-address", HOST, "-port", str(self.port)]

    def answers(self) -> bool:
        with socket.create_connection((HOST, self.port), timeout=1):
            return True


class RabbitServer(Process):
    """The system's RabbitMQ, without plugins; it keeps its queues over `restart()`."""

    name = "rabbit"
    start_timeout = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self._distribution_port = free_port()
        self._epmd = _PortMapper()

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    def command(self) -> list[str]:
        return [require("rabbitmq-server", DEBIAN)]

    def environment(self) -> dict[str, str]:
        config = self.directory / "rabbitmq.conf"
        config.write_text(
            "disk_free_limit.absolute = 1MB\nlog.console = true\nlog.console.level = warning\nlog.file = false\n"
        )
        plugins = self.directory / "enabled_plugins"
        plugins.write_text("[].\n")
        idle_without_spinning = "+sbwt none +sbwtdcpu none +sbwtdio none"
        local = "-kernel inet_dist_use_interface {127,0,0,1}"
        return super().environment() | {
            "HOME": str(self.directory),  # holds the Erlang cookie
            "ERL_EPMD_PORT": str(self._epmd.port),
            "ERL_EPMD_ADDRESS": HOST,
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(config),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": HOST,
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": f"{idle_without_spinning} {local}",
            # Makes the script `exec` Erlang, so that our pid is RabbitMQ's own.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def launch(self) -> None:
        if not self._epmd.running:
            self._epmd.start()
        super().launch()

    def answers(self) -> bool:
        # Its listener opens when everything else is up; it greets only who speaks first.
        with socket.create_connection((HOST, self.port), timeout=1) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return bool(connection.recv(1))

    def close(self) -> None:
        super().close()
        self._epmd.close()
