"""The report: what it says of results, and the page in a browser."""

import itertools
import json
import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
from test_plots import write_run

from experiments import outcomes, plots, recorded_pages, report, report_html
from experiments.comparisons import Comparison
from experiments.figure_list import EXPERIMENTS
from experiments.recorded_pages import Frame, Row

ROOT = Path(__file__).parent.parent
FIG02, MAP, THROUGHPUT, FIG13 = (
    next(each for each in EXPERIMENTS if each.name == name)
    for name in (
        "fig02_memory_waste",
        "recorded_pages",
        "claim_throughput",
        "fig13_batched_requests",
    )
)
LAST = {"commit": "abc1234", "jax": "0.12", "device": "cpu", "flags": {"requests": 7}}
SHARES = {"token_states": 21.0, "reservation": 13.3, "internal": 57.3, "external": 8.9}
FIG02_LAST = (
    LAST | {name: SHARES for name in plots.LABELS} | {"lengths": "turns.csv & more", "others": {}}
)


def seen_in(simulation) -> dict:
    """What the page table itself says."""
    table = simulation.scheduler.table
    # Rows without a request are empty, so that it does not matter whose number they get.
    slots = np.minimum(np.asarray(simulation.scheduler.slots), simulation.numbers.shape[0] - 1)
    numbers, entries = np.asarray(simulation.numbers)[slots], np.asarray(table.page_indices)
    return {
        "owners": [
            sorted(numbers[(entries == page).any(axis=1)].tolist())
            for page in range(table.num_pages)
        ],
        "ref_counts": np.asarray(table.table.ref_counts).tolist(),
        "cached": np.flatnonzero(np.asarray(table.is_cached)).tolist(),
        "num_free": int(table.num_free),
    }


@pytest.mark.slow
def test_recorded_owners_are_those_of_the_page_table():
    tables, asked = [], recorded_pages.requests()
    recording = recorded_pages.record("paged", asked, lambda now: tables.append(seen_in(now)))
    text = json.dumps(recording, separators=(",", ":"))
    assert len(text) < 60_000
    leaders, most = [row[0] for row in recording["sequences"]], 0
    frames = list(recorded_pages.frames_of(json.loads(text)))
    assert len(frames) == len(tables) > 100
    for frame, table in zip(frames, tables, strict=True):
        owners = recorded_pages.owners_of(frame, recording["num_pages"])
        assert owners == table["owners"]
        assert [len(sequences) for sequences in owners] == table["ref_counts"]
        assert sorted(frame.cached) == table["cached"]
        free = [not s and p not in frame.cached for p, s in enumerate(owners)]
        assert sum(free) == table["num_free"]
        most = max(most, *(len({leaders[s] for s in sequences}) for sequences in owners))
    # It shows what there is to show: a page of three requests, and all that a step can do.
    assert most > 2
    for what in ("waiting", "preempted", "copied", "found"):
        assert any(step.get(what) for step in recording["steps"]), what


# A request alone; one of two samples, the first of which copies a page to write to it; and one
# that finds the first one's page cached.
FRAMES = (
    Frame({0: Row(0, 6, (0, 1))}, frozenset()),
    Frame({0: Row(0, 8, (0, 1)), 1: Row(1, 6, (2, 3)), 2: Row(2, 6, (2, 3))}, frozenset()),
    Frame({1: Row(1, 7, (2, 4)), 2: Row(2, 7, (2, 3))}, frozenset({0, 1})),
    Frame({0: Row(3, 5, (0, 5)), 1: Row(1, 8, (2, 4)), 2: Row(2, 8, (2, 3))}, frozenset({1})),
)
FIRST_SHOWN, FINAL = 1, 3  # where most is shared, there the map begins
RECORDING = {
    "name": "paged",
    "num_pages": 12,
    "page_size": 4,
    # Of each: its request's first, samples, prompt, final and reserved tokens.
    "sequences": [[0, 1, 6, 9, 9], [1, 2, 6, 9, 9], [1, 2, 6, 9, 9], [3, 1, 5, 6, 6]],
    "steps": [
        recorded_pages.change(before, after) | {"end_s": 0.5 * number}
        for number, (before, after) in enumerate(
            itertools.pairwise((Frame({}, frozenset()), *FRAMES)), start=1
        )
    ],
}


def test_a_recording_gives_back_the_frames_of_which_it_is_made():
    assert tuple(recorded_pages.frames_of(json.loads(json.dumps(RECORDING)))) == FRAMES
    assert recorded_pages.owners_of(FRAMES[1], 12)[:5] == [[0], [0], [1, 2], [1, 2], []]


def png() -> bytes:
    """White, of one pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack("!I", len(data)), struct.pack("!I", zlib.crc32(kind + data))
        return size + kind + data + check

    header = chunk(b"IHDR", struct.pack("!IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(b"\0\xff"))
        + chunk(b"IEND", b"")
    )


def write_result(results: Path, name: str, last: dict | None, **run: str | None) -> Path:
    folder = results / name
    folder.mkdir(parents=True)
    command = ["python", "-m", f"experiments.{name}"]
    told = {"status": "ok", "error": None, "command": command, "code": "abc1234", "wall_s": 61.0}
    (folder / "run.json").write_text(json.dumps(told | run))
    if last is not None:
        (folder / f"{name}.json").write_text(json.dumps(last))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Of one figure that is there, one that failed, one that was not run, and the map."""
    folder = tmp_path_factory.mktemp("report")
    results = folder / "figures"
    (write_result(results, FIG02.name, FIG02_LAST) / "fig02.png").write_bytes(png())
    failed = write_result(results, THROUGHPUT.name, None, error="error: --kv_tokens=<4> is short")
    (failed / "log.txt").write_text("Traceback\nConfigError: --kv_tokens=<4> is short\n")
    maps = write_result(results, MAP.name, LAST | {"finish_s": {}})
    (maps / recorded_pages.FILE).write_text(json.dumps([RECORDING]))
    write_run(folder / "demo" / "max", "max", [[0, 0, 1, 4]] * 2, [(3, 3), (4, 2)])
    experiments = (MAP, FIG02, THROUGHPUT, FIG13)
    return report.write(experiments, results, folder / "page" / "index.html", folder / "demo")


class Resources(HTMLParser):
    """What a page would load, and its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str | None] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: list[str | None] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.loads += [
            value for name, value in attrs if name in ("src", "srcset", "data", "poster")
        ]
        if tag in ("link", "iframe", "object", "embed"):
            self.loads.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "a":
            self.links.append(str(attributes["href"]))
        self.ids += [value for name, value in attrs if name == "id"]


def test_the_page_holds_all_that_it_shows(page):
    text = page.read_text()
    found = Resources(text)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert not re.search(r"url\((?!data:)", text)
    assert all(str(source).startswith("data:image/png;base64,") for source in found.loads)
    assert [image["alt"] for image in found.images] == [FIG02.alt]
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert "<!--" not in text


def test_the_page_says_numbers_differences_and_where_they_come_from(page):
    text = page.read_text().replace("\u00a0", " ")
    # 21.0 for 20.4, and 21.0 for 96.3.
    row = "Max: holds tokens</td><td>20.4 %</td><td>21 %</td><td>+2.9 %</td>"
    assert text.count(row) == 2  # in the summary, and with the figure
    assert "paged: holds tokens</td><td>96.3 %</td><td>21 %</td><td>\u221278.2 %</td>" in text
    for said in (
        "--requests=7",
        "abc1234",
        "turns.csv &amp; more",
        "61 s",
        "python -m experiments.",
    ):
        assert said in text
    assert "Met within a tenth: " in text


def test_failures_and_what_was_not_run_are_said(page):
    text = page.read_text()
    assert "1 failed: Article." in text
    assert text.count("--kv_tokens=&lt;4&gt; is short") == 3  # summary, section, its last lines
    assert f"--only={FIG13.name}" in text and "not run" in text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Comparison("", (1.7, 2.7), 2.0, "x"), ("1.70 to 2.70 X", "2.00 X", "0 %", "within")),
        (Comparison("a", (1.7, 2.7), 1.36), ("1.70 to 2.70", "1.36", "\u221220.0 %", "outside")),
        (Comparison("a", (1.1, np.inf), 3.0), ("from 1.10", "3.00", "0 %", "within")),
        (Comparison("a", (0.0, 5.6), 2.6, "%"), ("up to 5.60 %", "2.60 %", "0 %", "within")),
        (Comparison("a", 337.99, 289.9), ("337.99", "289.9", "\u221214.2 %", "\u2013")),
        (Comparison("", 15700, 15728, "GB"), ("15,700 GB", "15,728 GB", "+0.2 %", "\u2013")),
        (Comparison("a", None, 0.01234), ("\u2013", "0.0123", "\u2013", "\u2013")),
        (Comparison("a", 2.0, float("nan")), ("2", "\u2013", "\u2013", "\u2013")),
    ],
)  # fmt: skip
def test_numbers_are_written_as_a_reader_wants_them(row, words):
    cells = re.findall(r"<td[^>]*>(.*?)</td>", report_html.cells(row))
    plain = [re.sub(r"<[^>]*>", "", cell).replace("\u00a0", " ") for cell in cells]
    plain = [cell.replace("\u00d7", "X") for cell in plain]
    assert (*plain[1:4], plain[4].split()[-1]) == words


def test_results_that_a_script_no_longer_writes_are_an_error_in_the_page(tmp_path):
    folder = write_result(tmp_path, FIG02.name, {"max": {}})
    outcome = outcomes.read_outcome(FIG02, folder)
    assert outcome.status == "failed" and "another form: KeyError" in str(outcome.error)
    (folder / f"{FIG02.name}.json").write_text("{")
    assert "no JSON" in str(outcomes.read_outcome(FIG02, folder).error)


def test_a_run_of_the_demo_is_told_by_its_changes():
    before, after = np.array([5, 5, 5, 5, 5, 5]), np.array([1, 1, 5, 2, 3, 5])
    assert report.runs_of_changes(before, after) == [[0, 2, 1], [3, 1, 2], [4, 1, 3]]
    assert report.runs_of_changes(after, after) == []


def test_every_experiment_is_a_script_with_comparisons_or_a_recording():
    names = [each.name for each in EXPERIMENTS]
    assert len(set(names)) == len(names)
    for each in EXPERIMENTS:
        source = (ROOT / "experiments" / f"{each.name}.py").read_text()
        assert ('"quick"' in source) == ("quick" in each.takes), each.name
        assert ('"out"' in source) == (each.out != "none"), each.name
        if each.is_simulated and each.name != MAP.name:
            assert "def comparison(" in source, each.name


# The page in a browser.

WITH_BROWSER = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))


@pytest.fixture(scope="module")
def window():
    with browser.chromium() as found:
        yield found


@WITH_BROWSER
@pytest.mark.parametrize("is_dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_opens_from_disk_at_any_width(window, page, width, is_dark):
    window.open(page, width, is_dark)
    assert window.complaints() == []
    assert window.requests() == [page.as_uri()]
    assert window.run("document.documentElement.scrollWidth <= window.innerWidth")
    assert window.run("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
    background = window.run("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 64) == is_dark
    # What is wider than the window scrolls in a box that the keyboard reaches.
    wide = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth)"
    assert window.run(f"{wide}.every((e) => e.tabIndex === 0 && e.ariaLabel)")
    assert window.run(f"{wide}.length > 0") == (width == 360)


def shown(window) -> tuple[int, list[str]]:
    """The step that the map shows, from 0, and the owners that it names."""
    step = int(window.text("#map-now").split()[0]) - 1
    return step, window.text("#map-details").splitlines()


@WITH_BROWSER
def test_a_page_shows_its_owners_to_mouse_finger_and_keyboard(window, page):
    window.open(page, 1280)
    side = window.run("document.getElementById('map-canvas').clientWidth") / 24  # pages in a row
    assert "choose it with the arrow keys" in window.text("#map-details")
    window.mouse("#map-canvas", 3.5 * side, 0.5 * side)
    assert shown(window) == (
        FIRST_SHOWN,
        [
            "Page 3 is shared by 2 sequences.",
            *(
                f"request 2, sample {number} of 2: its tokens 4 to 7, 2 of 4 written, "
                "2 reserved and used later"
                for number in (1, 2)
            ),
        ],
    )
    for _ in range(FINAL - FIRST_SHOWN):
        window.click("#map-on")
    window.mouse("#map-canvas", 5.5 * side, 0.5 * side)
    assert shown(window)[1] == [
        "Page 5 is held by one sequence.",
        "request 3: its tokens 4 to 7, 1 of 4 written, 1 reserved and used later, "
        "2 reserved and never used",
    ]
    window.mouse("#map-canvas", side, -20)
    assert "choose it with the arrow keys" in window.text("#map-details")
    for key, words in (
        ("ArrowRight", "Page 1 is cached: nobody holds it"),
        ("ArrowLeft", "Page 0 is held by one sequence.\nrequest 3: its tokens 0 to 3"),
        (",", "Page 0 is cached: nobody holds it"),
        (",", "Page 0 is held by one sequence.\nrequest 1: its tokens 0 to 3"),
    ):
        window.press("#map-canvas", key)
        assert window.text("#map-details").startswith(words)
    assert shown(window)[0] == FINAL - 2
    window.open(page, 360)
    side = window.run("document.getElementById('map-canvas').clientWidth") / 8
    window.tap("#map-canvas", 1.5 * side, 0.5 * side)
    assert "Page 1 is held by one sequence.\nrequest 1: its" in window.text("#map-details")
    window.tap("#map-canvas", 0.5 * side, 1.5 * side)
    assert window.text("#map-details") == "Page 8 is free."
    assert window.complaints() == []


@WITH_BROWSER
def test_the_map_steps_plays_and_shows_other_runs(window, page):
    window.open(page, 1280)
    assert window.text("#map-counts") == (
        "3 sequences running, 0 waiting. 4 pages held, 2 of them shared, 0 cached, 8 free."
    )
    window.press("#map-step", "ArrowRight")
    assert window.text("#map-now") == "3 of 4, 1.50 s"
    window.click("#map-back")
    assert shown(window)[0] == FIRST_SHOWN
    for _ in range(FINAL - FIRST_SHOWN):
        window.click("#map-on")
    assert window.text("#map-now") == "4 of 4, 2.00 s"
    window.click("#map-play")
    assert (window.text("#map-play"), shown(window)[0] < FINAL) == ("Pause", True)  # anew
    window.click("#map-play")
    assert window.text("#map-play") == "Play"
    window.run("document.querySelectorAll('#map-runs input')[1].click()")
    assert window.text("#map-counts").startswith("4 pages held, 1 of them shared")
    window.mouse("#map-canvas", 5, 5)
    assert window.text("#map-details") == "Page 0 is held by one sequence.\nrequest 1"
    assert window.complaints() == []
