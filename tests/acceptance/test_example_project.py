"""The example project: its story as a user runs it, and its page before a real broker and worker."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

from tests.support.app import HarnessApp
from tests.support.events import Monitor
from tests.support.process import ROOT, require
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
Environment = dict[str, Any]

EXAMPLE = ROOT / "example_project"
CRAWL, PROCESS = "crawler.tasks.crawl", "crawler.tasks.process"

#: A line of the timeline: task, organisation and repository, bar, and what is said of a run of `process`.
LINE = re.compile(
    r"(?P<task>crawl|process) +(?P<org>\w+)(/(?P<repo>\w+))? (?P<indent> *)(?P<bar>[-#]+)"
    r"( +session (?P<session>\d+), run (?P<index>\d+): (?P<triggers>\d+) triggers?)?"
)

#: Posts the button's form five times, once in a transaction that is rolled back, and once without a token.
PRESS = """
import re
from contextlib import suppress
import django
django.setup()
from django.db import transaction
from django.test import Client
client = Client(SERVER_NAME="localhost", enforce_csrf_checks=True)
token = re.search(r'csrfmiddlewaretoken" value="(\\w+)"', client.get("/").content.decode())[1]
form = {"csrfmiddlewaretoken": token}
with suppress(ZeroDivisionError), transaction.atomic():
    client.post("/organisations/1/crawl", form)
    1 / 0
posts = [client.post("/organisations/1/crawl", form) for _ in range(5)]
posts += [client.post("/organisations/2/crawl", form), client.post("/organisations/1/crawl")]
print(*[post.status_code for post in posts])
"""

#: Prints the page.
SHOW = """
import django
django.setup()
from django.test import Client
print(Client(SERVER_NAME="localhost").get("/").content.decode())
"""


def run(*command: Any, expected: int = 0, cwd: Path = EXAMPLE, **environment: Any) -> str:
    """Run Python with the example's modules in reach, and return what it prints."""
    paths = os.pathsep.join([str(ROOT), str(cwd)])
    defaults = {"PYTHONPATH": paths, "DJANGO_SETTINGS_MODULE": "gitstats.settings"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | defaults | {name: str(value) for name, value in environment.items()},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
        check=False,
    )
    assert done.returncode == expected, done.stdout
    return done.stdout


def left_behind(directory: Path) -> list[Any]:
    """Return the files in a temporary directory, and the processes that were told of it."""
    left: list[Any] = list(directory.iterdir())
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(directory):
                left.append(process)
        except psutil.Error:
            continue
    return left


class TestStory:
    @pytest.mark.timeout(120)
    def test_crawls_run_in_parallel_and_process_runs_coalesce(self, tmp_path: Path) -> None:
        """The timeline shows what the story claims, and nothing is left of it."""
        require("git")
        output = run(EXAMPLE / "story.py", "--orgs", 2, "--crawls", 3, TMPDIR=tmp_path)

        lines = [match for match in map(LINE.match, output.splitlines()) if match]
        crawls = [line for line in lines if line["task"] == "crawl"]
        assert sorted((line["org"], line["repo"]) for line in crawls) == [
            (org, repo) for org in ("acme", "globex") for repo in ("api", "docs", "web")
        ]
        assert int(re.search(r"up to (\d) at once", output)[1]) > 1  # type: ignore[index]
        for org in ("acme", "globex"):
            runs = [line for line in lines if line["task"] == "process" and line["org"] == org]
            assert sum(int(line["triggers"]) for line in runs) == 3, output
            assert runs[0].group("session", "index") == ("1", "0")
            assert len({line.group("session", "index") for line in runs}) == len(runs)
            for before, after in pairwise(runs):
                # Bars are rounded: one character of overlap is none.
                assert after.start("bar") >= before.end("bar") - 1, output
        assert output.count("\n  yes  ") == 5
        assert "  NO  " not in output
        assert left_behind(tmp_path) == []

    @pytest.mark.timeout(120)
    def test_plain_tasks_overlap(self, tmp_path: Path) -> None:
        """With --plain every call is a run, and runs overlap. An archive without a history will do."""
        require("git")
        copy = shutil.copytree(EXAMPLE, tmp_path / "archive", ignore=shutil.ignore_patterns("db.sqlite3*"))
        (tmp_path / "tmp").mkdir()
        output = run(copy / "story.py", "--orgs", 1, "--crawls", 3, "--plain", TMPDIR=tmp_path / "tmp", cwd=copy)

        assert "of 120 commits" in output
        assert len(re.findall("^process ", output, re.MULTILINE)) == 3
        assert re.search(r"NO   no two runs of process at once for one organisation: \d overlapped", output)
        assert left_behind(tmp_path / "tmp") == []

    @pytest.mark.parametrize(
        ("arguments", "environment", "code", "message"),
        [
            (["--repo", "/"], {}, 1, "error: /: git rev-list: fatal: not a git repository"),
            ([], {"PATH": ""}, 1, "error: git is not installed"),
            (["--crawls", "0"], {}, 2, "0 is not between 1 and 10"),
        ],
    )
    def test_says_what_keeps_it_from_starting(
        self, tmp_path: Path, arguments: list[str], environment: Environment, code: int, message: str
    ) -> None:
        """What is missing is named, before anything is started, and the exit code tells."""
        output = run(EXAMPLE / "story.py", *arguments, expected=code, TMPDIR=tmp_path, **environment)
        assert message in output
        assert "Traceback" not in output
        assert left_behind(tmp_path) == []


@pytest.fixture(scope="module")
def empty(state_server: ValkeyServer, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """What the project is told: a broker, and a migrated database, which nobody adds to."""
    environment: Environment = {
        "CELERY_BROKER_URL": state_server.new_db(),
        "EXAMPLE_DATABASE": str(tmp_path_factory.mktemp("example") / "db.sqlite3"),
    }
    run("manage.py", "migrate", "-v0", **environment)
    return environment


@pytest.fixture
def tracking(empty: Environment, tmp_path: Path) -> Environment:
    """The same with a database of its own, in which acme has two repositories of two commits."""
    environment = empty | {"EXAMPLE_DATABASE": str(tmp_path / "db.sqlite3")}
    shutil.copy(empty["EXAMPLE_DATABASE"], environment["EXAMPLE_DATABASE"])
    for repository in (tmp_path / "one", tmp_path / "two"):
        git("init", "-q", repository)
        for message in ("first", "second"):
            git("-C", repository, "commit", "-q", "--allow-empty", "-m", message)
    run("manage.py", "track", "acme", tmp_path / "one", tmp_path / "two", **environment)
    return environment


def git(*arguments: str | Path) -> None:
    """Run git as somebody."""
    somebody = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    subprocess.run([require("git"), *somebody, *arguments], check=True, timeout=20)


class TestPage:
    def test_empty_page_says_how_to_begin(self, empty: Environment) -> None:
        """Without an organisation the page names the command; it has colours for light and dark."""
        page = run("-c", SHOW, **empty)
        assert "manage.py track" in page
        assert "prefers-color-scheme: dark" in page

    def test_track_refuses_what_is_no_repository(self, empty: Environment, tmp_path: Path) -> None:
        """One bad path, and nothing is added."""
        output = run("manage.py", "track", "acme", tmp_path, expected=1, **empty)
        assert "not a git repository" in output
        assert "acme" not in run("-c", SHOW, **empty)

    def test_models_have_their_migrations(self, empty: Environment) -> None:
        """Nothing is left for makemigrations."""
        run("manage.py", "makemigrations", "--check", "--dry-run", **empty)

    @pytest.mark.timeout(120)
    def test_button_crawls_each_repository_once_however_often_it_is_pressed(
        self, tracking: Environment, make_app: MakeApp
    ) -> None:
        """Presses before the worker is there collapse; a rolled back one never was."""
        with Monitor(make_app(tracking["CELERY_BROKER_URL"])) as monitor:
            statuses = run("-c", PRESS, **tracking).splitlines()[-1]
            assert statuses.split() == ["302"] * 5 + ["404", "403"]
            monitor.settle()
            for repository in ("repo:1", "repo:2"):
                presses = monitor.events("coalesce-trigger", key=repository)
                assert [each["disposition"] for each in presses] == ["dispatched"] + ["coalesced"] * 4

            worker = WorkerProcess(
                "gitstats",
                broker=tracking["CELERY_BROKER_URL"],
                env=tracking | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)])},
            )
            with worker:
                monitor.wait("coalesce-success", name=CRAWL, count=2)
                covering = {each["run_id"] for each in monitor.events("coalesce-trigger", name=PROCESS)}
                for run_id in covering:
                    monitor.wait("coalesce-success", name=PROCESS, run_id=run_id)
            monitor.settle()
            assert [each["triggers"] for each in monitor.events("coalesce-start", name=CRAWL)] == [5, 5]
            assert sum(each["triggers"] for each in monitor.events("coalesce-start", name=PROCESS)) == 2

        assert "commits: 4, authors: 1" in run("-c", SHOW, **tracking)
