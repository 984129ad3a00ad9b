"""Messages signed with `celery.security`: a follow-up that a worker publishes is signed as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.acceptance.conftest import INCLUDE
from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import ROOT, require
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]

SECURITY = "tests.acceptance.signing"

#: Signing is set up for a whole process, so that the caller is one of its own.
CALLER = """
import sys
from tests.acceptance.signing import app
from tests.support.journal import journal_of

key = sys.argv[1]
journal, short = journal_of(key)
task = app.tasks["queue"]
first = task.delay(key, 1, gate="a")
journal.wait("start", timeout=20)
calls = [task.apply_async((key, n), link=app.tasks["collect"].s(key=key + "-link")) for n in (2, 3)]
journal.open("a")
print([first.get(timeout=20)] + [call.get(timeout=20) for call in calls])
"""


def test_signed_messages_coalesce(make_app: MakeApp, journal: Journal, tmp_path: Path) -> None:
    """The `auth` serializer, for the first run, its follow-up, and the callbacks of joined calls."""
    pytest.importorskip("cryptography")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.crt"
    command = [require("openssl"), "req", "-x509", "-nodes", "-days", "2", "-newkey", "rsa:2048"]
    command += ["-subj", "/CN=celery", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    conf = {
        "security_key": str(key),
        "security_certificate": str(certificate),
        "security_cert_store": str(tmp_path / "*.crt"),
        "task_serializer": "auth",
        "event_serializer": "auth",
        "accept_content": ["auth"],
        "result_accept_content": ["json"],
    }
    app = make_app(conf=conf)
    worker = WorkerProcess.serving(app, include=INCLUDE, events=False)
    worker.app = SECURITY
    environment = os.environ | {
        BROKER_VARIABLE: app.given["broker"],
        BACKEND_VARIABLE: app.given["backend"],
        CONF_VARIABLE: json.dumps(conf),
        "PYTHONPATH": str(ROOT),
    }

    with worker:
        called = subprocess.run(
            [sys.executable, "-c", CALLER, journal.key()],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            check=False,
            text=True,
            timeout=90,
        )

        assert called.stdout.strip() == "[1, 3, 3]", called.stderr
        journal.wait("end", key="key-link", count=2, timeout=20)
        assert len(journal.events("start", key="key")) == 2
        assert_no_overlap(journal.events(key="key"))
