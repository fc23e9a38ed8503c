"""A verifier as a reward, or a reward model: how good does it say that an answer is?"""

from collections.abc import Sequence
from pathlib import Path

from tinylm.common.errors import UserError
from tinylm.eval.reward_scoring import load_scorer
from tinylm.rewards.answer import Answer, Reward

# Answers that are scored in one forward pass.
BATCH_SIZE = 32


def verifier_reward(checkpoint: str, device: str) -> Reward:
    """The probability that an answer is right, by a verifier, or its reward by a reward model.

    Raises:
        UserError: the checkpoint is neither.
    """
    try:
        scorer = load_scorer(Path(checkpoint), device)
    except UserError as error:
        raise error.within("grpo.rewards") from None

    def reward(answers: Sequence[Answer]) -> list[float]:
        values: list[float] = []
        for start in range(0, len(answers), BATCH_SIZE):
            part = answers[start : start + BATCH_SIZE]
            prompts, texts = [item.prompt for item in part], [item.text for item in part]
            values += scorer.score_texts(prompts, texts)
        return values

    return reward
