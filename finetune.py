"""Fine-tuning: a trained model learns to answer, or which of two answers is better, whole or by small adapters; or a verifier to judge.

    python finetune.py --config config_finetune.yaml
    python finetune.py --config configs/lora-smollm2.yaml data.dataset=mine.jsonl
    python finetune.py --config configs/dpo.yaml
    python finetune.py --config configs/verifier.yaml
    python finetune.py --config configs/sst2-gpt2-lora.yaml
    python finetune.py --config configs/instructions-from-scratch.yaml

It begins with the weights that training.init_from names, a checkpoint of ours or a Hugging Face model (hf:NAME), and is
otherwise train.py: the same flags, the same steps, the same exact resume. What it eats are rows of questions and answers
(`SFTData` in data.py), of which the answers are learned; with training.train_on=all the questions are learned too,
and then it may also begin with new weights. With a dpo section the rows have two answers each, and the model learns to
prefer the first (`PreferenceData`, `LitDPO`). With a verifier section an encoder, new or begun with a decoder's weights,
learns to tell right answers from wrong ones (`VerifierData`, `LitVerifier`).
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tinylm.cli.program import run_program
from tinylm.common.console import progress_bar, say
from tinylm.common.errors import UserError, printable
from tinylm.common.processes import Progress
from train import (
    SHOW_ROWS,
    Parts,
    Say,
    build_base,
    build_model,
    check_root,
    learn_from_documents,
    make_parser,
    run_stage,
    show_first_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

    from model import LitDPO, LitVerifier
    from tinylm.config.schema import Config, DataConfig
    from tinylm.model.decoder import Decoder
    from tinylm.model.hf_model import HFModel
    from tinylm.rows.verifier_data import Problem
    from tinylm.tokenizer.base import Tokenizer
    from training.stages.dpo import PreferenceData
    from training.stages.sft import SFTData
    from training.stages.verifier import VerifierData

Module = TypeVar("Module", "SFTData", "PreferenceData")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = "Teach a trained model to answer, or which answer is better. The same command again goes on from the newest checkpoint."
    parser = make_parser("finetune.py", "config_finetune.yaml", description)
    parser.add_argument("--show-rows", type=int, metavar="N", help=SHOW_ROWS)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the command line says."""
    from tinylm.config.loader import load_config

    config = with_data_of_task(load_config(args.config, args.overrides))
    stage, open_data, build, learn = "sft", open_examples, None, learn_from_documents
    if config.verifier is not None:
        stage, open_data = "verifier", open_problems
        build, learn = build_verifier, learn_from_problems
    else:
        check_beginning(config)
    if config.dpo is not None:
        stage, open_data, build = "dpo", open_preferences, build_dpo
    if args.show_rows is not None:
        return show_first_rows(config, args.show_rows, partial(open_data, say=say), learn)
    return run_stage(stage, config, args, open_data, build, learn)


def check_beginning(config: "Config") -> None:
    """Refuse new weights where they could not learn: from preferences, without the questions, or with a tokenizer that is learned from documents.

    Raises:
        UserError: naming the setting.
    """
    if config.training.init_from is not None:
        return
    if config.dpo is not None:
        raise UserError(
            "training.init_from: preferences are learned by a trained model. Set it to a checkpoint, or to hf:NAME for a Hugging Face model."
        )
    if config.training.train_on == "response":
        mend = "Set it to a checkpoint or to hf:NAME, or begin with new weights and training.train_on=all"
        raise UserError(
            f"training.init_from: answers alone are learned by a model that was trained before. {mend}."
        )
    if config.tokenizer.kind in ("bpe", "char"):
        learned = f"kind {config.tokenizer.kind} is learned from documents, and these are rows of questions and answers"
        raise UserError(
            f"tokenizer.kind: {learned}. Set byte, or tokenizer.path to one learned before (python -m tinylm tokenizer train)."
        )


def with_data_of_task(config: "Config") -> "Config":
    """The settings with the task's rows on the hub, where there is a task and data.dataset is left out; it is trained on the training split."""
    from tinylm.eval.tasks import TASKS

    data = config.data
    if data.task is None or "dataset" in data.model_fields_set:
        return config
    hub = TASKS[data.task].hub
    assert hub is not None, "only pairs has none, and data.task cannot name it"
    named = {
        "dataset": hub.dataset,
        "dataset_config": data.dataset_config or hub.config,
        "split": hub.train,
    }
    return config.model_copy(update={"data": data.model_copy(update=named)})


def on_hub(data: "DataConfig") -> bool:
    """Whether the rows are those of a task on the hub."""
    from tinylm.eval.tasks import TASKS

    hub = TASKS[data.task].hub if data.task else None
    return hub is not None and data.dataset == hub.dataset and not os.path.exists(hub.dataset)


def open_examples(config: "Config", tokenizer: "Tokenizer", say: Say) -> "SFTData":
    """The questions and answers of a run."""
    from tinylm.eval.tasks.data import SMOKE
    from training.stages.sft import SFTData

    try:
        return prepared(SFTData(config, tokenizer), say)
    except UserError as problem:
        if not on_hub(config.data):
            raise
        raise UserError(
            f"{problem} For task {config.data.task} that is data.dataset=PATH; data.dataset={SMOKE} takes a few built-in rows."
        ) from None


def open_preferences(config: "Config", tokenizer: "Tokenizer", say: Say) -> "PreferenceData":
    """The pairs of answers of a run."""
    from training.stages.dpo import PreferenceData

    return prepared(PreferenceData(config, tokenizer), say)


def prepared(data: Module, say: Say) -> Module:
    """The data module, read and encoded; what is in it is said."""
    data.prepare()
    say(data.describe())
    for note in data.notes:
        say(note)
    return data


# --- the reference of preferences --------------------------------------------------------------------------------------


def build_dpo(parts: Parts) -> "LitDPO":
    """The policy, and what it is held to: the model that the run began with, also where it goes on."""
    from model import LitDPO
    from tinylm.checkpoint.initial import reference_to

    config = parts.config
    assert config.dpo is not None and parts.base is not None, "run() and find_base see to it"
    policy, roots = build_model(parts)
    if config.dpo.reference == "adapters_off":
        return LitDPO(config, policy, roots, None)
    reference = build_base(config, parts.base)
    root = reference_to(parts.base, reference, Path(config.training.checkpoint_dir))
    if (
        config.lora is None
    ):  # else the base of the adapters is the reference, and they are compared already
        roots["reference"] = root
        check_root(config, parts.start, "reference", root, "preferences held to")
    if config.dpo.reference == "copy":
        return LitDPO(config, policy, roots, reference)
    add_cached_reference(parts, reference, root["fingerprint"])
    return LitDPO(config, policy, roots, None)


def add_cached_reference(parts: Parts, reference: "Decoder | HFModel", fingerprint: str) -> None:
    """Give the data the log-probabilities under `reference`, from the cache or worked out now."""
    from tinylm.common.device import autocast_dtype
    from training.stages.reference_log_probs import cached_log_probs, pair_log_probs

    config, data = parts.config, parts.data
    n_pairs = len(data.train_pairs) + len(data.val_pairs)
    depends = [
        data.fingerprints(),
        fingerprint,
        config.data.template,
        config.training.seq_len,
        config.hardware.precision,
    ]
    path = (
        Path(config.data.cache_dir)
        / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.bin"
    )

    def compute() -> "np.ndarray":
        parts.say(
            f"reference: working out the log-probabilities of {n_pairs} pairs, to be kept in {printable(path)}"
        )
        return pair_log_probs(
            reference.to(parts.device),
            data.all_batches(),
            autocast_dtype(config.hardware.precision),
        )

    data.add_reference(cached_log_probs(path, n_pairs, compute))


# --- a verifier --------------------------------------------------------------------------------------------------------


def learn_from_problems(config: "Config") -> "Tokenizer":
    """The tokenizer of a verifier with new weights: learned from the training problems and their right answers where it is learned at all."""
    from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
    from tinylm.rows.verifier_data import read_problems
    from training.tokenizer import learned_from

    def texts() -> "Iterator[str]":
        found = read_problems(
            config.data,
            "train",
            config.training.seed,
            to_conversation=conversation_parser(config.data),
            built_in=requested_built_in_rows(config.data),
        )
        return (f"{problem.question.full_text}\n{problem.answer}" for problem in found)

    return learned_from(config.tokenizer, texts)


def open_problems(config: "Config", tokenizer: "Tokenizer", say: Say) -> "VerifierData":
    """The problems of a run, with what a model answers to them."""
    from training.stages.verifier import VerifierData

    assert config.verifier is not None
    data = VerifierData(config, tokenizer)
    if config.verifier.sampled_from is None:
        data.prepare()
    else:
        with progress_bar() as progress:
            data.prepare(sampler(config, say, progress))
    say(data.describe())
    for note in data.notes:
        say(note)
    return data


def sampler(
    config: "Config", say: Say, progress: Progress
) -> "Callable[[list[Problem]], list[Problem]]":
    """What adds to problems the answers of the model that verifier.sampled_from names."""
    from tinylm.checkpoint.load import load_model
    from tinylm.common.device import pick_device
    from tinylm.eval.sampled_answers import add_sampled_answers

    settings, folder = config.verifier, Path(config.data.cache_dir)
    assert settings is not None and settings.sampled_from is not None
    device, _ = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    try:
        loaded = load_model(Path(settings.sampled_from), device)
    except UserError as error:
        raise UserError(f"verifier.sampled_from: {error}") from None

    def answer(found: "list[Problem]") -> "list[Problem]":
        say(
            f"answers: {settings.n_sampled} to each of {len(found):,} problems by {printable(settings.sampled_from)}, kept in {printable(folder)}"
        )
        return add_sampled_answers(
            found,
            loaded,
            config.data.task,
            settings.n_sampled,
            seed=config.training.seed,
            folder=folder,
            progress=progress,
        )

    return answer


def build_verifier(parts: Parts) -> "LitVerifier":
    """The verifier of a checkpoint to resume, one with the weights of training.init_from, or a new one, which depends on the seed alone."""
    import torch

    from model import LitVerifier
    from tinylm.checkpoint import format as checkpoint_format
    from tinylm.checkpoint import load as checkpoint_load
    from tinylm.model.decoder import Decoder
    from tinylm.model.verifier import Verifier

    config = parts.config
    if parts.start.payload is not None:
        return LitVerifier(
            config,
            checkpoint_load.build_verifier(config.model, parts.start.payload["weights"]),
            dict(checkpoint_format.NO_REFERENCES),
        )
    torch.manual_seed(config.training.seed)
    verifier = Verifier(config.model)
    if parts.base is not None:
        decoder = build_base(config, parts.base)
        if not isinstance(decoder, Decoder):
            name = printable(config.training.init_from)
            raise UserError(
                f"training.init_from: {name}: a verifier shares our own decoder's blocks, and this is a Hugging Face model. Leave it out."
            )
        verifier.init_from_decoder(decoder)
    return LitVerifier(config, verifier, dict(checkpoint_format.NO_REFERENCES))


if __name__ == "__main__":
    sys.exit(main())
