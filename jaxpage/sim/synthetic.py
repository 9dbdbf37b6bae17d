"""Traces that are made: conversations of several turns, and prompts with beginnings in common."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from jaxpage.config import require
from jaxpage.sim.lengths import Rounds
from jaxpage.sim.trace import Arrival


class Level(NamedTuple):
    """A level of a tree of prompts: each node of the one above has so many children."""

    num_children: int
    num_tokens: int  # of each node


def dialogues_of(rounds: Rounds, max_tokens: int) -> list[list[tuple[int, int]]]:
    """Tokens that were said and answered, by conversation, in order.

    What no answer follows is said with the turn after it. Each ends before it has more than
    `max_tokens` tokens; without a round it is left out.
    """
    prompts = rounds.histories + rounds.said
    ends = prompts + rounds.answers
    found: dict[int, list[tuple[int, int]]] = {}
    known: dict[int, int] = {}
    for conversation, prompt, end in zip(
        rounds.conversations.tolist(), prompts.tolist(), ends.tolist(), strict=True
    ):
        if end <= max_tokens:
            said = prompt - known.get(conversation, 0)
            found.setdefault(conversation, []).append((said, end - prompt))
            known[conversation] = end
    return list(found.values())


def multi_turn(
    dialogues: Sequence[Sequence[tuple[int, int]]],
    arrival_s: Iterable[float],
    think_s: Iterable[float],
) -> list[Arrival]:
    """A request a turn: prompts are all that was said before, and what is said now.

    Conversation `i` opens at `arrival_s[i]`; every later turn comes one of `think_s` after the
    answer before it is complete.
    """
    pauses, requests = iter(think_s), []
    for dialogue, opens_s in zip(dialogues, arrival_s, strict=True):
        known, before = 0, None
        for said, answer in dialogue:
            due_s = float(opens_s) if before is None else float(next(pauses))
            requests.append(Arrival(due_s, known + said, answer, follows=before))
            known, before = known + said + answer, len(requests) - 1
    return requests


def with_prefixes(
    rng: np.random.Generator, requests: Sequence[Arrival], levels: Sequence[Level], tokens_each: int
) -> list[Arrival]:
    """The requests, each with the tokens of a path through a tree before its prompt.

    A path takes one of a node's children at each level, all alike likely; so two prompts begin
    alike as far as their paths agree. A number of content stands for `tokens_each` tokens.

    Raises:
      ConfigError: a level has no children, or no multiple of `tokens_each` tokens; or a request has
        content of its own, or follows another.
    """
    for level in levels:
        require(
            level.num_children > 0 and level.num_tokens > 0 == level.num_tokens % tokens_each,
            f"{level}: children must be positive, and tokens a multiple of {tokens_each}",
        )
    plain = all(not each.content and each.follows is None for each in requests)
    require(plain, "prefixes go before prompts that have nothing in common yet")
    choices = [rng.integers(level.num_children, size=len(requests)) for level in levels]
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for request, path in zip(requests, zip(*choices, strict=True), strict=True):
        content: list[int] = []
        for depth, level in enumerate(levels):
            for block in range(level.num_tokens // tokens_each):
                node = (*map(int, path[: depth + 1]), -1 - block)
                content.append(numbers.setdefault(node, len(numbers)))
        prompt_len = request.prompt_len + tokens_each * len(content)
        found.append(replace(request, prompt_len=prompt_len, content=tuple(content)))
    return found
