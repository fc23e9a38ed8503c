"""All stages in one command: their scores, which stages are repeated, and resuming after a kill (FAULTS A12)."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import align
import finetune
import train
from tests import programs
from tests.model.test_seq2seq import save
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.common.child_program import ChildProgram
from tinylm.common.errors import UserError
from tinylm.common.platform import STOP_SIGNALS
from training import pipeline, pipeline_run, side_by_side

ROOT = Path(__file__).parents[2]
TINY = {"n_layers": 1, "d_model": 32, "n_heads": 2, "max_seq_len": 64}
TEXT = "One day a small model read a text, and it learned to go on.\nTwo words are a pair; three are a crowd.\n"


def rows(*made: dict[str, str]) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


# The stages of the lists here and of configs/align.yaml.
STAGES = ("pretrain", "sft", "dpo", "verifier")


def write_pipeline(folder: Path, max_steps: int = 6, **changes: dict[str, Any]) -> Path:
    """Four tiny configs and the list of them, all files under `folder`; `changes` are sections of single stages."""
    (folder / "text.txt").write_text(
        "".join(f"{number} {TEXT}" for number in range(60)), encoding="utf-8"
    )
    (folder / "answers.jsonl").write_text(
        rows(*({"instruction": f"Double {i}.", "output": f"It is {2 * i}."} for i in range(24))),
        encoding="utf-8",
    )
    pairs = (
        {"prompt": f"Double {i}.", "chosen": f"It is {2 * i}.", "rejected": f"Who cares for {i}?"}
        for i in range(24)
    )
    (folder / "pairs.jsonl").write_text(rows(*pairs), encoding="utf-8")
    problems = ({"prompt": f"{i} + {i % 5} =", "completion": f" {i + i % 5}"} for i in range(24))
    (folder / "problems.jsonl").write_text(rows(*problems), encoding="utf-8")
    stages = {
        "pretrain": {"model": TINY, "data": {"dataset": "text.txt"}},
        "sft": {
            "data": {"dataset": "answers.jsonl"},
            "training": {"init_from": "runs/pretrain/final.ckpt", "sample_prompt": "Double 4."},
        },
        "dpo": {
            "data": {"dataset": "pairs.jsonl"},
            "training": {"init_from": "runs/sft/final.ckpt"},
            "dpo": {"beta": 0.5},
        },
        "verifier": {
            "model": TINY,
            "data": {"dataset": "problems.jsonl"},
            "verifier": {"n_wrong": 1},
        },
    }
    for name, settings in stages.items():
        training = {
            "seq_len": 48, "micro_batch_size": 4, "max_steps": max_steps, "val_every_steps": max_steps // 2, "log_every_steps": 1, "save_every_steps": 2,
            "lr": 1e-2, "checkpoint_dir": f"runs/{name}", "log_dir": "logs", "run_name": name,
        }  # fmt: skip
        settings["data"] |= {"val_fraction": 0.25, "cache_dir": "cache"}
        settings["training"] = (
            training | settings.get("training", {}) | changes.get(name, {}).pop("training", {})
        )
        settings["hardware"] = {"accelerator": "cpu", "threads": 1}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump(settings | changes.get(name, {})), encoding="utf-8"
        )
    return write_list(folder, *stages)


def write_list(folder: Path, *stages: str) -> Path:
    """The list of these stages, each with the config of its name."""
    (folder / "all.yaml").write_text(
        yaml.safe_dump([{"stage": name, "config": f"{name}.yaml"} for name in stages]),
        encoding="utf-8",
    )
    return folder / "all.yaml"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages run in this process, which is quicker; the programs' arguments, in order."""
    commands: list[str] = []

    def run_here(self: ChildProgram, command: list[str], **_: Any) -> int:
        program, *arguments = command[1:]
        commands.append(arguments[1])
        return {"train.py": train, "finetune.py": finetune}[Path(program).name].main(arguments)

    monkeypatch.setattr(ChildProgram, "run", run_here)
    return commands


def results_of(folder: Path) -> dict[str, Any]:
    """What is compared: without the digest, which also knows of fingerprints."""
    found = json.loads(
        (folder / "checkpoints" / "all" / "results.json").read_text(encoding="utf-8")
    )
    return {name: found[name] for name in ("models", "samples", "answers")}


def last_validation(name: str) -> dict[str, float]:
    """The last row of metrics.csv with a validation: final.ckpt is compared."""
    with open(f"logs/{name}/metrics.csv", encoding="utf-8", newline="") as file:
        found = [row for row in csv.DictReader(file) if row["val_loss"]]
    return {key: float(value) for key, value in found[-1].items() if value}


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_number_of_the_table_is_the_one_that_its_stage_validated_with(here, ran, capsys):
    """The oracle is each stage's own metrics.csv: validation in training, by Lightning, in other batches."""
    assert align.main(["--config", str(write_pipeline(here))]) == 0
    assert ran == ["pretrain.yaml", "sft.yaml", "dpo.yaml", "verifier.yaml"]
    rows = {row["stage"]: row for row in results_of(here)["models"]}
    seen = {name: last_validation(name) for name in rows}
    assert rows["pretrain"]["val_ppl"] == pytest.approx(seen["pretrain"]["val_ppl"], rel=1e-6)
    assert rows["sft"]["response_loss"] == pytest.approx(seen["sft"]["val_loss"], rel=1e-6)
    assert rows["sft"]["response_accuracy"] == pytest.approx(seen["sft"]["val_accuracy"], rel=1e-6)
    assert rows["dpo"]["reward_accuracy"] == pytest.approx(seen["dpo"]["val_accuracy"], abs=1e-6)
    assert rows["dpo"]["reward_margin"] == pytest.approx(seen["dpo"]["val_margin"], rel=1e-3)
    assert rows["verifier"]["verifier_accuracy"] == pytest.approx(
        seen["verifier"]["val_accuracy"], abs=1e-6
    )
    for measure in ("val_ppl", "response_loss", "preference_accuracy"):
        assert {name for name, row in rows.items() if measure in row} == {"pretrain", "sft", "dpo"}
    report = Path("checkpoints/all/report.md").read_text(encoding="utf-8")
    assert (
        f"| val_ppl | {rows['pretrain']['val_ppl']:.4f} | {rows['sft']['val_ppl']:.4f} | "
        f"{rows['dpo']['val_ppl']:.4f} | - |" in report
    )
    assert "- sft: `python finetune.py --config sft.yaml` wrote runs/sft/final.ckpt" in report
    assert [found["stage"] for found in results_of(here)["samples"]] == ["pretrain", "sft", "dpo"]
    out, err = capsys.readouterr()
    start = "start: runs/sft/final.ckpt, stage sft, step 6, val_loss "
    assert start in err and err.index(start) < err.index("data: pairs.jsonl")
    answers = [found for found in results_of(here)["answers"] if found["stage"] == "sft"]
    exact = [found["text"] == found["expected"] for found in answers]
    assert len(answers) > 1 and rows["sft"]["answer_exact"] == sum(exact) / len(exact)
    assert {"answer_f1", "learned_exact"} < rows["dpo"].keys() - rows["pretrain"].keys()
    first = answers[0]
    assert f"\n{first['question']} (held out; expected: {first['expected']})\n" in out
    assert f"**{first['question']}** (expected: {first['expected']})" in report
    assert (
        "metric" in out
        and "Double 4." in out
        and out.endswith("report: checkpoints/all/report.md\n")
    )


@pytest.mark.slow
def test_what_is_done_is_not_done_again(here, ran, capsys, monkeypatch):
    path = str(write_pipeline(here))
    assert align.main(["--config", path]) == 0
    first = capsys.readouterr().out
    ran.clear()
    monkeypatch.setattr(side_by_side, "compare", lambda stages: pytest.fail("compared again"))
    assert align.main(["--config", path]) == 0
    captured = capsys.readouterr()
    assert ran == [] and first.endswith(captured.out)
    assert captured.out.startswith("metric")
    assert "stage 3 of 4, dpo: already done (runs/dpo/final.ckpt)" in captured.err


@pytest.mark.slow
def test_results_that_were_cut_off_are_made_again(here, ran):
    path = str(write_pipeline(here))
    assert align.main(["--config", path]) == 0
    before = results_of(here)
    for text in ('{"models": [', "[]", "{}"):
        Path("checkpoints/all/results.json").write_text(text, encoding="utf-8")
        assert align.main(["--config", path]) == 0
        assert results_of(here) == before


@pytest.mark.slow
def test_a_stage_that_left_the_list_leaves_the_table(here, ran):
    """state.json still has the verifier; the results of four stages differ from those of three."""
    align.main(["--config", str(write_pipeline(here))])
    assert align.main(["--config", str(write_list(here, "pretrain", "sft", "dpo"))]) == 0
    assert [row["stage"] for row in results_of(here)["models"]] == ["pretrain", "sft", "dpo"]
    assert len(ran) == 4


@pytest.mark.slow
def test_rewards_are_measured_also_where_the_reference_is_in_no_row(here, ran):
    """The oracle is the stage's own validation; the model that it began with was trained before, by another list."""
    write_pipeline(here)
    align.main(["--config", str(write_list(here, "pretrain", "sft"))])
    assert align.main(["--config", str(write_list(here, "dpo"))]) == 0
    (row,) = results_of(here)["models"]
    seen = last_validation("dpo")
    assert (row["reward_accuracy"], row["reward_margin"]) == (
        pytest.approx(seen["val_accuracy"]),
        pytest.approx(seen["val_margin"], rel=1e-3),
    )


@pytest.mark.slow
def test_a_model_that_is_lost_is_named_and_no_other_takes_its_place(here, ran, capsys):
    """final.ckpt is the last step, which the program names again; step 4 of 6, which dpo starts from, is removed."""
    path = str(write_pipeline(here, dpo={"training": {"init_from": "runs/sft/step-000004.ckpt"}}))
    align.main(["--config", path])
    before = results_of(here)
    Path("runs/dpo/final.ckpt").unlink()
    assert align.main(["--config", path]) == 0
    assert ran[4:] == ["dpo.yaml"] and results_of(here) == before
    assert "note:" not in capsys.readouterr().err
    Path("runs/sft/step-000004.ckpt").unlink()
    capsys.readouterr()
    assert align.main(["--config", path]) == 2
    message = (
        "error: runs/sft/step-000004.ckpt: not found, although stage sft is complete. Restore it, "
        "or remove runs/sft to run the stage again.\n"
    )
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.slow
def test_of_checkpoints_that_were_there_before_it_is_said_what_is_not_known(here, ran, capsys):
    path = str(write_pipeline(here))
    align.main(["--config", path])
    assert "note:" not in capsys.readouterr().err
    Path("checkpoints/all/state.json").unlink()
    assert align.main(["--config", path]) == 0
    note = (
        "note: runs/sft has checkpoints from before; assuming that they began with "
        "runs/pretrain/final.ckpt as it is now\n"
    )
    assert note in capsys.readouterr().err


def test_models_with_different_tokenizers_are_not_compared_by_the_token():
    rows = [
        {"stage": "pretrain", "tokenizer": "a"},
        {"stage": "sft", "tokenizer": "a"},
        {"stage": "verifier"},
    ]
    assert list(side_by_side.notes_on({"models": rows})) == []
    found = (
        "note: these models have different tokenizers: val_ppl, response_loss and response_accuracy "
        "are per token and cannot be compared between them"
    )
    assert list(side_by_side.notes_on({"models": [*rows, {"stage": "dpo", "tokenizer": "b"}]})) == [
        found
    ]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_between_two_stages_begins_no_other(here, ran, caplog, number):
    caplog.set_level(logging.INFO)
    stages = pipeline.read_stages(write_pipeline(here))
    assert (
        pipeline_run.run_stages(
            stages,
            pipeline_run.PipelineState(here / "state.json", {}),
            ChildProgram(received=number),
        )
        == 128 + number
    )
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    message = f"stopped by {name} between two stages; the same command continues there"
    assert (ran, caplog.messages) == ([], [message])


@pytest.mark.slow
def test_changed_settings_are_for_the_stages_program_to_judge(here, ran, capsys):
    """More steps go on; another learning rate is refused by finetune.py in its own words, and its
    exit code comes through.
    """
    align.main(["--config", str(write_pipeline(here))])
    ran.clear()
    assert (
        align.main(["--config", str(write_pipeline(here, verifier={"training": {"max_steps": 8}}))])
        == 0
    )
    assert ran == ["verifier.yaml"]
    assert checkpoint_info.describe(Path("runs/verifier/final.ckpt")).step == 8
    capsys.readouterr()
    assert align.main(["--config", str(write_pipeline(here, sft={"training": {"lr": 0.5}}))]) == 2
    err = capsys.readouterr().err
    assert "training.lr was 0.01 when it was saved, this run has 0.5" in err
    assert (
        "stage 2 of 4, sft: exit code 2. Its checkpoints are kept; after you have changed that, the "
        "same command continues there\n" in err
    )


@pytest.mark.slow
def test_a_stage_is_not_gone_on_with_over_another_base(here, ran, capsys):
    """The base is trained again with another seed; stages that started from the old one are not reused silently."""
    path = str(write_pipeline(here))
    align.main(["--config", path])
    old = checkpoint_initial.weights_fingerprint(Path("runs/pretrain/final.ckpt"))
    for file in Path("runs/pretrain").glob("*.ckpt"):
        file.unlink()
    write_pipeline(here, pretrain={"training": {"seed": 5}})
    capsys.readouterr()
    assert align.main(["--config", path]) == 2
    new = checkpoint_initial.weights_fingerprint(Path("runs/pretrain/final.ckpt"))
    found = f"error: runs/pretrain/final.ckpt: has weights {new} now, but had {old} when stage sft began with it"
    assert (
        f"{found}. Restore it, or remove runs/sft to run the stage again.\n"
        in capsys.readouterr().err
    )
    for name in ("sft", "dpo"):
        for file in Path(f"runs/{name}").glob("*.ckpt"):
            file.unlink()
    ran.clear()
    assert align.main(["--config", path]) == 0
    assert ran == ["sft.yaml", "dpo.yaml"]


# --- kills ------------------------------------------------------------------------------------------------------------


def begin(path: Path) -> subprocess.Popen[str]:
    """The command, as a user gives it."""
    command = [sys.executable, str(ROOT / "align.py"), "--config", path.name]
    return programs.Program(
        command, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    ]


def wait_for(what: Any, process: subprocess.Popen[str]) -> bool:
    """Whether it came while the process lived."""
    while process.poll() is None:
        if what():
            return True
        time.sleep(0.005)
    return False


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are found in /proc")
def test_killed_in_every_stage_it_ends_with_the_same_numbers(tmp_path, monkeypatch, ran):
    """In each stage, after its first checkpoint, the stage and the pipeline are killed; in the last
    one the pipeline alone.
    """
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    steps = 40
    monkeypatch.chdir(tmp_path / "whole")
    assert align.main(["--config", str(write_pipeline(tmp_path / "whole", steps))]) == 0
    path = write_pipeline(tmp_path / "killed", steps)
    for stage in STAGES:
        process = begin(path)
        folder = tmp_path / "killed" / "runs" / stage
        assert wait_for(lambda folder=folder: any(folder.glob("step-*.ckpt")), process)
        children = children_of(process.pid)
        process.kill()
        if stage != "verifier":
            os.kill(children[0], signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        end = time.monotonic() + 60
        while (
            any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < end
        ):  # Linux ends it, after it saved
            time.sleep(0.05)
        assert not (folder / "final.ckpt").exists()
    process = begin(path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count("already done") == 3
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long),
    ],
)
def test_a_stop_reaches_the_stage_which_saves(tmp_path, number, code):
    path = write_pipeline(tmp_path, 2000)
    process = begin(path)
    assert wait_for(lambda: any((tmp_path / "runs" / "pretrain").glob("step-*.ckpt")), process)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == code
    assert (
        f"stage 1 of 4, pretrain: exit code {code}. Its checkpoints are kept; the same command continues there"
        in err
    )
    assert "saved" in err and "Traceback" not in err


# --- the list ---------------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        pipeline.read_stages(path)
    return str(caught.value)


@pytest.mark.slow
def test_stages_that_contradict_are_refused_before_the_first_one_runs(here):
    path = write_pipeline(here)
    assert [stage.name for stage in pipeline.read_stages(path)] == list(STAGES)
    assert [str(stage.model) for stage in pipeline.read_stages(path)] == [
        "runs/pretrain/final.ckpt", "runs/sft/final.ckpt", "runs/dpo/final.ckpt", "runs/verifier/final.ckpt",
    ]  # fmt: skip
    path.write_text("- {stage: base, config: pretrain.yaml}\n", encoding="utf-8")
    assert (
        refusal(path)
        == f"{path}:1: stage: base: no such stage. Use one of pretrain, sft, dpo, grpo, reward_model, verifier."
    )
    path.write_text("- stage: pretrain\n", encoding="utf-8")
    assert (
        refusal(path)
        == f"{path}:1: config: must be text, got nothing. Each stage has a stage and a config."
    )
    path.write_text("- {stage: pretrain, config: pretrain.yaml, steps: 3}\n", encoding="utf-8")
    assert (
        refusal(path)
        == f"{path}:1: steps: no such key. A stage has the keys stage, config and name; settings belong in the config."
    )
    write_list(here, "pretrain", "pretrain")
    assert refusal(path).endswith(
        "stage: pretrain is listed twice. List each stage only once, or give the second one a name "
        "of its own (name: ...)."
    )
    path.write_text("- {stage: dpo, config: sft.yaml}\n", encoding="utf-8")
    assert (
        refusal(path)
        == f"{path}:1: sft.yaml: has no dpo section, but its stage is dpo. Give another config or another stage."
    )
    path.write_text("- {stage: sft, config: verifier.yaml}\n", encoding="utf-8")
    assert (
        refusal(path)
        == f"{path}:1: verifier.yaml: has a verifier section, but its stage is sft. Give another "
        f"config or another stage."
    )
    write_list(here, "sft", "pretrain")
    assert (
        refusal(path)
        == "sft.yaml: runs/pretrain/final.ckpt: written by this stage or a later one. Change the order of the stages."
    )
    write_list(here, "sft", "dpo")
    assert (
        refusal(path)
        == "sft.yaml: runs/pretrain/final.ckpt: not found, and no stage before sft writes it. Add the stage that does."
    )
    write_pipeline(here, sft={"training": {"checkpoint_dir": "runs/pretrain"}})
    write_list(here, "pretrain", "sft")
    assert (
        refusal(path)
        == "sft.yaml: training.checkpoint_dir: runs/pretrain is also the folder of stage pretrain. "
        "Give each stage its own folder."
    )


def test_a_config_beside_the_list_is_found_in_the_error(tmp_path, monkeypatch):
    """A path is relative to the working folder, in a list of stages too."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "a.yaml").write_text("training: {max_steps: 1}\n", encoding="utf-8")
    path = tmp_path / "configs" / "all.yaml"
    path.write_text("- stage: pretrain\n  config: a.yaml\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "configs")
    with pytest.raises(UserError) as error:
        pipeline.read_stages(path)
    assert str(error.value) == (
        f"{path}:1: config: a.yaml: not found in {tmp_path / 'configs'}, but it is in {tmp_path}. "
        f"Run the command in {tmp_path}, or set config to the whole path."
    )


@pytest.mark.slow
def test_what_a_stage_would_refuse_in_its_turn_is_refused_before_the_first_one(here):
    path = write_pipeline(here, dpo={"training": {"init_from": None}})
    preferences = (
        "dpo.yaml: training.init_from: must be set: preferences are learned by a trained model."
    )
    assert (
        refusal(path)
        == f"{path}:5: {preferences} Set it to a checkpoint, or to hf:NAME for a Hugging Face model."
    )
    path.write_text("- {stage: sft, config: pretrain.yaml}\n", encoding="utf-8")
    assert refusal(path).startswith(
        f"{path}:1: pretrain.yaml: training.init_from: must be set: new weights cannot learn from the answers alone."
    )
    path = write_pipeline(here, sft={"lora": {"r": 2}})
    adapter = (
        "runs/sft/final.ckpt is an adapter, because sft.yaml has a lora section, and stage dpo "
        "begins with a whole model"
    )
    fix = "Remove that section; if memory is short, use lora in the last stage only"
    assert refusal(path) == f"dpo.yaml: training.init_from: {adapter}. {fix}."
    path = write_pipeline(here, sft={"training": {"init_from": "hf:t5"}})
    save(here / "t5", "t5")
    other = write_pipeline(here, sft={"training": {"init_from": "hf:./nowhere"}})
    fix = (
        "Give a folder with config.json and model.safetensors, or a Hugging Face name such as gpt2"
    )
    assert refusal(other) == f"sft.yaml: training.init_from: ./nowhere: not found in {here}. {fix}."
    path = write_pipeline(here, sft={"training": {"init_from": "hf:t5"}})
    reads = "hf:t5 is an encoder-decoder, which has no perplexity on plain text to compare"
    assert (
        refusal(path)
        == f"sft.yaml: training.init_from: {reads}. Run finetune.py by itself, or choose another model."
    )


def test_a_folder_is_a_stages_or_the_lists(here, capsys):
    """Both would be locked, the stage's by the list's own process, and it would wait for itself."""
    assert align.main(["--config", str(write_pipeline(here)), "--out", "runs/../runs/sft"]) == 2
    assert (
        capsys.readouterr().err
        == "error: --out: runs/../runs/sft is training.checkpoint_dir of sft.yaml. Choose another folder.\n"
    )


@pytest.mark.slow
def test_settings_on_the_command_line_are_for_every_stage(here, ran, capsys):
    assert (
        align.main(
            [
                "--config",
                str(write_pipeline(here)),
                "training.max_steps=2",
                "training.val_every_steps=1",
            ]
        )
        == 0
    )
    assert {checkpoint_info.describe(Path(f"runs/{name}/final.ckpt")).step for name in STAGES} == {
        2
    }
    capsys.readouterr()
    assert align.main(["--config", "all.yaml", "dpo.beta=0.2"]) == 2
    fix = "Overrides apply to every stage: put this setting into the config of its stage"
    assert (
        capsys.readouterr().err
        == f"error: all.yaml:1: pretrain.yaml: has a dpo section, but its stage is pretrain. {fix}.\n"
    )


def test_a_state_that_is_none_is_refused(here, ran, capsys):
    path = write_pipeline(here)
    Path("checkpoints/all").mkdir(parents=True)
    for text in ("[1]", '{"sft": 1}', '{"sft": {"steps": 1}}', "{"):
        Path("checkpoints/all/state.json").write_text(text, encoding="utf-8")
        assert align.main(["--config", str(path)]) == 2
        message = (
            "error: checkpoints/all/state.json: was not written by align.py. Delete it: finished stages "
            "are found again by their checkpoints.\n"
        )
        assert capsys.readouterr().err == message


@pytest.mark.parametrize("name", ["align", "align-smoke"])
def test_the_lists_that_are_shipped_are_sound(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    stages = pipeline.read_stages(Path(f"configs/{name}.yaml"))
    assert [stage.name for stage in stages] == list(STAGES)


# --- preferences ------------------------------------------------------------------------------------------------------


def test_preferences_beside_a_reference_are_worked_out_by_hand(here):
    """Own: chosen likelier in 2 of 4 pairs, level in 1. Beside the reference: +2, -1, 0, +3, of
    which 2 are above; beta 0.5 makes of the mean 1 0.5.
    """
    write_pipeline(here)
    stages = {stage.name: stage for stage in pipeline.read_stages(here / "all.yaml")}
    own = np.array([[-1.0, -3.0], [-2.0, -1.0], [-2.0, -2.0], [-1.0, -5.0]])
    reference = np.array([[-2.0, -2.0], [-2.0, -2.0], [-2.0, -2.0], [-2.0, -3.0]])
    log_probs = {"runs/dpo/final.ckpt": own, "runs/sft/final.ckpt": reference}
    assert side_by_side.preference_metrics(stages["dpo"], log_probs, "runs/dpo/final.ckpt") == {
        "preference_accuracy": 0.5, "n_pairs": 4, "reward_accuracy": 0.5, "reward_margin": 0.5,
    }  # fmt: skip
    assert side_by_side.preference_metrics(stages["sft"], log_probs, "runs/sft/final.ckpt") == {
        "preference_accuracy": 0.25,
        "n_pairs": 4,
    }
