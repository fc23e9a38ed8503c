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
import tinylm
from tinylm.__main__ import COMMANDS, GROUPS, main
from tinylm.cli.data_rows import is_of_rows
from tinylm.cli.program import Parser, run_program, training_parser
from tinylm.cli.programs import Program
from tinylm.common.console import COMMAND_VARIABLE
from tinylm.common.errors import UserError
from tinylm.common.platform import STOP_SIGNALS
from tinylm.config.loader import load_config
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
def test_the_help_of_a_command_opens_with_the_command(name, capsys, monkeypatch):
    """A checkout names its programs; `tinylm chat` is one under another name."""
    program = COMMANDS[name]
    checkout = f"python -m tinylm {name}"
    if type(program) is Program and name != "chat":
        checkout = f"python {program.name}.py"
    help_of(name)
    assert capsys.readouterr().out.startswith(f"usage: {checkout}")
    monkeypatch.setenv(COMMAND_VARIABLE, "tinylm")
    help_of(name)
    assert capsys.readouterr().out.startswith(f"usage: tinylm {name}")


def test_data_shows_the_rows_of_the_program_that_a_config_is_for(
    make_config, tmp_path, capsys, write
):
    """A config with data.task, training.init_from or a section of fine-tuning is for finetune.py."""
    config = str(make_config())
    assert main(["data", "training.seq_len=8", "--config", config, "data.val_docs=2"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"^row \d, micro-batch 0: .* from token \d+$", out, re.MULTILINE)) == 3
    assert out.count("8 tokens, targets: 8") == 3
    lines = [f'{{"prompt": "{number}", "completion": "two"}}\n' for number in range(20)]
    rows = write("rows.jsonl", "".join(lines))
    settings = ("training.train_on=all", f"data.dataset={rows}", "data.val_fraction=0.5")
    assert main(["data", "--config", config, *settings, "--rows", "1", "--of", "finetune"]) == 0
    assert capsys.readouterr().out.startswith(f"row 0, micro-batch 0: {rows}:")
    assert is_of_rows(load_config(config, ["lora.r=2"]))
    assert is_of_rows(load_config(config, ["training.init_from=base.ckpt"]))
    assert not is_of_rows(load_config(config))


def help_of(*words):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0


def test_help_lists_every_command_in_a_group(capsys):
    help_of()
    listed = re.findall(r"^  ([a-z][a-z-]+)  +\w", capsys.readouterr().out, re.MULTILINE)
    assert listed == [name for group in GROUPS.values() for name in group]


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"tinylm {tinylm.__version__}\n"


def test_a_program_is_a_command_with_its_flags(tmp_path, capsys, monkeypatch):
    """Its errors name commands as they are typed; --debug may be given before it."""
    missing = tmp_path / "missing"
    problem = f"error: {missing}: not found. Train a model first: "
    for typed, train in ((None, "python train.py"), ("tinylm", "tinylm train")):
        if typed:
            monkeypatch.setenv(COMMAND_VARIABLE, typed)
        assert main(["list", "--dir", str(missing)]) == 2
        fix = f"{train} --config config_smoke.yaml.\n"
        assert capsys.readouterr().err == problem + fix
    with pytest.raises(UserError):
        main(["--debug", "list", "--dir", str(missing)])


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
        (
            ["--batch_size=3"],
            "--batch_size=3. A setting is written without dashes: training.batch_size=3.",
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
