"""Pretraining: a config in, checkpoints out.

    python train.py --config config_smoke.yaml
    python train.py --config config.yaml training.max_steps=1000 hardware.precision=bf16

Run the same command again after a crash and it goes on where it was, to the last bit. `run_stage` and what it calls serve
finetune.py too.
"""

import argparse
import logging
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common import console
from tinylm.common.errors import UserError, printable
from tinylm.common.units import duration, short

if TYPE_CHECKING:
    import lightning as L

    from data import PretrainData, RunData
    from model import LitStage
    from tinylm.checkpoint.initial import InitialModel
    from tinylm.config.schema import Config
    from tinylm.model.decoder import Decoder
    from tinylm.model.hf_model import HFModel
    from tinylm.tokenizer.base import Tokenizer

# Settings that may differ when a run is resumed: they decide how long it runs and what is written, not what a step computes.
FREE_ON_RESUME = {
    "data.num_workers", "data.cache_dir", "data.dataset", "data.mix", "data.val_dataset", "tokenizer.path",
    "verifier.sampled_from",  # the content of these is compared
    "training.max_steps", "training.val_every_steps", "training.val_batches", "training.early_stopping_patience",
    "training.log_every_steps", "training.save_every_steps", "training.keep_last", "training.checkpoint_dir", "training.log_dir",
    "training.run_name", "training.loggers", "training.sample_prompt", "training.auto_resume", "training.init_from",
    "model.gradient_checkpointing", "hardware.accelerator", "hardware.devices", "hardware.num_nodes", "hardware.strategy",
    "hardware.compile", "hardware.threads",
}  # fmt: skip

SHOW_ROWS = "print the first N rows as training sees them: the text, where documents meet, which tokens are targets"
# For a small model they are more than enough: a batch is learnt in one or two hundred.
OVERFIT_STEPS = 300


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line of train.py."""
    parser = make_parser(
        "train.py",
        "config.yaml",
        "Pretrain a model. The same command again goes on from the newest checkpoint.",
    )
    before = parser.add_argument_group(
        "before a run", "nothing is trained for keeps, nothing saved"
    ).add_mutually_exclusive_group()
    before.add_argument(
        "--plan",
        action="store_true",
        help="what the run will cost: work, memory by part, time; exit code 2 where it does not fit",
    )
    overfit = f"train on micro-batch 0 alone, at most so many steps (default: {OVERFIT_STEPS}); exit code 3 where its loss does not go to nearly zero"
    before.add_argument(
        "--overfit-one-batch",
        nargs="?",
        type=number_of_steps,
        const=OVERFIT_STEPS,
        metavar="STEPS",
        help=overfit,
    )
    before.add_argument(
        "--find-lr",
        action="store_true",
        help="raise the learning rate until the loss rises too, and suggest one",
    )
    before.add_argument(
        "--find-batch-size",
        action="store_true",
        help="the largest micro-batch that fits, and the speed of each size",
    )
    before.add_argument("--show-rows", type=int, metavar="N", help=SHOW_ROWS)
    return parser.parse_intermixed_args(argv)


def number_of_steps(text: str) -> int:
    """The number behind --overfit-one-batch, which may be left out; but what stands there then must not be a setting."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"{text} is no number of steps. Write settings before the flag, or a number of steps behind it"
        )
    return int(text)


def make_parser(program: str, config: str, description: str) -> Parser:
    """The command line that every training program has; settings may stand between flags (`parse_intermixed_args`)."""
    parser = Parser(
        prog=f"python {program}",
        usage=f"python {program} --config {config} [section.key=value ...]",
        description=description,
        epilog="Every setting: docs/CONFIG_REFERENCE.md. Exit codes: 0 done, 2 a mistake to mend, 3 diverged, 130/143 stopped after saving.",
    )
    parser.add_argument("--config", required=True, help="YAML file with the settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        metavar="PATH",
        type=Path,
        help="go on from this checkpoint instead of the newest",
    )
    start.add_argument(
        "--no-resume",
        action="store_true",
        help="start anew; needs a checkpoint folder without checkpoints",
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="resume although data, tokenizer or settings differ from the checkpoint's",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Pretrain as the command line says."""
    from tinylm.config.loader import load_config

    config = load_config(args.config, args.overrides)
    if config.dpo is not None:
        raise UserError(
            "dpo: preferences are learned by finetune.py. Run that program, or take the dpo section out."
        )
    if config.verifier is not None:
        raise UserError(
            "verifier: a verifier is trained by finetune.py. Run that program, or take the verifier section out."
        )
    if args.show_rows is not None:
        return show_first_rows(config, args.show_rows, training_corpus, learn_from_documents)
    if args.plan or args.find_lr or args.find_batch_size or args.overfit_one_batch is not None:
        return run_before(config, args)
    return run_stage("pretrain", config, args, open_corpus)


def run_before(config: "Config", args: argparse.Namespace) -> int:
    """Look at a run that has not begun, with the model that it would begin with."""
    from training.preflight import Rehearsal, rehearse

    say = speaker()
    device = choose_device(config, say)
    if config.lora is not None:
        raise UserError(
            "lora: adapters are not planned, and not tried. Take the lora section out, and the numbers are those of training every weight."
        )
    base = find_base(config, Start())
    if base is not None and base.is_hf:
        raise UserError(
            "training.init_from: a Hugging Face model is not planned, and not tried. Leave it out."
        )
    config = config if base is None else settings_on_base(config, base)
    tokenizer = partial(prepare_tokenizer, config, Start(), base, learn_from_documents)
    made = Rehearsal(
        config, device, say, tokenizer, lambda config: begin_weights(config, Start(), base)
    )
    return rehearse(made, args)


@dataclass(frozen=True)
class Start:
    """What a run begins with: nothing, or its own checkpoint."""

    path: Path | None = None
    payload: dict[str, Any] | None = None


Say = Callable[[str], None]
OpenData = Callable[["Config", "Tokenizer", Say], "RunData"]


@dataclass(frozen=True)
class Parts:
    """What a stage is built of."""

    stage: str
    config: "Config"
    data: "RunData"
    start: Start
    base: "InitialModel | None"
    device: str
    say: Say


def run_stage(
    stage: str,
    config: "Config",
    args: argparse.Namespace,
    open_data: OpenData,
    build: "Callable[[Parts], LitStage] | None" = None,
    learn: "Callable[[Config], Tokenizer] | None" = None,
) -> int:
    """Say what will be done, train, say where the result is: what train.py and finetune.py do alike.

    Args:
        stage: the name that checkpoints and metrics have it under.
        open_data: makes and prepares the data module, and says what is in it.
        build: makes what is trained; None: a language model.
        learn: makes the tokenizer of a run that begins with new weights; None: from the training documents.
    """
    say = speaker()
    device = choose_device(config, say)
    folder = Path(config.training.checkpoint_dir)
    with claim(folder, "training.checkpoint_dir"), claim(log_folder(config), "training.run_name"):
        start = find_start(folder, args, config, say)
        if start.payload is not None:
            check_stage(start, stage)
            config = settings_of_resumed(config, start.payload)
            check_same_settings(start, config, say, allow_changes=args.allow_changes)
        complete = start.payload is not None and is_complete(start.payload, config)
        if start.payload is not None and args.resume is None:
            finish_names(start.path, start.payload, final=complete)
        if complete:
            say(f"already complete at step {start.payload['step']}: {start.path}")
            print(printable(start.path))
            say(next_command(stage, start.path))
            return 0
        base = find_base(config, start)
        if base is not None and start.payload is None:
            config = settings_on_base(config, base)
        tokenizer, config = prepare_tokenizer(config, start, base, learn or learn_from_documents)
        data = open_data(config, tokenizer, say)
        if start.payload is not None:
            check_same_data(start, data, say, allow_changes=args.allow_changes)
        check_sample_prompt(config, tokenizer)
        made = (build or build_language_model)(Parts(stage, config, data, start, base, device, say))
        return fit(made, data, device, start, say)


def choose_device(config: "Config", say: Say) -> str:
    """The device of a run, checked, said, and given its threads."""
    from tinylm.common.device import pick_device

    device, why = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    check_hardware(config, device)
    say(f"device: {device} ({why}), precision {config.hardware.precision}")
    set_threads(config.hardware.threads)
    return device


def open_corpus(config: "Config", tokenizer: "Tokenizer", say: Say) -> "PretrainData":
    """The data of a pretraining run."""
    from data import PretrainData

    data = PretrainData(config, tokenizer)
    with console.progress_bar() as progress:
        data.prepare(progress)
    say(describe_data(data))
    check_documents(data, say)
    return data


def training_corpus(config: "Config", tokenizer: "Tokenizer") -> "PretrainData":
    """The training data of a pretraining run, without its validation data."""
    from data import PretrainData

    data = PretrainData(config, tokenizer)
    data.prepare(validation=False)
    return data


def show_first_rows(
    config: "Config",
    n_rows: int,
    open_data: "Callable[[Config, Tokenizer], RunData]",
    learn: "Callable[[Config], Tokenizer]",
) -> int:
    """Print the first rows of the run that `config` describes."""
    from training.show_rows import show_rows

    # A worker process would take longer to start than a few rows take to read.
    data = config.data.model_copy(update={"num_workers": 0})
    config = config.model_copy(update={"data": data})
    base = find_base(config, Start())
    if base is not None:
        config = settings_on_base(config, base)
    tokenizer, config = prepare_tokenizer(config, Start(), base, learn)
    show_rows(open_data(config, tokenizer), n_rows)
    return 0


# --- where a run starts -----------------------------------------------------------------------------------------------


def find_start(folder: Path, args: argparse.Namespace, config: "Config", say: Say) -> Start:
    """The checkpoint to go on from, if there is one and it is wished."""
    from tinylm.checkpoint import format as checkpoint_format

    if args.resume is not None:
        payload = resumable(args.resume)
        newer = [
            path
            for path in checkpoint_format.candidates(folder)
            if checkpoint_format.step_of(path) > payload["step"]
        ]
        if newer:
            found = f"{printable(newer[0])} is newer than step {payload['step']}, where --resume goes on"
            raise UserError(
                f"{found}. Choose another training.checkpoint_dir, so that both branches stay, or remove the newer checkpoints."
            )
        return Start(args.resume, payload)
    if config.training.auto_resume and not args.no_resume:
        path = checkpoint_format.latest_valid(folder, lambda error: say(f"passed over: {error}"))
        return Start() if path is None else Start(path, resumable(path))
    found = checkpoint_format.candidates(folder)
    if found:
        raise UserError(
            f"{printable(folder)}: holds checkpoints already (newest {found[0].name}). Resume, or choose another training.checkpoint_dir."
        )
    return Start()


def resumable(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint that a run can go on from.

    Raises:
        UserError: it was imported, so there is no run to go on with.
    """
    from tinylm.checkpoint import format as checkpoint_format

    payload = checkpoint_format.read(path)
    if "optimizer" not in payload:
        mend = f"Start a run from its weights with training.init_from={printable(path)}, and another training.checkpoint_dir"
        raise UserError(
            f"{printable(path)}: an imported model, and not a run that can go on. {mend}."
        )
    return payload


def check_stage(start: Start, stage: str) -> None:
    """Refuse to go on with another stage's run."""
    assert start.payload is not None
    found = start.payload["stage"]
    if found != stage:
        holds = f"a run of stage {printable(found)}, and this run is of stage {stage}"
        raise UserError(
            f"{printable(start.path)}: {holds}. Choose another training.checkpoint_dir; to begin with its weights, set training.init_from to it."
        )


def finish_names(path: Path | None, payload: dict[str, Any], *, final: bool) -> None:
    """Give the newest checkpoint the names that a run killed between saving and naming it still owed it."""
    from model import Progress
    from tinylm.checkpoint import format as checkpoint_format
    from training.callbacks import names_due

    assert path is not None
    for name in names_due(Progress(**payload["progress"]), final=final):
        target = path.with_name(name)
        if not target.exists() or not target.samefile(path):
            checkpoint_format.link(path, name)


def is_complete(payload: dict[str, Any], config: "Config") -> bool:
    """Whether there is nothing left to train: all steps are done, or the run had stopped early."""
    from tinylm.optim.schedule import should_stop

    losses = [loss for _, loss in payload["progress"]["validations"]]
    return payload["step"] >= config.training.max_steps or should_stop(
        losses, config.training.early_stopping_patience
    )


def check_same_settings(start: Start, config: "Config", say: Say, *, allow_changes: bool) -> None:
    """Compare the settings with those that the checkpoint was made with; raises as `refuse_changes` does."""
    assert start.payload is not None
    processes = config.hardware.devices * config.hardware.num_nodes
    now = config.to_plain()
    if (
        now["model"]["vocab_size"] is None
    ):  # as large as the tokenizer, which is compared by its content
        now["model"]["vocab_size"] = start.payload["config"]["model"]["vocab_size"]
    changes = changed_settings(start.payload["config"], now) + [
        ("number of processes", start.payload["world_size"], processes)
    ]
    refuse_changes(start, changes, say, allow_changes=allow_changes)


def check_same_data(start: Start, data: "PretrainData", say: Say, *, allow_changes: bool) -> None:
    """Compare tokenizer and data with those that the checkpoint was made with; raises as `refuse_changes` does."""
    from tinylm.tokens.mixture import name_of

    assert start.payload is not None
    changes = [("tokenizer", _tokenizer_of(start.payload).fingerprint, data.tokenizer.fingerprint)]
    source = name_of(data.config.data)
    changes += [
        (f"{which} data ({source})", start.payload["data"][which], found)
        for which, found in data.fingerprints().items()
    ]
    refuse_changes(start, changes, say, allow_changes=allow_changes)


def refuse_changes(
    start: Start, compared: list[tuple[str, Any, Any]], say: Say, *, allow_changes: bool
) -> None:
    """Refuse to resume with what would not be the same run; what is allowed is said.

    Args:
        compared: (name, value in the checkpoint, value now).

    Raises:
        UserError: naming the checkpoint, both values, and the flag that overrides.
    """
    differences = [(name, was, now) for name, was, now in compared if was != now]
    # Weights of another shape or meaning or for other tokens, and another optimizer's state, cannot be used at all.
    fatal = [
        difference
        for difference in differences
        if difference[0].startswith(("model.", "tokenizer", "training.optimizer", "lora"))
    ]
    if fatal or (differences and not allow_changes):
        name, was, now = (fatal or differences)[0]
        mend = "Set it back, or choose another training.checkpoint_dir"
        if not fatal:
            mend = "Set it back, choose another training.checkpoint_dir, or pass --allow-changes to go on all the same"
        raise UserError(
            f"{printable(start.path)}: {name} was {printable(was)} when it was saved, this run has {printable(now)}. {mend}."
        )
    for name, was, now in differences:
        say(f"allowed: {name} was {printable(was)} and is {printable(now)}")


def changed_settings(
    was: dict[str, Any], now: dict[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of each setting that differs and may not, `sampling` left out."""
    changes = []
    for key, value in now.items():
        dotted = f"{prefix}{key}"
        if dotted == "sampling" or dotted in FREE_ON_RESUME:
            continue
        old = was.get(
            key
        )  # a setting that did not exist when the checkpoint was written counts as None
        if isinstance(value, dict) and isinstance(old, dict):
            changes += changed_settings(old, value, f"{dotted}.")
        elif value != old:
            changes.append((dotted, old, value))
    return changes


def _tokenizer_of(payload: dict[str, Any]) -> "Tokenizer":
    from tinylm.tokenizer.factory import tokenizer_from_plain

    return tokenizer_from_plain(payload["tokenizer"])


# --- what a run is made of --------------------------------------------------------------------------------------------


def settings_of_resumed(config: "Config", payload: dict[str, Any]) -> "Config":
    """The settings of a resumed run that had begun from a trained model: where they say nothing of the model, its own."""
    from tinylm.config.loader import with_model
    from tinylm.config.schema import Config

    if config.training.init_from is None:
        return config
    was = Config.from_plain(payload["config"])
    return with_model(config, was.model, was.tokenizer)


def find_base(config: "Config", start: Start) -> "InitialModel | None":
    """The model that training.init_from names, where a run needs it: to begin, under its adapters, or as the reference of preferences."""
    from tinylm.checkpoint.initial import open_initial_model

    if config.training.init_from is None and config.lora is not None:
        raise UserError(
            "lora: adapters belong to a trained model. Set training.init_from, or take the lora section out."
        )
    if config.training.init_from is None or (
        start.payload is not None and config.lora is None and config.dpo is None
    ):
        return None
    try:
        return open_initial_model(config.training.init_from)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from None


# Settings of a trained model that another run may choose anew: they have no weights, and count in training only.
FREE_ON_BASE = {"attention_dropout", "residual_dropout", "gradient_checkpointing"}


def settings_on_base(config: "Config", base: "InitialModel") -> "Config":
    """The settings of a run that begins from `base`: the model is the base's, and what is written of it must say the same.

    Raises:
        UserError: naming the setting and both values.
    """
    theirs = dict(base.model)
    free = (
        {"gradient_checkpointing"} if base.is_hf else FREE_ON_BASE
    )  # a Hugging Face model has dropouts of its own
    for name, value in config.model:
        if (
            name in config.model.model_fields_set - free
            and value is not None
            and value != theirs[name]
        ):
            found = f"{printable(value)}, and the model of training.init_from ({printable(base.name)}) has {printable(theirs[name])}"
            raise UserError(
                f"model.{name}: {found}. Take it out: the model is the one that is begun from."
            )
    if config.training.seq_len > base.model.max_seq_len:
        found = f"{config.training.seq_len}, and the model of training.init_from ({printable(base.name)}) has {base.model.max_seq_len} positions"
        raise UserError(f"training.seq_len: {found}. Lower training.seq_len.")
    from tinylm.config.loader import with_model

    return with_model(config, base.model, base.tokenizer_config)


def learn_from_documents(config: "Config") -> "Tokenizer":
    """The tokenizer of a run that begins with new weights."""
    from training.tokenizer import tokenizer_for

    with console.progress_bar() as progress:
        tokenizer = tokenizer_for(
            config.tokenizer, config.data, config.training.seed, progress=progress
        )
    wanted = config.tokenizer.vocab_size
    if wanted is not None and tokenizer.vocab_size < wanted:
        console.say(
            f"tokenizer: {tokenizer.vocab_size} tokens instead of {wanted}: every word of this text is one token already"
        )
    return tokenizer


def prepare_tokenizer(
    config: "Config",
    start: Start,
    base: "InitialModel | None",
    learn: "Callable[[Config], Tokenizer]",
) -> tuple["Tokenizer", "Config"]:
    """The tokenizer, which `learn` makes where none is given, and the settings with the vocabulary's size filled in."""
    # It was learned, or came with a model, when the run began: the cache may be gone, the stream's first documents far away.
    kept = (
        config.tokenizer.kind == "bpe"
        or config.tokenizer.learn_docs is not None
        or config.training.init_from is not None
    )
    if (
        start.payload is not None
        and start.payload["config"]["tokenizer"] == config.tokenizer.model_dump(mode="json")
        and kept
    ):
        tokenizer = _tokenizer_of(start.payload)
    elif start.payload is None and base is not None and base.tokenizer is not None:
        tokenizer = tokenizer_of_base(config, base)
    else:
        tokenizer = learn(config)
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer.vocab_size:
        mend = (
            "Raise it, or leave it out"
            if config.training.init_from is None
            else "Use the tokenizer that the model was trained with"
        )
        raise UserError(
            f"model.vocab_size: {wanted} is less than the tokenizer's {tokenizer.vocab_size}. {mend}."
        )
    model = config.model.model_copy(update={"vocab_size": wanted or tokenizer.vocab_size})
    return tokenizer, config.model_copy(update={"model": model})


def tokenizer_of_base(config: "Config", base: "InitialModel") -> "Tokenizer":
    """The tokenizer that a checkpoint was trained with; what the settings say of one must mean the same.

    Raises:
        UserError: another tokenizer would give the rows of the embedding another meaning.
    """
    from tinylm.tokenizer.factory import make_tokenizer

    assert base.tokenizer is not None
    wanted = config.tokenizer
    if wanted == base.tokenizer_config:
        return base.tokenizer
    # A learned one has nothing to be learned from here, and would be another one.
    found = (
        make_tokenizer(wanted, tuple).fingerprint
        if wanted.kind in ("byte", "hf")
        else f"one of kind {wanted.kind} that is not learned yet"
    )
    if found != base.tokenizer.fingerprint:
        was = f"{printable(base.name)} was trained with tokenizer {base.tokenizer.fingerprint} ({base.tokenizer.kind}), this run has {found}"
        raise UserError(f"training.init_from: {was}. Leave the tokenizer section out.")
    return base.tokenizer


def check_sample_prompt(config: "Config", tokenizer: "Tokenizer") -> None:
    """Find out now, and not at the first validation, whether the tokenizer can write the prompt."""
    try:
        tokenizer.encode(config.training.sample_prompt or "")
    except UserError as error:
        raise UserError(f"training.sample_prompt: {error}") from None


def build_language_model(parts: Parts) -> "LitStage":
    """What is trained on next tokens, with the weights that the run begins with."""
    from model import LitLM
    from tinylm.eval.perplexity import byte_length_table

    model, roots = build_model(parts)
    return LitLM(
        parts.config,
        model,
        byte_length_table(parts.data.tokenizer, model.embedding.num_embeddings),
        parts.stage,
        roots,
    )


def build_model(parts: Parts) -> tuple["Decoder | HFModel", dict[str, Any]]:
    """The model that is trained, with adapters where the settings ask for them, and the roots of its checkpoints."""
    from tinylm.checkpoint.format import NO_REFERENCES
    from tinylm.checkpoint.initial import reference_to
    from tinylm.model.hf_model import HFModel, HFSeq2Seq

    config, base = parts.config, parts.base
    model, roots = begin_weights(config, parts.start, base), dict(NO_REFERENCES)
    if isinstance(model, HFModel):
        check_foreign(parts.stage, config, model)
        if isinstance(model, HFSeq2Seq):
            say_what_an_encoder_reads(parts)
        if config.model.gradient_checkpointing:
            model.checkpoint_gradients()
        roots["hf_config"] = model.settings
    if config.lora is not None:
        assert base is not None, "find_base sees to it"
        roots["base"] = reference_to(base, model, Path(config.training.checkpoint_dir))
        add_adapters(config, model, roots["base"], parts.start)
    return model, roots


def begin_weights(
    config: "Config", start: Start, base: "InitialModel | None"
) -> "Decoder | HFModel":
    """A decoder with the weights of the checkpoint to resume, of the base, or new ones, which depend on the seed alone."""
    import torch

    from tinylm.checkpoint.initial import whole_model
    from tinylm.model.decoder import Decoder

    if start.payload is not None and config.lora is None:
        return whole_model(config.model, start.payload)
    if base is not None:
        return build_base(config, base)
    torch.manual_seed(config.training.seed)
    return Decoder(config.model)


def build_base(config: "Config", base: "InitialModel") -> "Decoder | HFModel":
    """The model of training.init_from with its weights."""
    try:
        return base.build(config.model)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from None


def add_adapters(
    config: "Config", model: "Decoder | HFModel", reference: dict[str, str], start: Start
) -> None:
    """Put adapters into `model`: new ones, or those of the checkpoint to resume, which belong to no other base."""
    from tinylm.model.lora import attach, load_adapter

    assert config.lora is not None
    check_root(config, start, "base", reference, "an adapter of")
    attach(model, config.lora, seed=config.training.seed)
    if start.payload is not None:
        load_adapter(model, start.payload["weights"])


def check_root(config: "Config", start: Start, root: str, now: dict[str, str], what: str) -> None:
    """Refuse to go on over another model than the one that the checkpoint refers to.

    Raises:
        UserError: naming both.
    """
    was = None if start.payload is None else start.payload[root]
    if was is not None and was["fingerprint"] != now["fingerprint"]:
        models = f"{printable(was['path'])} with fingerprint {was['fingerprint']}"
        found = (
            f"training.init_from, {printable(config.training.init_from)}, has {now['fingerprint']}"
        )
        raise UserError(
            f"{printable(start.path)}: {what} {models}, and {found}. Set training.init_from to the model it was trained on."
        )


def check_foreign(stage: str, config: "Config", model: "HFModel") -> None:
    """Refuse settings that only our own decoder knows, or no model with an encoder.

    Raises:
        UserError: naming the setting.
    """
    from tinylm.model.hf_model import HFSeq2Seq, check_packing

    if isinstance(model, HFSeq2Seq):
        kind = f"training.init_from names an encoder-decoder ({printable(model.inner.config.model_type)})"
        if stage != "sft":
            raise UserError(
                f"{kind}, which learns from questions and answers: python finetune.py, or choose a decoder-only model."
            )
        if config.data.packing == "packed":
            raise UserError(
                f"data.packing: packed puts several examples in a row, and {kind}, which reads one a row. Set data.packing: padded."
            )
        if config.training.train_on == "all":
            raise UserError(
                f"training.train_on: all trains the questions too, and {kind}, which never writes them. Set training.train_on: response."
            )
    elif stage == "sft" and config.data.packing == "packed":
        check_packing(model)
    if config.training.optimizer == "muon":
        raise UserError(
            "training.optimizer: muon knows which matrices of our own decoder it is for, and none of a Hugging Face model. Set adamw."
        )
    if config.hardware.strategy == "fsdp":
        raise UserError(
            "hardware.strategy: fsdp cuts up our own decoder, not a Hugging Face model. Set hardware.strategy to ddp."
        )


def say_what_an_encoder_reads(parts: Parts) -> None:
    """Tell of conversations with several answers, of which an encoder-decoder writes one."""
    from tinylm.tokens.packing import n_answers

    several = sum(n_answers(example) > 1 for example in parts.data.train_examples)
    if several:
        parts.say(
            f"{several} rows have more than one answer: an encoder-decoder learns the last, and reads the others"
        )


def describe_data(data: "PretrainData") -> str:
    """One line on what is trained on and validated on."""
    from tinylm.tokens.mixture import name_of

    train = f"{short(sum(map(len, data.train_files)))} tokens" if data.train_files else "a stream"
    val = "none" if data.val_file is None else f"{short(len(data.val_file))} tokens"
    source, tokenizer = name_of(data.config.data), data.tokenizer
    return f"data: {source}: train {train}, validation {val}; tokenizer {data.config.tokenizer.kind}, vocabulary {tokenizer.vocab_size}"


def check_documents(data: "PretrainData", say: Say) -> None:
    """Say so where documents are not divided as they seem to be, or are in validation and training: val_loss would flatter the model.

    Raises:
        UserError: at the end of a token file, which validates, nothing is new.
    """
    from tinylm.text.splits import shared_documents
    from tinylm.tokens.mixture import notes_on_texts, shared_in_token_files

    config, val = data.config, data.val_file
    assert val is not None, "prepare() makes the validation file"
    for note in notes_on_texts(config.data, data.train_files, val, data.tokenizer):
        say(note)
    texts, files = (
        shared_documents(config.data, config.training.seed),
        shared_in_token_files(config.data, data.train_files, val),
    )
    better = "are training documents too; val_loss will look better than it is"
    if config.data.val_dataset is not None:
        if texts or files.found:
            say(f"warning: {texts or files.found} documents of data.val_dataset {better}")
    elif files.found:
        setting = "data.dataset" if config.data.mix is None else "data.mix"
        if files.found == files.of:
            found = f"all {files.of} documents at its end, which validate (data.val_fraction {config.data.val_fraction}), are training documents too"
            raise UserError(
                f"{setting}: {found}. Encode it again without repeated documents, or set data.val_dataset."
            )
        say(
            f"warning: {files.found} of {files.of} documents at the end of {setting}, which validate, {better}"
        )


def describe_model(config: "Config", decoder: Any, world_size: int) -> str:
    """Parameters, how many of them are trained, FLOPs per token where all are, and tokens per step."""
    from tinylm.model.decoder import Decoder, count_parameters, flops_per_token

    training = config.training
    rows = training.micro_batch_size * training.grad_accum_steps * world_size
    a_step = f"{rows * training.seq_len:,} tokens" if config.dpo is None else f"{rows:,} pairs"
    a_step = a_step if config.verifier is None else f"{rows:,} problems"
    work = ""
    if config.lora is not None:
        work = f"{sum(weight.numel() for weight in decoder.parameters() if weight.requires_grad):,} of them trained, "
    elif isinstance(decoder, Decoder):
        work = f"{short(flops_per_token(decoder, training.seq_len))} FLOPs a token, "
    return f"model: {count_parameters(decoder):,} parameters, {work}{a_step} a step, {training.max_steps:,} steps"


def build_trainer(config: "Config", device: str, callbacks: "list[L.Callback]") -> "L.Trainer":
    """Lightning's trainer for one run: one epoch of micro-batches; everything between steps is ours (callbacks.py)."""
    import lightning as L
    from lightning.pytorch.strategies import ModelParallelStrategy

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings(
        "ignore", message=".*LeafSpec.* is deprecated"
    )  # Lightning 2.6 under torch 2.13
    # Both advise a setting that is the user's choice here (num_workers), or that the design makes moot.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings(
        "ignore", message=".*in eval mode at the start of training.*"
    )  # the reference of preferences is to stay there
    hardware = config.hardware
    precision = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}[hardware.precision]
    # FSDP2; Lightning's older FSDP strategy drops the optimizer's state on resume and flattens the weights.
    sharded = ModelParallelStrategy(
        data_parallel_size=hardware.devices * hardware.num_nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )
    return L.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[device],
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=sharded if hardware.strategy == "fsdp" else hardware.strategy,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        accumulate_grad_batches=config.training.grad_accum_steps,
        callbacks=callbacks,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def make_loggers(config: "Config") -> "list[Any]":
    """The loggers that training.loggers names."""
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

    made: list[Any] = []
    for name in config.training.loggers:
        try:
            if name == "tensorboard":
                made.append(
                    TensorBoardLogger(
                        config.training.log_dir, name=config.training.run_name, version=""
                    )
                )
            else:
                made.append(
                    WandbLogger(
                        project="tinylm",
                        name=config.training.run_name,
                        save_dir=config.training.log_dir,
                    )
                )
        except ModuleNotFoundError:
            raise UserError(
                f"training.loggers: {name} is not installed. pip install {name}."
            ) from None
    return made


# --- training ---------------------------------------------------------------------------------------------------------


def fit(stage: "LitStage", data: "PretrainData", device: str, start: Start, say: Say) -> int:
    """Train `stage` on `data` to the end of the run, from `start`; the exit code comes back."""
    from tinylm.planning.memory_plan import explaining_memory
    from training import callbacks as between

    config, tokenizer = stage.config, data.tokenizer
    signals = between.StopSignals()
    display = between.ProgressDisplay(between.Terminal(stderr=True), config.training.max_steps)
    validation = between.Validation(signals, tokenizer, display.line)
    saving = between.Checkpoints(config, tokenizer, validation, signals, say, data.fingerprints())
    metrics = between.Metrics(validation, display.row)
    restore = between.Restore(start.payload)
    trainer = build_trainer(
        config, device, [signals, restore, validation, metrics, saving, display]
    )
    say(describe_model(config, stage.decoder, trainer.world_size))
    step = 0
    if start.payload is not None:
        say_what_changed(start.payload, config, say)
        stage.progress = restore.progress()
        step = stage.progress.step
        data.start_at(step * config.training.grad_accum_steps, start.payload["cursor"])
        stage.cursor = start.payload["cursor"]
        say(f"resuming {start.path} at step {step}")
    if trainer.is_global_zero:
        path = log_folder(config) / "metrics.csv"
        # A run that begins, or leaves another one's track, must not overwrite what that one has logged.
        aside = (
            start.path is None
            or start.path.resolve().parent != Path(config.training.checkpoint_dir).resolve()
        )
        metrics.open(
            between.MetricsFile(
                path, step, further=(*stage.measures, *stage.val_measures), aside=aside
            ),
            make_loggers(config),
        )
    began = time.monotonic()
    with explaining_memory(
        config, f"The checkpoints in {printable(config.training.checkpoint_dir)} are intact"
    ):
        trainer.fit(stage, datamodule=data)
    return report(stage, saving, signals, time.monotonic() - began, say)


def say_what_changed(payload: dict[str, Any], config: "Config", say: Say) -> None:
    """Name what is allowed to change on resume and matters all the same."""
    import torch

    was, now = payload["config"]["training"]["max_steps"], config.training.max_steps
    if was != now:
        say(
            f"training.max_steps was {was} and is {now}: the learning rate now follows the schedule of {now} steps"
        )
    if payload["threads"] != torch.get_num_threads():
        say(
            f"CPU threads were {payload['threads']} and are {torch.get_num_threads()}: results may differ in the last bits"
        )


def report(stage: "LitStage", saving: Any, signals: Any, seconds: float, say: Say) -> int:
    """Say where the result is and what to type next."""

    progress, path = stage.progress, saving.newest
    if path is None:  # only rank 0 saves
        return signals.exit_code
    if signals.received is not None:
        say(
            f"stopped by signal {signals.received} after step {progress.step}; saved {path}. The same command goes on from there."
        )
        return signals.exit_code
    best = min(progress.val_losses) if progress.validations else float("nan")
    say(f"done: {progress.step} steps in {duration(seconds)}, best val_loss {best:.4f}")
    final = path.with_name("final.ckpt")
    print(printable(final))
    say(next_command(stage.stage, final))
    return 0


def next_command(stage: str, path: Path) -> str:
    """What to type when a run of that stage has left its model at `path`."""
    model = shlex.quote(str(path))
    if stage == "verifier":
        return f"next: python infer.py --ckpt MODEL --prompt PROBLEM --best-of 8 --verifier {model}"
    prompt = "Attention is" if stage == "pretrain" else "Name three primary colours."
    return f'next: python infer.py --ckpt {model} --prompt "{prompt}"'


# --- the process ------------------------------------------------------------------------------------------------------


def speaker() -> Callable[[str], None]:
    """A function that prints one line on stderr, on rank 0 only."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    def say(text: str) -> None:
        if rank_zero_only.rank == 0:
            console.say(text)

    return say


def log_folder(config: "Config") -> Path:
    """Where the run's metrics go."""
    return Path(config.training.log_dir) / config.training.run_name


def claim(folder: Path, setting: str) -> Any:
    """The lock on a folder of the run, on rank 0; the other ranks belong to the same run."""
    import contextlib

    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from tinylm.checkpoint.format import lock_run_dir

    return lock_run_dir(folder, setting) if rank_zero_only.rank == 0 else contextlib.nullcontext()


def check_hardware(config: "Config", device: str) -> None:
    """Refuse what this machine cannot do, before anything is read.

    Raises:
        UserError: naming the setting and what is available.
    """
    import torch

    hardware = config.hardware
    if hardware.precision == "16" and device != "cuda":
        raise UserError(
            f"hardware.precision: 16 needs CUDA, and this run is on {device}. Set hardware.precision to 32 or bf16."
        )
    if (
        hardware.precision == "bf16"
        and device == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise UserError(
            f"hardware.precision: {torch.cuda.get_device_name()} has no bf16 arithmetic. Set hardware.precision to 16 or 32."
        )
    present = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device)
    if present is not None and hardware.devices > present:
        raise UserError(
            f"hardware.devices: {hardware.devices} were asked for, and this machine has {present}. Lower hardware.devices."
        )
    if hardware.strategy == "fsdp" and hardware.precision == "16":
        raise UserError(
            "hardware.precision: 16 does not go with hardware.strategy fsdp. Set hardware.precision to bf16 or 32."
        )
    if hardware.strategy == "fsdp" and config.dpo is not None:
        raise UserError(
            "dpo: hardware.strategy fsdp does not cut the reference of preferences in pieces. Set hardware.strategy to ddp."
        )
    if hardware.strategy == "fsdp" and config.verifier is not None:
        raise UserError(
            "verifier: a verifier is too small to be cut in pieces by hardware.strategy fsdp. Set hardware.strategy to ddp."
        )
    if hardware.strategy == "fsdp" and config.lora is not None:
        raise UserError(
            "lora: adapters are too small to be cut in pieces by hardware.strategy fsdp. Set hardware.strategy to ddp."
        )
    if hardware.strategy == "fsdp" and config.training.optimizer == "muon":
        raise UserError(
            "training.optimizer: muon needs whole matrices, and hardware.strategy fsdp cuts them in pieces. Set adamw, or strategy ddp."
        )


def set_threads(threads: int | None) -> None:
    """Use so many CPU threads."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
