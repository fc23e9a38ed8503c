"""README.md and docs/*.md agree with the code: every command is found, checked, and run if possible.

The convention: a command is in a fenced block marked `bash`, or is inline code that begins with
`python` or `tinylm`. Output of programs is in blocks marked `text`, doctest examples in blocks marked `python`.
"""

import argparse
import ast
import contextlib
import doctest
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest

from tests import programs
from tinylm.__main__ import COMMANDS
from tinylm.cli.program import Parser
from tinylm.cli.programs import Program
from tinylm.common.errors import UserError
from tinylm.common.hub import HF_PREFIX
from tinylm.config.loader import load_config
from tinylm.config.messages import sections
from tinylm.config.schema import Config
from training.pipeline import read_stages

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()
]
GUIDES = [path for path in DOCUMENTS if path.name in ("LEARNING_PATH.md", "TROUBLESHOOTING.md")]
# Commands of other projects that the pages may use. They are not run here.
TOOLS = {
    "cd",
    "curl",
    "echo",
    "export",
    "git",
    "kill",
    "lm_eval",
    "nvidia-smi",
    "pip",
    "pytest",
    "python",
    "python3",
    "ruff",
    "sleep",
    "source",
    "tensorboard",
    "wandb",
}
TOOL_MODULES = {"pip", "pytest", "venv", "ruff"}
# The programs that are run, and the arguments added to make each run take a second or two.
SHORT = {
    "train.py": [
        "training.max_steps=2",
        "training.val_every_steps=1",
        "training.val_batches=1",
        "training.save_every_steps=1",
        "training.micro_batch_size=2",
    ],
    "finetune.py": [
        "training.max_steps=2",
        "training.val_every_steps=1",
        "training.save_every_steps=1",
        "training.micro_batch_size=2",
    ],
    "align.py": [
        "training.max_steps=2",
        "training.val_every_steps=1",
        "training.save_every_steps=1",
        "training.micro_batch_size=2",
    ],
    "infer.py": ["--max-new-tokens=8"],
    "evaluate_checkpoints.py": ["--limit=2"],
    "eval_val.py": [],
    "list.py": [],
    "-m tinylm": [],
}
# Commands that cannot be run as they are shown, and how they are tested instead.
SHOWN = {
    "encode_corpus.py": "docs/SCALING.md has its text; tests/training/test_scaling.py runs it",
    "sbatch": "needs Slurm; tests/training/test_scaling.py starts its command with Slurm's variables",
    "torchrun": "needs two machines; tests/training/test_scaling.py runs both on this one",
}
# Names in the guides that do not belong to this project.
OUTSIDE = {
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HTTPS_PROXY",
    "NO_COLOR",
    "NotImplementedError",
    "PYTORCH_ENABLE_MPS_FALLBACK",
}
NAMED_FILE = re.compile(
    r"(?:[\w.-]+/)*[\w.-]+\.(?:py|yaml|toml)|(?:data|tests|cases|configs|benchmarks|docs)/[\w./-]+|requirements[\w-]*\.txt"
)


# --- finding commands -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    line: int
    """number of its first line in the document"""
    lines: list[str]


@dataclass(frozen=True)
class Command:
    """One simple command: no pipe, no redirection, no variables before it."""

    words: tuple[str, ...]
    line: int
    fenced: bool = True
    stdin: str = ""
    """text that an `echo` before it pipes into it"""

    @property
    def program(self) -> str | None:
        """`train.py`, or `-m tinylm` for commands of the library; None for other tools."""
        if self.words[0] == "tinylm":  # installed: each program is a command too
            command = COMMANDS.get(" ".join(self.words[1:2]))
            return f"{command.name}.py" if type(command) is Program else "-m tinylm"
        if self.words[0] == "torchrun":
            return next(word for word in self.words if word.endswith(".py"))
        if self.words[0] not in ("python", "python3") or len(self.words) < 2:
            return None
        if self.words[1] == "-m":
            return None if self.words[2] in TOOL_MODULES else f"-m {self.words[2]}"
        return None if self.words[1] == "-c" else self.words[1]

    @property
    def arguments(self) -> list[str]:
        """The words after the program."""
        assert self.program is not None
        if self.words[0] == "tinylm":
            command = COMMANDS.get(" ".join(self.words[1:2]))
            if type(command) is Program:
                return [*command.flags, *self.words[2:]]
            return list(self.words[1:])
        return list(self.words[self.words.index(self.program.split()[-1]) + 1 :])


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks in order; fences may be indented."""
    opened: Block | None = None
    for number, line in enumerate(text.split("\n"), start=1):
        fence = re.fullmatch(r"\s*```(\w*)\s*", line)
        if fence and opened:
            yield opened
            opened = None
        elif fence:
            opened = Block(fence[1], number + 1, [])
        elif opened:
            opened.lines.append(line)


def commands(text: str) -> list[Command]:
    """The commands of a document, in order."""
    found = [
        command
        for block in blocks(text)
        if block.language == "bash"
        for command in commands_of_block(block)
    ]
    fenced_lines = {block.line + i for block in blocks(text) for i in range(len(block.lines))}
    for number, line in enumerate(text.split("\n"), start=1):
        if number not in fenced_lines:
            found += [
                Command(tuple(shlex.split(code)), number, fenced=False)
                for code in re.findall(r"`((?:python3?|tinylm) [^`]+)`", line)
            ]
    return sorted(found, key=lambda command: command.line)


def commands_of_block(block: Block) -> Iterator[Command]:
    """The commands of a shell block: join lines at a backslash, then split at shell operators."""
    text, first = "", block.line
    for number, line in enumerate(block.lines, start=block.line):
        first = first if text else number
        text += line.strip()
        if text.endswith("\\"):
            text = f"{text[:-1]} "
            continue
        yield from commands_of_line(text, first)
        text = ""


def commands_of_line(text: str, line: int) -> Iterator[Command]:
    """Split one line into simple commands.

    >>> [command.words for command in commands_of_line("A=1 python list.py 2> x | head && cd a  # why", 7)]
    [('python', 'list.py'), ('head',), ('cd', 'a')]
    """
    tokens = shlex.shlex(text, posix=True, punctuation_chars=True)
    tokens.whitespace_split = True
    words: list[str] = []
    stdin = ""
    redirected = False
    for part in [*tokens, ";"]:
        if redirected:
            redirected = False
        elif re.fullmatch(r"[<>&]*[<>][<>&]*", part):
            redirected = True
            if words and words[-1].isdigit():
                words.pop()  # the 2 of `2> file`
        elif not set(part) <= set("|&;()"):
            words.append(part)
        elif command := tuple(without_variables(words)):
            yield Command(command, line, stdin=stdin)
            stdin = " ".join(command[1:]) + "\n" if part == "|" and command[0] == "echo" else ""
            words = []


def without_variables(words: list[str]) -> list[str]:
    """The words after `NAME=value ...`."""
    start = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    return words[start:]


# --- checking them ----------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """Raised with the parsed arguments, so that the program does not run."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments


def parse(program: str, arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments with the program's own parser; ValueError with its message if it fails."""

    def stop_after(parse: Callable[..., argparse.Namespace]) -> Callable[..., None]:
        def stop(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
            raise Parsed(parse(parser, args, namespace))

        return stop

    errors = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for parser in (argparse.ArgumentParser, Parser):
            for name in ("parse_args", "parse_intermixed_args"):
                if name in vars(parser):
                    patch.setattr(parser, name, stop_after(getattr(parser, name)))
        try:
            main_of(program)(arguments)
        except Parsed as parsed:
            return parsed.arguments
        except SystemExit as end:
            if end.code == 0:  # --help
                return argparse.Namespace()
            raise ValueError(
                errors.getvalue().strip().splitlines()[-1].partition("error: ")[2]
            ) from None
    raise ValueError("its main() parses no arguments")


def main_of(program: str) -> Any:
    """The `main` of a program; ValueError if it has none."""
    name = (
        f"{program.removeprefix('-m ')}.__main__"
        if program.startswith("-m ")
        else program.removesuffix(".py").replace("/", ".")
    )
    try:
        return importlib.import_module(name).main
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"no such program ({error})") from None


def configs_of(command: Command) -> list[Config]:
    """Load the configs that a command uses; UserError of `load_config` if one is wrong."""
    assert command.program is not None
    given = vars(parse(command.program, command.arguments))
    if command.program == "align.py":
        return [stage.config for stage in read_stages(given["config"], given["overrides"])]
    return (
        [load_config(given["config"], given["overrides"])]
        if "config" in given and "overrides" in given
        else []
    )


def faults(text: str) -> Iterator[str]:
    """Problems of all commands of a document, each with its line."""
    folders = {load_config(path).training.checkpoint_dir for path in ROOT.glob("*.yaml")}
    for command in commands(text):
        yield from (f"{command.line}: {fault}" for fault in faults_of_command(command, folders))


def faults_of_command(command: Command, folders: set[str]) -> Iterator[str]:
    """Problems of one command; `folders` are the checkpoint folders so far, its own is added."""
    if command.program is None and command.words[0] not in TOOLS | SHOWN.keys():
        yield f"{command.words[0]}: neither in this project nor in TOOLS"
    if command.program in SHOWN:
        return
    missing = [
        word
        for word in command.words
        if (name := word.rpartition("=")[2])
        and NAMED_FILE.fullmatch(name)
        and not Path(name).exists()
    ]
    if command.fenced and missing:
        yield f"{missing[0]}: no such file"
    if command.program is None or missing:
        return
    try:
        given = vars(parse(command.program, command.arguments))
        configs = configs_of(command)
    except (ValueError, UserError) as error:
        yield f"{command.program}: {error}"
        return
    if command.program in ("train.py", "align.py"):
        folders.update(config.training.checkpoint_dir for config in configs)
    reads = {}
    for flag in ("ckpt", "resume"):
        named = given.get(flag)
        for name in named if isinstance(named, list) else [named]:  # eval_val.py takes several
            if isinstance(name, str | Path):  # --resume may stand alone
                reads[flag] = Path(name).parent
    if given.get("dir") is not None:
        reads["dir"] = given["dir"]
    for flag, folder in reads.items():
        if command.fenced and folder is not None and str(folder) not in folders:
            yield f"{command.program}: --{flag}: no earlier command trains into {folder}"


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_programs_accept_every_command_in_the_docs(document, in_root):
    assert list(faults(document.read_text(encoding="utf-8"))) == []


def test_the_guides_have_commands():
    """Otherwise the test above could pass with an empty list, for example if a fence is not closed."""
    for guide in GUIDES:
        assert (
            len(
                [
                    command
                    for command in commands(guide.read_text(encoding="utf-8"))
                    if command.program
                ]
            )
            >= 5
        )


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (
            "python train.py --config config_smoke.yaml --fast",
            "2: train.py: unrecognized arguments: --fast",
        ),
        ("python train.py", "2: train.py: the following arguments are required: --config"),
        (
            "python infer.py --temprature 0",
            "2: infer.py: unrecognized arguments: --temprature 0. See python infer.py --help.",
        ),
        ("python list.py --sort size | echo", "2: list.py: argument --sort: invalid choice"),
        (
            "python train.py --config config_smoke.yaml training.lrr=1",
            "2: train.py: command line: training.lrr: no such setting. Did you mean lr?",
        ),
        (
            "python train.py --config config_smoke.yaml training.lr=high",
            "2: train.py: command line: training.lr: must be a number",
        ),
        ("python train.py --config config_huge.yaml", "2: config_huge.yaml: no such file"),
        (
            "python train.py --config config_smoke.yaml data.dataset=data/none.txt",
            "2: data.dataset=data/none.txt: no such file",
        ),
        ("python trane.py --config config_smoke.yaml", "2: trane.py: no such file"),
        ("python -m tinylm config-refrence", "2: -m tinylm: argument command: invalid choice"),
        (
            "tinylm finetun --config config_smoke.yaml",
            "2: -m tinylm: argument command: invalid choice",
        ),
        (
            "tinylm train --confg config_smoke.yaml",
            "2: train.py: the following arguments are required: --config",
        ),
        ("python -m tinylmm", "2: -m tinylmm: no such program"),
        ("pip install -r requirements-all.txt", "2: requirements-all.txt: no such file"),
        ("conda activate tiny", "2: conda: neither in this project nor in TOOLS"),
        (
            "NO_COLOR=1 python list.py --dir checkpoints/none",
            "2: list.py: --dir: no earlier command trains into checkpoints/none",
        ),
        (
            "python eval_val.py --ckpt x/best.ckpt \\\n  --config config_smoke.yaml",
            "2: eval_val.py: --ckpt: no earlier command trains into x",
        ),
    ],
)
def test_a_command_that_would_fail_is_found(line, fault, in_root):
    found = list(faults(f"```bash\n{line}\n```\n"))
    assert len(found) == 1
    assert fault in found[0]


def test_a_wrong_flag_in_inline_code_is_found(in_root):
    assert list(faults("Type `python list.py --jsn`.")) == [
        "1: list.py: unrecognized arguments: --jsn. See python list.py --help."
    ]


def test_a_correct_document_has_no_faults(in_root):
    text = """
        ```bash
        git clone https://example.org/x && cd x
        python3 -m venv .venv && source .venv/bin/activate
        pip install -r requirements.txt        # a few minutes
        python train.py --config config_smoke.yaml training.checkpoint_dir=checkpoints/a 2>&1 > log.txt
        NO_COLOR=1 python list.py --dir checkpoints/a | head -3
        python infer.py --ckpt checkpoints/a/best.ckpt \\
          --prompt "to be | or & not"
        python train.py --help
        tinylm new first && tinylm eval-val --ckpt checkpoints/a/best.ckpt --config config_smoke.yaml
        ```
        `python list.py --json`
    """
    assert list(faults(text.replace("| head -3", ""))) == []
    assert list(faults(text)) == ["7: head: neither in this project nor in TOOLS"]


def test_commands_are_split_as_in_a_shell():
    text = (
        '```bash\necho "Attention is" | python infer.py --temperature 0\nsleep 5 & kill -9 '
        "$!\n```\n```text\npython no.py\n```\n"
    )
    assert [(command.words, command.line, command.stdin) for command in commands(text)] == [
        (("echo", "Attention is"), 2, ""),
        (("python", "infer.py", "--temperature", "0"), 2, "Attention is\n"),
        (("sleep", "5"), 3, ""),
        (("kill", "-9", "$!"), 3, ""),
    ]


# --- running them -----------------------------------------------------------------------------------------------------


def needs_network(command: Command) -> bool:
    """Whether the command needs data, a tokenizer or a Hugging Face model that is not on this machine."""
    if command.program == "-m tinylm" and command.arguments[:1] == ["import"]:
        return not Path(command.arguments[1]).exists()
    if command.program == "evaluate_checkpoints.py":
        return any(
            not Path(name).exists() for name in parse(command.program, command.arguments).model
        )
    return any(map(is_elsewhere, configs_of(command)))


def needs_training(command: Command) -> bool:
    """Whether the command keeps what a model does right, which one of two steps does nothing of;
    tests/rewards/test_selection.py runs it with answers that are right.
    """
    return command.program == "-m tinylm" and command.arguments[:1] == ["select"]


def is_elsewhere(config: Config) -> bool:
    """Whether a run's data, tokenizer or Hugging Face model is not on this machine."""
    base = config.training.init_from or ""
    names = (
        config.data.dataset,
        config.tokenizer.path,
        base.removeprefix(HF_PREFIX) if base.startswith(HF_PREFIX) else None,
    )
    return any(name and not Path(name).exists() for name in names)


def runnable(text: str) -> Iterator[Command]:
    """The fenced commands of a document that can be run here.

    Each command is checked only when it is its turn, because it may read the output of an earlier one.
    """
    for command in commands(text):
        if not command.fenced or command.program not in SHORT:
            continue
        if not needs_network(command) and not needs_training(command):
            yield command


@pytest.fixture
def copy_of_the_tree(tmp_path, monkeypatch) -> Path:
    """A copy of this project without files of runs and tools, as the working directory."""
    ignored = (
        ".*",
        "__pycache__",
        "venv",
        "env",
        "checkpoints",
        "logs",
        "tokenizers",
        "wandb",
        "build",
        "dist",
        "*.egg-info",
    )
    tree = tmp_path / "project"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*ignored))
    monkeypatch.chdir(tree)
    return tree


@pytest.mark.slow
def test_the_commands_of_the_guides_run(copy_of_the_tree, monkeypatch, capfd):
    """In this process, because imports would slow 30 processes; guides begin without checkpoints."""
    Path("prompts.txt").write_text("Attention is\n", encoding="utf-8")
    Path("prompts.jsonl").write_text('{"prompt": "Attention is"}\n', encoding="utf-8")
    for guide in GUIDES:
        shutil.rmtree("checkpoints", ignore_errors=True)
        for command in runnable(guide.read_text(encoding="utf-8")):
            monkeypatch.setattr(
                sys, "stdin", io.TextIOWrapper(io.BytesIO(command.stdin.encode()), encoding="utf-8")
            )
            assert command.program is not None
            code = main_of(command.program)([*command.arguments, *SHORT[command.program]])
            out, err = capfd.readouterr()
            assert code == 0, f"{guide.name}:{command.line}: exit {code}\n{err}"
            assert out.strip(), f"{guide.name}:{command.line}: printed no result"


STAND_IN = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "training.optimizer=adamw"),
    *("training.micro_batch_size=2", "training.grad_accum_steps=1", "training.val_every_steps=2"),
    *("data.num_workers=0", "tokenizer.path=tokenizers/tinystories", "data.val_fraction=0.1"),
    *("hardware.precision=32", "hardware.compile=false", "training.max_steps=2"),
]


@pytest.mark.slow
def test_the_recipes_run_on_a_stand_in_for_their_corpora(copy_of_the_tree, monkeypatch, capfd):
    """Every command in its order: the hub gives generated stories; the model and the run are tiny,
    and the tokenizer of the first recipe takes the place of GPT-2's.
    """
    served = []

    def serve(name: str, config: str | None, *, split: str, streaming: bool) -> datasets.Dataset:
        served.append((name, split))
        words = [
            "once",
            "upon",
            "a",
            "time",
            "there",
            "was",
            "a",
            "small",
            "red",
            "cat",
            "who",
            "sat",
            "by",
            "the",
            "sea",
            "and",
            "slept",
        ]
        start = 0 if split == "train" else 1000
        stories = [
            f"{i} " + " ".join(words[(i * k) % 17] for k in range(1, 90))
            for i in range(start, start + 60)
        ]
        return datasets.Dataset.from_dict({"text": stories})

    monkeypatch.setattr("datasets.load_dataset", serve)
    monkeypatch.setattr("tinylm.text.hub_dataset.require_hub", lambda where, fix: None)
    text = (ROOT / "docs" / "RECIPES.md").read_text(encoding="utf-8")
    ran = []
    for command in commands(text):
        if command.program not in SHORT or not command.fenced:
            continue
        arguments = ["tokenizers/tinystories" if x == "gpt2" else x for x in command.arguments]
        if command.program in ("train.py", "eval_val.py"):
            arguments += STAND_IN
        elif command.program == "infer.py":
            arguments += SHORT["infer.py"]
        code = main_of(command.program)(arguments)
        out, err = capfd.readouterr()
        assert code == 0, f"RECIPES.md:{command.line}: exit {code}\n{err}"
        assert out.strip(), f"RECIPES.md:{command.line}: printed no result"
        ran.append(command.program)
    assert len(ran) == 11
    assert {name for name, _ in served} == {"roneneldan/TinyStories", "Skylion007/openwebtext"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name == "README.md"], ids=lambda path: path.name
)
def test_the_commands_of_the_readme_run_as_they_are_typed(document, copy_of_the_tree):
    """In order, each in its own process; training takes 5 steps. The first command of each program is a
    real start, and later ones are forked; `.ci/run` types the main ones with all steps.
    """
    results: list[tuple[str, str]] = []
    for command in runnable(document.read_text(encoding="utf-8")):
        is_first = command.program not in {program for program, _ in results}
        start = subprocess.run if is_first else programs.run
        results.append(run_as_typed(command, copy_of_the_tree, start))
    assert {program for program, _ in results} == set(SHORT)
    expected = {
        "train.py": r"checkpoints\S*/\S+\.ckpt\n|row 0, micro-batch 0: .*\n",
        "list.py": r"(?s).*step.*\(.*last\).*",
        "eval_val.py": r"val_loss \d+\.\d+ .*",
    }
    expected |= {"finetune.py": expected["train.py"], "evaluate_checkpoints.py": r"(place|task) .*"}
    # An answer may be blank after 5 steps.
    expected |= {
        "align.py": r"metric .*\n",
        "infer.py": r"(?s).*\n",
        "-m tinylm": r"\s*\S",
    }
    for program, out in results:
        assert re.match(expected[program], out), f"{program} printed {out!r}"


def run_as_typed(command: Command, folder: Path, start: Callable[..., Any]) -> tuple[str, str]:
    """Run a command by subprocess.run or programs.run; return the program and its stdout."""
    assert command.program is not None
    is_training = command.program in ("train.py", "finetune.py", "align.py")
    more = ["training.max_steps=5", "training.val_batches=2"] if is_training else []
    # One thread: several threads on a busy machine take many times as long.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("PYTEST")
    } | {"OMP_NUM_THREADS": "1"}
    done = start(
        [sys.executable, *command.program.split(), *command.arguments, *more],
        cwd=folder, env=environment, input=command.stdin, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"line {command.line}: {shlex.join(command.words)}\n{done.stderr}"
    return command.program, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide",
    [path for path in GUIDES if path.name == "LEARNING_PATH.md"],
    ids=lambda path: path.name,
)
def test_the_learning_path_shows_the_first_loss_of_its_run(guide, tmp_path):
    """A change of split, order, initialization or optimizer would make its numbers wrong."""
    shown = re.search(r"^step +10/200  loss (\S+)", guide.read_text(encoding="utf-8"), re.M)
    folders = [
        f"{setting}={tmp_path}"
        for setting in ("training.checkpoint_dir", "training.log_dir", "data.cache_dir")
    ]
    command = [sys.executable, "train.py", "--config", "configs/learn.yaml", *folders]
    with programs.Program(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert shown is not None and process.stderr is not None
        first = next(line for line in process.stderr if line.startswith("step"))
        process.kill()
    found = re.match(r"step +10/200  loss (\S+)", first)
    assert found is not None, first
    assert float(found[1]) == pytest.approx(float(shown[1]), abs=0.02)


# --- other claims of a document ---------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_examples_in_the_docs_give_the_output_shown(document, in_root):
    """One namespace per document: an example may use names of earlier examples."""
    names: dict[str, Any] = {}
    runner = doctest.DocTestRunner(verbose=False)
    report = io.StringIO()
    for block in blocks(document.read_text(encoding="utf-8")):
        if block.language == "python" and any(
            line.lstrip().startswith(">>>") for line in block.lines
        ):
            test = doctest.DocTestParser().get_doctest(
                "\n".join(block.lines) + "\n", names, document.name, document.name, block.line - 1
            )
            runner.run(test, out=report.write, clear_globs=False)
            names = test.globs
    assert runner.failures == 0, report.getvalue()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_project_has_a_target(document):
    text = document.read_text(encoding="utf-8")
    links = [
        link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)
    ]
    own = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    broken = [
        link
        for link in links
        if (
            link[1:] not in own
            if link.startswith("#")
            else not (document.parent / link.partition("#")[0]).exists()
        )
    ]
    assert broken == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_versions_pinned_in_the_docs_are_those_of_the_requirements(document):
    required = "".join(
        path.read_text(encoding="utf-8") for path in ROOT.glob("requirements*.txt")
    ).split()
    text = document.read_text(encoding="utf-8")
    assert set(re.findall(r"[a-z-]+==[\d.]*\d", text)) <= set(required)


def sources() -> dict[Path, str]:
    """The code that the guides describe."""
    return {
        path: path.read_text(encoding="utf-8")
        for path in [
            *ROOT.glob("*.py"),
            *(ROOT / "tinylm").rglob("*.py"),
            *(ROOT / "training").rglob("*.py"),
            *(ROOT / "benchmarks").glob("*.py"),
        ]
    }


def unknown_names(text: str, code: str) -> Iterator[str]:
    """Inline code that names a setting, file or identifier that does not exist."""
    settings = {
        f"{key}.{name}".lstrip(".") for key, section in sections() for name in section.model_fields
    }
    # A file may be named as its neighbours name it: `decoder.py` after `tinylm/model/decoder.py`.
    prose = re.sub(r"(?ms)^\s*```.*?^\s*```", "", text)
    for word in re.findall(r"`([A-Za-z_][\w./]*)`", prose):
        if re.search(r"\.(py|md|yaml)$", word):
            folders = ("", "docs", "tests")
            inside = (
                found for room in ("tinylm", "training") for found in (ROOT / room).rglob(word)
            )
            if not any((ROOT / folder / word).exists() for folder in folders) and not any(inside):
                yield word
        elif (
            "." in word and word.split(".")[0] in Config.model_fields and not word.endswith(".json")
        ):
            if word not in settings:
                yield word
        elif (
            word not in OUTSIDE
            and "/" not in word
            and not all(re.search(rf"\b{part}\b", code) for part in word.split("."))
        ):
            yield word


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_names_in_the_guides_exist(guide):
    assert (
        list(unknown_names(guide.read_text(encoding="utf-8"), "\n".join(sources().values()))) == []
    )


def test_a_name_that_does_not_exist_is_found():
    text = (
        "`training.lr` `training.lrr` `tinylm/model/decoder.py` `decoder.py` `decodr.py` "
        "`rope_angles` `rope_angels` `a b`\n```text\n`not_this`\n```\n"
    )
    assert list(unknown_names(text, "def rope_angles(): ...")) == [
        "training.lrr",
        "decodr.py",
        "rope_angels",
    ]


# Placeholders of logging and UserError: %s, %d, %.1f, {}.
PLACEHOLDER = re.compile(r"%[-+ #0]*\d*(?:\.\d+)?[sdrfgi]|\{\}")
SHORTEST_MESSAGE = 12  # characters; a pattern with fewer would match any line


def printed_patterns(sources: Iterable[str]) -> list[re.Pattern[str]]:
    """A pattern for each text in the code, with `.*` for values; texts too short to be specific are skipped.

    An error of three fields, `UserError(where, problem, fix)`, is one text.
    """
    found = []
    for source in sources:
        tree = ast.parse(source)
        assigned = assigned_values(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                text = text_pattern(node, {})
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                ("Error", "Unsupported")
            ):
                text = error_pattern(node, assigned)
            else:
                continue
            fixed = re.sub(r"\.\*|\\.", " ", text)
            if len(re.sub(r"[()|?:]", "", fixed)) >= SHORTEST_MESSAGE:
                found.append(re.compile(text))
    return found


def assigned_values(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """Every expression that is assigned to each name."""
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values.setdefault(node.targets[0].id, []).append(node.value)
    return values


def text_pattern(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> str:
    """A pattern of all values of a string expression, with `.*` for unknown parts."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return ".*".join(map(re.escape, PLACEHOLDER.split(node.value.rstrip("\n"))))
    if isinstance(node, ast.JoinedStr):
        return "".join(text_pattern(part, assigned) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_pattern(node.value, assigned) if isinstance(node.value, ast.Name) else ".*"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_pattern(node.left, assigned) + text_pattern(node.right, assigned)
    if isinstance(node, ast.IfExp):
        return f"(?:{text_pattern(node.body, assigned)}|{text_pattern(node.orelse, assigned)})"
    if isinstance(node, ast.Name) and node.id in assigned:
        # its own values are not followed further: a name may be assigned from itself
        return f"(?:{'|'.join(text_pattern(value, {}) for value in assigned[node.id])})"
    return ".*"


def error_pattern(call: ast.Call, assigned: dict[str, list[ast.expr]]) -> str:
    """`WHERE: PROBLEM. FIX` of an error with fields; other errors are one text each."""
    args = call.args
    if ast.unparse(call.func) == "Unsupported":  # a row of training/support.py: features come first
        args = args[1:]
    fields = [
        *args[1:3],
        *(keyword.value for keyword in call.keywords if keyword.arg == "fix"),
    ]
    if not fields:
        return ""
    problem, *fix = (text_pattern(field, assigned) for field in fields)
    return rf".*: {problem}\.?" + (f" {fix[0]}" if fix else "")


def unknown_messages(text: str, patterns: list[re.Pattern[str]]) -> list[str]:
    """Lines of `text` blocks that match no text in the code; programs may add the last period."""
    lines = [
        line.strip()
        for block in blocks(text)
        if block.language == "text"
        for line in block.lines
        if line.strip()
    ]
    messages = {line: line.removeprefix("error: ") for line in lines}
    return [
        line
        for line, message in messages.items()
        if not any(p.fullmatch(message) or p.fullmatch(message.removesuffix(".")) for p in patterns)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide",
    [path for path in GUIDES if path.name == "TROUBLESHOOTING.md"],
    ids=lambda path: path.name,
)
def test_the_code_prints_every_message_in_the_troubleshooting(guide):
    assert (
        unknown_messages(guide.read_text(encoding="utf-8"), printed_patterns(sources().values()))
        == []
    )


def test_a_message_that_the_code_no_longer_prints_is_found():
    patterns = printed_patterns(
        [
            'raise UserError(f"{path}: not found. Give a file; {other}")',
            'raise UserError((path, "lr"), f"must be below {limit}", "Lower it")',
            'logger.info("%d tokens in %.1f s", n, seconds)',
            "short = 'a'",
        ]
    )
    printed = [
        "error: x.yaml: not found. Give a file; y",
        "error: x.yaml: lr: must be below 3. Lower it.",
        "5 tokens in 0.2 s",
    ]
    stale = [
        "error: x.yaml: missing. Give a file; y",
        "error: x.yaml: not found",
        "error: x.yaml: lr: must be below 3. Raise it.",
        "5 tokens after 0.2 s",
    ]
    text = "\n".join(["```text", *printed, *stale, "```", ""])
    assert unknown_messages(text, patterns) == stale
