"""The table of what cannot be combined: every row refuses a run that has its features, and no other."""

from pathlib import Path
from typing import Any

import pytest

from tinylm.common.errors import UserError
from tinylm.config.loader import load_config
from training.features import FEATURES, MODEL_FEATURES
from training.support import UNSUPPORTED, Unsupported, require_supported

STAGES = ("pretrain", "sft", "dpo", "grpo", "reward_model", "verifier", "plan")
# Settings that switch a feature on; the others are stages, devices and models.
ON: dict[str, list[str]] = {
    "distill section": ["distill={teacher: a.ckpt}"],
    "own samples": ["distill={teacher: a.ckpt, own_samples: 0.5}"],
    "dpo section": ["dpo={beta: 0.1}"],
    "grpo section": ["grpo={group_size: 8}"],
    "reward_model section": ["reward_model={center_coef: 0}"],
    "verifier section": ["verifier={n_wrong: 1}"],
    "duration of positions": ["training.duration=1M tokens"],
    "duration by the model": ["training.duration=1e15 flops"],
    "duration in time": ["training.duration=20min"],
    "micro-batch auto": ["training.micro_batch_size=auto", "training.batch_size=8"],
    "several devices": ["hardware.devices=2"],
    "lora": ["lora={r: 2}"],
    "nf4": ["lora={r: 2, base_weights: nf4}"],
    "reference of its own": ["dpo={reference: copy}"],
    "new weights": ["training.init_from=null"],
    "train_on response": ["training.train_on=response"],
    "train_on all": ["training.train_on=all"],
    "task": ["data.task=sst2"],
    "tools": ["data.tools=calculator"],
    "skip_bad_rows": ["data.skip_bad_rows=1"],
    "packed": ["data.packing=packed"],
    "eval_tasks": ["training.eval_tasks={sst2: smoke}"],
    "mix": ["data.mix=[{dataset: a.jsonl}]"],
    "mix of rows": ["data.mix=[{dataset: a.jsonl, template: plain}]"],
    "truncation_side": ["data.truncation_side=left"],
    "learned tokenizer": ["tokenizer.kind=char"],
    "muon": ["training.optimizer=muon"],
    "adamw_8bit": ["training.optimizer=adamw_8bit"],
    "fsdp": ["hardware.strategy=fsdp"],
    "fp16": ["hardware.precision=16"],
    "bf16": ["hardware.precision=bf16"],
}
# The opposite of every feature: a run that no row refuses.
OFF = [
    "training.init_from=a.ckpt",
    "data.packing=padded",
    "tokenizer.kind=byte",
    "training.optimizer=adamw",
    "hardware.strategy=ddp",
    "hardware.precision=32",
]


def refuse(row: Unsupported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserError:
    """The error of a run that has the features of `row` and as few others as possible."""
    (tmp_path / "empty.yaml").write_text("{}", encoding="utf-8")
    overrides = [*OFF]
    if {"verifier section", "grpo section"} & set(row.features):  # the config refuses this pair
        overrides.remove("data.packing=padded")
    if "new weights" in row.features and "train_on response" not in row.features:
        overrides.append("training.train_on=all" if "sft" in row.features else OFF[0])
    for feature in row.features:
        overrides += ON.get(feature, [])
    config = load_config(tmp_path / "empty.yaml", overrides)
    usual = "sft" if {"distill section", "own samples"} & set(row.features) else "pretrain"
    stage = next((feature for feature in row.features if feature in STAGES), usual)
    device = "cpu" if "no CUDA" in row.features else "cuda"
    package = None if "no bitsandbytes" in row.features else object()
    monkeypatch.setattr("training.features.find_spec", lambda name: package)
    gpu_has_bf16 = "GPU without bf16" not in row.features
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: gpu_has_bf16)
    model_features = frozenset(row.features) & frozenset(MODEL_FEATURES)
    with pytest.raises(UserError) as caught:
        require_supported(stage, config, device, model_features)
    return caught.value


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: " + ".join(row.features))
def test_each_row_of_the_table_is_the_error_of_its_features(
    row: Unsupported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """WHERE: PROBLEM. FIX. of the row itself: no earlier row matches too."""
    expected = f"{row.where}: {row.problem}. {row.fix}."
    assert str(refuse(row, tmp_path, monkeypatch)) == expected


@pytest.mark.parametrize("row", UNSUPPORTED, ids=lambda row: " + ".join(row.features))
def test_each_feature_of_a_row_exists(row: Unsupported) -> None:
    """A misspelled feature would make its row useless."""
    assert set(row.features) <= {*STAGES, *FEATURES, *MODEL_FEATURES}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model_features", [frozenset(), frozenset({"hf_model"})])
def test_a_run_without_these_features_is_supported(
    stage: str, model_features: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hugging Face model is refused by stages with a head of their own and by the flags before a run."""
    (tmp_path / "empty.yaml").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    config = load_config(tmp_path / "empty.yaml", OFF)
    if model_features and stage in ("reward_model", "verifier", "plan"):
        with pytest.raises(UserError, match="Hugging Face model"):
            require_supported(stage, config, "cuda", model_features)
    else:
        require_supported(stage, config, "cuda", model_features)
