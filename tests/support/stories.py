"""Hypothesis' state machines, run alike: the same stories in every check, others on demand.

`TEST_EXAMPLES` and `TEST_STEPS` ask for other and longer ones, `TEST_SHRINK` for the shortest that fails, which takes
minutes.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

PHASES = tuple(Phase) if "TEST_SHRINK" in os.environ else (Phase.explicit, Phase.reuse, Phase.generate)


def tell_stories(machine: Any, examples: int) -> None:
    """Run a state machine through so many stories."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("TEST_EXAMPLES", examples)),
            stateful_step_count=int(os.environ.get("TEST_STEPS", "30")),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=PHASES,
            report_multiple_bugs=False,
            derandomize="TEST_EXAMPLES" not in os.environ,
            database=None,
        ),
    )
