"""Fine-tuning: a trained model learns to answer, or which of two answers is better, whole or by small adapters.

    python finetune.py --config config_finetune.yaml
    python finetune.py --config configs/lora-smollm2.yaml data.dataset=mine.jsonl
    python finetune.py --config configs/dpo.yaml

It begins with the weights that training.init_from names, a checkpoint of ours or a Hugging Face model (hf:NAME), and is
otherwise train.py: the same flags, the same steps, the same exact resume. What it eats are rows of questions and answers
(`LitExamples` in data.py), of which the answers are learned. With a dpo section they have two answers each, and the model
learns to prefer the first (`LitPreferences`, `LitDPO`).
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tinylm.errors import UserError, printable
from tinylm.program import run_program
from train import Parts, Say, build_base, build_model, check_root, make_parser, run_stage

if TYPE_CHECKING:
    import numpy as np

    from data import LitExamples, LitPreferences
    from model import LitDPO
    from tinylm.config import Config
    from tinylm.decoder import Decoder
    from tinylm.foreign import ForeignDecoder
    from tinylm.tokenizer import Tokenizer

Module = TypeVar("Module", "LitExamples", "LitPreferences")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = "Teach a trained model to answer, or which answer is better. The same command again goes on from the newest checkpoint."
    return make_parser("finetune.py", "config_finetune.yaml", description).parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the command line says."""
    from tinylm.config import load_config

    config = load_config(args.config, args.overrides)
    if config.training.init_from is None:
        raise UserError("training.init_from: fine-tuning begins with a trained model. Set it to a checkpoint, or to hf:NAME for a Hugging Face model.")
    if config.dpo is not None:
        return run_stage("dpo", config, args, open_preferences, build_dpo)
    return run_stage("sft", config, args, open_examples)


def open_examples(config: "Config", tokenizer: "Tokenizer", say: Say) -> "LitExamples":
    """The questions and answers of a run."""
    from data import LitExamples

    return prepared(LitExamples(config, tokenizer), say)


def open_preferences(config: "Config", tokenizer: "Tokenizer", say: Say) -> "LitPreferences":
    """The pairs of answers of a run."""
    from data import LitPreferences

    return prepared(LitPreferences(config, tokenizer), say)


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
    from tinylm.checkpoint import refer_to

    config = parts.config
    assert config.dpo is not None and parts.base is not None, "run() and find_base see to it"
    policy, roots = build_model(parts)
    if config.dpo.reference == "adapters_off":
        return LitDPO(config, policy, roots, None)
    reference = build_base(config, parts.base)
    root = refer_to(parts.base, reference, Path(config.training.checkpoint_dir))
    if config.lora is None:  # else the base of the adapters is the reference, and they are compared already
        roots["reference"] = root
        check_root(config, parts.start, "reference", root, "preferences held to")
    if config.dpo.reference == "copy":
        return LitDPO(config, policy, roots, reference)
    add_cached_reference(parts, reference, root["fingerprint"])
    return LitDPO(config, policy, roots, None)


def add_cached_reference(parts: Parts, reference: "Decoder | ForeignDecoder", fingerprint: str) -> None:
    """Give the data the log-probabilities under `reference`, from the cache or worked out now."""
    import torch

    from tinylm.preferences import cached_log_probs, log_probs_of

    config, data = parts.config, parts.data
    n_pairs = len(data.train_pairs) + len(data.val_pairs)
    depends = [data.fingerprints(), fingerprint, config.data.template, config.training.seq_len, config.hardware.precision]
    path = Path(config.data.cache_dir) / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]}.bin"

    def compute() -> "np.ndarray":
        parts.say(f"reference: working out the log-probabilities of {n_pairs} pairs, to be kept in {printable(path)}")
        half = {"32": None, "16": torch.float16, "bf16": torch.bfloat16}[config.hardware.precision]
        return log_probs_of(reference.to(parts.device), data.all_batches(), half)

    data.add_reference(cached_log_probs(path, n_pairs, compute))


if __name__ == "__main__":
    sys.exit(main())
