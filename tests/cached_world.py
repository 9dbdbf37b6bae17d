"""A tiny prefix cache with the bytes of its pages, for searches over all event sequences.

The KV of a token depends on all before it, and on the salt: its stand-in is the number of that
prefix, so that a row which reads another's page in its place is seen. What is planned is written
when the step ends (`settle`), as by the executor, and slots that nobody has any use for are wiped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import page_bytes
from flax import struct
from jax import lax
from page_bytes import span

from jaxpage.paging import prefix_index
from jaxpage.paging.allocator import Allocator, with_prefix_cache
from jaxpage.paging.entering import Sequences
from jaxpage.paging.eviction import EVICTION_POLICIES
from jaxpage.paging.prefix_cache import PrefixCache

# (salt, tokens), the sibling that a row may become when it shares, and their common tokens
SEQUENCES = [
    (0, (1, 1, 1, 1, 1, 1), 1, 3),
    (0, (1, 1, 1, 2, 1, 1), 0, 3),
    (1, (1, 1, 1, 1, 1, 1), 2, 6),
    (0, (2, 1, 1, 1, 2, 1), 3, 6),
]
NOBODY = len(SEQUENCES)
ROW_LEN = 6
TOKENS = np.asarray([tokens for _, tokens, _, _ in SEQUENCES], np.int32)
SALTS = np.asarray([salt for salt, _, _, _ in SEQUENCES], np.int32)
SIBLINGS = np.asarray([sibling for _, _, sibling, _ in SEQUENCES], np.int32)
COMMON = np.asarray([common for _, _, _, common in SEQUENCES], np.int32)


def _number_prefixes() -> np.ndarray:
    """A number from 1 for each prefix of each sequence, alike where the prefixes are."""
    numbers: dict[tuple, int] = {}
    return np.asarray(
        [
            [
                numbers.setdefault((salt, tokens[: i + 1]), len(numbers) + 1)
                for i in range(len(tokens))
            ]
            for salt, tokens, _, _ in SEQUENCES
        ],
        np.int32,
    )


PREFIXES = _number_prefixes()


class CachedWorld(struct.PyTreeNode):
    """A cache, the bytes of its pages, the sequences of its rows, and of which kind it is."""

    cache: PrefixCache
    pool: jax.Array  # i32[P, S]
    sequences: jax.Array  # i32[B], NOBODY in empty rows
    computed: jax.Array  # i32[B], tokens before those that this step computes
    is_full: jax.Array  # bool[], rows of this step have been shared: nothing may join it
    policy: jax.Array  # i32[], of EVICTION_POLICIES
    collides: jax.Array  # bool[], all pages have one hash

    @property
    def is_idle(self) -> jax.Array:
        """No step is under way: nothing is planned, and no row waits for its twin."""
        has_twin = jnp.any(self.cache.twins < self.cache.num_pages)
        return jnp.all(self.computed == self.cache.lengths) & ~has_twin

    @property
    def planned(self) -> jax.Array:
        """Tokens of this step, `bool[B, N]`."""
        return span(self.computed, self.cache.lengths, ROW_LEN)

    @property
    def expected(self) -> jax.Array:
        """What rows must read, `i32[B, N]`."""
        return jnp.asarray(PREFIXES).at[self.sequences].get(mode="fill", fill_value=0)

    @property
    def found_by_all(self) -> PrefixCache:
        """The cache as it is when somebody looks for a prefix in it."""
        counts = self.cache.lengths - self.computed
        return self.verbs.enter(self.cache, self.held, counts)

    @property
    def held(self) -> Sequences:
        return Sequences(jnp.asarray(TOKENS), jnp.asarray(SALTS), self.sequences)

    @property
    def executed(self) -> jax.Array:
        """The pool when this step has run."""
        return page_bytes.write(self.pool, self.cache.page_indices, self.planned, self.expected)

    def score(self, usage) -> jax.Array:
        return lax.switch(self.policy, list(EVICTION_POLICIES.values()), usage)

    def hash(self, tokens, positions) -> jax.Array:
        return jnp.where(self.collides, jnp.uint32(0), prefix_index.mix(tokens, positions))

    @property
    def verbs(self) -> Allocator[PrefixCache]:
        return with_prefix_cache(self.score, self.hash)
