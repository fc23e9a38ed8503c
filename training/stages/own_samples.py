"""Distillation on what the student writes itself (distill.own_samples): generalized knowledge
distillation (GKD, Agarwal et al. 2024, algorithm 1).

    rows of a micro-batch ─▶ their prompts ─▶ an answer to each by the student as it is now
                          ─▶ micro-batch (B, T) ─▶ what the teacher says at every token of it

On rows the student only reads contexts that others wrote. When it writes, its own mistakes lead to
contexts that it was never corrected in; here the teacher says what to write in these. The answer is
taken as given: no gradient goes through the sampling. It has no target of a row either, so the loss is
the divergence alone; the column cross_entropy has the student's own tokens, and estimates its entropy.

Every answer is trained in the step that samples it, so that no checkpoint needs to contain answers: a
resumed run samples them again.
"""

import math
from collections.abc import Iterator

import numpy as np

from tinylm.config.schema import SamplingConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.rewards.rollouts import pad_rollouts
from tinylm.rows.prompts import PromptRow
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import split_answer
from tinylm.tokens.packing import Batch
from training.context import RunContext
from training.resume import ResumeState
from training.stages.rollouts import Rollouts


def is_own(k: int, share: float) -> bool:
    """Whether micro-batch k has the student's answers: `share` of them, evenly spread.

    >>> [k for k in range(10) if is_own(k, 0.4)]
    [2, 4, 7, 9]
    """
    return math.floor((k + 1) * share) > math.floor(k * share)


class OwnSamples:
    """The student's answers to the prompts of micro-batches; rollouts.jsonl has each of them."""

    def __init__(self, context: RunContext, tokenizer: Tokenizer, resume: ResumeState | None):
        config = context.config
        assert config.distill is not None
        self.training, self.tokenizer = config.training, tokenizer
        template = make_template(config.data.template, tokenizer, tools=config.data.tools)
        # The student's own distribution: neither temperature nor top-k.
        max_new_tokens = config.distill.max_new_tokens or config.training.seq_len
        sampling = SamplingConfig(max_new_tokens=max_new_tokens, temperature=1.0)
        slots = config.training.micro_batch_size
        stop_ids = template.stop_ids(tokenizer)
        self.rollouts = Rollouts(context, tokenizer, stop_ids, sampling, slots, resume)

    def answers(self, student: Decoder | HFModel, batch: Batch, step: int, number: int) -> Batch:
        """`input_ids` and `labels` (B, T) int64: the prompts of the rows of a batch, each with the
        student's answer, whose tokens are the targets.

        Args:
            student: as it is now.
            batch: rows of one example each.
            step: the optimizer step, from 1 on.
            number: of the micro-batch in that step.
        """
        prompts = list(self._prompts(batch))
        first = number * self.training.micro_batch_size
        asked = {"prompts": prompts, "places": range(first, first + len(prompts))}
        rollouts = self.rollouts.sample(student, asked, "train", step, 1)
        self.rollouts.write(step, [rollout.answer for rollout in rollouts])
        found = pad_rollouts(rollouts, self.tokenizer.pad_id, self.training.seq_len)
        return {name: value.to(batch["labels"].device) for name, value in found.items()}

    def _prompts(self, batch: Batch) -> Iterator[PromptRow]:
        """What is before the last answer of each row."""
        rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        for (inputs, labels), [location] in zip(rows, batch["origin"], strict=True):
            ids, target = split_answer(inputs, labels)
            assert target  # rows of padding are for validation alone
            texts = self.tokenizer.decode(ids), self.tokenizer.decode(target)
            yield PromptRow(np.array(ids), *texts, location)
