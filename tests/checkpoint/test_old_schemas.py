"""Checkpoints of earlier schemas stay usable: they load, resume to the numbers of their time, sample and export.

`data/schema1` holds three runs saved in the middle, between two rows of metrics: pretraining, LoRA
on it, and DPO on it.
Beside each are its settings and the rows of metrics that the code of its time wrote when it resumed from it. The text
that the code of its time sampled from each is `SAMPLES`.
"""

import csv
import shutil
from pathlib import Path

import pytest

import finetune
import train
from model import Progress
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.load import load_model
from tinylm.checkpoint.old_schemas import SCHEMA, UPGRADES, upgrade
from tinylm.config.schema import SamplingConfig
from tinylm.generate.engine import Engine
from tinylm.interchange.hf_export import export_hf
from tinylm.runs.metrics_csv import MEASURED

ROOT = Path(__file__).parents[2]
SCHEMA_1 = Path(__file__).parent / "data" / "schema1"
SAMPLES = {
    "pretrain": "dpyn.  wrbywrhnr",
    "lora": "dpyn.  wrbywrhnr",
    "dpo": "dpyna  wrbywrhnr",
}


def rows(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file as numbers, without speed and memory, which no two runs share."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: float(text) for name, text in row.items() if text and name not in MEASURED}
            for row in csv.DictReader(file)
        ]


def test_there_is_an_upgrade_from_every_older_schema() -> None:
    assert set(UPGRADES) == set(range(1, SCHEMA))


@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_state_is_read_in_the_current_form(name: str) -> None:
    """The values are kept; DPO has sums of other metrics, which schema 1 called measures."""
    state = checkpoint_format.read(SCHEMA_1 / f"{name}.ckpt")
    progress = Progress(**state["progress"])
    assert state["schema"] == SCHEMA
    assert (progress.step, progress.tokens) == (state["step"], state["tokens"])
    # between two rows of metrics: one step's sums, of 512 tokens, 83 tokens and 8 pairs
    assert progress.n_targets == {"pretrain": 512, "lora": 83, "dpo": 8}[name]
    assert len(progress.metric_sums) == len(progress.train_metrics) == (6 if name == "dpo" else 0)


def test_a_state_of_the_current_schema_is_unchanged() -> None:
    state = checkpoint_format.read(SCHEMA_1 / "pretrain.ckpt")
    assert all(upgrade(state)[key] is value for key, value in state.items())


def test_an_imported_model_of_schema_1_has_no_progress() -> None:
    """It also lacks the keys of references, which the first checkpoints did not have."""
    state = upgrade({"schema": 1, "stage": "pretrain", "config": {"dpo": None}})
    references = {"base": None, "hf_config": None, "reference": None}
    expected = {"schema": SCHEMA, "stage": "pretrain", "config": {"dpo": None}}
    assert state == expected | references


def test_renamed_settings_of_schema_1_have_their_new_names() -> None:
    state = upgrade({"schema": 1, "config": {"dpo": {"length_normalised": True, "beta": 0.2}}})
    assert state["config"] == {"dpo": {"length_normalized": True, "beta": 0.2}}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_run_resumes_to_the_metrics_that_the_old_code_wrote(
    name: str, tmp_path: Path
) -> None:
    """Equal to the last bit on the kind of machine that wrote them; another CPU may round the last digits otherwise."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    step = 5 if name == "pretrain" else 3
    shutil.copy(SCHEMA_1 / f"{name}.ckpt", folder / f"step-{step:06d}.ckpt")
    settings = [
        f"training.checkpoint_dir={folder}",
        f"training.log_dir={tmp_path / 'logs'}",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    if name == "pretrain":
        settings.append(f"data.dataset={ROOT / 'data' / 'tiny_corpus.txt'}")
    else:
        # A reference to another checkpoint is relative to the folder: the base moves with the run.
        shutil.copy(SCHEMA_1 / "pretrain.ckpt", folder / "pretrain.ckpt")
        rows_file = "tiny_instructions.jsonl" if name == "lora" else "tiny_preferences.jsonl"
        settings += [
            f"training.init_from={folder / 'pretrain.ckpt'}",
            f"data.dataset={ROOT / 'data' / rows_file}",
        ]
    program = train if name == "pretrain" else finetune
    assert program.main(["--config", str(SCHEMA_1 / f"{name}.yaml"), *settings]) == 0
    found = rows(tmp_path / "logs" / name / "metrics.csv")
    expected = rows(SCHEMA_1 / f"{name}.csv")
    for row in found:
        del row["passes"]  # a column of later versions
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for found_row, expected_row in zip(found, expected, strict=True):
        assert found_row == pytest.approx(
            expected_row, rel=1e-6, abs=1e-6
        )  # rewards are differences


@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_checkpoint_samples_the_text_that_the_old_code_sampled(name: str) -> None:
    """The adapter finds its base by the path that is relative to its folder."""
    loaded = load_model(SCHEMA_1 / f"{name}.ckpt")
    sampling = SamplingConfig(max_new_tokens=16, temperature=1.0, top_k=20, seed=0)
    completions = Engine(loaded.model, loaded.tokenizer).generate("The", sampling)
    assert completions[0].text == SAMPLES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_an_old_checkpoint_exports(name: str, tmp_path: Path) -> None:
    """`export_hf` compares the logits of what it wrote with ours before it returns."""
    exported = export_hf(SCHEMA_1 / f"{name}.ckpt", tmp_path / "exported")
    assert exported.model_type == "llama"
    assert exported.difference < 1e-4
