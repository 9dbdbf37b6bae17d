"""Every figure and claim of the report, a row each: adding an experiment is one row here."""

from dataclasses import dataclass
from typing import Literal

LENGTHS = ("turns", "alpaca")


@dataclass(frozen=True)
class Experiment:
    """A script of `experiments`, and what a reader is told of it.

    `takes` are the flags of the runner that it has too. Its results go to the folder, or the file,
    of `--out`, or it has no `--out`.
    """

    name: str  # of the module, and of its results
    where: str  # in the paper, or the article
    title: str
    shows: str  # one sentence
    alt: str  # of its picture, for who cannot see it
    minutes: float  # on two cores
    takes: tuple[str, ...] = ("quick",)
    out: Literal["folder", "file", "none"] = "folder"
    is_simulated: bool = True  # others run the real model, and only if they are named


EXPERIMENTS: tuple[Experiment, ...] = (
    Experiment(
        "recorded_pages",
        "Page map",
        "Who holds which page",
        "The page table of a small simulated run, step by step: each square is a page, coloured by "
        "the request that holds it and filled as far as tokens are written.",
        "",
        1,
        takes=(),
    ),
    Experiment(
        "fig01_memory_layout",
        "Fig 1",
        "Memory of a card, and batch",
        "Where an A100's memory goes, and how far each system can raise its batch in what is left.",
        "Left, a bar of the card's memory by parameters, KV cache and the rest. Right, memory and "
        "output tokens a second by batch size for Max, Oracle and paged.",
        2,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig02_memory_waste",
        "Fig 2",
        "Where the KV memory goes",
        "The share of KV memory that holds tokens, and the three ways in which the rest is wasted.",
        "Stacked bars of KV memory for four allocators, the paper's beside ours.",
        2,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig11_lengths",
        "Fig 11",
        "Lengths of requests",
        "How long prompts and outputs are, by both ways of pairing ShareGPT's turns.",
        "Histograms of prompt and output tokens of ShareGPT by two pairing rules, and of Alpaca.",
        1,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig12_single_sequence",
        "Fig 12",
        "Rates that are sustained, one sequence a request",
        "Normalized latency by request rate, for three models, two data sets and five systems.",
        "Curves of normalized latency by requests a second, a panel a model and data set.",
        6,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig13_batched_requests",
        "Fig 13",
        "Requests batched",
        "How many requests run at once under each allocator at the paper's rates.",
        "Bars of the mean number of batched requests, the paper's beside ours, for two data sets.",
        5,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig14_parallel_and_beam",
        "Fig 14",
        "Several samples, or beams, a request",
        "What rate is sustained with several samples or beams of a prompt, which pages share.",
        "Curves of normalized latency by requests a second, a panel for 2, 4 and 6 sequences.",
        3,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig15_sharing_savings",
        "Fig 15",
        "Pages saved by sharing",
        "The share of pages that samples and beams of one prompt save by sharing them.",
        "",
        9,
        takes=(),
        out="file",
        is_simulated=False,
    ),
    Experiment(
        "fig16_shared_prefix",
        "Fig 16",
        "A prefix that all prompts share",
        "What rate is sustained when all requests begin with the same examples.",
        "Curves of normalized latency by requests a second for prefixes of one and five examples.",
        5,
    ),
    Experiment(
        "fig17_chatbot",
        "Fig 17",
        "A chatbot",
        "What rate is sustained when prompts are the end of a conversation.",
        "Curves of normalized latency by requests a second for paged and three ways to reserve.",
        5,
        takes=("turns", "quick"),
    ),
    Experiment(
        "fig18_ablation",
        "Fig 18b",
        "Page size",
        "Latency at a fixed rate, by the number of tokens in a page.",
        "Normalized latency by tokens a page, for ShareGPT and Alpaca.",
        3,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "fig19_swap_recompute",
        "Fig 19",
        "Computing again, or moving",
        "What a preempted sequence costs, by page size: computed again, or moved out and back.",
        "Milliseconds by tokens a page, and normalized latency by tokens a page for both.",
        10,
        takes=(*LENGTHS, "quick"),
    ),
    Experiment(
        "claim_kv_size",
        "Article, Table 1",
        "The size of the KV cache",
        "The article's arithmetic, and the slots of the paper's Table 1, from the models' shapes.",
        "",
        0.2,
        takes=(),
        out="none",
    ),
    Experiment(
        "claim_fragmentation",
        "Article",
        "Reserve 4,096 tokens, use 300",
        "What each allocator wastes of a pool where answers are short, and what page size adds.",
        "Stacked bars of KV memory for Max, Pow2, Oracle and paged; and a curve of the waste in "
        "last pages by page size.",
        3,
    ),
    Experiment(
        "claim_throughput",
        "Article",
        "Two to four times the throughput",
        "Output tokens a second of Llama 3.1 70B on four A100s, by pages over contiguous memory.",
        "",
        1,
        takes=(*LENGTHS, "quick"),
        out="file",
    ),
    Experiment(
        "knee",
        "Beyond the paper",
        "Where latency turns up",
        "Time to the first token and latency by output token of OPT-13B on one A100-80GB with "
        "66,144 tokens of KV, by request rate.",
        "Two curves over requests a second, flat up to the knee and steep behind it.",
        1,
        takes=("turns", "quick"),
    ),
    Experiment(
        "claim_when",
        "Article",
        "When to use pages, and when to skip them",
        "The article's six cases; it gives no numbers, so that use is read as more than 1.1 times "
        "the throughput, and skip as within a tenth of 1.",
        "",
        4,
    ),
    Experiment(
        "claim_sharing",
        "Article",
        "One system prompt for many users",
        "Time to the first token and bytes of KV where many prompts begin alike, measured.",
        "",
        2,
        takes=(),
        out="none",
        is_simulated=False,
    ),
    Experiment(
        "claim_eviction",
        "Article",
        "Pages that move alone",
        "What preemption moves and computes again, by its modes, measured.",
        "",
        6,
        takes=(),
        out="file",
        is_simulated=False,
    ),
    Experiment(
        "claim_lunch",
        "Article",
        "Fine at eight, twice the latency by lunch",
        "Latency over a working day whose conversations fill the memory, measured.",
        "",
        8,
        takes=(),
        out="file",
        is_simulated=False,
    ),
    Experiment(
        "bench_prefix",
        "Beyond the paper",
        "The prefix cache in conversations",
        "How much of later prompts is found, what that saves, and what the index costs, measured.",
        "",
        6,
        takes=(),
        out="file",
        is_simulated=False,
    ),
)
