"""Binding tasks to apps: when options are validated, where they come from, and what is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery, Task
from celery._state import _deregister_app

from celery_coalesce import CoalescedTask, OptionError, SettingError
from celery_coalesce.engine import engine_of
from celery_coalesce.errors import CoalesceError
from celery_coalesce.policy import Policy
from celery_coalesce.states import Mode
from tests.unit.isolated import run_python

PRESENCE = "celery_coalesce.worker.presence:Presence"


@pytest.fixture
def make_app() -> Iterator[Callable[..., Celery]]:
    """Make an app that no other test meets."""
    apps: list[Celery] = []

    def make(**options: Any) -> Celery:
        apps.append(Celery("unit", broker="memory://", set_as_current=False, **options))
        return apps[-1]

    yield make
    for app in apps:
        app.close()
        _deregister_app(app)


@pytest.fixture
def app(make_app: Callable[..., Celery]) -> Celery:
    """An app that is finalized, as in a worker."""
    app = make_app()
    app.finalize()
    return app


def body(org_id: int) -> int:
    """Return the argument."""
    return org_id


def declare(app: Celery, body: Callable[..., Any] = body, **options: Any) -> Any:
    """Return a task of one app alone."""
    return app.task(shared=False, **options)(body)


def policy_of(task: Any) -> Policy:
    """Return a task's policy, which must be there."""
    policy: Policy | None = task.coalesce_policy
    assert policy is not None
    return policy


class TestWhenItIsValidated:
    def test_at_decoration_where_the_app_is_finalized(self, app: Celery) -> None:
        """The line of the mistake is in the traceback."""
        with pytest.raises(OptionError, match=r"tasks\.bad: coalesce='sometimes' is not known"):
            declare(app, name="tasks.bad", base=CoalescedTask, coalesce="sometimes")

    def test_at_the_latest_when_the_app_is_finalized(self, make_app: Callable[..., Celery]) -> None:
        """Before a worker starts or a call is made."""
        app = make_app()
        declare(app, name="tasks.bad", base=CoalescedTask, coalesce_key="<nobody>")
        with pytest.raises(OptionError, match="unknown field 'nobody'"):
            app.finalize()

    def test_a_refused_task_can_not_be_called(self, make_app: Callable[..., Celery]) -> None:
        """Not even by who caught the error: it would run without its key."""
        app = make_app()
        bad = declare(app, name="tasks.bad", base=CoalescedTask, coalesce="sometimes")
        with pytest.raises(OptionError):
            app.finalize()
        with pytest.raises((OptionError, CoalesceError)):
            bad.delay(7)

    def test_settings_are_not_needed_to_declare(self, make_app: Callable[..., Celery]) -> None:
        """A task may be imported where no Redis is configured; its call says so."""
        app = make_app()
        good = declare(app, name="tasks.good", base=CoalescedTask, coalesce_key="<org_id>")
        app.finalize()
        with pytest.raises(SettingError, match="set coalesce_redis_url"):
            good.delay(7)

    def test_all_calls_of_a_bound_task_are_validated_before_anything(self, app: Celery) -> None:
        """A bad per-call option comes before the missing server."""
        good = declare(app, name="tasks.good", base=CoalescedTask, coalesce_key="<org_id>")
        for bad in ({"coalesce": "x"}, {"coalesce_limit": 2}, {"coalesce_kye": "x"}):
            with pytest.raises(OptionError, match=r"^tasks\.good: coalesce"):
                good.apply_async((7,), **bad)
        with pytest.raises(ValueError, match="may not be empty"):
            good.apply_async((7,), coalesce_key="")
        with pytest.raises(TypeError):
            good.apply_async((7, 8))


class TestWhereOptionsComeFrom:
    def test_the_decorator(self, app: Celery) -> None:
        """`@app.task(base=CoalescedTask, coalesce_...=...)`."""
        task = declare(app, name="t", base=CoalescedTask, coalesce="serialize", coalesce_limit=2)
        assert (policy_of(task).mode, policy_of(task).limit) == (Mode.SERIALIZE, 2)

    def test_class_attributes(self, app: Celery) -> None:
        """`class MyTask(CoalescedTask)`."""

        class MyTask(CoalescedTask):
            name = "my"
            coalesce = "skip"
            coalesce_key = "org:<org_id>"

            def run(self, org_id: int) -> int:
                return org_id

        task = app.register_task(MyTask())
        assert policy_of(task).mode is Mode.SKIP
        assert policy_of(task).key((7,), {}) == "org:7"

    def test_an_abstract_base_with_defaults_of_its_own(self, app: Celery) -> None:
        """Inherited, and overridden one by one."""

        class Ours(CoalescedTask):
            abstract = True
            coalesce_max_queued = 4
            coalesce_overflow = "reject"

        one = declare(app, name="one", base=Ours)
        two = declare(app, name="two", base=Ours, coalesce_max_queued=2)
        assert (policy_of(one).max_queued, policy_of(one).overflow) == (4, "reject")
        assert (policy_of(two).max_queued, policy_of(two).overflow) == (2, "reject")

    def test_a_base_of_a_base(self, app: Celery) -> None:
        """The most derived class counts."""

        class Ours(CoalescedTask):
            abstract = True
            coalesce = "serialize"
            coalesce_scope = "ours"

        class Theirs(Ours):
            abstract = True
            coalesce = "queue"

        task = declare(app, name="t", base=Theirs)
        assert (policy_of(task).mode, policy_of(task).scope) == (Mode.QUEUE, "ours")

    def test_a_mixin_beside_it(self, app: Celery) -> None:
        """A plain class may bring options along."""

        class Serialized:
            coalesce = "serialize"
            coalesce_limit = 3

        class Ours(Serialized, CoalescedTask):
            abstract = True

        task = declare(app, name="t", base=Ours)
        assert (policy_of(task).mode, policy_of(task).limit) == (Mode.SERIALIZE, 3)

    def test_task_annotations(self, make_app: Callable[..., Celery]) -> None:
        """Celery's way to change tasks by settings, for one task and for all."""
        app = make_app()
        app.conf.task_annotations = {"t": {"coalesce_max_queued": 5}, "*": {"coalesce_overflow": "reject"}}
        task = declare(app, name="t", base=CoalescedTask)
        app.finalize()
        assert (policy_of(task).max_queued, policy_of(task).overflow) == (5, "reject")

    def test_bad_task_annotations_are_refused(self, make_app: Callable[..., Celery]) -> None:
        """As any other option."""
        app = make_app()
        app.conf.task_annotations = {"t": {"coalesce_max_queued": 0}}
        declare(app, name="t", base=CoalescedTask)
        with pytest.raises(OptionError, match="coalesce_max_queued=0"):
            app.finalize()

    def test_a_callable_key_stays_a_function(self, app: Celery) -> None:
        """It is no method: it gets the call's arguments alone, on a class and on a decorator."""

        class MyTask(CoalescedTask):
            name = "my"

            @staticmethod
            def coalesce_key(org_id: int) -> str:
                return f"static:{org_id}"

            def run(self, org_id: int) -> int:
                return org_id

        task = app.register_task(MyTask())
        assert policy_of(task).key((7,), {}) == "static:7"
        other = declare(app, name="o", base=CoalescedTask, coalesce_key=lambda org_id: f"o:{org_id}")
        assert policy_of(other).key((7,), {}) == "o:7"

    def test_a_bound_task_does_not_count_itself(self, app: Celery) -> None:
        """`bind=True`."""

        def bound(self: Any, org_id: int) -> int:
            return org_id

        task = declare(app, name="t", bind=True, base=CoalescedTask, coalesce_key="<org_id>", body=bound)
        assert policy_of(task).key((7,), {}) == "7"

    def test_a_shared_task_has_a_policy_in_every_app(self) -> None:
        """`@shared_task`, for apps made before and after it."""
        # In a process of its own: a shared task goes into every app that is finalized later.
        run_python("""
            from celery import Celery, shared_task
            from celery_coalesce import CoalescedTask
            before = Celery("before", set_as_current=False)
            before.finalize()
            @shared_task(name="shared", base=CoalescedTask, coalesce="skip", coalesce_key="<org_id>")
            def shared(org_id): ...
            after = Celery("after", set_as_current=False)
            after.finalize()
            for app in (before, after):
                policy = app.tasks["shared"].coalesce_policy
                assert policy.mode == "skip" and policy.key((7,), {}) == "7", policy
                assert "celery_coalesce.worker.presence:Presence" in app.steps["worker"]
        """)

    def test_binding_twice_changes_nothing(self, app: Celery) -> None:
        """The option `coalesce` is not lost to the attribute `self.coalesce`."""
        task = declare(app, name="t", base=CoalescedTask, coalesce="serialize", coalesce_limit=2)
        type(task).bind(app)
        assert (policy_of(task).mode, policy_of(task).limit) == (Mode.SERIALIZE, 2)

    def test_a_task_class_of_a_bound_one(self, app: Celery) -> None:
        """Deriving from a task that is bound inherits what it declared."""

        class One(CoalescedTask):
            name = "one"
            coalesce = "serialize"
            coalesce_limit = 2

            def run(self, org_id: int) -> int:
                return org_id

        app.register_task(One())

        class Two(One):
            name = "two"
            coalesce_limit = 4

        two = app.register_task(Two())
        assert (policy_of(two).mode, policy_of(two).limit) == (Mode.SERIALIZE, 4)
        assert policy_of(two).scope == "two"
        assert policy_of(app.tasks["one"]).limit == 2


class TestWhatIsLeftAlone:
    def test_celerys_own_tasks_under_task_cls(self, make_app: Callable[..., Celery]) -> None:
        """`task_cls=CoalescedTask` rebases them too; they go on as before."""
        app = make_app(task_cls=CoalescedTask)
        mine = declare(app, name="mine")
        app.finalize()
        own = [name for name in app.tasks if name.startswith("celery.")]
        assert own
        assert all(app.tasks[name].coalesce_policy is None for name in own)
        assert policy_of(mine).whole_task

    def test_plain_tasks_beside(self, app: Celery) -> None:
        """They have no policy at all."""
        task = declare(app, name="plain")
        assert not isinstance(task, CoalescedTask)
        assert task.Request == Task.Request

    def test_a_direct_call_needs_nothing(self, app: Celery) -> None:
        """No server, no run."""
        task = declare(app, name="t", base=CoalescedTask, coalesce_key="<org_id>")
        assert task(7) == 7
        assert task.apply((7,)).get() == 7

    def test_the_run_of_a_direct_call_has_a_key(self, app: Celery) -> None:
        """`self.coalesce` is there in every body."""

        def bound(self: Any, org_id: int) -> Any:
            self.coalesce.check()
            return self.coalesce.key, self.coalesce.run_index, self.coalesce.is_rerun

        task = declare(app, name="t", bind=True, base=CoalescedTask, coalesce_key="org:<org_id>", body=bound)
        assert task.apply((7,)).get() == ("org:7", 0, False)
        assert task.apply(kwargs={"org_id": 7}).get() == ("org:7", 0, False)

    def test_eager_calls_run_inline(self, make_app: Callable[..., Celery]) -> None:
        """`task_always_eager`: no server, options still validated."""
        app = make_app()
        app.conf.task_always_eager = True
        task = declare(app, name="t", base=CoalescedTask, coalesce_key="<org_id>")
        app.finalize()
        assert task.delay(7).get() == 7
        with pytest.raises(OptionError):
            task.apply_async((7,), coalesce="x")


class TestInstalling:
    def test_binding_installs_the_presence(self, app: Celery) -> None:
        """Importing and declaring is all the set-up there is."""
        assert PRESENCE not in app.steps["worker"]
        declare(app, name="t", base=CoalescedTask)
        assert PRESENCE in app.steps["worker"]

    def test_an_engine_knows_tasks_that_come_later(self, app: Celery) -> None:
        """Whatever it had looked up before; and what they declare counts for their scope."""
        app.conf.coalesce_redis_url = "redis://127.0.0.1:1/0"
        engine = engine_of(app)
        assert engine.policy_of("late") is None
        assert engine.longest_rest("s") == 0
        late = declare(app, name="late", base=CoalescedTask, coalesce_scope="s", coalesce_cooldown=3)
        assert engine.policy_of("late") is policy_of(late)
        assert engine.longest_rest("s") == 3

    def test_another_request_class_is_refused(self, app: Celery) -> None:
        """It would take the gate away."""
        from celery.worker.request import Request

        class Mine(Request):
            pass

        for request in (Mine, "celery.worker.request:Request"):

            class Ours(CoalescedTask):
                abstract = True
                Request = request

            with pytest.raises(OptionError, match="takes the gate away; derive it from") as raised:
                declare(app, name=f"t{request}", base=Ours)
            assert raised.value.option == "Request"

    def test_a_request_class_derived_from_ours_is_taken(self, app: Celery) -> None:
        """Extending is fine."""
        from celery_coalesce.worker.request import CoalescedRequest

        class Mine(CoalescedRequest):
            pass

        class Ours(CoalescedTask):
            abstract = True
            Request = Mine

        assert policy_of(declare(app, name="t", base=Ours)).whole_task
