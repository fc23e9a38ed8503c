"""Rewards of known answers, their weighted sum, and functions of the user's own that misbehave."""

from pathlib import Path

import pytest

from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.finetuning import GrpoConfig, RewardConfig
from tinylm.config.schema import Config
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.model.verifier import Verifier
from tinylm.rewards.answer import Answer, RewardError
from tinylm.rewards.own_function import OwnFunction
from tinylm.rewards.table import REWARDS, RewardSum


def answer(text: str, target: str = "", *, n: int = 1, row: int = 1, cut: bool = False) -> Answer:
    """An answer to the prompt of a row."""
    return Answer(f"prompt {row}", text, target, f"rows.jsonl:{row}", n, cut)


def score(reward: RewardConfig, *answers: Answer) -> list[float]:
    """The rewards of answers with one part."""
    found = RewardSum(GrpoConfig(rewards=(reward,), max_new_tokens=10), "cpu")(answers)
    return [item.reward for item in found]


@pytest.mark.parametrize(
    ("reward", "text", "target", "expected"),
    [
        ({"reward": "same_number"}, "so it is 12.00", "2 * 6 = 12 #### 12", 1),
        ({"reward": "same_number"}, "so it is 13", "#### 12", 0),
        ({"reward": "same_number"}, "twelve", "#### 12", 0),
        ({"reward": "exact"}, " yes\n", "yes", 1),
        ({"reward": "exact"}, "Yes", "yes", 0),
        ({"reward": "choice"}, "A cat sits, so the answer is (B).", "B", 1),
        ({"reward": "choice"}, "first A. No: C", "The answer is C.", 1),
        ({"reward": "choice"}, "Because", "B", 0),
        ({"reward": "choice"}, "I think D", "B", 0),
        ({"reward": "regex", "pattern": "answer: (.*)"}, "answer: no\nanswer: 7", "answer: 7", 1),
        ({"reward": "regex", "pattern": "answer: (.*)"}, "answer: 7", "7", 1),
        ({"reward": "regex", "pattern": "answer: (.*)"}, "7", "7", 0),
        ({"reward": "regex", "pattern": r"\d+"}, "it is 7", "7", 1),
        ({"reward": "format", "pattern": "<a>.*</a>"}, "<a>one\ntwo</a>", "", 1),
        ({"reward": "format", "pattern": "<a>.*</a>"}, "<a>one</a> more", "", 0),
    ],
)
def test_a_reward_of_a_text_is_one_or_zero(
    reward: dict, text: str, target: str, expected: float
) -> None:
    """By its definition, on answers that are right, wrong and of another form."""
    assert score(RewardConfig(**reward), answer(text, target)) == [expected]


def test_length_falls_evenly_from_the_free_tokens_to_the_limit() -> None:
    """DAPO's equation 13 with L_max 10 and 4 free tokens: (4 - n) / 6 between."""
    reward = RewardConfig(reward="length", free_tokens=4)
    found = score(reward, *(answer("", n=n) for n in (1, 4, 7, 10)))
    assert found == [0, 0, -0.5, -1]


def test_the_reward_is_the_weighted_sum_of_its_parts_less_the_penalty() -> None:
    """1.0 * exact + 0.5 * length, minus 0.25 if truncated; the first part decides who passes."""
    parts = (
        RewardConfig(reward="exact"),
        RewardConfig(reward="length", free_tokens=4, weight=0.5),
        RewardConfig(reward="exact", weight=0.0),
    )
    grpo = GrpoConfig(
        rewards=parts, max_new_tokens=10, truncated="penalize", truncation_penalty=0.25
    )
    reward = RewardSum(grpo, "cpu")
    assert reward.names == ["exact", "length", "exact#2"]
    good, bad = reward([answer("a", "a", n=7), answer("b", "a", n=10, cut=True)])
    assert (good.reward, bad.reward) == (1 - 0.25, -0.5 - 0.25)
    assert good.parts == {"exact": 1, "length": -0.5, "exact#2": 1}
    assert (good.passes, bad.passes) == (True, False)


def test_the_verifier_as_a_reward_is_its_probability(tmp_path: Path) -> None:
    """Equal to what best-of-n asks it, for answers to several prompts."""
    model = {"vocab_size": 260, "n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 64}
    config = Config.from_plain({"model": model, "training": {"seq_len": 64}, "verifier": {}})
    path = tmp_path / "verifier.ckpt"
    checkpoint_format.write(path, state_of(config, Verifier(config.model), "verifier"))
    answers = [answer("one"), answer("two"), answer("one", row=2)]
    found = score(RewardConfig(reward="verifier", checkpoint=str(path)), *answers)
    scorer = VerifierScorer.load(path, "cpu")
    expected = scorer.probabilities("prompt 1", ["one", "two"])
    expected += scorer.probabilities("prompt 2", ["one"])
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match=r"^grpo\.rewards: .*nowhere\.ckpt: not found"):
        score(RewardConfig(reward="verifier", checkpoint=str(tmp_path / "nowhere.ckpt")), *answers)


def test_every_reward_of_the_table_is_named_in_the_settings() -> None:
    """The doc line of grpo.rewards[].reward."""
    line = RewardConfig.model_fields["reward"].description
    assert all(name in line for name in REWARDS)


# --- functions of the user's own ------------------------------------------------------------------

ANSWERS = [answer("good", "good", row=7), answer("bad", "good", row=8)]


def own(folder: Path, body: str, max_seconds: float = 20) -> OwnFunction:
    """The function `score` with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    path = folder / "mine.py"
    path.write_text(f"def score(prompts, answers, targets):\n{lines}", encoding="utf-8")
    return OwnFunction(f"{path}:score", max_seconds)


def test_a_function_of_the_user_gets_a_batch_at_once(tmp_path: Path) -> None:
    """Prompts, answers and targets in order; what it prints is not on stdout; a file beside it can
    be imported; numpy's numbers are numbers.
    """
    (tmp_path / "beside.py").write_text("HALF = 0.5\n", encoding="utf-8")
    body = (
        "import numpy\nfrom beside import HALF\nprint('hello')\n"
        "assert prompts == ['prompt 7', 'prompt 8']\n"
        "return numpy.array([HALF * (a == t) for a, t in zip(answers, targets)])"
    )
    function = own(tmp_path, body)
    assert function(ANSWERS) == [0.5, 0.0]
    assert function(ANSWERS) == [0.5, 0.0]


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return [1 / (a != 'bad') for a in answers]", "raised ZeroDivisionError: division by zero (line 2) for the answer 'bad' to rows.jsonl:8"),
        ("return [1.0, float('nan')]", "must return finite numbers, got nan for the answer 'bad' to rows.jsonl:8"),
        ("return [1.0, '1.0']", "must return numbers, got '1.0' for the answer 'bad' to rows.jsonl:8"),
        ("import sys\nsys.exit(3 if 'bad' in answers else 4)", "raised SystemExit: 4 (line 3) for the answer 'good' to rows.jsonl:7"),
    ],
)  # fmt: skip
def test_a_function_that_misbehaves_is_one_error_with_the_row(
    body: str, problem: str, tmp_path: Path
) -> None:
    """What it did, in which line, and for which answer of which row."""
    with pytest.raises(RewardError) as caught:
        own(tmp_path, body)(ANSWERS)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return [1.0]", "must return 2 numbers, one for each answer, got 1 for the 2 answers to rows.jsonl:7 to rows.jsonl:8"),
        ("return '11'", "must return a list of 2 numbers, got str for the 2 answers to rows.jsonl:7 to rows.jsonl:8"),
        ("if len(answers) > 1: raise ValueError('two')\nreturn [1]", "raised ValueError: two (line 2), with none of them alone, for the 2 answers to rows.jsonl:7 to rows.jsonl:8"),
    ],
)  # fmt: skip
def test_a_mistake_of_the_whole_batch_is_named(body: str, problem: str, tmp_path: Path) -> None:
    """The wrong number or kind of results, and an error that no answer alone causes."""
    with pytest.raises(RewardError) as caught:
        own(tmp_path, body)(ANSWERS)
    assert problem in str(caught.value)


@pytest.mark.slow
def test_a_function_that_hangs_or_dies_is_ended_and_named(tmp_path: Path) -> None:
    """Its process is killed; the next call starts another."""
    hangs = "import time\nif 'bad' in answers: time.sleep(60)\nreturn [1.0] * len(answers)"
    function = own(tmp_path, hangs, max_seconds=1)
    with pytest.raises(RewardError) as caught:
        function(ANSWERS)
    assert "took more than 1 seconds for the answer 'bad' to rows.jsonl:8" in str(caught.value)
    assert function(ANSWERS[:1]) == [1.0]
    with pytest.raises(RewardError) as caught:
        own(tmp_path, "import os\nos._exit(1)")(ANSWERS)
    assert "ended its process for the answer 'good' to rows.jsonl:7" in str(caught.value)


def test_a_file_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    """It is missing, has no such function, or is not Python."""
    with pytest.raises(UserError, match=r"^grpo\.rewards: .*none\.py: not found"):
        OwnFunction(f"{tmp_path / 'none.py'}:score", 1)
    own(tmp_path, "return []")
    with pytest.raises(UserError, match="the file has no function other"):
        OwnFunction(f"{tmp_path / 'mine.py'}:other", 1)([])
    (tmp_path / "mine.py").write_text("def score(:\n", encoding="utf-8")
    with pytest.raises(UserError, match="raised SyntaxError"):
        OwnFunction(f"{tmp_path / 'mine.py'}:score", 1)([])
