"""Python in a process of its own, for what must not touch the tests'."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support.process import ROOT


def run_python(code: str) -> str:
    """Run a program and return what it printed; fail with what it said if it fails."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout
