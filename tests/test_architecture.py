"""The house of ARCHITECTURE: folders in the order of their imports, read from the source with `ast`.

A wrong import, a circle or a file that has grown too long fails here, and the message names it.
"""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
# A room imports from itself and from rooms before it. The order is the way of the data.
ROOMS = [
    "tinylm.common",
    "tinylm.config",
    "tinylm.text",
    "tinylm.tokenizer",
    "tinylm.tokens",
    "tinylm.rows",
    "tinylm.model",
    "tinylm.objectives",
    "tinylm.optim",
    "tinylm.checkpoint",
    "tinylm.interchange",
    "tinylm.generate",
    "tinylm.eval",
    "tinylm.rewards",
    "tinylm.planning",
    "tinylm.runs",
    "tinylm.serve",
    "tinylm.cli",
    "data",
    "model",
    "training",
    "programs",
]
PROGRAMS = (
    "train",
    "finetune",
    "align",
    "infer",
    "evaluate_checkpoints",
    "eval_val",
    "list",
)
LONGEST_FILE = 500
LONG_FILES = {"tinylm/model/decoder.py"}  # the model, whole, in one file

SOURCES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] in ("tinylm", "training")
    or (path.parent == ROOT and not path.name.startswith(".") and path.name != "setup.py")
]
LIBRARY = [path for path in SOURCES if path.is_relative_to(ROOT / "tinylm")]


def module_name(path: Path) -> str:
    """`tinylm.text` for tinylm/text/__init__.py, `train` for train.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in SOURCES}


def room_of(module: str) -> str:
    """`tinylm.text` for tinylm.text.sources, `programs` for train."""
    if module in PROGRAMS:
        return "programs"
    if module == "tinylm.__main__":
        return "tinylm.cli"
    return next((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), module)


parsed = functools.cache(ast.parse)


class Import(NamedTuple):
    module: str
    line: int
    at_import: bool  # False in a function, or under TYPE_CHECKING
    in_function: bool


def imports(node: ast.AST, at_import: bool = True, in_function: bool = False) -> Iterator[Import]:
    """Every import in the tree, the submodules that `from package import module` loads included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, at_import, in_function)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            submodules = [f"{base}.{alias.name}" for alias in child.names]
            found = [name for name in submodules if name in MODULES]
            if len(found) < len(submodules):
                found.append(base)
            for name in found:
                yield Import(name, child.lineno, at_import, in_function)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            checking = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from imports(
                child, at_import and not (function or checking), in_function or function
            )


@functools.cache
def first_party(source: str) -> list[Import]:
    """The imports of modules of this project, those at their first use included."""
    tree = parsed(source)
    found = (*imports(tree), *at_first_use(tree))
    return [one for one in found if one.module in MODULES]


def at_first_use(tree: ast.Module) -> Iterator[Import]:
    """The modules that a file uses as `package.module`, which the package imports when that runs
    (tinylm/common/lazy.py).
    """
    packages = {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            packages |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                packages[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            package = packages.get(node.value.id)
            yield Import(f"{package}.{node.attr}", node.lineno, False, False)


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What is called, as written (`print`, `torch.load`), and where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or []."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


# --- the shape of the house ---


@pytest.mark.slow
def test_no_circle_of_imports():
    """Imports in functions and under TYPE_CHECKING count too, and so do the programs."""
    graph = {
        name: {found.module for found in first_party(path.read_text("utf-8"))} - {name}
        for name, path in MODULES.items()
    }
    assert circle(graph) == []


def test_an_import_at_the_first_use_is_an_import():
    source = (
        "from tinylm import checkpoint as checkpoints\ndef f():\n    checkpoints.check.checked()"
    )
    found = {found.module for found in first_party(source)}
    assert found == {"tinylm.checkpoint", "tinylm.checkpoint.check"}


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


@pytest.mark.slow
def test_a_folder_imports_only_from_itself_and_from_folders_above_it():
    wrong = {
        (name, found.module)
        for name, path in MODULES.items()
        for found in first_party(path.read_text("utf-8"))
        if name not in PROGRAMS
        if found.module != "tinylm" and name != "tinylm"
        if ROOMS.index(room_of(found.module)) > ROOMS.index(room_of(name))
    }
    assert wrong == set()


def test_every_file_is_in_a_room():
    assert {name for name in MODULES if name != "tinylm" and room_of(name) not in ROOMS} == set()


def test_a_program_imports_no_program():
    wrong = {
        (name, found.module)
        for name in PROGRAMS
        for found in first_party(MODULES[name].read_text("utf-8"))
        if found.module in PROGRAMS
    }
    assert wrong == set()


@pytest.mark.slow
def test_no_first_party_import_in_a_function_outside_the_programs_and_cli():
    """A file shows its dependencies at its top; programs import late for a fast --help."""
    late = {
        f"{name}: {found.module}"
        for name, path in MODULES.items()
        if room_of(name) not in ("programs", "tinylm.cli")
        for found in first_party(path.read_text("utf-8"))
        if found.in_function
    }
    assert late == set()


def test_no_file_is_too_long_to_read():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in SOURCES
    }
    long = {name for name, length in lengths.items() if length > LONGEST_FILE}
    assert long - LONG_FILES == set()


# --- the border: the library knows no Lightning, parses and prints nothing outside cli/ ---

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The import names of what every use of the library may load; `pip install .` brings more.
LIGHT = {"torch", "numpy", "tokenizers", "tiktoken", "pydantic", "yaml", "filelock", "regex"}
# What a room needs as a whole; nothing but one command of cli/ imports it, and that late.
ALSO_LIGHT_IN = {"tinylm.serve": {"fastapi", "starlette", "uvicorn", "h11", "prometheus_client"}}
MACHINE_PATH = re.compile(r"(?<![\w.~/])/(home|work|root|Users|tmp/v)/\w")
NOT_IN_THE_LIBRARY = {*PROGRAMS, "data", "model", "training"}


def faults_of_library_file(name: str, source: str) -> Iterator[str]:
    """What `source`, as module `name`, does that the border forbids."""
    in_cli = room_of(name) == "tinylm.cli"
    for module, line, at_import, _ in imports(parsed(source)):
        top = module.partition(".")[0]
        if top in ("lightning", "pytorch_lightning", "lightning_fabric"):
            yield f"{line}: imports {module}: the library knows no Lightning"
        elif top == "" or top in NOT_IN_THE_LIBRARY:
            yield f"{line}: imports {module}: the library imports by full name, and no program"
        elif top == "argparse" and not in_cli:
            yield f"{line}: imports argparse: only cli/ parses arguments"
        elif (
            at_import
            and top != "tinylm"
            and top not in sys.stdlib_module_names
            and top not in LIGHT
            and top not in ALSO_LIGHT_IN.get(room_of(name), ())
        ):
            yield (
                f"{line}: imports {module}, which only some commands need; "
                "import it in the function that needs it"
            )
    if not in_cli:
        yield from (f"{line}: prints" for call, line in calls(parsed(source)) if call == "print")


def faults_of_any_file(name: str, source: str) -> Iterator[str]:
    """What no file may do but the one named for it."""
    tree = parsed(source)
    # yaml_text.py only writes.
    if name not in ("tinylm.config.yaml_file", "tinylm.config.yaml_text"):
        for found in imports(tree):
            if found.module.partition(".")[0] == "yaml":
                yield f"{found.line}: imports {found.module}: config/yaml_file.py is the only reader"
    if name == "tinylm.config.yaml_text":
        for call, line in calls(tree):
            if call.startswith("yaml.") and call != "yaml.dump":
                yield f"{line}: calls {call}: config/yaml_file.py is the only reader"
    if name != "tinylm.checkpoint.format":
        for call, line in calls(tree):
            if call == "torch.load":
                yield f"{line}: calls torch.load: checkpoint/format.py is the only reader"
        for found in imports(tree):
            if found.module == "torch.serialization":
                yield f"{found.line}: imports from torch.serialization"


@pytest.mark.slow
def test_the_library_keeps_the_border():
    found = {
        path: list(faults_of_library_file(module_name(path), path.read_text("utf-8")))
        for path in LIBRARY
    }
    assert {path: faults for path, faults in found.items() if faults} == {}


@pytest.mark.slow
def test_one_reader_of_yaml_and_one_of_checkpoints():
    found = {
        path: list(faults_of_any_file(module_name(path), path.read_text("utf-8")))
        for path in [*SOURCES, *ROOT.glob("benchmarks/**/*.py")]
    }
    assert {path: faults for path, faults in found.items() if faults} == {}


@pytest.mark.parametrize(
    "program", ["infer.py", "list.py", "evaluate_checkpoints.py", "eval_val.py"]
)
def test_sampling_and_listing_do_without_lightning(program):
    """Nor may they import what uses it: they must start fast."""
    found = imports(ast.parse((ROOT / program).read_text(encoding="utf-8")))
    modules = {one.module.partition(".")[0] for one in found}
    assert modules & {"lightning", "model", "data", "training"} == set()


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        (
            "tinylm.model.decoder",
            "import lightning as L",
            "1: imports lightning: the library knows no Lightning",
        ),
        (
            "tinylm.model.decoder",
            "def f():\n    from lightning.pytorch import Trainer",
            "2: imports lightning.pytorch: the library knows no Lightning",
        ),
        (
            "tinylm.model.decoder",
            "import train",
            "1: imports train: the library imports by full name, and no program",
        ),
        (
            "tinylm.model.decoder",
            "from data import Rows",
            "1: imports data: the library imports by full name, and no program",
        ),
        (
            "tinylm.model.decoder",
            "from .config import Config",
            "1: imports .config: the library imports by full name, and no program",
        ),
        (
            "tinylm.model.decoder",
            "from . import config",
            "1: imports .: the library imports by full name, and no program",
        ),
        (
            "tinylm.generate.engine",
            "import argparse",
            "1: imports argparse: only cli/ parses arguments",
        ),
        (
            "tinylm.model.hf_model",
            "import transformers",
            "1: imports transformers, which only some commands need; "
            "import it in the function that needs it",
        ),
        ("tinylm.generate.engine", "def f():\n    if True:\n        print(1)", "3: prints"),
    ],
)
def test_a_file_across_the_border_is_found(name, source, fault):
    assert list(faults_of_library_file(name, source)) == [fault]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tinylm.model.hf_model", "def f():\n    import transformers"),
        (
            "tinylm.model.hf_model",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
        ),
        (
            "tinylm.generate.engine",
            "import torch, math\nfrom tinylm.model.decoder import Decoder",
        ),
        ("tinylm.cli.doctor", "import argparse\nprint(1)"),
        ("tinylm.generate.engine", "def f(report):\n    report.print(1)"),
    ],
)
def test_a_file_within_the_border_passes(name, source):
    assert list(faults_of_library_file(name, source)) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("import yaml", "1: imports yaml: config/yaml_file.py is the only reader"),
        (
            "def f():\n    from yaml.nodes import Node",
            "2: imports yaml.nodes: config/yaml_file.py is the only reader",
        ),
        (
            "torch.load('x', weights_only=True)",
            "1: calls torch.load: checkpoint/format.py is the only reader",
        ),
        ("from torch.serialization import load", "1: imports from torch.serialization"),
    ],
)
def test_a_second_reader_is_found(source, fault):
    allowed = "tinylm.checkpoint.format" if "torch" in source else "tinylm.config.yaml_file"
    assert list(faults_of_any_file("tinylm.generate.engine", source)) == [fault]
    assert list(faults_of_any_file(allowed, source)) == []


# --- importing has no effect ---


def loaded_by(modules: str, wanted: set[str], folder: Path) -> set[str]:
    """Which of the wanted modules a fresh Python has after importing `modules`, silently and leaving no file."""
    code = (
        f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(ROOT)!r}); "
        f"import {modules}; print(*({wanted!r} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert (done.returncode, done.stdout.count("\n"), list(folder.iterdir())) == (0, 1, [])
    return set(done.stdout.split())


@pytest.mark.slow
def test_settings_load_without_torch(tmp_path):
    modules = "tinylm.config.schema, tinylm.config.loader"
    assert loaded_by(modules, {"torch", "numpy", "yaml"}, tmp_path) == {"yaml"}


@pytest.mark.slow
def test_counting_workers_load_neither_torch_nor_pydantic(tmp_path):
    """A spawned worker imports the module of its function; torch alone would cost it a second."""
    modules = "tinylm.tokenizer.pretokenize, tinylm.text.chunks, tinylm.text.documents"
    assert loaded_by(modules, {"torch", "pydantic", "lightning"}, tmp_path) == set()


@pytest.mark.slow
def test_importing_the_whole_library_is_silent_and_brings_nothing_that_only_some_need(tmp_path):
    names = sorted(name for name in map(module_name, LIBRARY) if not name.endswith("__main__"))
    heavy = {"lightning", "transformers", "datasets", "peft", "rich", "pandas", "matplotlib"}
    assert loaded_by(", ".join(names), heavy, tmp_path) == set()
    others = [name for name in names if room_of(name) not in ALSO_LIGHT_IN]
    server = set().union(*ALSO_LIGHT_IN.values())
    assert loaded_by(", ".join(others), server, tmp_path) == set()


def test_a_module_that_speaks_or_fails_when_imported_is_found(tmp_path):
    """`this` prints a poem; no module is called nonsense."""
    for name in ("this", "nonsense"):
        with pytest.raises(AssertionError):
            loaded_by(name, set(), tmp_path)


def test_every_pinned_version_is_one_that_the_package_allows():
    """Else `pip install -r requirements.txt && pip install .` would undo a pin."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    allowed = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, PROJECT["dependencies"])
    }
    assert allowed.keys() == pins.keys()  # what the README's commands need, in both files
    assert {name for name, pin in pins.items() if pin not in allowed[name]} == set()


# --- no file knows the machine it was written on --------------------------------------------------


def texts() -> list[Path]:
    folders = ["tinylm", "tests", "docs", "configs", "cases", "benchmarks", ".ci"]
    files = [
        *ROOT.glob("*"),
        *(
            path
            for folder in folders
            for path in (ROOT / folder).rglob("*")
            if "__pycache__" not in path.parts
        ),
    ]
    files = [path for path in files if path.name != ".git"]  # a file in a second working tree
    return [
        path
        for path in files
        if path.is_file()
        and path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".json", ".sh", "")
    ]


@pytest.mark.slow
def test_no_file_names_a_path_of_one_machine():
    found = [
        f"{path.relative_to(ROOT)}: {hit.group()}"
        for path in texts()
        for hit in [MACHINE_PATH.search(path.read_text(encoding="utf-8"))]
        if hit
    ]
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


# How files are read, besides `open_regular` and `read_regular`: after `require_regular`, or files of
# the system. Everything else could wait forever for the writer of a pipe.
READERS = {
    "tinylm/checkpoint/format.py": {"torch.load"},  # after `verify`
    "tinylm/cli/program.py": {"open"},  # /proc
    "tinylm/common/console.py": {"os.open"},  # the null device
    "tinylm/common/files.py": {"open", "os.open"},
    "tinylm/common/platform.py": {"os.open"},  # to sync what this program wrote
    "tinylm/planning/memory.py": {"open", "read_text"},
    "tinylm/rows/sandbox.py": {"open"},
    "tinylm/serve/pages.py": {"read_bytes"},  # its own files
    "tinylm/text/clean.py": {"np.memmap"},  # its own temporary file
    "tinylm/tokens/id_arrays.py": {"np.memmap"},
    "tinylm/tokens/token_file.py": {"np.memmap"},
    "training/stages/cached_array.py": {"np.memmap"},
}
OPENING = {"open", "os.open", "io.open", "gzip.open", "np.memmap", "np.load", "torch.load"}


def reads_of(source: str) -> Iterator[str]:
    """The calls that open a file by its path to read it."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        mode = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        writes = bool(mode) and str(mode[0])[:1] in ("w", "a", "x")
        if name in OPENING and not writes and "r+b" not in mode:
            yield name
        elif name.endswith((".read_text", ".read_bytes")):
            yield name.rpartition(".")[2]


@pytest.mark.slow
def test_every_file_is_opened_by_one_helper() -> None:
    found = {}
    for path in SOURCES:
        calls_here = set(reads_of(path.read_text("utf-8")))
        if calls_here:
            found[path.relative_to(ROOT).as_posix()] = calls_here
    assert found == READERS


def test_an_opened_file_is_found() -> None:
    source = 'open(p); open(p, "rb"); p.read_text(); open(p, "w"); np.load(p); q.open(p)'
    assert list(reads_of(source)) == ["open", "open", "read_text", "np.load"]
