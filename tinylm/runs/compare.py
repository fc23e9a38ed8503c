"""Compare the runs of the experiments in one report.

evaluate        the finished steps -> evaluation.csv, positions.csv, generations.json,
                plots and report.md
Comparison      the measurements of all runs (measure.py)
format_report   a Comparison -> Markdown
"""

import csv
import json
import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylm.common.errors import UserError, printable
from tinylm.common.files import read_regular, write_atomic, writing
from tinylm.runs.experiments import QUESTIONS, Question, Step, is_done, last_line
from tinylm.runs.measure import (
    ATTENTION_FROM,
    ATTENTION_N_FIRST,
    BANDS,
    CACHE_SETTINGS,
    LONG_SAMPLES,
    LONG_TOKENS,
    PART_CHARS,
    ROW_STRIDE,
    RunMeasurements,
    Score,
    load_or_measure,
    mean_by_band,
)
from tinylm.runs.plots import draw, draw_lines, find_runs, smoothed

logger = logging.getLogger(__name__)

TRAINED_POSITIONS = 128


@dataclass(frozen=True)
class Comparison:
    """The measurements of all runs, and the folder of the report."""

    runs: dict[str, RunMeasurements]
    """name of a run -> its measurements"""
    skipped: dict[str, str]
    """name of a run without measurements -> the reason"""
    out: Path

    def seeds(self, name: str) -> list[RunMeasurements]:
        """The runs of one config, one per seed."""
        return [run for run in self.runs.values() if run.scores[-1].run == name]

    def last_scores(self, name: str) -> dict[int, Score]:
        """The score of the last checkpoint of each run of one config, by seed."""
        return {run.scores[-1].seed: run.scores[-1] for run in self.seeds(name)}

    def position_losses(self) -> dict[str, np.ndarray]:
        """Name of a cache setting -> the mean loss at each position, over all seeds."""
        means = {}
        for setting in CACHE_SETTINGS:
            losses = [run.position_losses[setting.name] for run in self.seeds(setting.run)]
            if losses:
                means[setting.name] = np.mean(losses, axis=0)
        return means


def evaluate(steps: Iterable[Step], out: Path) -> Path:
    """Measure all checkpoints of the training steps and write the report; return its path.

    A run is measured again only if its checkpoints have changed.

    Raises:
        UserError: no run has finished, or a file cannot be written.
    """
    runs: dict[str, RunMeasurements] = {}
    skipped: dict[str, str] = {}
    for step in steps:
        if step.result.suffix != ".ckpt":
            continue
        name = step.result.parent.name
        try:
            if is_done(step):
                runs[name] = load_or_measure(name, step.result.parent, out)
            elif step.output.exists():
                skipped[name] = f"not finished, last output: {last_line(step.output)}"
            else:
                skipped[name] = "not run"
        except UserError as error:
            skipped[name] = str(error)
        if name in skipped:
            logger.info("%s: skipped: %s", name, skipped[name])
        else:
            scores = [f"step {s.step} {_number(s.val_loss)}" for s in runs[name].scores]
            logger.info("%s: val_loss: %s", name, "; ".join(scores))
    if not any(score.stage == "pretrain" for run in runs.values() for score in run.scores):
        fix = "Run: python -m tinylm experiments --phase pretrain"
        raise UserError(out, "no finished run", fix)
    return write_comparison(Comparison(runs, skipped, out))


def write_comparison(comparison: Comparison) -> Path:
    """Write the tables, sample texts, plots and the report; return the path of the report."""
    out = comparison.out
    scores = [asdict(score) for run in comparison.runs.values() for score in run.scores]
    texts = [text for run in comparison.runs.values() for text in run.texts]
    bands = {}
    for name, losses in comparison.position_losses().items():
        bands[name] = mean_by_band(losses)
    _write_csv(out / "evaluation.csv", scores)
    _write_csv(out / "positions.csv", [{"cache": name, **means} for name, means in bands.items()])
    content = json.dumps(texts, indent=2, ensure_ascii=False) + "\n"
    write_atomic(out / "generations.json", content, "--out")
    _write_plots(comparison)
    write_atomic(out / "report.md", format_report(comparison, bands, texts), "--out")
    return out / "report.md"


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with writing(path, "--out"), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _write_plots(comparison: Comparison) -> None:
    """Plot the validation loss per question, and the loss by position."""
    out = comparison.out
    logs = {run.name: run for run in find_runs([out / "logs"])}
    figures = {}
    for number, question in enumerate(QUESTIONS, start=1):
        runs = [logs[name] for name in question.runs if name in comparison.runs]
        if len(runs) > 1:
            figures[f"question-{number}.png"] = draw("val_loss", runs)

    own_cache = {setting.name for setting in CACHE_SETTINGS if setting.window is None}
    lines: dict[str, dict[str, np.ndarray]] = {"positions.png": {}, "streams.png": {}}
    for name, losses in comparison.position_losses().items():
        curve = smoothed(losses, ROW_STRIDE)
        curve[:16] = np.nan  # so high without context that the rest of the curve would look flat
        lines["positions.png" if name in own_cache else "streams.png"][name] = curve
    for file_name, curves in lines.items():
        figures[file_name] = draw_lines(
            curves,
            title=f"Validation loss by position (moving mean over {ROW_STRIDE})",
            xlabel="position",
            ylabel="nats per token",
            mark=(TRAINED_POSITIONS, f"training: positions 0-{TRAINED_POSITIONS - 1}"),
        )
    for file_name, figure in figures.items():
        with writing(out / file_name, "--out"):
            figure.savefig(out / file_name)


# --- the report -----------------------------------------------------------------------------------


def format_report(
    comparison: Comparison, bands: dict[str, dict[str, float]], texts: list[dict[str, Any]]
) -> str:
    """The report: questions, loss by position, attention, sample texts and tasks."""
    n_seeds = max(score.seed for run in comparison.runs.values() for score in run.scores)
    if n_seeds == 1:
        seeds = "One seed: small differences may be noise."
    else:
        seeds = f"{n_seeds} seeds: val_loss is the mean; the last column has one value per seed."
    parts = [
        "# Experiments\n",
        "All runs train on the same text for the same number of steps. "
        f"The runs of a question differ in one setting (configs/experiments). {seeds}\n",
    ]
    if comparison.skipped:
        parts.append("Skipped runs:\n")
        for run, why in comparison.skipped.items():
            parts.append(f"- {run}: {printable(why)}")
        parts.append("")
    for number, question in enumerate(QUESTIONS, start=1):
        parts += _question_section(comparison, question, number)
    parts += _position_section(bands)
    parts += _attention_section(comparison)
    parts += _text_section(texts)
    parts += _task_section(comparison.out)
    return "\n".join(parts)


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, the first column aligned left and the others right."""
    return [
        f"| {' | '.join(names)} |",
        f"|---|{'---:|' * (len(names) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _question_section(comparison: Comparison, question: Question, number: int) -> list[str]:
    baseline = comparison.last_scores(question.runs[0])
    rows = []
    for name in question.runs:
        scores = comparison.last_scores(name)
        if scores:
            rows.append(_question_row(scores, baseline))
    if len(rows) < 2:
        return []
    names = (
        "run",
        "parameters",
        "active parameters",
        "cache bytes per token",
        "val_loss",
        "val_bpb",
        f"val_loss minus {question.runs[0]}",
    )
    return [
        f"## {question.title}\n",
        *table(names, rows),
        f"![validation loss, first seed](question-{number}.png)\n",
    ]


def _question_row(scores: dict[int, Score], baseline: dict[int, Score]) -> list[str]:
    """One run: means over seeds, and the difference from the baseline run of each seed."""
    any_score = next(iter(scores.values()))  # all seeds have the same sizes
    losses = {}
    differences = []
    for seed, score in scores.items():
        if score.val_loss is None:
            continue
        losses[seed] = score.val_loss
        if seed in baseline and baseline[seed].val_loss is not None:
            differences.append(f"{score.val_loss - baseline[seed].val_loss:+.4f}")
    bpb = statistics.fmean(s.val_bpb for s in scores.values() if s.val_bpb is not None)
    return [
        any_score.run,
        f"{any_score.parameters:,}",
        f"{any_score.active:,}",
        f"{any_score.cache_bytes:,}",
        _number(statistics.fmean(losses.values())),
        _number(bpb),
        " ".join(differences),
    ]


def _position_section(bands: dict[str, dict[str, float]]) -> list[str]:
    if not bands:
        return []
    names = [f"{start}-{stop - 1}" for start, stop in zip(BANDS, BANDS[1:], strict=False)]
    rows = []
    for setting, means in bands.items():
        rows.append([setting, *(f"{means[n]:.3f}" if n in means else "-" for n in names)])
    about = (
        f"Mean validation loss by position; training used positions 0-{TRAINED_POSITIONS - 1}. "
        "Xiao et al. 2023: a cache of only the last positions raises the loss; keeping the first "
        "few positions too, or training with learned sinks, avoids this. "
        "A dash: beyond max_seq_len of the model. "
        f"Learned position embeddings from {TRAINED_POSITIONS} on were never trained.\n"
    )
    return [
        "## Beyond the positions of training\n",
        about,
        *table(("model, cache", *names), rows),
        "![loss by position, as built](positions.png)\n",
        "![loss by position, with caches of fixed size](streams.png)\n",
    ]


def _attention_section(comparison: Comparison) -> list[str]:
    rows = []
    for name in QUESTIONS[-1].runs:
        shares = [run.attention for run in comparison.seeds(name) if run.attention]
        if shares:
            means = [statistics.fmean(share[key] for share in shares) for key in shares[0]]
            rows.append([name, *(f"{mean:.1%}" for mean in means)])
    if not rows:
        return []
    positions = range(ATTENTION_FROM, TRAINED_POSITIONS)
    uniform = statistics.fmean(ATTENTION_N_FIRST / (t + 1) for t in positions)
    first = f"first {ATTENTION_N_FIRST} tokens"
    about = (
        f"Shares of attention at positions {ATTENTION_FROM}-{TRAINED_POSITIONS - 1}. "
        f"Uniform attention gives the {first} {uniform:.1%}; an attention sink gets far more.\n"
    )
    names = ("run", "learned sinks, mean", "max head", f"{first}, mean", "max head")
    return ["## Attention on sinks and first tokens\n", about, *table(names, rows)]


def _text_section(texts: list[dict[str, Any]]) -> list[str]:
    """The share of known words in long texts, and the first text of each run and prompt."""
    long_texts: dict[str, list[dict[str, Any]]] = {}
    for text in texts:
        if text["max_new_tokens"] == LONG_TOKENS:
            long_texts.setdefault(text["run"], []).append(text)
    rows = []
    for run, samples in long_texts.items():
        first = statistics.fmean(text["words_known_first"] for text in samples)
        last = statistics.fmean(text["words_known_last"] for text in samples)
        rows.append([run, f"{first:.0%}", f"{last:.0%}"])
    about = (
        f"Share of words that occur in the training text, in the first and the last {PART_CHARS} "
        f"characters of {LONG_TOKENS} sampled tokens; {LONG_SAMPLES} texts per seed. "
        "All texts: generations.json.\n"
    )
    parts = ["## Sample texts\n", about, *table(("run", "first", "last"), rows)]
    for text in texts:
        if (text["seed"], text["sample"]) == (1, 1):
            n_tokens = text["max_new_tokens"]
            parts.append(f"**{text['run']}**, {n_tokens} tokens after `{text['prompt']}`:\n")
            parts.append(f"    {printable(text['text'])}\n")
    return parts


def _task_section(out: Path) -> list[str]:
    """The task scores of the fine-tuned models and of their base models, if they were evaluated."""
    rows = []
    for path in sorted(out.glob("tasks/*/results.json")):
        measures = json.loads(read_regular(path))["measures"]
        for row in measures:
            cells = [row["task"], printable(row["checkpoint"]), str(row["shots"]), row["measure"]]
            interval = f"{_number(row['low'])} to {_number(row['high'])}"
            rows.append([*cells, _number(row["value"]), interval])
    if not rows:
        return []
    names = ("task", "model", "shots", "measure", "value", "95% interval")
    return ["## Tasks\n", *table(names, rows)]
