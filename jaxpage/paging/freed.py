"""Pages that became free and still hold what they held, as a list; an executor wipes them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Freed(NamedTuple):
    """The first `count` of `pages`, in the order in which they became free.

    A list for no page has no capacity, and keeps none.
    """

    pages: jax.Array  # i32[n]
    count: jax.Array  # i32[]

    @staticmethod
    def none(capacity: int) -> "Freed":
        return Freed(jnp.zeros((capacity,), jnp.int32), jnp.asarray(0, jnp.int32))

    @property
    def capacity(self) -> int:
        return self.pages.shape[0]

    def then(self, pages: jax.Array, null: int) -> "Freed":
        """With `pages: i32[n]` below `null` at the end."""
        if self.capacity == 0:
            return self
        is_page = pages < null
        place = self.count + jnp.cumsum(is_page.astype(jnp.int32)) - 1
        place = jnp.where(is_page, place, self.capacity)
        return Freed(
            self.pages.at[place].set(pages, mode="drop"),
            self.count + jnp.sum(is_page, dtype=jnp.int32),
        )
