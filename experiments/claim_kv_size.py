"""How large is the KV cache? The arithmetic of the article, and the paper's Table 1.

    python -m experiments.claim_kv_size

Nothing is simulated and nothing measured: sizes follow from the shapes of models. Seconds.
Expected: 327,680 bytes a token of Llama 3.1 70B, so 1.34 GB for 4,096 of them and 344 GB for 256
such users, more than the 320 GB of four A100s, of which weights take 141; and the slots of Table 1.
Printed values are rounded (336 GB is 256 times 1.3125), and stand beside the exact ones.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import common
from experiments.comparisons import Comparison
from experiments.paper_setups import SETUPS
from jaxpage.sim.device import DEVICES
from jaxpage.sim.shapes import SHAPES, ModelShape

FLAGS = flags.FLAGS

# Table 1: parameters and KV memory in GB, and slots in thousands.
TABLE_1 = {"opt-13b": (26, 12, 15.7), "opt-66b": (132, 21, 9.7), "opt-175b": (346, 264, 60.1)}


def define_flags() -> None:
    flags.DEFINE_enum("model", "llama-3.1-70b", sorted(SHAPES), "Whose KV is counted.")
    flags.DEFINE_integer("users", 256, "How many there are at once.", lower_bound=1)
    flags.DEFINE_integer("tokens", 4096, "How many tokens each holds.", lower_bound=1)
    flags.DEFINE_integer("used_tokens", 300, "How many of them are used.", lower_bound=0)


def main(_: list[str]) -> None:
    shape = SHAPES[FLAGS.model]
    row = sizes(shape, FLAGS.users, FLAGS.tokens, FLAGS.used_tokens)
    table = table_1()
    for line in (*sentences(row), *map(table_sentence, table)):
        print(line)
    common.print_last_line(row | {"table_1": table, **common.provenance()})


def sizes(shape: ModelShape, users: int, tokens: int, used_tokens: int) -> dict:
    """Bytes of KV for users who hold so many tokens each, and of what they stand beside."""
    user_bytes = tokens * shape.kv_bytes_per_token
    weight_bytes = shape.num_params * shape.itemsize
    memory = 4 * DEVICES["a100-80gb"].memory_bytes
    return {
        "model": shape.name,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "kv_bytes_per_user": user_bytes,
        "kv_bytes": users * user_bytes,
        "weight_bytes": weight_bytes,
        "four_a100_bytes": int(memory),
        "fits_on_four_a100": users * user_bytes + weight_bytes <= memory,
        "users_for_kv_over_weights": weight_bytes // user_bytes + 1,
        "wasted_share": 1 - used_tokens / tokens,
    }


def table_1() -> list[dict]:
    """Slots as they follow from the KV memory that is printed, in GiB, beside those printed."""
    return [
        {
            "model": name,
            "kv_bytes_per_token": setup.shape.kv_bytes_per_token,
            "weights_gb": setup.shape.num_params * 2 / 1e9,
            "printed_weights_gb": TABLE_1[name][0],
            "slots": setup.kv_tokens,
            "printed_slots": round(1000 * TABLE_1[name][2]),
            # The range of memory that is printed so: half of the last digit each way.
            "least_slots": int((TABLE_1[name][1] - 0.5) * 2**30) // setup.shape.kv_bytes_per_token,
            "most_slots": int((TABLE_1[name][1] + 0.5) * 2**30) // setup.shape.kv_bytes_per_token,
        }
        for name, setup in SETUPS.items()
    ]


def sentences(row: dict) -> Sequence[str]:
    """What the article says, for people."""
    fits = "fit" if row["fits_on_four_a100"] else "do not fit"
    return (
        f"{row['model']}: {row['kv_bytes_per_token']:,} bytes of KV a token, "
        f"{row['kv_bytes_per_user'] / 1e9:.3f} GB for {FLAGS.tokens} (article: 1.3)",
        f"{FLAGS.users} users: {row['kv_bytes'] / 1e9:.1f} GB, {row['kv_bytes'] / 2**30:.0f} GiB "
        f"(article: 336, which is 256 times 1.3125); with {row['weight_bytes'] / 1e9:.0f} GB of "
        f"weights they {fits} on four A100s of {row['four_a100_bytes'] / 1e9:.0f} GB",
        f"KV takes more than the weights from {row['users_for_kv_over_weights']} users on",
        f"reserved {FLAGS.tokens} and used {FLAGS.used_tokens}: {row['wasted_share']:.1%} wasted "
        "(article: 93 %)",
    )


def table_sentence(row: dict) -> str:
    """A column of Table 1."""
    return (
        f"{row['model']}: {row['weights_gb']:.0f} GB of weights (printed "
        f"{row['printed_weights_gb']}), {row['slots']:,} slots (printed "
        f"{row['printed_slots']:,}; memory as printed is {row['least_slots']:,} to "
        f"{row['most_slots']:,})"
    )


def comparison(last: dict[str, Any]) -> list[Comparison]:
    """The article's sizes, where no flag asked for others, and Table 1."""
    rows = []
    if not last["flags"]:
        user_gb, all_gb = last["kv_bytes_per_user"] / 1e9, last["kv_bytes"] / 1e9
        rows = [
            Comparison("KV of a user of 4,096 tokens", 1.3, user_gb, "GB"),
            Comparison("KV of 256 users", 336.0, all_gb, "GB"),
            Comparison("reserved 4,096, used 300: wasted", 93.0, 100 * last["wasted_share"], "%"),
        ]
    for row in last["table_1"]:
        name = row["model"]
        rows += [
            Comparison(f"{name}: parameters", row["printed_weights_gb"], row["weights_gb"], "GB"),
            Comparison(f"{name}: slots for KV", row["printed_slots"], row["slots"], "tokens"),
        ]
    return rows


if __name__ == "__main__":
    define_flags()
    common.run(main)
