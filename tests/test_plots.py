"""Pictures from small made-up result files: they are drawn, and say what the files say."""

import json

import numpy as np
import pytest

from experiments import plots
from jaxpage.config import ConfigError

PAGE_SIZE = 4
SHARES = (0.5, 0.2, 0.2, 0.1)


def write_run(folder, allocator: str, owners, requests, time_s=None) -> None:
    """A run whose request `i` has `requests[i] = (prompt tokens, output tokens)`."""
    folder.mkdir(parents=True)
    owners = np.array(owners, np.int16)
    times = time_s or [0.5 * (i + 1) for i in range(len(owners))]
    shares = dict(zip(plots.WASTE_CATEGORIES, SHARES, strict=True))
    summary = {
        "allocator": allocator,
        "status": "ok",
        "page_size": PAGE_SIZE,
        "mean_batched_requests": 2.5,
        **{f"{name}_share": share for name, share in shares.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    steps = [{"time_s": t, "num_running": 1 + i % 2} for i, t in enumerate(times)]
    rows = [
        {"id": f"r{i}", "prompt_tokens": prompt, "output_tokens": output}
        for i, (prompt, output) in enumerate(requests)
    ]
    for name, lines in (("steps", steps), ("requests", rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    ids = np.array([row["id"] for row in rows])
    np.savez_compressed(folder / "owners.npz", owners=owners, request_ids=ids, nobody=len(ids))


def write_demo(folder) -> None:
    for allocator in plots.LABELS:
        owners = [[0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 2, 2]]
        write_run(folder / allocator, allocator, owners, [(3, 3), (4, 2)])


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_a_demo_folder_gives_three_pictures(tmp_path):
    write_demo(tmp_path)
    paths = plots.draw_all(tmp_path)
    assert [path.name for path in paths] == ["waste.png", "batch_size.png", "page_map.png"]
    assert all(is_png(path) for path in paths)


def test_a_failed_run_is_left_out_of_the_pictures(tmp_path):
    write_demo(tmp_path)
    failed = {"allocator": "max", "status": "failed: MemoryError: no room"}
    (tmp_path / "max" / "summary.json").write_text(json.dumps(failed))
    (tmp_path / "pow2" / "summary.json").unlink()
    assert [run.allocator for run in plots.read_runs(tmp_path)] == ["oracle", "paged"]
    assert all(is_png(path) for path in plots.draw_all(tmp_path))


def test_a_folder_without_a_run_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        plots.draw_all(tmp_path)
    with pytest.raises(ConfigError, match=r"summary\.json is missing"):
        plots.read_run(tmp_path)


def test_the_map_of_one_run_needs_no_others(tmp_path):
    write_run(tmp_path / "run", "paged", [[0, 1], [0, 2]], [(3, 3), (4, 2)])
    plots.page_map([plots.read_run(tmp_path / "run")], tmp_path / "map.png")
    assert is_png(tmp_path / "map.png")


def test_the_papers_shares_add_up_to_the_whole():
    for shares in plots.PAPER_SHARES.values():
        assert sum(shares) == pytest.approx(100, abs=0.2)  # they are printed with one decimal


def test_a_reserved_page_darkens_when_its_tokens_come_and_never_beyond_the_last(tmp_path):
    # Four pages of 4 tokens for 6 prompt tokens and 4 of output: lengths 6, 7, 8, 9 by step.
    held = [[0, 0, 0, 0]] * 4
    write_run(tmp_path / "run", "max", [*held, [1, 1, 1, 1]], [(6, 4)])
    strengths = plots.page_strengths(plots.read_run(tmp_path / "run"))
    w, later, never = plots.WRITTEN, plots.LATER, plots.NEVER
    expected = [[w, w, later, never]] * 3 + [[w, w, w, never]]
    np.testing.assert_array_equal(strengths[:4], np.array(expected, np.float32))


def test_a_page_of_a_paged_run_is_never_pale(tmp_path):
    write_run(tmp_path / "run", "paged", [[0, 1], [0, 0]], [(3, 3)])
    assert (plots.page_strengths(plots.read_run(tmp_path / "run")) == plots.WRITTEN).all()
