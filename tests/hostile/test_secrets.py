"""No password is in any log, error or event, and no payload in what the library logs or sends."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from celery_coalesce import CoalescedTask, Coalescer
from celery_coalesce.engine import engine_of
from celery_coalesce.keys import state_id
from tests.hostile.listening import VARIABLE
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.process import HOST, free_port, wait_until
from tests.support.servers import RedisServer, ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

PASSWORD, PAYLOAD = "pass-word-17", "pay-load-17"


def told_by(call: Callable[[], Any]) -> str:
    """Return all that a failing call says, with whatever it was caused by."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any
        call()
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value.__dict__)


URLS = {
    "nothing listens": "redis://:{password}@{host}:{closed}/0",
    "by a user": "redis://user:{password}@{host}:{closed}/0",
    "in the query": "redis://{host}:{closed}/0?password={password}",
    "tls": "rediss://:{password}@{host}:{closed}/0?ssl_cert_reqs=none",
    "a wrong password": "redis://:{password}-wrong@{host}:{port}/0",
    "no tls there": "rediss://:{password}@{host}:{port}/0?ssl_cert_reqs=none",
    "no cluster there": "redis+cluster://:{password}@{host}:{port}",
    "no cluster at all": "redis+cluster://:{password}@{host}:{closed}",
    "no sentinel there": "sentinel://:{password}@{host}:{closed}/mymaster",
    "sentinel's own": "sentinel://{host}:{closed}/mymaster?sentinel_password={password}",
    "no master": "sentinel://:{password}@{host}:{closed}",
    "a bad port": "redis://:{password}@{host}:port/0",
    "a bad scheme": "http://:{password}@{host}:{port}/0",
    "a bad option": "redis://:{password}@{host}:{port}/0?no_such_option=1",
    "a bad sentinel option": "sentinel://:{password}@{host}:{port}/x?no_such_option={password}",
    "no url": ":{password}@{host}",
}


@pytest.fixture(scope="module")
def locked() -> Any:
    """A server that asks for the password."""
    with RedisServer(password=PASSWORD) as server:
        yield server


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_no_error_tells_a_password(locked: RedisServer, url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Not the error itself, nor what caused it, nor a log of it."""
    given = url.format(password=PASSWORD, host=HOST, port=locked.port, closed=free_port())
    caplog.set_level(logging.DEBUG)
    with Celery("secrets", broker="memory://", set_as_current=False) as app:
        app.conf.coalesce_redis_url = given

        @app.task(name="task", base=CoalescedTask, coalesce_key="k", shared=False)
        def task() -> None: ...

        told = told_by(task.delay)
        told += told_by(lambda: Coalescer(app).runs())
    assert PASSWORD not in told
    assert PASSWORD not in caplog.text


def test_no_worker_tells_a_password(
    locked: RedisServer, state_server: ValkeyServer, make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """Not when it starts, nor when the server is away, nor when it is back."""
    settings = {"coalesce_redis_url": locked.url(), "coalesce_lease": 2, "coalesce_redispatch_after": 2}
    app = make_app(conf=settings)
    worker = make_worker(app)
    app.tasks["queue"].delay(journal.key("k"), 1).get(timeout=20)
    locked.pause()
    try:
        with pytest.raises(OperationalError) as caught:
            app.tasks["queue"].delay(journal.key("k"), 1)
        assert PASSWORD not in "".join(traceback.format_exception(caught.value))
        wait_until(lambda: "The state server is away" in worker.logs(), 30)
    finally:
        locked.resume()
    assert app.tasks["queue"].delay(journal.key("k"), 2).get(timeout=30) == 2
    assert worker.stop() == 0
    assert PASSWORD not in worker.logs()


def test_no_payload_is_logged_or_sent(
    make_app: MakeApp,
    make_worker: MakeWorker,
    journal: Journal,
    state_server: ValkeyServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Arguments and values are in no log record and in no event of ours, whatever becomes of their run."""
    app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 2})
    caplog.set_level(logging.DEBUG, logger="celery_coalesce")
    logs = tmp_path / "logs"
    events: list[Any] = []
    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        # One subscription throughout: what is sent between two of them reaches nobody.
        thread = threading.Thread(target=receiver.capture, kwargs={"wakeup": False}, daemon=True)
        thread.start()
        try:
            _live(app, make_worker, journal, state_server, logs)
            wait_until(lambda: any(each["type"] == "coalesce-lost" for each in events), 20)
        finally:
            receiver.should_stop = True
            thread.join(5)
    text = logs.read_text()
    assert "action" in text
    assert PAYLOAD not in text
    ours = [each for each in events if each["type"].startswith("coalesce-")]
    assert {"coalesce-start", "coalesce-success", "coalesce-error", "coalesce-skip"} <= {each["type"] for each in ours}
    assert PAYLOAD not in repr(ours)
    assert PAYLOAD not in repr([record.__dict__ for record in caplog.records if record.name == "celery_coalesce"])


def _live(app: HarnessApp, make_worker: MakeWorker, journal: Journal, state_server: ValkeyServer, logs: Path) -> None:
    """Have everything happen to runs that carry the payload."""
    first, second = (make_worker(app, include=["tests.hostile.listening"], env={VARIABLE: str(logs)}) for _ in range(2))
    queue = app.tasks["queue"]
    # It succeeds, with callers that join it, one of whom has a callback; it fails; it is tried again.
    running = queue.delay(journal.key("k"), PAYLOAD, gate="a")
    journal.wait("start", key="k", timeout=20)
    queue.delay(journal.key("k"), PAYLOAD)
    queue.apply_async((journal.key("k"), PAYLOAD), link=app.tasks["collect"].s(key=journal.key("link")))
    journal.open("a")
    assert running.get(timeout=20) == PAYLOAD
    with pytest.raises(RuntimeError):
        queue.delay(journal.key("k"), PAYLOAD, error="on purpose").get(timeout=20)
    app.tasks["queue_retry"].delay(journal.key("retry"), 2, value=PAYLOAD).get(timeout=20)
    # It is revoked, expires, is cleared, and its arguments can not be read.
    queue.apply_async((journal.key("expired"), PAYLOAD), countdown=0.5, expires=0.1)
    journal.wait("coalesce_skip", key="expired", timeout=20)
    busy = journal.key("busy")
    blocked = app.tasks["serialize"].delay(busy, 1, gate="b")
    journal.wait("start", key="busy", timeout=20)
    app.tasks["serialize"].delay(busy, PAYLOAD)
    spoilt = app.tasks["serialize"].delay(busy, PAYLOAD)
    record = engine_of(app).transitions.store.names.record(state_id("serialize", busy))[0]
    with state_server.client(int(app.given["broker"].rsplit("/", 1)[1]), decode_responses=False) as client:
        client.hset(record, f"args:{spoilt.run_id}", b"application/json utf-8\n[[" + PAYLOAD.encode())
    journal.open("b")
    assert blocked.get(timeout=20) == 1
    with pytest.raises(Exception):  # noqa: B017, PT011 - what Celery makes of it
        spoilt.get(timeout=20)
    # Its process dies, and its worker.
    killed = app.tasks["queue_late"].delay(journal.key("killed"), PAYLOAD, gate="c")
    os.kill(journal.wait("start", key="killed", timeout=20)["pid"], signal.SIGKILL)
    with pytest.raises(Exception):  # noqa: B017, PT011 - WorkerLostError, as billiard has it
        killed.get(timeout=20)
    app.tasks["queue"].delay(journal.key("lost"), PAYLOAD, gate="c")
    start = journal.wait("start", key="lost", timeout=20)
    (first if first.hostname == start["hostname"] else second).kill()
    journal.wait("coalesce_lost", key="lost", timeout=20)
