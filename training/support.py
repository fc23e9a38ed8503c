"""What cannot be combined in one run: one table of unsupported pairs, with the reason and the fix.

A run has features: its stage, and what its settings, its device and its model add to that.
`require_supported` looks up each pair of them in `UNSUPPORTED`. To support a pair, remove its row;
to refuse one, add a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tinylm.common.errors import UserError
from tinylm.config.schema import Config

# The features that the settings and the device decide; a stage's name is a feature too.
FEATURES: dict[str, Callable[[Config, str | None], bool]] = {
    "dpo section": lambda config, device: config.dpo is not None,
    "verifier section": lambda config, device: config.verifier is not None,
    "lora": lambda config, device: config.lora is not None,
    "new weights": lambda config, device: config.training.init_from is None,
    "train_on response": lambda config, device: config.training.train_on == "response",
    "train_on all": lambda config, device: config.training.train_on == "all",
    "skip_bad_rows": lambda config, device: config.data.skip_bad_rows > 0,
    "packed": lambda config, device: config.data.packing == "packed",
    "learned tokenizer": lambda config, device: config.tokenizer.kind in ("bpe", "char"),
    "muon": lambda config, device: config.training.optimizer == "muon",
    "fsdp": lambda config, device: config.hardware.strategy == "fsdp",
    "fp16": lambda config, device: config.hardware.precision == "16",
    "bf16": lambda config, device: config.hardware.precision == "bf16",
    "no CUDA": lambda config, device: device not in ("cuda", None),
    "GPU without bf16": lambda config, device: (
        device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    ),
}
# The features that the model of training.init_from decides, once it is open: its kind.
MODEL_FEATURES = ("hf_model", "encoder-decoder")


class Unsupported(NamedTuple):
    """Features that cannot be combined; all of them must be present for the row to apply."""

    features: tuple[str, ...]
    where: str
    """the setting that the error names"""
    problem: str
    fix: str


UNSUPPORTED = (
    # --- flags before a run
    Unsupported(
        ("plan", "hf_model"),
        "training.init_from",
        "the flags before a run do not support a Hugging Face model",
        "Remove training.init_from",
    ),
    Unsupported(
        ("plan", "lora"),
        "lora",
        "the flags before a run do not support adapters",
        "Remove the lora section; the numbers are then for training every weight",
    ),
    # --- stages and their sections
    Unsupported(
        ("pretrain", "dpo section"),
        "dpo",
        "only valid for finetune.py, which trains on preferences",
        "Run finetune.py, or remove the dpo section",
    ),
    Unsupported(
        ("pretrain", "verifier section"),
        "verifier",
        "only valid for finetune.py, which trains verifiers",
        "Run finetune.py, or remove the verifier section",
    ),
    Unsupported(
        ("pretrain", "skip_bad_rows"),
        "data.skip_bad_rows",
        "only valid for finetune.py: pretraining reads documents, not rows",
        "Remove it",
    ),
    # --- new weights
    Unsupported(
        ("dpo", "new weights"),
        "training.init_from",
        "must be set: preferences are learned by a trained model",
        "Set it to a checkpoint, or to hf:NAME for a Hugging Face model",
    ),
    Unsupported(
        ("sft", "new weights", "train_on response"),
        "training.init_from",
        "must be set: new weights cannot learn from the answers alone",
        "Set it to a checkpoint or hf:NAME, or set training.train_on=all",
    ),
    Unsupported(
        ("sft", "new weights", "learned tokenizer"),
        "tokenizer.kind",
        "bpe and char are learned from documents, but the data are rows of questions and answers",
        "Set tokenizer.kind=byte, or tokenizer.path to a tokenizer made by python -m tinylm "
        "tokenizer train",
    ),
    Unsupported(
        ("lora", "new weights"),
        "lora",
        "adapters need a trained model",
        "Set training.init_from, or remove the lora section",
    ),
    # --- precision
    Unsupported(
        ("fp16", "no CUDA"),
        "hardware.precision",
        "16 needs CUDA",
        "Set hardware.precision to 32 or bf16",
    ),
    Unsupported(
        ("bf16", "GPU without bf16"),
        "hardware.precision",
        "this GPU has no bf16 arithmetic",
        "Set hardware.precision to 16 or 32",
    ),
    # --- fsdp
    Unsupported(
        ("fsdp", "fp16"),
        "hardware.precision",
        "16 is not supported with hardware.strategy=fsdp, whose gradient scaler differs",
        "Set hardware.precision to bf16 or 32",
    ),
    Unsupported(
        ("fsdp", "dpo"),
        "dpo",
        "not supported with hardware.strategy=fsdp, which does not shard the reference model",
        "Set hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "verifier"),
        "verifier",
        "not supported with hardware.strategy=fsdp: a verifier is too small to shard",
        "Set hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "lora"),
        "lora",
        "not supported with hardware.strategy=fsdp: adapters are too small to shard",
        "Set hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "muon"),
        "training.optimizer",
        "muon needs whole matrices, which hardware.strategy=fsdp shards",
        "Set training.optimizer=adamw, or hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "hf_model"),
        "hardware.strategy",
        "fsdp is not supported with a Hugging Face model: "
        "only blocks of our own decoder are sharded",
        "Set hardware.strategy=ddp",
    ),
    # --- a Hugging Face model
    Unsupported(
        ("muon", "hf_model"),
        "training.optimizer",
        "muon is not supported with a Hugging Face model: "
        "which of its weights it is for is unknown",
        "Set training.optimizer=adamw",
    ),
    Unsupported(
        ("verifier", "hf_model"),
        "training.init_from",
        "a verifier shares the blocks of our own decoder and cannot start from a Hugging Face "
        "model",
        "Remove training.init_from, or set it to a checkpoint of stage pretrain",
    ),
    # --- an encoder-decoder
    Unsupported(
        ("pretrain", "encoder-decoder"),
        "training.init_from",
        "an encoder-decoder learns from questions and answers only",
        "Run finetune.py, or choose a decoder-only model",
    ),
    Unsupported(
        ("dpo", "encoder-decoder"),
        "training.init_from",
        "an encoder-decoder learns from questions and answers only, not from preferences",
        "Remove the dpo section, or choose a decoder-only model",
    ),
    Unsupported(
        ("sft", "packed", "encoder-decoder"),
        "data.packing",
        "packed puts several examples in a row, but an encoder-decoder reads one example at a time",
        "Set data.packing=padded",
    ),
    Unsupported(
        ("sft", "train_on all", "encoder-decoder"),
        "training.train_on",
        "all trains the questions too, but an encoder-decoder generates answers only",
        "Set training.train_on=response",
    ),
)


def require_supported(
    stage: str,
    config: Config,
    device: str | None = None,
    model_features: frozenset[str] = frozenset(),
) -> None:
    """Refuse a run that has all features of a row of `UNSUPPORTED`.

    Args:
        stage: a stage's name, or `plan` for the flags before a run.
        config: the settings.
        device: cpu, cuda or mps; None: not chosen yet.
        model_features: of MODEL_FEATURES, once the model is known.

    Raises:
        UserError: the first such row.
    """
    features = {stage, *model_features}
    features |= {name for name, applies in FEATURES.items() if applies(config, device)}
    for row in UNSUPPORTED:
        if features.issuperset(row.features):
            raise UserError(row.where, row.problem, row.fix)
