"""docs/fencing.md: a stale run's write is refused by its token. The code is that of the page."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from celery_coalesce import LeaseLost
from tests.integration import fencing_tasks
from tests.integration.fencing_tasks import DJANGO, INSERT, MODEL, TABLE, UPDATE, write
from tests.support.app import HarnessApp
from tests.support.journal import Journal
from tests.support.worker import WorkerProcess
from tests.unit.isolated import run_python

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SOON = 20  # seconds that anything may take on a busy machine


@pytest.fixture
def database(tmp_path: Path) -> str:
    """A database with the page's table, still empty."""
    path = str(tmp_path / "fencing.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute(TABLE)
    return path


def row(path: str) -> tuple[int, int]:
    """Return the total and the token that are stored."""
    with sqlite3.connect(path) as connection:
        found: tuple[int, int] = connection.execute("SELECT total, token FROM account WHERE id = 7").fetchone()
    return found


@pytest.mark.parametrize("statement", [UPDATE, INSERT], ids=["update", "insert"])
def test_late_write_of_a_stale_run_is_refused(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, database: str, statement: str
) -> None:
    """Paused beyond its lease in the midst of its body, it comes back after the next run has written."""
    app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 2})
    fencing_tasks.define(app)
    include = ["tests.integration.fencing_tasks"]
    workers = [make_worker(app, wait=False, include=include) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    settle = app.tasks["settle"]
    # The row is there, written by an earlier run with the other statement.
    settle.delay(journal.key(), database, INSERT, 1).get(timeout=SOON)
    first = journal.wait("start")
    assert row(database) == (1, first["coalesce_token"])

    stale = settle.delay(journal.key(), database, statement, 2, gate="a")
    start = journal.wait("start", count=2, timeout=SOON)
    frozen = next(worker for worker in workers if worker.hostname == start["hostname"])
    following = settle.delay(journal.key(), database, statement, 3)
    frozen.pause()
    following.get(timeout=30)
    newer = journal.wait("start", count=3)
    assert first["coalesce_token"] < start["coalesce_token"] < newer["coalesce_token"]
    assert row(database) == (3, newer["coalesce_token"])

    journal.open("a")
    frozen.resume()
    refused = journal.wait("refused", timeout=SOON)
    assert (refused["total"], refused["token"]) == (2, start["coalesce_token"])
    assert str(start["coalesce_token"]) in refused["error"]
    assert row(database) == (3, newer["coalesce_token"])
    with pytest.raises(LeaseLost):
        stale.get(timeout=SOON)
    # Whoever has the key's next lease writes again.
    settle.delay(journal.key(), database, statement, 4).get(timeout=SOON)
    assert row(database)[0] == 4


def test_statements_refuse_older_tokens_and_their_own(database: str) -> None:
    """Token by token, without a worker; `<=` lets a run write again, and nobody else."""
    with sqlite3.connect(database) as connection:
        with pytest.raises(LeaseLost):  # no row: nothing to update
            write(connection, UPDATE, 7, 1, 10)
        write(connection, INSERT, 7, 1, 10)
        for statement in (UPDATE, INSERT):
            for token in (9, 10):
                with pytest.raises(LeaseLost, match=f"token {token} is too old"):
                    write(connection, statement, 7, 2, token)
        again = UPDATE.replace("token < ", "token <= ")
        write(connection, again, 7, 3, 10)
        with pytest.raises(LeaseLost):
            write(connection, again, 7, 4, 9)
        # 64 bits hold every token there will be.
        write(connection, UPDATE, 7, 5, 2**63 - 1)
    assert row(database) == (5, 2**63 - 1)


def test_django_form_refuses_older_tokens(tmp_path: Path) -> None:
    """The page's model and its write."""
    run_python(
        f"""
        import django
        from django.conf import settings
        database = {{"ENGINE": "django.db.backends.sqlite3", "NAME": {str(tmp_path / "django.sqlite")!r}}}
        settings.configure(DATABASES={{"default": database}}, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField")
        django.setup()
        from django.db import connection, models
        from celery_coalesce import LeaseLost
        space = {{"models": models, "LeaseLost": LeaseLost, "__name__": "accounts"}}
        exec({MODEL!r} + "    class Meta:\\n        app_label = 'accounts'\\n", space)
        Account = space["Account"]
        with connection.schema_editor() as editor:
            editor.create_model(Account)
        Account.objects.create(pk=7, total=0)

        def write(total, token):
            try:
                exec({DJANGO!r}, {{**space, "account_id": 7, "total": total, "token": token}})
            except LeaseLost:
                return False
            return True

        big = 1_795_287_587_617_556
        assert [write(1, big), write(2, big + 1), write(3, big), write(4, big + 1)] == [True, True, False, False]
        account = Account.objects.get(pk=7)
        assert (account.total, account.token) == (2, big + 1)
        """
    )
