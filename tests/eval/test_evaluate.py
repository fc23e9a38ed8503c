"""Evaluation: batched scores equal single ones, failing cases count, prompts equal those of training."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.generate.test_engine import OPTIONS, make_model, score_continuation
from tinylm.common.errors import UserError
from tinylm.eval import task_scores
from tinylm.eval.cases import Case, CaseScore, CasesSummary, evaluate_cases, read_cases
from tinylm.eval.task_scores import evaluate_task, format_ranks
from tinylm.eval.tasks.table import PAIRS, TASKS
from tinylm.eval.tasks.task import TaskExample
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import Prompt, TokenOutput
from tinylm.generate.scoring import (
    ContinuationScore,
    encode_continuation,
    fit_continuation,
    score_continuations,
)
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer

BYTES = ByteTokenizer()


class Parrot(Engine):
    """An engine with fixed answers that records its prompts."""

    def __init__(self, answers: dict[str, bytes | list[int]], model=None):
        super().__init__(model or make_model(max_seq_len=400), BYTES)
        self.answers, self.asked = answers, []

    def run(self, requests: Iterable[Request]) -> Iterator[list[TokenOutput]]:
        return (list(self.answer(request)) for request in requests)

    def answer(self, request: Request) -> Iterator[TokenOutput]:
        prompt, sampling = request.prompt, request.sampling
        assert isinstance(prompt, Prompt) and sampling.temperature == 0
        text = BYTES.decode(prompt.ids)
        self.asked.append((list(prompt.ids), sampling))
        answer = next(answer for question, answer in self.answers.items() if question in text)
        for place, id in enumerate(answer, start=1):
            ends = id in request.stop_ids
            yield TokenOutput(
                "" if ends else BYTES.decode([id]),
                id,
                0.0,
                finish_reason="eos" if ends else "length" if place == len(answer) else None,
            )
            if ends:
                return


def example(question: str, target: str, given: str = "") -> TaskExample:
    return TaskExample(
        f"rows.jsonl: {question} {given}".strip(), Turn("user", question, given), target
    )


# --- batched scores ---


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_batched_scores_equal_single_scores(options):
    """Rows of 2 to 40 tokens, padded on the right, in batches that do and do not divide their number."""
    engine = Engine(make_model(**options), BYTES)
    texts = [
        ("a", "b"),
        ("a longer prompt, ", "target"),
        ("", "xyz"),
        ("x" * 30, "y" * 10),
        ("the same", " length"),
        ("the same", " lengtH"),
    ]
    pairs = [encode_continuation(engine, *text) for text in texts]
    alone = [score_continuation(engine, *text) for text in texts]
    for batch_size in (2, 4, 16):
        for found, expected in zip(
            score_continuations(engine, pairs, batch_size=batch_size), alone, strict=True
        ):
            assert found.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
            assert found.ranks == expected.ranks
            assert found.prompt_perplexity == (
                None
                if expected.prompt_perplexity is None
                else pytest.approx(expected.prompt_perplexity, rel=1e-4)
            )


def test_a_pair_that_is_too_long_loses_the_start_of_its_prompt():
    """48 positions have 48 inputs and a 49th target: 16 of 60 + 5 tokens are cut, in addition to
    those cut before."""
    engine = Engine(make_model(), BYTES)
    pair = encode_continuation(engine, "p" * 50 + "q" * 10, "tttt" + "u")
    assert (len(pair.ids), pair.n_target, pair.truncated) == (49, 5, 16)
    assert encode_continuation(engine, Prompt((1, 2), truncated=3), "t").truncated == 3
    with pytest.raises(ValueError, match="at least one token"):
        fit_continuation(engine, [], [1])


# --- cases ---


def test_a_case_that_cannot_be_asked_counts_as_a_failure():
    """The vocabulary lacks x: the other cases are scored, and the summary counts the failure."""
    engine = Engine(make_model(vocab_size=6), CharTokenizer("abcd", unknown="error"))
    cases = [
        Case("first", "ab", "cd"),
        Case("unknown", "ab", "x"),
        Case("long", "a", "b" * 49),
        Case("last", "a", "b"),
    ]
    first, unknown, long, last = evaluate_cases(engine, cases)
    assert first.score.log_prob == pytest.approx(
        score_continuation(engine, "ab", "cd").log_prob, abs=1e-4
    )
    assert unknown.score is None and "'x'" in unknown.error
    assert long.error == "target: must have 1 to 48 tokens, got 49. Change the target."
    summary = CasesSummary.of([first, unknown, long, last])
    assert (summary.n_cases, summary.n_failed) == (4, 2)
    assert summary.log_prob == pytest.approx((first.score.log_prob + last.score.log_prob) / 2)
    assert unknown.row() == {
        "case": "unknown", "prompt": "ab", "target": "x", "log_prob": None, "first_log_prob": None, "first_rank": None, "n_tokens": None,
        "greedy_match": None, "prompt_perplexity": None, "error": unknown.error,
    }  # fmt: skip


def test_failing_the_hard_cases_does_not_improve_the_rank():
    """One checkpoint scores both cases badly; another fails the hard one and has the better mean
    of the rest."""
    model = make_model()
    easy, hard = evaluate_cases(
        Engine(model, BYTES), [Case("easy", "ab", "c"), Case("hard", "ab", "d" * 40)]
    )
    assert easy.score.log_prob > hard.score.log_prob
    both = CasesSummary.of([easy, hard])
    one = CasesSummary.of([easy, CaseScore(hard.case, None, "why")])
    neither = CasesSummary.of([CaseScore(case, None, "why") for case in (easy.case, hard.case)])
    assert one.log_prob > both.log_prob
    assert format_ranks([one.rank_key, both.rank_key, neither.rank_key]) == ["2", "1", "3"]
    assert (neither.log_prob, neither.first_rank, neither.prompt_perplexity) == (None, None, None)


def test_the_summary_by_hand():
    """Ranks 1, 3 and a failure: the median is 3. The geometric mean of perplexities 2 and 8 is 4."""
    case = Case("c", "p", "t")
    scores = [
        CaseScore(case, ContinuationScore((-1.0, -2.0), (1, 1), 2.0), None),
        CaseScore(case, ContinuationScore((-5.0,), (3,), 8.0), None),
        CaseScore(case, None, "why"),
    ]
    assert CasesSummary.of(scores) == CasesSummary(
        n_cases=3,
        n_failed=1,
        n_greedy=1,
        log_prob=-4.0,
        first_rank=3,
        prompt_perplexity=pytest.approx(4),
    )


def test_the_shipped_cases_are_valid():
    """10 to 20 per file; a target that is a word begins with a space, or it would continue the last word."""
    for path in sorted((Path(__file__).parents[2] / "cases").glob("*.yaml")):
        cases = read_cases(path)
        assert 10 <= len(cases) <= 20
        assert all(case.target.startswith(" ") and not case.prompt.endswith(" ") for case in cases)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "",
            ": must be a list with at least one item. Begin each item with a dash: - name: ...",
        ),
        ("name: a\n", ": must be a list with at least one item."),
        (
            "- a\n",
            ':1: an item must have keys, got "a". Write each name: value on its own line.',
        ),
        (
            "- {name: a, prompt: p}\n",
            ":1: target: must be text, got nothing. Each case has name, prompt and target; quote numbers.",
        ),
        ("- {name: a, prompt: p, target: 4}\n", ":1: target: must be text, got 4."),
        (
            "- {name: a, prompt: p, target: ''}\n",
            ":1: target: must not be empty. Write the text that should follow the prompt.",
        ),
        (
            "- {name: a, prompt: p, target: t}\n- {name: a, prompt: p, target: t}\n",
            ":2: name: a is used by another case. Give each case a different name.",
        ),
        (
            "- {name: a, prompt: p, target: t, weight: 2}\n",
            ":1: weight: unknown key. A case has name, prompt and target.",
        ),
        ("- name: a\n  name: b\n", ":2: item.name: already set on line 1. Keep one."),
    ],
)
def test_a_mistake_in_a_case_file_is_named_by_line_and_key(tmp_path, text, message):
    path = tmp_path / "cases.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="^" + re.escape(f"{path}{message}")):
        read_cases(path)


# --- tasks: labels ---

SST2 = [
    example("which?", label, given)
    for label, given in (("positive", "good"), ("negative", "bad"), ("positive", "fine"))
]


@pytest.mark.parametrize("n_shots", [0, 1])
def test_the_most_probable_label_is_chosen(n_shots):
    """Oracle: each label scored after a prompt that is written out here."""
    task, engine = TASKS["sst2"], Engine(make_model(max_seq_len=300), BYTES)
    shots = [example("solved", "negative", "x")][:n_shots]
    before = "solved\n\nx\nSentiment: negative\n\n" * n_shots
    chosen = []
    for item in SST2:
        prompt = f"{before}which?\n\n{item.question.input}\nSentiment:"
        chosen.append(
            max(
                task.labels,
                key=lambda label: score_continuation(engine, prompt, f" {label}").log_prob,
            )
        )
    found = evaluate_task(engine, task, SST2, shots=shots, batch_size=2)
    right = [answer == item.target for answer, item in zip(chosen, SST2, strict=True)]
    assert found.measures["accuracy"].value == pytest.approx(sum(right) / 3)
    assert {answer.location: answer.output for answer in found.failed} == {
        item.location: answer
        for answer, item, ok in zip(chosen, SST2, right, strict=True)
        if not ok
    }
    assert (found.task, found.shots, found.n_examples, found.n_errors, found.n_truncated) == (
        "sst2",
        n_shots,
        3,
        0,
        0,
    )


def test_of_equally_probable_labels_the_first_is_chosen():
    """All logits are 0: "negative" and "positive" have 8 bytes each and the same probability."""
    model = make_model(max_seq_len=100)
    with torch.no_grad():
        model.head.weight.zero_()
    found = evaluate_task(Engine(model, BYTES), TASKS["sst2"], SST2)
    assert {answer.output for answer in found.failed} == {"negative"}
    assert found.measures["accuracy"].value == pytest.approx(1 / 3)
    assert found.chance["accuracy"] == pytest.approx(2 / 3)


def test_a_label_in_a_template_is_scored_with_the_tokens_of_training(monkeypatch):
    """The target is the trained tokens, with the one that ends the answer."""
    engine, template, asked = (
        Engine(make_model(max_seq_len=300), BYTES),
        make_template("instruction", BYTES),
        [],
    )
    score = task_scores.score_continuations

    def note(engine, pairs, *, batch_size):
        asked.extend(pairs)
        return score(engine, pairs, batch_size=batch_size)

    monkeypatch.setattr(task_scores, "score_continuations", note)
    shot = example("solved", "negative", "x")
    evaluate_task(engine, TASKS["sst2"], SST2, shots=[shot], template=template)
    expected = []
    for item, label in itertools.product(SST2, TASKS["sst2"].labels):
        row = template.encode(
            (shot.question, Turn("assistant", "negative"), item.question, Turn("assistant", label)),
            BYTES,
        )
        expected.append((row.ids.tolist(), len(f" {label}\n") + 1))
        assert row.trained[-1]
    assert [(list(pair.ids), pair.n_target) for pair in asked] == expected


# --- tasks: free-text answers ---


def test_answers_are_graded_and_wrong_ones_are_reported():
    engine = Parrot({"1 and 1": b" It is 2.\n#### 2", "2 and 2": b"five is 5"})
    asked = [example("2 and 2", "#### 4"), example("1 and 1", "#### 2")]
    found = evaluate_task(engine, TASKS["gsm8k"], asked, shots=[example("0 and 0", "#### 0")])
    assert found.measures["exact_match"].value == 0.5
    [failed] = found.failed
    assert (failed.location, failed.question, failed.output, failed.target) == (
        "rows.jsonl: 2 and 2",
        "2 and 2",
        "five is 5",
        "#### 4",
    )
    assert (
        BYTES.decode(engine.asked[0][0])
        == "Question: 0 and 0\nAnswer: #### 0\n\nQuestion: 2 and 2\nAnswer:"
    )
    assert engine.asked[0][1].stop == ("Question:",)


def test_failed_answers_are_sorted_worst_first():
    engine = Parrot({"a": b"one two", "b": b"nothing", "c": b"one"})
    found = evaluate_task(
        engine, PAIRS, [example("a", "one two"), example("c", "one two"), example("b", "one two")]
    )
    assert [(answer.output, answer.grade["token_f1"]) for answer in found.failed] == [
        ("one", pytest.approx(2 / 3)),
        ("nothing", 0.0),
    ]
    assert list(found.measures) == ["exact_match", "token_f1"]


def test_in_a_template_the_answer_ends_at_the_token_of_training():
    """Solved examples are turns before the question: exactly the ids of `prompt_ids`."""
    template = make_template("instruction", BYTES)
    [end, *_] = template.stop_ids(BYTES)
    assert end != BYTES.eos_id
    engine = Parrot({"2 and 2": [*b" #### 4\n", end, *b"### Instruction: 9"]})
    shot = example("0 and 0", "#### 0")
    found = evaluate_task(
        engine, TASKS["gsm8k"], [example("2 and 2", "#### 5")], shots=[shot], template=template
    )
    assert [answer.output for answer in found.failed] == ["#### 4"]
    conversation = (shot.question, Turn("assistant", "#### 0"), Turn("user", "2 and 2"))
    assert engine.asked[0][0] == template.prompt_ids(conversation, BYTES)
    assert engine.asked[0][1].stop == ()


def test_a_question_that_cannot_be_asked_counts_as_wrong():
    """The vocabulary lacks the euro sign."""
    characters = sorted(set("which? Sentiment: positive negative Question: Answer:\n"))
    engine = Engine(
        make_model(vocab_size=len(characters) + 2, max_seq_len=100),
        CharTokenizer(characters, unknown="error"),
    )
    written = evaluate_task(
        engine, TASKS["gsm8k"], [example("which?", "#### 1"), example("which €?", "#### 1")]
    )
    labeled = evaluate_task(engine, TASKS["sst2"], [example("which €?", "positive")])
    for found in (written, labeled):
        assert found.n_errors == 1
        [error] = [answer.error for answer in found.failed if answer.question == "which €?"]
        assert "'€'" in error
    assert (labeled.measures["accuracy"].value, labeled.measures["macro_f1"].value) == (0.0, 0.0)


def test_truncated_prompts_are_counted():
    engine = Parrot({"": b"x"}, make_model(max_seq_len=60))
    found = evaluate_task(
        engine, TASKS["gsm8k"], [example("short", "#### 1"), example("long " * 20, "#### 1")]
    )
    assert found.n_truncated == 1
    assert (
        evaluate_task(
            engine, TASKS["sst2"], [example("short", "positive"), example("long " * 20, "positive")]
        ).n_truncated
        == 1
    )


# --- ranks ---


def test_ranks_by_definition():
    """A rank is one more than the number of better ones; shared ranks are marked."""
    for worths in itertools.product((0.0, 1.0, -math.inf), repeat=4):
        for worth, place in zip(worths, format_ranks(worths), strict=True):
            assert (
                place
                == f"{1 + sum(other > worth for other in worths)}{'=' if worths.count(worth) > 1 else ''}"
            )
