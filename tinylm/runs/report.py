"""report.html: one run as one page that needs no network and no script.

    RunFolder ─▶ header, figures, charts, samples, log lines, settings, environment ─▶ HTML

Everything that comes from a run is escaped: a sample that contains <script> stays text. While the
run trains, the page reloads itself.
"""

import shlex
import time
from collections.abc import Iterable, Sequence
from html import escape

from tinylm.common.console import duration, readable, short, size
from tinylm.runs.run_folder import COMPLETE, FAILED, RUNNING, STOPPED, RunFolder
from tinylm.runs.svg import Curve, line_chart

RELOAD_SECONDS = 10
N_SAMPLES = 50
# Title -> columns of metrics.csv that share a unit. Other columns get a chart each.
CHARTS = {
    "Loss (nats)": ("train_loss", "val_loss"),
    "Bits per byte of text": ("val_bpb",),
    "Learning rate": ("lr",),
    "Gradient norm, before clipping": ("grad_norm",),
    "Tokens per second": ("tokens_per_s",),
    "Model FLOPs utilization (share of the speed of bare matrix products)": ("mfu",),
    "Share of the time in which steps waited for data": ("data_wait",),
    "Peak memory (bytes)": ("peak_bytes",),
}
# Columns that say nothing over steps, or the same as another: perplexity is exp(val_loss).
NOT_DRAWN = ("step", "tokens", "passes", "val_ppl", "skipped_steps")
STATUS = {
    RUNNING: "training",
    COMPLETE: "complete",
    STOPPED: "stopped; the same command continues it",
    FAILED: "failed",
}
# Okabe and Ito (2008): distinct for color-blind readers.
STYLE = """
:root { --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --card: #f6f8fa; --edge: #d0d7de;
  --c0: #0072b2; --c1: #d55e00; --bad: #b42318; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --paper: #0d1117;
  --card: #161b22; --edge: #30363d; --c0: #56b4e9; --c1: #e69f00; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; } .soft { color: var(--soft); }
.bad { color: var(--bad); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 6px;
  padding: .5rem .7rem; } .card b { display: block; font-size: 1.15rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; } figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; display: block; } .grid { stroke: var(--edge); }
.tick { fill: var(--soft); font-size: 12px; }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line-0 { stroke: var(--c0); } .line-1 { stroke: var(--c1); stroke-dasharray: 6 3; }
.dot-0 { fill: var(--c0); } .dot-1 { fill: var(--c1); }
.key-0 { color: var(--c0); } .key-1 { color: var(--c1); }
pre { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .7rem;
  margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top;
  overflow-wrap: anywhere; } td:first-child { color: var(--soft); }
summary { cursor: pointer; }
"""


def report_of(run: RunFolder) -> str:
    """The page of a run."""
    facts = run.facts
    title = f"{facts.run_name} · {facts.stage}" if facts.stage else facts.run_name
    reload = ""
    if facts.status == RUNNING:
        reload = f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">\n'
    sections = [
        _header(run, title),
        _charts(run),
        _samples(run),
        _section("What the run logged", _pre("\n".join(facts.lines)) if facts.lines else ""),
        _settings(run),
        _section("Environment", _table(_environment(run))),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        f"{reload}<title>{escape(readable(title))}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _header(run: RunFolder, title: str) -> str:
    """Name, state and the figures at a glance."""
    facts = run.facts
    lines = [f"<h1>{escape(readable(title))}</h1>"]
    updated = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts.updated))
    status = STATUS.get(facts.status, "")
    lines.append(f'<p class="soft">{escape(f"{status} · as of {updated}".lstrip(" ·"))}</p>')
    if facts.message:
        lines.append(f'<p class="bad">{escape(readable(facts.message))}</p>')
    if facts.model:
        lines.append(f"<p>{escape(readable(facts.model))}</p>")
    cards = "".join(
        f'<div class="card">{escape(name)}<b>{escape(value)}</b></div>'
        for name, value in _figures(run)
    )
    lines.append(f'<div class="cards">{cards}</div>')
    if facts.next_command:
        lines.append(f"<p>Next:</p>{_pre(facts.next_command)}")
    return "\n".join(lines)


def _figures(run: RunFolder) -> Iterable[tuple[str, str]]:
    """Names and values of the figures at a glance, those that are known."""
    facts = run.facts
    steps = f"{facts.step:,}" + (f" of {facts.max_steps:,}" if facts.max_steps else "")
    yield "steps", steps
    yield "tokens", short(facts.tokens)
    if facts.passes is not None:
        yield "passes over the data", f"{facts.passes:.2f}"
    if facts.best_val_loss is not None and facts.best_step is not None:
        yield "lowest val_loss", f"{facts.best_val_loss:.4f} at step {facts.best_step:,}"
    if facts.seconds:
        yield "time, with validation", duration(facts.seconds)
    speeds = [speed for speed in run.columns.get("tokens_per_s", []) if speed == speed]
    if speeds:
        speed = sorted(speeds)[len(speeds) // 2]
        yield "tokens per second (median)", short(speed)
        if facts.flops_per_token is not None:
            yield "FLOPs per second of the model", short(speed * facts.flops_per_token)
    for name, column in (("MFU (median)", "mfu"), ("waiting for data (median)", "data_wait")):
        shares = sorted(share for share in run.columns.get(column, []) if share == share)
        if shares:
            yield name, f"{shares[len(shares) // 2]:.1%}"
    if facts.peak_bytes is not None:
        yield "peak memory", size(facts.peak_bytes)


def _charts(run: RunFolder) -> str:
    """The curves of metrics.csv."""
    charted = {column for columns in CHARTS.values() for column in columns}
    charts = dict(CHARTS)
    for column in run.columns:
        if column not in charted and column.partition("[")[0] not in NOT_DRAWN:
            charts[column] = (column,)
    figures = []
    for title, names in charts.items():
        steps = run.columns.get("step", [])
        curves: list[Curve] = [
            (name, steps, run.columns[name]) for name in names if name in run.columns
        ]
        svg = line_chart(curves, label=f"{title} over optimizer steps")
        if svg:
            keys = _keys([name for name, *_ in curves]) if len(curves) > 1 else ""
            caption = f"<figcaption>{escape(title)}{keys}</figcaption>"
            figures.append(f"<figure>{caption}{svg}</figure>")
    return _section("Curves", f'<div class="charts">{"".join(figures)}</div>' if figures else "")


def _keys(names: Sequence[str]) -> str:
    """The legend of a chart."""
    return "".join(
        f' <span class="key-{number}">● {escape(name)}</span>' for number, name in enumerate(names)
    )


def _samples(run: RunFolder) -> str:
    """The samples of the validations, the newest open."""
    parts = []
    for number, sample in enumerate(reversed(run.samples[-N_SAMPLES:])):
        state = " open" if number == 0 else ""
        text = _pre(sample["text"])
        parts.append(f"<details{state}><summary>step {sample['step']:,}</summary>{text}</details>")
    return _section("Samples", "\n".join(parts))


def _settings(run: RunFolder) -> str:
    """The command and config.yaml."""
    parts = []
    if run.facts.command:
        parts.append(_pre(shlex.join(run.facts.command)))
    if run.settings:
        parts.append(
            f"<details><summary>config.yaml: every setting</summary>{_pre(run.settings)}</details>"
        )
    return _section("Settings", "\n".join(parts))


def _environment(run: RunFolder) -> Iterable[tuple[str, str]]:
    """Names and values of what the result depends on beside the settings."""
    facts = run.facts
    if facts.device:
        yield "device", facts.device
        yield "precision", facts.precision
    yield from facts.versions.items()
    if facts.checkpoint_dir:
        yield "checkpoints", facts.checkpoint_dir
    yield "folder", str(run.path)


def _section(title: str, content: str) -> str:
    """A part of the page; nothing if it has no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(
        f"<tr><td>{escape(readable(str(name)))}</td><td>{escape(readable(str(value)))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _pre(text: str) -> str:
    """Text with its lines, its control characters escaped."""
    return f"<pre>{escape(readable(text))}</pre>"
