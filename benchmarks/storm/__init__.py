"""A storm: random triggers over hundreds of keys while processes, connections and servers fail, and a judge of its log.

``python -m benchmarks.storm --minutes 5`` starts servers, workers and producers of its own, breaks them at random,
lets everything settle, and then decides from the log of what happened whether every guarantee held. It exits with 1 if
one did not, and leaves the log.
"""
