"""What a list of stages may have beside stages: data that is made first, names, held-out questions."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import align
from tests.training.test_align import here, ran, write_pipeline  # noqa: F401  (fixtures)
from tinylm.common.errors import UserError
from tinylm.eval.tasks.table import EVALUATED_TASKS
from tinylm.text.arithmetic import write_arithmetic
from training import held_out, made_data, pipeline

ROOT = Path(__file__).parents[2]
RECIPE = Path("configs/recipes/arithmetic/align.yaml")


def written(folder: Path, *entries: dict[str, object]) -> Path:
    """A list of these entries."""
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump(list(entries)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data": "poems", "out": "p"}, "data: poems: no such data. Use one of arithmetic."),
        (
            {"data": "arithmetic"},
            "must have the keys data and out, got data. Name the folder of the data: out: "
            "data/arithmetic.",
        ),
    ],
)
def test_a_wrong_entry_of_data_is_named(tmp_path, entry, message):
    path = written(tmp_path, entry)
    with pytest.raises(UserError) as caught:
        made_data.make_data(path)
    assert str(caught.value) == f"{path}:1: {message}"


def test_data_is_made_once(tmp_path, monkeypatch):
    """A second call finds the folder and leaves it alone."""
    made = []
    monkeypatch.setitem(made_data.MAKERS, "arithmetic", lambda out: made.append(os.makedirs(out)))
    path = written(tmp_path, {"data": "arithmetic", "out": str(tmp_path / "sums")})
    made_data.make_data(path)
    made_data.make_data(path)
    assert len(made) == 1
    assert (tmp_path / "sums").is_dir()


def test_data_whose_making_ends_early_is_made_again(tmp_path, monkeypatch):
    """No folder is left that the next call would take for the whole data."""

    def stop_early(out):
        out.mkdir()
        (out / "text.jsonl").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setitem(made_data.MAKERS, "arithmetic", stop_early)
    path = written(tmp_path, {"data": "arithmetic", "out": str(tmp_path / "sums")})
    with pytest.raises(KeyboardInterrupt):
        made_data.make_data(path)
    assert not (tmp_path / "sums").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"test": 3, "task": "gsm8k"}, "test: must be a file of rows. Write test: rows.jsonl."),
        (
            {"test": "a", "task": "sums"},
            f"task: sums: no such task. Use one of {', '.join(EVALUATED_TASKS)}.",
        ),
        (
            {"test": "a", "task": "gsm8k", "best_of": 0},
            "best_of: must be a number from 1, got 0.",
        ),
        (
            {"test": "a", "task": "gsm8k", "n": 3},
            "n: no such key. A test has the keys test, task and best_of.",
        ),
    ],
)
def test_a_wrong_test_is_named(tmp_path, entry, message):
    path = written(tmp_path, entry)
    with pytest.raises(UserError) as caught:
        held_out.read_test(path)
    assert str(caught.value) == f"{path}:1: {message}"


def test_best_of_needs_answers_of_words_and_a_list_one_test(tmp_path):
    """A task with labels is scored by their probabilities; two tests would need two tables."""
    with pytest.raises(UserError, match="sst2 is answered with a label"):
        held_out.read_test(written(tmp_path, {"test": "a", "task": "sst2", "best_of": 2}))
    tests = [{"test": name, "task": "gsm8k"} for name in ("a", "b")]
    with pytest.raises(UserError, match=r":3: test: a second one\. Keep one of the two\."):
        held_out.read_test(written(tmp_path, *tests))
    assert held_out.read_test(written(tmp_path, {"stage": "sft"})) is None


def test_a_list_without_a_stage_is_refused(tmp_path):
    path = written(tmp_path, {"test": "a", "task": "gsm8k"})
    with pytest.raises(UserError) as caught:
        pipeline.read_stages(path)
    assert str(caught.value) == f"{path}: lists no stage. Add one: - stage: pretrain."


@pytest.mark.slow
def test_two_stages_of_a_kind_and_a_verifier_are_asked_the_held_out_questions(here, ran, capsys):  # noqa: F811
    """The oracle of the first row is evaluate_checkpoints.py on the same file."""
    write_pipeline(
        here, verifier={"verifier": {"n_sampled": 2, "sampled_from": "runs/dpo/final.ckpt"}}
    )
    questions = [{"question": f"{i} + 1 =", "answer": f"#### {i + 1}"} for i in range(12)]
    Path("test.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8"
    )
    longer = yaml.safe_load(Path("sft.yaml").read_text(encoding="utf-8"))
    longer["training"] |= {"init_from": "runs/sft/final.ckpt", "checkpoint_dir": "runs/longer"}
    Path("longer.yaml").write_text(yaml.safe_dump(longer), encoding="utf-8")
    entries = [
        {"stage": name, "config": f"{name}.yaml"}
        for name in pipeline.PROGRAMS
        if Path(f"{name}.yaml").exists()
    ]
    entries.insert(2, {"stage": "sft", "name": "sft-longer", "config": "longer.yaml"})
    entries.append({"test": "test.jsonl", "task": "gsm8k", "best_of": 2})
    path = written(here, *entries)
    assert align.main(["--config", str(path)]) == 0
    assert ran == ["pretrain.yaml", "sft.yaml", "longer.yaml", "dpo.yaml", "verifier.yaml"]
    results = json.loads(Path("checkpoints/list/results.json").read_text(encoding="utf-8"))
    found = results["test"]
    assert [(row["stage"], row["answers"]) for row in found["rows"]] == [
        ("pretrain", "greedy"),
        ("sft", "greedy"),
        ("sft-longer", "greedy"),
        ("dpo", "greedy"),
        ("dpo", "best of 2, random choice"),
        ("dpo", "best of 2, majority vote"),
        ("dpo", "best of 2, verifier"),
        ("dpo", "best of 2, weighted vote"),
        ("dpo", "best of 2, oracle"),
    ]
    assert found["n"] == 12
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in found["rows"])
    out = capsys.readouterr().out
    assert "\n12 held-out questions of test.jsonl\n" in out
    report = Path("checkpoints/list/report.md").read_text(encoding="utf-8")
    assert (
        "## 12 held-out questions of test.jsonl, graded as gsm8k\n\n| stage | answers | " in report
    )
    ran.clear()
    assert align.main(["--config", str(path)]) == 0
    assert ran == []
    assert out.endswith(capsys.readouterr().out)


@pytest.mark.slow
def test_the_recipe_runs_at_toy_size(tmp_path, monkeypatch, ran, capsys):  # noqa: F811
    """Every stage for two steps, each from the one before; nothing is claimed of its answers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / RECIPE.parent, RECIPE.parent)
    sizes = {"text": 200, "answers": 60, "questions": 12, "graded": 36, "dev": 4, "test": 4}
    write_arithmetic(Path("data/arithmetic"), sizes=sizes)
    small = {"max_steps": 2, "val_every_steps": 2, "save_every_steps": 2, "micro_batch_size": 8}
    overrides = [f"training.{name}={value}" for name, value in small.items()]
    overrides += ["training.grad_accum_steps=1", "data.val_fraction=0.2", "data.val_docs=2"]
    overrides += ["data.train_docs=60", "hardware.threads=1"]
    assert align.main(["--config", str(RECIPE), *overrides]) == 0
    assert [Path(config).stem for config in ran] == [
        *("pretrain", "sft", "sft-longer", "grpo", "verifier"),
    ]
    results = json.loads(Path("checkpoints/align/results.json").read_text(encoding="utf-8"))
    found = [(row["stage"], row["answers"]) for row in results["test"]["rows"]]
    greedy = [(name, "greedy") for name in ("pretrain", "sft", "sft-longer", "grpo")]
    choices = ("random choice", "majority vote", "verifier", "weighted vote", "oracle")
    greedy[2:2] = [("sft", f"best of 8, {choice}") for choice in choices]
    assert found == greedy
    assert results["test"]["n"] == sizes["test"]
    assert "\n4 held-out questions of data/arithmetic/test.jsonl\n" in capsys.readouterr().out
