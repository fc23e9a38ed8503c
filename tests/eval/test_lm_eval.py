"""The lm-evaluation-harness on our models: its three kinds of request are answered by our engine."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.generate.test_engine import make_model, score_continuation
from tinylm.common.errors import UserError
from tinylm.common.statistics import wilson
from tinylm.config.schema import SamplingConfig
from tinylm.eval.lm_eval import (
    HarnessScore,
    check_tasks,
    harness_model,
    run_harness,
    to_sampling_config,
)
from tinylm.generate.engine import Engine
from tinylm.tokenizer.byte_char import ByteTokenizer

BYTES = ByteTokenizer()


class Request:
    """A request of the harness: a tuple of arguments."""

    def __init__(self, *args):
        self.args = args


@pytest.fixture
def engine() -> Engine:
    pytest.importorskip("lm_eval")
    return Engine(make_model(), BYTES)


@pytest.mark.slow
def test_log_likelihood_is_the_engines_score(engine):
    """A space at the end of the context belongs to the continuation, as for every model; an empty
    context is EOS."""
    model = harness_model(engine, batch_size=2)
    found = model.loglikelihood(
        [Request("ab", " cd"), Request("ab ", "cd"), Request("", "cd")], disable_tqdm=True
    )
    expected = [
        score_continuation(engine, "ab", " cd"),
        score_continuation(engine, "ab", " cd"),
        score_continuation(engine, "", "cd"),
    ]
    assert [log_prob for log_prob, _ in found] == pytest.approx(
        [score.log_prob for score in expected], abs=1e-4
    )
    assert [greedy for _, greedy in found] == [score.greedy_match for score in expected]


@pytest.mark.parametrize("n", [5, 48, 49, 120])
def test_rolling_log_likelihood_predicts_each_token_once_with_the_context_that_fits(engine, n):
    """Oracle, with 48 positions: tokens 1 to 48 after EOS and those before them, later ones in
    windows that end with the last token."""
    text = "".join(chr(97 + i * i % 26) for i in range(n))
    [found] = harness_model(engine).loglikelihood_rolling([Request(text)])
    ids, total = [BYTES.eos_id, *text.encode()], 0.0
    starts = [(0, 1, min(n, 48) + 1)]  # first token read, first and last + 1 token predicted
    while starts[-1][2] <= n:
        first = starts[-1][2]
        last = min(first + 48, n + 1)
        starts.append((last - 49, first, last))
    for start, first, last in starts:
        with torch.no_grad():
            log_probs = engine.model(torch.tensor([ids[start : last - 1]]))[0].log_softmax(-1)
        total += sum(
            log_probs[place - 1 - start, ids[place]].item() for place in range(first, last)
        )
    assert found == pytest.approx(total, abs=1e-2)


def test_generation_is_the_engines_greedy_text_up_to_a_stop_string(engine):
    [whole] = harness_model(engine).generate_until(
        [Request("ab", {"until": [], "max_gen_toks": 12})]
    )
    assert whole == engine.generate("ab", SamplingConfig(temperature=0, max_new_tokens=12))[0].text
    [cut] = harness_model(engine).generate_until(
        [Request("ab", {"until": whole[3:5], "max_gen_toks": 12, "do_sample": False})]
    )
    assert cut == whole[: whole.index(whole[3:5])]


def test_generation_kwargs_become_our_settings():
    assert to_sampling_config(
        {"until": ["a", "b"], "do_sample": False, "temperature": 0.7}
    ) == SamplingConfig(temperature=0, max_new_tokens=256, stop=("a", "b"))
    drawn = to_sampling_config(
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None, "max_gen_toks": 5}
    )
    assert drawn == SamplingConfig(temperature=0.7, top_p=0.9, max_new_tokens=5)
    with pytest.raises(
        UserError,
        match=r"^--lm-eval: generation_kwargs: penalty_alpha: not supported; known are "
        r"max_gen_toks, .*\. Remove it from the task\.$",
    ):
        to_sampling_config({"penalty_alpha": 0.6})


def test_intervals_and_ranks_of_the_harness_measures():
    """A share has Wilson's interval, another measure its standard error's; one where lower is
    better ranks by its negative."""
    right = HarnessScore("t", "acc (strict)", 0.0, 0.0, 10, True)
    assert right.interval == wilson(0.0, 10)
    f1, perplexity = (
        HarnessScore("t", "f1", 0.5, 0.1, 10, True),
        HarnessScore("t", "word_perplexity", 9.0, None, 10, False),
    )
    assert f1.interval == pytest.approx((0.304, 0.696), abs=1e-4)
    assert perplexity.interval == (None, None)
    assert (f1.rank_key, perplexity.rank_key) == (0.5, -9.0)


def test_a_missing_lm_eval_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(
        UserError,
        match=r'^--lm-eval: needs the package lm_eval\. Install it: pip install "lm_eval>=0\.4\.13,<0\.5"\.$',
    ):
        check_tasks(["x"], None)


# --- end to end ---


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with a multiple-choice, a generation and a perplexity task over three rows."""
    rows = [
        ("The opposite of up is", ["down", "left"], 0),
        ("A young dog is a", ["kitten", "puppy"], 1),
        ("Two plus two is", ["four", "nine"], 0),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"q": q, "choices": choices, "answer": answer}) + "\n"
            for q, choices, answer in rows
        ),
        encoding="utf-8",
    )
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: "
        f"{tmp_path / 'cache'}}}\ntest_split: test\n"
    )
    asked = 'doc_to_text: "{{q}}"\n'
    texts = {
        "own_choice": 'output_type: multiple_choice\ndoc_to_choice: "{{choices}}"\ndoc_to_target: '
                      '"{{answer}}"\n' + asked
        + "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        "own_words": 'output_type: generate_until\ndoc_to_target: " '
                     '{{choices[answer]}}"\ngeneration_kwargs: {until: ["\\n"], max_gen_toks: 4}\n' + asked
        + "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        "own_text": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{q}}"\n'
        + "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_the_harness_runs_local_tasks_without_network(engine, own_tasks):
    """Oracles: the engine's scores of each choice, and of each text in bits."""
    names = ["own_choice", "own_words", "own_text"]
    check_tasks(names, own_tasks)
    found = {score.task: score for score in run_harness(engine, names, include_path=own_tasks)}
    rows = [
        json.loads(line)
        for line in (own_tasks / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    right = 0
    for row in rows:
        log_probs = [
            score_continuation(engine, row["q"], f" {choice}").log_prob for choice in row["choices"]
        ]
        right += log_probs.index(max(log_probs)) == row["answer"]
    assert found["own_choice"] == HarnessScore(
        "own_choice", "acc", pytest.approx(right / 3), found["own_choice"].stderr, 3, True
    )
    assert found["own_words"].value == 0
    nats = sum(-score_continuation(engine, "", row["q"]).log_prob for row in rows)
    bits = nats / torch.tensor(2.0).log().item() / sum(len(row["q"]) for row in rows)
    assert (found["own_text"].value, found["own_text"].higher_is_better) == (
        pytest.approx(bits, rel=1e-4),
        False,
    )
    [limited] = run_harness(engine, ["own_choice"], include_path=own_tasks, limit=2)
    assert limited.n_examples == 2


def test_an_unknown_task_is_named_with_those_available(engine, own_tasks):
    with pytest.raises(UserError) as error:
        check_tasks(["own_choice", "nonsense"], own_tasks)
    known = "own_choice, own_text, own_words. Name one of these, or give the folder of your task with --include-path."
    assert str(error.value) == f"--lm-eval: nonsense: no such task; {own_tasks} has {known}"
