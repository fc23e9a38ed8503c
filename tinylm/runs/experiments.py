"""Experiments in one command: small models that differ in one setting, trained alike, to be compared.

    plan_steps  what is run, phase by phase: each step is one command, as a user would type it, and the file it leaves
    run_steps   steps without a result ─▶ results; a result that was made with other settings is not taken for this one

The questions stand in `QUESTIONS`; each run is a config in configs/experiments that can also be run by itself. The programs are
run in the folder that holds train.py. What comes of it is measured and told by comparison.py.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.common.child_program import ChildProgram, forward_signals
from tinylm.common.errors import UserError, printable, reading, writing
from tinylm.common.files import write_atomic
from tinylm.config.loader import load_config

Say = Callable[[str], None]

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
    Question(
        "Norms: before each sub-layer, after each sum, or nowhere", ("base", "post-norm", "no-norm")
    ),
    Question(
        "Positions: rotations, a learned table, or a bias that grows with distance",
        ("base", "learned", "alibi"),
    ),
    Question("Optimizers: Muon for the matrices, or AdamW for all", ("base", "adamw")),
    Question(
        "Sinks: a place to look at when nothing is worth looking at",
        ("base", "sinks", "window", "window-sinks"),
    ),
)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command, and the file that shows that it was done."""

    name: str
    phase: str
    command: tuple[str, ...]
    """a program of this folder and its arguments"""
    result: Path
    output: Path
    """the file for what the command says"""
    reads: tuple[Path, ...] = ()
    """results of earlier steps that it begins with"""

    @property
    def record(self) -> Path:
        """The file that says what the result was made from."""
        return self.result.parent / "made-from.json"


@dataclass(frozen=True)
class Outcome:
    """What came of running steps."""

    failed: tuple[str, ...] = ()
    """names of steps"""
    stopped: int = 0
    """130 or 143 where a signal ended it, else 0"""


def runs_of_questions() -> list[str]:
    """The names of all configs, each once."""
    return list(dict.fromkeys(name for question in QUESTIONS for name in question.runs))


def seeded(name: str, seed: int) -> str:
    """The name of a run with the config's own seed, 1, or a later one.

    >>> seeded("base", 1), seeded("base", 2)
    ('base', 'base-seed2')
    """
    return name if seed == 1 else f"{name}-seed{seed}"


def plan_steps(out: Path, seeds: int = 1) -> list[Step]:
    """Every step, in order; what they write is below `out`."""
    smoke = out / "smoke"
    short = (
        f"training.max_steps={SMOKE_STEPS}",
        f"training.val_every_steps={SMOKE_STEPS // 2}",
        f"training.save_every_steps={SMOKE_STEPS // 2}",
    )
    steps = [
        _pretrain("smoke", name, smoke, 1, (*short, "data.val_docs=6"))
        for name in ("base", "window-sinks")
    ]
    steps.append(_finetune("smoke", "config_finetune.yaml", smoke, short))
    steps += [
        _pretrain("pretrain", name, out, seed)
        for seed in range(1, seeds + 1)
        for name in runs_of_questions()
    ]
    steps.append(_finetune("finetune", "config_finetune.yaml", out))
    for task, kind, model in (
        ("sst2", "gpt2", "gpt2"),
        ("samsum", "t5", "google/flan-t5-small"),
        ("gsm8k", "gpt2", "gpt2"),
    ):
        tuned = _finetune("finetune", f"configs/{task}-{kind}-lora.yaml", out)
        steps += [tuned, _ask(task, model, tuned, out)]
    return steps


def _pretrain(phase: str, config: str, out: Path, seed: int, settings: Sequence[str] = ()) -> Step:
    name, path = seeded(config, seed), CONFIGS / f"{config}.yaml"
    # Another seed draws other weights, another order, and other documents to hold out.
    other = (f"training.seed={load_config(path).training.seed + seed - 1}",) if seed > 1 else ()
    command = ("train.py", "--config", str(path), *_places(out, name), *other, *settings)
    return Step(
        f"{phase}: {name}", phase, command, out / "runs" / name / "final.ckpt", _output(out, name)
    )


def _finetune(phase: str, config: str, out: Path, settings: Sequence[str] = ()) -> Step:
    name = Path(config).stem.removeprefix("config_")
    base = () if config.startswith("configs/") else (out / "runs" / "base" / "final.ckpt",)
    begins = tuple(f"training.init_from={path}" for path in base)
    command = ("finetune.py", "--config", config, *_places(out, name), *begins, *settings)
    return Step(
        f"{phase}: {name}",
        phase,
        command,
        out / "runs" / name / "final.ckpt",
        _output(out, name),
        base,
    )


def _ask(task: str, model: str, tuned: Step, out: Path) -> Step:
    """The questions of a task, for the fine-tuned model and for the one it began as, which is also shown solved examples."""
    folder = out / "tasks" / task
    command = (
        "evaluate_checkpoints.py",
        "--checkpoints",
        str(tuned.result),
        "--model",
        model,
        "--tasks",
        task,
        "--shots",
        "0,4",
        "--limit",
        "200",
    )
    name, command = f"{task}-asked", (*command, "--out", str(folder))
    return Step(
        f"finetune: {name}",
        "finetune",
        command,
        folder / "results.json",
        _output(out, name),
        (tuned.result,),
    )


def _output(out: Path, name: str) -> Path:
    return out / "output" / f"{name}.txt"


def _places(out: Path, name: str) -> tuple[str, ...]:
    return (
        f"training.checkpoint_dir={out / 'runs' / name}",
        f"training.log_dir={out / 'logs'}",
        f"training.run_name={name}",
    )


# --- what a result was made from --------------------------------------------------------------------------------------


def made_from(step: Step) -> dict[str, str]:
    """What decides a step's result: its settings, or its command, and the content of the files that it reads.

    Raises:
        UserError: its config is not as it should be, or a file cannot be read.
    """
    program, *arguments = step.command
    if program == "evaluate_checkpoints.py":
        settings, files = {"command": " ".join(arguments)}, list(step.reads)
    else:
        config = load_config(arguments[1], arguments[2:])
        # Where it writes, and the path of what it begins with, which is compared by its content.
        settings = {key: value for key, value in _flat(config.to_plain()) if key not in PLACES}
        files = [
            *step.reads,
            *(
                Path(name)
                for name in (config.data.dataset, config.data.val_dataset)
                if name is not None
            ),
        ]
    return settings | {f"content of {path.name}": _digest(path) for path in files if path.is_file()}


PLACES = {
    "training.checkpoint_dir",
    "training.log_dir",
    "training.run_name",
    "training.init_from",
    "data.cache_dir",
}


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _digest(path: Path) -> str:
    with reading(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def is_done(step: Step) -> bool:
    """Whether the step's result is there.

    Raises:
        UserError: it is, and was made from something else than the step has now.
    """
    if not (step.result.exists() and step.record.exists()):
        return False
    with reading(step.record):
        was = json.loads(step.record.read_text(encoding="utf-8"))
    now = made_from(step)
    changed = next(
        (key for key in [*now, *was] if now.get(key) != was.get(key)), None
    )  # either may lack what the other has
    if changed is None:
        return True
    found = f"{changed} was {was.get(changed, 'not there')} when it was made and is {now.get(changed, 'not there')}"
    fix = f"Set it back, or remove {step.result.parent} to make it again"
    raise UserError(step.result, found, fix)


# --- running ----------------------------------------------------------------------------------------------------------


def run_steps(steps: Iterable[Step], say: Say) -> Outcome:
    """Run what has no result yet, each with its output in a file; a step that fails does not keep the next from running.

    Raises:
        UserError: this is not the project's folder, or an output cannot be written.
    """
    if not Path("train.py").is_file():
        fix = "Run experiments in the project's folder"
        raise UserError("train.py", "not found in this folder", fix)
    failed, child = [], ChildProgram()
    with forward_signals(child):
        for step in steps:
            try:
                code = None if is_done(step) else _run(step, child)
            except UserError as error:
                failed.append(step.name)
                say(f"{step.name}: {error}")
                continue
            if child.received is not None or code in (130, 143):
                say(f"{step.name}: stopped; the same command goes on from there")
                return Outcome(tuple(failed), code or 128 + (child.received or 0))
            failed += [step.name] * bool(code)
            say(f"{step.name}: {_told(step, code)}")
    return Outcome(tuple(failed))


def _told(step: Step, code: int | None) -> str:
    if code is None:
        return f"done before ({step.result})"
    return "done" if code == 0 else f"exit code {code}: {last_line(step.output)}"


def _run(step: Step, child: ChildProgram) -> int:
    with writing(step.output, "--out"):
        step.output.parent.mkdir(parents=True, exist_ok=True)
        output = open(step.output, "wb")  # noqa: SIM115  (closed below; what the process raises is not of this file)
    with output:
        code = child.run([sys.executable, *step.command], stdout=output, stderr=subprocess.STDOUT)
    if code == 0:
        write_atomic(step.record, json.dumps(made_from(step), indent=1) + "\n", "--out")
    return code


def last_line(path: Path) -> str:
    """The end of what a step said, which for an error is the error."""
    with reading(path):
        lines = [
            line
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
    return printable(lines[-1]) if lines else "no output"
