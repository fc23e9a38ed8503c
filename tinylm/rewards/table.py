"""The rewards by name, and their weighted sum.

A new reward is a function in a file of this folder and one line in `REWARDS`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinylm.common.errors import UserError
from tinylm.common.files import open_regular
from tinylm.config.finetuning import GrpoConfig, RewardConfig
from tinylm.rewards.answer import Answer, Reward
from tinylm.rewards.by_text import (
    choice_reward,
    exact_reward,
    format_reward,
    length_reward,
    number_reward,
    regex_reward,
)
from tinylm.rewards.by_verifier import verifier_reward
from tinylm.rewards.own_function import OwnFunction


def _each(reward: Callable[[Answer], float]) -> Reward:
    """A reward of one answer as one of many."""
    return lambda answers: [reward(answer) for answer in answers]


REWARDS: dict[str, Callable[[RewardConfig, GrpoConfig, str], Reward]] = {
    "same_number": lambda part, grpo, device: _each(number_reward),
    "exact": lambda part, grpo, device: _each(exact_reward),
    "choice": lambda part, grpo, device: _each(choice_reward),
    "regex": lambda part, grpo, device: _each(regex_reward(part.pattern or "")),
    "format": lambda part, grpo, device: _each(format_reward(part.pattern or "")),
    "length": lambda part, grpo, device: _each(
        length_reward(part.free_tokens or 1, grpo.max_new_tokens)
    ),
    "verifier": lambda part, grpo, device: verifier_reward(part.checkpoint or "", device),
}
"""by name, what makes a reward of its settings, those of the run, and the device"""


def make_reward(part: RewardConfig, grpo: GrpoConfig, device: str) -> Reward:
    """The reward of one entry of grpo.rewards.

    Raises:
        UserError: its name is not known, or a file that it needs is not there.
    """
    if part.reward in REWARDS:
        return REWARDS[part.reward](part, grpo, device)
    if ".py:" in part.reward:
        return OwnFunction(part.reward, part.max_seconds)
    fix = f"Use one of {', '.join(REWARDS)}, or FILE.py:FUNCTION"
    raise UserError("grpo.rewards", f"{part.reward}: no such reward", fix)


@dataclass(frozen=True)
class Scored:
    """An answer with its reward."""

    answer: Answer
    reward: float
    """the sum; less grpo.truncation_penalty if that applies to it"""
    parts: dict[str, float]
    """by name, before they are weighted; the first one decides whether the answer passes"""

    @property
    def passes(self) -> bool:
        """Whether the first part is at least 1."""
        return next(iter(self.parts.values())) >= 1


class RewardSum:
    """The weighted sum of the parts that grpo.rewards lists."""

    def __init__(self, grpo: GrpoConfig, device: str):
        """Raises as `make_reward`."""
        self.names: list[str] = []
        """of the parts, each once"""
        self.weights = [part.weight for part in grpo.rewards]
        self.penalty = grpo.truncation_penalty if grpo.truncated == "penalize" else 0.0
        self.rewards = [make_reward(part, grpo, device) for part in grpo.rewards]
        for part in grpo.rewards:
            n_same = sum(name.partition("#")[0] == part.reward for name in self.names)
            self.names.append(f"{part.reward}#{n_same + 1}" if n_same else part.reward)
        self.files = [part.checkpoint for part in grpo.rewards if part.checkpoint is not None]
        self.sources = [item.source for item in self.rewards if isinstance(item, OwnFunction)]

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the files that rewards are made of: functions, verifiers."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.encode())
        for path in self.files:
            with open_regular(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:12]

    def __call__(self, answers: Sequence[Answer]) -> list[Scored]:
        """The answers with their rewards, in order."""
        columns = [reward(answers) for reward in self.rewards]
        scored = []
        for answer, *values in zip(answers, *columns, strict=True):
            total = sum(weight * value for weight, value in zip(self.weights, values, strict=True))
            total -= self.penalty * answer.truncated
            scored.append(Scored(answer, total, dict(zip(self.names, values, strict=True))))
        return scored
