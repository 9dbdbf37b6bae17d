"""How do the next tokens of real beams differ, and what do beams save if they are drawn so?

    python -m experiments.measure_branching --out=FILE.jsonl

The simulator has no model: what may follow a beam it draws (`sim.branching`), by three numbers that
are measured here. The requests of `fig15_sharing_savings` are searched with 2, 4 and 6 beams by
the real model; of the widest searches the candidates of each beam are kept, and give the gaps
between their sorted log probabilities, and how far those of two beams of a search agree. Then the
same requests are searched by the simulator, with candidates drawn by these numbers. FILE gets a row
a width: pages saved by sharing, and pages copied a beam and step, of both. About ten minutes on two
cores. Expected: both save the same within a few percent of all pages. Refuted if not.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import common, fig15_sharing_savings
from experiments.fig15_sharing_savings import WIDTHS
from jaxpage.config import EngineConfig, require
from jaxpage.engine.host import Engine
from jaxpage.engine.request import Request
from jaxpage.engine.step import EngineState, Setup, step_and_outcome
from jaxpage.model.placement import serving_params
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.batch import of_slots
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import cost_model, runs
from jaxpage.sim.branching import Branching
from jaxpage.sim.device import DEVICES
from jaxpage.sim.metrics import Steps, columns_of
from jaxpage.sim.shapes import shape_of
from jaxpage.sim.trace import Arrival
from jaxpage.sim.workloads import WorkItem

FLAGS = flags.FLAGS


class Seen(NamedTuple):
    """What may follow each beam, over the steps of some searches: `n` rows."""

    searches: np.ndarray  # i64[n], equal for the beams of one search in one step
    logprobs: np.ndarray  # f64[n, C], best first


class Recorder(Engine):
    """An engine that goes step by step, and keeps what may follow its beams."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: list[Seen] = []

    def advance(self, max_steps: int) -> None:
        if max_steps == 0:  # compiling
            return
        self.state, rows = _step(self.params, self.state, setup=self.setup)
        groups, logprobs = map(np.asarray, rows)
        beams = groups < self.setup.engine.num_requests
        # Another number in each step.
        searches = groups[beams] + self.setup.engine.num_requests * len(self.seen)
        self.seen.append(Seen(searches.astype(np.int64), logprobs[beams].astype(np.float64)))


@partial(jax.jit, static_argnames=("setup",), donate_argnames=("state",))
def _step(params: Any, state: EngineState, *, setup: Setup) -> tuple[EngineState, tuple]:
    """The state after a step, and by slot the search, `R` for none, and its candidates."""
    log = state.log.replace(count=jnp.asarray(0, jnp.int32))
    before = state.scheduler.requests
    state, plan, outcome = step_and_outcome(params, state.replace(log=log), setup)
    assert outcome.candidates is not None
    # Before the first output all beams are one sequence.
    has_output = of_slots(before.num_tokens, plan.requests) > of_slots(
        before.prompt_lens, plan.requests
    )
    groups = jnp.where(
        plan.samples & has_output, of_slots(before.groups, plan.requests), setup.engine.num_requests
    )
    return state, (groups, outcome.candidates.logprobs)


def define_flags() -> None:
    common.define_model_flags()
    common.define_engine_flags(num_slots=24, prefix_cache=False)
    flags.adopt_module_key_flags(common)
    flags.DEFINE_integer("requests", 12, "How many prompts of each workload.", lower_bound=1)
    flags.DEFINE_integer(
        "max_tokens", 256, "The most tokens of a prompt, and the most of an output.", lower_bound=1
    )
    flags.DEFINE_string("out", None, "The JSONL file to write the rows to.", required=True)


def main(_: list[str]) -> None:
    require(FLAGS.num_slots >= WIDTHS[-1], f"--num_slots must be at least {WIDTHS[-1]}")
    with common.open_for_writing(FLAGS.out) as out:
        engine, loads = build()
        real, seen = {}, []
        for name, items in loads.items():
            for width in WIDTHS:
                engine.seen = []
                real[name, width] = search(engine, items, width)
                seen += engine.seen if width == WIDTHS[-1] else []
        found = branching_of(joined(seen))
        rows = []
        for (name, width), steps in real.items():
            drawn = simulate(engine.setup, loads[name], width, found)
            row = {"workload": name, "beams": width} | measured(steps, "")
            rows.append(row | measured(drawn, "simulated_"))
            out.write(json.dumps(rows[-1]) + "\n")
            print(
                f"{name:>8}, {width} beams: {row['saved_percent']:.1f} % of pages saved, "
                f"{rows[-1]['simulated_saved_percent']:.1f} % simulated",
                flush=True,
            )
    numbers = {name: float(jnp.asarray(value)) for name, value in vars(found).items()}
    shape = {"gap_by_rank": gaps_by_rank(joined(seen)), "candidates": len(joined(seen).searches)}
    common.print_last_line({**numbers, **shape, "rows": rows, **common.provenance()})


def build() -> tuple[Recorder, dict[str, list[WorkItem]]]:
    """The engine, and the requests by workload."""
    model = common.load_flagged_model()
    loads = fig15_sharing_savings.workloads(common.tokenizer_of(model))
    config = common.config_by_flags(
        model,
        max_seq_len=2 * FLAGS.max_tokens,
        num_requests=4 * FLAGS.num_slots,
        max_beams=WIDTHS[-1],
    )
    setup = Setup(
        model=model.config,
        engine=config,
        allocator=ALLOCATORS["paged"],
        policy=POLICIES[FLAGS.policy],
        attention=common.attention_named(FLAGS.attention),
    )
    params = serving_params(model.params, FLAGS.dtype)
    return Recorder(params, setup, jnp.dtype(FLAGS.dtype)), loads


def search(engine: Recorder, items: Sequence[WorkItem], width: int) -> Steps:
    """The records of a workload's searches."""
    requests = [
        Request(i.id, i.prompt_ids, i.max_new_tokens, ignore_eos=True, n=width, num_beams=width)
        for i in items
    ]
    _, journal = common.serve_all(engine, requests, steps_per_read=1)
    return columns_of(journal.records)


def simulate(setup: Setup, items: Sequence[WorkItem], width: int, branching: Branching) -> Steps:
    """The same searches with candidates drawn; on what device is all one."""
    config: EngineConfig = setup.engine
    cost = cost_model.create(
        shape_of(setup.model), DEVICES["a100-80gb"], page_size=config.page_size
    )
    arrivals = [
        Arrival(0.0, len(item.prompt_ids), item.max_new_tokens, num_beams=width) for item in items
    ]
    run = runs.run(arrivals, cost, config, setup.allocator, setup.policy, branching=branching)
    return run.steps


def measured(steps: Steps, prefix: str) -> dict[str, float]:
    """What sharing saves, and what forking copies."""
    held, named = np.sum(steps["held_pages"]), np.sum(steps["named_pages"])
    return {
        f"{prefix}saved_percent": float(100 * (1 - held / named)),
        f"{prefix}copies_a_beam_and_step": float(
            np.sum(steps["num_copied"]) / np.sum(steps["num_sampled"])
        ),
    }


def joined(seen: Sequence[Seen]) -> Seen:
    """All in one; no two steps of several runs may be of one number."""
    offsets = np.cumsum([0, *(1 + int(np.max(part.searches, initial=0)) for part in seen)])
    searches = [part.searches + offset for part, offset in zip(seen, offsets, strict=False)]
    return Seen(np.concatenate(searches), np.concatenate([part.logprobs for part in seen]))


def gaps_by_rank(seen: Seen) -> list[float]:
    """The mean of each gap times its rank: by the law all but the first are equal."""
    gaps = seen.logprobs[:, :-1] - seen.logprobs[:, 1:]
    return (np.mean(gaps, axis=0) * np.arange(1, gaps.shape[1] + 1)).tolist()


def branching_of(seen: Seen) -> Branching:
    """What the simulator draws by."""
    first, *others = gaps_by_rank(seen)
    alike = correlation(seen.searches, seen.logprobs[:, 0] - seen.logprobs[:, 1])
    return Branching(
        first_gap=first, gap=float(np.mean(others)), common=float(np.sqrt(max(alike, 0.0)))
    )


def correlation(groups: np.ndarray, values: np.ndarray) -> float:
    """Of two values of a group, over all groups: the intraclass correlation of one-way ANOVA."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.bincount(group, values) / sizes
    num, num_groups = len(values), len(sizes)
    between = np.sum(sizes * (means - np.mean(values)) ** 2) / (num_groups - 1)
    within = np.sum((values - means[group]) ** 2) / (num - num_groups)
    typical = (num - np.sum(sizes**2) / num) / (num_groups - 1)
    return float((between - within) / (between + (typical - 1) * within))


if __name__ == "__main__":
    define_flags()
    common.run(main)
