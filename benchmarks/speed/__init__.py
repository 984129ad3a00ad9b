"""What coalescing costs beside plain Celery, and beside other packages that keep calls apart.

``python -m benchmarks.speed`` measures everything (a quarter of an hour), ``python -m benchmarks.speed producer burst``
some sections. It needs the extra ``benchmarks``, and starts what servers it needs. ``--redis URL`` names an empty
database to use instead, in all sections but ``scale``; it is emptied again and again. ``--rounds`` makes more or fewer
rounds, ``--json FILE`` writes the figures, and ``--plots DIRECTORY`` draws those of ``scale``.

How to read it. Times drift with the machine and with whatever else it does, so the contenders take turns, round by
round, and what counts is the ratio within a round. A row is the median over the rounds, with its quartiles in
brackets; then the median and quartiles of the ratio, and what it is a ratio to. Where a row has targets, each is
followed by ``met`` or ``missed``: by the median, of the ratio if there is one, else of the value. A missed target is
a figure as any other, never an exit code.

=============  =====================================================================================================
``producer``   ``.delay()`` on fresh keys and on a key whose run is queued, and batches; wall time, and the CPU time
               of the producer and of Redis. The floor is one EVALSHA of three commands by redis-py.
``rabbitmq``   The same with RabbitMQ as the broker; Redis holds the state.
``worker``     Runs per second of a body that does nothing, and the CPU time per run of the worker (parent and
               children) and of Redis. One worker for each contender goes on over all rounds.
``latency``    From before ``.delay()`` to the first line of the body, on an idle worker; and from the last line of
               a body to the first of its follow-up.
``burst``      10,000 triggers of one key: how many runs they made, and whether one was lost.
``memory``     Bytes of the state server for each key. What ours has more than the key's text and its arguments is
               what is judged; what others have includes the text.
``imports``    Milliseconds of ``import celery_coalesce``, in fresh interpreters.
``scale``      How cost grows with keys, waiting runs, followers, workers and constraints' waiters; what idle workers
               ask for, and a sweep. With ``--full`` to a million keys.
=============  =====================================================================================================

Each contender calls from a process of its own, so that none pays for what another has imported.
"""
