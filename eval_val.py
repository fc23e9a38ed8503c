"""The true validation loss of a checkpoint: every validation row of a config's data, weighted by tokens.

python eval_val.py --ckpt checkpoints/best.ckpt --config config_smoke.yaml
python eval_val.py --ckpt checkpoints/final.ckpt --config config_finetune.yaml --answers
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.cli.program import Parser, run_program
from tinylm.common.console import say
from tinylm.common.errors import UserError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tinylm.checkpoint.load import Loaded
    from tinylm.config.schema import Config
    from tinylm.eval.perplexity import LanguageScore
    from tinylm.tokenizer.base import Tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="python eval_val.py",
        usage="python eval_val.py --ckpt checkpoints/best.ckpt --config config_smoke.yaml",
        description="val_loss, val_ppl and val_bpb of a checkpoint on the validation data of a config.",
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="the checkpoint")
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file: its data, training.seed and hardware are used; model and precision are the checkpoint's",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )
    parser.add_argument(
        "--answers",
        action="store_true",
        help="the config's data are questions and answers, as finetune.py takes them: score the answers",
    )
    parser.add_argument(
        "--tokenizer",
        default="auto",
        help="auto: the one in the checkpoint; else a Hugging Face name or folder",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Score the checkpoint and print the numbers."""
    from tinylm.config.loader import load_config

    config = load_config(args.config, args.overrides)
    import torch

    from tinylm.checkpoint.format import read
    from tinylm.checkpoint.load import load_model
    from tinylm.cli.loading import choose_tokenizer
    from tinylm.common.device import pick_device
    from tinylm.model.hf_model import HFSeq2Seq

    device, why = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    say(f"device: {device} ({why})")
    if config.hardware.threads is not None:
        torch.set_num_threads(config.hardware.threads)
    loaded = load_model(args.ckpt, device)
    if isinstance(loaded.model, HFSeq2Seq):
        raise UserError(
            f"{printable(args.ckpt)}: an encoder-decoder, which answers and predicts no plain text. Use evaluate_checkpoints.py --tasks."
        )
    tokenizer = choose_tokenizer(args.tokenizer, loaded.tokenizer)
    batches, fingerprint = (answer_batches if args.answers else text_batches)(
        config, loaded, tokenizer
    )
    trained_on = read(args.ckpt)["data"]["val"]
    if fingerprint != trained_on:
        say(
            f"note: these are not the validation data of the training run ({trained_on}, here {fingerprint}); some may have been trained on"
        )
    rows, asked = loaded.config.training.seq_len, config.training.seq_len
    if rows != asked and not args.answers:
        say(
            f"note: rows of {rows} tokens, as the checkpoint was trained on, and not of {asked}, as in {printable(args.config)}; numbers of both differ"
        )
    score = score_of(loaded, tokenizer, batches, device)
    numbers = {
        "val_loss": score.loss,
        "val_ppl": score.perplexity,
        "val_bpb": score.bits_per_byte,
        "tokens": score.tokens,
    }
    if args.answers:
        numbers["val_accuracy"] = score.accuracy
    if args.json:
        print(json.dumps({"ckpt": str(args.ckpt), "step": loaded.info.step} | numbers))
    else:
        losses = f"val_loss {score.loss:.4f}  val_ppl {score.perplexity:.3f}  val_bpb {score.bits_per_byte:.4f}"
        losses += f"  val_accuracy {score.accuracy:.3f}" if args.answers else ""
        print(
            f"{losses}  on {score.tokens:,} tokens ({printable(args.ckpt)}, step {loaded.info.step})"
        )
    return 0


def score_of(
    loaded: "Loaded", tokenizer: "Tokenizer", batches: "Iterable[dict[str, Any]]", device: str
) -> "LanguageScore":
    """The model's score on all batches, in the precision it was trained in."""
    import torch

    from tinylm.common.device import autocast_dtype
    from tinylm.eval.perplexity import byte_length_table, score_batches

    half = autocast_dtype(loaded.config.hardware.precision)
    with torch.autocast(device, dtype=half, enabled=half is not None):
        return score_batches(
            loaded.model,
            batches,
            byte_length_table(tokenizer, loaded.model.embedding.num_embeddings),
        )


def text_batches(
    config: "Config", loaded: "Loaded", tokenizer: "Tokenizer", *, seq_len: int | None = None
) -> tuple[Any, str]:
    """The validation rows of plain text, and the fingerprint of their tokens.

    The rows are as long as those of the checkpoint's training, so that the number equals the one that training wrote; or `seq_len`.
    """
    from data import PretrainData
    from tinylm.tokens.mixture import validation_file

    file = validation_file(config.data, tokenizer, config.training.seed)
    changes = {"micro_batch_size": config.training.micro_batch_size, "val_batches": None}
    if seq_len is not None:
        changes["seq_len"] = seq_len
    training = loaded.config.training.model_copy(update=changes)
    data = PretrainData(
        loaded.config.model_copy(update={"data": config.data, "training": training}), tokenizer
    )
    data.val_file = file
    return data.val_dataset(), file.fingerprint


def answer_batches(config: "Config", loaded: "Loaded", tokenizer: "Tokenizer") -> tuple[Any, str]:
    """The validation rows of questions and answers, and their fingerprint."""
    from training.stages.sft import SFTData

    known = loaded.model.config.max_seq_len
    if config.training.seq_len > known:
        raise UserError(
            f"training.seq_len: {config.training.seq_len} is more than the {known} positions of {printable(loaded.info.path)}. Lower it."
        )
    training = config.training.model_copy(update={"val_batches": None})
    data = SFTData(config.model_copy(update={"training": training}), tokenizer)
    data.prepare()
    return data.val_dataloader(), data.fingerprints()["val"]


if __name__ == "__main__":
    sys.exit(main())
