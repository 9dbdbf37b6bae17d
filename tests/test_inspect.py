"""Kernels compiled for cards that are not here: the gates, on a few shapes of different code.

`make inspect` compiles all shapes. The compilers live in an environment of their own, whose Python
`make test` names in INSPECT_PYTHON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.compile_only import sass_operations
from pallas_kernels.common.targets import Limits
from pallas_kernels.inspect import KERNELS
from pallas_kernels.paged_attention import kernel_sm80, kernel_sm90
from pallas_kernels.paged_attention.shapes import SHAPES

ROOT = Path(__file__).parents[1]
# Decode and mixed steps, head dims, dtypes of KV, pages within a block and larger than one.
SUBSET = {
    "paged_attention_sm80": (
        "llama3.1-70b-decode-b32-c2048-p16",
        "smollm2-135m-mixed256-b32-c512-p16",
        "llama3.1-8b-mixed512-b64-c2048-p16-int8",
        "gemma3-12b-mixed512-b32-c4096-p16",
    ),
    "paged_attention_sm90": (
        "llama3.1-70b-decode-b32-c2048-p16",
        "llama3.1-70b-decode-b32-c2048-p128",
        "llama3.1-70b-mixed512-b32-c4096-p16",
        "smollm2-135m-mixed256-b32-c512-p16",
        "gemma3-12b-mixed512-b32-c4096-p16",
        "llama3.1-8b-mixed512-b64-c2048-p16-int8",
        "llama3.1-70b-decode-b64-c4096-p16-float8_e4m3fn",
    ),
    "page_copy_sm90": ("llama3.1-8b-decode-b32-c2048-p16",),
}


def inspect(python: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run(python, "-m", "pallas_kernels.inspect", *flags)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.in_ci("paged_attention_sm90", "page_copy_sm90")
@pytest.mark.skipif("INSPECT_PYTHON" not in os.environ, reason="`make test` installs compilers")
@pytest.mark.parametrize("kernel", SUBSET)
def test_kernels_compile_without_spills_and_use_what_the_card_has(kernel):
    target = KERNELS[kernel].targets[0]
    flags = (f"--kernel={kernel}", f"--target={target}", f"--shape={','.join(SUBSET[kernel])}")
    done = inspect(os.environ["INSPECT_PYTHON"], *flags)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["shape"] for row in rows] == list(SUBSET[kernel])
    for row in rows:
        assert row["failed"] is None and row["refused"] is None
        assert row["spill_bytes"] == row["stack_bytes"] == row["local_memory"] == 0
        assert all(row[name] > 0 for name in KERNELS[kernel].instructions)
        assert row["blocks_per_processor"] >= 1
        shape = SHAPES[row["shape"]]
        page_bytes = shape.num_kv_heads * shape.page_size * shape.head_dim * 2
        is_copy = kernel.startswith("page_copy")
        least_bytes = 2 * shape.num_rows * page_bytes if is_copy else shape.least_bytes()
        assert row["least_bytes"] == least_bytes


@pytest.mark.skipif("INSPECT_PYTHON" not in os.environ, reason="`make test` installs compilers")
def test_moves_copies_and_wipes_are_in_place_on_an_h100_and_its_host():
    script = ROOT / "tests" / "moves_for_h100.py"
    done = run(os.environ["INSPECT_PYTHON"], str(script))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    page_bytes = 2 * 2 * 2 * 16 * 64 * 2  # keys and values of both layers
    assert "2,1009,2,16,64" not in row["copies"]
    # Once, when the script's own pool of the host is handed out at the end.
    assert row["copies"]["2,503,2,16,64"] == 1
    assert row["alias_bytes"] == 1009 * page_bytes
    assert row["temp_bytes"] < 4 * page_bytes


@pytest.mark.parametrize("module", [kernel_sm80, kernel_sm90], ids=["sm80", "sm90"])
def test_no_named_shape_is_refused(module):
    if module is kernel_sm80 and not hasattr(plgpu, "store"):
        pytest.skip("the kernel needs jax >= 0.12, and says so")
    for shape in SHAPES.values():
        arrays = (shape.arguments()[name] for name in ("q", "k_pages", "page_indices"))
        module.check(*arrays, is_ragged=shape.is_ragged)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--shape=llama9",), "--shape=llama9 is in no name"),
        (
            ("--target=a100", "--kernel=paged_attention_sm90"),
            "nothing to compile for --target=a100",
        ),
        (("--shape=mqa",), "pip install 'jaxpage[inspect]'"),
        (("h100",), "unexpected argument 'h100'"),
    ],
    ids=str,
)
def test_what_cannot_be_inspected_is_one_line_with_the_remedy(flags, message):
    done = inspect(sys.executable, *flags)
    assert done.returncode == 1 and done.stdout == ""
    assert message in done.stderr.splitlines()[-1] and done.stderr.startswith("error: ")


def test_operations_are_counted_without_modifiers_guards_and_encodings():
    sass = """
        /*23e0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
   -:-:-:Y:04        /*2480*/  @!P0     LDL.64 R2, [R1+0x8] ;
        /*2490*/         @UP1  UTMALDG.4D [UR8], [UR4] ;   /* 0x000000040a007981 */
    """
    assert sass_operations(sass) == {"HGMMA": 1, "LDL": 1, "UTMALDG": 1}


@pytest.mark.parametrize(
    ("smem_bytes", "registers", "threads", "blocks"),
    [
        (192_512, 232, 256, 1),
        (102_400, 128, 256, 2),
        (1_000, 232, 256, 1),  # 8 warps of 7,424 registers: 59,392 of 65,536
        (1_000, 32, 1024, 2),
        (0, 16, 32, 32),
        (233_000, 32, 256, 0),
    ],
)
def test_thread_blocks_at_once_are_limited_by_the_scarcest(smem_bytes, registers, threads, blocks):
    h100 = Limits(num_processors=132, smem_bytes=233_472, registers=65_536, threads=2_048)
    assert h100.blocks_at_once(smem_bytes, registers, threads) == blocks
