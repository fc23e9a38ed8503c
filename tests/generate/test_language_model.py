"""tinylm.load, and the examples of docs/PYTHON.md."""

import re
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

import tinylm
from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, SamplingConfig
from tinylm.generate import language_model
from tinylm.generate.chat import format_prompt
from tinylm.generate.engine import Engine
from tinylm.generate.language_model import LanguageModel
from tinylm.model.decoder import Decoder
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "PYTHON.md").read_text(encoding="utf-8")
SHAPE = {"vocab_size": 260, "max_seq_len": 256, "d_model": 16, "n_heads": 2, "n_layers": 1}


def write_checkpoint(path: Path, stage: str, **more: object) -> Path:
    """A checkpoint with random weights."""
    config = Config.model_validate(
        {"model": SHAPE, "training": {"seq_len": 32}, "sampling": {"max_new_tokens": 8, "seed": 5}}
    )
    torch.manual_seed(0)
    state = state_of(config, Decoder(config.model), stage, step=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_format.write(path, state | more)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a base model and a tuned one."""
    folder = tmp_path_factory.mktemp("python")
    write_checkpoint(folder / "checkpoints" / "final.ckpt", "pretrain")
    write_checkpoint(folder / "checkpoints" / "sft" / "final.ckpt", "sft", system="Be kind.")
    return folder


@pytest.fixture
def base(folder: Path) -> LanguageModel:
    return tinylm.load(folder / "checkpoints" / "final.ckpt", device="cpu")


@pytest.fixture
def tuned(folder: Path) -> LanguageModel:
    return tinylm.load(str(folder / "checkpoints" / "sft" / "final.ckpt"), device="cpu")


@pytest.mark.slow
def test_the_examples_of_the_page_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/PYTHON.md", "exec"), names)  # noqa: S102  (our own page)
    assert "temperature: Input should be greater than or equal to 0" in capsys.readouterr().out


def test_the_lazy_function_has_the_arguments_of_the_one_it_calls() -> None:
    """Names and defaults; help(tinylm.load) shows them without importing torch."""
    lazy, real = (signature(load).parameters for load in (tinylm.load, language_model.load))
    assert [(p.name, p.kind, p.default) for p in lazy.values()] == [
        (p.name, p.kind, p.default) for p in real.values()
    ]


def test_texts_are_those_of_the_engine(base: LanguageModel) -> None:
    engine = Engine(base.model, base.tokenizer)
    settings = SamplingConfig(max_new_tokens=8, seed=5)
    expected = [engine.generate(text, settings)[0].text for text in ("ab", "c")]
    assert base.generate(["ab", "c"]) == expected
    assert base.generate("ab") == expected[0]
    assert "".join(base.stream("ab")) == expected[0]


def test_several_samples_are_a_list_for_each_prompt(base: LanguageModel) -> None:
    engine = Engine(base.model, base.tokenizer)
    settings = SamplingConfig(max_new_tokens=8, seed=5, n_samples=3)
    expected = [completion.text for completion in engine.generate("ab", settings)]
    assert len(set(expected)) > 1
    assert base.generate("ab", n_samples=3) == expected
    assert base.generate(["ab", "ab"], n_samples=3) == [expected, expected]
    assert base.generate([]) == []


def test_an_answer_is_asked_for_in_the_template(tuned: LanguageModel) -> None:
    """With the system text of the rows, unless another is given or "" for none."""
    engine, tokenizer = tuned.engine, tuned.tokenizer
    template = make_template("instruction", tokenizer)
    settings = SamplingConfig(max_new_tokens=8, seed=5)
    for system, meant in ((None, "Be kind."), ("Short.", "Short."), ("", None)):
        question = format_prompt(engine, "red?", template, system=meant)
        answers = engine.generate(question.prompt, settings, stop_ids=question.stop_ids)
        assert tuned.chat("red?", system=system) == answers[0].text.strip()
        messages = [{"role": "user", "content": "red?"}]
        assert "".join(tuned.chat_stream(messages, system=system)) == answers[0].text


def test_messages_are_the_turns_of_a_conversation(tuned: LanguageModel) -> None:
    engine, template = tuned.engine, make_template("instruction", tuned.tokenizer)
    turns = (Turn("system", "S"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    question = format_prompt(engine, turns, template)
    settings = SamplingConfig(max_new_tokens=8, seed=5)
    [answer] = engine.generate(question.prompt, settings, stop_ids=question.stop_ids)
    assert tuned.chat([{"role": t.role, "content": t.text} for t in turns]) == answer.text.strip()


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "the last message must be the user's"),
        ([{"role": "assistant", "content": "x"}], "the last message must be the user's"),
        ([{"role": "tool", "content": "x"}], "message 1: role must be one of system, user"),
        ([{"role": "user"}], "message 1: content must be text, got None"),
    ],
)
def test_odd_messages_are_one_line(
    messages: list[dict[str, str]], problem: str, tuned: LanguageModel
) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        tuned.chat(messages)


def test_what_cannot_be_is_one_line(base: LanguageModel, tuned: LanguageModel) -> None:
    with pytest.raises(UserError, match="a base model, which continues text"):
        base.chat("x")
    with pytest.raises(UserError, match="foo: .*The settings are max_new_tokens, temperature"):
        base.generate("x", foo=1)
    with pytest.raises(UserError, match="n_samples: must be 1 here"):
        tuned.chat("x", n_samples=2)
    with pytest.raises(UserError, match="the messages have one too"):
        tuned.chat(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], system=""
        )
    with pytest.raises(UserError, match="not found"):
        tinylm.load("no.ckpt")
    with pytest.raises(AttributeError, match="no attribute 'save'"):
        tinylm.save  # noqa: B018


def test_a_score_is_that_of_the_logits(base: LanguageModel) -> None:
    score = base.score("ab", "cd")
    ids = torch.tensor([base.tokenizer.encode("abcd")])
    with torch.no_grad():
        log_probs = base.model(ids)[0].log_softmax(-1)
    expected = [log_probs[position - 1, ids[0, position]].item() for position in (2, 3)]
    assert score.log_probs == pytest.approx(expected, abs=1e-5)


def test_unknown_weights_are_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="weights: must be one of fp32, bf16, int8, int4, got"):
        tinylm.load(folder / "none.ckpt", device="cpu", weights="fp16")


def test_weights_in_8_bits_and_a_deterministic_engine(folder: Path) -> None:
    path = folder / "checkpoints" / "final.ckpt"
    exact = tinylm.load(path, device="cpu", deterministic=True)
    rounded = tinylm.load(path, device="cpu", weights="int8")
    assert exact.engine.deterministic
    assert rounded.score("ab", "cd").log_prob != exact.score("ab", "cd").log_prob
    assert rounded.score("ab", "cd").log_prob == pytest.approx(
        exact.score("ab", "cd").log_prob, abs=0.2
    )


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, tinylm; print(sorted({'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout == "[]\n"
