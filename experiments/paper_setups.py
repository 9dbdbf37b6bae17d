"""The settings of the paper's evaluation (Kwon et al. 2023, section 6.1, table 1), and lengths."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import recorded_turns
from jaxpage.config import EngineConfig, require
from jaxpage.paging.allocator import ALLOCATORS
from jaxpage.scheduling.policies import POLICIES
from jaxpage.sim import arrivals, cost_model, runs
from jaxpage.sim import lengths as length_sets
from jaxpage.sim.cost_model import NO_OVERHEAD, CostModel, Overhead
from jaxpage.sim.device import DEVICES, DeviceSpec
from jaxpage.sim.kernels import Efficiency
from jaxpage.sim.lengths import Lengths
from jaxpage.sim.runs import Run
from jaxpage.sim.shapes import SHAPES, ModelShape
from jaxpage.sim.trace import Arrival

FLAGS = flags.FLAGS

GIB = 2**30
MAX_TOKENS = 2048  # of a sequence: OPT's longest
PAGE_SIZE = 16
PAGE_SIZES = tuple(2**power for power in range(9))  # of Figs 18b and 19
# Fig 11: mean prompt and output tokens of OPT's tokenizer.
PRINTED_MEANS = {"sharegpt": (161.31, 337.99), "alpaca": (19.31, 58.45)}


@dataclass(frozen=True)
class Setup:
    """A row of table 1."""

    shape: ModelShape
    device: DeviceSpec
    num_devices: int
    kv_bytes: int  # as printed, in GiB: 12, 21 and 264

    @property
    def kv_tokens(self) -> int:
        """Table 1's "max # KV cache slots"."""
        return self.kv_bytes // self.shape.kv_bytes_per_token

    def config(
        self,
        allocator: str,
        num_slots: int = 256,
        static_batches: bool = False,
        page_size: int = PAGE_SIZE,
        headroom_pages: int = 1,
        preemption: str = "recompute",
        max_beams: int = 1,
    ) -> EngineConfig:
        """An engine with this memory; a step computes up to 2,560 tokens, vLLM's limit then.

        Where pages go to the host, as many find room there as in the pool, as in the paper
        (section 4.5).
        """
        num_pages = self.kv_tokens // page_size
        return EngineConfig(
            num_slots=num_slots,
            num_pages=num_pages,
            page_size=page_size,
            pages_per_slot=MAX_TOKENS // page_size,
            num_requests=2 * num_slots,
            token_buckets=(2560,),
            headroom_pages=headroom_pages * ALLOCATORS[allocator].grows,
            preemption=preemption,
            max_beams=max_beams,
            host_pages=0 if preemption == "recompute" else num_pages,
            static_batches=static_batches,
            log_steps=2048,
        )

    def cost(
        self,
        overhead: Overhead = NO_OVERHEAD,
        page_size: int = PAGE_SIZE,
        efficiencies: dict[str, Efficiency] | None = None,
        copied_share: float = 0.0,
    ) -> CostModel:
        """With the efficiencies that A100s measured, where no others are given."""
        return cost_model.create(
            self.shape,
            self.device,
            num_devices=self.num_devices,
            page_size=page_size,
            overhead=overhead,
            efficiencies=efficiencies,
            copied_share=copied_share,
        )

    def run(
        self,
        allocator: str,
        requests: Sequence[Arrival],
        *,
        overhead: Overhead = NO_OVERHEAD,
        efficiencies: dict[str, Efficiency] | None = None,
        copied_share: float = 0.0,
        until_s: float = np.inf,
        **engine: Any,
    ) -> tuple[Run, EngineConfig]:
        """Simulates them, first come, first served; `engine` is what `config` takes.

        Max gets one slot more than it can fill: others would only take time to simulate, and
        without that one no step would count as short of memory (`metrics.steps_short_of_memory`).
        """
        config = self.config(allocator, **engine)
        if allocator == "max":
            widest = max(request.num_samples for request in requests)
            enough = max(self.kv_tokens // MAX_TOKENS, widest) + 1
            config = replace(config, num_slots=min(config.num_slots, enough))
        cost = self.cost(overhead, config.page_size, efficiencies, copied_share)
        memory = ALLOCATORS[allocator]
        run = runs.run(requests, cost, config, memory, POLICIES["fcfs"], until_s=until_s)
        return run, config


SETUPS: dict[str, Setup] = {
    "opt-13b": Setup(SHAPES["opt-13b"], DEVICES["a100-40gb"], 1, 12 * GIB),
    "opt-66b": Setup(SHAPES["opt-66b"], DEVICES["a100-40gb"], 4, 21 * GIB),
    "opt-175b": Setup(SHAPES["opt-175b"], DEVICES["a100-80gb"], 8, 264 * GIB),
}


def define_length_flags() -> None:
    recorded_turns.define_flags()
    flags.adopt_module_key_flags(recorded_turns)
    flags.DEFINE_enum(
        "pairs", "first", length_sets.PAIRING_RULES, "Which turns of --turns are requests."
    )
    flags.DEFINE_string(
        "alpaca",
        None,
        "Alpaca's lengths: CSV with gpt2_instruction_input and gpt2_output. By default drawn.",
    )
    flags.DEFINE_bool("rescale", True, "Bring lengths to the means that the paper prints (Fig 11).")
    flags.DEFINE_integer("seed", 0, "The seed of what is drawn.")


def other_lengths(dataset: str) -> Iterator[tuple[str, Lengths]]:
    """Those by the other pairing rule, and of other means, than the flags say; with their names.

    None where lengths are drawn.
    """
    if recorded_lengths(dataset)[0] is None:
        return
    rules = length_sets.PAIRING_RULES if dataset == "sharegpt" else (FLAGS.pairs,)
    for rule, rescale in itertools.product(rules, (True, False)):
        if (rule, rescale) != (FLAGS.pairs, FLAGS.rescale):
            name = f"{rule} pairs, " * (dataset == "sharegpt")
            name += "rescaled" if rescale else "as counted"
            yield name, lengths_by_flags(dataset, rule, rescale)[0]


def lengths_by_flags(
    dataset: str, pairs: str | None = None, rescale: bool | None = None
) -> tuple[Lengths, str]:
    """Those of `sharegpt` or `alpaca` up to `MAX_TOKENS` in all, and a sentence on their source.

    ShareGPT's turns are paired by the rule `pairs`, by default that of the flag, as is `rescale`.
    """
    found, source = recorded_lengths(dataset, pairs)
    means = PRINTED_MEANS[dataset]
    if found is None:
        rng = np.random.default_rng(FLAGS.seed)
        return length_sets.within(length_sets.drawn(rng, 20_000, *means), MAX_TOKENS), (
            f"{source}: log-normal about the means of {dataset} that the paper prints"
        )
    found = length_sets.within(found, MAX_TOKENS)
    require(len(found.prompts) > 0, f"{source}: no request of up to {MAX_TOKENS} tokens")
    if FLAGS.rescale if rescale is None else rescale:
        found = length_sets.within(length_sets.rescaled(found, *means), MAX_TOKENS)
        source += ", in proportion to the printed means"
    return found, source


def recorded_lengths(dataset: str, pairs: str | None = None) -> tuple[Lengths | None, str]:
    """Of all requests of `sharegpt` or `alpaca`, and their source; None where none are at hand."""
    if dataset == "sharegpt":
        turns, source = recorded_turns.turns_by_flags()
        if turns is None:
            return None, source
        rule = pairs or FLAGS.pairs
        return length_sets.pairs_of(turns, rule), f"{source} and BOS, {rule} pairs"
    if FLAGS.alpaca is None:
        return None, "drawn"
    path = Path(FLAGS.alpaca)
    found = length_sets.read_lengths(path, "gpt2_instruction_input", "gpt2_output", bos=1)
    return found, f"{path.name}, GPT-2 tokens and BOS"


def poisson_requests(dataset: str, num: int, rate: float) -> tuple[list[Arrival], str]:
    """`num` Poisson arrivals, `rate` a second, with lengths by lot; and where those are from."""
    lengths, source = lengths_by_flags(dataset)
    return poisson_of(lengths, num, rate), source


def poisson_of(lengths: Lengths, num: int, rate: float) -> list[Arrival]:
    """`num` Poisson arrivals, `rate` a second, with `lengths` by lot."""
    rng = np.random.default_rng(FLAGS.seed)
    chosen = lengths.take(rng.choice(len(lengths.prompts), num))
    return length_sets.requests_of(chosen, arrivals.poisson(rng, num, rate))


def define_page_sizes_flag() -> None:
    flags.DEFINE_list("page_sizes", list(map(str, PAGE_SIZES)), "Tokens a page, to compare.")


def page_sizes_by_flag() -> tuple[int, ...]:
    sizes = tuple(int(size) if size.isdigit() else 0 for size in FLAGS.page_sizes)
    require(
        all(size > 0 and MAX_TOKENS % size == 0 for size in sizes),
        f"--page_sizes={','.join(FLAGS.page_sizes)}: each must divide {MAX_TOKENS}",
    )
    return sizes
