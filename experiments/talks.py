"""People who talk with the engine: each asks, reads the answer, thinks, and asks again."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpage.engine.request import Request, Result
from jaxpage.sim.conversations import Conversation


@dataclass(frozen=True)
class Talk:
    """A conversation in time: it opens, and each later turn follows its thought."""

    conversation: Conversation
    opens_s: float = 0.0
    thinks_s: Sequence[float] = ()  # before each later turn; what is missing takes no time

    @property
    def id(self) -> str:
        return self.conversation.id


class Talks:
    """The requests of several talks, for `Engine.serve(first(), then=...then)`.

    At most `at_once` are open: the others wait at the door, in the order in which they came.
    """

    def __init__(self, talks: Sequence[Talk], at_once: int | None = None):
        in_order = sorted(talks, key=lambda talk: talk.opens_s)
        self._inside, self._outside = in_order[:at_once], []
        if at_once is not None:
            self._outside = in_order[at_once:]
        self._talks = {talk.id: talk for talk in talks}
        self._answers: dict[str, list[list[int]]] = {talk.id: [] for talk in talks}
        self.asked_s: dict[str, float] = {}  # by request, from when its user waits

    def first(self) -> list[Request]:
        """What opens the talks that need not wait."""
        return [self._ask(talk, talk.opens_s, talk.opens_s) for talk in self._inside]

    def then(self, result: Result) -> Request | None:
        """What follows an answer: the next turn, or another talk's first."""
        talk = self._talks[talk_of(result.request)]
        answers = self._answers[talk.id]
        answers.append(result.output_ids)
        if len(answers) < len(talk.conversation.turns):
            thinks_s = talk.thinks_s[len(answers) - 1] if talk.thinks_s else 0.0
            asks_s = result.finish_s + thinks_s
            return self._ask(talk, asks_s, asks_s)
        if not self._outside:
            return None
        other = self._outside.pop(0)
        return self._ask(other, other.opens_s, max(other.opens_s, result.finish_s))

    def num_known(self, request: Request) -> int:
        """Tokens of a request's prompt that the engine has computed before: those of its talk."""
        talk, turn = self._talks[talk_of(request)], int(request.id.rsplit(" ", 1)[1])
        # The last token of an answer is never computed.
        said = len(talk.conversation.turns[turn].said_ids)
        return max(len(request.prompt_ids) - said - 1, 0)

    def _ask(self, talk: Talk, asks_s: float, arrival_s: float) -> Request:
        turn = len(self._answers[talk.id])
        request = Request(
            f"{talk.id} {turn}",
            talk.conversation.prompt(turn, self._answers[talk.id]),
            talk.conversation.turns[turn].max_new_tokens,
            ignore_eos=True,
            arrival_s=arrival_s,
        )
        self.asked_s[request.id] = asks_s
        return request


def talk_of(request: Request) -> str:
    """The talk that a request belongs to."""
    return request.id.rsplit(" ", 1)[0]
