"""The prefix cache against an oracle in plain Python, over random orders of events.

The bytes are modelled too: a pool that holds the token itself in place of its KV. Whatever happens,
each row reads back its own tokens.
"""

import functools
from collections import Counter
from collections.abc import Sequence

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from prefix_cache_oracle import WHOLE, PrefixCacheOracle

from jaxpage.paging import chains, entering, prefix_cache, prefix_index, priority_queue, status
from jaxpage.paging.eviction import EVICTION_POLICIES, Usage

# slots, pages a slot, pages, page size
SHAPES = {"pages of 2": (4, 4, 9, 2), "pages of 1": (3, 5, 8, 1), "a roomy pool": (4, 4, 16, 3)}
SOUND = [0] * 10
NO_TOKEN = -1


def colliding(tokens, positions):
    """A hash by which all pages are alike."""
    del positions
    return jnp.zeros_like(tokens, jnp.uint32)


def same_tokens(tokens, positions):
    """A hash that does not see the order."""
    del positions
    return prefix_index.mix(tokens, jnp.zeros_like(tokens))


HASHES = {"mix": prefix_index.mix, "colliding": colliding, "orderless": same_tokens}
every_policy = pytest.mark.parametrize("policy", [*EVICTION_POLICIES, WHOLE + "lru", WHOLE + "lfu"])


@functools.cache
def verbs(policy: str, hash_name: str):
    score, hash_fn = EVICTION_POLICIES[policy.removeprefix(WHOLE)], HASHES[hash_name]
    partial, whole = functools.partial, policy.startswith(WHOLE)
    return {
        "admit": jax.jit(partial(prefix_cache.admit, score=score, hash_fn=hash_fn, whole=whole)),
        "append": jax.jit(partial(prefix_cache.append, score=score, whole=whole)),
        "enter": jax.jit(partial(entering.enter, hash_fn=hash_fn)),
        "settle": jax.jit(partial(entering.settle, hash_fn=hash_fn)),
        "release": jax.jit(partial(prefix_cache.release, score=score)),
        "violations": jax.jit(prefix_cache.violations),
    }


class Cached:
    """A cache, its rows' sequences, and a pool that holds tokens."""

    def __init__(self, shape, policy: str, hash_name: str = "mix"):
        num_slots, pages_per_slot, num_pages, page_size = shape
        self.shape, self.verbs = shape, verbs(policy, hash_name)
        self.cache = prefix_cache.create(*shape)
        self.pool = np.full((num_pages, page_size), NO_TOKEN)
        self.sequences = np.zeros((num_slots, pages_per_slot * page_size), np.int32)
        self.salts = np.zeros((num_slots,), np.int32)
        self.computed = np.zeros((num_slots,), np.int32)  # tokens of earlier steps
        self.met: Counter = Counter()
        self.pending: list = []  # (page, offset, token) to be written when the step runs

    @property
    def lengths(self) -> list[int]:
        return self.cache.lengths.tolist()

    def admit(self, row: int, tokens, salt: int, soon: int, owed: int) -> prefix_cache.Found:
        padded = np.zeros((self.sequences.shape[1],), np.int32)
        padded[: len(tokens)] = tokens
        i32 = np.int32
        self.cache, found = self.verbs["admit"](
            self.cache, i32(row), padded, i32(len(tokens)), i32(salt), i32(soon), i32(owed)
        )
        if found.status == status.OK:
            self.sequences[row], self.salts[row] = padded, salt
            self.computed[row] = found.num_tokens
            self.met["tokens found"] += int(found.num_tokens)
        if found.target < self.shape[2]:
            # What the page holds before the step: nothing written in this step is there yet.
            self.pool[int(found.target)] = self.pool[int(found.source)]
            self.met["copies"] += 1
        return found

    def append(self, counts) -> None:
        before = self.lengths
        self.cache, appended = self.verbs["append"](self.cache, np.asarray(counts, np.int32))
        assert appended.status.tolist() == [status.OK] * len(counts)
        indices = np.asarray(self.cache.page_indices)
        for row, (start, count) in enumerate(zip(before, counts, strict=True)):
            for position in range(start, start + count):
                page, offset = divmod(position, self.shape[3])
                self.pending.append((indices[row, page], offset, self.sequences[row, position]))

    def _sequences(self) -> entering.Sequences:
        rows = jnp.arange(self.shape[0], dtype=jnp.int32)
        return entering.Sequences(jnp.asarray(self.sequences), jnp.asarray(self.salts), rows)

    def enter(self) -> None:
        counts = np.asarray(self.lengths, np.int32) - self.computed
        self.cache = self.verbs["enter"](self.cache, self._sequences(), counts)
        self.met["twins"] += int(np.sum(np.asarray(self.cache.twins) < self.shape[2]))

    def settle(self, leaving: Sequence[bool] | bool = False) -> None:
        """The step runs: all KV is written, and then rows may give up pages for their twins."""
        for page, offset, token in self.pending:
            self.pool[page, offset] = token
        self.pending = []
        rows = np.broadcast_to(np.asarray(leaving), self.shape[:1])
        self.cache = self.verbs["settle"](self.cache, self._sequences(), rows)
        self.computed = np.asarray(self.lengths, np.int32)

    def release(self, mask) -> None:
        self.cache = self.verbs["release"](self.cache, np.asarray(mask))

    def check(self) -> None:
        assert self.verbs["violations"](self.cache).tolist() == SOUND

    def check_bytes(self) -> None:
        """After a step: each row reads its own tokens."""
        indices = np.asarray(self.cache.page_indices)
        for row, length in enumerate(self.lengths):
            read = self.pool[indices[row, : -(-length // self.shape[3])]].reshape(-1)[:length]
            assert read.tolist() == self.sequences[row, :length].tolist()


def assert_same(cached: Cached, oracle: PrefixCacheOracle) -> None:
    cache = cached.cache
    assert cache.page_indices.tolist() == oracle.page_indices()
    assert cache.lengths.tolist() == oracle.lengths
    assert cache.table.ref_counts.tolist() == oracle.ref_counts
    assert cache.table.free_pages[: int(cache.num_free)].tolist() == oracle.stack
    assert cache.num_indexed.tolist() == oracle.num_indexed
    assert int(cache.num_cached) == len(oracle.cached)
    assert np.flatnonzero(cache.is_cached).tolist() == sorted(oracle.cached)
    null = cached.shape[2]
    twins = {row: twin for row, twin in enumerate(cache.twins.tolist()) if twin != null}
    assert twins == oracle.twins
    index = jax.tree.map(np.asarray, cache.index)
    for page, known in oracle.index.items():
        assert index.tokens[page].tolist() == list(known.tokens)
        seen = dict(zip(Usage._fields, index.usages[page].tolist(), strict=True))
        assert seen == {name: getattr(known, name) for name in Usage._fields}


def steps(shape, max_size: int):
    """Lists of steps: (rows that leave, prompts to admit, tokens of each row)."""
    num_slots, pages_per_slot, _, page_size = shape
    longest = pages_per_slot * page_size
    token = st.sampled_from((1, 1, 1, 2))
    prompt = st.tuples(st.lists(token, min_size=2, max_size=longest), st.integers(0, 1))
    step = st.tuples(
        st.lists(st.booleans(), min_size=num_slots, max_size=num_slots),
        st.lists(prompt, max_size=2),
        st.lists(st.integers(0, 2 * page_size), min_size=num_slots, max_size=num_slots),
    )
    return st.lists(step, max_size=max_size)


def run(cached: Cached, script, oracle: PrefixCacheOracle | None = None) -> None:
    """Runs steps as the scheduler does: rows go on, others find what is full, then all settle."""
    num_slots, _, num_pages, page_size = cached.shape
    known = [0] * num_slots  # tokens of each row's sequence

    def compare():
        cached.check()
        if oracle is not None:
            assert_same(cached, oracle)

    def of_rows():
        return cached.sequences.tolist(), cached.salts.tolist()

    def go_on(wanted):
        counts, room = [], int(cached.cache.num_free + cached.cache.num_cached)
        for row, length in enumerate(cached.lengths):
            count = min(wanted[row], known[row] - length)
            need = -(-(length + count) // page_size) - -(-length // page_size)
            counts.append(count if need <= room else 0)
            room -= need if need <= room else 0
        cached.append(counts)
        if oracle is not None:
            assert set(oracle.append(counts)) == {status.OK}
        compare()

    for leaving, prompts, wanted in script:
        go_on(wanted)
        for tokens, salt in prompts:
            empty = [row for row in range(num_slots) if known[row] == 0]
            if not empty:
                break
            cached.enter()
            if oracle is not None:
                oracle.enter(*of_rows(), cached.computed.tolist())
            compare()
            found = cached.admit(empty[0], tokens, salt, len(tokens), owed=0)
            if oracle is not None:
                partial = int(found.source) if found.source < num_pages else None
                fits, num_tokens, copy = oracle.admit(
                    empty[0], tokens, salt, len(tokens), 0, partial
                )
                assert (found.status == status.OK) == fits and found.num_tokens == num_tokens
                assert copy in (None, (int(found.source), int(found.target)))
            assert 0 <= found.num_tokens < len(tokens)
            if found.status == status.OK:
                known[empty[0]] = len(tokens)
            go_on([wanted[0] if row == empty[0] else 0 for row in range(num_slots)])
        cached.settle(leaving)
        if oracle is not None:
            oracle.settle(*of_rows(), leaving)
        compare()
        cached.check_bytes()
        cached.release(leaving)
        if oracle is not None:
            oracle.release(leaving)
        known = [0 if gone else n for gone, n in zip(leaving, known, strict=True)]
        compare()


def check_random(shape, policy: str, hash_name: str, max_examples: int, max_size: int) -> Counter:
    met: Counter = Counter()

    @settings(max_examples=max_examples, deadline=None)
    @given(script=steps(shape, max_size))
    def check(script):
        cached = Cached(shape, policy, hash_name)
        oracle = PrefixCacheOracle(shape, policy) if hash_name == "mix" else None
        run(cached, script, oracle)
        met.update(cached.met)
        cached.release([True] * shape[0])
        cached.check()
        assert int(cached.cache.num_free + cached.cache.num_cached) == shape[2]

    check()
    return met


# Each shape once, and with the long walk each policy.
@pytest.mark.in_ci("a roomy pool-whole lfu", "pages of 1-deepest", "pages of 2-lfu")
@every_policy
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_random_steps_leave_the_cache_as_the_oracle_and_sound_after_each(shape, policy):
    met = check_random(shape, policy, "mix", max_examples=30, max_size=8)
    assert met["tokens found"] > 0


def random_script(shape, seed: int, num_steps: int) -> list:
    """Steps in which prompts repeat, rows leave late, and some get no tokens."""
    rng = np.random.default_rng(seed)
    num_slots, pages_per_slot, _, page_size = shape

    def prompt():
        tokens = rng.choice([1, 2], rng.integers(2, pages_per_slot * page_size), p=[0.9, 0.1])
        return tokens.tolist(), int(rng.random() < 0.2)

    return [
        (
            rng.random(num_slots) < 0.2,
            [prompt() for _ in range(rng.integers(0, 3))],
            rng.integers(0, page_size + 2, num_slots).tolist(),
        )
        for _ in range(num_steps)
    ]


@pytest.mark.in_ci("lru", "fifo", "whole lru")
@every_policy
def test_a_long_walk_finds_tokens_copies_pages_and_meets_twins(policy):
    cached = Cached(SHAPES["pages of 2"], policy)
    oracle = PrefixCacheOracle(SHAPES["pages of 2"], policy)
    run(cached, random_script(cached.shape, seed=0, num_steps=150), oracle)
    assert min(cached.met[event] for event in ("tokens found", "copies", "twins")) > 3, cached.met


@pytest.mark.parametrize("hash_name", ["colliding", "orderless"])
def test_a_hash_that_collides_costs_hits_and_never_a_wrong_token(hash_name):
    met = check_random(SHAPES["pages of 2"], "lru", hash_name, max_examples=60, max_size=8)
    assert met["tokens found"] > 0


@pytest.mark.slow
@every_policy
@pytest.mark.parametrize("hash_name", HASHES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_long_random_steps_leave_the_cache_as_the_oracle(shape, hash_name, policy):
    check_random(shape, policy, hash_name, max_examples=600, max_size=25)


def test_part_of_a_full_page_is_not_shared_since_its_last_owner_would_write_to_it():
    cached = Cached(SHAPES["a roomy pool"], "lru")
    tokens = [1, 2, 3, 4, 5, 6]  # two full pages
    assert cached.admit(0, tokens, 0, soon=6, owed=0).status == status.OK
    cached.append([6, 0, 0, 0])
    cached.enter()
    cached.settle()
    i32 = np.int32
    cached.cache = jax.jit(prefix_cache.share)(cached.cache, i32(0), i32(1), i32(5))
    assert cached.lengths[:2] == [6, 3]
    cached.release(np.arange(4) == 0)
    cached.sequences[1, :6] = [1, 2, 3, 4, 9, 9]
    cached.append([0, 3, 0, 0])
    cached.enter()
    cached.settle()
    cached.check()
    cached.check_bytes()
    assert cached.admit(2, [*tokens, 7], 0, soon=7, owed=0).num_tokens == 6
    cached.check_bytes()  # nothing has been written over them


def test_pages_enter_in_bulk_before_a_lookup_and_before_their_row_leaves():
    many = entering.ENTRIES
    cached = Cached((2, 2 * many, 4 * many, 1), "lru")
    tokens = list(range(2 * many))
    assert cached.admit(0, tokens, 0, soon=many, owed=0).status == status.OK

    def go_on(count: int, leaving=(False, False)) -> int:
        cached.append([count, 0])
        cached.settle(leaving)
        cached.check()
        return int(cached.cache.num_indexed[0])

    assert go_on(many - 1) == 0
    assert go_on(1) == many
    assert go_on(1) == many
    cached.enter()
    assert cached.cache.num_indexed.tolist() == [many + 1, 0]
    assert go_on(3, leaving=(False, True)) == many + 1
    assert go_on(1, leaving=(True, False)) == many + 5
    cached.release([True, False])
    assert cached.admit(1, tokens, 0, soon=many, owed=0).num_tokens == many + 5


def test_a_page_that_two_rows_hold_enters_once_and_both_go_on_from_it():
    cached = Cached(SHAPES["pages of 2"], "lru")
    assert cached.admit(0, [1, 2, 3, 4, 5, 6], 0, soon=6, owed=0).status == status.OK
    cached.append([4, 0, 0, 0])
    cached.settle()
    cached.cache = jax.jit(prefix_cache.share)(cached.cache, np.int32(0), np.int32(1), np.int32(4))
    cached.sequences[1], cached.computed = cached.sequences[0], np.asarray(cached.lengths, np.int32)
    cached.enter()
    assert cached.cache.num_indexed.tolist() == [2, 0, 0, 0]
    cached.settle()
    cached.check()
    cached.check_bytes()
    assert cached.cache.num_indexed.tolist() == [2, 2, 0, 0]


def test_two_rows_that_hold_a_page_both_take_an_equal_one_that_came_from_elsewhere():
    cached = Cached(SHAPES["pages of 2"], "lru")
    assert cached.admit(0, [1, 2, 3, 4, 5, 6], 0, soon=6, owed=0).status == status.OK
    cached.append([2, 0, 0, 0])
    cached.settle()
    i32 = np.int32
    cached.cache = jax.jit(prefix_cache.share)(cached.cache, i32(0), i32(1), i32(2))
    cached.sequences[1], cached.computed = cached.sequences[0], np.asarray(cached.lengths, i32)
    put_back = functools.partial(chains.put_back, score=EVICTION_POLICIES["lru"], most=1)
    cached.cache, (page,) = jax.jit(functools.partial(put_back, hash_fn=prefix_index.mix))(
        cached.cache, cached.sequences[0], i32(0), i32(1), i32(0)
    )
    cached.pool[page] = [1, 2]
    cached.settle(leaving=[False, True, False, False])
    cached.check()
    cached.check_bytes()
    assert cached.cache.page_indices[:2, 0].tolist() == [int(page)] * 2
    assert cached.cache.num_indexed.tolist() == [1, 1, 0, 0]


def test_an_upper_level_of_the_queue_that_is_wrong_is_counted():
    cache = prefix_cache.create(1, 8, num_pages=300, page_size=4)  # three levels
    assert prefix_cache.violations(cache).tolist() == SOUND
    for level in (1, 2):
        levels = list(cache.queue.levels)
        levels[level] = levels[level].at[0, 0, 0, 0].set(3)  # an item that no block has
        broken = cache.replace(queue=cache.queue.replace(levels=tuple(levels)))
        assert sum(prefix_cache.violations(broken).tolist()) > 0
    for part in range(3):
        queue = priority_queue.put(cache.queue, 0, jnp.int32(17), jnp.array([5, 1], jnp.int32))
        wrong = queue.levels[1].at[part, 0, 0, 1].add(1)
        wrong = queue.replace(levels=(queue.levels[0], wrong, *queue.levels[2:]))
        right, wrong = (prefix_cache.violations(cache.replace(queue=q)) for q in (queue, wrong))
        assert int(jnp.sum(wrong)) > int(jnp.sum(right)) == 1  # nothing is cached, so none is due
