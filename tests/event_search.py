"""Events on a tiny world: all sequences of them, each alone or by distinct states, and random ones.

A world is a pytree of arrays, an event a verb with a row of small integers. A verb gives the next
world and the faults that it met on the way; `Universe.check` finds those of the world itself. All
searches are one compiled function, the event, under `vmap`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

World = Any
Path = tuple[int, Sequence[int]]  # which start, and the events from there
Faults = dict[str, jax.Array]  # what is broken, and how often, i32[]


class Verb(NamedTuple):
    """Events of one kind, `arguments: i32[n, k]`; `act(world, arguments[i])` is one of them.

    Where the world does not allow the event, `act` returns the world as it is.
    """

    act: Callable[[World, jax.Array], tuple[World, Faults]]
    arguments: np.ndarray


@dataclass(frozen=True)
class Universe:
    """Worlds to start from (stacked), what can happen in them, and what must never happen.

    `key(world)` is all of a world that its future depends on, `i8[K]`: worlds of one key are one.
    """

    name: str
    kinds: list[str]  # in words, of the worlds to start from
    starts: World
    verbs: dict[str, Verb]
    check: Callable[[World], Faults]
    key: Callable[[World], jax.Array]

    @property
    def num_starts(self) -> int:
        return size_of(self.starts)

    @cached_property
    def events(self) -> list[tuple[int, int]]:
        """Verb, and which of its arguments."""
        numbers = [range(len(verb.arguments)) for verb in self.verbs.values()]
        return [(verb, i) for verb, which in enumerate(numbers) for i in which]

    def spell(self, events: Sequence[int]) -> str:
        verbs = list(self.verbs.items())

        def words(verb: int, argument: int) -> str:
            name, (_, arguments) = verbs[verb]
            return f"{name} {arguments[argument].tolist()}"

        return ", ".join(words(*self.events[event]) for event in events)

    @cached_property
    def act(self) -> Callable[[World, np.ndarray], tuple[World, Faults, np.ndarray]]:
        """Worlds `[n]` and events `i32[n]` -> worlds, faults `[n]`, and keys `[n, K]`."""
        verbs, arguments = jnp.asarray(self.events, jnp.int32).T
        branches = [
            lambda world, i, verb=verb: verb.act(world, jnp.asarray(verb.arguments)[i])
            for verb in self.verbs.values()
        ]

        @jax.jit
        @jax.vmap
        def act(world, event):
            world, met = lax.switch(verbs[event], branches, world, arguments[event])
            return world, met | self.check(world), self.key(world)

        return act


class Report(NamedTuple):
    """What a search went through."""

    universe: str
    depth: int
    num_sequences: int  # of events, that the search stands for
    num_visited: int  # states, one after each event
    num_distinct: int  # of these states
    is_closed: bool = False  # no event leads out of them: longer sequences find nothing new

    def __str__(self) -> str:
        return (
            f"{self.universe}: depth {self.depth}, {self.num_sequences:,} event sequences, "
            f"{self.num_visited:,} states visited, {self.num_distinct:,} distinct"
            + (", and no event leads to another" if self.is_closed else "")
        )


def try_every_sequence(universe: Universe, depth: int) -> Report:
    """All sequences of `depth` events from each start, every one alone, as one `vmap`."""
    every = list(itertools.product(range(len(universe.events)), repeat=depth))
    events = np.tile(np.asarray(every, np.int32), (universe.num_starts, 1))
    return _run(universe, np.repeat(np.arange(universe.num_starts), len(every)), events)


def walk(universe: Universe, num_walks: int, depth: int, seed: int = 0) -> Report:
    """Walks of `depth` random events, the starts in turn, as one `vmap`."""
    shape, num_events = (num_walks, depth), len(universe.events)
    events = jax.random.randint(jax.random.key(seed), shape, 0, num_events, jnp.int32)
    return _run(universe, np.arange(num_walks) % universe.num_starts, np.asarray(events))


def _run(universe: Universe, starts: np.ndarray, events: np.ndarray) -> Report:
    """Does `events: i32[n, d]`, from `starts[n]` of the starts."""
    worlds, seen = take(universe.starts, starts), set()
    for step in range(events.shape[1]):
        worlds, faults, keys = universe.act(worlds, events[:, step])
        raise_if_any(
            universe, faults, lambda i, step=step: (int(starts[i]), events[i, : step + 1].tolist())
        )
        take_new(np.asarray(keys), seen)
    return Report(universe.name, events.shape[1], len(events), events.size, len(seen))


def explore(universe: Universe, depth: int, batch: int) -> Report:
    """All sequences of up to `depth` events, going on once from each distinct state.

    Breadth first: the events of a failure are as few as lead to any.
    """
    num_events, num_visited = len(universe.events), 0
    frontier, seen = universe.starts, set()
    history: list[tuple[np.ndarray, np.ndarray]] = []  # by depth: the states before, the events

    def path(pair: int) -> Path:
        state, event = divmod(pair, num_events)
        events = [event]
        for states, chosen in reversed(history):
            events.append(chosen[state])
            state = states[state]
        return state, events[::-1]

    for _ in range(depth):
        num_pairs = size_of(frontier) * num_events
        num_visited += num_pairs
        found, places = [], []
        for first in range(0, num_pairs, batch):
            pairs = np.minimum(np.arange(first, first + batch), num_pairs - 1)
            worlds, faults, keys = universe.act(
                take(frontier, pairs // num_events), (pairs % num_events).astype(np.int32)
            )
            raise_if_any(universe, faults, lambda i, pairs=pairs: path(int(pairs[i])))
            new = take_new(np.asarray(keys), seen)
            found.append(take(worlds, new))
            places.append(pairs[new])
        frontier = jax.tree.map(lambda *parts: np.concatenate(parts), *found)
        history.append(np.divmod(np.concatenate(places), num_events))
        if size_of(frontier) == 0:
            break
    num_sequences = universe.num_starts * sum(num_events**n for n in range(1, depth + 1))
    is_closed = size_of(frontier) == 0
    return Report(universe.name, len(history), num_sequences, num_visited, len(seen), is_closed)


def size_of(worlds: World) -> int:
    return jax.tree.leaves(worlds)[0].shape[0]


def take(worlds: World, places: np.ndarray) -> World:
    return jax.tree.map(lambda x: np.asarray(x)[places], worlds)


def take_new(keys: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """The places of keys that are not yet `seen`, and now are."""
    text, size = keys.tobytes(), keys.shape[1]
    places = []
    for place in range(len(keys)):
        key = text[place * size : (place + 1) * size]
        if key not in seen:
            seen.add(key)
            places.append(place)
    return np.asarray(places, np.int64)


def raise_if_any(universe: Universe, faults: Faults, path: Callable[[int], Path]) -> None:
    """Fails with the first of the worlds that has a fault, and the `path` to it."""
    counts = {name: np.asarray(count) for name, count in faults.items()}
    broken = np.flatnonzero(np.any([count != 0 for count in counts.values()], axis=0))
    if broken.size:
        place = int(broken[0])
        what = {name: int(count[place]) for name, count in counts.items() if count[place]}
        start, events = path(place)
        words = f"{universe.kinds[start]}: {universe.spell(events)}"
        raise AssertionError(f"{universe.name}: {what} after {words}")
