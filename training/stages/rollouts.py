"""The answers that a model is trained on and wrote itself: sampled, written down, stored and
restored.

    prompts of a batch ─▶ `Rollouts.sample`: n answers to each, by the model as it is now
                       ─▶ `Rollouts.write`:  a line of rollouts.jsonl for each
                       ─▶ `Rollouts.keep`:   micro-batches (B, T), which a checkpoint contains (GRPO)

What is sampled is a function of (weights, seed, step, prompts, slots, threads), to the last bit, so
that a resumed run samples the same answers. Which prompts are answered, and what is learned from an
answer, is decided by the stage.
"""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.rewards.answer import Answer
from tinylm.rewards.rollouts import (
    Rollout,
    answer_seed,
    batches_by_length,
    rollout_row,
    sample_rollouts,
)
from tinylm.rewards.table import Scored
from tinylm.runs.rollouts import ROLLOUTS, RolloutsFile
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Batch
from training.context import RunContext
from training.resume import ResumeState


class Rollouts:
    """The sampled answers of a run.

    Args:
        context: its settings, and the folder of rollouts.jsonl.
        tokenizer: of the model.
        stop_ids: of the template.
        sampling: how answers are sampled; the seed is not used.
        slots: answers that are sampled at once.
        resume: the checkpoint that the run continues from; answers in it are kept.
    """

    def __init__(
        self,
        context: RunContext,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        sampling: SamplingConfig,
        slots: int,
        resume: ResumeState | None,
    ):
        self.context, self.config = context, context.config
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.sampling, self.slots = sampling, slots
        self.kept: list[dict[str, Tensor]] | None = _restored(resume)
        """the answers that are being trained, a dict of tensors for each micro-batch; None before
        the first step on new ones"""
        self._file: RolloutsFile | None = None
        self._last_step = 0 if resume is None else resume.state["step"]
        self._is_new = resume is None or not resume.is_in(context.checkpoint_dir)

    def open_file(self) -> None:
        """Open rollouts.jsonl, on rank 0, before the first step."""
        if rank_zero_only.rank == 0:
            path = self.context.log_dir / ROLLOUTS
            hold = self.context.hold
            self._file = RolloutsFile(path, self._last_step, keep_old=self._is_new, hold=hold)

    def sample(
        self, model: Decoder | HFModel, batch: Batch, which: Which, step: int, n: int
    ) -> list[Rollout]:
        """`n` answers to each of the batch's `prompts`, by the model in eval mode. Their random
        numbers depend on the prompts' `places`.
        """
        seed = self.config.training.seed
        # A new one each time: what an engine generated before changes the rounding, and a kept one
        # would not notice the steps of a fused AdamW (docs/LOG.md).
        engine = Engine(model, self.tokenizer, slots=self.slots, tools=self.config.data.tools)
        was_training = model.training
        model.eval()
        # In the precision of the weights: the engine's kernels know no autocast. Matrices in nf4
        # compute in the precision of the run.
        with torch.no_grad(), torch.autocast(engine.device.type, enabled=False):
            rollouts = sample_rollouts(
                engine,
                batch["prompts"],
                [answer_seed(seed, which, step, place) for place in batch["places"]],
                n,
                sampling=self.sampling,
                # seq_len inputs are seq_len + 1 ids: the last one is only a target
                max_len=self.config.training.seq_len + 1,
                stop_ids=self.stop_ids,
            )
        model.train(was_training)
        return rollouts

    def write(self, step: int, answers: Sequence[Answer | Scored]) -> None:
        """Add answers that `step` is the first to train on to rollouts.jsonl."""
        if self._file is not None:
            self._file.append([rollout_row(step, answer) for answer in answers])

    def keep(
        self, rollouts: Sequence[Rollout], values: dict[str, Tensor], device: torch.device
    ) -> list[dict[str, Tensor]]:
        """The answers as micro-batches: `input_ids` and `labels` (B, T), and their part of each of
        `values` (N,) in fp32. They are kept until others are.
        """
        parts = batches_by_length(
            rollouts,
            values,
            batch_size=self.config.training.micro_batch_size,
            pad_id=self.tokenizer.pad_id,
            seq_len=self.config.training.seq_len,
        )
        self.kept = [{name: value.to(device) for name, value in part.items()} for part in parts]
        return self.kept


def _restored(resume: ResumeState | None) -> list[dict[str, Tensor]] | None:
    """The answers in a checkpoint that was saved between two steps on them."""
    found = None if resume is None else resume.state.get("rollouts")
    if found is None:
        return None
    return [{name: value.clone() for name, value in part.items()} for part in found]
