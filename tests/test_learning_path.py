"""docs/LEARNING_PATH.md held to the code that it walks through: its references, its counts, its order.

These forms can be checked by a machine, and the page uses no others:

    `tinylm/model/decoder.py: Attention.forward`      a definition, and the file that it is in
    the five steps of `REFERENCE`                     what the source of REFERENCE numbers 1., 2., ...
    step 3 of `REFERENCE`                             one of these numbers
    the four functions of `REFERENCE`                 functions of the same file that REFERENCE calls

A reference to a whole file, `tinylm/rows/templates.py`, counts what its first docstring numbers.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tinylm.config.loader import load_config

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "LEARNING_PATH.md"
WORDS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty",
)
# Nouns whose number is checked.
COUNTED_NOUNS = "steps|guarantees|functions"
REFERENCE = re.compile(r"`([\w./-]+\.py): ([^`]+)`")
COUNT = re.compile(rf"\b[Tt]he ({'|'.join(WORDS)}) ({COUNTED_NOUNS}) of `([^`]+)`")
STEP = re.compile(r"\bstep (\d+) of `([^`]+\.py[^`]*)`")
# A number word before such a noun, or before code that could have been counted.
ANY_COUNT = re.compile(
    rf"\b(?:{'|'.join(WORDS)}) (?:\w+ )?(?:{COUNTED_NOUNS}|methods|classes|files)\b", re.IGNORECASE
)
NUMBERED = re.compile(r"^\s*(?:# )?(\d+)\. ", re.MULTILINE)
WALK_TITLE = "### From a file to the loss"


def prose(text: str) -> str:
    """The text without fenced blocks, with single spaces, so that a sentence may go over a line's end."""
    return " ".join(re.sub(r"(?ms)^```.*?^```", "", text).split())


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def definition(name: str, tree: ast.Module) -> ast.AST | None:
    """The function, class or constant of this dotted name at the top level of `tree`; None if it is not there."""
    found: ast.AST | None = tree
    for part in name.split("."):
        found = next((node for node in getattr(found, "body", []) if part in names_of(node)), None)
    return found


def names_of(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def wrong_references(text: str) -> Iterator[str]:
    """The references of the page whose file is missing, or has no such definition."""
    for file, name in REFERENCE.findall(prose(text)):
        path = ROOT / file
        if not path.is_file():
            yield f"{file}: no such file"
        elif definition(name, ast.parse(path.read_text(encoding="utf-8"))) is None:
            yield f"{file}: {name}: not defined there"


def count(noun: str, reference: str) -> int:
    """How many steps, guarantees or functions the code has that `reference` names."""
    file, _, name = reference.partition(": ")
    source = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(source)
    if not name:
        return count_numbered(ast.get_docstring(tree) or "", reference)
    node = definition(name, tree)
    assert node is not None, f"{reference}: not defined there"
    if noun == "functions":
        own = {name for other in tree.body if other is not node for name in names_of(other)}
        called = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
        return len(own & {func.id for func in called if isinstance(func, ast.Name)})
    return count_numbered(ast.get_source_segment(source, node) or "", reference)


def count_numbered(source: str, reference: str) -> int:
    """How many lines begin with a number and a point; they must be numbered 1, 2, ... in order."""
    numbers = [int(number) for number in NUMBERED.findall(source)]
    assert numbers == list(range(1, len(numbers) + 1)), f"{reference}: numbered {numbers}"
    return len(numbers)


def wrong_counts(text: str) -> Iterator[str]:
    """The counts of the page that differ from the code or cannot be checked."""
    text = prose(text)
    for word, noun, reference in COUNT.findall(text):
        found = count(noun, reference)
        if WORDS.index(word) != found:
            yield f"{reference}: {word} {noun}, found {found}"
    for number, reference in STEP.findall(text):
        if int(number) > count("steps", reference):
            yield f"{reference}: no step {number}"
    checked = [match.span() for match in COUNT.finditer(text)]
    for match in ANY_COUNT.finditer(text):
        if not any(start <= match.start() < end for start, end in checked):
            yield f"not checked: {match[0]}"


def exercises(text: str) -> list[int]:
    """The numbers of the exercises, in the order of the page."""
    return [int(number) for number in re.findall(r"^\*\*Exercise (\d+)\.", text, re.MULTILINE)]


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_definition_that_the_page_names_is_in_the_file_that_it_names():
    assert list(wrong_references(page())) == []
    assert len(REFERENCE.findall(prose(page()))) >= 60  # or the page is written in another form


def test_every_count_of_the_page_is_that_of_the_code():
    assert list(wrong_counts(page())) == []
    assert len(COUNT.findall(prose(page()))) >= 5


def test_the_page_has_the_number_of_exercises_that_it_says():
    match = re.search(rf"({'|'.join(WORDS)}) experiments", prose(page()))
    assert match is not None
    assert exercises(page()) == list(range(1, WORDS.index(match[1]) + 1))


def test_the_table_at_the_top_lists_the_parts_in_order_and_names_files_that_exist():
    text = page()
    rows = re.findall(r"^\| \[(\d+)\]\(#\d+-[\w-]+\) \| ([^|]*) \|", text, re.MULTILINE)
    titles = re.findall(r"^## (\d+)\. ", text, re.MULTILINE)
    assert [number for number, _ in rows] == titles
    for number, cell in rows:
        paths = re.findall(r"`([^`:]+)`", cell)
        assert paths, f"part {number}: names no file"
        assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_row_of_each_run_repeats_the_loss_of_its_exercise():
    """The last table has the number of each run a second time; both are the same measurement."""
    text = page()
    prose_text, _, table = text.partition("## All runs on one page")
    rows = re.findall(r"^\| (\d+) \| .* \| (\d\.\d{3}) \| (\d\.\d{3}) \|$", table, re.MULTILINE)
    assert len(rows) >= 20
    for number, val_loss, val_bpb in rows:
        # Exercise 4 says 5.10; for another tokenizer only val_bpb is given.
        shown = (val_loss, val_loss[:-1], val_bpb)
        assert any(re.search(rf"\b{re.escape(value)}", prose_text) for value in shown), (
            number,
            val_loss,
        )


# --- the walk from a file to the loss ---------------------------------------------------------------


def walk_of(text: str) -> list[tuple[str, str]]:
    """The definitions (file, name) of the numbered list that tells the way from a file to the loss."""
    section = text.partition(WALK_TITLE)[2].partition("\n### ")[0]
    items = re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]
    return [
        (found[1], found[2])
        for item in items
        if (found := REFERENCE.search(" ".join(item.split())))
    ]


@pytest.mark.slow
def test_a_run_calls_the_functions_of_the_walk_in_the_order_of_the_page(tmp_path, monkeypatch):
    """One step of the page's own model, with the first call of each function noted."""
    import train

    walk = walk_of(page())
    assert len(walk) >= 8
    wanted = {(str(ROOT / file), name) for file, name in walk}
    calls: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        call = (frame.f_code.co_filename, frame.f_code.co_qualname)
        if event == "call" and call in wanted and call not in calls:
            calls.append(call)

    monkeypatch.chdir(ROOT)
    folders = [
        f"{name}={tmp_path}"
        for name in ("training.checkpoint_dir", "training.log_dir", "data.cache_dir")
    ]
    sys.setprofile(note)
    try:
        code = train.main(["--config", "configs/learn.yaml", *folders, "training.max_steps=1"])
    finally:
        sys.setprofile(None)
    assert code == 0
    assert [(Path(file).relative_to(ROOT).as_posix(), name) for file, name in calls] == walk


# --- the other two questions -------------------------------------------------------------------------


def section_of(title: str) -> str:
    """The text of the page below the heading that begins with `title`, to the next heading."""
    _, found, rest = page().partition(f"### {title}")
    assert found, title
    return re.split(r"^##", rest, flags=re.MULTILINE)[0]


def test_the_page_names_every_file_that_has_a_sampling_option():
    named = {file for file, _ in REFERENCE.findall(prose(section_of("How do I add")))}
    having = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tinylm").rglob("*.py")
        if re.search(r"\bmin_p\b", path.read_text(encoding="utf-8"))
    }
    assert named == having | {"tinylm/config/rules.py"}  # which has the rule of another option


@pytest.mark.slow
def test_the_page_names_every_function_that_skips_a_row():
    skipping = set()
    for path in (ROOT / "tinylm").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            if any(
                isinstance(node, ast.Attribute) and node.attr == "skip"
                for node in ast.walk(function)
            ):
                skipping.add((path.relative_to(ROOT).as_posix(), function.name))
    named = set(REFERENCE.findall(prose(section_of("Why was my row"))))
    assert named == skipping | {("tinylm/rows/skipped_rows.py", "SkipReason")}


# --- the checks themselves ----------------------------------------------------------------------------


def test_a_reference_that_is_wrong_is_found():
    text = (
        "`model.py: Progress.finish_metrics_row` `model.py: Progress.end_row` `model.py: TrainModule`\n"
        "`modle.py: Progress` `tinylm/cli/sampling_flags.py: sampling_help`\n"
        "```python\n`model.py: not_prose`\n```\n"
    )
    assert list(wrong_references(text)) == [
        "model.py: Progress.end_row: not defined there",
        "model.py: TrainModule: not defined there",
        "modle.py: no such file",
    ]


def test_a_count_that_is_wrong_or_cannot_be_checked_is_found():
    text = (
        "The nine steps\nof `model.py: TrainingModule.optimizer_step`, the four functions of "
        "`tinylm/generate/sampling.py: apply_filters`. Six small functions, and 200 steps. Step 3 is step 9 of "
        "`model.py: TrainingModule.optimizer_step`."
    )
    assert list(wrong_counts(text)) == [
        "model.py: TrainingModule.optimizer_step: nine steps, found 8",
        "model.py: TrainingModule.optimizer_step: no step 9",
        "not checked: Six small functions",
    ]


def test_steps_that_are_numbered_twice_are_an_error():
    with pytest.raises(AssertionError, match=r"a: numbered \[1, 1\]"):
        count_numbered("# 1. one\n# 1. two\n", "a")


def test_the_config_of_the_page_has_the_steps_and_the_model_that_the_page_names(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config("configs/learn.yaml")
    assert f"trains {config.training.max_steps} steps" in prose(page())
    comment = (ROOT / "configs" / "learn.yaml").read_text(encoding="utf-8")
    n_parameters = re.search(r"([\d,]+) parameters", comment)
    assert n_parameters is not None
    assert f"{n_parameters[1]} parameters" in prose(page())
