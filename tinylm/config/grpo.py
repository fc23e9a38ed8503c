"""Settings of reinforcement learning: the section `grpo` and its rewards."""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tinylm.config.rules import Count, Name, Number, PathName, Rule, Section, Switch


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

    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1)] = (
        RewardConfig(reward="same_number"),
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
