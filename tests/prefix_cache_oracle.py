"""The prefix cache again, in plain Python: a dictionary from pages to what is known of them.

It finds prefixes by comparing with every page, and what to evict by sorting. It shares no code and
no representation with the cache under test.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from paging_oracle import PageTableOracle, ceil_div


@dataclass
class Known:
    """A page of the index. `before` is a page, or ("salt", number) at a sequence's start."""

    before: object
    tokens: tuple[int, ...]
    depth: int
    entered: int
    last_used: int
    num_uses: int = 1


SCORES = {
    "lru": lambda known: known.last_used,
    "lfu": lambda known: known.num_uses,
    "fifo": lambda known: known.entered,
    "deepest": lambda known: -known.depth,
}


WHOLE = "whole "  # before a policy: sequences leave as a whole


class PrefixCacheOracle(PageTableOracle):
    """A page table whose full pages are known by their tokens."""

    def __init__(self, shape, policy: str):
        super().__init__(*shape)
        self.whole = policy.startswith(WHOLE)
        self.score = SCORES[policy.removeprefix(WHOLE)]
        self.index: dict[int, Known] = {}
        self.num_indexed = [0] * len(self.rows)
        self.twins: dict[int, int] = {}  # row -> page
        self.clock = 0

    @property
    def cached(self) -> set[int]:
        return {page for page in self.index if self.ref_counts[page] == 0}

    def children(self, before) -> list[int]:
        return [page for page, known in self.index.items() if known.before == before]

    def make_room(self, num_pages: int) -> None:
        while len(self.stack) < num_pages and self.cached:
            leaves = [page for page in self.cached if not self.children(page)]
            known = self.index
            page = min(leaves, key=lambda p: (self.score(known[p]), known[p].last_used, p))
            before = self._evict(page)
            while self.whole and before in self.cached and not self.children(before):
                before = self._evict(before)

    def _evict(self, page: int) -> Any:
        """Frees a leaf; returns what stands before it."""
        self.stack.append(page)
        self.twins = {row: twin for row, twin in self.twins.items() if twin != page}
        return self.index.pop(page).before

    def append(self, counts, max_new_pages: int | None = None) -> list[int]:
        needed = 0
        for pages, length, count in zip(self.rows, self.lengths, counts, strict=True):
            if length + count <= self.pages_per_slot * self.page_size:
                needed += ceil_div(length + int(count), self.page_size) - len(pages)
        self.make_room(needed)
        return super().append(counts, max_new_pages)

    def match(self, tokens, limit: int, salt: int) -> tuple[list[int], int]:
        """Full pages, and how many tokens the newest page after them has in common."""
        size, pages, before = self.page_size, [], ("salt", salt)
        while (len(pages) + 1) * size <= limit:
            want = tuple(tokens[len(pages) * size : (len(pages) + 1) * size])
            found = [p for p in self.children(before) if self.index[p].tokens == want]
            if not found:
                break
            (before,) = found
            pages.append(before)
        return pages, len(pages) * size

    def admit(self, row: int, tokens, salt: int, soon: int, owed: int, partial: int | None):
        """Whether there is room, tokens found, and the copy; `partial` is the page that agrees.

        Which of several pages is the newest is not recorded here, so the caller says it.
        """
        limit, size = len(tokens) - 1, self.page_size
        pages, num_tokens = self.match(tokens, limit, salt)
        woken = [page for page in pages if self.ref_counts[page] == 0]
        available = len(self.stack) + len(self.cached) - len(woken) - owed
        if ceil_div(soon, size) - len(pages) > available:
            return False, 0, None
        for page in pages:
            self._take(page)
        self.rows[row], self.num_indexed[row] = list(pages), len(pages)
        copy = None
        if partial is not None:
            known = self.index[partial]
            assert known.before == pages[-1] and known.entered < self.clock
            rest = tokens[num_tokens:limit]
            agreed = 0
            while agreed < min(len(rest), size) and rest[agreed] == known.tokens[agreed]:
                agreed += 1
            assert agreed > 0
            self.make_room(1)
            copy = (partial, self.stack.pop())
            self.rows[row].append(copy[1])
            self.ref_counts[copy[1]] = 1
            num_tokens += agreed
        self.lengths[row] = num_tokens
        return True, num_tokens, copy

    def enter(self, sequences, salts, computed) -> None:
        """`sequences` are the tokens of each row, of which `computed` are of earlier steps."""
        size, first = self.page_size, {}
        self.twins = {}
        for row, pages in enumerate(self.rows):
            column = self.num_indexed[row]
            if column < self.lengths[row] // size:
                before = pages[column - 1] if column else ("salt", salts[row])
                key = before, tuple(sequences[row][column * size : (column + 1) * size])
                first.setdefault(key, []).append((pages[column], row))
        for (before, tokens), claims in first.items():
            equal = [p for p in self.children(before) if self.index[p].tokens == tokens]
            if not equal:
                page, row = min(claims)
                claims.remove((page, row))
                equal = [page]
                self._enter_row(row, sequences[row], before, computed[row])
            for _, row in claims:
                self.twins[row] = equal[0]

    def settle(self, sequences, salts, leaving) -> None:
        """Ends a step after which rows are `leaving`; other pages are too few for a turn."""
        self.clock += 1

        def wait() -> bool:
            full = [length // self.page_size for length in self.lengths]
            pending = [f > n for f, n in zip(full, self.num_indexed, strict=True)]
            return any(pending[row] for row in np.flatnonzero(leaving))

        while self.twins or wait():
            self.enter(sequences, salts, self.lengths)
            self._take_twins()

    def _take_twins(self) -> None:
        for row, twin in sorted(self.twins.items()):
            column = self.num_indexed[row]
            own = self.rows[row][column]
            self._take(twin)
            self.ref_counts[own] -= 1
            if self.ref_counts[own] == 0:
                self.stack.append(own)
            self.rows[row][column] = twin
            self.num_indexed[row] += 1
        self.twins = {}

    def release(self, mask) -> None:
        for row in np.flatnonzero(mask).tolist():
            for page in self.rows[row]:
                self.ref_counts[page] -= 1
                if self.ref_counts[page] == 0:
                    if page in self.index:
                        self.index[page].last_used = self.clock
                    else:
                        self.stack.append(page)
            self.rows[row], self.lengths[row], self.num_indexed[row] = [], 0, 0
            self.twins.pop(row, None)

    def _take(self, page: int) -> None:
        self.ref_counts[page] += 1
        self.index[page].last_used = self.clock
        self.index[page].num_uses += 1

    def _enter_row(self, row: int, tokens, before, computed: int) -> None:
        size = self.page_size
        for column in range(self.num_indexed[row], self.lengths[row] // size):
            page = self.rows[row][column]
            here = tuple(tokens[column * size : (column + 1) * size])
            step = self.clock - ((column + 1) * size <= computed)
            self.index[page] = Known(before, here, column, step, step)
            before = page
        self.num_indexed[row] = self.lengths[row] // size
