"""The page table and the buddy allocator again, in plain Python: lists, dicts and loops.

They share no code and no representation with the tables under test: the page table is rows of
lists and a list as stack, the buddy allocator a set of free blocks for each order.
"""

import copy
import dataclasses

import numpy as np

from jaxpage.paging import status


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


class PageTableOracle:
    """Pages taken from the end of `stack`; a page goes back there when nobody owns it."""

    def __init__(self, num_slots: int, pages_per_slot: int, num_pages: int, page_size: int):
        self.pages_per_slot = pages_per_slot
        self.num_pages = num_pages
        self.page_size = page_size
        self.rows: list[list[int]] = [[] for _ in range(num_slots)]
        self.lengths = [0] * num_slots
        self.ref_counts = [0] * num_pages
        self.stack = list(reversed(range(num_pages)))

    def append(self, counts, max_new_pages: int | None = None) -> list[int]:
        """Statuses by row; `self.copies` lists (row, source, target) of pages to copy."""
        budget = self.num_pages if max_new_pages is None else max_new_pages
        ran_out = False
        statuses = []
        self.copies: list[tuple[int, int, int]] = []
        for row, count in enumerate(counts):
            pages = self.rows[row]
            length = self.lengths[row] + int(count)
            room = len(pages) * self.page_size - self.lengths[row]
            copies = count > 0 and room > 0 and self.ref_counts[pages[-1]] > 1
            demand = ceil_div(max(int(count) - room, 0), self.page_size) + copies
            if length > self.pages_per_slot * self.page_size:
                statuses.append(status.SLOT_FULL)
            elif demand > 0 and (ran_out or demand > min(budget, len(self.stack))):
                ran_out = True
                statuses.append(status.OUT_OF_PAGES)
            else:
                if copies:
                    source = pages.pop()
                    self.ref_counts[source] -= 1
                    self.copies.append((row, source, self.stack[-1]))
                for _ in range(demand):
                    pages.append(self.stack.pop())
                    self.ref_counts[pages[-1]] = 1
                budget -= demand
                self.lengths[row] = length
                statuses.append(status.OK)
        return statuses

    def fitting(self, order, counts) -> list[bool]:
        """By trying: whether each row, and all before it in `order`, get their tokens alone."""
        fits = [False] * len(self.rows)
        for i, row in enumerate(order):
            trial = copy.deepcopy(self)
            first = list(order[: i + 1])
            trial.release([r not in first for r in range(len(self.rows))])
            statuses = trial.append([counts[r] if r in first else 0 for r in range(len(self.rows))])
            fits[row] = status.OUT_OF_PAGES not in statuses
        return fits

    def share(self, source: int, target: int, num_tokens: int) -> None:
        assert not self.rows[target] and num_tokens <= self.lengths[source]
        self.rows[target] = self.rows[source][: ceil_div(num_tokens, self.page_size)]
        self.lengths[target] = num_tokens
        for page in self.rows[target]:
            self.ref_counts[page] += 1

    def release(self, mask) -> None:
        for row in np.flatnonzero(mask):
            for page in self.rows[row]:
                self.ref_counts[page] -= 1
                if self.ref_counts[page] == 0:
                    self.stack.append(page)
            self.rows[row] = []
            self.lengths[row] = 0

    def page_indices(self) -> list[list[int]]:
        null = self.num_pages
        return [pages + [null] * (self.pages_per_slot - len(pages)) for pages in self.rows]

    def holders(self, page: int) -> list[int]:
        return [row for row, pages in enumerate(self.rows) if page in pages]


@dataclasses.dataclass
class Run:
    start: int
    order: int
    reserved: int
    length: int = 0


class BuddyOracle:
    """`free[order]` holds the first pages of the free blocks of `2 ** order` pages."""

    def __init__(self, num_slots: int, pages_per_slot: int, num_pages: int, page_size: int):
        self.pages_per_slot = pages_per_slot
        self.num_pages = num_pages
        self.page_size = page_size
        self.runs: list[Run | None] = [None] * num_slots
        self.free: list[set[int]] = [set() for _ in range(num_pages.bit_length())]
        start = 0
        for order in reversed(range(num_pages.bit_length())):  # the binary digits of the pool
            if num_pages & (1 << order):
                self.free[order].add(start)
                start += 1 << order

    def reserve(self, row: int, num_tokens: int) -> int:
        assert self.runs[row] is None and num_tokens > 0
        if num_tokens > self.pages_per_slot * self.page_size:
            return status.SLOT_FULL
        order = 0
        while (1 << order) < ceil_div(num_tokens, self.page_size):
            order += 1
        blocks = [(start, at) for at in range(order, len(self.free)) for start in self.free[at]]
        start, size = min(blocks, default=(None, order))
        assert start == self._leftmost_by_scan(1 << order)
        if start is None:
            return status.OUT_OF_PAGES
        self.free[size].remove(start)
        while size > order:  # keep the left half, free the right
            size -= 1
            self.free[size].add(start + (1 << size))
        self.runs[row] = Run(start, order, num_tokens)
        return status.OK

    def append(self, counts) -> list[int]:
        statuses = []
        for run, count in zip(self.runs, counts, strict=True):
            length, reserved = (run.length, run.reserved) if run else (0, 0)
            fits = length + int(count) <= reserved
            statuses.append(status.OK if fits else status.SLOT_FULL)
            if run and fits:
                run.length += int(count)
        return statuses

    def release(self, mask) -> None:
        for row in np.flatnonzero(mask):
            run = self.runs[row]
            self.runs[row] = None
            if run is not None:
                self._free_block(run.start, run.order)

    def _free_block(self, start: int, order: int) -> None:
        buddy = start ^ (1 << order)
        if buddy in self.free[order]:
            self.free[order].remove(buddy)
            self._free_block(min(start, buddy), order + 1)
        else:
            self.free[order].add(start)

    def _leftmost_by_scan(self, size: int) -> int | None:
        """The leftmost aligned run of pages in no run, found without the free lists."""
        taken = {page for pages in self.page_lists() for page in pages}
        for start in range(0, self.num_pages - size + 1, size):
            if taken.isdisjoint(range(start, start + size)):
                return start
        return None

    def page_lists(self) -> list[list[int]]:
        return [
            list(range(run.start, run.start + (1 << run.order))) if run else [] for run in self.runs
        ]

    def page_indices(self) -> list[list[int]]:
        """The runs cut or padded to the slot's pages."""
        null = [self.num_pages] * self.pages_per_slot
        return [(pages + null)[: self.pages_per_slot] for pages in self.page_lists()]

    def num_free(self) -> int:
        return sum(len(starts) << order for order, starts in enumerate(self.free))

    def largest_order(self) -> int:
        """The order of the largest free block; -1 if none is free."""
        return max((order for order, starts in enumerate(self.free) if starts), default=-1)
