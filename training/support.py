"""What cannot be combined in one run: one table of unsupported pairs, with the reason and the fix.

A run has features: its stage, and what its settings, its device and its model add to that.
`require_supported` looks up each pair of them in `UNSUPPORTED`. To support a pair, remove its row;
to refuse one, add a row.
"""

from typing import NamedTuple

from tinylm.common.bnb import BITSANDBYTES
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from training.features import FEATURES


class Unsupported(NamedTuple):
    """Features that cannot be combined; all of them must be present for the row to apply."""

    features: tuple[str, ...]
    where: str
    """the setting that the error names"""
    problem: str
    fix: str


# The stages that read rows but not the examples of stage sft.
_ROW_STAGES = (
    ("dpo", "preferences"),
    ("grpo", "rewards"),
    ("reward_model", "a reward model"),
    ("verifier", "a verifier"),
)

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
    # --- optional packages
    Unsupported(
        ("adamw_8bit", "no bitsandbytes"),
        "training.optimizer",
        "adamw_8bit needs the package bitsandbytes, which is not installed",
        f"pip install {BITSANDBYTES}, or set training.optimizer=adamw",
    ),
    Unsupported(
        ("lora", "nf4", "no bitsandbytes"),
        "lora.base_weights",
        "nf4 needs the package bitsandbytes, which is not installed",
        f"pip install {BITSANDBYTES}, or set lora.base_weights=fp32",
    ),
    # --- stages and their sections
    Unsupported(
        ("lora", "nf4", "dpo", "reference of its own"),
        "dpo.reference",
        "must be adapters_off with lora.base_weights=nf4, whose rounded base the policy starts from",
        "Set dpo.reference=adapters_off",
    ),
    Unsupported(
        ("pretrain", "distill section"),
        "distill",
        "only valid for finetune.py",
        "Run finetune.py on rows (training.train_on=all trains every token), or remove it",
    ),
    Unsupported(
        ("pretrain", "dpo section"),
        "dpo",
        "only valid for finetune.py, which trains on preferences",
        "Run finetune.py, or remove the dpo section",
    ),
    Unsupported(
        ("pretrain", "grpo section"),
        "grpo",
        "only valid for finetune.py, which trains on the rewards of answers",
        "Run finetune.py, or remove the grpo section",
    ),
    Unsupported(
        ("pretrain", "reward_model section"),
        "reward_model",
        "only valid for finetune.py, which trains reward models",
        "Run finetune.py, or remove the reward_model section",
    ),
    Unsupported(
        ("pretrain", "verifier section"),
        "verifier",
        "only valid for finetune.py, which trains verifiers",
        "Run finetune.py, or remove the verifier section",
    ),
    Unsupported(
        ("pretrain", "task"),
        "data.task",
        "only valid for finetune.py: pretraining reads documents, not rows",
        "Run finetune.py, or remove it",
    ),
    Unsupported(
        ("pretrain", "tools"),
        "data.tools",
        "only valid for finetune.py: pretraining reads documents, not answers",
        "Run finetune.py, or remove it",
    ),
    Unsupported(
        ("verifier", "tools"),
        "data.tools",
        "not supported for a verifier, which reads answers without the results of calls",
        "Remove it",
    ),
    Unsupported(
        ("pretrain", "skip_bad_rows"),
        "data.skip_bad_rows",
        "only valid for finetune.py: pretraining reads documents, not rows",
        "Remove it",
    ),
    Unsupported(
        ("pretrain", "mix of rows"),
        "data.mix",
        "rows, columns and template of a source are only valid for finetune.py: pretraining reads "
        "documents",
        "Remove them",
    ),
    *(
        Unsupported(
            (stage, "eval_tasks"),
            "training.eval_tasks",
            "only valid for a model that writes answers",
            "Remove it",
        )
        for stage in ("reward_model", "verifier")
    ),
    *(
        Unsupported(
            (feature, "eval_tasks"),
            "training.eval_tasks",
            f"not supported with {feature}: answers are sampled by whole weights",
            "Remove it, and run evaluate_checkpoints.py",
        )
        for feature in ("fsdp", "encoder-decoder")
    ),
    *(
        Unsupported(
            (stage, "truncation_side"),
            "data.truncation_side",
            f"only valid for fine-tuning on answers, not for {other}",
            "Remove it",
        )
        for stage, other in (("pretrain", "pretraining"), *_ROW_STAGES)
    ),
    *(
        Unsupported(
            (stage, "mix"),
            "data.mix",
            f"only valid for pretraining and for fine-tuning on answers, not for {other}",
            "Set data.dataset to one source",
        )
        for stage, other in _ROW_STAGES
    ),
    # --- distill.own_samples
    *(
        Unsupported(
            ("own samples", feature),
            where,
            f"{what}not supported with distill.own_samples: {reason}",
            fix,
        )
        for feature, where, what, reason, fix in (
            ("packed", "data.packing", "packed is ", "new answers vary in length", "Set padded"),
            ("train_on all", "training.train_on", "all is ", "it samples answers", "Set response"),
            ("mix of rows", "data.mix", "", "answers have one template", "Name datasets only"),
            (
                "tools",
                "data.tools",
                "",
                "a masked result hides where an answer begins",
                "Remove it",
            ),
            ("duration in time", "training.duration", "a time is ", "lengths vary", "Give epochs"),
        )
    ),
    # --- training.duration
    *(
        Unsupported(
            (stage, "duration of positions"),
            "training.duration",
            "tokens, tokens_per_parameter and flops are only valid for train.py: rows of "
            "fine-tuning are filled unevenly",
            "Give epochs or a time",
        )
        for stage in ("sft", "dpo", "grpo", "reward_model", "verifier")
    ),
    Unsupported(
        ("duration by the model", "hf_model"),
        "training.duration",
        "tokens_per_parameter and flops are not known for a Hugging Face model",
        "Give epochs, tokens or a time",
    ),
    Unsupported(
        ("duration in time", "several devices"),
        "training.duration",
        "a time is measured by one process, without the communication of several",
        "Give epochs, tokens or flops, or set training.max_steps",
    ),
    Unsupported(
        ("duration in time", "grpo"),
        "training.duration",
        "a time is not supported with grpo: only some of its steps sample answers",
        "Give epochs, or set training.max_steps",
    ),
    # --- training.micro_batch_size auto
    *(
        Unsupported(
            (feature, "micro-batch auto"),
            "training.micro_batch_size",
            f"auto is not supported {reason}",
            "Set training.micro_batch_size to a number of rows",
        )
        for feature, reason in (
            ("sft", "for fine-tuning, whose memory is not planned"),
            ("dpo", "for fine-tuning, whose memory is not planned"),
            ("grpo", "for fine-tuning, whose memory is not planned"),
            ("reward_model", "for fine-tuning, whose memory is not planned"),
            ("verifier", "for fine-tuning, whose memory is not planned"),
            ("lora", "for adapters, whose memory is not planned"),
            ("hf_model", "for a Hugging Face model, whose memory is not planned"),
            ("several devices", "with several processes, which must agree"),
        )
    ),
    # --- new weights
    Unsupported(
        ("dpo", "new weights"),
        "training.init_from",
        "must be set: preferences are learned by a trained model",
        "Set it to a checkpoint, or to hf:NAME for a Hugging Face model",
    ),
    Unsupported(
        ("grpo", "new weights"),
        "training.init_from",
        "must be set: rewards are learned by a model that already gets some of them",
        "Set it to a checkpoint, or to hf:NAME for a Hugging Face model",
    ),
    Unsupported(
        ("reward_model", "new weights"),
        "training.init_from",
        "must be set: preferences are learned by a trained model",
        "Set it to a checkpoint of a decoder",
    ),
    Unsupported(
        ("sft", "new weights", "train_on response"),
        "training.init_from",
        "must be set: new weights cannot learn from the answers alone",
        "Set it to a checkpoint or hf:NAME, or set training.train_on=all. To train new weights on "
        "documents, run train.py",
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
    # --- several devices
    *(
        Unsupported(
            (feature, "several devices"),
            "hardware.devices",
            f"{name} samples its answers on one device",
            "Set hardware.devices=1 and hardware.num_nodes=1",
        )
        for feature, name in (("grpo", "the stage grpo"), ("own samples", "distill.own_samples"))
    ),
    # --- fsdp
    Unsupported(
        ("fsdp", "fp16"),
        "hardware.precision",
        "16 is not supported with hardware.strategy=fsdp, whose gradient scaler differs",
        "Set hardware.precision to bf16 or 32",
    ),
    Unsupported(
        ("fsdp", "distill section"),
        "distill",
        "not supported with hardware.strategy=fsdp, which does not shard the teacher",
        "Set hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "dpo"),
        "dpo",
        "not supported with hardware.strategy=fsdp, which does not shard the reference model",
        "Set hardware.strategy=ddp",
    ),
    Unsupported(
        ("fsdp", "grpo"),
        "grpo",
        "not supported with hardware.strategy=fsdp: its answers are sampled by whole weights",
        "Set hardware.strategy=auto",
    ),
    Unsupported(
        ("fsdp", "reward_model"),
        "reward_model",
        "not supported with hardware.strategy=fsdp, which shards language models only",
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
        ("fsdp", "adamw_8bit"),
        "training.optimizer",
        "adamw_8bit is not supported with hardware.strategy=fsdp, which would shard its blocks",
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
        ("reward_model", "hf_model"),
        "training.init_from",
        "a reward model has the blocks of our own decoder and cannot start from a Hugging Face model",
        "Set it to a checkpoint of a decoder, for example one that tinylm import wrote",
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
        ("sft", "tools", "encoder-decoder"),
        "data.tools",
        "not supported with an encoder-decoder",
        "Remove it, or choose a decoder-only model",
    ),
    Unsupported(
        ("distill section", "encoder-decoder"),
        "training.init_from",
        "an encoder-decoder is not supported with distill",
        "Remove the distill section, or choose a decoder-only model",
    ),
    Unsupported(
        ("dpo", "encoder-decoder"),
        "training.init_from",
        "an encoder-decoder learns from questions and answers only, not from preferences",
        "Remove the dpo section, or choose a decoder-only model",
    ),
    Unsupported(
        ("grpo", "encoder-decoder"),
        "training.init_from",
        "an encoder-decoder learns from questions and answers only, not from rewards",
        "Remove the grpo section, or choose a decoder-only model",
    ),
    Unsupported(
        ("sft", "lora", "nf4", "encoder-decoder"),
        "lora.base_weights",
        "nf4 is not supported with an encoder-decoder, which computes with the types of its weights",
        "Set lora.base_weights=fp32, or choose a decoder-only model",
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
        model_features: of `features.MODEL_FEATURES`, once the model is known.

    Raises:
        UserError: the first such row.
    """
    features = {stage, *model_features}
    features |= {name for name, applies in FEATURES.items() if applies(config, device)}
    for row in UNSUPPORTED:
        if features.issuperset(row.features):
            raise UserError(row.where, row.problem, row.fix)
