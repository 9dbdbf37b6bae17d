"""Where pages are: in the pool of the device, or on the host, under numbers that never change.

A page is a number from 0 to `P + H - 1`. Of these, `P` are always in the pool and `H` on the
host; a page moves by trading places with a free one of the other side. So whatever names a page
(rows, the page after it in the prefix index) goes on naming it wherever it is, and only the plan
that an executor reads speaks of places.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from jaxpage.paging.copies import Copies
from jaxpage.paging.freed import Freed
from jaxpage.paging.in_place import first_read


class HostTier(struct.PyTreeNode):
    """The place of each page, the stack of free pages on the host, and the moves of this step.

    Page `p` is page `places[p]` of the pool if that is less than `P`, and page `places[p] - P` of
    the host if not. An executor carries out `outs` first and `ins` last, so in a step no page
    leaves the pool after one has come back.
    """

    places: jax.Array  # i32[P + H], a permutation
    free_pages: jax.Array  # i32[H], of which the first `num_free` are free; the top last
    num_free: jax.Array  # i32[]
    outs: Copies  # from pages of the pool to pages of the host
    ins: Copies  # from pages of the host to pages of the pool
    freed: Freed  # pages to wipe, of both sides; of no capacity where none is
    budget: int = struct.field(pytree_node=False)  # cached pages that may leave in a step

    @property
    def num_pages(self) -> int:
        """Pages on the host, `H`."""
        return self.free_pages.shape[0]

    @property
    def pool_pages(self) -> int:
        """Pages in the pool, `P`."""
        return self.places.shape[0] - self.num_pages

    def is_hosted(self, pages: jax.Array) -> jax.Array:
        """Which of `pages` are on the host; what is no page is not."""
        if self.num_pages == 0:
            return jnp.zeros(jnp.shape(pages), jnp.bool_)
        return self.places.at[pages].get(mode="fill", fill_value=0) >= self.pool_pages

    def in_pool(self, pages: jax.Array) -> jax.Array:
        """The pages of the pool where `pages` are, `P` for what is no page or on the host."""
        if self.num_pages == 0:
            return pages
        places = self.places.at[pages].get(mode="fill", fill_value=self.pool_pages)
        return jnp.minimum(places, self.pool_pages)


def create(
    pool_pages: int, host_pages: int, budget: int | None = None, zero_freed: bool = False
) -> HostTier:
    """A tier of free pages beside a pool; page `p` is at first in place `p`."""
    most_outs = pool_pages if host_pages > 0 else 0  # each page of the pool is left once a step
    # A place of the pool becomes free once at the most, and one of the host once for each page
    # that comes there.
    most_freed = 2 * pool_pages + host_pages if zero_freed else 0
    return HostTier(
        places=jnp.arange(pool_pages + host_pages, dtype=jnp.int32),
        free_pages=pool_pages + jnp.arange(host_pages - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(host_pages, jnp.int32),
        outs=Copies.none(most_outs, host_pages),
        ins=Copies.none(min(pool_pages, host_pages), pool_pages),
        freed=Freed.none(most_freed),
        budget=pool_pages if budget is None else budget,
    )


def leave(tier: HostTier, page: jax.Array) -> tuple[HostTier, jax.Array]:
    """Moves `page` of the pool to the host, where one must be free; or none, `P + H`.

    Returns the page that it frees, or none, too. That one is in the pool now, and no longer on the
    stack here.
    """
    P, H = tier.pool_pages, tier.num_pages
    is_page = page < P + H
    spare, tier = first_read(tier.free_pages[jnp.maximum(tier.num_free - 1, 0)], tier)
    spare = jnp.where(is_page, spare, P + H)
    places = tier.places.at[jnp.stack([page, spare])].get(mode="fill", fill_value=P + H)
    (source, target), tier = first_read((places[0], places[1]), tier)
    outs = tier.outs.then(source[None], (target - P)[None], H)
    places = tier.places.at[page].set(target, mode="drop").at[spare].set(source, mode="drop")
    num_free = tier.num_free - is_page.astype(jnp.int32)
    return tier.replace(places=places, num_free=num_free, outs=outs), spare


def come_back(tier: HostTier, page: jax.Array, spare: jax.Array) -> HostTier:
    """Moves `page` of the host to where `spare` is in the pool, which is a free page here then."""
    (source, target), tier = first_read((tier.places[page], tier.places[spare]), tier)
    ins = tier.ins.then((source - tier.pool_pages)[None], target[None], tier.pool_pages)
    places = tier.places.at[page].set(target).at[spare].set(source)
    return free(note_freed(tier.replace(places=places, ins=ins), spare[None]), spare[None])


def free(tier: HostTier, pages: jax.Array) -> HostTier:
    """Puts `pages: i32[n]` on the stack, in their order; `P + H` is none."""
    is_page = pages < tier.places.shape[0]
    place = tier.num_free + jnp.cumsum(is_page.astype(jnp.int32)) - 1
    place = jnp.where(is_page, place, tier.num_pages)
    return tier.replace(
        free_pages=tier.free_pages.at[place].set(pages, mode="drop"),
        num_free=tier.num_free + jnp.sum(is_page, dtype=jnp.int32),
    )


def note_freed(tier: HostTier, pages: jax.Array) -> HostTier:
    """Remembers that `pages: i32[n]` are to be wiped; `P + H` is none."""
    return tier.replace(freed=tier.freed.then(pages, tier.places.shape[0]))


def take_freed(tier: HostTier, copied: jax.Array) -> tuple[HostTier, Freed, Freed]:
    """The pages of the pool and those of the host that are to be wiped; the tier has none after.

    Not those of the pool in `copied: i32[n]`, which this step overwrites. Wherever else another
    page came to the place of a freed one, that one has left it.
    """
    freed, P, H = tier.freed, tier.pool_pages, tier.num_pages
    in_pool, on_host = Freed.none(freed.capacity), Freed.none(freed.capacity if H > 0 else 0)

    def sort(turn, lists):
        in_pool, on_host = lists
        place = tier.places[freed.pages[turn]]
        is_copy = jnp.any(copied == place)
        in_pool = in_pool.then(jnp.where(is_copy, P, place)[None], P)
        return in_pool, on_host.then(jnp.where(place < P, H, place - P)[None], H)

    if freed.capacity > 0:
        in_pool, on_host = lax.fori_loop(0, freed.count, sort, (in_pool, on_host))
        tier = tier.replace(freed=freed._replace(count=jnp.asarray(0, jnp.int32)))
    return tier, in_pool, on_host


def without_moves(tier: HostTier) -> HostTier:
    """With all moves made."""
    none = jnp.asarray(0, jnp.int32)
    return tier.replace(outs=tier.outs._replace(count=none), ins=tier.ins._replace(count=none))
