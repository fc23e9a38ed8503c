"""Stage grpo: the model learns from the rewards of its own answers
(group relative policy optimization).

    prompts ─▶ a group of answers to each ─▶ rewards ─▶ advantages        `GRPOModule.sample`
            ─▶ micro-batches of answers (B, T), for grpo.inner_steps optimizer steps

A step trains on micro_batch_size x grad_accum_steps answers, which are the groups of as many
prompts as that makes. They are sampled when the first of these steps begins, by the model as it is
then, and are kept until the last of them; a checkpoint between them contains them (rollouts.py). The
loss is in tinylm/objectives/grpo.py, rewards are in tinylm/rewards.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import RunData
from model import BatchLoss, TrainingModule
from tinylm.checkpoint.initial import InitialModel, reference_to
from tinylm.common.statistics import mean
from tinylm.config.schema import Config, SamplingConfig
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import adapters_off
from tinylm.objectives.grpo import (
    TokenScores,
    group_advantages,
    has_spread,
    loss_of_answers,
    mean_over_tokens,
    policy_loss,
    score_tokens,
)
from tinylm.rewards.rollouts import shown_rollout
from tinylm.rewards.table import RewardSum, Scored
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.prompts import PromptRow, build_prompts, count_shared, fingerprint_of_prompts
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch, RankShare, RowDataset
from training.build import build_initial, build_model
from training.context import RunContext
from training.resume import ResumeState, require_same_model
from training.run import Stage
from training.stages.pretrain import learn_tokenizer
from training.stages.rollouts import Rollouts
from training.stages.sft import find_data, log_contents

# Answers that each validation shows.
N_SHOWN = 2


# --- the data -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptShare(RankShare):
    """The prompts, `size` of them, of the batch of answers that a micro-batch is a part of."""

    n_batches: int = 1
    """micro-batches that are trained on a batch of answers, in all its optimizer steps"""

    def places(self, k: int) -> range:
        """The places of the prompts.

        >>> [list(PromptShare(2, n_batches=3).places(k)) for k in (0, 2, 3)]
        [[0, 1], [0, 1], [2, 3]]
        """
        return super().places(k // self.n_batches)


class PromptData(RunData):
    """The prompts of a run on rewards; each micro-batch gets those of its batch of answers."""

    def __init__(self, config: Config, tokenizer: Tokenizer, device: str):
        super().__init__(config, tokenizer)
        assert config.grpo is not None
        self.grpo, self.reward = config.grpo, RewardSum(config.grpo, device)
        self.template = make_template(config.data.template, tokenizer, tools=config.data.tools)
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_prompts: list[PromptRow] = []
        self.val_prompts: list[PromptRow] = []

    def prepare(self) -> None:
        """Read and encode the prompts of both splits; raises as `build_prompts`."""
        self.train_prompts, train = self._prompts("train")
        self.val_prompts, val = self._prompts("val")
        self.system = train.most_common_system
        self.notes = [*train.notes(), *val.notes()]
        shared = count_shared(self.train_prompts, self.val_prompts)
        if shared:
            self.notes.append(
                f"warning: {shared} validation prompts are also training prompts; "
                "val_reward will be too high"
            )

    def located_rows(self) -> list[tuple[str, np.ndarray]]:
        return [(prompt.location, prompt.ids) for prompt in self.train_prompts]

    def describe(self) -> str:
        """One line about the training and validation data."""
        n_tokens = [len(prompt.ids) for prompt in self.train_prompts]
        return (
            f"data: {self.config.data.dataset}: train {len(self.train_prompts):,} prompts of "
            f"{sum(n_tokens) / len(n_tokens):.0f} tokens, validation {len(self.val_prompts):,}; "
            f"template {self.template.name}; "
            f"rewards {', '.join(part.reward for part in self.grpo.rewards)}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints see the same prompts and targets, and
        score answers with the same functions and verifiers.
        """
        return {
            "train": fingerprint_of_prompts(self.train_prompts),
            "val": fingerprint_of_prompts(self.val_prompts),
            "rewards": self.reward.fingerprint,
        }

    @property
    def n_prompts(self) -> int:
        """The prompts of a batch of answers."""
        training = self.config.training
        return training.micro_batch_size * training.grad_accum_steps // self.grpo.group_size

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        n_batches = self.config.training.grad_accum_steps * self.grpo.inner_steps
        share = share or PromptShare(self.n_prompts, n_batches=n_batches)
        return self.training_rows(self.train_prompts, collate_prompts, share)

    def val_dataset(self, share: RankShare | None = None) -> RowDataset:
        share = share or RankShare(self.n_prompts)
        return self.validation_rows(self.val_prompts, collate_prompts, share)

    def inspect_row(self, heading: str, row: PromptRow, place: int) -> Iterator[InspectedRow]:
        """A prompt to print; no token of it is trained."""
        labels = [IGNORE_INDEX] * len(row.ids)
        yield InspectedRow(f"{heading}: {row.location}", row.ids.tolist(), labels, None)

    def _prompts(self, which: Which) -> tuple[list[PromptRow], RowReport]:
        data, training = self.config.data, self.config.training
        return build_prompts(
            data,
            which,
            training.seed,
            self.template,
            self.tokenizer,
            # seq_len inputs are seq_len + 1 ids: the last one is only a target
            training.seq_len + 1 - self.grpo.max_new_tokens,
            to_conversation=conversation_parser(data),
            built_in=requested_built_in_rows(data),
        )


def collate_prompts(rows: Sequence[PromptRow | None], places: Sequence[int]) -> Batch:
    """The prompts and their places, which their random numbers depend on; no padding."""
    kept = [(row, place) for row, place in zip(rows, places, strict=True) if row is not None]
    return {
        "prompts": [row for row, _ in kept],
        "places": [place for _, place in kept],
        "origin": [row.location for row, _ in kept],
    }


# --- the module -----------------------------------------------------------------------------------


class GRPOModule(TrainingModule):
    """The policy answers prompts, and learns from the rewards of its answers.

    Dropout is off: the probabilities of a token in two steps must differ by the update alone.

    Args:
        config: the settings.
        decoder: the policy.
        references: what its checkpoints refer to.
        reference: a frozen copy of the model that the run started from; None if grpo.kl is 0, or
            if that is the policy without its adapters.
        data: its rewards, and how many prompts a batch of answers has.
        rollouts: its answers, with those of the checkpoint that the run continues from, if it was
            saved between two steps on them.
    """

    def __init__(
        self,
        config: Config,
        decoder: Decoder | HFModel,
        references: dict[str, Any],
        reference: Decoder | HFModel | None,
        data: PromptData,
        rollouts: Rollouts,
    ):
        super().__init__(config, decoder, "grpo", references)
        assert config.grpo is not None
        self.grpo, self.normalizer = config.grpo, config.training.micro_batch_size
        self.n_prompts, self.reward, self.rollouts = data.n_prompts, data.reward, rollouts
        self.reference = None if reference is None else reference.requires_grad_(False).eval()
        without_dropout(decoder)
        parts = [f"reward_{name}" for name in self.reward.names] if self.reward.names[1:] else []
        kl = ["kl"] if config.grpo.kl else []
        self.train_columns = (
            *("reward", "reward_std", "no_signal", "entropy", "clipped"),
            *("answer_tokens", "truncated", *kl, *parts),
        )
        self.val_columns = (
            *("val_reward", "val_pass_1", "val_pass_1_low", "val_pass_1_high"),
            *("val_pass_k", "val_pass_k_low", "val_pass_k_high"),
            *("val_answer_tokens", "val_truncated"),
        )

    def train(self, mode: bool = True) -> "GRPOModule":
        """Training mode, which is only the policy's."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def on_train_start(self) -> None:
        """Lightning's hook before the first step: open rollouts.jsonl."""
        self.rollouts.open_file()

    def passes_at(self, step: int, world_size: int) -> float | None:
        """How often the run has answered the training prompts after `step`."""
        if self.rows_per_pass is None:
            return None
        return -(-step // self.grpo.inner_steps) * self.n_prompts / self.rows_per_pass

    def stage_state(self) -> dict[str, Any]:
        """For a checkpoint between two steps on the same answers: the answers."""
        if self.progress.step % self.grpo.inner_steps == 0 or self.rollouts.kept is None:
            return {}
        return {"rollouts": self.rollouts.kept}

    # --- a batch of answers ---

    def sample(self, batch: Batch) -> None:
        """Let the policy as it is now answer the prompts; score the answers, write them to
        rollouts.jsonl, and keep them as micro-batches.
        """
        step, grpo = self.progress.step + 1, self.grpo
        rollouts = self.rollouts.sample(self.decoder, batch, "train", step, grpo.group_size)
        scored = self.reward([rollout.answer for rollout in rollouts])
        self.rollouts.write(step, scored)
        for part in self.rollouts.keep(rollouts, self._values(scored), self.device):
            if grpo.truncated == "mask":
                part["labels"][part["truncated"].bool()] = IGNORE_INDEX

    def _values(self, scored: Sequence[Scored]) -> dict[str, Tensor]:
        """The advantage of each answer, and what is logged of it: (N,) each."""
        G = self.grpo.group_size
        rewards = torch.tensor([item.reward for item in scored], dtype=torch.float64)  # (N,)
        groups = rewards.view(-1, G)  # (prompts, G)
        advantages = group_advantages(groups, normalize_std=self.grpo.normalize_std)
        values = {
            "advantages": advantages.flatten(),
            "reward": rewards,
            "reward_std": groups.std(dim=1).repeat_interleave(G),
            "no_signal": (~has_spread(groups)).repeat_interleave(G),
            "answer_tokens": torch.tensor([item.answer.n_tokens for item in scored]),
            "truncated": torch.tensor([item.answer.truncated for item in scored]),
        }
        for name in self.reward.names:
            values[f"reward_{name}"] = torch.tensor([item.parts[name] for item in scored])
        return values

    # --- the loss ---

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The loss of a micro-batch of answers; the first one of a batch of answers samples it."""
        number = len(self._losses)
        is_new = number == 0 and self.progress.step % self.grpo.inner_steps == 0
        if is_new or self.rollouts.kept is None:
            self.sample(batch)
        assert self.rollouts.kept is not None
        part = self.rollouts.kept[number]
        policy, balance_loss = self._score_tokens(self._features, self.decoder, part)
        if "old_log_probs" not in part:  # the first step on these answers is by who wrote them
            part["old_log_probs"] = policy.log_probs.detach()
            if self.grpo.kl:
                part["reference_log_probs"] = self._reference_log_probs(part)
        mask = part["labels"] != IGNORE_INDEX  # (B, T)
        found = policy_loss(
            policy.log_probs,
            part["old_log_probs"],
            part["advantages"],
            part.get("reference_log_probs"),
            self.grpo,
        )
        labels = [item["labels"] for item in self.rollouts.kept]
        n_trained = sum(int((item != IGNORE_INDEX).sum()) for item in labels)
        n_answers = sum(map(len, labels))
        loss = loss_of_answers(found.loss, mask, self.grpo, n_trained / n_answers)  # (B,)
        per_token = {"entropy": policy.entropy, "clipped": found.clipped, "kl": found.kl}
        sums = []
        for name in self.train_columns:
            value = part[name] if name in part else mean_over_tokens(per_token[name], mask)
            sums.append(value.detach().float().sum())
        n_targets = torch.tensor(len(loss), device=loss.device)
        regularizer = balance_loss * self.balance_coef
        return BatchLoss(loss.sum(), n_targets, mask.sum(), regularizer, torch.stack(sums))

    def _score_tokens(
        self, features: Callable[..., Any], model: Any, part: dict[str, Tensor]
    ) -> tuple[TokenScores, Tensor]:
        """The tokens of answers under a model, and its balance loss."""
        hidden, balance_loss = features(part["input_ids"])
        scores = score_tokens(
            hidden,
            model.head.weight,
            part["labels"],
            temperature=self.grpo.temperature,
            softcap=model.head.softcap,
        )
        return scores, balance_loss

    @torch.no_grad()
    def _reference_log_probs(self, part: dict[str, Tensor]) -> Tensor:
        """(B, T) of the answers under the reference."""
        if self.reference is not None:
            scores, _ = self._score_tokens(self.reference.features, self.reference, part)
            return scores.log_probs
        with adapters_off(self.decoder):
            scores, _ = self._score_tokens(self.decoder.features, self.decoder, part)
        return scores.log_probs

    # --- validation ---

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sums over the prompts of a batch: prompts, rewards, tokens, truncated answers; and how
        many prompts have 0, 1, ..., k answers that pass.
        """
        k = self.grpo.val_samples
        rollouts = self.rollouts.sample(self.decoder, batch, "val", 0, k)
        scored = self.reward([rollout.answer for rollout in rollouts])
        groups = [scored[start : start + k] for start in range(0, len(scored), k)]
        counts = [0] * (k + 1)
        for group in groups:
            counts[sum(item.passes for item in group)] += 1
        if batch_idx == 0:
            shown = [shown_rollout(group[0]) for group in groups[:N_SHOWN]]
            self.validation_sample = "\n".join(shown)
        sums = [
            sum(item.reward for item in scored) / k,
            sum(item.answer.n_tokens for item in scored) / k,
            sum(item.answer.truncated for item in scored) / k,
        ]
        return torch.tensor([*sums, *counts], dtype=torch.float64, device=self.device)

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """Mean reward, its opposite as the loss, and the shares of answers that pass and of prompts
        with an answer that passes, each with its 95% interval.
        """
        (reward, n_tokens, truncated), counts = totals[:3], totals[3:]
        k, n_prompts = len(counts) - 1, sum(counts)
        shares = [n / k for n, count in enumerate(counts) for _ in range(round(count))]
        pass_1 = mean(shares, seed=self.config.training.seed)
        pass_k = mean([float(share > 0) for share in shares])
        values = (
            *(reward / n_prompts, pass_1.value, pass_1.low, pass_1.high),
            *(pass_k.value, pass_k.low, pass_k.high),
            *(n_tokens / n_prompts, truncated / n_prompts),
        )
        return {"val_loss": -values[0]} | dict(zip(self.val_columns, values, strict=True))


def without_dropout(model: nn.Module) -> None:
    """Switch dropout off for good, in layers and in attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):  # a number in attention layers
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# --- building the stage ---------------------------------------------------------------------------


def open_data(context: RunContext, tokenizer: Tokenizer) -> PromptData:
    """The prompts of both splits; logs their number and the skipped rows."""
    data = PromptData(context.config, tokenizer, context.device)
    data.prepare()
    log_contents(data.describe(), data.notes)
    return data


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> GRPOModule:
    """The policy, and with grpo.kl its reference: the model that the run started from, also when it
    is resumed.
    """
    config = context.config
    assert config.grpo is not None and isinstance(data, PromptData)
    data.reward([])  # a function that cannot be loaded is an error before the first step
    policy, references = build_model(context, resume, initial)
    reference = None
    if config.grpo.kl and config.lora is None:
        assert initial is not None, "the table of unsupported pairs sees to it"
        reference = build_initial(config, initial)
        references["reference"] = reference_to(initial, reference, context.checkpoint_dir)
        require_same_model(
            resume,
            references["reference"],
            name="reference",
            init_from=config.training.init_from,
        )
    grpo, stop_ids = config.grpo, data.template.stop_ids(data.tokenizer)
    sampling = SamplingConfig(max_new_tokens=grpo.max_new_tokens, temperature=grpo.temperature)
    rollouts = Rollouts(context, data.tokenizer, stop_ids, sampling, grpo.slots, resume)
    return GRPOModule(config, policy, references, reference, data, rollouts)


GRPO = Stage(
    name="grpo",
    find_data=find_data,
    learn_tokenizer=learn_tokenizer,
    open_data=open_data,
    build_module=build_module,
    next_command="python infer.py --ckpt {model} --chat",
)
