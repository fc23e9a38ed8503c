"""evaluate_checkpoints.py: ranks, failures, files, rejected flags."""

import csv
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import evaluate_checkpoints as program
from tests.cli.test_infer import checkpoint_state
from tests.model import test_seq2seq
from tests.training.test_finetune import save_llama
from tinylm.checkpoint import format as checkpoint_format
from tinylm.eval.task_scores import evaluate_task

TEXT = " all you need."
CASES = (
    "- {name: known, prompt: x, target: ' all'}\n- {name: unknown, prompt: x, target: ' nothing'}\n"
)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint whose model continues one token with the given text."""

    def write(name: str, text: str = TEXT, **changes: object) -> Path:
        path = tmp_path / "checkpoints" / name
        checkpoint_format.write(path, checkpoint_state(text) | changes)
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the program on the checkpoints of the test: exit code, stdout, stderr."""

    def start(*flags: object) -> tuple[int, str, str]:
        where = [
            "--checkpoints",
            tmp_path / "checkpoints" / "*.ckpt",
            "--device",
            "cpu",
            "--out",
            tmp_path / "results",
        ]
        code = program.main([str(flag) for flag in [*where, *flags]])
        return (code, *capsys.readouterr())

    return start


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    path = tmp_path / "cases.yaml"
    path.write_text(CASES, encoding="utf-8")
    return path


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "results" / "results.json").read_text(encoding="utf-8"))


# --- ranking ----------------------------------------------------------------------------------


def test_checkpoints_are_ranked_with_ties_and_failures(tmp_path, run, save, cases):
    """a and b generate the same text and share a rank, c another; d is damaged."""
    save("a.ckpt", val_loss=1.25)
    save("b.ckpt", step=9)
    save("c.ckpt", " never so it.")
    (tmp_path / "checkpoints" / "d.ckpt").write_bytes(b"x" * 300)
    code, out, err = run("--cases", cases)
    assert code == 0
    header, *rows, failed = out.splitlines()
    assert header.split() == [
        "place",
        "checkpoint",
        "step",
        "val_loss",
        "log_prob",
        "first_rank",
        "greedy",
        "failed",
        "prompt_ppl",
        "cases",
    ]
    fields = [row.split() for row in rows]
    assert [row[0] for row in fields] == ["1=", "1=", "3"]
    assert [Path(row[1]).name for row in fields] == ["a.ckpt", "b.ckpt", "c.ckpt"]
    assert [row[2:4] for row in fields] == [["7", "1.2500"], ["9", "-"], ["7", "-"]]
    assert [row[6:8] for row in fields] == [["1/2", "0"], ["1/2", "0"], ["0/2", "0"]]
    assert failed.partition("  FAILED: ")[2].endswith(
        "d.ckpt: damaged: not a checkpoint file. Use another checkpoint."
    )
    assert err.splitlines()[0] == "device: cpu (requested)"
    assert (
        err.splitlines()[-2]
        == f"results: {tmp_path / 'results' / 'results.json'} has all numbers; 0 files next to it "
        f"have the wrong answers"
    )
    assert err.splitlines()[-1].startswith("next: python infer.py --ckpt")


def test_all_names_of_one_file_are_one_line(run, save, cases):
    """last and best are hard links, final is symbolic; the step file is named first, and once."""
    path = save("step-000007.ckpt")
    for name in ("last.ckpt", "best.ckpt"):
        checkpoint_format.link(path, name)
    os.symlink(path, path.with_name("final.ckpt"))
    code, out, _ = run("--cases", cases, "--checkpoints", path.parent / "*.ckpt", path)
    assert code == 0
    assert [line for line in out.splitlines() if "ckpt" in line] == [out.splitlines()[1]]
    assert f"{path} (best, final, last) " in out


def test_a_case_that_fails_counts_and_ranks_below(tmp_path, run, save, cases):
    """The context of b is too short for " nothing"; without that case b has the better mean."""
    save("a.ckpt")
    save("b.ckpt", " all")
    code, out, _ = run("--cases", cases)
    assert code == 0
    a, b = (line.split() for line in out.splitlines()[1:])
    assert (Path(a[1]).name, a[6:8], Path(b[1]).name, b[6:8]) == (
        "a.ckpt",
        ["1/2", "0"],
        "b.ckpt",
        ["1/2", "1"],
    )
    assert float(b[4]) > float(a[4])
    rows = {
        (Path(row["checkpoint"]).name, row["case"]): row for row in results(tmp_path)["case_scores"]
    }
    assert (
        rows["b.ckpt", "unknown"]["error"]
        == "target: must have 1 to 4 tokens, got 8. Change the target."
    )
    assert rows["a.ckpt", "known"]["greedy_match"] is True


def test_diverged_weights_are_a_failure(run, save, cases):
    weights = checkpoint_state(TEXT)["weights"] | {
        "head.weight": torch.full_like(checkpoint_state(TEXT)["weights"]["head.weight"], torch.nan)
    }
    save("a.ckpt")
    save("b.ckpt", weights=weights)
    code, out, _ = run("--cases", cases)
    assert code == 0
    assert out.splitlines()[-1].endswith(
        "b.ckpt: has weights that are not finite numbers; its training diverged. Use an "
        "earlier checkpoint."
    )


def test_when_every_checkpoint_fails_the_exit_code_is_2(tmp_path, run, cases):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.ckpt").write_bytes(b"")
    code, out, err = run(
        "--cases",
        cases,
        "--checkpoints",
        tmp_path / "checkpoints" / "a.ckpt",
        tmp_path / "gone.ckpt",
    )
    assert code == 2
    assert [line.partition(": ")[2] for line in out.splitlines()] == [
        f"{tmp_path}/checkpoints/a.ckpt: damaged: the file is empty. Use another checkpoint.",
        f"{tmp_path}/gone.ckpt: not found. Give a .ckpt file; `python list.py` lists them.",
    ]
    assert (
        err.splitlines()[-1]
        == "error: --checkpoints, --model: all 2 failed. Give others; `python list.py` lists the checkpoints."
    )
    assert len(results(tmp_path)["failed"]) == 2


# --- tasks ------------------------------------------------------------------------------------


def test_tasks_have_ranks_intervals_chance_and_a_file_of_wrong_answers(tmp_path, run, save):
    """a answers one of two rows right, b none. Chance compares each answer with the other "
    "target."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt": "x", "target": " all you"}\n{"prompt": "y", "target": " nothing"}\n',
        encoding="utf-8",
    )
    save("a.ckpt", " all you\n\n")
    save("b.ckpt", " one one\n\n")
    code, out, _ = run("--tasks", "pairs", "--data", f"pairs={rows}")
    assert code == 0
    header, first, second, *_ = out.splitlines()
    assert header.split() == [
        "task",
        "shots",
        "measure",
        "place",
        "checkpoint",
        "step",
        "val_loss",
        "value",
        "95%",
        "interval",
        "chance",
        "examples",
    ]
    assert [first.split()[place] for place in (0, 1, 2, 3)] == ["pairs", "0", "exact_match", "1"]
    assert Path(first.split()[4]).name == "a.ckpt" and Path(second.split()[4]).name == "b.ckpt"
    found = results(tmp_path)["measures"][0]
    assert (found["value"], found["chance"], found["n_examples"]) == (0.5, 0.0, 2)
    assert (found["low"], found["high"]) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    with open(tmp_path / "results" / "measures.csv", encoding="utf-8", newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)] == ["0.5", "0.0", "0.5", "0.0"]
    [file] = (tmp_path / "results").glob("failed-*_a-pairs-0shots.jsonl")
    [wrong] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert (wrong["location"], wrong["question"], wrong["target"]) == (f"{rows}:2", "y", " nothing")
    assert wrong["output"] == "all you"


def test_each_number_of_shots_has_its_rows_and_truncated_prompts_are_logged(run, save):
    save("a.ckpt")
    code, out, err = run("--tasks", "sms,sst2", "--shots", "2,0,2", "--smoke", "--limit", 3)
    assert code == 0
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [
        [task, shots, measure, "1"]
        for task in ("sms", "sst2")
        for shots in "02"
        for measure in ("accuracy", "macro_f1")
    ]
    assert (
        "sst2, 2 shots: 3 of 3 prompts are longer than the context and lost their beginning" in err
    )


@pytest.mark.parametrize(("stage", "name"), [("sft", "instruction"), ("pretrain", None)])
def test_a_fine_tuned_model_is_prompted_in_its_template_and_a_base_model_in_plain_text(
    run, save, monkeypatch, stage, name
):
    save("a.ckpt", stage=stage)
    seen = []

    def spy(*args, template, **more):
        seen.append(template.name if template else None)
        return evaluate_task(*args, template=template, **more)

    monkeypatch.setattr("tinylm.cli.evaluate.evaluate_task", spy)
    assert run("--tasks", "sst2", "--smoke")[0] == 0
    assert seen == [name]


def test_questions_that_cannot_be_asked_are_logged(run, save, tmp_path):
    """The labels do not fit into a context of two tokens."""
    save("a.ckpt", "ab")
    code, _, err = run("--tasks", "sst2", "--smoke")
    assert code == 0
    assert (
        "sst2, 0 shots: 12 of 12 questions could not be asked and count as wrong: target: "
        "must have 1 to 2 tokens, got 9" in err
    )


# --- Hugging Face models ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_hugging_face_model_is_scored_like_a_checkpoint(kind, tmp_path, run, save):
    """Zero- and few-shot in plain text, with a checkpoint or alone; it has no step and no loss."""
    if kind == "llama":
        save_llama(tmp_path / "llama")
    else:
        test_seq2seq.save(tmp_path / "t5", "t5")
    save("a.ckpt")
    flags = [
        "--model",
        tmp_path / kind,
        "--tasks",
        "sms,samsum",
        "--smoke",
        "--limit",
        2,
        "--shots",
        "0,1",
    ]
    assert run(*flags)[0] == 0
    both = results(tmp_path)["measures"]
    assert {row["checkpoint"] for row in both} == {
        f"hf:{tmp_path / kind}",
        str(tmp_path / "checkpoints" / "a.ckpt"),
    }
    assert {
        (row["step"], row["val_loss"]) for row in both if row["checkpoint"].startswith("hf:")
    } == {(None, None)}
    assert (
        program.main(
            [str(flag) for flag in [*flags, "--device", "cpu", "--out", tmp_path / "alone"]]
        )
        == 0
    )
    alone = json.loads((tmp_path / "alone" / "results.json").read_text(encoding="utf-8"))[
        "measures"
    ]
    assert [row["value"] for row in alone] == [
        row["value"] for row in both if row["checkpoint"].startswith("hf:")
    ]
    assert {(row["task"], row["shots"]) for row in alone} == {
        (task, shots) for task in ("sms", "samsum") for shots in (0, 1)
    }


def test_a_missing_model_is_listed_as_failed(tmp_path, run, save, cases):
    save("a.ckpt")
    code, out, _ = run(
        "--cases", cases, "--model", f"hf:{tmp_path / 'gone'}", "--model", tmp_path / "gone"
    )
    assert code == 0
    [failed] = [
        line for line in out.splitlines() if "FAILED" in line
    ]  # the name with hf: and without it is the same model
    assert failed.startswith(
        f"hf:{tmp_path / 'gone'}  FAILED: {tmp_path / 'gone'}: not found. Give a folder "
        f"with config.json"
    )


# --- flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [],
            "--cases, --tasks, --lm-eval: nothing to evaluate. Give --cases "
            "cases/wiki_basics.yaml, --tasks gsm8k --smoke, or --lm-eval NAME.",
        ),
        (
            ["--tasks", "gsm9k"],
            "--tasks: gsm9k: no such task. Give one of sst2, samsum, gsm8k, sms, alpaca, pairs.",
        ),
        (
            ["--tasks", "sst2", "--smoke", "--shots", "0,-1"],
            "--shots: must be whole numbers such as 0,4, got -1.",
        ),
        (
            ["--tasks", "sst2", "--smoke", "--shots", "12"],
            "task sst2: no examples are left to evaluate besides 12 solved ones.",
        ),
        (
            ["--tasks", "sst2", "--data", "gsm8k=x"],
            "--data: must be NAME=PATH with a name from --tasks (sst2), got gsm8k=x.",
        ),
        (
            ["--tasks", "sst2", "--data", "sst2=gone.jsonl"],
            "--data: gone.jsonl: not found in {cwd}. Give a file of rows, or a folder with train and test.",
        ),
        (["--cases", "gone.yaml"], "gone.yaml: not found in {cwd}. Give the path of a YAML file."),
        (
            ["--lm-eval", "x", "--include-path", "gone"],
            "--include-path: gone: not found in {cwd}. Give the folder with the YAML files of "
            "the tasks.",
        ),
        (
            ["--checkpoints", "gone/*.ckpt", "--tasks", "sst2", "--smoke"],
            "--checkpoints: gone/*.ckpt: no file matches. Train a model first: python train.py",
        ),
    ],
)
def test_a_wrong_flag_is_one_line_before_any_model_is_loaded(run, save, flags, message):
    save("a.ckpt")
    code, out, err = run(*flags)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message.replace('{cwd}', os.getcwd())}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--limit", "0"], ["--batch-size", "x"], ["--device", "gpu"]])
def test_an_invalid_number_is_rejected(run, capsys, flags):
    with pytest.raises(SystemExit) as end:
        run(*flags)
    assert end.value.code == 2
    assert f"argument {flags[0]}: invalid" in capsys.readouterr().err


def test_without_lm_eval_the_error_says_what_to_install(run, save, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    save("a.ckpt")
    code, _, err = run("--lm-eval", "x")
    assert (code, err) == (
        2,
        'error: --lm-eval: needs the package lm_eval. Install it: pip install "lm_eval>=0.4.13,<0.5".\n',
    )


def test_tables_of_an_earlier_evaluation_are_removed(tmp_path, run, save, cases):
    """A stale cases.csv next to the new results.json would look like a part of the new results."""
    save("a.ckpt")
    assert run("--cases", cases)[0] == 0
    assert (tmp_path / "results" / "cases.csv").exists()
    assert run("--tasks", "sst2", "--smoke", "--limit", 1)[0] == 0
    assert sorted(path.name for path in (tmp_path / "results").glob("*.csv")) == ["measures.csv"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, run, save, cases):
    save("a.ckpt")
    (tmp_path / "results").write_text("a file", encoding="utf-8")
    code, _, err = run("--cases", cases)
    assert code == 2
    assert (
        err.splitlines()[-1]
        == f"error: {tmp_path / 'results'}: cannot be written: File exists. Change --out, or move the file that is there."
    )
