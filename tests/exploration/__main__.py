import argparse, time, sys, logging
from dataclasses import replace
import redis
from tests.exploration.explorer import explore, Violation
from tests.exploration.processes import NAMES, Acts, make_app, on_stage
from tests.exploration.snapshots import Snapshots
from tests.exploration.system import Setup, System
from tests.support.servers import ValkeyServer

logging.getLogger("celery_coalesce").setLevel(100)

import gc; gc.disable()
def main():
    setup = eval("Setup(" + (sys.argv[1] if len(sys.argv) > 1 else "") + ")")
    with ValkeyServer() as server, on_stage():
        client = redis.Redis(unix_socket_path=str(server.unix_socket), protocol=2)
        snapshots = Snapshots(client, NAMES)
        acts = Acts(make_app(dict(setup.options, key="k")))
        system = System(setup, acts, snapshots)
        began = time.monotonic()
        try:
            graph = explore(system.start(), system.steps, 400000)
        except Violation as v:
            print(v)
            print(time.monotonic() - began, snapshots.calls, acts.plays)
            return
        took = time.monotonic() - began
        graph.check_drains()
        print(setup, graph.states, graph.transitions, graph.depth, graph.interleavings(), len(graph.ends), "calls", snapshots.calls, "plays", acts.plays, f"{took:.1f}s")
main()
