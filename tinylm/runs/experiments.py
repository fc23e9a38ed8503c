"""Experiments with one command: train small models that differ in one setting, to compare them.

    plan_steps  a folder -> `Step`s: one command each, as a user would type it, and its result file
    run_steps   run the steps without a result; a result of other settings is an error

`QUESTIONS` lists the comparisons. Each run has a config in configs/experiments and can also be run
alone. The configs are those of the working folder. measure.py and compare.py evaluate the results.
"""

import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.common.app_folder import app_folder
from tinylm.common.child_program import ChildProgram, forward_signals
from tinylm.common.errors import UserError, require_package
from tinylm.common.files import open_regular, read_regular, reading, write_atomic, writing
from tinylm.config.loader import load_config

logger = logging.getLogger(__name__)

CONFIGS = Path("configs/experiments")
SMOKE_STEPS = 8
# The tasks that Hugging Face models are fine-tuned for: its name, their kind, the model.
TASK_MODELS = (
    ("sst2", "gpt2", "gpt2"),
    ("samsum", "t5", "google/flan-t5-small"),
    ("gsm8k", "gpt2", "gpt2"),
)
PACKAGES = {"samsum": "rouge_score"}  # what a task is scored with
SMOKE_TASKS = TASK_MODELS[:2]  # each kind of model once
# Settings that do not change a result. The content of init_from is compared, not its path.
PATH_SETTINGS = {
    "training.checkpoint_dir",
    "training.log_dir",
    "training.run_name",
    "training.init_from",
    "data.cache_dir",
}


@dataclass(frozen=True)
class Question:
    """A comparison of runs that differ in one setting."""

    title: str
    runs: tuple[str, ...]
    """names of configs; the first is the baseline"""


QUESTIONS = (
    Question("Grouped-query attention: the cost of fewer key/value heads", ("base", "gqa", "mqa")),
    Question("Mixture of experts: more parameters, the same compute per token", ("base", "moe")),
    Question("Norms: pre-norm, post-norm or none", ("base", "post-norm", "no-norm")),
    Question(
        "Positions: RoPE, learned embeddings, or ALiBi",
        ("base", "learned", "alibi"),
    ),
    Question("Optimizers: Muon for the matrices, or AdamW for all parameters", ("base", "adamw")),
    Question(
        "Attention sinks: learned sinks, with and without a sliding window",
        ("base", "sinks", "window", "window-sinks"),
    ),
)


# --- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One command, and the file that it writes last."""

    name: str
    phase: str
    command: tuple[str, ...]
    """a program of the project and its arguments"""
    result: Path
    output: Path
    """the file for stdout and stderr"""
    reads: tuple[Path, ...] = ()
    """results of earlier steps that it loads"""
    package: str | None = None
    """an optional package without which it is left out"""

    @property
    def record(self) -> Path:
        """The file with the inputs that the result was made from."""
        return self.result.parent / "made-from.json"


@dataclass(frozen=True)
class Outcome:
    """Which steps failed, and whether a signal stopped them."""

    failed: tuple[str, ...] = ()
    """names of steps"""
    stopped: int = 0
    """130 or 143 after a signal, else 0"""


def all_run_names() -> list[str]:
    """The names of all configs, without duplicates."""
    return list(dict.fromkeys(name for question in QUESTIONS for name in question.runs))


def seeded_name(name: str, seed: int) -> str:
    """The name of a run; seed 1 is the seed of the config.

    >>> seeded_name("base", 1), seeded_name("base", 2)
    ('base', 'base-seed2')
    """
    return name if seed == 1 else f"{name}-seed{seed}"


def plan_steps(out: Path, seeds: int = 1) -> list[Step]:
    """All steps in order; they write below `out`."""
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
    for task, kind, _ in SMOKE_TASKS:
        model = tiny_model_folder(out, kind)
        # one byte per token: longer rows than a real tokenizer's
        rows = ("data.dataset=smoke", "training.seq_len=512", "training.micro_batch_size=2")
        settings = (*short, *rows, f"training.init_from=hf:{model}")
        config = f"configs/{task}-{kind}-lora.yaml"
        weights = model / "model.safetensors"
        tuned = _finetune("smoke", config, smoke, settings, reads=(weights,))
        options = ("--smoke", "--shots", "0,1", "--limit", "2")
        steps += [tuned, _evaluate_task(task, str(model), tuned, smoke, options)]
    steps += [
        _pretrain("pretrain", name, out, seed)
        for seed in range(1, seeds + 1)
        for name in all_run_names()
    ]
    steps.append(_finetune("finetune", "config_finetune.yaml", out))
    for task, kind, name in TASK_MODELS:
        tuned = _finetune("finetune", f"configs/{task}-{kind}-lora.yaml", out)
        options = ("--shots", "0,4", "--limit", "200")
        steps += [tuned, _evaluate_task(task, name, tuned, out, options)]
    return steps


def tiny_model_folder(out: Path, kind: str) -> Path:
    """The folder of the model of random weights (tiny_models.py) that the smoke phase tunes."""
    return out / "smoke" / "models" / kind


def _pretrain(phase: str, config: str, out: Path, seed: int, settings: Sequence[str] = ()) -> Step:
    name = seeded_name(config, seed)
    path = CONFIGS / f"{config}.yaml"
    command = ["train.py", "--config", str(path), *_path_settings(out, name)]
    if seed > 1:  # other weights, another order of data, another validation split
        command.append(f"training.seed={load_config(path).training.seed + seed - 1}")
    command += settings
    result = out / "runs" / name / "final.ckpt"
    return Step(f"{phase}: {name}", phase, tuple(command), result, _output(out, name))


def _finetune(
    phase: str,
    config: str,
    out: Path,
    settings: Sequence[str] = (),
    reads: tuple[Path, ...] = (),
) -> Step:
    name = Path(config).stem.removeprefix("config_")
    command = ["finetune.py", "--config", config, *_path_settings(out, name)]
    if not config.startswith("configs/"):
        base = out / "runs" / "base" / "final.ckpt"
        command.append(f"training.init_from={base}")
        reads = (base,)
    command += settings
    result = out / "runs" / name / "final.ckpt"
    return Step(f"{phase}: {name}", phase, tuple(command), result, _output(out, name), reads)


def _evaluate_task(task: str, model: str, tuned: Step, out: Path, options: Sequence[str]) -> Step:
    """Score the fine-tuned model and its base model on a task, zero-shot and with examples."""
    folder = out / "tasks" / task
    models = ("--checkpoints", str(tuned.result), "--model", model)
    more = ("--tasks", task, *options, "--out", str(folder))
    name = f"{task}-tasks"
    return Step(
        name=f"{tuned.phase}: {name}",
        phase=tuned.phase,
        command=("evaluate_checkpoints.py", *models, *more),
        result=folder / "results.json",
        output=_output(out, name),
        reads=(tuned.result,),
        package=PACKAGES.get(task),
    )


def _output(out: Path, name: str) -> Path:
    return out / "output" / f"{name}.txt"


def _path_settings(out: Path, name: str) -> tuple[str, ...]:
    return (
        f"training.checkpoint_dir={out / 'runs' / name}",
        f"training.log_dir={out / 'logs'}",
        f"training.run_name={name}",
    )


# --- the inputs of a result -----------------------------------------------------------------------


def step_inputs(step: Step) -> dict[str, str]:
    """What decides the result of a step: its settings or its command, and the content of its files.

    Raises:
        UserError: its config is invalid, or a file cannot be read.
    """
    program, *arguments = step.command
    files = list(step.reads)
    if program == "evaluate_checkpoints.py":
        inputs = {"command": " ".join(arguments)}
    else:
        config = load_config(arguments[1], arguments[2:])
        inputs = {k: v for k, v in _flat(config.to_plain()) if k not in PATH_SETTINGS}
        for dataset in (config.data.dataset, config.data.val_dataset):
            if dataset is not None:
                files.append(Path(dataset))
    for path in files:
        if path.is_file():
            inputs[f"content of {path.name}"] = _digest(path)
    return inputs


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _digest(path: Path) -> str:
    with reading(path), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def is_done(step: Step) -> bool:
    """Whether the step has a result.

    Raises:
        UserError: the result was made with other inputs than the step has now.
    """
    if not (step.result.exists() and step.record.exists()):
        return False
    recorded = json.loads(read_regular(step.record))
    current = step_inputs(step)
    for key in [*current, *recorded]:  # either may have keys that the other lacks
        before = recorded.get(key, "absent")
        now = current.get(key, "absent")
        if before != now:
            problem = f"{key} was {before} when this file was made and is {now} now"
            fix = f"Set it back, or remove {step.result.parent} to make it again"
            raise UserError(step.result, problem, fix)
    return True


# --- running --------------------------------------------------------------------------------------


def run_steps(steps: Iterable[Step]) -> Outcome:
    """Run the steps without a result, each with its output in a file; continue after a failure.

    Raises:
        UserError: this is not the project's folder, or an output cannot be written.
    """
    if not CONFIGS.is_dir():
        fix = "Run experiments in the checkout, or in a folder that python -m tinylm new made"
        raise UserError(CONFIGS, "not found in this folder", fix)
    failed = []
    child = ChildProgram()
    with forward_signals(child):
        for step in steps:
            try:
                if step.package is not None:
                    require_package(step.package)
            except UserError as error:
                logger.info("%s: left out: %s", step.name, error)
                continue
            try:
                code = None if is_done(step) else _run(step, child)
            except UserError as error:
                failed.append(step.name)
                logger.info("%s: %s", step.name, error)
                continue
            if child.received is not None or code in (130, 143):
                logger.info("%s: stopped; run the same command again to continue", step.name)
                return Outcome(tuple(failed), code or 128 + (child.received or 0))
            if code is None:
                logger.info("%s: already done (%s)", step.name, step.result)
            elif code == 0:
                logger.info("%s: done", step.name)
            else:
                failed.append(step.name)
                logger.info("%s: exit code %d: %s", step.name, code, last_line(step.output))
    return Outcome(tuple(failed))


def _run(step: Step, child: ChildProgram) -> int:
    for path in step.reads:
        if not path.exists():
            raise UserError(path, "not found; another step makes it", "Run that step first")
    with writing(step.output, "--out"):
        step.output.parent.mkdir(parents=True, exist_ok=True)
        # Closed below: OSErrors of the child process are not about this file.
        output = open(step.output, "wb")  # noqa: SIM115
    with output:
        program, *arguments = step.command
        command = [sys.executable, str(app_folder() / program), *arguments]
        code = child.run(command, stdout=output, stderr=subprocess.STDOUT)
    if code == 0:
        write_atomic(step.record, json.dumps(step_inputs(step), indent=1) + "\n", "--out")
    return code


def last_line(path: Path) -> str:
    """The last line of a step's output; of a failed program this is its error."""
    text = read_regular(path).decode(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"
