"""The configs for tasks and Hugging Face models: each trains and is evaluated on a random model of
its architecture and built-in rows.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import evaluate_checkpoints
import finetune
import infer
from tests.conftest import CONFIGS as ALL
from tests.model import test_seq2seq
from tests.training import test_finetune
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint import info as checkpoint_info
from tinylm.common.hub import HF_PREFIX
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import with_data_of_task
from tinylm.eval.tasks.table import TASKS
from tinylm.planning import precision
from tinylm.rows.templates import IM_END, IM_START

ROOT = Path(__file__).parents[2]
CONFIGS = {
    path.stem: path
    for path in ALL
    if (load_config(path).training.init_from or "").startswith(HF_PREFIX)
}
OF_TASKS = {
    name: load_config(path).data.task
    for name, path in CONFIGS.items()
    if load_config(path).data.task
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models by the part of a config's name: gpt2, t5, smollm2 (a llama)."""
    import transformers

    folder = tmp_path_factory.mktemp("models")
    test_seq2seq.save(folder / "t5", "flan", vocab_size=258)
    for name, kind in (("gpt2", "gpt2"), ("smollm2", "llama")):
        test_finetune.save_llama(folder / name)
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "vocab_size": 259,
        }
        config = transformers.AutoConfig.for_model(
            kind, **sizes, bos_token_id=256, eos_token_id=256
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        special = {"eos_token": "<|endoftext|>", "additional_special_tokens": [IM_START, IM_END]}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
        backend = json.loads((folder / name / "tokenizer.json").read_text(encoding="utf-8"))
        token = backend["added_tokens"][0]
        backend["added_tokens"] += [
            token | {"id": 257, "content": IM_START},
            token | {"id": 258, "content": IM_END},
        ]
        (folder / name / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    return folder


def run(name: str, models: Path, tmp_path: Path, *overrides: str) -> Path:
    """The final checkpoint of two steps of a config."""
    model = next(model for model in ("gpt2", "t5", "smollm2") if model in name)
    small = [
        "training.max_steps=2",
        "training.seq_len=400",
        "training.micro_batch_size=1",
        "training.grad_accum_steps=1",
    ]
    small += ["training.val_every_steps=2", "sampling.max_new_tokens=4"]
    places = [
        f"training.checkpoint_dir={tmp_path}/ckpt",
        f"training.log_dir={tmp_path}/logs",
        f"training.init_from=hf:{models / model}",
    ]
    assert (
        finetune.main(
            ["--config", str(CONFIGS[name]), *small, *places, "hardware.threads=1", *overrides]
        )
        == 0
    )
    return tmp_path / "ckpt" / "final.ckpt"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TASKS)
def test_a_task_is_trained_and_evaluated(
    name: str, models: Path, tmp_path: Path, capsys: Any
) -> None:
    """As its config says, on rows that the task brings; a file of the same columns is read alike.
    The checkpoint is asked in its template.
    """
    final = run(name, models, tmp_path, "data.dataset=smoke")
    task = TASKS[OF_TASKS[name]]
    state = checkpoint_format.read(final)
    assert (state["config"]["data"]["task"], state["config"]["data"]["dataset"]) == (
        task.name,
        "smoke",
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in task.smoke), encoding="utf-8")
    capsys.readouterr()
    flags = [
        "--tasks",
        task.name,
        "--smoke",
        "--limit",
        "2",
        "--shots",
        "0,1",
        "--out",
        str(tmp_path / "results"),
        "--device",
        "cpu",
    ]
    assert evaluate_checkpoints.main(["--checkpoints", str(final), *flags]) == 0
    measures = json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))[
        "measures"
    ]
    assert {(row["task"], row["shots"], row["n_examples"]) for row in measures} == {
        (task.name, 0, 2),
        (task.name, 1, 2),
    }
    (tmp_path / "file").mkdir()
    from_file = run(
        name, models, tmp_path / "file", f"data.dataset={rows}", "data.val_fraction=0.4"
    )
    assert checkpoint_info.describe(from_file).shape == checkpoint_info.describe(final).shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sms-gpt2-lora", "samsum-t5-lora", "lora-smollm2"])
def test_lora_takes_bf16_where_it_is_faster_for_the_shapes_of_its_base(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement sees the sizes that the fixture gave the bases, not those of our defaults."""
    seen = []

    def measure_ratio(config: Config, device: str) -> float:
        seen.append(config.model)
        return 2.0

    monkeypatch.setattr(precision, "measure_ratio", measure_ratio)
    final = run(name, models, tmp_path, *(("data.dataset=smoke",) if name in OF_TASKS else ()))
    assert checkpoint_format.read(final)["config"]["hardware"]["precision"] == "bf16"
    [sizes] = seen
    expected = {"d_model": 32, "n_heads": 4} if "t5" in name else {"d_model": 16, "n_heads": 2}
    assert {key: getattr(sizes, key) for key in expected} == expected


@pytest.mark.slow
def test_own_rows_on_a_model_with_chat_markers(models: Path, tmp_path: Path, capsys: Any) -> None:
    """configs/lora-smollm2.yaml unchanged, and the chat after it."""
    final = run("lora-smollm2", models, tmp_path)
    capsys.readouterr()
    assert (
        infer.main(
            ["--ckpt", str(final), "--prompt", "Hello", "--max-new-tokens", "3", "--device", "cpu"]
        )
        == 0
    )
    assert (
        f"template: {load_config(CONFIGS['lora-smollm2']).data.template}" in capsys.readouterr().err
    )


def test_without_a_data_set_the_rows_are_the_tasks_own_on_the_hub() -> None:
    """What is written wins; a resumed run says the same again."""
    config = with_data_of_task(load_config(CONFIGS["gsm8k-gpt2-lora"]))
    assert (config.data.dataset, config.data.dataset_config, config.data.split) == (
        "openai/gsm8k",
        "main",
        "train",
    )
    assert with_data_of_task(config) == config
    mine = load_config(CONFIGS["gsm8k-gpt2-lora"], ["data.dataset=mine.jsonl"])
    assert with_data_of_task(mine) == mine


def test_a_hub_that_cannot_be_reached_says_what_to_give(
    models: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from tinylm.common.errors import UserError

    def unreachable(*arguments: Any, **more: Any) -> None:
        raise UserError("nyu-mll/glue", "not reached")

    monkeypatch.setattr("tinylm.rows.row_files.find_split", unreachable)
    places = [
        f"training.checkpoint_dir={tmp_path}/ckpt",
        f"training.log_dir={tmp_path}/logs",
        f"training.init_from=hf:{models / 'gpt2'}",
    ]
    assert finetune.main(["--config", str(CONFIGS["sst2-gpt2-lora"]), *places]) == 2
    expected = (
        "nyu-mll/glue: not reached. For task sst2: data.dataset=PATH, or data.dataset=smoke for a "
        "few built-in rows."
    )
    assert expected in capsys.readouterr().err


def test_every_named_task_has_a_config() -> None:
    assert set(OF_TASKS.values()) == set(TASKS)
