"""lm-evaluation-harness, asking the server, finds what it finds with our model in this process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tinylm.checkpoint.load import load_model
from tinylm.config.schema import SamplingConfig
from tinylm.eval.lm_eval import fit_harness_prompt, harness_model, run_harness
from tinylm.generate.engine import Engine, Request


@pytest.mark.slow
def test_log_likelihoods_over_http_equal_those_of_the_engine(run_server, model_files):
    """100 pairs of context and continuation, as a multiple-choice task asks for."""
    pytest.importorskip("tenacity")  # of lm_eval[api]
    instance_module = pytest.importorskip("lm_eval.api.instance")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    pairs = []
    for number in range(100):
        context = (
            f"Question {number}: what is {number} + {number * 7 % 13}?\nAnswer:" if number else ""
        )
        pairs.append((context, f" {number * 3 % 17} and é{'!' * (number % 4)}"))
    requests = [
        instance_module.Instance("loglikelihood", {}, pair, number)
        for number, pair in enumerate(pairs)
    ]
    loaded = load_model(model_files["base"])
    expected = harness_model(Engine(loaded.model, loaded.tokenizer)).loglikelihood(requests)
    with run_server("base") as server:
        model = completions.LocalCompletionsAPI(
            model="base", base_url=f"{server.url}/v1/completions", tokenizer_backend="remote",
            max_length=97, batch_size=4, max_retries=1, eos_string="<|eos|>",
        )  # fmt: skip
        found = model.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx(
        [value for value, _ in expected], abs=2e-3
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


SENTENCES = ROOT / "data" / "tiny_corpus.txt"
NEW_TOKENS = 8
METRIC = "metric_list:\n- {metric: %s, aggregation: %s, higher_is_better: %s}\n"


def write_tasks(folder: Path, engine: Engine) -> list[str]:
    """Three tasks on 100 sentences of the small corpus, as a user writes them: which of two second
    halves follows, bits per byte of the sentence, and a generated text.

    The right text of every second row is what the engine generates, so half of them match. No text
    is longer than the context (96), where the harness's limits for a server are one token shorter.
    """
    text = SENTENCES.read_text(encoding="utf-8")
    sentences = [s for s in re.findall(r"[A-Z][\w ,']+\.", text) if 40 <= len(s) <= 90][:100]
    halves = [(s[: len(s) // 2].rpartition(" ")[0], s) for s in sentences]
    halves = [(first, s[len(first) + 1 :]) for first, s in halves]
    rows = []
    greedy = SamplingConfig(temperature=0, max_new_tokens=NEW_TOKENS)
    asked = [Request(fit_harness_prompt(engine, first, NEW_TOKENS), greedy) for first, _ in halves]
    for number, generated in enumerate(engine.complete(asked)):
        first, second = halves[number]
        other = halves[(number + 7) % 100][1]
        place = number % 2
        choices = [other, second] if place else [second, other]
        expected = generated.text if number % 2 else f"{generated.text}!"
        row = {"first": first, "choices": choices, "place": place}
        rows.append(row | {"whole": sentences[number], "expected": expected})
    assert len(rows) == 100
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = f"dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {folder / 'cache'}}}"
    source = f"dataset_path: json\n{data}\ntest_split: test\n"
    question = 'doc_to_text: "{{first}}"\n'
    tasks = {
        "follows": f"output_type: multiple_choice\n{question}"
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{place}}"\n'
        + METRIC
        % ("acc", "mean", "true"),
        "whole": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{whole}}"\n'
        + METRIC % ("bits_per_byte", "bits_per_byte", "false"),
        "writes": f'output_type: generate_until\n{question}doc_to_target: "{{{{expected}}}}"\n'
        f'generation_kwargs: {{until: ["\\u0000"], max_gen_toks: {NEW_TOKENS}}}\n'
        'target_delimiter: ""\n' + METRIC % ("exact_match", "mean", "true"),
    }
    for name, settings in tasks.items():
        path = folder / f"{name}.yaml"
        path.write_text(f"task: {name}\n{source}{settings}", encoding="utf-8")
    return list(tasks)


@pytest.mark.slow
@pytest.mark.long
def test_the_lm_eval_command_finds_over_http_what_our_harness_finds(
    run_server, model_files, tmp_path
):
    """The command of docs/SERVING.md, on a task file of 100 rows of each kind of request."""
    pytest.importorskip("lm_eval", reason="needs lm_eval (requirements-dev.txt)")
    pytest.importorskip("tenacity", reason="needs lm_eval[api] (requirements-dev.txt)")
    loaded = load_model(model_files["base"])
    engine = Engine(loaded.model, loaded.tokenizer)
    names = write_tasks(tmp_path, engine)
    expected = {}
    for score in run_harness(engine, names, include_path=tmp_path):
        expected[score.task, score.measure] = score.value
    with run_server("base", slots=8) as server:
        arguments = [
            "model=base",
            f"base_url={server.url}/v1/completions",
            "tokenizer_backend=remote",
            "max_length=97",
        ]
        command = [
            *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
            *("--include_path", str(tmp_path), "--tasks", ",".join(names)),
            *("--batch_size", "16", "--model_args", ",".join(arguments)),
            *("--output_path", str(tmp_path / "out")),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text(encoding="utf-8"))
    found = {}
    for task, measure in expected:
        assert results["n-samples"][task]["effective"] == 100
        found[task, measure] = results["results"][task][f"{measure},none"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["writes", "exact_match"] == 0.5
