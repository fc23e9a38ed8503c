"""Experiments in one command: small models that differ in one setting, trained alike, compared in tables and pictures.

    STEPS      what is run, phase by phase; a step whose result is there is not run again
    evaluate   the checkpoints that came out ─▶ evaluation.csv, positions.csv, generations.json, pictures, report.md

The questions stand in `QUESTIONS`; each run is a config in configs/experiments that can also be run by itself. The programs are
run as a user would, in the folder that holds train.py.
"""

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylm import checkpoint
from tinylm.config import SamplingConfig
from tinylm.decoder import count_parameters
from tinylm.encode import cached_token_file
from tinylm.engine import Engine
from tinylm.errors import UserError, printable, writing
from tinylm.evaluate import byte_table, score_batches
from tinylm.packing import count_rows, row_at
from tinylm.plots import draw, draw_lines, find_runs

PHASES = ("smoke", "pretrain", "finetune", "eval", "all")
CONFIGS = Path("configs/experiments")
SMOKE_STEPS = 8


@dataclass(frozen=True)
class Question:
    """A comparison of runs that differ in one thing."""

    title: str
    runs: tuple[str, ...]
    """names of configs; the first is what the others are held against"""


QUESTIONS = (
    Question("Grouped queries: what do fewer key/value heads cost?", ("base", "gqa", "mqa")),
    Question("Experts: more parameters at the same work a token", ("base", "moe")),
    Question("Norms: before each sub-layer, after each sum, or nowhere", ("base", "post-norm", "no-norm")),
    Question("Positions: rotations, a learned table, or a bias that grows with distance", ("base", "learned", "alibi")),
    Question("Optimizers: Muon for the matrices, or AdamW for all", ("base", "adamw")),
    Question("Sinks: a place to look at when nothing is worth looking at", ("base", "sinks", "window", "window-sinks")),
)
# Positions beyond those of training are where sinks are said to help.
FAR_RUNS = ("base", "sinks", "window", "window-sinks", "learned", "alibi")
# Borders of the bands of positions in the table; training saw the first 128.
BANDS = (0, 32, 128, 256, 512, 1024)
PROMPTS = ("Attention is", "The loss", "A token")
FAR_PROMPT, FAR_TOKENS = "Attention is", 600
BATCH_ROWS = 8


@dataclass(frozen=True)
class Step:
    """One command, and the file that shows that it was done."""

    name: str
    phase: str
    command: tuple[str, ...]
    """a program of this folder and its arguments"""
    result: Path


def runs_of_questions() -> list[str]:
    """The names of all runs, each once."""
    return list(dict.fromkeys(name for question in QUESTIONS for name in question.runs))


def plan_steps(out: Path) -> list[Step]:
    """Every step, in order; what they write is below `out`."""
    smoke = out / "smoke"
    short = (f"training.max_steps={SMOKE_STEPS}", f"training.val_every_steps={SMOKE_STEPS}")
    steps = [_pretrain("smoke", name, smoke, short) for name in ("base", "window-sinks")]
    steps.append(_finetune("smoke", "config_finetune.yaml", smoke, short))
    steps += [_pretrain("pretrain", name, out, ()) for name in runs_of_questions()]
    steps.append(_finetune("finetune", "config_finetune.yaml", out, ()))
    steps += [_finetune("finetune", f"configs/{name}.yaml", out, ()) for name in ("sst2-gpt2-lora", "samsum-t5-lora", "gsm8k-gpt2-lora")]
    return steps


def _pretrain(phase: str, name: str, out: Path, settings: Sequence[str]) -> Step:
    folder = out / "runs" / name
    command = ("train.py", "--config", str(CONFIGS / f"{name}.yaml"), *_places(folder, out, name), *settings)
    return Step(f"{phase}: {name}", phase, command, folder / "final.ckpt")


def _finetune(phase: str, config: str, out: Path, settings: Sequence[str]) -> Step:
    name = Path(config).stem.removeprefix("config_")
    folder = out / "runs" / name
    base = () if config.startswith("configs/") else (f"training.init_from={out / 'runs' / 'base' / 'final.ckpt'}",)
    command = ("finetune.py", "--config", config, *_places(folder, out, name), *base, *settings)
    return Step(f"{phase}: {name}", phase, command, folder / "final.ckpt")


def _places(folder: Path, out: Path, name: str) -> tuple[str, ...]:
    return (f"training.checkpoint_dir={folder}", f"training.log_dir={out / 'logs'}", f"training.run_name={name}")


def run_steps(steps: Iterable[Step], out: Path, say: Callable[[str], None]) -> list[str]:
    """Run what has no result yet, each with its output in a file; the names of those that failed come back."""
    if not Path("train.py").is_file():
        raise UserError("train.py: not found here. Run experiments in the project's folder.")
    failed = []
    for step in steps:
        if step.result.exists():
            say(f"{step.name}: done before ({printable(step.result)})")
            continue
        log = out / "output" / f"{step.name.replace(': ', '-')}.txt"
        with writing(log, "--out"):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "w", encoding="utf-8") as output:
                code = subprocess.run([sys.executable, *step.command], stdout=output, stderr=output, check=False).returncode  # noqa: S603
        if code == 0:
            say(f"{step.name}: done")
        else:
            failed.append(step.name)
            say(f"{step.name}: exit code {code}: {_last_line(log)}")
        if code in (130, 143):  # somebody stopped it, and so all of it
            break
    return failed


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return printable(lines[-1]) if lines else "no output"


# --- what came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one checkpoint does on its validation data."""

    run: str
    step: int
    val_loss: float
    val_ppl: float
    val_bpb: float
    parameters: int
    cache_bytes: int
    """keys and values of one token, in all layers"""


def evaluate(out: Path, say: Callable[[str], None]) -> Path:
    """Score every run's final checkpoint, write tables, texts and pictures; the path of the report comes back.

    Raises:
        UserError: no run has finished.
    """
    finals = {name: path for name in runs_of_questions() if (path := out / "runs" / name / "final.ckpt").exists()}
    if not finals:
        raise UserError(f"{printable(out)}: no finished run. Run: python -m tinylm experiments --phase pretrain.")
    results, positions, texts = {}, {}, []
    for name, path in finals.items():
        loaded = checkpoint.load_model(path)
        results[name] = score(name, loaded)
        texts += generations(name, loaded)
        if name in FAR_RUNS:
            positions[name] = loss_by_position(loaded)
        say(f"{name}: val_loss {results[name].val_loss:.4f}")
    _write_csv(out / "evaluation.csv", [vars(result) for result in results.values()])
    _write_csv(out / "positions.csv", [{"run": name, **banded(losses)} for name, losses in positions.items()])
    with writing(out / "generations.json", "--out"):
        (out / "generations.json").write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _draw(out, positions)
        report = out / "report.md"
        report.write_text(write_report(results, positions, texts), encoding="utf-8")
    return report


def _validation_rows(loaded: checkpoint.Loaded, seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    config, tokenizer = loaded.config, loaded.tokenizer
    file = cached_token_file(config.data, "val", tokenizer, config.training.seed)
    return [row_at(file.tokens, start, seq_len, tokenizer.pad_id) for start in range(0, count_rows(len(file), seq_len, seq_len) * seq_len, seq_len)]


def _batches(rows: list[tuple[np.ndarray, np.ndarray]]) -> Iterable[dict[str, Any]]:
    for start in range(0, len(rows), BATCH_ROWS):
        inputs, labels = zip(*rows[start : start + BATCH_ROWS], strict=True)
        yield {"input_ids": torch.from_numpy(np.stack(inputs)), "labels": torch.from_numpy(np.stack(labels))}


def score(name: str, loaded: checkpoint.Loaded) -> Result:
    """The checkpoint's score on every validation row of the length it was trained on."""
    config, model = loaded.config.model, loaded.model
    lengths = byte_table(loaded.tokenizer, model.embedding.num_embeddings)
    found = score_batches(model, _batches(_validation_rows(loaded, loaded.config.training.seq_len)), lengths)
    cache = 2 * config.n_layers * config.kv_heads * config.size_of_head * 4
    return Result(name, loaded.info.step, found.loss, found.perplexity, found.bits_per_byte, count_parameters(model), cache)


@torch.no_grad()
def loss_by_position(loaded: checkpoint.Loaded) -> np.ndarray:
    """The mean loss at each position (max_seq_len,) of rows as long as the model can read; NaN where no row has a target."""
    length = loaded.config.model.max_seq_len
    total, n = np.zeros(length), np.zeros(length)
    for batch in _batches(_validation_rows(loaded, length)):
        logits, labels = loaded.model(batch["input_ids"]), batch["labels"]
        losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")  # 0 where nothing is asked
        total += losses.sum(dim=0).double().numpy()
        n += (labels >= 0).sum(dim=0).numpy()
    return np.divide(total, n, out=np.full(length, np.nan), where=n > 0)


def banded(losses: np.ndarray) -> dict[str, float]:
    """The mean loss in each band of positions.

    >>> banded(np.repeat([4.0, 3.0], [32, 96]))
    {'0-31': 4.0, '32-127': 3.0}
    """
    bands = [(start, stop) for start, stop in zip(BANDS, BANDS[1:], strict=False) if start < len(losses)]
    return {f"{start}-{stop - 1}": float(np.nanmean(losses[start:stop])) for start, stop in bands}


def generations(name: str, loaded: checkpoint.Loaded) -> list[dict[str, Any]]:
    """What a model writes on the fixed prompts, and, if it was built for it, far beyond the positions of its training."""
    engine = Engine(loaded.model, loaded.tokenizer)
    asked = [(prompt, 80) for prompt in PROMPTS] + [(FAR_PROMPT, FAR_TOKENS)] * (name in FAR_RUNS)
    return [
        {"run": name, "prompt": prompt, "max_new_tokens": n, "text": engine.generate(prompt, SamplingConfig(max_new_tokens=n, temperature=0.7, seed=1))[0].text}
        for prompt, n in asked
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with writing(path, "--out"), open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def _draw(out: Path, positions: dict[str, np.ndarray]) -> None:
    by_name = {run.name: run for run in find_runs([out / "logs"])}
    for number, question in enumerate(QUESTIONS, start=1):
        runs = [by_name[name] for name in question.runs if name in by_name]
        draw("val_loss", runs).savefig(out / f"question-{number}.png")
    lines = {name: _running_mean(losses) for name, losses in positions.items()}
    title = "Validation loss by position (mean of 32 positions); training saw 128"
    draw_lines(lines, title=title, xlabel="position", ylabel="nats per token").savefig(out / "positions.png")


def _running_mean(losses: np.ndarray, window: int = 32) -> np.ndarray:
    return np.convolve(losses, np.full(window, 1 / window), mode="valid")


def write_report(results: dict[str, Result], positions: dict[str, np.ndarray], texts: list[dict[str, Any]]) -> str:
    """The comparison as Markdown: a table and a picture a question, losses by position, and what the models write."""
    parts = ["# Experiments\n", "One seed, one text, one number of steps; the runs of a question differ in one setting (configs/experiments).\n"]
    for number, question in enumerate(QUESTIONS, start=1):
        rows = [results[name] for name in question.runs if name in results]
        parts.append(f"## {question.title}\n")
        parts += ["| run | parameters | cache bytes a token | val_loss | val_bpb | beside the first |", "|---|---:|---:|---:|---:|---:|"]
        parts += [_row(row, rows[0]) for row in rows]
        parts.append(f"\n![validation loss](question-{number}.png)\n")
    if positions:
        bands = list(banded(next(iter(positions.values()))))
        parts += ["## Beyond the positions of training\n", "Mean loss in bands of positions of the validation text; training saw 0-127.\n"]
        parts += [f"| run | {' | '.join(bands)} |", f"|---|{'---:|' * len(bands)}"]
        parts += [f"| {name} | {' | '.join(f'{loss:.3f}' for loss in banded(losses).values())} |" for name, losses in positions.items()]
        parts.append("\n![loss by position](positions.png)\n")
    parts.append("## What they write\n")
    parts += [f"**{text['run']}**, {text['max_new_tokens']} tokens after `{text['prompt']}`: {printable(text['text'])}\n" for text in texts]
    return "\n".join(parts)


def _row(row: Result, first: Result) -> str:
    difference = row.val_loss - first.val_loss
    return f"| {row.run} | {row.parameters:,} | {row.cache_bytes:,} | {row.val_loss:.4f} | {row.val_bpb:.4f} | {difference:+.4f} |"
