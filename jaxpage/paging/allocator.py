"""What a scheduler asks of a table: one record of functions for pages, one for each baseline.

The scheduler is written once; the allocator decides when memory is taken. `paged` takes a page as
tokens come and may run out while sequences run; a contiguous one reserves at admission and cannot.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from jaxpage.config import EngineConfig
from jaxpage.paging import contiguous, page_table, status
from jaxpage.paging.contiguous import ContiguousTable, ReserveFn
from jaxpage.paging.page_table import Appended, PageTable, num_pages_for

Table = PageTable | ContiguousTable


@dataclass(frozen=True)
class Allocator[T]:
    """The verbs of one kind of table, `T`.

    `admit(table, row, soon, reserved, owed)` readies an empty row for a sequence that will have
    `soon` tokens before long and is to have memory for `reserved` if it is given at once; `owed`
    pages are promised to others. It returns the table and a status.
    `append(table, counts, max_new_pages)` makes room for tokens, as in `page_table.append`, and
    returns the table and what `page_table.Appended` says.
    `fitting(table, order, counts)` says which rows could append `counts` at once if all rows after
    them in `order` gave up their pages: a prefix of the order, `bool[B]`.
    `grows` says whether memory is taken page by page, or all at admission in a power of two pages.
    `reserve(prompt, final, max_len)` is how many tokens' memory a sequence needs at its fullest.
    The host asks it once a request and the answer is data, so that allocators which differ by
    rule and name alone are one to the compiler.
    """

    grows: bool
    create: Callable[[EngineConfig], T]
    admit: Callable[..., tuple[T, jax.Array]]
    append: Callable[..., tuple[T, Appended]]
    fitting: Callable[[T, jax.Array, jax.Array], jax.Array]
    release: Callable[[T, jax.Array], T]
    violations: Callable[[T], jax.Array]
    name: str = field(compare=False)
    reserve: ReserveFn = field(compare=False)


def _create(create: Callable, config: EngineConfig):
    return create(config.num_slots, config.pages_per_slot, config.num_pages, config.page_size)


def _admit_paged(table: PageTable, row, soon, reserved, owed):
    del row, reserved
    enough = num_pages_for(soon, table.page_size) <= table.num_free - owed
    return table, jnp.where(enough, status.OK, status.OUT_OF_PAGES)


def _admit_contiguous(table: ContiguousTable, row, soon, reserved, owed):
    del soon, owed
    return contiguous.reserve(table, row, reserved)


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
    create=partial(_create, page_table.create),
    admit=_admit_paged,
    append=page_table.append,
    fitting=page_table.fitting,
    release=page_table.release,
    violations=page_table.violations,
    reserve=contiguous.reserve_oracle,
)

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
