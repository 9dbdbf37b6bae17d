"""Can one tenant learn from the time to a first token what another has asked, and do salts end it?

    python -m experiments.claim_side_channel

In each round a victim sends half of some secret prompts, drawn at random, and an attacker then
tries all of them, once each, since a guess warms the cache for the next. A guess answered sooner
than the attacker's threshold was sent, says the attacker, who sets it between a cold and a warm
prompt of its own. This is done with one salt for both and with a salt for each, guesses of the two
interleaved at random. Real text on the real model. With `--out` a row a guess is written there; the
last line of stdout is a JSON object. About three minutes on two cores. Expected: with one salt the
area under the attacker's ROC curve is 1; with a salt for each it is 1/2, of which the interval says
how much could have been missed. Refuted if the first interval reaches down to 0.95, or if the
second leaves out 1/2 (by chance one time in twenty).
"""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from experiments import common
from jaxpage.checkpoint.load import LoadedModel
from jaxpage.config import EngineConfig, require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request, Result
from jaxpage.sim.workloads import serving_workload

FLAGS = flags.FLAGS

# The tenants of victim and attacker: the engine gives each tenant a salt.
ARMS = {"one_salt": ("all", "all"), "salt_each": ("victim", "attacker")}
OWN_PROMPTS = 8  # of the attacker, for its threshold
RESAMPLES = 4000

Prompt = tuple[int, ...]


class Guess(NamedTuple):
    """One secret tried by the attacker, and what is known of it afterwards."""

    arm: str
    round: int
    secret: int
    was_sent: bool
    first_token_s: float
    cached_tokens: int


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=4)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer(
        "secrets", 32, "How many secrets there are; half are sent in each round.", lower_bound=2
    )
    flags.DEFINE_integer("secret_tokens", 256, "How long a secret is.", lower_bound=2)
    flags.DEFINE_integer("rounds", 8, "How often all is repeated, with new tenants.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Draws what is sent, and the order of guesses.")
    flags.DEFINE_string("out", None, "The JSONL file to write a row a guess to.")


def main(_: list[str]) -> None:
    require(FLAGS.prefix_cache, "--noprefix_cache: nothing leaks without a prefix cache")
    require(
        FLAGS.secret_tokens > FLAGS.page_size,
        f"--secret_tokens={FLAGS.secret_tokens} must be more than --page_size={FLAGS.page_size}: "
        "the cache finds full pages",
    )
    out = common.open_for_writing(FLAGS.out) if FLAGS.out else None
    model = common.load_flagged_model()
    secrets, own = read_secrets(model)
    engine = common.build_engine(model, size(model))
    engine.compile()
    rng = np.random.default_rng(FLAGS.seed)
    threshold_s = calibrate(engine, own)
    guesses = [
        guess for number in range(FLAGS.rounds) for guess in play(engine, secrets, number, rng)
    ]
    provenance = common.provenance()
    if out is not None:
        with out:
            out.writelines(json.dumps(g._asdict() | provenance) + "\n" for g in guesses)
    arms = {arm: summarise([g for g in guesses if g.arm == arm], threshold_s, rng) for arm in ARMS}
    for arm, row in arms.items():
        print(sentence(arm, row))
    common.print_last_line(
        {
            "secret_tokens": FLAGS.secret_tokens,
            "secrets": len(secrets),
            "rounds": FLAGS.rounds,
            "seed": FLAGS.seed,
            "threshold_s": threshold_s,
            "arms": arms,
            **provenance,
        }
    )


def read_secrets(model: LoadedModel) -> tuple[list[Prompt], list[Prompt]]:
    """The secrets, and prompts of the attacker's own: recorded text, cut; no two begin alike."""
    items = serving_workload(common.tokenizer_of(model), 400, 512, 1).items
    text = [token for item in items for token in item.prompt_ids]
    length, wanted = FLAGS.secret_tokens, FLAGS.secrets + OWN_PROMPTS
    cuts = (tuple(text[at : at + length]) for at in range(0, len(text) - length + 1, length))
    prompts = list({cut[: FLAGS.page_size]: cut for cut in cuts}.values())
    require(
        len(prompts) >= wanted,
        f"--secrets={FLAGS.secrets} of --secret_tokens={length}, and {OWN_PROMPTS} more: the "
        f"recorded prompts give only {len(prompts)}: ask for fewer or shorter ones",
    )
    return prompts[: FLAGS.secrets], prompts[FLAGS.secrets : wanted]


def size(model: LoadedModel) -> EngineConfig:
    """A pool that holds all that a round leaves in the cache, so that nothing sent is evicted."""
    pages_each = -(-(FLAGS.secret_tokens + 1) // FLAGS.page_size)
    prompts = 2 * FLAGS.secrets + FLAGS.secrets // 2 + OWN_PROMPTS + FLAGS.num_slots
    return common.config_by_flags(
        model,
        max_seq_len=FLAGS.secret_tokens + 1,
        num_requests=FLAGS.secrets,
        num_pages=prompts * pages_each,
    )


def ask(engine: Engine, prompts: Sequence[Prompt], tenant: str) -> list[Result]:
    """One token for each of `prompts`, which are there at once."""
    requests = [
        Request(str(number), prompt, 1, ignore_eos=True, tenant=tenant)
        for number, prompt in enumerate(prompts)
    ]
    return common.serve_all(engine, requests, steps_per_read=1)[0]


def calibrate(engine: Engine, prompts: Sequence[Prompt]) -> float:
    """The attacker's threshold: midway, as ratios go, between its own cold and warm prompts."""
    times_s = [
        [ask(engine, [prompt], "attacker, alone")[0].first_token_s for _ in range(2)]
        for prompt in prompts
    ]
    cold_s, warm_s = np.median(times_s, axis=0)
    return float(np.sqrt(cold_s * warm_s))


def play(
    engine: Engine, secrets: Sequence[Prompt], number: int, rng: np.random.Generator
) -> list[Guess]:
    """One round of both arms, in tenants of its own."""
    num_sent = len(secrets) // 2
    sent = {arm: set(rng.permutation(len(secrets))[:num_sent].tolist()) for arm in ARMS}
    for arm, (victim, _) in ARMS.items():
        ask(engine, [secrets[secret] for secret in sent[arm]], f"{victim} {number}")
    order = [(arm, secret) for arm in ARMS for secret in range(len(secrets))]
    guesses = []
    for at in rng.permutation(len(order)):
        arm, secret = order[at]
        (result,) = ask(engine, [secrets[secret]], f"{ARMS[arm][1]} {number}")
        was_sent = secret in sent[arm]
        seen = result.first_token_s, result.num_cached_tokens
        guesses.append(Guess(arm, number, secret, was_sent, *seen))
    return guesses


def summarise(
    guesses: Sequence[Guess], threshold_s: float, rng: np.random.Generator
) -> dict[str, float]:
    """How well the times of one arm tell what was sent."""
    times_s = np.array([guess.first_token_s for guess in guesses])
    sent = np.array([guess.was_sent for guess in guesses])
    rounds = np.array([guess.round for guess in guesses])
    found = np.array([guess.cached_tokens > 0 for guess in guesses])
    says_sent = times_s < threshold_s
    low, high = auc_interval(times_s, sent, rng)
    return {
        "guesses": len(guesses),
        "guesses_found_cached": int(np.sum(found)),
        "sent_found_cached": int(np.sum(found & sent)),
        "sent_first_token_s": float(np.median(times_s[sent])),
        "unsent_first_token_s": float(np.median(times_s[~sent])),
        "accuracy": float(np.mean(says_sent == sent)),
        "true_positive_rate": float(np.mean(says_sent[sent])),
        "false_positive_rate": float(np.mean(says_sent[~sent])),
        "auc": auc(times_s, sent),
        "auc_low": low,
        "auc_high": high,
        "p_value": p_value(times_s, sent, rounds, rng),
    }


def auc(times_s: np.ndarray, sent: np.ndarray) -> float:
    """Area under the ROC curve: how often a secret that was sent is answered sooner than another.

    Of all pairs of the two kinds; an equal time counts half.
    """
    return float(np.mean(_sooner(times_s, sent)))


def _sooner(times_s: np.ndarray, sent: np.ndarray) -> np.ndarray:
    """For each pair of sent and unsent 1, 1/2 or 0."""
    difference_s = times_s[sent][:, None] - times_s[~sent]
    return (1 - np.sign(difference_s)) / 2


def auc_interval(
    times_s: np.ndarray, sent: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """The middle 95 % of areas among `RESAMPLES` draws of the guesses, with replacement."""
    pairs = _sooner(times_s, sent)
    counts = [rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) for n in pairs.shape]
    areas = np.sum((counts[0] @ pairs) * counts[1], axis=1) / pairs.size
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)


def p_value(
    times_s: np.ndarray, sent: np.ndarray, rounds: np.ndarray, rng: np.random.Generator
) -> float:
    """How often other secrets of the same rounds, had they been sent, look at least as revealing.

    A permutation test, two-sided, with the draw that was made among the `RESAMPLES`.
    """
    observed = abs(auc(times_s, sent) - 0.5)
    num_extreme = 1
    for _ in range(RESAMPLES - 1):
        other = sent.copy()
        for number in np.unique(rounds):
            other[rounds == number] = rng.permutation(sent[rounds == number])
        num_extreme += abs(auc(times_s, other) - 0.5) >= observed - 1e-12
    return num_extreme / RESAMPLES


def sentence(arm: str, row: dict[str, float]) -> str:
    """An arm for people."""
    sent_ms, unsent_ms = (row[f"{kind}_first_token_s"] * 1e3 for kind in ("sent", "unsent"))
    return (
        f"{arm}: {row['guesses']} guesses, first token of what was sent after {sent_ms:.1f} ms, of "
        f"the rest {unsent_ms:.1f} ms; the attacker is right in {row['accuracy']:.1%}; area under "
        f"its ROC curve {row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f}), "
        f"p = {row['p_value']:.4f}"
    )


if __name__ == "__main__":
    define_flags()
    common.run(main)
