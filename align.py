"""Alignment from beginning to end: a base model, its fine-tuning, preferences, a verifier; then all of them side by side.

    python align.py --config configs/align-smoke.yaml
    python align.py --config configs/align.yaml

    read       a list of stages, each a config that also runs by itself; what contradicts is found before hours of work  `read_stages`
    run        train.py or finetune.py as a process of its own; a stage that is done is not done again                     `run_stages`
    compare    every model on the same held-out data and the same prompts                                                 `compare`
    report     the table, results.json and report.md                                                                       `write_report`

Each stage resumes exactly, since its program does. What is remembered between the stages is in state.json: the settings of
each, the weights that it began with, and those that it left.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common.console import say
from tinylm.common.errors import UserError, printable, reading
from tinylm.common.files import write_atomic
from tinylm.common.processes import Children, signals_to

if TYPE_CHECKING:
    import numpy as np

    from tinylm.checkpoint.load import Loaded
    from tinylm.config.schema import Config
    from tinylm.model.decoder import Decoder
    from tinylm.model.hf_model import HFModel
    from tinylm.objectives.verifier import VerifierScore

# The stages there are, and the program that each is of.
PROGRAMS = {
    "pretrain": "train.py",
    "sft": "finetune.py",
    "dpo": "finetune.py",
    "verifier": "finetune.py",
}
HERE = Path(__file__).parent
# What the table shows of each model, in this order, and what it is.
MEASURES = {
    "val_ppl": "perplexity of the held-out text of stage pretrain; lower is better",
    "response_loss": "nats a token of the held-out answers of stage sft; lower is better",
    "response_accuracy": "share of the tokens of these answers that are the likeliest one",
    "preference_accuracy": "share of the held-out pairs of stage dpo whose chosen answer is the likelier one",
    "reward_accuracy": "the same of what the model makes of an answer beside its reference, the model that dpo began with",
    "reward_margin": "beta times the mean of that difference between chosen and rejected",
    "verifier_accuracy": "share of the held-out answers of stage verifier that are judged right or wrong as they are",
    "verifier_auc": "probability that a right answer has the higher score of two; one half is chance",
}
SAMPLE_TOKENS = 60
# Exit codes of a stage that ends so again: a mistake, and a loss that diverged.
NOT_BY_ITSELF = (2, 3)


@dataclass(frozen=True)
class Stage:
    """One config of the list."""

    name: str
    """one of PROGRAMS"""
    file: str
    config: "Config"
    overrides: tuple[str, ...]
    model: Path
    """what is compared in the end: what a later stage begins with, else best.ckpt"""

    @property
    def folder(self) -> Path:
        """Where its checkpoints are."""
        return Path(self.config.training.checkpoint_dir)

    @property
    def command(self) -> tuple[str, ...]:
        """What runs it, as a user would."""
        return ("python", PROGRAMS[self.name], "--config", self.file, *self.overrides)

    @property
    def bases(self) -> tuple[str, ...]:
        """The checkpoints that it needs."""
        return bases_of(self.config)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python align.py",
        usage="python align.py --config configs/align-smoke.yaml [section.key=value ...]",
        description="Run all stages of alignment and compare their models. The same command again goes on where it stopped.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        help="YAML file: a list of stages, each with stage and config",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that win over the configs of all stages",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for state.json, results.json and report.md (checkpoints/ and the name of the config)",
    )
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Run what is not done yet, compare, report."""
    from tinylm.checkpoint.format import lock_run_dir

    stages = read_stages(args.config, args.overrides)
    out = args.out or Path("checkpoints") / args.config.stem
    for stage in stages:
        if stage.folder.resolve() == out.resolve():
            raise UserError(
                f"--out: {printable(out)} is training.checkpoint_dir of {printable(stage.file)}. Choose another --out."
            )
    with lock_run_dir(out, "--out"):
        state = State.read(out / "state.json")
        children = Children()
        with signals_to(children):
            code = run_stages(stages, state, children)
        if code:
            return code
        made_from = state.digest(stage.name for stage in stages)
        results = known_results(out, made_from)
        if results is None:
            results = compare(stages) | {"made_from": made_from}
            write_results(out, results, stages)
    show(results, stages)
    print(f"report: {printable(out / 'report.md')}")
    return 0


# --- the list ---------------------------------------------------------------------------------------------------------


def read_stages(path: Path, overrides: Sequence[str] = ()) -> list[Stage]:
    """The stages of a YAML list, with `overrides` for each, checked against each other.

    Raises:
        UserError: naming the file, the line and what is wrong; or as `load_config` of a stage's config.
    """
    from tinylm.config.loader import load_config
    from tinylm.config.yaml_file import read_list

    stages: dict[str, Stage] = {}
    for place, item in read_list(path):
        for key in ("stage", "config"):
            if not isinstance(item.get(key), str):
                raise UserError(
                    f"{place}: {key}: expected text, found {printable(item.get(key, 'nothing'))}. Each stage has stage and config."
                )
        if unknown := item.keys() - {"stage", "config"}:
            raise UserError(
                f"{place}: {printable(min(unknown))}: no such key. A stage has stage and config; settings stand in the config."
            )
        name, config = item["stage"], load_config(item["config"], overrides)
        if name not in PROGRAMS:
            raise UserError(
                f"{place}: stage: {printable(name)}: no such stage. There are {', '.join(PROGRAMS)}."
            )
        if name in stages:
            raise UserError(f"{place}: stage: {name} stands above already. Each stage comes once.")
        check_kind(name, config, f"{place}: {printable(item['config'])}", overrides)
        stages[name] = Stage(
            name,
            item["config"],
            config,
            tuple(overrides),
            Path(config.training.checkpoint_dir) / "best.ckpt",
        )
    check_chain(list(stages.values()))
    return [begun_with(stage, stages.values()) for stage in stages.values()]


def check_kind(name: str, config: "Config", place: str, overrides: Sequence[str]) -> None:
    """Refuse a config that is another stage's, or that its program would refuse when its turn comes."""
    from training.support import require_supported

    for section, there in (
        ("dpo", config.dpo is not None),
        ("verifier", config.verifier is not None),
    ):
        if there == (name == section):
            continue
        mend = "Give another config, or another stage"
        if any(override.startswith(f"{section}.") for override in overrides):
            mend = "Settings on the command line are for every stage: put this one into the config of its stage"
        problem = "has no" if name == section else "has a"
        raise UserError(
            f"{place}: {problem} {section} section, and is given as stage {name}. {mend}."
        )
    if name in ("sft", "dpo"):
        try:
            require_supported(name, config)
        except UserError as error:
            raise error.within(place) from None


def check_chain(stages: list[Stage]) -> None:
    """Refuse stages that would write over each other, and one that begins with what is not there when its turn comes.

    Raises:
        UserError: naming the stage and the setting.
    """
    for number, stage in enumerate(stages):
        for other in stages[:number]:
            if other.folder.resolve() == stage.folder.resolve():
                raise UserError(
                    f"{printable(stage.file)}: training.checkpoint_dir: {printable(stage.folder)} is that of {other.name} too. Give each its own."
                )
        before, after = stages[:number], stages[number:]
        check_base(stage, before)
        for base in stage.bases:
            if any(lies_in(base, other) for other in before):
                continue
            if any(lies_in(base, other) for other in after):
                raise UserError(
                    f"{printable(stage.file)}: {printable(base)} comes from this stage or a later one. Put the stages in another order."
                )
            if not os.path.exists(base):
                found = (
                    f"{printable(base)}: not found, and no stage before {stage.name} writes there"
                )
                raise UserError(f"{printable(stage.file)}: {found}. Add the stage that does.")


def check_base(stage: Stage, before: list[Stage]) -> None:
    """Refuse to begin with a model that a stage cannot begin with, or that cannot be compared.

    Raises:
        UserError: naming the stage and the model.
    """
    from tinylm.common.hub import HF_PREFIX
    from tinylm.model.hf_files import find_hf_model

    base = stage.config.training.init_from
    if base is None:
        return
    where = f"{printable(stage.file)}: training.init_from"
    begins = f"{where}: {printable(base)}"
    try:
        answers_only = (
            base.startswith(HF_PREFIX)
            and find_hf_model(base.removeprefix(HF_PREFIX)).config.is_encoder_decoder
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if answers_only:
        raise UserError(
            f"{begins} is an encoder-decoder, which predicts no plain text to be compared by. Run finetune.py by itself, or choose another model."
        )
    for other in before:
        if other.config.lora is not None and lies_in(base, other):
            adapter = f"is an adapter, since {printable(other.file)} has a lora section, and stage {stage.name} begins with a whole model"
            raise UserError(
                f"{begins} {adapter}. Take the section out there, and give one to the last stage if memory is short."
            )


def lies_in(base: str, stage: Stage) -> bool:
    """Whether a model is one of the stage's checkpoints."""
    return Path(base).parent.resolve() == stage.folder.resolve()


def bases_of(config: "Config") -> tuple[str, ...]:
    """The checkpoints that a run with these settings needs; a Hugging Face model is none."""
    from tinylm.common.hub import HF_PREFIX

    sampled_from = None if config.verifier is None else config.verifier.sampled_from
    return tuple(
        name
        for name in (config.training.init_from, sampled_from)
        if name is not None and not name.startswith(HF_PREFIX)
    )


def begun_with(stage: Stage, stages: Iterable[Stage]) -> Stage:
    """The stage, with the model that a later stage takes from it, if one does."""
    taken = [base for other in stages for base in other.bases if lies_in(base, stage)]
    return replace(stage, model=Path(taken[0])) if taken else stage


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What is remembered of a stage that was begun."""

    settings: dict[str, Any]
    bases: dict[str, str]
    """fingerprints of the weights that it began with, by the name of their file"""
    result: str | None
    """fingerprint of the weights that it left; None while it is not finished"""


class State:
    """state.json: what was begun and done, written whole or not at all."""

    def __init__(self, path: Path, stages: dict[str, Done]):
        self.path, self.stages = path, stages

    @classmethod
    def read(cls, path: Path) -> "State":
        """The state in a file; an empty one where there is none.

        Raises:
            UserError: the file is not one that `put` wrote.
        """
        if not path.exists():
            return cls(path, {})
        try:
            with reading(path):
                return cls(
                    path,
                    {
                        name: Done(**done)
                        for name, done in json.loads(path.read_text(encoding="utf-8")).items()
                    },
                )
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f"{printable(path)}: not what align.py wrote. Delete it: finished stages are found again by their checkpoints."
            ) from None

    def put(self, name: str, done: Done) -> None:
        """Remember a stage."""
        self.stages[name] = done
        write_atomic(self.path, self._text(self.stages), "--out")

    def digest(self, names: Iterable[str]) -> str:
        """What a comparison of these stages is made from; the file may also know of stages that were in the list before."""
        return hashlib.sha256(self._text(names).encode()).hexdigest()

    def _text(self, names: Iterable[str]) -> str:
        return json.dumps({name: vars(self.stages[name]) for name in names}, indent=2) + "\n"


def run_stages(stages: list[Stage], state: State, children: Children) -> int:
    """Run each stage that is not done; the exit code of the one that failed comes back, or 0.

    Raises:
        UserError: as `is_done`; or a stage is complete, and the model that was to be taken from it is lost.
    """
    from tinylm.checkpoint.format import candidates

    for number, stage in enumerate(stages, start=1):
        if children.received is not None:
            break
        title = f"stage {number} of {len(stages)}, {stage.name}"
        begun = Done(
            stage.config.to_plain(), {base: fingerprint(base) for base in stage.bases}, None
        )
        if is_done(stage, begun, state):
            say(f"{title}: done before ({printable(stage.model)})")
            continue
        if stage.name not in state.stages and begun.bases and candidates(stage.folder):
            bases = " and ".join(map(printable, begun.bases))
            say(
                f"note: {printable(stage.folder)} has checkpoints from before: that they began with {bases} as it is now, is taken for granted"
            )
        state.put(stage.name, begun)
        say(f"{title}: {' '.join(stage.command)}")
        code = children.run(
            [sys.executable, str(HERE / PROGRAMS[stage.name]), *stage.command[2:]],
            stdout=2,
            stderr=None,
        )
        if code:
            when = "once that is mended, " if code in NOT_BY_ITSELF else ""
            say(
                f"{title}: ended with exit code {code}. What it saved stays; {when}the same command goes on there"
            )
            return code
        if not stage.model.exists():
            lost = f"{printable(stage.model)}: not there, though stage {stage.name} is complete"
            raise UserError(
                f"{lost}. Put it back, or remove {printable(stage.folder)}, and the stage is run again."
            )
        state.put(stage.name, Done(begun.settings, begun.bases, fingerprint(str(stage.model))))
    if children.received is not None:
        say(
            f"stopped by signal {children.received} between two stages; the same command goes on there"
        )
        return 128 + children.received
    return 0


def is_done(stage: Stage, begun: Done, state: State) -> bool:
    """Whether a stage was finished with these settings, from these weights, and what it left is still there.

    Raises:
        UserError: it has begun with other weights than those that are there now.
    """
    from tinylm.checkpoint.format import candidates

    known = state.stages.get(stage.name)
    if known is None or not candidates(stage.folder):
        return False
    for base, now in begun.bases.items():
        if known.bases.get(base, now) != now:
            found = f"{printable(base)} has weights {now} now, and had {known.bases[base]} when stage {stage.name} began with it"
            raise UserError(
                f"{found}. Put it back, or remove {printable(stage.folder)}, and the stage is run again."
            )
    if known.settings != begun.settings or known.bases != begun.bases or known.result is None:
        return False
    return stage.model.exists() and fingerprint(str(stage.model)) == known.result


def fingerprint(path: str) -> str:
    """What identifies the weights of a checkpoint."""
    from tinylm.checkpoint.initial import weights_fingerprint

    return weights_fingerprint(Path(path))


# --- side by side -----------------------------------------------------------------------------------------------------


def known_results(out: Path, made_from: str) -> dict[str, Any] | None:
    """The results in results.json, if they are of the stages and weights that are there now."""
    path = out / "results.json"
    if not path.exists():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results if results["made_from"] == made_from else None
    except (ValueError, TypeError, KeyError):  # cut off, or not what was written: it is made again
        return None


def compare(stages: list[Stage]) -> dict[str, Any]:
    """`models`: a row of MEASURES for each stage; `samples`: what each model writes on each prompt, likeliest token by token."""
    from tinylm.checkpoint.initial import open_initial_model
    from tinylm.checkpoint.load import load_model
    from tinylm.common.device import pick_device

    models: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    log_probs: dict[str, np.ndarray] = {}
    for stage in stages:
        device, _ = pick_device(stage.config.hardware.accelerator, key="hardware.accelerator")
        path = stage.model
        say(f"compare: {printable(path)}")
        row: dict[str, Any] = {"stage": stage.name, "checkpoint": str(path)}
        if stage.name == "verifier":
            row |= measures_of_verifier(stage, path, device)
        else:
            loaded = load_model(path, device)
            row |= {"tokenizer": loaded.tokenizer.fingerprint} | measures_of_text(loaded, stages)
            log_probs[str(path)] = preferences_of(loaded, loaded.model, stages)
            if (reference := reference_of(stage)) is not None and reference not in log_probs:
                base = open_initial_model(reference)
                log_probs[reference] = preferences_of(
                    loaded, base.build(base.model).to(device), stages
                )
            row |= measures_of_preferences(stage, log_probs, str(path))
            samples += [
                {"stage": stage.name, "prompt": prompt, "text": sample(loaded, prompt)}
                for prompt in prompts_of(stages)
            ]
        models.append(row)
    return {"models": models, "samples": samples}


def prompts_of(stages: list[Stage]) -> list[str]:
    """The sample prompts of all stages."""
    return list(
        dict.fromkeys(
            stage.config.training.sample_prompt
            for stage in stages
            if stage.config.training.sample_prompt is not None
        )
    )


def data_of(name: str, stages: list[Stage]) -> "Config | None":
    """The settings of a stage, all of its validation data wanted; None where there is no such stage."""
    from training.stages.sft import with_data_of_task

    found = [stage.config for stage in stages if stage.name == name]
    if not found:
        return None
    config = with_data_of_task(found[0])
    return config.model_copy(
        update={"training": config.training.model_copy(update={"val_batches": None})}
    )


def measures_of_text(loaded: "Loaded", stages: list[Stage]) -> dict[str, Any]:
    """On the text of stage pretrain, in its rows, and on the answers of stage sft."""
    from tinylm.eval.validation import answer_validation, score_checkpoint, text_validation

    row: dict[str, Any] = {}
    tokenizer = loaded.tokenizer
    if (config := data_of("pretrain", stages)) is not None:
        data = text_validation(config, loaded, tokenizer, seq_len=config.training.seq_len)
        row["val_ppl"] = score_checkpoint(loaded, tokenizer, data.batches).perplexity
    if (config := data_of("sft", stages)) is not None:
        data = answer_validation(config, loaded, tokenizer)
        score = score_checkpoint(loaded, tokenizer, data.batches)
        row |= {"response_loss": score.loss, "response_accuracy": score.accuracy}
    return row


def reference_of(stage: Stage) -> str | None:
    """The model that preferences were held to; None in another stage."""
    begun_with = stage.config.training.init_from
    return None if stage.config.dpo is None or begun_with is None else str(Path(begun_with))


def preferences_of(
    loaded: "Loaded", model: "Decoder | HFModel", stages: list[Stage]
) -> "np.ndarray":
    """(n, 2): log p under `model` of the chosen and the rejected answer of every held-out pair of stage dpo; no rows where there is no such stage.

    The tokens and the precision are those of `loaded`.
    """
    import numpy as np

    from tinylm.common.device import autocast_dtype
    from training.stages.dpo import PreferenceData
    from training.stages.reference_log_probs import pair_log_probs

    config = data_of("dpo", stages)
    if config is None:
        return np.empty((0, 2))
    data = PreferenceData(config, loaded.tokenizer)
    data.prepare()
    return pair_log_probs(
        model, data.val_dataloader(), autocast_dtype(loaded.config.hardware.precision)
    )


def measures_of_preferences(
    stage: Stage, log_probs: "dict[str, np.ndarray]", path: str
) -> dict[str, Any]:
    """Which answers a model prefers by itself and, if preferences were learned, beside the model that this began with."""
    row: dict[str, Any] = {}
    own = log_probs[path]
    if not len(own):
        return row
    row["preference_accuracy"] = float((own[:, 0] > own[:, 1]).mean())
    row["n_pairs"] = len(own)
    if stage.config.dpo is not None and (reference := reference_of(stage)) is not None:
        margin = (own - log_probs[reference]) @ (1, -1)
        row |= {
            "reward_accuracy": float((margin > 0).mean()),
            "reward_margin": float(stage.config.dpo.beta * margin.mean()),
        }
    return row


def measures_of_verifier(stage: Stage, path: Path, device: str) -> dict[str, Any]:
    """On the problems of its own validation split."""
    score = verifier_score(stage, path, device)
    low, high = score.interval
    row = {
        "verifier_accuracy": score.accuracy,
        "verifier_auc": score.auc,
        "verifier_low": low,
        "verifier_high": high,
    }
    return row | {"majority": score.majority, "n_answers": score.n}


def verifier_score(stage: Stage, path: Path, device: str) -> "VerifierScore":
    """The verifier's score on every held-out answer."""
    import numpy as np
    import torch

    from tinylm.checkpoint.load import load_verifier
    from tinylm.objectives.verifier import VerifierScore
    from training.context import RunContext
    from training.stages.verifier import prepare_data

    config = data_of("verifier", [stage])
    assert config is not None
    loaded = load_verifier(path, device)
    data = prepare_data(RunContext("verifier", config, device), loaded.tokenizer)
    probabilities, right = [], []
    with torch.inference_mode():
        for batch in data.val_dataloader():
            logits = loaded.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            probabilities.append(torch.sigmoid(logits.float()).cpu().numpy())
            right.append(batch["label"].numpy())
    return VerifierScore.of(np.concatenate(probabilities), np.concatenate(right))


def sample(loaded: "Loaded", prompt: str) -> str:
    """What the model writes on a prompt, in its template if it was taught one, as infer.py does."""
    from tinylm.config.schema import SamplingConfig
    from tinylm.generate.chat import format_prompt
    from tinylm.generate.engine import Engine
    from tinylm.rows.template_factory import make_template

    engine = Engine(loaded.model, loaded.tokenizer)
    template = None if loaded.template is None else make_template(loaded.template, loaded.tokenizer)
    formatted = format_prompt(engine, prompt, template)
    return engine.generate(
        formatted.prompt,
        SamplingConfig(max_new_tokens=SAMPLE_TOKENS, temperature=0),
        stop_ids=formatted.stop_ids,
    )[0].text


def silently(line: str) -> None:
    """Say nothing: the stage's own run has said it."""


# --- the report -------------------------------------------------------------------------------------------------------


def measures_in(results: dict[str, Any]) -> list[str]:
    """The measures that any model has."""
    return [name for name in MEASURES if any(name in row for row in results["models"])]


def notes_on(results: dict[str, Any]) -> Iterator[str]:
    """What keeps numbers of the table from being compared."""
    if len({row["tokenizer"] for row in results["models"] if "tokenizer" in row}) > 1:
        yield "note: these models have different tokenizers: val_ppl, response_loss and response_accuracy are by the token, and say nothing between two of them"


def show(results: dict[str, Any], stages: list[Stage]) -> None:
    """Print the table and the samples."""
    from tinylm.cli.results import print_rows

    models = results["models"]
    print_rows(
        [
            {"measure": name, **{row["stage"]: row.get(name) for row in models}}
            for name in measures_in(results)
        ]
    )
    for note in notes_on(results):
        print(note)
    for prompt in prompts_of(stages):
        print(f"\n{printable(prompt)}")
        for found in results["samples"]:
            if found["prompt"] == prompt:
                print(f"  {found['stage']:>8}: {printable(found['text'].strip())}")
    print()


def write_results(out: Path, results: dict[str, Any], stages: list[Stage]) -> None:
    """results.json for programs, report.md for people."""
    write_atomic(
        out / "report.md", "".join(f"{line}\n" for line in write_report(results, stages)), "--out"
    )
    write_atomic(
        out / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n", "--out"
    )


def write_report(results: dict[str, Any], stages: list[Stage]) -> Iterator[str]:
    """The lines of the report."""
    models = results["models"]
    yield "# Stages side by side\n"
    for stage, row in zip(stages, models, strict=True):
        yield f"- {stage.name}: `{' '.join(stage.command)}` wrote {printable(row['checkpoint'])}"
    yield f"\n| | {' | '.join(row['stage'] for row in models)} |"
    yield f"|---|{'---:|' * len(models)}"
    for name in measures_in(results):
        yield f"| {name} | {' | '.join('-' if row.get(name) is None else f'{row[name]:.4f}' for row in models)} |"
    yield "\nAll models on the same held-out data:\n"
    for name in measures_in(results):
        yield f"- {name}: {MEASURES[name]}"
    for note in notes_on(results):
        yield f"\n{note}"
    for row in models:
        if row["stage"] == "dpo":
            yield f"\n{row['n_pairs']} pairs of answers were held out."
        if row["stage"] == "verifier":
            interval = f"95% interval of its accuracy {row['verifier_low']:.3f} to {row['verifier_high']:.3f}"
            yield f"\nThe verifier judged {row['n_answers']} held-out answers: {interval}; always saying the same gives {row['majority']:.3f}."
    if not results["samples"]:
        return
    yield "\n## The same prompts\n"
    yield f"The likeliest token each time, at most {SAMPLE_TOKENS}; the base continues the bare prompt, the others are asked in their template."
    for prompt in prompts_of(stages):
        yield f"\n**{printable(prompt)}**\n"
        for found in results["samples"]:
            if found["prompt"] == prompt:
                yield f"- {found['stage']}: {printable(found['text'].strip()) or '(nothing)'}"


if __name__ == "__main__":
    sys.exit(main())
