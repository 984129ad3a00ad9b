"""The worker's side: the gate before the pool, and the presence that its leases hang from."""
