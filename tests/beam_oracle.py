"""Beam search in plain Python, over any function that gives the log probabilities of next tokens.

Written from the description of `generate` in transformers 5: hypotheses in lists, nothing packed.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

# (tokens so far) -> log probability of each next token
LogprobsFn = Callable[[Sequence[int]], Sequence[float]]


class Hypothesis(NamedTuple):
    output: list[int]
    total: float  # log probability
    score: float  # with length penalty


def search(
    prompt: Sequence[int],
    logprobs: LogprobsFn,
    *,
    width: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    length_penalty: float,
    early_stopping: bool | str | None,
) -> tuple[list[Hypothesis], int]:
    """The `width` best sequences, best first, and the output length at which the search was over.

    With `early_stopping` None it goes on as long as there may be sequences.
    """
    beams = [Hypothesis([], 0.0, 0.0)]
    finished: list[Hypothesis] = []
    length = 0
    while length < max_new_tokens:
        length += 1
        children = [
            Hypothesis([*beam.output, token], total, total / length**length_penalty)
            for beam in beams
            for token, logprob in enumerate(logprobs([*prompt, *beam.output]))
            for total in [beam.total + logprob]
        ]
        children.sort(key=lambda child: -child.total)
        children = children[: max(2, 1 + len(eos_ids)) * width]

        def ends(child: Hypothesis) -> bool:
            return child.output[-1] in eos_ids or len(child.output) == max_new_tokens

        finished += [child for child in children[:width] if ends(child)]
        finished = sorted(finished, key=lambda done: -done.score)[:width]
        beams = [child for child in children if child.output[-1] not in eos_ids][:width]
        if len(finished) == width and early_stopping is not None:
            looks_ahead = early_stopping == "never" and length_penalty > 0
            at_best = max_new_tokens if looks_ahead else length
            attainable = beams[0].total / at_best**length_penalty
            if early_stopping is True or attainable <= finished[-1].score:
                break
    return finished, length
