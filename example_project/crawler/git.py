"""A repository's log, as values."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


class GitError(Exception):
    """Git is not there, or refused; the message says what it said."""


@dataclass(frozen=True)
class LogEntry:
    """One commit of a log."""

    sha: str
    author: str
    authored_at: datetime


def git(directory: Path | str, *arguments: str, stdin: str = "") -> str:
    """Run git in a directory and return what it prints.

    Raises:
        GitError: There is no git, or it exits with an error.
    """
    # What git sets for its hooks (GIT_DIR ...) would lead to another repository than the one asked for.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            input=stdin,
            capture_output=True,
            check=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
    except FileNotFoundError:
        raise GitError("git is not installed, or not on the PATH") from None
    except subprocess.CalledProcessError as error:
        raise GitError(f"{directory}: git {arguments[0]}: {error.stderr.strip()}") from None
    return done.stdout


def count_commits(directory: Path | str) -> int:
    """Return how many commits the current branch of a repository has.

    Raises:
        GitError: The directory is no repository, or one without a commit.
    """
    return int(git(directory, "rev-list", "--count", "HEAD", "--"))


def read_log(directory: Path | str, depth: int) -> Iterator[LogEntry]:
    """Read the newest commits of the current branch, at most ``depth``.

    Raises:
        GitError: As :func:`count_commits`.
    """
    layout = "--format=%H%x00%an%x00%at"
    log = git(directory, "log", "--no-show-signature", f"--max-count={depth}", layout)
    for line in log.rstrip("\n").split("\n"):  # a name may hold what else splitlines() splits at
        sha, author, seconds = line.split("\0")
        yield LogEntry(sha, author, datetime.fromtimestamp(int(seconds), timezone.utc))
