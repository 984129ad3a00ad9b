"""Workers whose kill points have names."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from celery_coalesce import TriggerMeta
from celery_coalesce.signals import coalesce_trigger
from tests.killing.stories import CONF, Story
from tests.killing.supervising import Site
from tests.support.app import HarnessApp, make_app
from tests.support.journal import Journal, connect
from tests.support.points import SITE_VARIABLE
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


@pytest.fixture(scope="module")
def site(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of a module's stories: short leases, and a database of its own."""
    url = state_server.new_db()
    with make_app(url, url, CONF) as app:
        yield app
        # Results that are collected later must not unsubscribe from a server that is gone.
        app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture(scope="module")
def start_worker(site: HarnessApp) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker with points: `start_worker(app=site, **options)`."""
    started: list[WorkerProcess] = []

    def start(app: HarnessApp = site, **options: Any) -> WorkerProcess:
        worker = WorkerProcess.serving(app, events=False, include=["tests.support.points"], **options)
        worker.env[SITE_VARIABLE] = worker.hostname
        started.append(worker)
        worker.launch()
        return worker

    yield start
    for worker in started:
        worker.close()


@pytest.fixture(scope="module")
def triggers() -> Iterator[dict[str, TriggerMeta]]:
    """What became of every call of this process, by its task id."""
    triggers: dict[str, TriggerMeta] = {}

    def note(meta: TriggerMeta, **_: Any) -> None:
        triggers[meta.task_id] = meta

    coalesce_trigger.connect(note)
    yield triggers
    coalesce_trigger.disconnect(note)


@pytest.fixture(scope="module")
def make_story(
    site: HarnessApp, journal_server: ValkeyServer, triggers: dict[str, TriggerMeta]
) -> Iterator[Callable[..., Story]]:
    """Make a story: `make_story(task, *points, app=site, kind=Story)`."""
    with connect(journal_server.url()) as client:
        stories: list[Story] = []

        def make(task: str, *kill: str, app: HarnessApp = site, kind: type[Story] = Story) -> Story:
            stories.append(kind(app, Journal(client), task, triggers, kill))
            return stories[-1]

        yield make
        for story in stories:
            story.journal.open_all()


@pytest.fixture(scope="module")
def make_site(
    state_server: ValkeyServer, journal_server: ValkeyServer, start_worker: Callable[..., WorkerProcess]
) -> Iterator[Callable[..., Site]]:
    """Make a site with so many workers, which need not be ready yet: `make_site(workers, shortcuts=False)`.

    Plain tasks are for a worker of their own, which nobody kills: what becomes of them is Celery's. With shortcuts the
    site's broker is its state server, else that of all sites.
    """
    url = state_server.new_db()
    with ExitStack() as stack:

        def site_app(queue: str, broker: str = url, **conf: str) -> HarnessApp:
            routes = {name: {"queue": "plain"} for name in ("collect", "on_error", "work")}
            own = {"task_default_queue": queue, "task_routes": routes, **conf}
            return stack.enter_context(make_app(broker, url, {**CONF, **own}))

        served: set[str] = set()

        def make(workers: int, shortcuts: bool = False) -> Site:
            state = state_server.new_db()
            queue = f"site-{uuid.uuid4().hex[:8]}"
            app = site_app(queue, state) if shortcuts else site_app(queue, coalesce_redis_url=state)
            broker = state if shortcuts else url
            if broker not in served:
                served.add(broker)
                # Not of the site's state: what it would dispatch again would go to its own queue.
                start_worker(site_app("plain", broker, coalesce_redis_url=state_server.new_db()), concurrency=2)
            stack.callback(app.backend.result_consumer.subscribed_to.clear)
            return Site(app, state, [start_worker(app, concurrency=1) for _ in range(workers)])

        yield make
