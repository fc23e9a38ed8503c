"""All programs and commands: --help, and what `python -m tinylm` does beyond the library."""

import errno
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import list as list_program
from tinylm.__main__ import COMMANDS, main
from tinylm.cli.program import Parser, run_program
from tinylm.cli.training_flags import training_parser
from tinylm.common.platform import STOP_SIGNALS
from tinylm.runs.experiments import Outcome
from tinylm.tokens.token_file import TokenFile

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
    monkeypatch.setattr("tinylm.runs.experiments.run_steps", lambda steps: failure)
    assert main(["experiments", "--phase", "pretrain", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}\n"
    assert err.splitlines()[-1] == (
        f"error: failed: pretrain: base. See their output in {tmp_path / 'output'}. "
        "The same command resumes from there."
    )


class NotebookStream(io.TextIOBase):
    """The stdout of a Jupyter kernel: it cannot be reconfigured and has no file number."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)


def test_a_program_runs_in_a_notebook_and_gives_it_its_signals_back(tmp_path, monkeypatch):
    """After training, "interrupt" and "shut down" are the kernel's again."""
    stream = NotebookStream()
    monkeypatch.setattr(sys, "stdout", stream)
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    def body():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        return list_program.main(["--dir", str(tmp_path)])

    assert run_program(body, debug=False) == 0
    assert stream.text == f"no checkpoints in {tmp_path} and the folders in it\n"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.parametrize(
    "error",
    [
        # pytorch/aten/src/ATen/mps/MPSFallback.mm
        NotImplementedError(
            "The operator 'aten::kthvalue' is not currently implemented for the MPS device. "
            "If you want this op to be considered for addition please comment on an issue."
        ),
        TypeError(
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
            "float64. Please use float32 instead."
        ),
    ],
    ids=["operator", "type"],
)
def test_what_apples_gpu_cannot_compute_is_one_line(error, capsys):
    """Exit code 2 with what to do; the traceback only with --debug, or for another error of this type."""

    def body():
        raise error

    assert run_program(body, debug=False) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: mps: {str(error).partition('. ')[0]}. Set the environment variable "
        "PYTORCH_ENABLE_MPS_FALLBACK=1 to compute it on the CPU, or choose the CPU: "
        "hardware.accelerator=cpu, or --device cpu."
    )
    for debug, kind, message in ((True, type(error), str(error)), (False, TypeError, "other")):
        error = kind(message)
        with pytest.raises(kind):
            run_program(body, debug=debug)


@pytest.mark.parametrize("separator", ["---", "-", "-x", "--other"])
def test_a_separator_can_begin_with_a_dash(separator, tmp_path, monkeypatch):
    """argparse takes such a word for a flag."""
    text, out = tmp_path / "a.txt", tmp_path / "a.bin"
    text.write_text(f"one\n{separator}\ntwo\n", encoding="utf-8")
    flags = ["--data", str(text), "--tokenizer", "byte", "--out", str(out), "--processes", "1"]
    assert main(["encode", *flags, "--separator", separator]) == 0
    assert TokenFile.open(out).header.documents == 2


def test_a_flag_in_place_of_a_text_is_still_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["encode", "--separator", "--data", "a.txt"])
    assert "argument --separator: expected one argument" in capsys.readouterr().err


def test_a_path_after_an_equals_sign_can_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/users/me")
    parser = Parser()
    parser.add_argument_group("files").add_argument("--out", type=Path)
    parser.add_argument("--prompt")
    arguments = parser.parse_args(["--out=~/x", "--prompt=~/x"])
    assert (arguments.out, arguments.prompt) == (Path("/users/me/x"), "~/x")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--max_steps=3"],
            "--max_steps=3. A setting is written without dashes: training.max_steps=3.",
        ),
        (
            ["--max-steps", "3"],
            "--max-steps. A setting is written without dashes: training.max_steps=3.",
        ),
        (
            ["--training.max_steps", "3"],
            "--training.max_steps. A setting is written without dashes: training.max_steps=3.",
        ),
        (["--lr"], "--lr. A setting is written without dashes: training.lr=...."),
        (["--nothing"], "--nothing."),
    ],
)
def test_a_setting_written_as_a_flag_is_named(words, hint, capsys):
    parser, _ = training_parser("train.py", "config.yaml", "")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_intermixed_args(["--config", "c.yaml", *words])
    message = f"error: unrecognized arguments: {hint} See python train.py --help.\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np.zeros,
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_anywhere_is_one_line(error, capsys):
    """C7: at the edge of every program, whatever it was doing."""

    def body() -> int:
        if error is np.zeros:
            np.zeros((2**30, 2**20))
        raise error

    assert run_program(body, debug=False) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory: ")
    assert line.endswith("number of samples smaller. Saved checkpoints are unchanged.")


def test_another_runtime_error_keeps_its_traceback():
    def body() -> int:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_program(body, debug=False)
