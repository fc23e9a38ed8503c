"""The border and the floors of ARCHITECTURE.md, read from the source with `ast`: a wrong import fails here."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# A file imports only from its own floor or lower ones; a folder (tasks, web) stands on one floor.
FLOORS = [
    ["errors", "files", "config", "device", "processes"],
    ["portions", "words", "fastbpe", "tokenizer", "tokenfile", "corpus", "encode", "mix", "bpe", "packing", "show", "prompts", "sandbox", "rows"]
    + ["metrics", "reference"],
    ["decoder", "verifier", "optim", "schedule", "losses"],
    ["checkpoint", "engine", "sampling", "chat", "hf", "gguf", "hf_import", "foreign", "lora", "preferences", "problems", "judge", "samples", "export"]
    + ["tasks", "evaluate", "harness", "planner", "trials", "streaming"],
    ["plots", "doctor", "experiments", "comparison", "server", "web", "program", "__main__"],  # program: what __main__ and the programs outside do alike
]
# The library's front door: what parses arguments and speaks to people.
FRONT = ("program", "__main__")
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
PROGRAMS = {path.stem for path in ROOT.glob("*.py")} | {"train", "finetune", "align", "infer", "data", "model", "list"}
LIBRARY = sorted(path for path in (ROOT / "tinylm").rglob("*.py") if path != ROOT / "tinylm" / "__init__.py")
SOURCES = [*LIBRARY, *sorted(ROOT.glob("*.py")), *sorted(ROOT.glob("benchmarks/**/*.py"))]
# The import names of what pyproject.toml makes `pip install .` bring.
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLED = {{"pyyaml": "yaml"}.get(name, name) for name in (Requirement(line).name for line in PROJECT["dependencies"])}
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(home|work|root|Users|tmp/v)/\w")


class Import(NamedTuple):
    module: str
    line: int
    runs_at_import: bool


def imports(node: ast.AST, runs_at_import: bool = True) -> Iterator[Import]:
    """Every import in the tree; one in a function, or for type checkers only, does not run when the file is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, runs_at_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            if child.module == "tinylm":
                yield from (Import(f"tinylm.{alias.name}", child.lineno, runs_at_import) for alias in child.names)
            else:
                yield Import("." * child.level + (child.module or ""), child.lineno, runs_at_import)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
            yield from imports(child, runs_at_import and not later)


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What is called, as written (`print`, `torch.load`), and where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def faults_of_library_file(name: str, source: str) -> Iterator[str]:
    """What `source`, as tinylm/<name>.py, does that the border and the floors forbid."""
    for module, line, runs_at_import in imports(ast.parse(source)):
        top, _, rest = module.partition(".")
        inner = rest.partition(".")[0]
        if top in ("lightning", "pytorch_lightning", "lightning_fabric"):
            yield f"{line}: imports {module}: the library knows no Lightning"
        elif top == "" or top in PROGRAMS:
            yield f"{line}: imports {module or '.'}: the library imports by full name, and no program"
        elif top == "argparse" and name not in FRONT:
            yield f"{line}: imports argparse: programs parse arguments"
        elif top == "tinylm" and inner not in FLOOR_OF:
            yield f"{line}: imports {module}, which has no floor"
        elif top == "tinylm" and FLOOR_OF[inner] > FLOOR_OF[name]:
            yield f"{line}: imports {module} from a floor above"
        elif runs_at_import and top != "tinylm" and top not in sys.stdlib_module_names and top not in INSTALLED:
            yield f"{line}: imports {module}, which pip install . does not bring; import it in the function that needs it"
    if name not in FRONT:
        yield from (f"{line}: prints" for call, line in calls(ast.parse(source)) if call == "print")


def faults_of_any_file(name: str, source: str) -> Iterator[str]:
    """What no file may do but the one named for it."""
    tree = ast.parse(source)
    if name != "config":
        yield from (f"{line}: imports {module}: config.py is the only reader" for module, line, _ in imports(tree) if module.partition(".")[0] == "yaml")
    if name != "checkpoint":
        yield from (f"{line}: calls torch.load: checkpoint.py is the only reader" for call, line in calls(tree) if call == "torch.load")
        yield from (f"{line}: imports from torch.serialization" for module, line, _ in imports(tree) if module == "torch.serialization")


def floor_name(path: Path) -> str:
    """`tasks` for tinylm/tasks/sst2.py, `config` for tinylm/config.py."""
    first = path.relative_to(ROOT / "tinylm").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_keeps_the_border_and_the_floors(path):
    name = floor_name(path)
    assert name in FLOOR_OF, f"give {name} a floor in ARCHITECTURE.md section 3 and in this test"
    assert list(faults_of_library_file(name, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_reader_of_yaml_and_one_of_checkpoints(path):
    name = floor_name(path) if path in LIBRARY else f"../{path.stem}"
    assert list(faults_of_any_file(name, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("program", ["infer.py", "list.py", "evaluate_checkpoints.py"])
def test_sampling_and_listing_do_without_lightning(program):
    """Neither may they import the programs that stand on it. Both are to start fast."""
    if (ROOT / program).exists():
        modules = {found.module.partition(".")[0] for found in imports(ast.parse((ROOT / program).read_text(encoding="utf-8")))}
        assert modules & {"lightning", "model", "data", "train", "callbacks", "finetune", "align"} == set()


def test_a_module_stands_on_one_floor():
    assert len(FLOOR_OF) == sum(len(names) for names in FLOORS)


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("decoder", "import lightning as L", "1: imports lightning: the library knows no Lightning"),
        ("decoder", "def f():\n    from lightning.pytorch import Trainer", "2: imports lightning.pytorch: the library knows no Lightning"),
        ("decoder", "import train", "1: imports train: the library imports by full name, and no program"),
        ("decoder", "from data import Rows", "1: imports data: the library imports by full name, and no program"),
        ("decoder", "from .config import Config", "1: imports .config: the library imports by full name, and no program"),
        ("decoder", "from . import config", "1: imports .: the library imports by full name, and no program"),
        ("engine", "import argparse", "1: imports argparse: programs parse arguments"),
        ("decoder", "from tinylm.engine import Engine", "1: imports tinylm.engine from a floor above"),
        ("decoder", "from tinylm import engine", "1: imports tinylm.engine from a floor above"),
        ("config", "def f():\n    import tinylm.tokenizer", "2: imports tinylm.tokenizer from a floor above"),
        ("decoder", "import tinylm.utils", "1: imports tinylm.utils, which has no floor"),
        ("hf", "import transformers", "1: imports transformers, which pip install . does not bring; import it in the function that needs it"),
        ("engine", "def f():\n    if True:\n        print(1)", "3: prints"),
    ],
)
def test_a_file_across_the_border_is_found(name, source, fault):
    assert list(faults_of_library_file(name, source)) == [fault]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("hf", "def f():\n    import transformers"),
        ("hf", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers"),
        ("engine", "import torch, math\nfrom tinylm.decoder import Decoder\nfrom tinylm.sampling import draw"),
        ("__main__", "import argparse\nprint(1)"),
        ("engine", "def f(report):\n    report.print(1)"),
    ],
)
def test_a_file_within_the_border_passes(name, source):
    assert list(faults_of_library_file(name, source)) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import yaml", "1: imports yaml: config.py is the only reader"),
        ("def f():\n    from yaml.nodes import Node", "2: imports yaml.nodes: config.py is the only reader"),
        ("torch.load('x', weights_only=True)", "1: calls torch.load: checkpoint.py is the only reader"),
        ("from torch.serialization import load", "1: imports from torch.serialization"),
    ],
)
def test_a_second_reader_is_found(source, fault):
    assert list(faults_of_any_file("engine", source)) == [fault]
    assert list(faults_of_any_file("checkpoint" if "torch" in source else "config", source)) == []


# --- importing has no effect -------------------------------------------------------------------------------------------


def loaded_by(modules: str, wanted: set[str], folder: Path) -> set[str]:
    """Which of the wanted modules a fresh Python has after importing `modules`, silently and leaving no file."""
    code = f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(ROOT)!r}); import {modules}; print(*({wanted!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert (done.returncode, done.stdout.count("\n"), list(folder.iterdir())) == (0, 1, [])
    return set(done.stdout.split())


def test_settings_load_without_torch(tmp_path):
    assert loaded_by("tinylm.config", {"torch", "numpy", "yaml"}, tmp_path) == {"yaml"}


@pytest.mark.slow
def test_importing_the_whole_library_is_silent_and_brings_nothing_that_only_some_need(tmp_path):
    names = sorted({f"tinylm.{floor_name(path)}" for path in LIBRARY})
    assert loaded_by(", ".join(names), {"lightning", "transformers", "datasets", "peft", "rich", "pandas", "matplotlib"}, tmp_path) == set()


def test_a_module_that_speaks_or_fails_when_imported_is_found(tmp_path):
    """`this` prints a poem; no module is called nonsense."""
    for name in ("this", "nonsense"):
        with pytest.raises(AssertionError):
            loaded_by(name, set(), tmp_path)


def test_every_pinned_version_is_one_that_the_package_allows():
    """Else `pip install -r requirements.txt && pip install .` would undo a pin. A package of tinylm alone is pinned by what it comes with."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    allowed = [Requirement(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["hub"]]]
    assert {requirement.name for requirement in allowed if pins.get(requirement.name, version(requirement.name)) not in requirement.specifier} == set()


# --- no file knows the machine it was written on -----------------------------------------------------------------------


def texts() -> list[Path]:
    folders = ["tinylm", "tests", "docs", "configs", "cases", "benchmarks", ".ci"]
    files = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts)]
    files = [path for path in files if path.name != ".git"]  # a file in a second working tree
    return [path for path in files if path.is_file() and path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json", ".sh", "")]


def test_no_file_names_a_path_of_one_machine():
    found = [f"{path.relative_to(ROOT)}: {hit.group()}" for path in texts() for hit in [MACHINE_PATH.search(path.read_text(encoding="utf-8"))] if hit]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("at /hom" + "e/me/x", True),
        ('"/wor' + "k/main", True),
        ("docs/wor" + "k/x", False),
        ("a/hom" + "e/b", False),
        ("/wor" + "k", False),
        ("~/hom" + "e/x", False),
    ],
)
def test_a_path_of_one_machine_is_recognised(text, found):
    assert bool(MACHINE_PATH.search(text)) == found
