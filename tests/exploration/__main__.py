"""Explore, and print the counts: python -m tests.exploration [--bound deep] [--setup NAME ...]."""

from __future__ import annotations

import argparse
import sys

from tests.exploration.bounds import BOUNDED, DEEP
from tests.exploration.explorer import Violation
from tests.exploration.harness import explored


def main() -> int:
    """Explore setup after setup; return how many are wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.exploration", description=__doc__)
    parser.add_argument("--bound", choices=("ci", "deep"), default="ci", help="which setups (default: %(default)s)")
    parser.add_argument("--setup", action="append", help="only the setup of this name; may be repeated")
    parser.add_argument("--most", type=int, default=5_000_000, help="how many states a setup may have at most")
    parser.add_argument("--list", action="store_true", help="print the setups' names")
    given = parser.parse_args()
    setups = BOUNDED if given.bound == "ci" else DEEP
    unknown = set(given.setup or ()) - set(setups)
    if unknown:
        parser.error(f"no setup is called {min(unknown)!r}; known are {', '.join(setups)}")
    if given.list:
        print(*setups, sep="\n")
        return 0
    wrong = 0
    print(f"{'setup':<32} {'states':>9} {'steps':>10} {'interleavings':>26} {'depth':>6} {'seconds':>8}")
    for name in given.setup or setups:
        try:
            counts = explored(setups[name], most=given.most)
        except (Violation, OverflowError) as error:
            wrong += 1
            print(f"{name:<32} {error}")
        else:
            print(f"{name:<32} {counts}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
