"""One app's settings, store and engine, made when they are first needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .broker import Broker
from .records import Timing
from .settings import Settings
from .signals import EventBus
from .transitions import Transitions

if TYPE_CHECKING:
    from celery import Celery

    from .policy import Policy

__all__ = ["Engine", "engine_of"]

_ATTRIBUTE = "_celery_coalesce_engine"


@dataclass(frozen=True)
class Engine:
    """What an app coalesces with."""

    app: Celery
    settings: Settings
    transitions: Transitions
    #: The event bus of a process that is no worker.
    producer_bus: EventBus
    #: The broker, where it is the store's server and short ways to it may be taken.
    broker: Broker | None = None
    _by_scope: dict[tuple[str, int], list[Policy]] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> Mapping[str, Any]:
        """The app's tasks. Celery takes a while to look the registry up."""
        tasks: Mapping[str, Any] = self.app.tasks
        return tasks

    def policy_of(self, task: str) -> Policy | None:
        """Return the options of a task that this process knows and that coalesces."""
        policy: Policy | None = getattr(self.tasks.get(task), "coalesce_policy", None)
        return policy

    def longest_rest(self, scope: str) -> float:
        """Return the longest ``coalesce_cooldown`` of the tasks that share a scope, in seconds."""
        return max((policy.cooldown for policy in self._policies(scope)), default=0.0)

    def has_task(self, scope: str) -> bool:
        """Return whether any task has a scope."""
        return bool(self._policies(scope))

    def least_limit(self, scope: str) -> int:
        """Return the least ``coalesce_limit`` of the tasks that share a scope, 1 if there are none."""
        return min((policy.limit for policy in self._policies(scope)), default=1)

    def _policies(self, scope: str) -> list[Policy]:
        # Asked at every end of a run; tasks may be added, and never change.
        known = (scope, len(self.tasks))
        found = self._by_scope.get(known)
        if found is None:
            policies = (getattr(task, "coalesce_policy", None) for task in self.tasks.values())
            found = [policy for policy in policies if policy is not None and policy.scope == scope]
            self._by_scope[known] = found
        return found


def engine_of(app: Celery) -> Engine:
    """Return an app's engine.

    Raises:
        SettingError: A ``coalesce_*`` setting is unknown or bad, or names no server that can be used.
    """
    engine: Engine | None = app.__dict__.get(_ATTRIBUTE)
    if engine is None:
        # Imported late: a process that only imports its tasks needs no Redis client.
        from .store.redis import connect

        settings = Settings.of(app)
        timing = Timing(
            lease=int(settings.lease * 1000),
            redispatch=int(settings.redispatch_after * 1000),
            remember=int(2000 * _visibility_timeout(app)),
        )
        tells = bool(app.conf.task_send_sent_event)
        store = connect(app, settings)
        broker = Broker(store, tells=tells) if store.is_broker and settings.broker_shortcuts else None
        bus = EventBus(app, settings.events and tells)
        engine = Engine(app, settings, Transitions(store, timing), bus, broker)
        app.__dict__[_ATTRIBUTE] = engine
    return engine


def _visibility_timeout(app: Celery) -> float:
    """Return after how many seconds the broker may deliver an unacknowledged message again."""
    options = app.conf.broker_transport_options or {}
    return float(options.get("visibility_timeout", 3600))
