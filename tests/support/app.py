"""The Celery app of the tests, the same in the test process and in workers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from celery import Celery

from tests.support.coalesced import define_coalesced_tasks, journal_signals
from tests.support.tasks import define_tasks

BROKER_VARIABLE = "TEST_BROKER_URL"
BACKEND_VARIABLE = "TEST_BACKEND_URL"
CONF_VARIABLE = "TEST_CONF"


class HarnessApp(Celery):
    """A Celery app that remembers what it was made with, so that a worker can be its twin.

    Attributes:
        given: `broker`, `backend` and `conf` as given to `make_app()`.
    """

    given: dict[str, Any]


def make_app(broker: str, backend: str | None = None, conf: Mapping[str, Any] | None = None) -> HarnessApp:
    """Return an app with the test tasks; `conf` must survive JSON to reach the workers."""
    app = HarnessApp("tests", broker=broker, backend=backend, set_as_current=False)
    app.given = {"broker": broker, "backend": backend, "conf": dict(conf or {})}
    app.conf.update({"broker_connection_retry_on_startup": True} | app.given["conf"])
    define_tasks(app)
    define_coalesced_tasks(app)
    return app


def redeliver(app: HarnessApp) -> None:
    """Have the Redis broker deliver every message again that it keeps, as after its visibility timeout."""
    options = {**app.conf.broker_transport_options, "visibility_timeout": 0}
    with app.connection_for_write(transport_options=options) as connection:
        connection.default_channel.qos.restore_visible(interval=1)


if BROKER_VARIABLE in os.environ:  # in a worker, which is told through its environment
    app = make_app(
        os.environ[BROKER_VARIABLE],
        os.environ.get(BACKEND_VARIABLE),
        json.loads(os.environ.get(CONF_VARIABLE, "{}")),
    )
    app.set_default()
    journal_signals()
