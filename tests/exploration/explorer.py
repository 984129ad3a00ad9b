"""A graph search that visits every state that can be reached, and says of the whole graph whether it can get stuck."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

__all__ = ["Graph", "Violation", "explore"]

#: A state, packed; equal states are equal bytes.
State = bytes
#: What may happen in a state: what it is called, and the state that it leads to.
Steps = Iterable[tuple[str, State]]


class Violation(AssertionError):
    """Something that must never be was reached.

    Attributes:
        path: The steps that lead to it, from the start.
    """

    def __init__(self, what: str, path: list[str] | None = None) -> None:
        steps = "".join(f"\n  {number}. {step}" for number, step in enumerate(path or (), 1))
        super().__init__(f"{what}{' after' if steps else ''}{steps}")
        self.what = what
        self.path = path or []


@dataclass
class Graph:
    """All states that can be reached, by number; 0 is the start."""

    #: Of each state, those that one step leads to.
    after: list[list[int]] = field(default_factory=list)
    #: Of each state but the first, the state and the step by which it was first reached.
    reached_by: list[tuple[int, str]] = field(default_factory=list)
    steps: dict[str, int] = field(default_factory=dict)
    #: How many steps the farthest state is from the start.
    depth: int = 0

    @property
    def states(self) -> int:
        return len(self.after)

    @property
    def transitions(self) -> int:
        return sum(map(len, self.after))

    @property
    def ends(self) -> list[int]:
        """States that no step leaves."""
        return [state for state, after in enumerate(self.after) if not after]

    def path(self, state: int) -> list[str]:
        """Return the steps that lead to a state, from the start."""
        steps: list[str] = []
        while state:
            state, step = self.reached_by[state]
            steps.append(step)
        return steps[::-1]

    def check_drains(self) -> None:
        """Check that every state can reach an end, and that no fair execution can avoid all ends.

        A fair execution that never ends stays in one strongly connected component for ever, while it takes every step
        that it could take again and again: so it stays in one that no step leaves.

        Raises:
            Violation: There is a state from which no end can be reached.
        """
        before: list[list[int]] = [[] for _ in self.after]
        for state, after in enumerate(self.after):
            for other in after:
                before[other].append(state)
        drains = set(self.ends)
        left = list(drains)
        while left:
            for other in before[left.pop()]:
                if other not in drains:
                    drains.add(other)
                    left.append(other)
        stuck = next((state for state in range(self.states) if state not in drains), None)
        if stuck is not None:
            raise Violation("nothing ends any more", self.path(stuck))
        for component in self._components():
            leaves = any(other not in component for state in component for other in self.after[state])
            if not leaves and (len(component) > 1 or self.after[next(iter(component))]):
                raise Violation("it goes round for ever", self.path(min(component)))

    def interleavings(self) -> int | None:
        """Return how many ways lead from the start to an end; ``None`` if there are circles."""
        order = [state for component in self._components() for state in component]
        place = {state: number for number, state in enumerate(order)}
        if any(place[other] >= place[state] for state in order for other in self.after[state]):
            return None
        ways = [0] * self.states
        # A component comes before those that lead to it.
        for state in order:
            ways[state] = sum(ways[other] for other in self.after[state]) or 1
        return ways[0]

    def _components(self) -> Iterator[set[int]]:
        """Yield the strongly connected components, each after those that it leads to (Tarjan)."""
        index: dict[int, int] = {}
        low: dict[int, int] = {}
        stack: list[int] = []
        standing: set[int] = set()
        for root in range(self.states):
            if root in index:
                continue
            work = [(root, iter(self.after[root]))]
            index[root] = low[root] = len(index)
            stack.append(root)
            standing.add(root)
            while work:
                state, left = work[-1]
                for other in left:
                    if other not in index:
                        index[other] = low[other] = len(index)
                        stack.append(other)
                        standing.add(other)
                        work.append((other, iter(self.after[other])))
                        break
                    if other in standing:
                        low[state] = min(low[state], index[other])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[state])
                    if low[state] == index[state]:
                        component = set()
                        while state not in component:
                            component.add(stack.pop())
                        standing -= component
                        yield component


def explore(start: State, steps_of: Callable[[State], Steps], most: int = 10_000_000) -> Graph:
    """Visit every state that can be reached, nearest first.

    Args:
        start: Where to begin.
        steps_of: Returns all that may happen in a state; raises :class:`Violation` if the state, or what happens, is
            wrong.
        most: How many states there may be.

    Raises:
        Violation: Something is wrong; its path is a shortest one.
        OverflowError: There are more states.
    """
    graph = Graph(after=[[]], reached_by=[(0, "")])
    numbers = {_digest(start): 0}
    front = [(0, start)]
    while front:
        following: list[tuple[int, State]] = []
        for number, state in front:
            try:
                for step, other in steps_of(state):
                    graph.steps[step] = graph.steps.get(step, 0) + 1
                    digest = _digest(other)
                    if digest not in numbers:
                        if graph.states >= most:
                            raise OverflowError(f"there are more than {most} states")
                        numbers[digest] = graph.states
                        graph.after.append([])
                        graph.reached_by.append((number, step))
                        following.append((numbers[digest], other))
                    graph.after[number].append(numbers[digest])
            except Violation as violation:
                raise Violation(violation.what, [*graph.path(number), *violation.path]) from violation
        front = following
        graph.depth += bool(front)
    return graph


def _digest(state: State) -> bytes:
    return blake2b(state, digest_size=12).digest()
