"""What settings may be: the types of fields, and the rules between settings: which cannot be
combined, and which need another one.

A rule is data: the settings it is about, a condition under which it is broken, the problem and the
fix. The first setting is the one that the error names. Each section has its rules, in
the order in which they are checked; bounds of a single setting are in its field there.
The rules of the model and of fine-tuning are beside their sections (`model.py`, `finetuning.py`).
"""

import os
from collections.abc import Callable
from operator import attrgetter
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

# config.duration is imported for a run that has one
from tinylm import config as settings
from tinylm.config.split_pattern import FIX as PATTERN_FIX
from tinylm.config.split_pattern import pattern_problem

# Large enough for any real run, small enough that no product of two settings overflows a 64-bit
# integer.
COUNT_LIMIT = 2**31 - 1

# No source of a mixture may have less than this part of the rows:
# a block of rows has one of each source.
SMALLEST_SHARE = 1e-6


def _expand_home(path: str) -> str:
    """The path with ~ and ~user as folders; also in hf:~/model."""
    prefix, folder = ("hf:", path[3:]) if path.startswith("hf:~") else ("", path)
    return prefix + os.path.expanduser(folder)


Count = Annotated[int, Field(ge=1, le=COUNT_LIMIT, strict=True)]
CountOrZero = Annotated[int, Field(ge=0, le=COUNT_LIMIT, strict=True)]
# Strict: YAML's `no` and `yes` are booleans, and a boolean must not be accepted as a number.
Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
# A path or name that is not empty, without a NUL byte, which no path can have.
Name = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]
# A path, or a name that may be one; ~ is the home folder,
# which a shell does not fill in after `key=`.
PathName = Annotated[Name, AfterValidator(_expand_home)]


class RuleError(ValueError):
    """A broken rule; pydantic passes it on as the error in the context of its own."""

    def __init__(self, keys: tuple[str, ...], problem: str, fix: str):
        super().__init__(f"{keys[0]}: {problem}. {fix}")
        self.keys = keys
        self.problem = problem
        self.fix = fix


class Rule(NamedTuple):
    """One rule of a section; `{name}` in the texts are the section's settings,
    `{found}` what `broken` returns.
    """

    keys: tuple[str, ...]
    """its settings, the wrong one first;
    the error has the line of the first that is written"""
    broken: Callable[[Any], object]
    """called with the section; true if the rule is broken"""
    problem: str
    fix: str

    def error(self, found: object, settings: dict[str, Any]) -> RuleError:
        """The error for a section with these settings."""
        problem = self.problem.format(found=found, **settings)
        return RuleError(self.keys, problem, self.fix)


class Section(BaseModel):
    """A part of the config: frozen after loading; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.rules:
            if found := rule.broken(self):
                raise rule.error(found, dict(self))
        return self


def _not_with(other: str, key: str, default: object) -> Rule:
    """`key` must keep its default if `other` is set: both say the same,
    or `other` does not use it.
    """
    value_of, is_set = attrgetter(key), attrgetter(other)
    return Rule(
        (key, other),
        lambda section: is_set(section) is not None and value_of(section) != default,
        f"cannot be combined with {other}",
        f"Remove {key} or {other}",
    )


def _only_for(name: str, *kinds: str, default: object = None) -> Rule:
    """The tokenizer's setting `name` is only valid for some kinds."""
    *others, last = kinds
    listed = f"{', '.join(others)} or {last}" if others else last
    return Rule(
        (name, "kind"),
        lambda tokenizer: tokenizer.kind not in kinds and getattr(tokenizer, name) != default,
        f"only valid for kind {listed} (kind is {{kind}})",
        f"Remove it, or set tokenizer.kind={kinds[0]}",
    )


TOKENIZER = (
    Rule(
        ("path", "kind"),
        lambda tokenizer: tokenizer.kind == "hf" and tokenizer.path is None,
        "required for kind hf",
        "Set it to a Hugging Face name or a folder",
    ),
    _only_for("path", "hf"),
    _only_for("unknown", "char", default="error"),
    Rule(
        ("vocab_size", "kind"),
        lambda tokenizer: tokenizer.kind in ("bpe", "unigram") and tokenizer.vocab_size is None,
        "required for kind {kind}",
        "Set it, for example tokenizer.vocab_size=4096",
    ),
    _only_for("vocab_size", "bpe", "unigram"),
    _only_for("pattern", "bpe", "unigram"),
    Rule(
        ("pattern",),
        lambda tokenizer: tokenizer.pattern is not None and pattern_problem(tokenizer.pattern),
        "{found}",
        PATTERN_FIX,
    ),
    _only_for("learn_docs", "bpe", "unigram", "char"),
    Rule(
        ("learn_docs", "unknown"),
        lambda tokenizer: (
            tokenizer.learn_docs is not None
            and tokenizer.kind == "char"
            and tokenizer.unknown == "error"
        ),
        "later documents can have characters that the first ones lack, and unknown is error",
        "Set tokenizer.unknown=unk",
    ),
)


DATA = (
    Rule(
        ("val_split", "val_dataset"),
        lambda data: data.val_dataset is not None and data.val_split is not None,
        "cannot be combined with val_dataset",
        "Remove one",
    ),
    Rule(
        ("order", "streaming"),
        lambda data: data.streaming and data.order == "random",
        "random is not supported with streaming",
        "Set data.order=shuffled or data.streaming=false",
    ),
    Rule(
        ("stride", "streaming"),
        lambda data: data.streaming and data.stride is not None,
        "not supported with streaming, whose rows never overlap",
        "Remove it, or set data.streaming=false",
    ),
    _not_with("mix", "streaming", False),
    _not_with("mix", "dataset_config", None),
    _not_with("mix", "split", "train"),
    _not_with("mix", "val_split", None),
    _not_with("mix", "train_docs", None),
    Rule(
        ("val_docs", "mix"),
        lambda data: (
            data.mix is not None and data.val_docs is not None and data.val_dataset is None
        ),
        "not supported with mix if val_fraction of each source is held out",
        "Remove it, or set data.val_dataset",
    ),
    Rule(
        ("val_dataset", "mix"),
        lambda data: data.val_dataset in {part.dataset for part in data.mix or ()},
        "{val_dataset} is also a source of mix",
        "Remove one, or both to hold out val_fraction of each source",
    ),
    Rule(
        ("mix",),
        lambda data: next(
            (
                part.dataset
                for part in data.mix or ()
                if part.weight < SMALLEST_SHARE * sum(other.weight for other in data.mix)
            ),
            None,
        ),
        "the weight of {found} is less than a millionth of the sum of weights",
        "Raise it, or remove the source",
    ),
    _not_with("task", "rows", "auto"),
    _not_with("task", "columns", None),
)

TRAINING = (
    Rule(
        ("micro_batch_size", "batch_size"),
        lambda training: training.micro_batch_size == "auto" and training.batch_size is None,
        "auto needs batch_size, the rows of an optimizer step",
        "Set training.batch_size, for example to 64",
    ),
    Rule(
        ("batch_size", "micro_batch_size"),
        lambda training: training.micro_batch_size != "auto" and training.batch_size is not None,
        "only valid for micro_batch_size auto (micro_batch_size is {micro_batch_size})",
        "Set training.micro_batch_size and training.grad_accum_steps, or micro_batch_size to auto",
    ),
    Rule(
        ("grad_accum_steps", "micro_batch_size"),
        lambda training: training.micro_batch_size == "auto" and training.grad_accum_steps != 1,
        "cannot be combined with micro_batch_size auto, which decides it",
        "Remove it",
    ),
    Rule(
        ("duration", "max_steps"),
        lambda training: training.duration is not None and training.max_steps is not None,
        "cannot be combined with max_steps ({max_steps}): both say how long the run is",
        "Remove one; on the command line training.max_steps=null removes it",
    ),
    Rule(
        ("max_steps", "duration"),
        lambda training: training.duration is None and training.max_steps is None,
        "null needs a duration",
        "Set training.max_steps or training.duration",
    ),
    Rule(
        ("max_epochs", "duration"),
        lambda training: (
            training.max_epochs is not None
            and training.duration not in (None, f"{training.max_epochs:g} epochs")
        ),
        "cannot be combined with duration ({duration}): both say how long the run is",
        "Remove one",
    ),
    Rule(
        ("eval_every_steps", "val_every_steps"),
        lambda training: (training.eval_every_steps or 0) % training.val_every_steps,
        "must be a multiple of val_every_steps ({val_every_steps}), got {eval_every_steps}",
        "Change one: tasks are scored at validations",
    ),
    Rule(
        ("best_by", "early_stopping_patience"),
        lambda training: (
            training.best_by != "val_loss" and training.early_stopping_patience is not None
        ),
        "cannot be combined with early_stopping_patience, which watches val_loss",
        "Remove one",
    ),
    Rule(
        ("duration",),
        lambda training: (
            training.duration is not None
            and settings.duration.read_duration(training.duration) is None
        ),
        "must be a number above 0 with a unit, got {duration}",
        "Write for example 20min, 2h, 3 epochs, 200M tokens, 20 tokens_per_parameter or 1e17 flops",
    ),
    Rule(
        ("decay_ratio", "warmup_ratio"),
        lambda training: (
            training.schedule == "wsd" and training.warmup_ratio + training.decay_ratio > 1
        ),
        "decay_ratio ({decay_ratio}) + warmup_ratio ({warmup_ratio}) must be at most 1",
        "Lower one",
    ),
    Rule(  # larger ones overflow 32 bits in the update rules of tinylm/optim
        ("lr", "optimizer"),
        lambda training: training.optimizer != "adamw" and training.lr > 1e20,
        "must be at most 1e20 with optimizer {optimizer}, got {lr}",
        "Lower it",
    ),
    Rule(
        ("profile_steps",),
        lambda training: (
            training.profile_steps and training.profile_steps[0] > training.profile_steps[1]
        ),
        "must be the first and the last step, got {profile_steps}",
        "Write for example training.profile_steps=[20,24]",
    ),
    Rule(
        ("loggers",),
        lambda training: len(set(training.loggers)) < len(training.loggers),
        "a logger is listed twice",
        "Remove one",
    ),
    Rule(
        ("val_every_steps", "max_steps"),
        lambda training: (
            training.schedule == "plateau"
            and training.duration is None
            and training.val_every_steps > training.max_steps
        ),
        "must be at most max_steps ({max_steps}) for schedule plateau, got {val_every_steps}",
        "Lower it",
    ),
)

SAMPLING = (
    Rule(
        ("n_samples", "n_beams"),
        lambda sampling: sampling.n_beams > 1 and sampling.n_samples > 1,
        "must be 1 for beam search, which returns one text, got {n_samples}",
        "Set n_beams or n_samples to 1",
    ),
)


CONFIG = (
    Rule(
        ("training.seq_len", "model.max_seq_len"),
        # A run that starts from a trained model has that model's positions,
        # unless they are written.
        lambda config: (
            (config.training.init_from is None or "max_seq_len" in config.model.model_fields_set)
            and config.training.seq_len > config.model.max_seq_len
        ),
        "{training.seq_len} is more than model.max_seq_len ({model.max_seq_len})",
        "Raise model.max_seq_len or lower training.seq_len",
    ),
    Rule(
        ("data.stride", "training.seq_len"),
        lambda config: (config.data.stride or 0) > config.training.seq_len,
        "{data.stride} is more than training.seq_len ({training.seq_len}), which would skip tokens",
        "Lower data.stride",
    ),
    Rule(
        ("dpo.reference", "lora"),
        lambda config: (
            config.dpo is not None
            and config.dpo.reference == "adapters_off"
            and config.lora is None
        ),
        "adapters_off needs a lora section",
        "Set dpo.reference=copy or dpo.reference=cached, or add a lora section",
    ),
    _not_with("dpo", "data.task", None),
    _not_with("dpo", "data.rows", "auto"),
    _not_with("dpo", "training.train_on", "response"),
    _not_with("dpo", "training.label_smoothing", 0.0),
    _not_with("distill", "dpo", None),
    _not_with("distill", "grpo", None),
    _not_with("distill", "reward_model", None),
    _not_with("distill", "verifier", None),
    _not_with("distill", "training.label_smoothing", 0.0),
    _not_with("reward_model", "lora", None),
    _not_with("reward_model", "dpo", None),
    _not_with("reward_model", "grpo", None),
    _not_with("reward_model", "verifier", None),
    _not_with("reward_model", "data.task", None),
    _not_with("reward_model", "data.rows", "auto"),
    _not_with("reward_model", "training.train_on", "response"),
    _not_with("reward_model", "training.label_smoothing", 0.0),
    _not_with("reward_model", "training.sample_prompt", None),
    Rule(
        ("model.rope_scaling", "verifier"),
        lambda config: (
            config.verifier is not None
            and config.model.rope_scaling is not None
            and config.model.rope_scaling.type == "dynamic"
        ),
        "type dynamic is not supported with verifier, whose rows are padded to one length",
        "Choose another type",
    ),
    Rule(
        ("verifier.kind", "training.init_from"),
        lambda config: (
            config.verifier is not None
            and config.verifier.kind == "decoder"
            and config.training.init_from is None
        ),
        "a verifier of kind decoder begins with the predictions of a trained model",
        "Set training.init_from, or verifier.kind to encoder",
    ),
    _not_with("verifier", "lora", None),
    _not_with("verifier", "dpo", None),
    _not_with("verifier", "data.template", "instruction"),
    _not_with("verifier", "data.packing", "packed"),
    _not_with("verifier", "training.train_on", "response"),
    _not_with("verifier", "training.label_smoothing", 0.0),
    _not_with("verifier", "training.sample_prompt", None),
    _not_with("grpo", "dpo", None),
    _not_with("grpo", "verifier", None),
    _not_with("grpo", "data.packing", "packed"),
    _not_with("grpo", "training.train_on", "response"),
    _not_with("grpo", "training.label_smoothing", 0.0),
    Rule(
        ("training.micro_batch_size", "training.grad_accum_steps", "grpo.group_size"),
        lambda config: (
            config.grpo is not None
            and config.training.micro_batch_size
            * config.training.grad_accum_steps
            % config.grpo.group_size
        ),
        "micro_batch_size x grad_accum_steps ({training.micro_batch_size} x "
        "{training.grad_accum_steps}) answers of a step must be whole groups of grpo.group_size "
        "({grpo.group_size})",
        "Change one of the three",
    ),
    Rule(
        ("grpo.max_new_tokens", "training.seq_len"),
        lambda config: (
            config.grpo is not None and config.grpo.max_new_tokens > config.training.seq_len
        ),
        "{grpo.max_new_tokens} leaves no room for a prompt in training.seq_len "
        "({training.seq_len})",
        "Lower it, or raise training.seq_len",
    ),
)
