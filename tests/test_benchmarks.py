"""Benchmarks run, on models of equal size and encoders with equal ids; nothing is timed."""

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
    """benchmarks/train.py, loaded by path because train.py has the same module name."""
    spec = importlib.util.spec_from_file_location(
        "benchmark_of_training", ROOT / "benchmarks" / "train.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    del sys.modules[spec.name]


def test_models_of_different_sizes_are_not_compared(benchmark):
    benchmark.check_parameters({"tinylm": 24736, "litgpt": 24736})
    with pytest.raises(UserError) as caught:
        benchmark.check_parameters({"tinylm": 24736, "litgpt": 32928})
    assert str(caught.value) == (
        "models: differ in size: tinylm has 24,736 parameters, litgpt has 32,928 parameters. "
        "Use the same shape for all."
    )


def test_a_package_that_is_not_installed_is_skipped_with_the_command_to_install_it(
    benchmark, capsys
):
    assert benchmark.installed(["json", "no_such_package"]) == ["json"]
    install = "pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13"
    assert capsys.readouterr().err == f"no_such_package: skipped, not installed. {install}\n"


def test_the_command_that_installs_litgpt_is_in_the_requirements_too(benchmark):
    """Its version is pinned twice, because a requirements file has no --no-deps for one package."""
    command = benchmark.INSTALL.partition(" && ")[2]
    assert command == "pip install --no-deps litgpt==0.5.13"
    for path in ("requirements-bench.txt", "benchmarks/train.py"):
        assert command in (ROOT / path).read_text(encoding="utf-8")


def test_freed_memory_counts_in_the_peak_but_not_in_the_current_memory(benchmark):
    """120 MB are written and freed."""
    before = benchmark.memory_mb("VmRSS")
    # Not from the allocator, which may keep freed memory.
    with mmap.mmap(-1, 120_000_000) as buffer:
        for _ in range(120):
            buffer.write(b"x" * 1_000_000)
    assert benchmark.memory_mb("VmHWM") > before + 100
    assert benchmark.memory_mb("VmRSS") < before + 100


@pytest.mark.slow
@pytest.mark.long
def test_every_installed_implementation_is_timed(tmp_path):
    """24,736: tied embedding 128·32, 2 layers of 4·32·32 + 3·32·64 + 2·32, final norm 32."""
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
    installed = ["tinylm", "transformers"] + ["litgpt"] * all(
        importlib.util.find_spec(name) for name in ("litgpt", "psutil")
    )
    assert [(r["mode"], r["name"], r["parameters"]) for r in results] == [
        (mode, name, 24736) for mode in ("fp32", "bf16") for name in installed
    ]
    assert all(
        r["tokens_per_s"] > 0 and r["peak_mb"] > 0 and r["mfu"] > 0 and r["cpu_seconds"] > 0
        for r in results
    )
    assert all(r["ratio"] == r["cpu_ratio"] == 1 for r in results if r["name"] == "tinylm")
    assert "24,736 parameters each" in done.stdout
    assert "\x1b" not in done.stdout
    assert ("litgpt: skipped, not installed." in done.stderr) == ("litgpt" not in installed)


@pytest.mark.slow
def test_decoding_is_timed_and_a_missing_package_is_named(tmp_path):
    """One row of the table for each installed package; ours also has its split."""
    command = [
        sys.executable,
        "benchmarks/decode.py",
        "--quick",
        "--names",
        "tinylm fp32",
        "ctranslate2 fp32",
        "--json",
        str(tmp_path / "speed.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    # tied embedding, 2 layers of 4·32·32 + 3·32·64 + 2·32, final norm
    assert numbers["parameters"] == 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    is_here = bool(importlib.util.find_spec("ctranslate2"))
    names = ["tinylm fp32", *["ctranslate2 fp32"] * is_here]
    assert [(row["batch"], row["prompts"], row["name"]) for row in numbers["results"]] == [
        (batch, prompts, name)
        for batch, prompts in ((1, "one"), (2, "same"), (2, "different"))
        for name in names
    ]
    assert all(row["first_ms"] > 0 and row["peak_mb"] > 0 for row in numbers["results"])
    split = numbers["splits"]["tinylm fp32"]
    assert min(split["linear layers"], split["attention"], split["sampling"]) > 0
    assert ("ctranslate2 fp32: not installed: pip install ctranslate2==" in done.stdout) != is_here


def test_word_problems_have_right_answers_and_different_test_problems(tmp_path):
    """Every line of an answer is a sum of the question's numbers, recomputed here."""
    spec = importlib.util.spec_from_file_location(
        "word_problems", ROOT / "benchmarks" / "word_problems.py"
    )
    word_problems = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(word_problems)
    assert (
        word_problems.main(
            ["--out", str(tmp_path), "--train", "60", "--test", "20", "--largest", "9"]
        )
        == 0
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
    not importlib.util.find_spec("psutil"), reason="needs psutil (requirements-bench.txt)"
)


def tokenizer_benchmark(*options: str) -> list[list[str]]:
    """Run benchmarks/tokenizer.py; returns the cells of its table."""
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
def test_all_encoders_give_the_same_ids():
    """The benchmark fails if an encoder differs from the first one."""
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
def test_our_bpe_compresses_as_well_as_tokenizers():
    """Bytes per token differ by at most 0.2%."""
    rows = tokenizer_benchmark("--megabytes", "1", "--vocab-size", "500")
    ours, theirs = (float(row[5]) for row in rows[:2])
    assert [row[2] for row in rows[:2]] == ["tinylm", "tokenizers"]
    assert ours == pytest.approx(theirs, rel=0.002)


@pytest.mark.slow
@needs_psutil
def test_a_server_is_timed_under_load_and_a_missing_package_is_named(tmp_path):
    """One row for each number of clients; of 4 requests, 3 clients have 2 each."""
    command = [
        sys.executable,
        "benchmarks/serve.py",
        "--quick",
        "--names",
        "tinylm serve",
        "llama.cpp server",
        "--json",
        str(tmp_path / "load.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numbers = json.loads((tmp_path / "load.json").read_text(encoding="utf-8"))
    is_here = bool(importlib.util.find_spec("xllamacpp"))
    names = ["tinylm serve", *["llama.cpp server"] * is_here]
    assert [(row["clients"], row["name"]) for row in numbers["results"]] == [
        (clients, name) for clients in (1, 3) for name in names
    ]
    for row in numbers["results"]:
        assert row["tokens_per_s"] == pytest.approx(4 * row["requests_per_s"])
        assert 0 < row["first_median_ms"] <= row["first_p95_ms"]
        assert row["cpu_ms"] > 0
        if row["name"] == "tinylm serve":
            assert row["speed"] == row["first_ratio"] == row["cpu_speed"] == 1
    assert ("llama.cpp server: not installed: pip install xllamacpp==" in done.stdout) != is_here
