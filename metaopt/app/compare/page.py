"""One HTML file that needs nothing else: tables, learning curves by row, and what each row has learned."""

from __future__ import annotations

import base64
import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from metaopt.app.compare.main import numeric, tables, written
from metaopt.app.compare.reading import Run, read_records
from metaopt.app.compare.rows import Number, Row, in_order, rows_of
from metaopt.saving.text import printable

FEW, MOST, MOST_BYTES = (
    30,
    20,
    2**28,
)  # entries that are bars, steps that are dots; metrics, parameters; a file above this is not read
MARGINS = {"left": 0.15, "right": 0.98, "bottom": 0.19, "top": 0.95}  # a layout engine draws everything twice
NUMBER = ' class="number"'
SORT = """
for (const head of document.querySelectorAll("th")) head.onclick = () => {
  const body = head.closest("table").tBodies[0], i = head.cellIndex;
  const sign = (head.dataset.down = head.dataset.down ? "" : "1") ? 1 : -1;
  const key = row => { const v = row.cells[i].dataset.v; return v === "" ? null : isNaN(v) ? v : +v; };
  const order = (a, b) => a === b ? 0 : a === null ? 1 : b === null ? -1
    : typeof a != typeof b ? (typeof a == "number" ? -1 : 1) : a < b ? -sign : sign;
  [...body.rows].sort((a, b) => order(key(a), key(b))).forEach(row => body.append(row));
};
"""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif;
  color: #222; background: #fff; overflow-wrap: anywhere; max-width: 77rem; margin: auto; padding: 1em; }
h1 { font-size: 1.5rem; margin: .5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; } p { margin: .3rem 0 .8rem; color: #555; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; text-align: left; }
th { cursor: pointer; border-bottom: 2px solid #999; line-height: 1.25; vertical-align: bottom; }
th:hover { background: #f2f2f2; } .number { text-align: right; }
.status { color: #b5432a; } .complete { color: #1d7a6f; } .running { color: #457b9d; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--least)), 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 14px; }
img { width: 100%; height: auto; display: block; }
ul { padding: 0; list-style: none; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.key span { display: inline-block; width: 1.6em; border-top: 3px; margin-right: .5em; vertical-align: middle; }
summary { cursor: pointer; font-weight: 600; margin: 2rem 0 .5rem; }
"""
# Nothing is loaded from elsewhere, and no script runs but the one above, whatever the strings of a run may hold.
DIGEST = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{DIGEST}'"
COLOURS = [f"#{c}" for c in ("1f77b4", "e76f00", "2a9d5c", "c8323c", "8c62b8", "8a5a44", "d067b0", "6e6e6e", "a3a300")]
LOOKS = [{"color": c, "linestyle": dash} for dash in ("solid", "dashed") for c in COLOURS]  # of each row that is drawn


def page(rows: Sequence[Row], base: Row | None) -> str:
    """Return the page on these rows, and their differences from `base`."""
    runs, drawn = [run for row in rows for run in row.runs], rows[: len(LOOKS)]
    more = f"<p>Drawn are the first {len(LOOKS)} of {len(rows)} rows.</p>" if len(rows) > len(LOOKS) else ""
    body = (
        f"<h1>Runs, compared</h1><p>{len(runs)} runs in {len(rows)} rows. A click on a column's name sorts by it.</p>"
    )
    body += _tables(rows, base)
    body += _section("Learning curves", more, *_curves(drawn)) + _section("What was learned", more, *_weights(drawn))
    if len(runs) > len(rows):
        body += f"<details><summary>Single runs</summary>{_tables(rows_of(runs, each=True), None)}</details>"
    broken = [f"<li><b>{_text(run.name)}</b>: {run.status}: {_text(run.error, 1000)}</li>" for run in runs if run.error]
    body += _section("What went wrong", "", "".join(broken) and f"<ul>{''.join(broken)}</ul>")
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>metaopt-compare</title><style>{STYLE}</style>"
    body += f"<script>{SORT}</script>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _text(value: Any, most: int = 100) -> str:
    return escape(printable(value, most))


def _section(title: str, note: str, *parts: str) -> str:
    return f"<h2>{title}</h2>{note}{''.join(parts)}" if any(parts) else ""


def _tables(rows: Sequence[Row], base: Row | None) -> str:
    found = ""
    for title, shown, columns, cells in tables(rows, base):
        is_right, head, body = numeric(cells), "", ""
        for column, right in zip(columns, is_right, strict=True):
            name = _text(column).replace("/", "/<br>").replace(".", ".<br>")
            head += f"<th{NUMBER if right else ''}>{name}</th>"
        for row, values in zip(shown, cells, strict=True):
            body += "<tr>"
            for column, value, right in zip(columns, values, is_right, strict=True):
                look = f' class="status {row.status}"' if column == "status" else NUMBER if right else ""
                body += f'<td{look} data-v="{_text(_key(value))}">{_text(written(value, len(row.runs)))}</td>'
            body += "</tr>"
        found += f"<h2>{_text(title)}</h2>" if title else ""
        found += f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return found


def _key(value: Any) -> Any:
    """Return what a cell is sorted by."""
    value = value.mean if isinstance(value, Number) else value
    return "" if value is ... or (isinstance(value, float) and not math.isfinite(value)) else value


# --- pictures ----------------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a key, and for the meta-loss and each selection metric its mean over the seeds with a standard error."""
    by_row = [[list(read_records(run.folder)) for run in row.runs] for row in rows]
    names = in_order(name for runs in by_row for records in runs for record in records for name in record)
    wanted = [name for name in names if name == "meta_loss" or name.startswith("selection/")][:MOST]
    if not wanted:
        return
    items = ""
    for row, look in zip(rows, LOOKS, strict=False):
        style = f"border-top-color:{look['color']};border-top-style:{look['linestyle']}"
        items += f'<li><span style="{style}"></span>{_text(row.name)}</li>'
    yield f'<p>Mean over the seeds; the band is a standard error to either side.</p><ul class="key">{items}</ul>'
    figures = ""
    for name in wanted:
        figure = Figure(figsize=(5, 3))
        axes = figure.subplots(gridspec_kw=MARGINS)
        for runs, look in zip(by_row, LOOKS, strict=False):
            steps, mean, error = _over_seeds(runs, name)
            few = {"marker": "o", "markersize": 3} if len(steps) <= FEW else {}
            axes.plot(steps, mean, linewidth=1.5, **look, **few)
            if len(steps) == 1:
                axes.errorbar(steps, mean, error, color=look["color"], capsize=3)
            axes.fill_between(steps, mean - error, mean + error, color=look["color"], alpha=0.15, linewidth=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="meta-step", xlim=(0, None))
        figures += _figure(name, figure)
    yield f'<div class="cards" style="--least:380px">{figures}</div>'


def _over_seeds(runs: Sequence[Sequence[Mapping[str, float]]], name: str) -> tuple[Any, Any, Any]:
    """Return the meta-steps, and mean and standard error (0 of one) of the runs that have a number there."""
    values: dict[float, list[float]] = {}
    for record in (record for records in runs for record in records if name in record and "meta_step" in record):
        values.setdefault(record["meta_step"], []).append(record[name])
    steps = sorted(values)
    numbers = [Number(dict(enumerate(values[step]))) for step in steps]
    return np.array(steps), np.array([x.mean for x in numbers]), np.array([x.error or 0.0 for x in numbers])


def _weights(rows: Sequence[Row]) -> Iterator[str]:
    """Yield, for each meta-parameter, a picture per row on common axes: bars of few entries, a histogram of many."""
    found: dict[str, dict[int, list[Any]]] = {}
    for i, row in enumerate(rows):
        for run in row.counted:
            for name, values in _learned(run).items():
                seeds = found.setdefault(name, {}).setdefault(i, [])
                if not seeds or len(values) == len(seeds[0]):
                    seeds.append(values)
    for name, by_row in list(found.items())[:MOST]:
        edges = np.histogram_bin_edges(np.concatenate([values for seeds in by_row.values() for values in seeds]), 40)
        figures = [(rows[i].name, _weights_of(seeds, edges, LOOKS[i]["color"])) for i, seeds in by_row.items()]
        limits = [figure.axes[0].get_ylim() for _, figure in figures]
        for _, figure in figures:
            figure.axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        pictures = "".join(_figure(*named) for named in figures)
        yield f'<h3>{_text(name)}</h3><div class="cards" style="--least:280px">{pictures}</div>'


def _weights_of(seeds: Sequence[Any], edges: Any, colour: str) -> Figure:
    """Draw what some seeds have learned: each entry's mean and standard error, or how many have which value."""
    figure = Figure(figsize=(4, 2.4))
    axes, count = figure.subplots(gridspec_kw=MARGINS), len(seeds[0])
    if count <= FEW:
        error = np.std(seeds, axis=0, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
        axes.bar(range(count), np.mean(seeds, axis=0), yerr=error, color=colour, ecolor="#222", capsize=2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("entry")
    else:
        axes.hist(np.concatenate(seeds), edges, weights=np.full(count * len(seeds), 1 / len(seeds)), color=colour)
        axes.set(xlabel="value", ylabel="entries")
    return figure


def _learned(run: Run) -> dict[str, Any]:
    """Return what a run has learned as flat arrays: of a table of weights these, of anything else what is stored."""
    path = run.folder / "meta_params.safetensors"
    try:
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            return {}
        stored = load_file(path)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        run.error = "; ".join(filter(None, [run.error, f"{path.name} cannot be read ({error})"]))
        return {}
    found = {}
    for name, array in stored.items():
        values = array.astype(np.float64).ravel()
        section = f"meta_params.{name.removesuffix('logits')}"
        form = run.options.get(f"{section}parametrisation") if name.endswith("logits") else None
        if form == "sigmoid":
            name, values = name.replace("logits", "weights"), 1 / (1 + np.exp(-values))
        elif form == "softmax":
            shares = np.exp(values - values.max())
            name, values = name.replace("logits", "weights"), len(values) * shares / shares.sum()
        if len(values) and np.isfinite(values).all():
            found[name] = values
    return found


def _figure(caption: str, figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "metaopt"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    return f'<figure><figcaption>{_text(caption)}</figcaption><img alt="" src="{source}"></figure>'
