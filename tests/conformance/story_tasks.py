"""The tasks of the two stories: crawl and process (DU 18), checkout (AM 9)."""

from __future__ import annotations

from celery import Celery, Task

from celery_coalesce import CoalescedTask
from tests.support import app as support
from tests.support.journal import Journal
from tests.support.tasks import recorded


def define(app: Celery) -> None:
    """Register the tasks with an app."""
    app.task(name="crawl", shared=False, bind=True, base=CoalescedTask, coalesce_key="<repo>")(crawl)
    app.task(name="process", shared=False, bind=True, base=CoalescedTask, coalesce_key="<org>")(process)
    app.task(name="checkout", shared=False, bind=True, base=CoalescedTask, coalesce_key="<user>", coalesce="serialize")(
        checkout
    )


# Data that `process` has not taken yet: a list on the journal's server.


def crawled(journal: Journal) -> str:
    """Return the name of the list of what was crawled and waits to be processed."""
    return f"crawled:{journal.name}"


def crawl(self: Task, repo: str, org: str, gate: str | None = None) -> None:
    """Crawl a repository, keep what was found, and have its organisation processed."""
    with recorded(self, repo) as journal:
        if gate:
            journal.pass_gate(gate)
        journal.client.rpush(crawled(journal), repo)
    self.app.tasks["process"].delay(org, gate=gate and "process")


def process(self: Task, org: str, gate: str | None = None) -> list[str]:
    """Take all that was crawled, and be done with it when the gate opens; return what it was."""
    with recorded(self, org) as journal:
        taken: list[str] = journal.client.lpop(crawled(journal), 100) or []
        journal.record("took", key=org.partition(":")[2], repos=taken)
        if gate:
            journal.pass_gate(gate)
    return taken


def balance(user: str) -> str:
    """Return where the balance of a user is, on the journal's server."""
    return f"balance:{user}"


def checkout(self: Task, user: str, amount: int, gate: str | None = None) -> str:
    """Take an amount off a balance if there is enough of it: read, wait at the gate, write."""
    with recorded(self, user) as journal:
        before = int(journal.client.get(balance(user)) or 0)
        journal.record("read", key=user.partition(":")[2], balance=before)
        if gate:
            journal.pass_gate(gate)
        if before < amount:
            return "declined"
        journal.client.set(balance(user), before - amount)
    return "paid"


if hasattr(support, "app"):  # in a worker
    define(support.app)
