"""A checkpoint ready for use: `load_model` for one that writes text,
`load_verifier` and `load_reward_model` for those that score answers.

Everything is in the checkpoint; only an adapter needs another file, its base, into which it is
merged. For training, which continues from weights or puts adapters beside them, see `initial`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

# models.rounded is imported for weights with fewer bits
from tinylm import model as models
from tinylm.checkpoint.check import rounding_of, tokenizer_of
from tinylm.checkpoint.format import read
from tinylm.checkpoint.info import CheckpointInfo, info_of
from tinylm.checkpoint.initial import (
    fingerprint_of,
    open_initial_model,
    refuse_verifier,
    resolve_reference,
    rounded_decoder,
    whole_model,
)
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import merge, require_adapter
from tinylm.model.reward_model import RewardModel
from tinylm.model.verifier import Verifier, verifier_class
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

Judge = TypeVar("Judge", Verifier, RewardModel)


@dataclass(frozen=True)
class Loaded:
    """A language model in evaluation mode, an adapter merged into its base,
    and what it was trained with.
    """

    model: Decoder | HFModel
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo
    system: str | None = None
    """the most common system turn of the rows that it was tuned on;
    only checkpoints of such rows have the key"""

    @property
    def template(self) -> str | None:
        """The name of the template that it was tuned with (`make_template`);
        None for a base model.
        """
        return template_name(self.config, self.info.stage)

    @property
    def tools(self) -> str | None:
        """The tool that it was tuned to call (data.tools); None for a base model."""
        return self.config.data.tools if self.info.stage in CHAT_STAGES else None

    def make_template(self, tokenizer: Tokenizer | None = None) -> Template | None:
        """The template that it was tuned with, with its tool; None for a base model.

        Args:
            tokenizer: in place of its own.
        """
        if self.template is None:
            return None
        return make_template(self.template, tokenizer or self.tokenizer, tools=self.tools)


def template_name(config: Config, stage: str) -> str | None:
    """The name of the template that a model of this stage was tuned with; None for a base model."""
    return config.data.template if stage in CHAT_STAGES else None


def load_model(
    path: str | Path,
    device: str = "cpu",
    *,
    mapped: bool = False,
    as_stored: Collection[str] = (),
) -> Loaded:
    """The language model in the checkpoint at `path`; arguments and errors are those of
    `model_of`.
    """
    path = Path(path)
    return model_of(path, read(path), device, mapped=mapped, as_stored=as_stored)


def model_of(
    path: Path,
    state: dict[str, Any],
    device: str,
    *,
    mapped: bool = False,
    as_stored: Collection[str] = (),
) -> Loaded:
    """The language model in the state of the checkpoint at `path`, in fp32.

    Args:
        mapped: whether its weights may stay in the file, which takes no time and no memory. For
            programs that generate: the file may be replaced or deleted, as all programs do it, but
            not written to as long as the model is used.
        as_stored: int8, int4 or both: to compute in if the weights are stored so and the device
            supports it; only for generation.

    Raises:
        UserError: it is a verifier, or an adapter whose base is missing or has changed.
    """
    refuse_verifier(path, state)
    config = Config.from_plain(state["config"])
    rounding = rounding_of(state)
    is_rounded = rounding in as_stored
    problem = models.rounded.rounding_problem(device) if is_rounded else None
    if problem is not None:
        logger.info("weights: fp32, not %s as in the checkpoint: %s", rounding, problem)
    if is_rounded and problem is None:
        model = rounded_decoder(config.model, state)
    elif config.lora is None:
        model = whole_model(config.model, state, path, mapped=mapped)
    else:
        model = _merged_model(path, state, config)
    tokenizer = tokenizer_of(path, state)
    info = info_of(path, state)
    return Loaded(model.to(device).eval(), tokenizer, config, info, state.get("system"))


def _merged_model(path: Path, state: dict[str, Any], config: Config) -> Decoder | HFModel:
    """The base of the adapter at `path`, with the positions of the adapter's training, and with
    the adapter merged into it.
    """
    base, lora = state["base"], config.lora
    assert lora is not None
    try:
        names = config.tokenizer.special_tokens
        initial = open_initial_model(resolve_reference(base["path"], path), names)
        model = initial.build(config.model)
    except UserError as error:
        raise error.within(path, f"the base of this adapter ({base['path']})") from None
    fingerprint = fingerprint_of(model)
    if fingerprint != base["fingerprint"]:
        problem = (
            f"this adapter was trained on {initial.name} with fingerprint {base['fingerprint']}, "
            f"but now it has {fingerprint}"
        )
        raise UserError(path, problem, "Restore the model that it was trained on")
    try:
        require_adapter(model, state["weights"], lora, initial.new_tokens)
    except UserError as error:
        raise error.within(path) from None
    merge(model, state["weights"], lora, initial.new_tokens)
    return model


@dataclass(frozen=True)
class LoadedJudge(Generic[Judge]):
    """A model that scores answers, in evaluation mode, and what it was trained with."""

    model: Judge
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo


LoadedVerifier = LoadedJudge[Verifier]
LoadedRewardModel = LoadedJudge[RewardModel]
KINDS = {"verifier": "verifier", "reward_model": "reward model"}
"""what a stage other than these trains is a language model"""


def load_verifier(path: str | Path, device: str = "cpu") -> LoadedVerifier:
    """The verifier in the checkpoint at `path`; raises as `verifier_of`."""
    path = Path(path)
    return verifier_of(path, read(path), device)


def verifier_of(path: Path, state: dict[str, Any], device: str) -> LoadedVerifier:
    """The verifier in the state of the checkpoint at `path`.

    Raises:
        UserError: it is another model.
    """
    return _judge_of(path, state, device, "verifier", Verifier)


def load_reward_model(path: str | Path, device: str = "cpu") -> LoadedRewardModel:
    """The reward model in the checkpoint at `path`; raises as `reward_model_of`."""
    path = Path(path)
    return reward_model_of(path, read(path), device)


def reward_model_of(path: Path, state: dict[str, Any], device: str) -> LoadedRewardModel:
    """The reward model in the state of the checkpoint at `path`.

    Raises:
        UserError: it is another model.
    """
    return _judge_of(path, state, device, "reward_model", RewardModel)


def _judge_of(
    path: Path, state: dict[str, Any], device: str, stage: str, kind: type[Judge]
) -> LoadedJudge[Judge]:
    if state["stage"] != stage:
        found = KINDS.get(state["stage"], "language model")
        problem = f"must be a {KINDS[stage]}, got a {found} (stage {state['stage']})"
        fix = f"Train a {KINDS[stage]}: python finetune.py --config configs/{stage}.yaml"
        raise UserError(path, problem, fix)
    config = Config.from_plain(state["config"])
    if config.verifier is not None:
        kind = verifier_class(config.verifier.kind)
    model = build_judge(kind, config.model, state["weights"]).to(device).eval()
    tokenizer = tokenizer_of(path, state)
    if isinstance(model, Verifier):
        model.separator_id = tokenizer.eos_id
    return LoadedJudge(model, tokenizer, config, info_of(path, state))


def build_judge(kind: type[Judge], config: ModelConfig, weights: dict[str, torch.Tensor]) -> Judge:
    """A verifier or a reward model with exactly these weights; RuntimeError names one that is
    missing, extra or of another shape.
    """
    model = kind(config)
    model.load_state_dict(weights, strict=True)
    return model


def holds_adapter(path: Path) -> bool:
    """Whether the checkpoint at `path` has an adapter alone, and no whole model."""
    return Config.from_plain(read(path)["config"]).lora is not None
