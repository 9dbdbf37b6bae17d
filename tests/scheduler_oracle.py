"""The scheduler again, in plain Python: a list of sequences, sorted when an order is needed.

Written from the rules and not from the arrays. It shares no code with `jaxpage`; its memory is
that of `paging_oracle`, so pages are compared by number.
"""

from dataclasses import dataclass, field

from paging_oracle import BuddyOracle, PageTableOracle, ceil_div

from jaxpage.paging import status

AHEAD = 64  # requests that a level of priority goes before


@dataclass(frozen=True)
class Ask:
    """What a user wants, and what the pretended executor will give him.

    The `i`-th output is `outputs[i]`; the row fails when it is to draw output `fails_at`.
    """

    prompt: tuple[int, ...]
    outputs: tuple[int, ...]  # one for each output token that it may have
    ignore_eos: bool = False
    fails_at: int | None = None
    gap_steps: int = 0  # after the request before it
    priority: int = 0

    @property
    def final_len(self) -> int:
        return len(self.prompt) + len(self.outputs)

    def answer(self, eos_ids: tuple[int, ...]) -> tuple[list[int], str]:
        """All tokens at the end and the reason of the end, however it is scheduled."""
        tokens = list(self.prompt)
        for i, token in enumerate(self.outputs):
            if i == self.fails_at:
                return tokens, "error"
            tokens.append(token)
            if token in eos_ids and not self.ignore_eos:
                return tokens, "stop"
        return tokens, "length"


@dataclass(eq=False)
class Sequence:
    ask: Ask
    arrival: int
    tokens: list[int]
    phase: str = "waiting"
    slot: int | None = None
    computed: int = 0
    rank: int = 0  # by the policy, when the step began
    reason: str = ""
    num_preemptions: int = 0
    first_step: int = -1
    final_step: int = -1

    @property
    def prompt_len(self) -> int:
        return len(self.ask.prompt)

    @property
    def place(self) -> tuple[int, int]:
        return self.rank, self.arrival


@dataclass
class Planned:
    """By slot, as in `Plan`; no request is None."""

    arrivals: list[int | None]
    counts: list[int]
    samples: list[bool]
    lengths: list[int]
    page_indices: list[list[int]]
    num_preempted: int


class PagedMemory:
    """A page when a token needs it."""

    def __init__(self, shape: tuple[int, int, int, int]):
        self.table = PageTableOracle(*shape)

    def pages(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.table.page_size)

    def admit(self, slot: int, sequence: Sequence, soon: int, owed: int) -> bool:
        return self.pages(soon) <= len(self.table.stack) - owed

    def victims(self, running: list[Sequence], counts: dict[int, int]) -> list[Sequence]:
        """Drops the last of `running` until the pages of all tokens of the rest can be had."""
        kept, free = list(running), len(self.table.stack)

        def needed() -> int:
            ends = [(s, s.computed + counts[s.arrival]) for s in kept]
            return sum(self.pages(end) - self.pages(s.computed) for s, end in ends)

        while needed() > free:
            free += self.pages(kept.pop().computed)
        return running[len(kept) :]


class ReservedMemory:
    """All at admission, by a rule; nothing can run out later."""

    def __init__(self, shape: tuple[int, int, int, int], rule: str):
        self.table = BuddyOracle(*shape)
        self.rule = rule
        self.max_len = shape[1] * shape[3]
        self.page_size = shape[3]

    def pages(self, num_tokens: int) -> int:
        return ceil_div(num_tokens, self.page_size)

    def admit(self, slot: int, sequence: Sequence, soon: int, owed: int) -> bool:
        outputs = sequence.ask.final_len - sequence.prompt_len
        doubled = next(2**i for i in range(32) if 2**i >= outputs)
        tokens = {
            "oracle": sequence.ask.final_len,
            "pow2": min(sequence.prompt_len + doubled, self.max_len),
            "max": self.max_len,
        }[self.rule]
        return self.table.reserve(slot, tokens) == status.OK

    def victims(self, running: list[Sequence], counts: dict[int, int]) -> list[Sequence]:
        return []


def rank_of(policy: str, sequence: Sequence) -> int:
    if policy == "fcfs":
        return 0
    if policy == "shortest_first":
        return sequence.ask.final_len - sequence.computed
    if policy == "priority":
        return sequence.arrival - AHEAD * sequence.ask.priority
    assert policy == "decode_first"
    return 0 if len(sequence.tokens) - sequence.computed <= 1 else 1


@dataclass
class SchedulerOracle:
    """Continuous batching over `memory`, of `budget` tokens a step."""

    num_slots: int
    budget: int
    policy: str
    batch_invariant: bool
    eos_ids: tuple[int, ...]
    memory: PagedMemory | ReservedMemory
    headroom: int = 0  # tokens that each running sequence should still have room for
    sequences: list[Sequence] = field(default_factory=list)  # by arrival
    step: int = 0

    def submit(self, ask: Ask) -> None:
        self.sequences.append(Sequence(ask, len(self.sequences), list(ask.prompt)))

    def in_phase(self, phase: str) -> list[Sequence]:
        """The sequences of a phase, in the policy's order."""
        chosen = [s for s in self.sequences if s.phase == phase]
        return sorted(chosen, key=lambda s: s.place)

    def in_slot(self, slot: int) -> Sequence | None:
        return next((s for s in self.sequences if s.slot == slot), None)

    def plan(self) -> Planned:
        for sequence in self.sequences:
            sequence.rank = rank_of(self.policy, sequence)
        running = self.in_phase("running")
        counts, left = {}, self.budget
        for sequence in running:
            counts[sequence.arrival] = self._share(sequence, left)
            left -= counts[sequence.arrival]

        victims = self.memory.victims(running, counts)
        for victim in victims:
            victim.phase = "preempted"
            victim.num_preemptions += 1
            del counts[victim.arrival]
        self._leave(victims)
        self._take_pages(counts)
        if not victims:
            self._admit(counts, left)
        return self._planned(counts, len(victims))

    def commit(self) -> None:
        """Appends what the executor draws for each sequence whose tokens are all computed."""
        ended = []
        for sequence in self.in_phase("running"):
            ask, num_outputs = sequence.ask, len(sequence.tokens) - sequence.prompt_len
            if not self._samples(sequence):
                continue
            if num_outputs == ask.fails_at:
                sequence.reason = "error"
            else:
                token = ask.outputs[num_outputs]
                sequence.tokens.append(token)
                if num_outputs == 0:
                    sequence.first_step = self.step
                if token in self.eos_ids and not ask.ignore_eos:
                    sequence.reason = "stop"
                elif len(sequence.tokens) == ask.final_len:
                    sequence.reason = "length"
            if sequence.reason:
                sequence.phase = "done"
                sequence.final_step = self.step
                ended.append(sequence)
        self._leave(ended)
        self.step += 1

    def _share(self, sequence: Sequence, left: int) -> int:
        """Tokens of the `left` ones that a sequence takes."""
        if not self.batch_invariant:
            return min(len(sequence.tokens) - sequence.computed, left)
        wanted = 1
        if sequence.computed < sequence.prompt_len:
            chunk = max(self.budget // 2, 1)
            next_start = (sequence.computed // chunk + 1) * chunk
            wanted = min(next_start, sequence.prompt_len) - sequence.computed
        return wanted if wanted <= left else 0

    def _admit(self, counts: dict[int, int], left: int) -> None:
        pages = self.memory.pages
        while line := self.in_phase("preempted") or self.in_phase("waiting"):
            head, empty = line[0], [i for i in range(self.num_slots) if not self.in_slot(i)]
            running = self.in_phase("running")
            owed = sum(pages(self._soon(s)) - pages(s.computed) for s in running)
            count = self._share(head, left)
            if not empty or count == 0:
                return
            if not self.memory.admit(empty[0], head, self._soon(head), owed):
                return
            head.phase, head.slot = "running", empty[0]
            self._take_pages({head.arrival: count})
            counts[head.arrival] = count
            left -= count

    def _soon(self, sequence: Sequence) -> int:
        """Tokens for which a sequence is to find pages although others are admitted."""
        computed_at_end = sequence.ask.final_len - 1
        return max(len(sequence.tokens), min(len(sequence.tokens) + self.headroom, computed_at_end))

    def _take_pages(self, counts: dict[int, int]) -> None:
        by_slot = [self.in_slot(slot) for slot in range(self.num_slots)]
        taken = [counts.get(s.arrival, 0) if s else 0 for s in by_slot]
        assert set(self.memory.table.append(taken)) == {status.OK}
        for sequence, count in zip(by_slot, taken, strict=True):
            if sequence:
                sequence.computed += count

    def _planned(self, counts: dict[int, int], num_preempted: int) -> Planned:
        by_slot = [self.in_slot(slot) for slot in range(self.num_slots)]
        return Planned(
            arrivals=[s.arrival if s else None for s in by_slot],
            counts=[counts[s.arrival] if s else 0 for s in by_slot],
            samples=[s is not None and self._samples(s) for s in by_slot],
            lengths=[s.computed if s else 0 for s in by_slot],
            page_indices=self.memory.table.page_indices(),
            num_preempted=num_preempted,
        )

    def _samples(self, sequence: Sequence) -> bool:
        return sequence.computed == len(sequence.tokens)

    def _leave(self, sequences: list[Sequence]) -> None:
        """Empties their slots; pages go back in the order of the slots."""
        slots = {s.slot for s in sequences}
        self.memory.table.release([slot in slots for slot in range(self.num_slots)])
        for sequence in sequences:
            sequence.slot, sequence.computed = None, 0
