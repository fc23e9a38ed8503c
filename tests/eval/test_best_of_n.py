"""Best of n: choices at random, by vote, by a verifier and by an oracle among the same answers,
checked by hand."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import evaluate_checkpoints
import infer
from tests.cli.test_infer import checkpoint_state
from tests.generate.test_engine import make_model
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.console import readable
from tinylm.common.errors import UserError, printable
from tinylm.common.statistics import wilson
from tinylm.config.schema import Config
from tinylm.eval.best_of_n import BestOfScore, best_of_n, majority_vote, weighted_vote
from tinylm.eval.tasks.table import TASKS
from tinylm.eval.tasks.task import TaskExample
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import TokenOutput
from tinylm.model.verifier import Verifier
from tinylm.rows.conversation import Turn
from tinylm.tokenizer.byte_char import ByteTokenizer

BYTES = ByteTokenizer()
GSM8K = TASKS["gsm8k"]


class FixedAnswers(Engine):
    """An engine that returns given answers to each question, one per sample."""

    def __init__(self, answers: dict[str, list[str]]):
        super().__init__(make_model(max_seq_len=400), BYTES)
        self.answers = answers
        self.asked: list[Request] = []

    def run(self, requests: Iterable[Request]) -> Iterator[list[TokenOutput]]:
        for request in requests:
            self.asked.append(request)
            text = BYTES.decode(request.prompt.ids)
            [answers] = [answers for question, answers in self.answers.items() if question in text]
            yield [TokenOutput(answers[request.sample], 65, 0.0, request.sample, "eos")]


class ExclamationScorer(VerifierScorer):
    """A scorer that prefers answers with more exclamation marks."""

    def __init__(self) -> None:
        pass

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        assert all(prompt.startswith("question") for prompt in prompts)
        return [answer.count("!") / 10 for answer in answers]


def example(number: int, target: str) -> TaskExample:
    return TaskExample(f"rows.jsonl:{number}", Turn("user", f"question {number}"), target)


ANSWERS = {
    "question 1": ["it is 4", "it is 5!!", "perhaps 4", "no idea"],  # target 5: vote 4, verifier 5
    "question 2": ["it is 7", "is it 8!", "7", "7.0"],  # target 7: vote 7, verifier 8
    "question 3": ["none", "nothing", "nil!", "naught"],  # target 1: nobody
}
EXAMPLES = [example(1, "#### 5"), example(2, "#### 7"), example(3, "#### 1")]


def test_every_method_chooses_among_the_same_answers() -> None:
    """1, 3 and 0 of 4 answers are right: at random 1/3. The vote gets only the second question,
    the verifier only the first, as the vote with its weights 0, 0.2, 0, 0; two of three have a right
    answer."""
    engine = FixedAnswers(ANSWERS)
    score = best_of_n(engine, ExclamationScorer(), GSM8K, EXAMPLES, 4, seed=5)
    assert {name: measure.value for name, measure in score.measures.items()} == pytest.approx(
        {
            "random choice": 1 / 3,
            "majority vote": 1 / 3,
            "verifier": 1 / 3,
            "weighted vote": 1 / 3,
            "oracle": 2 / 3,
        }
    )
    oracle = score.measures["oracle"]
    assert (oracle.low, oracle.high) == wilson(2 / 3, 3)
    assert [item.right for item in score.candidates] == [
        (False, True, False, False),
        (True, False, True, True),
        (False,) * 4,
    ]
    assert [item.accuracies["verifier"] for item in score.candidates] == [1, 0, 0] and [
        item.accuracies["majority vote"] for item in score.candidates
    ] == [0, 1, 0]
    assert {
        (request.sampling.temperature, request.sample, request.sampling.seed)
        for request in engine.asked
    } == {(0.7, sample, 5) for sample in range(4)}
    assert (score.n_examples, score.n_samples, score.n_errors) == (3, 4, 0)


def test_a_vote_without_numbers_takes_the_first_answer_and_a_tie_the_first_number() -> None:
    assert [
        majority_vote(["a", "b"]),
        majority_vote(["a", "is 3", "is 4"]),
        majority_vote(["is 4", "is 3", "3"]),
    ] == [0, 1, 1]


def test_a_weighted_vote_adds_the_probabilities_of_equal_numbers() -> None:
    """3 has 0.3 + 0.3, more than the 0.5 of 4; with 0.7 for 4 it has less. No number: the first."""
    answers = ["is 4", "is 3", "so 3.0", "none"]
    assert weighted_vote(answers, [0.5, 0.3, 0.3, 1.0]) == 1
    assert weighted_vote(answers, [0.7, 0.3, 0.3, 1.0]) == 0
    assert weighted_vote(["a", "b"], [0.1, 0.9]) == 0


def test_a_question_that_cannot_be_asked_is_wrong_for_every_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FixedAnswers(ANSWERS)
    original = engine.encode_prompt

    def encode(text: str) -> Any:
        if "question 1" in text:
            raise UserError("no", "no")
        return original(text)

    monkeypatch.setattr(engine, "encode_prompt", encode)
    score: BestOfScore = best_of_n(engine, ExclamationScorer(), GSM8K, EXAMPLES, 4)
    assert (score.n_examples, score.n_errors, score.measures["oracle"].value) == (
        3,
        1,
        pytest.approx(1 / 3),
    )
    with pytest.raises(UserError, match="task gsm8k: none of 1 questions could be asked: no"):
        best_of_n(engine, ExclamationScorer(), GSM8K, EXAMPLES[:1], 4)


def test_a_task_with_labels_has_no_answers_to_choose_from() -> None:
    with pytest.raises(
        UserError,
        match="--best-of: task sst2 is answered with a label; the most probable one is chosen. Give "
        "a task with free-text answers",
    ):
        best_of_n(FixedAnswers({}), ExclamationScorer(), TASKS["sst2"], EXAMPLES, 4)


# --- the programs ---


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The checkpoints of a model that generates random bytes, and of a random verifier."""
    shape = {
        "vocab_size": 260,
        "n_layers": 1,
        "d_model": 16,
        "n_heads": 2,
        "max_seq_len": 64,
        "tie_embeddings": False,
    }
    model = make_model(**shape)
    config = Config.model_validate(
        {"model": shape, "training": {"seq_len": 32}, "sampling": {"max_new_tokens": 8}}
    )
    torch.manual_seed(1)
    verifier = Verifier(config.model)
    with torch.no_grad():
        for weight in verifier.parameters():
            weight.mul_(5)
    made = checkpoint_state("x") | {"config": config.to_plain()}
    checkpoint_format.write(tmp_path / "writer.ckpt", made | {"weights": model.state_dict()})
    checkpoint_format.write(
        tmp_path / "verifier.ckpt", made | {"weights": verifier.state_dict(), "stage": "verifier"}
    )
    return tmp_path / "writer.ckpt", tmp_path / "verifier.ckpt"


@pytest.fixture
def ask(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """infer.py with the model: exit code, stdout, stderr."""

    def start(*flags: object) -> tuple[int, str, str]:
        code = infer.main(
            ["--ckpt", str(files[0]), "--device", "cpu", "--prompt", "1 + 2 =", *map(str, flags)]
        )
        return (code, *capsys.readouterr())

    return start


def test_the_most_probable_answer_is_printed_and_all_are_scored(
    ask: Callable[..., Any], files: tuple[Path, Path]
) -> None:
    """The JSON has every answer with the verifier's probability, the most probable first: the same
    samples as --n-samples."""
    flags = ("--best-of", 5, "--verifier", files[1])
    code, out, _ = ask(*flags, "--json")
    found = json.loads(out)["completions"]
    texts = [completion["text"] for completion in found]
    assert code == 0 and len(set(texts)) == 5
    scorer = VerifierScorer.load(files[1], "cpu")
    assert [completion["probability"] for completion in found] == pytest.approx(
        scorer.probabilities("1 + 2 =", texts), abs=1e-6
    )
    assert [completion["probability"] for completion in found] == sorted(
        (completion["probability"] for completion in found), reverse=True
    )
    drawn = json.loads(ask("--n-samples", 5, "--json")[1])["completions"]
    assert {completion["text"] for completion in drawn} == set(texts)
    code, out, err = ask(*flags)
    assert code == 0 and out.strip() == readable(texts[0]).strip()
    printed = [line for line in err.splitlines() if line.startswith("verifier: ")]
    assert [line.split()[1] for line in printed] == [
        f"{completion['probability']:.3f}" for completion in found
    ]


def test_other_choices_are_printed_beside_the_verifiers(
    ask: Callable[..., Any], files: tuple[Path, Path]
) -> None:
    """Among the same answers: the first sample, and one with the most frequent final number."""
    flags = ("--best-of", 5, "--verifier", files[1])
    drawn = [
        completion["text"]
        for completion in json.loads(ask("--n-samples", 5, "--json")[1])["completions"]
    ]
    found = json.loads(ask(*flags, "--json")[1])
    assert (found["random_choice"], found["majority_vote"]) == (
        drawn[0],
        drawn[majority_vote(drawn)],
    )
    lines = ask(*flags)[2].splitlines()
    for name, text in (("random choice", drawn[0]), ("majority vote", drawn[majority_vote(drawn)])):
        assert printable(f"{name}: {text.strip()}") in lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--best-of", 4),
            "--best-of, --verifier: each needs the other. Give --best-of 8 --verifier FILE, or neither.",
        ),
        (("--verifier", "x.ckpt"), "--best-of, --verifier: each needs the other."),
        (
            ("--best-of", 1, "--verifier", "x.ckpt"),
            "--best-of: must be a whole number from 2 to 1024, got 1.",
        ),
        (
            ("--best-of", "many", "--verifier", "x.ckpt"),
            "--best-of: must be a whole number from 2 to 1024, got many.",
        ),
        (
            ("--best-of", 4, "--verifier", "x.ckpt", "--n-samples", 2),
            "--n-samples: cannot be combined with --best-of, which sets the number of answers.",
        ),
        (
            ("--best-of", 4, "--verifier", "x.ckpt", "--n-beams", 2),
            "--n-beams: cannot be combined with --best-of, which sets the number of answers.",
        ),
        (
            ("--best-of", 4, "--verifier", "x.ckpt", "--show-probs"),
            "--show-probs: cannot be combined with --best-of, which prints finished answers",
        ),
        (
            ("--best-of", 4, "--verifier", "x.ckpt", "--temperature", 0),
            "--temperature: must be above 0 with --best-of, which chooses among different answers",
        ),
        (("--best-of", 4, "--verifier", "x.ckpt"), "x.ckpt: not found"),
    ],
)
def test_flags_that_cannot_be_combined_with_best_of_are_an_error(
    flags: tuple[object, ...], message: str, ask: Callable[..., Any]
) -> None:
    code, out, err = ask(*flags)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


@pytest.mark.slow
def test_the_table_has_all_methods(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random bytes are never right: every method has 0, with the wide interval of two examples;
    the answers are in a file."""
    out = tmp_path / "results"
    where = [
        "--checkpoints",
        str(files[0]),
        "--tasks",
        "gsm8k",
        "--smoke",
        "--limit",
        "2",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    assert evaluate_checkpoints.main([*where, "--best-of", "3", "--verifier", str(files[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(
        number for number, line in enumerate(lines) if line.startswith("task") and "choice" in line
    )
    assert [line.split()[2] for line in lines[header + 1 :]] == [
        "random",
        "majority",
        "verifier",
        "weighted",
        "oracle",
    ]
    high = wilson(0.0, 2)[1]
    assert all(
        f"0.0000 to {high:.4f}" in line and line.split()[-1] == "2" for line in lines[header + 1 :]
    )
    with open(out / "best_of.csv", encoding="utf-8", newline="") as file:
        assert [row["choice"] for row in csv.DictReader(file)] == [
            "random choice",
            "majority vote",
            "verifier",
            "weighted vote",
            "oracle",
        ]
    [kept] = out.glob("best-of-*.jsonl")
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and all(len(row["answers"]) == 3 == len(row["scores"]) for row in rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--tasks", "gsm8k", "--smoke", "--best-of", "3"),
            "--best-of, --verifier: each needs the other.",
        ),
        (
            ("--tasks", "sms", "--smoke", "--best-of", "3", "--verifier", "x"),
            "--best-of: task sms is answered with a label",
        ),
        (
            ("--cases", "cases/facts.yaml", "--best-of", "3", "--verifier", "x"),
            "--best-of: needs a task. Give --tasks gsm8k.",
        ),
        (
            ("--tasks", "gsm8k", "--smoke", "--best-of", "3", "--verifier", "WRITER"),
            "must be a verifier, got a language model (stage pretrain). Train a verifier",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_an_error_before_the_work(
    flags: tuple[str, ...],
    message: str,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert (
        evaluate_checkpoints.main(
            [
                "--checkpoints",
                str(files[0]),
                *(str(files[0]) if flag == "WRITER" else flag for flag in flags),
            ]
        )
        == 2
    )
    assert message in capsys.readouterr().err.splitlines()[-1]
