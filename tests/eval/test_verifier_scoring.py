"""Problems with right and wrong answers: how they are read, corrupted, encoded, sampled and scored."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinylm.common.errors import UserError
from tinylm.config.schema import Config, DataConfig, ModelConfig
from tinylm.eval.sampled_answers import cached_answers
from tinylm.eval.tasks.table import TASKS
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.model.verifier import Verifier
from tinylm.rows.conversation import Turn
from tinylm.rows.numbers import corrupt_number
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import (
    GradedAnswer,
    Problem,
    build_verifier_examples,
    collate_pairs,
    error_span,
    filter_problems,
    grade_samples,
    graded_answers,
    pad_pairs,
    pair_ids,
    parse_problem,
    read_problems,
    remove_annotations,
)
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.packing import RankShare
from training.stages.verifier import VerifierData

BYTES = ByteTokenizer()


def problem(
    question: str = "How many?", answer: str = "It is 7.", samples: tuple[GradedAnswer, ...] = ()
) -> Problem:
    return Problem(f"rows.jsonl: {question}", Turn("user", question), answer, samples)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- rows to problems ---


def test_calculator_annotations_are_removed_from_a_row_of_gsm8k(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"question": "How many eggs? ", "answer": "4*6=<<4*6=24>>24 eggs.\n#### 24"}],
    )
    assert read_problems(
        DataConfig(dataset=str(path), val_dataset="other.jsonl"),
        "train",
        0,
        to_conversation=TASKS["gsm8k"].conversation,
    ) == [Problem(f"{path}:1", Turn("user", "How many eggs?"), "4*6=24 eggs.\n#### 24")]


@pytest.mark.parametrize("text", ["a << b, c >> d", "x <<1=\n1>>", "<<>>"])
def test_other_angle_brackets_are_not_annotations(text):
    assert remove_annotations(text) == text


def test_the_problem_is_everything_before_the_last_answer():
    found = parse_problem(
        "here",
        (Turn("system", "Be brief."), Turn("user", "1+1?", "in words"), Turn("assistant", "2")),
    )
    assert (found.question, found.answer) == (Turn("user", "Be brief.\n\n1+1?\n\nin words"), "2")


def test_a_row_without_an_answered_question_is_named(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl", [{"messages": [{"role": "assistant", "content": "2"}]}]
    )
    with pytest.raises(
        UserError,
        match=r"rows.jsonl:1: last turn: must be an assistant turn that answers a question. Add the answer",
    ):
        read_problems(DataConfig(dataset=str(path), val_dataset="other.jsonl"), "train", 0)


def test_problems_that_do_not_fit_or_have_no_number_are_skipped_and_reported():
    """In rows of 12 bytes an answer of 10 leaves room for the separator and one byte of the
    problem, one of 11 does not."""
    found = [
        problem("0123456", "1234567890"),
        problem("b", "12345678901"),
        problem("c", "none"),
        problem("d", "3"),
        problem("e", "no number"),
    ]
    report = RowReport("train", 12, lost="the start of a problem")
    kept = filter_problems(found, report, BYTES, n_wrong=1)
    assert [item.question.text for item in kept] == ["0123456", "d"]
    assert report.notes() == [
        "training: kept 2 of 5 rows",
        "training: skipped 1 row: the answer fills the context of 12 tokens (rows.jsonl: b). Raise "
        "training.seq_len, or give other rows.",
        "training: skipped 2 rows: the answer has no number to change into a wrong one (rows.jsonl: "
        "c, rows.jsonl: e). Set verifier.n_wrong to 0, or give other rows.",
        "training: 1 of 2 rows lost the start of a problem to the context of 12 tokens",
    ]
    assert len(filter_problems(found, RowReport("train", 12), BYTES, n_wrong=0)) == 4
    with pytest.raises(
        UserError,
        match=r"data.dataset: no validation rows are left: skipped 1 row: the answer has no number "
        r".* Set verifier.n_wrong to 0",
    ):
        filter_problems(found[2:3], RowReport("val", 12), BYTES, n_wrong=1)


def test_if_all_training_problems_are_in_validation_it_is_an_error(tmp_path):
    """One question with different answers: whatever is held out, training has no other question."""
    path = write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": "How many?", "completion": f"It is {i}."} for i in range(12)],
    )
    config = Config.model_validate(
        {"data": {"dataset": str(path), "val_fraction": 0.3}, "verifier": {}}
    )
    with pytest.raises(
        UserError,
        match=r"data.dataset: no training rows are left: skipped \d+ rows: the same problem is in "
        r"validation .* Give different rows",
    ):
        VerifierData(config, BYTES).prepare()


def test_samples_that_do_not_fit_are_removed():
    long, short = GradedAnswer("12345678901", False), GradedAnswer("4", False)
    report = RowReport("train", 12)
    [kept] = filter_problems([problem("d", "3", (long, short))], report, BYTES, n_wrong=1)
    assert kept.samples == (short,)


# --- answers ---


def test_wrong_answers_are_a_function_of_the_seed():
    """First the right answer, then n_wrong corrupted ones, then the sampled ones."""
    given = problem(answer="3 and 4 are 7", samples=(GradedAnswer("it is 8", False),))
    first, again, other = (graded_answers(given, n_wrong=3, seed=seed) for seed in ("a", "a", "b"))
    assert first == again != other
    assert first[0] == GradedAnswer("3 and 4 are 7", True) and first[-1] == GradedAnswer(
        "it is 8", False
    )
    draw = random.Random("a")
    assert [answer.text for answer in first[1:4]] == [
        corrupt_number("3 and 4 are 7", draw) for _ in range(3)
    ]
    assert not any(answer.right for answer in first[1:])


def test_a_sampled_answer_is_right_by_its_final_number():
    """Without repetitions, the right answer itself, and empty answers."""
    found = grade_samples(
        problem(answer="2+5=7\n#### 7"),
        ["so 7.0", "it is 8 ", "it is 8", "", "2+5=<<2+5=7>>7\n#### 7", "no idea"],
    )
    assert found == (
        GradedAnswer("so 7.0", True),
        GradedAnswer("it is 8", False),
        GradedAnswer("no idea", False),
    )


# --- pairs ---


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 255), max_size=30),
    st.lists(st.integers(0, 255), max_size=30),
    st.integers(1, 80),
)
def test_a_pair_is_problem_separator_answer_cut_on_its_left(question, answer, seq_len):
    assert (
        pair_ids(question, answer, BYTES, seq_len) == [*question, BYTES.eos_id, *answer][-seq_len:]
    )


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
    st.lists(st.integers(0, 2), min_size=1, max_size=8),
)
def test_the_error_span_is_what_two_answers_do_not_share_at_their_ends(answer, right):
    """Before and after it both answers are equal; it is never empty, even if the answers are equal."""
    span = error_span(answer, right)
    assert 0 <= span.start < span.stop <= len(answer)
    if answer != right:
        n_after = len(answer) - span.stop
        assert answer[: span.start] == right[: span.start] or span.start == len(answer) - 1
        assert answer[span.stop :] == right[len(right) - n_after :]


def test_the_error_is_marked_also_in_a_pair_that_is_cut():
    """Of "Q" EOS "1+1=3" the last byte is wrong, of "one" every byte; in rows of 4 tokens
    positions shift, but not below 0."""
    given = problem("Q", "1+1=2", (GradedAnswer("one", False), GradedAnswer("1+1=2.", True)))
    wrong = GradedAnswer("1+1=3", False)
    pairs = build_verifier_examples(
        problem("Q", "1+1=2", (wrong, *given.samples)), BYTES, 99, n_wrong=0, seed=""
    )
    assert [(BYTES.decode(pair.ids[2:]), pair.right, pair.error_positions) for pair in pairs] == [
        ("1+1=2", True, ()), ("1+1=3", False, (6,)), ("one", False, (2, 3, 4)), ("1+1=2.", True, ())
    ]  # fmt: skip
    assert [
        pair.error_positions
        for pair in build_verifier_examples(
            problem("Q", "1+1=2", (wrong, GradedAnswer("3+1=2", False))),
            BYTES,
            4,
            n_wrong=0,
            seed="",
        )
    ] == [(), (3,), (0,)]
    batch = collate_pairs(pairs, 0)
    assert batch["label"].tolist() == [1, 0, 0, 1] and batch["error_mask"].sum(dim=1).tolist() == [
        0,
        1,
        3,
        0,
    ]
    assert (
        bool(batch["error_mask"][1, 6])
        and not (batch["error_mask"] & ~batch["attention_mask"]).any()
    )


def test_a_batch_is_padded_on_the_right():
    batch = pad_pairs([[5, 6, 7], [8]], 9)
    assert batch["input_ids"].shape == (2, 32) and batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][:, :4].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 1] and batch["attention_mask"][
        1
    ].tolist()[:2] == [True, False]


def test_answers_are_scored_with_the_tokens_of_training():
    """A batch equals single answers; calculator annotations are removed from sampled answers."""
    torch.manual_seed(0)
    scorer = VerifierScorer(
        Verifier(
            ModelConfig(vocab_size=260, n_layers=1, d_model=16, n_heads=2, max_seq_len=40)
        ).eval(),
        BYTES,
        40,
    )
    answers = ["7", "it is 12", "it is <<5+7=12>>12 "]
    together = scorer.probabilities("How many?", answers)
    assert together == pytest.approx(
        [scorer.probabilities("How many?", [answer])[0] for answer in answers], abs=1e-6
    )
    assert together[1] == together[2] != together[0]
    ids = torch.tensor([pair_ids(BYTES.encode("How many?"), BYTES.encode("7"), BYTES, 40)])
    assert together[0] == pytest.approx(
        torch.sigmoid(scorer.model(ids, torch.ones_like(ids))).item(), abs=1e-6
    )


# --- batches of a run ---


@pytest.fixture
def config(tmp_path) -> Config:
    """40 problems, 8 of them twice; 30% are held out."""
    rows = [
        {
            "prompt": f"What is {i % 32} and 1?",
            "completion": f"{i % 32} + 1 = {i % 32 + 1}" + "." * (i // 32),
        }
        for i in range(40)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    training = {"seq_len": 48, "micro_batch_size": 4}
    return Config.model_validate(
        {
            "data": {"dataset": str(path), "val_fraction": 0.3},
            "training": training,
            "verifier": {"n_wrong": 2},
        }
    )


@pytest.fixture
def data(config) -> VerifierData:
    made = VerifierData(config, BYTES)
    made.prepare()
    return made


def test_no_problem_is_in_both_splits(data):
    """A problem with two different answers can be in both splits by its hash: it is skipped in
    training, with a note."""
    train, val = (
        {problem.question for problem in made} for made in (data.train_problems, data.val_problems)
    )
    assert train and val and not train & val
    kept, note = data.notes
    assert kept.startswith(f"training: kept {len(data.train_problems)} of ")
    n_skipped = 40 - len(data.train_problems) - len(data.val_problems)
    assert note.startswith(
        f"training: skipped {n_skipped} rows: the same problem is in validation ("
    )
    assert (
        f"train {len(data.train_problems)} problems with {3 * len(data.train_problems)} answers "
        f"(33% of them right), validation" in data.describe()
    )


def decoded(batch: dict[str, Any]) -> list[tuple[str, int]]:
    """Each example as text, with its label."""
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["label"], strict=True)
    return [
        (BYTES.decode([i for i in ids[mask].tolist() if i != BYTES.eos_id]), int(label))
        for ids, mask, label in rows
    ]


def test_a_batch_is_a_function_of_its_number_and_wrong_answers_differ_between_passes(data, config):
    """Right answers are repeated in each pass, wrong ones are drawn again; a second object gives the
    same batch."""
    n = len(data.train_problems)
    one, other = (data.train_dataset(RankShare(n)) for _ in range(2))
    first, second = decoded(one[0]), decoded(one[1])
    assert decoded(other[1]) == second
    assert [label for _, label in first] == [1, 0, 0] * n
    rights = [sorted(text for text, label in batch if label) for batch in (first, second)]
    wrongs = [sorted(text for text, label in batch if not label) for batch in (first, second)]
    assert rights[0] == rights[1] and wrongs[0] != wrongs[1]
    assert one[0]["origin"] and len(one[0]["origin"]) == n


def test_two_ranks_see_what_one_device_sees(data, config):
    alone = data.train_dataset(RankShare(4))
    ranks = [data.train_dataset(RankShare(2, rank, 2)) for rank in range(2)]
    assert decoded(alone[3]) == decoded(ranks[0][3]) + decoded(ranks[1][3])


def test_validation_asks_every_problem_once_and_is_the_same_each_time(data, config):
    """The last batch may be short, and a rank may have none left: then its share is empty."""
    n = len(data.val_problems)
    batches = data.val_dataset(RankShare(4))
    pairs = [pair for batch in batches for pair in decoded(batch)]
    assert len(pairs) == 3 * n and pairs == [pair for batch in batches for pair in decoded(batch)]
    size = n - 1
    ranks = [data.val_dataset(RankShare(size, rank, 2)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [1, 1]
    assert [len(rank[0]["label"]) for rank in ranks] == [3 * size, 3]
    data.val_problems = data.val_problems[:1]
    assert len(data.val_dataset(RankShare(1, 1, 2))[0]["label"]) == 0


# --- cached answers ---


def test_cached_answers_are_not_sampled_again(tmp_path):
    """A killed process leaves part of a line: the next one continues after the whole lines, and
    the file is the same."""
    drawn: list[int] = []

    def draw(first: int) -> Iterator[list[str]]:
        for number in range(first, 4):
            drawn.append(number)
            yield [f"answer {number}", "ü\n"]

    seen: list[tuple[str, int, int]] = []
    path = tmp_path / "cache" / "answers.jsonl"
    expected = list(cached_answers(path, 4, draw, lambda *progress: seen.append(progress)))
    assert (
        expected == [[f"answer {i}", "ü\n"] for i in range(4)]
        and drawn == [0, 1, 2, 3]
        and seen[-1] == ("answering problems", 4, 4)
    )
    whole = path.read_bytes()
    assert (
        list(cached_answers(path, 4, draw, lambda *progress: None)) == expected and len(drawn) == 4
    )
    path.write_bytes(whole[: whole.rindex(b"answer 3") + 3])
    assert list(cached_answers(path, 4, draw, lambda *progress: None)) == expected and drawn[
        4:
    ] == [3]
    assert path.read_bytes() == whole
    path.write_bytes(b"[]\nx\n")
    with pytest.raises(
        UserError,
        match="answers.jsonl: damaged: not the lines that were written. Delete it: it will be made again.",
    ):
        list(cached_answers(path, 4, draw, lambda *progress: None))
