"""What importing and declaring cost: no connection, no Redis client, no worker."""

from __future__ import annotations

from tests.unit.isolated import run_python

DECLARE = """
    import sys, socket
    def refuse(*args, **kwargs): raise SystemExit(f"connected: {args}")
    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    import celery_coalesce
    from celery import Celery
    app = Celery("x", broker="redis://127.0.0.1:1/0", backend="redis://127.0.0.1:1/1")
    @app.task(base=celery_coalesce.CoalescedTask, coalesce_key="org:<org_id>", coalesce_scope="s")
    def process(org_id): ...
    app.finalize()
    assert process.coalesce_policy.key((7,), {}) == "org:7"
    """


def test_declaring_a_task_connects_to_nothing_and_imports_no_client() -> None:
    """Importing and declaring is all the set-up there is, and costs no Redis."""
    modules = run_python(DECLARE + "print(' '.join(sys.modules))").split()
    assert "redis" not in modules
    assert "celery_coalesce.store.redis" not in modules
    assert "celery_coalesce.worker.request" not in modules
    assert "celery_coalesce.worker.presence" not in modules
    assert "celery_coalesce.transitions" in modules


def test_reading_the_engine_connects_to_nothing() -> None:
    """The client is made by the first call; a fork before it shares nothing."""
    run_python(
        DECLARE
        + """
    from celery_coalesce.engine import engine_of
    engine = engine_of(app)
    assert engine is engine_of(app)
    assert engine.transitions.store._client is None
    assert "redis" in sys.modules
    """
    )


def test_every_public_name_is_there() -> None:
    """`from celery_coalesce import *` gives what `__all__` says."""
    run_python(
        """
        import celery_coalesce
        assert all(hasattr(celery_coalesce, name) for name in celery_coalesce.__all__)
        from celery_coalesce import *
        """
    )
