"""All programs and commands: --help, and what `python -m tinylm` does beyond the library."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.__main__ import COMMANDS, main
from tinylm.runs.experiments import Outcome

ROOT = Path(__file__).parents[2]
PROGRAMS = ("infer", "list", "eval_val", "evaluate_checkpoints", "train", "finetune", "align")


@pytest.mark.parametrize("program", [*(f"{name}.py" for name in PROGRAMS), "-m tinylm"])
def test_help_opens_with_the_command_and_imports_nothing_slow(program):
    """`python -X importtime` lists every import."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *program.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"usage: python {program}")
    slow = r"\| +(torch|numpy|lightning|transformers|pydantic|yaml|rich)$"
    assert re.findall(slow, done.stderr, re.MULTILINE) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_opens_with_the_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m tinylm {name}")


def test_a_failed_experiment_is_named_and_the_report_is_not_lost(tmp_path, monkeypatch, capsys):
    """The steps that succeeded are kept, so the same command runs only the failed one again."""
    failure = Outcome(failed=("pretrain: base",))
    monkeypatch.setattr("tinylm.runs.experiments.run_steps", lambda steps, log: failure)
    assert main(["experiments", "--phase", "pretrain", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}\n"
    assert err.splitlines()[-1] == (
        f"error: failed: pretrain: base. See their output in {tmp_path / 'output'}. "
        "The same command resumes from there."
    )
