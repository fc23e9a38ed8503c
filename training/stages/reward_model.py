"""Stage reward_model: a decoder with one output learns to give the better of two answers the
higher reward.

pairs ─▶ row order ─▶ micro-batch: chosen and rejected texts (2B, T) and their lengths (2B,)
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data import RunData
from model import BatchLoss, TrainingModule
from tinylm.checkpoint.format import NO_REFERENCES
from tinylm.checkpoint.initial import InitialModel
from tinylm.checkpoint.load import build_judge
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.model.reward_model import RewardModel
from tinylm.objectives.reward_model import METRICS, VAL_METRICS, reward_metrics, score_rewards
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.preferences import PreferencePair, build_pairs
from tinylm.rows.reward_pairs import collate_reward_pairs
from tinylm.rows.skipped_rows import RowReport
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch
from training.build import build_initial
from training.context import RunContext
from training.resume import ResumeState
from training.run import Stage
from training.stages.dpo import PreferenceData
from training.stages.pretrain import learn_tokenizer
from training.stages.sft import find_data, log_contents
from training.support import require_supported


class RewardData(PreferenceData):
    """The batches of a reward model's run: the pairs of preferences as whole texts."""

    def collate(self) -> "partial[Batch]":
        """`collate_reward_pairs` with the settings of the run."""
        return partial(
            collate_reward_pairs,
            seq_len=self.config.training.seq_len,
            pad_id=self.tokenizer.pad_id,
        )

    def inspect_row(self, heading: str, row: PreferencePair, place: int) -> Iterator[InspectedRow]:
        """Both texts to print; the label marks the last token, whose reward is compared."""
        for name, example in (("chosen", row.chosen), ("rejected", row.rejected)):
            ids = example.ids.tolist()
            labels = [IGNORE_INDEX] * len(ids)
            labels[-2] = ids[-1]
            yield InspectedRow(f"{heading}, {name}: {example.location}", ids, labels, None)

    def _pairs(self, which: Which) -> tuple[list[PreferencePair], RowReport]:
        training = self.config.training
        # A text has at most seq_len tokens: none of them is a target alone.
        n_inputs = training.seq_len - 1
        return build_pairs(
            self.config.data, which, training.seed, self.template, self.tokenizer, n_inputs
        )


class RewardModule(TrainingModule):
    """A reward model learns from pairs; other stages train a decoder in its place."""

    train_columns = METRICS
    val_columns = VAL_METRICS

    def __init__(self, config: Config, model: RewardModel, references: dict[str, Any]):
        super().__init__(config, model, "reward_model", references)
        assert config.reward_model is not None
        self.normalizer = config.training.micro_batch_size
        self.center_coef = config.reward_model.center_coef

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The pairwise loss of the rewards of both answers, from one forward pass."""
        lengths = batch["lengths"]  # (2B,)
        hidden, balance_loss = self._features(batch["input_ids"])  # (2B, T, D)
        real = lengths.chunk(2)[0] > 0  # (B,) rows of padding have no tokens
        found = score_rewards(self.decoder.rewards(hidden, lengths), real, self.center_coef)
        regularizer = balance_loss * self.balance_coef
        return BatchLoss(found.loss.sum(), real.sum(), lengths.sum(), regularizer, found.metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(loss sum, pairs, sums of METRICS) of one batch."""
        found = self.batch_loss(batch, label_smoothing=0.0)
        return torch.cat((torch.stack((found.loss, found.n_targets)), found.metrics))

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        return reward_metrics(totals)


def open_data(context: RunContext, tokenizer: Tokenizer) -> RewardData:
    """The pairs of both splits, read and encoded; logs their number and the skipped rows."""
    data = RewardData(context.config, tokenizer)
    data.prepare()
    log_contents(data.describe(), data.notes)
    return data


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> RewardModule:
    """A reward model with the weights of the checkpoint, else of the model that the run starts
    from, with a head of zeros.
    """
    config = context.config
    if resume is not None:
        model = build_judge(RewardModel, config.model, resume.state["weights"])
        return RewardModule(config, model, dict(NO_REFERENCES))
    assert initial is not None, "the table of unsupported pairs sees to it"
    decoder = build_initial(config, initial)
    if not isinstance(decoder, Decoder):
        require_supported(context.stage, config, context.device, frozenset({"hf_model"}))
    model = RewardModel(config.model)
    model.init_from_decoder(decoder)
    return RewardModule(config, model, dict(NO_REFERENCES))


REWARD_MODEL = Stage(
    name="reward_model",
    find_data=find_data,
    learn_tokenizer=learn_tokenizer,
    open_data=open_data,
    build_module=build_module,
    next_command="python infer.py --ckpt MODEL --prompt QUESTION --best-of 8 --verifier {model}",
)
