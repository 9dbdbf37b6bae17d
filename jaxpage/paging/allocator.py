"""What a scheduler asks of a table: one record of functions for pages, one for each baseline.

The scheduler is written once; the allocator decides when memory is taken. `paged` takes a page as
tokens come and may run out while sequences run; a contiguous one reserves at admission and cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpage.config import EngineConfig
from jaxpage.paging import (
    chains,
    contiguous,
    entering,
    fitting,
    page_table,
    prefix_cache,
    prefix_index,
    status,
    tiers,
)
from jaxpage.paging.chains import ChainOps
from jaxpage.paging.contiguous import ContiguousTable, ReserveFn
from jaxpage.paging.entering import Sequences
from jaxpage.paging.eviction import EVICTION_POLICIES, ScoreFn
from jaxpage.paging.page_table import Appended, PageTable, num_pages_for
from jaxpage.paging.prefix_cache import Found, PrefixCache
from jaxpage.paging.prefix_index import HashFn
from jaxpage.paging.tiers import TierOps

Table = PageTable | PrefixCache | ContiguousTable


class Prompt(NamedTuple):
    """A sequence that is to be admitted, and the memory that it is to have."""

    tokens: jax.Array  # i32[N], of which `num_tokens` are known
    num_tokens: jax.Array  # i32[]
    salt: jax.Array  # i32[], of those who may share with it
    soon: jax.Array  # i32[], tokens that it will have before long
    reserved: jax.Array  # i32[], tokens whose memory it is given if all is given at once


@dataclass(frozen=True)
class Allocator[T]:
    """The verbs of one kind of table, `T`.

    `admit(table, row, prompt, owed)` readies an empty row for a sequence; `owed` pages are promised
    to others. It returns the table and what it found of the sequence's tokens.
    `append(table, counts, max_new_pages)` makes room for tokens, as in `page_table.append`, and
    returns the table and what `page_table.Appended` says.
    `enter(table, sequences, counts)` makes full pages findable for `admit`, in the middle of a step
    of `counts` tokens; `enter_computed(table, sequences, rows)`, between two steps, those of `rows`
    that are to be released; and `settle(table, sequences, rows)` does so at a step's end.
    `fitting(table, order, counts)` says which rows could append `counts` at once if all rows after
    them in `order` gave up their pages: a prefix of the order, `bool[B]`.
    `grows` says whether memory is taken page by page, or all at admission in a power of two pages.
    `reserve(prompt, final, max_len)` is how many tokens' memory a sequence needs at its fullest.
    The host asks it once a request and the answer is data, so that allocators which differ by
    rule and name alone are one to the compiler.
    """

    grows: bool
    create: Callable[[EngineConfig], T]
    admit: Callable[[T, jax.Array, Prompt, jax.Array], tuple[T, Found]]
    append: Callable[..., tuple[T, Appended]]
    fitting: Callable[[T, jax.Array, jax.Array], jax.Array]
    release: Callable[[T, jax.Array], T]
    violations: Callable[[T], jax.Array]
    name: str = field(compare=False)
    reserve: ReserveFn = field(compare=False)
    # (table, source, target, num_tokens), as in `page_table.share`; None where rows cannot share
    share: Callable[[T, jax.Array, jax.Array, jax.Array], T] | None = None
    tier: TierOps | None = None  # None where pages cannot leave for the host
    chains: ChainOps | None = None  # None where no page outlives its sequence
    enter: Callable[[T, Sequences, jax.Array], T] = lambda table, *_: table
    enter_computed: Callable[[T, Sequences, jax.Array], T] = lambda table, *_: table
    settle: Callable[[T, Sequences, jax.Array], T] = lambda table, *_: table

    @property
    def caches(self) -> bool:
        """Whether pages outlive their sequences."""
        return self.chains is not None


def _create(create: Callable, config: EngineConfig):
    return create(config.num_slots, config.pages_per_slot, config.num_pages, config.page_size)


def _create_tiered(create: Callable, config: EngineConfig):
    shape = (config.num_slots, config.pages_per_slot, config.num_pages, config.page_size)
    return create(*shape, config.host_pages, config.transfer_budget or None, config.zero_freed)


def _admit_paged(table: PageTable, row, prompt: Prompt, owed):
    del row
    enough = num_pages_for(prompt.soon, table.page_size) <= table.num_free - owed
    return table, _found_nothing(jnp.where(enough, status.OK, status.OUT_OF_PAGES), table)


def _admit_contiguous(table: ContiguousTable, row, prompt: Prompt, owed):
    del owed
    table, outcome = contiguous.reserve(table, row, prompt.reserved)
    return table, _found_nothing(outcome, table)


def _found_nothing(outcome: jax.Array, table: PageTable | ContiguousTable) -> Found:
    none = jnp.asarray(table.num_pages, jnp.int32)
    return Found(outcome, num_tokens=jnp.asarray(0, jnp.int32), source=none, target=none)


def _admit_cached(
    cache: PrefixCache, row, prompt: Prompt, owed, *, score: ScoreFn, hash_fn: HashFn, whole: bool
):
    return prefix_cache.admit(
        cache,
        row,
        prompt.tokens,
        prompt.num_tokens,
        prompt.salt,
        prompt.soon,
        owed,
        score=score,
        hash_fn=hash_fn,
        whole=whole,
    )


def _append_contiguous(table: ContiguousTable, counts: jax.Array, max_new_pages=None):
    del max_new_pages
    table, row_status = contiguous.append(table, counts)
    nothing = jnp.full_like(counts, table.num_pages)
    return table, Appended(row_status, sources=nothing, targets=nothing)


def _fitting_contiguous(table: ContiguousTable, order: jax.Array, counts: jax.Array) -> jax.Array:
    del order
    return table.lengths + counts <= table.reserved_tokens


PAGED: Allocator[PageTable] = Allocator(
    name="paged",
    grows=True,
    create=partial(_create_tiered, page_table.create),
    admit=_admit_paged,
    append=page_table.append,
    fitting=fitting.fitting,
    release=page_table.release,
    violations=page_table.violations,
    reserve=contiguous.reserve_oracle,
    share=page_table.share,
    tier=tiers.PAGED,
)


def with_prefix_cache(
    score: ScoreFn, hash_fn: HashFn = prefix_index.mix, whole: bool = False
) -> Allocator[PrefixCache]:
    """Paged, with pages kept after their sequences, which leave in the order of `score`.

    With `whole`, a page takes all cached ones before it along: sequences leave as a whole.
    """
    return Allocator(
        name="paged",
        grows=True,
        create=partial(_create_tiered, prefix_cache.create),
        admit=partial(_admit_cached, score=score, hash_fn=hash_fn, whole=whole),
        append=partial(prefix_cache.append, score=score, whole=whole),
        fitting=prefix_cache.fitting,
        release=partial(prefix_cache.release, score=score),
        violations=prefix_cache.violations,
        reserve=contiguous.reserve_oracle,
        share=prefix_cache.share,
        tier=tiers.with_prefix_cache(score, whole),
        chains=ChainOps(
            find=partial(chains.find, hash_fn=hash_fn),
            put_back=partial(chains.put_back, score=score, hash_fn=hash_fn),
        ),
        enter=partial(entering.enter, hash_fn=hash_fn),
        enter_computed=partial(entering.enter_computed, hash_fn=hash_fn),
        settle=partial(entering.settle, hash_fn=hash_fn),
    )


# By eviction policy. Each is one object: what is compiled for it is found again.
CACHED: dict[str, Allocator[PrefixCache]] = {
    name: with_prefix_cache(score) for name, score in EVICTION_POLICIES.items()
}
WHOLE_CACHED: dict[str, Allocator[PrefixCache]] = {
    name: with_prefix_cache(score, whole=True) for name, score in EVICTION_POLICIES.items()
}

ORACLE: Allocator[ContiguousTable] = Allocator(
    name="oracle",
    grows=False,
    create=partial(_create, contiguous.create),
    admit=_admit_contiguous,
    append=_append_contiguous,
    fitting=_fitting_contiguous,
    release=contiguous.release,
    violations=contiguous.violations,
    reserve=contiguous.reserve_oracle,
)

ALLOCATORS: dict[str, Allocator] = {
    allocator.name: allocator
    for allocator in (
        PAGED,
        ORACLE,
        replace(ORACLE, name="pow2", reserve=contiguous.reserve_pow2),
        replace(ORACLE, name="max", reserve=contiguous.reserve_max),
    )
}
