"""What a run is, as names: the features that the table of unsupported pairs (support.py) combines.

A stage's name is a feature too. The settings and the device decide the others; the model of
training.init_from decides some, once it is open.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch

# config.duration is imported for a run that has one
from tinylm import config as settings
from tinylm.common.bnb import BITSANDBYTES
from tinylm.config.schema import AUTO, Config

FEATURES: dict[str, Callable[[Config, str | None], bool]] = {
    "distill section": lambda config, device: config.distill is not None,
    "own samples": lambda config, device: bool(config.distill and config.distill.own_samples),
    "dpo section": lambda config, device: config.dpo is not None,
    "grpo section": lambda config, device: config.grpo is not None,
    "reward_model section": lambda config, device: config.reward_model is not None,
    "verifier section": lambda config, device: config.verifier is not None,
    "lora": lambda config, device: config.lora is not None,
    "nf4": lambda config, device: config.lora is not None and config.lora.base_weights == "nf4",
    "reference of its own": lambda config, device: (
        config.dpo is not None and config.dpo.reference in ("copy", "cached")
    ),
    "new weights": lambda config, device: config.training.init_from is None,
    "train_on response": lambda config, device: config.training.train_on == "response",
    "train_on all": lambda config, device: config.training.train_on == "all",
    "task": lambda config, device: config.data.task is not None,
    "tools": lambda config, device: config.data.tools is not None,
    "eval_tasks": lambda config, device: config.training.eval_tasks is not None,
    "skip_bad_rows": lambda config, device: config.data.skip_bad_rows > 0,
    "packed": lambda config, device: config.data.packing == "packed",
    "mix": lambda config, device: config.data.mix is not None,
    "mix of rows": lambda config, device: any(
        part.rows or part.columns or part.template for part in config.data.mix or ()
    ),
    "truncation_side": lambda config, device: config.data.truncation_side != "right",
    "learned tokenizer": lambda config, device: config.tokenizer.kind in ("bpe", "unigram", "char"),
    "duration of positions": lambda config, device: (
        config.training.duration is not None
        and settings.duration.budget_of(config).unit in ("tokens", "tokens_per_parameter", "flops")
    ),
    "duration by the model": lambda config, device: (
        config.training.duration is not None
        and settings.duration.budget_of(config).unit in ("tokens_per_parameter", "flops")
    ),
    "duration in time": lambda config, device: (
        config.training.duration is not None
        and settings.duration.budget_of(config).unit == "seconds"
    ),
    "micro-batch auto": lambda config, device: config.training.micro_batch_size == AUTO,
    "muon": lambda config, device: config.training.optimizer == "muon",
    "adamw_8bit": lambda config, device: config.training.optimizer == "adamw_8bit",
    "no bitsandbytes": lambda config, device: find_spec(BITSANDBYTES) is None,
    "fsdp": lambda config, device: config.hardware.strategy == "fsdp",
    "several devices": lambda config, device: (
        config.hardware.devices * config.hardware.num_nodes > 1
    ),
    "fp16": lambda config, device: config.hardware.precision == "16",
    "bf16": lambda config, device: config.hardware.precision == "bf16",
    "no CUDA": lambda config, device: device not in ("cuda", None),
    "GPU without bf16": lambda config, device: (
        device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    ),
}
# The features that the model of training.init_from decides, once it is open: its kind.
MODEL_FEATURES = ("hf_model", "encoder-decoder")
