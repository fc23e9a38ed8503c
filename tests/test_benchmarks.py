"""Benchmarks are not timed here; this is that they run, and that they compare like with like."""

import importlib.util
import json
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tinylm.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/train.py, which is not on the path, and whose name train.py has."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_of_training", ROOT / "benchmarks" / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    del sys.modules[spec.name]


def test_models_of_different_sizes_are_not_compared(benchmark):
    benchmark.check_parameters({"tinylm": 24736, "litgpt": 24736})
    with pytest.raises(UserError) as caught:
        benchmark.check_parameters({"tinylm": 24736, "litgpt": 32928})
    expected = "models: differ in size: tinylm has 24,736 parameters, litgpt has 32,928 parameters. Compare the shapes they are given."
    assert str(caught.value) == expected


def test_a_contestant_that_is_not_installed_is_left_out_by_name(benchmark, capsys):
    assert benchmark.installed(["json", "no_such_package"]) == ["json"]
    line = "no_such_package: not installed, so it is left out. pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13\n"
    assert capsys.readouterr().err == line


def test_the_line_that_installs_litgpt_is_in_the_requirements_too(benchmark):
    """Its version is pinned in one more place than others, because a requirements file cannot say --no-deps."""
    command = benchmark.INSTALL.partition(" && ")[2]
    assert command == "pip install --no-deps litgpt==0.5.13"
    for path in ("requirements-bench.txt", "benchmarks/train.py"):
        assert command in (ROOT / path).read_text(encoding="utf-8")


def test_memory_that_was_let_go_still_counts_in_the_peak(benchmark):
    """120 MB that are written to and let go: the peak has them, what is held now has not."""
    before = benchmark.memory_mb("VmRSS")
    with mmap.mmap(
        -1, 120_000_000
    ) as held:  # not from the allocator, which a run before may have told to keep what is let go
        for _ in range(120):
            held.write(b"x" * 1_000_000)
    assert benchmark.memory_mb("VmHWM") > before + 100
    assert benchmark.memory_mb("VmRSS") < before + 100


@pytest.mark.slow
def test_every_installed_contestant_takes_its_steps(tmp_path):
    """24,736 = embedding 128·32, tied; 2 layers of 4·32·32 + 3·32·64 + 2·32; a last norm of 32."""
    assert 128 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 == 24736
    command = [
        sys.executable,
        "benchmarks/train.py",
        "--quick",
        "--modes",
        "fp32",
        "bf16",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "speed.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))["results"]
    here = ["tinylm", "transformers"] + ["litgpt"] * all(
        importlib.util.find_spec(name) for name in ("litgpt", "psutil")
    )
    assert [(r["mode"], r["name"], r["parameters"]) for r in results] == [
        (mode, name, 24736) for mode in ("fp32", "bf16") for name in here
    ]
    assert all(
        r["tokens_per_s"] > 0 and r["peak_mb"] > 0 and r["mfu"] > 0 and r["cpu_seconds"] > 0
        for r in results
    )
    assert all(r["ratio"] == r["cpu_ratio"] == 1 for r in results if r["name"] == "tinylm")
    assert "24,736 parameters each" in done.stdout
    assert "\x1b" not in done.stdout
    assert ("litgpt: not installed, so it is left out." in done.stderr) == ("litgpt" not in here)


def test_word_problems_come_out_right_and_those_for_the_test_are_others(tmp_path):
    """Every line says a sum of the question's numbers, which Python works out again."""
    spec = importlib.util.spec_from_file_location(
        "word_problems", ROOT / "benchmarks" / "word_problems.py"
    )
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (
        made.main(["--out", str(tmp_path), "--train", "60", "--test", "20", "--largest", "9"]) == 0
    )
    files = {
        name: [
            json.loads(line)
            for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in ("text", "rows", "test")
    }
    problems = [(row["question"], row["answer"]) for row in files["rows"] + files["test"]]
    assert (len(files["rows"]), len(files["test"]), len(set(problems))) == (60, 20, 80)
    for question, answer in problems:
        first, gain, loss = map(int, re.findall(r"\d+", question))
        assert [int(number) for number in re.findall(r"\d+", answer)] == [
            first,
            gain,
            first + gain,
            first + gain,
            loss,
            *[first + gain - loss] * 2,
        ]
        assert 0 < loss < first + gain and max(first, gain) <= 9
    assert files["text"] == [
        {"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in files["rows"]
    ]


needs_psutil = pytest.mark.skipif(
    not importlib.util.find_spec("psutil"), reason="psutil is of requirements-bench.txt"
)


def tokenizer_benchmark(*options: str) -> list[list[str]]:
    """The cells of the table's rows."""
    command = [
        sys.executable,
        "benchmarks/tokenizer.py",
        "--data",
        "data/tiny_corpus.txt",
        "--rounds",
        "1",
        *options,
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]


@pytest.mark.slow
@needs_psutil
def test_every_way_of_encoding_gives_the_same_ids():
    """Else the program ends with the name of the one that differs; the first contestant is what the others are compared with."""
    rows = tokenizer_benchmark("--encode", "--megabytes", "1")
    assert [row[1].partition(",")[0] for row in rows] == [
        "tiktoken",
        "tinylm",
        "tinylm",
        "tokenizers",
        "transformers",
    ]
    assert rows[0][3] == "1.00" and all(float(row[2]) > 0 for row in rows)


@pytest.mark.slow
@needs_psutil
def test_every_trainer_learns_the_vocabulary():
    """And ours within a fifth of a percent of the bytes per token of `tokenizers`."""
    rows = tokenizer_benchmark("--megabytes", "1", "--vocab-size", "500")
    ours, theirs = (float(row[5]) for row in rows[:2])
    assert [row[2] for row in rows[:2]] == ["tinylm", "tokenizers"]
    assert ours == pytest.approx(theirs, rel=0.002)
