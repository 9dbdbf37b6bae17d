"""The report as HTML: every word of it, from what the scripts left.

Style and script stand in `report_page/` and are put into the page, which loads nothing.
"""

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons import Comparison
from experiments.figure_list import Experiment
from experiments.outcomes import Outcome

PAGE = Path(__file__).parent / "report_page"
MINUS, DASH = "\u2212", "\u2013"


def page(outcomes: Sequence[Outcome], demo: Sequence[dict[str, Any]] = ()) -> str:
    """The whole document."""
    body = "".join(section(outcome) for outcome in outcomes)
    recordings = [each for outcome in outcomes for each in outcome.recordings]
    data = json.dumps([*recordings, *demo], separators=(",", ":")).replace("<", "\\u003c")
    template = (PAGE / "page.html").read_text()
    parts = {
        "STYLE": (PAGE / "style.css").read_text(),
        "SCRIPT": (PAGE / "page_map.js").read_text(),
        "COUNTS": counts(outcomes),
        "CONTENTS": contents(outcomes),
        "SUMMARY": summary(outcomes),
        "SECTIONS": body,
        "DATA": data,
    }
    for name, text in parts.items():
        template = template.replace(f"<!--{name}-->", text)
    return template


def number(value: float) -> str:
    """To three digits or four, as a reader wants it."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    decimals = 0 if size > 2 else 1 if size == 2 else 2 - size
    if value == round(value) and size >= 1:
        decimals = 0
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def with_unit(text: str, unit: str) -> str:
    """A number and its unit, which do not part at the end of a line."""
    return text if not unit else text + "\u00a0" + ("\u00d7" if unit == "x" else unit)


def paper_text(row: Comparison) -> str:
    """What the paper prints, or its text gives."""
    paper, unit = row.paper, row.unit
    if paper is None:
        return DASH
    if not isinstance(paper, tuple):
        return with_unit(f"{paper:,.10g}", unit)
    low, high = paper
    if math.isinf(high):
        return f"from {with_unit(number(low), unit)}"
    if low == 0:
        return f"up to {with_unit(number(high), unit)}"
    return f"{number(low)} to {with_unit(number(high), unit)}"


def difference_text(row: Comparison) -> str:
    """In percent of theirs, with a sign."""
    if row.difference is None or not math.isfinite(row.difference):
        return DASH
    percent = 100 * row.difference
    if row.difference == 0:
        return "0\u00a0%"
    return f"{percent:+.{1 if abs(percent) < 100 else 0}f}\u00a0%".replace("-", MINUS)


def mark(row: Comparison) -> str:
    """Within or outside, where theirs is a range; a number is held against by its difference."""
    if not isinstance(row.paper, tuple):
        return f'<span class="none">{DASH}</span>'
    is_in = row.difference == 0
    word, sign = ("within", "\u25cf") if is_in else ("outside", "\u25b2")
    return f'<span class="{word}"><span aria-hidden="true">{sign}</span> {word}</span>'


def cells(row: Comparison) -> str:
    """All but the first column."""
    ours = with_unit(number(row.ours), row.unit)
    return (
        f'<td class="what">{html.escape(row.what)}</td><td>{paper_text(row)}</td><td>{ours}</td>'
        f"<td>{difference_text(row)}</td><td>{mark(row)}</td>"
    )


def table(rows: Iterable[str], caption: str, theirs: str = "Paper") -> str:
    """A table in a box of its own, in which it can be scrolled."""
    columns = ("What", theirs, "Here", "Difference", "Range")
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(caption)}">'
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"{''.join(rows)}</table></div>"
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    """All comparisons, a group a figure; what failed has a row that says so."""
    groups = []
    for outcome in outcomes:
        experiment = outcome.experiment
        link = f'<a href="#{experiment.name}">{html.escape(experiment.where)}</a>'
        head = (
            f'<tr><th scope="rowgroup" colspan="5">{link} {html.escape(experiment.title)}</th></tr>'
        )
        rows = [cells(row) for row in outcome.comparisons]
        if outcome.error is not None:
            rows = [f'<td colspan="5" class="failed">failed: {html.escape(outcome.error)}</td>']
        elif outcome.last is None and experiment.is_simulated:
            rows = ['<td colspan="5" class="missing">not run</td>']
        if rows:
            body = "".join(f"<tr>{row}</tr>" for row in rows)
            groups.append(f"<tbody>{head}{body}</tbody>")
    return table(groups, "All comparisons")


def counts(outcomes: Sequence[Outcome]) -> str:
    """How much of it went well, in a sentence or two."""
    rows = [row for outcome in outcomes for row in outcome.comparisons]
    ranges = [row for row in rows if isinstance(row.paper, tuple)]
    printed = [row for row in rows if isinstance(row.paper, float | int)]
    near = [row for row in printed if row.difference is not None and abs(row.difference) <= 0.1]
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    shown = [outcome for outcome in outcomes if outcome.last is not None]
    held = sum(row.difference == 0 for row in ranges)
    text = (
        f"{len(shown)} experiments, {len(rows)} comparisons. Met within a tenth: {len(near)} of "
        f"{len(printed)} printed numbers. Within the range that is given: {held} of {len(ranges)}."
    )
    if failed:
        names = ", ".join(outcome.experiment.where for outcome in failed)
        text += f' <strong class="failed">{len(failed)} failed: {html.escape(names)}.</strong>'
    return text


def contents(outcomes: Sequence[Outcome]) -> str:
    """Links to the sections."""
    shown = [each for each in outcomes if each.status != "not run" or each.experiment.is_simulated]
    return "".join(
        f'<li><a href="#{each.experiment.name}">{html.escape(each.experiment.where)}'
        f"<span>{html.escape(each.experiment.title)}</span></a></li>"
        for each in shown
    )


def section(outcome: Outcome) -> str:
    """One figure or claim."""
    experiment = outcome.experiment
    if outcome.status == "not run" and not experiment.is_simulated:
        return ""
    name = experiment.name
    parts = [
        f'<section id="{name}" aria-labelledby="{name}-title"><p class="where">'
        f'{html.escape(experiment.where)}</p><h2 id="{name}-title">'
        f'{html.escape(experiment.title)}</h2><p class="shows">{html.escape(experiment.shows)}</p>'
    ]
    if outcome.error is not None:
        parts.append(failure(outcome))
    elif outcome.last is None:
        parts.append(
            f'<p class="missing">Not run. <code>make figures</code> runs it, and so does '
            f"<code>python -m experiments.figures --only={name}</code>.</p>"
        )
    else:
        if "quick" in outcome.last.get("flags", {}):
            parts.append('<p class="note">Short settings (<code>--quick</code>): rough.</p>')
        if outcome.recordings:
            parts.append((PAGE / "page_map.html").read_text())
        parts += [picture(path, experiment) for path in outcome.pictures]
        if outcome.comparisons:
            rows = [f"<tbody><tr>{cells(row)}</tr></tbody>" for row in outcome.comparisons]
            theirs = experiment.where.split(",")[0] if "Article" in experiment.where else "Paper"
            parts.append(table(rows, f"{experiment.where}: {theirs.lower()} and here", theirs))
        else:
            parts.append(numbers(outcome.last))
    return "".join(parts) + provenance(outcome) + "</section>"


def failure(outcome: Outcome) -> str:
    """What went wrong, and the end of what the script printed."""
    lines = "\n".join(outcome.log.strip().splitlines()[-12:])
    log = f"<details><summary>Its last lines</summary><pre>{html.escape(lines)}</pre></details>"
    return (
        f'<div class="failure" role="note"><strong>This failed.</strong> '
        f"{html.escape(outcome.error or '')}{log if lines else ''}</div>"
    )


def picture(path: Path, experiment: Experiment) -> str:
    """In the page as data; where the window is narrow it scrolls in its box."""
    data, title = base64.b64encode(path.read_bytes()).decode(), html.escape(experiment.title)
    alt = html.escape(experiment.alt) or title
    return (
        f'<figure><div class="scroll picture" tabindex="0" role="region" '
        f'aria-label="{title}, picture"><img alt="{alt}" '
        f'src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{html.escape(experiment.where)}. {title}, as "
        f"<code>experiments.{experiment.name}</code> draws it.</figcaption></figure>"
    )


def numbers(last: dict[str, Any]) -> str:
    """What a script without comparisons says in its last line, as far as it is plain numbers."""
    plain = {
        name: value
        for name, value in last.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    rows = "".join(
        f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{number(value)}</dd>"
        for name, value in plain.items()
    )
    return f'<dl class="numbers">{rows}</dl>' if rows else ""


def provenance(outcome: Outcome) -> str:
    """Where the numbers come from: settings, commit, versions, and the command."""
    last, run = outcome.last or {}, outcome.run
    given = {name: value for name, value in last.get("flags", {}).items() if name != "out"}
    rows = {
        "settings": ", ".join(f"--{name}={value}" for name, value in given.items())
        or ("the script's own" if last else None),
        "lengths": sources(last.get("lengths")),
        "commit": last.get("commit") or run.get("code"),
        "jax": last.get("jax"),
        "device": last.get("device"),
        "took": f"{run['wall_s']:,.0f} s" if "wall_s" in run else None,
    }
    listed = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in rows.items()
        if value
    )
    command = " ".join(run.get("command", ()))
    if command:
        listed += f"<dt>command</dt><dd><code>{html.escape(command)}</code></dd>"
    if not listed:
        return ""
    return f"<details><summary>How it was made</summary><dl>{listed}</dl></details>"


def sources(lengths: Any) -> str | None:
    """Whence lengths are, of one data set or several."""
    if isinstance(lengths, dict):
        return "; ".join(f"{name}: {source}" for name, source in lengths.items())
    return None if lengths is None else str(lengths)
