"""Rollouts: answers of a model to prompts, sampled in groups.

    prompts, seeds ─▶ `sample_rollouts`: n answers to each
                   ─▶ `batches_by_length`: ids and labels (B, T)
    an answer, with or without its reward ─▶ `rollout_row`: a line of rollouts.jsonl

An answer is drawn with the random numbers of (seed, its number). The answers beside it change only
how its logits are rounded.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt
from tinylm.rewards.answer import Answer
from tinylm.rewards.table import Scored
from tinylm.rows.prompts import PromptRow
from tinylm.tokens.example_rows import Example, row_of_examples

# Batches are padded to a multiple of this, so that there are few shapes, but not beyond the context.
LENGTH_MULTIPLE = 8


class Rollout(NamedTuple):
    """A sampled answer."""

    prompt: PromptRow
    ids: tuple[int, ...]
    """of the answer, with the token that ended it"""
    by_tool: tuple[bool, ...]
    """which of them a tool wrote (data.tools)"""
    answer: Answer
    """its text and that of its prompt, as a reward is given them"""

    @property
    def example(self) -> Example:
        """Prompt and answer; what the model wrote of the answer is trained."""
        ids = np.concatenate((self.prompt.ids, np.array(self.ids, dtype=np.int64)))
        by_prompt = np.zeros(len(self.prompt.ids), dtype=bool)
        trained = np.concatenate((by_prompt, ~np.array(self.by_tool, dtype=bool)))
        return Example(ids, trained, self.prompt.location)


def sample_rollouts(
    engine: Engine,
    prompts: Sequence[PromptRow],
    seeds: Sequence[int],
    n: int,
    *,
    sampling: SamplingConfig,
    max_len: int,
    stop_ids: tuple[int, ...],
) -> list[Rollout]:
    """`n` answers to each prompt, in the order of the prompts.

    Args:
        engine: new, so that equal calls give equal answers; with the model in eval mode.
        prompts: the prompts.
        seeds: one for each prompt.
        n: answers to each.
        sampling: how they are sampled, but for the seed.
        max_len: tokens of a prompt and its answer together.
        stop_ids: of the template.
    """
    requests = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        n_new = min(sampling.max_new_tokens, max_len - len(prompt.ids))
        own = sampling.model_copy(update={"seed": seed, "max_new_tokens": n_new})
        ids = Prompt(tuple(prompt.ids.tolist()))
        requests += [Request(ids, own, stop_ids, sample=number) for number in range(n)]
    completions = list(engine.complete(requests))
    asked = [prompt for prompt in prompts for _ in range(n)]
    rollouts = []
    for prompt, completion in zip(asked, completions, strict=True):
        text, is_cut = completion.text.strip(), completion.finish_reason == "length"
        n_tokens = len(completion.ids)
        answer = Answer(prompt.question, text, prompt.target, prompt.location, n_tokens, is_cut)
        rollouts.append(Rollout(prompt, completion.ids, completion.by_tool, answer))
    return rollouts


def answer_seed(seed: int, which: str, step: int, place: int) -> int:
    """The seed of the answers to the prompt at a place of the training order, at a step."""
    digest = hashlib.sha256(f"{seed} {which} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 2**31


def batches_by_length(
    rollouts: Sequence[Rollout],
    values: dict[str, Tensor],
    *,
    batch_size: int,
    pad_id: int,
    seq_len: int,
) -> list[dict[str, Tensor]]:
    """`pad_rollouts` of `batch_size` answers at a time, with their part of each of `values` (N,).

    Answers of about the same length are trained together, so that few of their tokens are padding.
    The gradient of a step is the sum over all of its answers, in whatever order; but a mixture of
    experts is balanced within each batch.
    """
    lengths = torch.tensor([len(rollout.example.ids) for rollout in rollouts])  # (N,)
    batches = []
    for numbers in lengths.argsort(stable=True).split(batch_size):
        batch = pad_rollouts([rollouts[number] for number in numbers], pad_id, seq_len)
        batches.append(batch | {name: value[numbers].float() for name, value in values.items()})
    return batches


def pad_rollouts(rollouts: Sequence[Rollout], pad_id: int, seq_len: int) -> dict[str, Tensor]:
    """`input_ids` and `labels` (B, T) int64, T at most seq_len; only what the model wrote of the
    answers are targets.
    """
    examples = [rollout.example for rollout in rollouts]
    longest = max(len(example.ids) - 1 for example in examples)
    length = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, seq_len)
    rows = [row_of_examples([example], length, pad_id) for example in examples]
    return {
        "input_ids": torch.from_numpy(np.stack([row[0] for row in rows])),
        "labels": torch.from_numpy(np.stack([row[1] for row in rows])),
    }


def rollout_row(step: int, found: Answer | Scored) -> dict[str, Any]:
    """A line of rollouts.jsonl; distillation has no rewards."""
    answer, rewards = found, {}
    if isinstance(found, Scored):
        answer, rewards = found.answer, {"reward": found.reward, "rewards": found.parts}
    return {
        "step": step,
        "row": answer.location,
        "prompt": answer.prompt,
        "answer": answer.text,
        "target": answer.target.strip(),
        **rewards,
        "tokens": answer.n_tokens,
        "truncated": answer.truncated,
    }


def shown_rollout(scored: Scored) -> str:
    """A prompt in brackets, its answer and the reward, as a validation shows it."""
    answer = scored.answer
    parts = ", ".join(f"{name} {value:g}" for name, value in scored.parts.items())
    return f"⟦{answer.prompt}⟧ {answer.text} (reward {scored.reward:g}: {parts})"
