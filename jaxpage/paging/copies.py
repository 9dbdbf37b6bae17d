"""Pages that are to be copied, as a list that the planner writes and an executor reads."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Copies(NamedTuple):
    """Pages to copy, `sources[i]` to `targets[i]` for `i < count`, one after the other.

    The order matters: a page may be copied, leave the cache, and be the target of a later copy.
    """

    sources: jax.Array  # i32[n], pages
    targets: jax.Array  # i32[n], pages
    count: jax.Array  # i32[]

    @staticmethod
    def none(capacity: int, num_pages: int) -> "Copies":
        def nothing() -> jax.Array:  # a buffer each, so that a state with both can be donated
            return jnp.full((capacity,), num_pages, jnp.int32)

        return Copies(nothing(), nothing(), jnp.asarray(0, jnp.int32))

    @property
    def live_targets(self) -> jax.Array:
        """The pages that are overwritten, and -1, `i32[n]`."""
        live = jnp.arange(self.targets.shape[0], dtype=jnp.int32) < self.count
        return jnp.where(live, self.targets, -1)

    def then(self, sources: jax.Array, targets: jax.Array, num_pages: int) -> "Copies":
        """With the pairs of `i32[n]` that are pages, in their order, at the end."""
        is_copy = targets < num_pages
        place = self.count + jnp.cumsum(is_copy.astype(jnp.int32)) - 1
        place = jnp.where(is_copy, place, self.targets.shape[0])
        return Copies(
            self.sources.at[place].set(sources, mode="drop"),
            self.targets.at[place].set(targets, mode="drop"),
            self.count + jnp.sum(is_copy, dtype=jnp.int32),
        )
