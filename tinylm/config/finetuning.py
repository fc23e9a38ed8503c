"""The optional sections of the config, which only fine-tuning has: adapters (`lora`), and one for each
objective but the next token: `distill`, `dpo`, `reward_model`, `verifier`, `grpo`.

Each has its rules before it; the stages themselves are in training/stages/.
"""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tinylm.config.rules import (
    Count,
    CountOrZero,
    Fraction,
    Name,
    Number,
    PathName,
    Rule,
    Section,
    Switch,
)

# --- adapters ---


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): only they are trained, the other weights are frozen."""

    r: Annotated[Count, Field(le=4096)] = 8
    """rank of the adapters"""
    alpha: Annotated[Number, Field(gt=0, le=1e6)] = 16.0
    """scale: the output of the adapters is multiplied by alpha / r"""
    rslora: Switch = False
    """multiply by alpha / sqrt(r) in place of alpha / r, so that a large rank learns as fast (Kalajdzievski 2023)"""
    dora: Switch = False
    """trains the magnitude of each row separately; the adapter changes its direction only (Liu et al. 2024)"""
    dropout: Fraction = 0.0
    """dropout on the input of the adapters"""
    base_weights: Literal["fp32", "nf4"] = "fp32"
    """how the frozen matrices are kept: nf4 in 4 bits, by bitsandbytes (QLoRA; Dettmers et al. 2023)"""
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """name suffixes of the linear layers with adapters; null: attention and feed-forward"""

    @property
    def scale(self) -> float:
        """What the output of the adapters is multiplied by.

        >>> LoraConfig(r=16, alpha=8.0).scale, LoraConfig(r=16, alpha=8.0, rslora=True).scale
        (0.5, 2.0)
        """
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


# --- a teacher ---

DISTILL = (
    Rule(
        ("cached", "own_samples"),
        lambda distill: distill.cached and distill.own_samples > 0,
        "cannot be combined with own_samples, which are other texts in every step",
        "Set cached=false, or own_samples=0",
    ),
    Rule(
        ("max_new_tokens", "own_samples"),
        lambda distill: distill.max_new_tokens is not None and not distill.own_samples,
        "only valid with own_samples, which is 0",
        "Set own_samples, or remove it",
    ),
)


class DistillConfig(Section):
    """Distillation: the model learns the whole distribution of a teacher at every target, beside
    the target itself (Hinton et al. 2015).
    """

    rules: ClassVar = DISTILL

    teacher: PathName
    """a checkpoint, hf:NAME or hf:FOLDER, with the tokenizer of the model that is trained"""
    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """share of the divergence from the teacher in the loss; the rest is the cross entropy of the target"""
    temperature: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """the logits of both models are divided by it in the divergence, which is multiplied by its square"""
    kl: Literal["forward", "reverse"] = "forward"
    """forward: cover all that the teacher says; reverse: say only what it says (Gu et al. 2023, MiniLLM)"""
    top_k: Count | None = None
    """compare the k classes that the teacher finds most probable, and all others as one; null: every class"""
    cached: Switch = False
    """compute the teacher's probabilities of all targets once, in data.cache_dir, and train without the teacher"""
    own_samples: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """share of micro-batches whose answers the student samples, in place of the rows' (Agarwal et al. 2024, GKD)"""
    max_new_tokens: Annotated[Count, Field(le=1_000_000)] | None = None
    """own_samples: maximum tokens of an answer; null: up to training.seq_len with its prompt"""


# --- preferences ---

DPO = (
    Rule(
        ("label_smoothing", "loss"),
        lambda dpo: dpo.loss != "sigmoid" and dpo.label_smoothing,
        "only valid for loss sigmoid (loss is {loss})",
        "Remove it, or set dpo.loss=sigmoid",
    ),
    Rule(
        ("length_normalized", "loss"),
        lambda dpo: dpo.loss in ("ipo", "orpo", "simpo") and dpo.length_normalized,
        "not valid for loss {loss}, which always normalizes by length",
        "Remove it",
    ),
    Rule(
        ("reference", "loss"),
        lambda dpo: dpo.loss in ("orpo", "simpo") and dpo.reference is not None,
        "not valid for loss {loss}, which has no reference model",
        "Remove it",
    ),
    Rule(
        ("gamma", "loss"),
        lambda dpo: dpo.loss != "simpo" and dpo.gamma is not None,
        "only valid for loss simpo (loss is {loss})",
        "Remove it, or set dpo.loss=simpo",
    ),
    Rule(
        ("sft_coef", "loss"),
        lambda dpo: dpo.loss == "orpo" and dpo.sft_coef,
        "not valid for loss orpo, which contains the cross entropy of the chosen answers",
        "Remove it",
    ),
)


class DpoConfig(Section):
    """Preference optimization on pairs of a chosen and a rejected answer
    (DPO, Rafailov et al. 2023, and its relatives).
    """

    rules: ClassVar = DPO

    beta: Annotated[Number, Field(gt=0, le=100)] = 0.1
    """how strongly the policy is kept close to the reference; orpo: weight of the odds ratio; simpo: reward scale"""
    loss: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = "sigmoid"
    """DPO, IPO (Azar et al. 2023), SLiC (Zhao et al. 2023), ORPO (Hong et al. 2024) or SimPO (Meng et al. 2024)"""
    gamma: Annotated[Number, Field(ge=0, le=100)] | None = None
    """simpo: margin between the rewards of chosen and rejected answers; null: beta / 2"""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """sigmoid: assumed share of pairs whose labels are swapped"""
    length_normalized: Switch = False
    """log-probabilities per token, so that long answers do not weigh more; always so for ipo, orpo and simpo"""
    sft_coef: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the chosen answers' cross entropy per token, added to the preference loss"""
    reference: Literal["copy", "adapters_off", "cached"] | None = None
    """a frozen copy, the policy without its LoRA, or log-probabilities computed once; null: copy; orpo, simpo: none"""

    @model_validator(mode="after")
    def _resolve_nulls(self) -> Self:
        """Replace null by its meaning, as `ModelConfig` does.

        >>> DpoConfig().reference, DpoConfig(loss="simpo", beta=2.0).reference
        ('copy', None)
        """
        if self.loss == "simpo" and self.gamma is None:
            self.__dict__["gamma"] = self.beta / 2
        if self.loss not in ("orpo", "simpo") and self.reference is None:
            self.__dict__["reference"] = "copy"
        return self


class RewardModelConfig(Section):
    """A reward model: a decoder with one number as its output, which is higher for the better of
    two answers (Stiennon et al. 2020; Ouyang et al. 2022).
    """

    center_coef: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the squared sum of the two rewards of a pair, which keeps rewards near 0 (Eisenstein et al. 2023)"""


# --- right and wrong answers ---

VERIFIER = (
    Rule(
        ("n_wrong", "n_sampled"),
        lambda verifier: verifier.n_wrong + verifier.n_sampled == 0,
        "n_wrong and n_sampled are 0, so there are no wrong answers to learn from",
        "Set n_wrong, or n_sampled and sampled_from",
    ),
    Rule(
        ("sampled_from", "n_sampled"),
        lambda verifier: verifier.n_sampled and verifier.sampled_from is None,
        "required if n_sampled is above 0",
        "Set it to the checkpoint of the model that writes the answers",
    ),
    Rule(
        ("n_sampled", "sampled_from"),
        lambda verifier: verifier.sampled_from is not None and not verifier.n_sampled,
        "must be at least 1 if sampled_from is set, got 0",
        "Set n_sampled, or remove sampled_from",
    ),
)


class VerifierConfig(Section):
    """A verifier: an encoder that classifies answers to problems as right or wrong
    (Cobbe et al. 2021).
    """

    rules: ClassVar = VERIFIER

    n_wrong: Annotated[CountOrZero, Field(le=64)] = 1
    """wrong answers made from each right one by changing a number, different ones in each pass"""
    n_sampled: Annotated[CountOrZero, Field(le=64)] = 0
    """answers per problem by the model in `sampled_from`, right or wrong by their last number"""
    sampled_from: PathName | None = None
    """checkpoint of the model that writes the sampled answers"""
    kind: Literal["encoder", "decoder"] = "encoder"
    """encoder: each token sees both sides; decoder: the odds of each token begin as those of the model in init_from"""


# --- rewards ---


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _only_for(name: str, *rewards: str) -> Rule:
    """The setting `name` of a reward is required for some rewards, and only valid for them."""

    def broken(part: Any) -> bool:
        return (getattr(part, name) is not None) != (part.reward in rewards)

    kinds = " and ".join(rewards)
    return Rule(
        (name, "reward"),
        broken,
        f"required for the rewards {kinds}, and only valid for them (reward is {{reward}})",
        f"Set {name} if the reward is {kinds}, else remove it",
    )


REWARD = (
    _only_for("pattern", "regex", "format"),
    _only_for("free_tokens", "length"),
    _only_for("checkpoint", "verifier"),
    Rule(
        ("pattern",),
        lambda part: part.pattern is not None and not _is_pattern(part.pattern),
        "not a regular expression: {pattern}",
        "Correct it",
    ),
)


class RewardConfig(Section):
    """One part of the reward of an answer (tinylm/rewards)."""

    rules: ClassVar = REWARD

    reward: Name
    """same_number, exact, choice, regex, format, length or verifier; or FILE.py:FUNCTION, a function of yours"""
    weight: Annotated[Number, Field(ge=-1e6, le=1e6)] = 1.0
    """the reward of an answer is the sum of its parts, each multiplied by its weight"""
    pattern: Name | None = None
    """regex, format: a regular expression; see docs/RL.md"""
    free_tokens: Count | None = None
    """length: answers of up to this many tokens cost nothing"""
    checkpoint: PathName | None = None
    """verifier: the checkpoint of a verifier, or of a reward model"""
    max_seconds: Annotated[Number, Field(gt=0, le=3600)] = 10.0
    """a function of yours: longest time for the answers of one batch"""


class GrpoConfig(Section):
    """Reinforcement learning: the model samples a group of answers to each prompt, and learns from
    those with more reward than the group's mean (GRPO, Shao et al. 2024, DeepSeekMath).
    """

    rewards: tuple[RewardConfig, ...] = Field(
        default=({"reward": "same_number"},), min_length=1, validate_default=True
    )
    """the parts of the reward; an answer passes if the first part is at least 1"""
    group_size: Annotated[Count, Field(ge=2, le=4096)] = 8
    """answers sampled to each prompt"""
    max_new_tokens: Annotated[Count, Field(le=1_000_000)] = 64
    """maximum tokens of an answer"""
    temperature: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """of the sampling; the loss uses the same distribution"""
    slots: Annotated[Count, Field(le=4096)] = 32
    """answers that are sampled at once"""
    inner_steps: Annotated[Count, Field(le=1000)] = 1
    """optimizer steps on each batch of answers"""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """how tokens are weighed: equally in each answer, equally in all, or by a constant (tinylm/objectives/grpo.py)"""
    normalize_std: Switch = True
    """divide the advantages of a group by the standard deviation of its rewards"""
    clip_low: Annotated[Number, Field(gt=0, lt=1)] = 0.2
    """the probability ratio of a token is clipped below at 1 - clip_low"""
    clip_high: Annotated[Number, Field(gt=0, le=100)] = 0.2
    """and above at 1 + clip_high"""
    kl: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the divergence from the reference, the model that the run starts from; 0: no reference is held"""
    truncated: Literal["score", "mask", "penalize"] = "score"
    """answers without an end: scored as others, without a loss, or with truncation_penalty"""
    truncation_penalty: Annotated[Number, Field(ge=0, le=1e6)] = 0.5
    """penalize: subtracted from the reward of a truncated answer"""
    val_samples: Annotated[Count, Field(le=4096)] = 8
    """answers sampled to each held-out prompt: the k of pass@k"""
