"""infer.py: stdout, stderr, rejected flags, and how it stops (FAULTS C2, C4, F6, H1, J1, J2)."""

import io
import json
import os
import pickle
import pty
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import infer
from tests import programs
from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.cli import chat
from tinylm.cli.sampling_flags import flag, sampling_help
from tinylm.cli.screen import ProbabilityColors
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, SamplingConfig
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import Engine
from tinylm.generate.output import Prompt, TokenOutput
from tinylm.model.decoder import Decoder

ROOT = Path(__file__).parents[2]
HELP = "See python infer.py --help."


def checkpoint_state(text: str, *, step: int = 7, **sampling: object) -> dict:
    """The state of a checkpoint whose model continues any prompt of one token with `text`.

    Only the position p matters: its embedding is the unit vector p, the blocks add nothing, and the
    head maps p to token p of the text.
    """
    ids = text.encode()
    shape = {
        "vocab_size": 260,
        "max_seq_len": len(ids),
        "d_model": len(ids),
        "n_heads": 1,
        "n_layers": 1,
        "position": "learned",
        "tie_embeddings": False,
    }
    config = Config.model_validate(
        {
            "model": shape,
            "training": {"seq_len": len(ids)},
            "sampling": {"max_new_tokens": len(ids), **sampling},
        }
    )
    model = Decoder(config.model)
    with torch.no_grad():
        for weight in (
            model.embedding.weight,
            model.blocks[0].attention.out.weight,
            model.blocks[0].ffn.down.weight,
            model.head.weight,
        ):
            weight.zero_()
        model.positions.weight.copy_(torch.eye(len(ids)))
        model.head.weight[list(ids), range(len(ids))] = 20.0
    return state_of(config, model, "pretrain", step)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint whose model generates the given text."""

    def write(text: str = " all you need.", name: str = "step-000007.ckpt", **more: object) -> Path:
        path = tmp_path / name
        checkpoint_format.write(path, checkpoint_state(text, **more))
        return path

    return write


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """Run the program in this process: exit code, stdout, stderr."""

    def program(*flags: object) -> tuple[int, str, str]:
        code = infer.main([str(flag) for flag in flags])
        return (code, *capsys.readouterr())

    return program


def start(*flags: object, **more: object) -> subprocess.Popen:
    """Start the program as a user does."""
    streams = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | more
    return programs.Program([sys.executable, ROOT / "infer.py", *map(str, flags)], **streams)


# --- results and logs -------------------------------------------------------------------------


def test_the_text_goes_to_stdout_and_the_rest_to_stderr(run, save):
    path = save()
    code, out, err = run("--ckpt", path, "--prompt", "x", "--device", "cpu")
    assert (code, out) == (0, "x all you need.\n")
    lines = err.splitlines()
    assert lines[:2] == ["device: cpu (requested)", f"checkpoint: {path}, stage pretrain, step 7"]
    assert re.fullmatch(r"14 tokens in \d+\.\d s, \d+ tokens/s", lines[2])
    assert len(lines) == 3


def test_the_latest_valid_checkpoint_is_the_default_and_a_damaged_one_is_logged(
    run, save, tmp_path
):
    save("old..", name="step-000001.ckpt", step=1)
    save("right", name="step-000002.ckpt", step=2)
    save("worse", name="step-000003.ckpt", step=3).write_bytes(b"")
    code, out, err = run("--dir", tmp_path, "--prompt", "x")
    assert (code, out) == (0, "xright\n")
    assert f"skipped: {tmp_path / 'step-000003.ckpt'}: damaged: the file is empty." in err


def test_json_has_each_completion_with_its_tokens(run, save):
    path = save()
    code, out, _ = run(
        "--ckpt", path, "--prompt", "x", "--n-samples", 2, "--stop", "you", "--json", "--show-probs"
    )
    assert code == 0
    printed = json.loads(out)
    assert {key: printed[key] for key in ("prompt", "checkpoint", "step")} == {
        "prompt": "x",
        "checkpoint": str(path),
        "step": 7,
    }
    assert len(printed["completions"]) == 2
    first = printed["completions"][0]
    assert (first["text"], first["finish_reason"], first["prompt_tokens"], first["truncated"]) == (
        " all ",
        "stop",
        1,
        0,
    )
    assert bytes(first["ids"]) == b" all you"
    assert [token["token"] for token in first["tokens"]] == list(" all you")
    assert all(0.99 < token["probability"] <= 1 for token in first["tokens"])


def test_every_sample_is_shown_under_its_number(run, save):
    _, out, _ = run("--ckpt", save("abc"), "--prompt", "x", "--n-samples", 3)
    assert out == "--- 1 of 3\nxabc\n--- 2 of 3\nxabc\n--- 3 of 3\nxabc\n"


def test_without_color_each_token_is_followed_by_its_probability(run, save):
    _, out, err = run("--ckpt", save("a\né"), "--prompt", "x", "--show-probs")
    assert out == "a(1.00) \\n(1.00) \\xc3(1.00) \\xa9(1.00) \n"
    assert "probability" not in err


def test_the_flag_deterministic_reaches_the_engine(run, save, monkeypatch):
    """Always 8 slots: with as many as samples, a text would depend on their number."""
    made: list[Engine] = []
    original = Engine.__init__

    def init(self: Engine, *args: object, **settings: object) -> None:
        original(self, *args, **settings)
        made.append(self)

    monkeypatch.setattr(Engine, "__init__", init)
    path = save("abcdef")
    for flags in ([], ["--deterministic"]):
        run("--ckpt", path, "--prompt", "a", "--n-samples", 9, "--max-new-tokens", 1, *flags)
    assert [(engine.slots, engine.deterministic) for engine in made] == [(9, False), (8, True)]


def test_weights_are_rounded_if_it_costs_at_most_the_bound(run, save):
    """The model knows its text by heart: a bound below 0 is passed by none."""
    path = save("abcdef")
    arguments = ("--ckpt", path, "--prompt", "x", "--weights", "int8")
    code, out, err = run(*arguments)
    assert (code, out) == (0, "xabcdef\n")
    assert "weights: int8, bits per byte of its own text" in err
    code, out, err = run(*arguments, "--max-bpb-rise", "-1")
    assert (code, out) == (2, "")
    assert "--weights: int8 raises the bits per byte of the model's own text from" in err
    assert "by more than -1. Use --weights fp32, or allow it with --max-bpb-rise." in err


def test_defaults_come_from_the_checkpoint_and_flags_override_them(run, save):
    path = save("one two three", stop=["two"], top_k=1)
    assert run("--ckpt", path, "--prompt", "x")[1] == "xone \n"
    assert (
        run("--ckpt", path, "--prompt", "x", "--stop", "three", "--top-k", "none")[1]
        == "xone two \n"
    )


def test_the_settings_that_beam_search_ignores_are_logged(run, save):
    code, out, err = run("--ckpt", save(), "--prompt", "x", "--n-beams", 3)
    assert (code, out) == (0, "x all you need.\n")
    assert "beam search ignores temperature, top_k, top_p, min_p and seed" in err


def test_a_truncated_prompt_is_logged(run, save):
    _, _, err = run("--ckpt", save("abcde"), "--prompt", "0123456", "--max-new-tokens", 2)
    assert "prompt: 7 tokens, but the context holds 5: the first 2 are dropped" in err


@pytest.mark.parametrize("flags", [["--prompt", "-"], []])
def test_a_piped_prompt_loses_its_last_newline_only(run, save, monkeypatch, flags):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n\n".encode()), encoding="utf-8")
    )
    code, out, _ = run("--ckpt", save("0123"), "--json", "--max-new-tokens", 1, *flags)
    assert (code, json.loads(out)["prompt"]) == (0, "é\n")


def test_another_tokenizer_of_the_same_size_is_accepted(run, save):
    assert run("--ckpt", save(), "--prompt", "x", "--tokenizer", "byte")[1] == "x all you need.\n"


# --- a fine-tuned model -----------------------------------------------------------------------


class Parrot:
    """Make every engine generate a fixed answer, and record the prompts.

    The answer to "red" is RED, and so on: upper case, with the whitespace of the template, ended by
    the template's token.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, endless: bool = False):
        self.asked: list[str] = []
        self.endless = endless
        parrot = self

        def stream(
            engine: Engine,
            prompt: Prompt,
            sampling: SamplingConfig,
            *,
            stop_ids: Iterable[int] = (),
            constraint: Constraint | None = None,
            lookup: bool = False,
        ) -> Iterator[TokenOutput]:
            text = engine.tokenizer.decode(prompt.ids)
            parrot.asked.append(text)
            assert tuple(stop_ids) == ((259, 258) if "### Output:" in text else ())
            question = text.removesuffix("\n### Output:").rpartition("Instruction: ")[2]
            answer = f" {question.upper()}\n"
            for id in answer.encode():
                yield TokenOutput(chr(id), id, 0.0)
                if parrot.endless and id == ord("!"):
                    raise KeyboardInterrupt
            yield TokenOutput("", 259, 0.0, finish_reason="eos")

        monkeypatch.setattr(Engine, "stream", stream)


@pytest.fixture
def tuned(tmp_path: Path) -> Callable[..., Path]:
    """Write a fine-tuned checkpoint."""

    def write(name: str = "sft.ckpt", context: int = 400, **more: object) -> Path:
        path = tmp_path / name
        checkpoint_format.write(path, checkpoint_state("x" * context) | {"stage": "sft"} | more)
        return path

    return write


def piped(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Replace standard input."""
    raw = text.encode() if isinstance(text, str) else text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


@pytest.mark.slow
def test_a_fine_tuned_model_is_prompted_in_its_template_and_only_its_answer_is_printed(
    run, tuned, monkeypatch
):
    """<|sep|> (259), which ends an answer, is not printed, nor is the template's whitespace."""
    parrot = Parrot(monkeypatch)
    code, out, err = run("--ckpt", tuned(), "--prompt", "red")
    assert (code, out) == (0, "RED\n")
    assert parrot.asked == ["### Instruction: red\n### Output:"]
    assert (
        "template: instruction, as in fine-tuning; --no-wrap continues the prompt as plain text"
        in err
    )
    printed = json.loads(
        run("--ckpt", tuned(), "--prompt", "red", "--json", "--system", "Be kind.")[1]
    )
    assert (printed["template"], printed["completions"][0]["text"]) == ("instruction", " RED\n")
    assert parrot.asked[-1] == "### System: Be kind.\n### Instruction: red\n### Output:"


def test_a_blank_answer_is_logged(run, tuned, monkeypatch):
    """Otherwise it would look as if nothing had run."""
    Parrot(monkeypatch)
    code, out, err = run("--ckpt", tuned(), "--prompt", "")
    assert (code, out) == (0, "\n")
    assert "the answer is blank: the model generated no text; more training may help" in err


@pytest.mark.parametrize(
    ("stage", "flags"), [("sft", ["--no-wrap"]), ("pretrain", ["--no-wrap"]), ("pretrain", [])]
)
def test_base_models_and_no_wrap_continue_the_prompt_as_plain_text(
    run, tuned, monkeypatch, stage, flags
):
    parrot = Parrot(monkeypatch)
    assert run("--ckpt", tuned(stage=stage), "--prompt", "red", *flags)[1] == "red RED\n\n"
    assert parrot.asked == ["red"]


def test_an_answer_ends_at_the_stop_token_of_its_template_which_is_not_printed(
    run, tuned, tmp_path
):
    """A real model that after the prompt generates " yes", then <|sep|>, then more."""
    question = "### Instruction: red\n### Output:"
    ids = [0] * (len(question) - 1) + [*b" yes", 259, *b"never"]
    made = checkpoint_state("x" * len(ids))
    with torch.no_grad():
        made["weights"]["head.weight"].zero_()
        made["weights"]["head.weight"][ids, range(len(ids))] = 20.0
    path = tuned(weights=made["weights"], config=made["config"])
    assert run("--ckpt", path, "--prompt", "red")[1] == "yes\n"
    assert run("--ckpt", path, "--prompt", "red", "--n-beams", "2")[1] == "yes\n"
    assert (
        run("--ckpt", path, "--prompt", question, "--no-wrap", "--max-new-tokens", "10")[1]
        == f"{question} yesnever\n"
    )


# --- constrained output ---


@pytest.mark.slow
def test_the_text_is_json_by_a_schema_in_a_file_or_on_the_command_line(
    run, tuned, save, tmp_path, monkeypatch
):
    """The model would write x; each of two samples, and each answer of a chat, is one of two objects."""
    pytest.importorskip("llguidance")
    schema = (
        '{"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], '
        '"additionalProperties": false}'
    )
    path = tmp_path / "schema.json"
    path.write_bytes(b"\xef\xbb\xbf" + schema.encode())  # with a byte order mark
    flags = ["--ckpt", save("x" * 60), "--temperature", "2"]
    for given in (schema, path):
        out = run(*flags, "--prompt", "x", "--n-samples", 2, "--json", "--json-schema", given)[1]
        for completion in json.loads(out)["completions"]:
            assert json.loads(completion["text"])["ok"] in (True, False)
            assert completion["finish_reason"] == "stop"
    piped(monkeypatch, "red\nblue\n")
    code, out, _ = run("--ckpt", tuned(), "--chat", "--json-schema", schema)
    answers = re.findall(r"\{[^}]*\}", out)  # JSON may have line ends
    assert [type(json.loads(answer)["ok"]) for answer in answers] == [bool, bool]


def test_a_text_that_was_cut_off_before_it_was_complete_is_logged(run, save):
    pytest.importorskip("llguidance")
    path = save("x" * 60)
    flags = ["--ckpt", path, "--prompt", "x", "--regex", "[0-9]{9}"]
    code, out, err = run(*flags)
    assert re.fullmatch("x[0-9]{9}\n", out) and "complete" not in err
    code, out, err = run(*flags, "--max-new-tokens", 5, "--n-samples", 2)
    assert (
        "2 of 2 texts ended before the regular expression was complete; raise --max-new-tokens"
        in err
    )


def test_a_schema_that_cannot_be_read_is_named(run, tmp_path):
    pytest.importorskip("llguidance")
    path = tmp_path / "schema.json"
    flags = ["--prompt", "x", "--json-schema", path]
    assert error_of(run(*flags)).startswith(f"--json-schema: {path}: not found")
    path.write_bytes(b"\xff")
    assert error_of(run(*flags)) == (
        f"--json-schema: {path}: not UTF-8 text (byte 0). Convert it to UTF-8."
    )
    path.write_text("{,", encoding="utf-8")
    assert error_of(run(*flags)).startswith(
        f"--json-schema: {path}: not a supported JSON schema: Expecting property name"
    )


@pytest.mark.slow
def test_greedy_text_with_lookup_is_the_same(run, tuned, save, monkeypatch):
    """In prompt mode, and two answers of a chat."""
    flags = ["--ckpt", save("abcdabcdabcdabcd"), "--prompt", "x", "--temperature", 0]
    assert run(*flags, "--lookup")[1] == run(*flags)[1] == "xabcdabcdabcdabcd\n"
    flags = ["--ckpt", tuned(), "--chat", "--temperature", 0, "--max-new-tokens", 30]
    texts = []
    for more in ([], ["--lookup"]):
        piped(monkeypatch, "red\nblue\n")
        texts.append(run(*flags, *more)[1])
    assert texts == ["x" * 30 + "\n" + "x" * 30 + "\n"] * 2


# --- a conversation ---------------------------------------------------------------------------


def test_a_chat_answers_each_line_and_remembers(run, tuned, monkeypatch):
    """/reset forgets; blank lines, unknown commands and invalid UTF-8 are not questions."""
    parrot = Parrot(monkeypatch)
    piped(monkeypatch, b"red\nblue\r\n\n/nonsense\n/reset\ngreen" + b"\n\xff\n/exit\nnever\n")
    code, out, err = run("--ckpt", tuned(), "--chat", "--system", "Be kind.")
    assert (code, out) == (0, "RED\nBLUE\nGREEN\n")
    system = "### System: Be kind.\n"
    red, blue, green = (
        f"### Instruction: {word}\n### Output:" for word in ("red", "blue", "green")
    )
    assert parrot.asked == [f"{system}{red}", f"{system}{red} RED\n{blue}", f"{system}{green}"]
    assert err.splitlines()[-4:] == [
        "chat: one question per line; /reset forgets the conversation, "
        "/exit or Ctrl-D quits, Ctrl-C stops an answer",
        "/nonsense: unknown command; the commands are /reset and /exit",
        "conversation reset",
        "error: standard input: not UTF-8 text. The line is skipped.",
    ]


def test_a_chat_drops_its_oldest_exchanges_when_the_context_is_full(run, tuned, monkeypatch):
    """50 of 100 positions are for the answer; two questions of 32 bytes each do not fit."""
    parrot = Parrot(monkeypatch)
    piped(monkeypatch, "red\nblue\n" + "long" * 30 + "\n")
    code, out, err = run("--ckpt", tuned(context=100), "--chat")
    assert (code, out) == (0, f"RED\nBLUE\n{('long' * 30).upper()[-88:]}\n")
    assert parrot.asked[1] == "### Instruction: blue\n### Output:"
    assert err.count("the context is full: the oldest exchanges are dropped (1)") == 2
    assert "but the context holds 100: the first " in err


def test_a_question_that_cannot_be_asked_does_not_end_the_chat(run, tuned, monkeypatch):
    """The tokenizer cannot encode x."""
    from tinylm.tokenizer.byte_char import CharTokenizer

    tokenizer = CharTokenizer("### Instruction: \n### Output:abcd", unknown="error")
    made = checkpoint_state("x" * 400)
    config = made["config"] | {
        "model": made["config"]["model"] | {"vocab_size": 260},
        "tokenizer": {"kind": "char"},
    }
    monkeypatch.setattr(
        Engine,
        "stream",
        lambda engine, prompt, sampling, *, stop_ids=(), constraint=None, lookup=False: iter(
            [TokenOutput("!", 0, 0.0, finish_reason="eos")]
        ),
    )
    piped(monkeypatch, "x\na\n")
    code, out, err = run("--ckpt", tuned(config=config, tokenizer=tokenizer.to_plain()), "--chat")
    assert (code, out) == (0, "!\n")
    assert "error: " in err and "'x'" in err


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_its_printed_part_is_remembered(run, tuned, monkeypatch):
    """On a terminal; in a pipe it ends the program, as in all programs."""
    parrot = Parrot(monkeypatch, endless=True)
    for typed, expected in ((True, (0, "STOP!\nGO\n")), (False, (130, "STOP!\n"))):
        piped(monkeypatch, "stop! here\ngo\n")
        monkeypatch.setattr(chat, "input_lines", lambda typed: iter(["stop! here", "go"]))
        monkeypatch.setattr(sys.stdin, "isatty", lambda typed=typed: typed, raising=False)
        code, out, _ = run("--ckpt", tuned(), "--chat")
        assert (code, out) == expected
    assert (
        parrot.asked[1]
        == "### Instruction: stop! here\n### Output: STOP!\n### Instruction: go\n### Output:"
    )


def test_an_answer_cannot_steer_a_terminal(run, tuned, monkeypatch):
    """J1, in a chat: ESC, OSC 52 and bidi are printed as escapes; the history keeps them."""
    text = "\x1b[2J\x1b]52;c;eA==\x07\u202e!"
    monkeypatch.setattr(
        Engine,
        "stream",
        lambda engine, prompt, sampling, *, stop_ids=(), constraint=None, lookup=False: iter(
            [TokenOutput(text, 0, 0.0, finish_reason="eos")]
        ),
    )
    piped(monkeypatch, "red\x1b\n/\x1b[31m\n")
    _, out, err = run("--ckpt", tuned(), "--chat")
    assert out == 2 * "\\x1b[2J\\x1b]52;c;eA==\\x07\\u202e!\n"
    assert "\x1b" not in out + err


@pytest.mark.slow
def test_a_chat_uses_the_latest_fine_tuned_checkpoint_of_the_folder_or_its_subfolders(
    run, tuned, save, monkeypatch, tmp_path
):
    """The latest by time of creation over all runs; base models are skipped."""
    Parrot(monkeypatch)
    save(name="step-000900.ckpt")
    for folder, created in (("a", 5.0), ("b", 9.0), ("c", 7.0)):
        tuned(
            f"{folder}/step-000001.ckpt", created=created, stage="dpo" if folder == "b" else "sft"
        )
    piped(monkeypatch, "red\n")
    code, out, err = run("--dir", tmp_path, "--chat")
    assert (code, out) == (0, "RED\n")
    assert f"checkpoint: {tmp_path / 'b' / 'step-000001.ckpt'}, stage dpo, step 7" in err
    others = ", ".join(str(tmp_path / name / "step-000001.ckpt") for name in "ca")
    assert f"newest of 3 fine-tuned models; --ckpt opens another: {others}\n" in err


def test_a_folder_without_checkpoints_names_its_folders_that_have_some(run, save, tmp_path):
    (tmp_path / "sft").mkdir()
    save(name="sft/step-000001.ckpt")
    fix = f"Give one of its folders: --dir {tmp_path / 'sft'}."
    message = error_of(run("--dir", tmp_path, "--prompt", "x"))
    assert message == f"{tmp_path}: contains no checkpoint. {fix}"


def test_the_default_is_the_model_that_the_run_ended_with(run, save, tmp_path):
    """Early stopping: final.ckpt is an earlier step, and step 3 ended the run."""
    training = checkpoint_state("right")["config"]["training"]
    training |= {"max_steps": 9, "early_stopping_patience": 1}
    ended = {"config": checkpoint_state("worse")["config"] | {"training": training}}
    ended |= {"progress": {"validations": [[2, 1.0], [3, 2.0]]}}
    save("right", name="final.ckpt", step=2)
    save("worse", name="step-000003.ckpt", step=3)
    path = tmp_path / "step-000003.ckpt"
    checkpoint_format.write(path, checkpoint_state("worse") | {"step": 3} | ended)
    code, out, err = run("--dir", tmp_path, "--prompt", "x")
    assert (code, out) == (0, "xright\n")
    assert f"checkpoint: {tmp_path / 'final.ckpt'}, stage pretrain, step 2\n" in err


@pytest.mark.slow
def test_a_malicious_or_endless_chat_template_is_one_error(run, tuned, monkeypatch):
    """H4: the template is part of the checkpoint; the second one is endless only when asked."""
    from tests.training.test_finetune import OWN_TEMPLATE, byte_level

    made = checkpoint_state("x" * 400)["config"]
    for source, words in (
        ("{{ ''.__class__.__mro__ }}", "chat template"),
        (
            OWN_TEMPLATE
            + "{% if 'loop' in messages[0].content %}{% for a in range(99999) %}{% for b in "
            "range(99999) %}{% endfor %}{% endfor %}{% endif %}",
            "",
        ),
    ):
        plain = byte_level().to_plain() | {"chat_template": source}
        path = tuned(
            config=made | {"data": made["data"] | {"template": "chat_template"}}, tokenizer=plain
        )
        piped(monkeypatch, "loop\nhello\n")
        code, out, err = run("--ckpt", path, "--chat", "--max-new-tokens", "2")
        assert code == (2 if words else 0)
        assert "Traceback" not in err
        assert words or ("took more than 5 seconds" in err and len(out.splitlines()) == 1)


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (
            "sft",
            ["--chat", "--prompt", "x"],
            "--prompt: cannot be combined with --chat. Remove one of the two.",
        ),
        (
            "sft",
            ["--chat", "--json"],
            "--json: cannot be combined with --chat. Remove one of the two.",
        ),
        (
            "sft",
            ["--chat", "--n-samples", "2"],
            "--n-samples: cannot be combined with --chat. Remove one of the two.",
        ),
        (
            "sft",
            ["--prompt", "x", "--regex", "a", "--json-schema", "{}"],
            "--json-schema: cannot be combined with --regex. Remove one of the two.",
        ),
        (
            "sft",
            ["--prompt", "x", "--lookup"],
            "lookup: only valid for one greedy text; set temperature to 0.",
        ),
        (
            "sft",
            ["--prompt", "x", "--lookup", "--best-of", "2", "--verifier", "x"],
            "--lookup: cannot be combined with --best-of. Remove one of the two.",
        ),
        (
            "sft",
            ["--prompt", "x", "--regex", "a", "--n-beams", "2"],
            "--regex: not supported with beam search. Set n_beams to 1.",
        ),
        (
            "sft",
            ["--prompt", "x", "--json-schema", '{"not": {}}'],
            '--json-schema: not a supported JSON schema: Unimplemented keys: ["not"]. Change it.',
        ),
        (
            "sft",
            ["--prompt", "x", "--system", "y", "--no-wrap"],
            "--system: only valid for a fine-tuned model, without --no-wrap. Remove it.",
        ),
        (
            "pretrain",
            ["--prompt", "x", "--system", "y"],
            "--system: only valid for a fine-tuned model, without --no-wrap. Remove it.",
        ),
        (
            "pretrain",
            ["--chat"],
            "is a base model, which continues text and does not answer questions. "
            "Fine-tune it first (python finetune.py",
        ),
    ],
)
def test_flags_that_cannot_be_combined_are_rejected(run, tuned, monkeypatch, stage, flags, message):
    piped(monkeypatch, "red\n")
    assert message in error_of(run("--ckpt", tuned(stage=stage), *flags))


def test_a_chat_needs_a_fine_tuned_checkpoint_and_an_input(run, save, tmp_path, monkeypatch):
    save()
    piped(monkeypatch, "red\n")
    assert error_of(run("--dir", tmp_path, "--chat")).startswith(
        f"{tmp_path}: contains no fine-tuned checkpoint, nor does a folder in it. Fine-tune a model"
    )
    monkeypatch.setattr(sys, "stdin", None)
    assert (
        error_of(run("--chat"))
        == "--chat: standard input is closed. Start it in a terminal, or pipe questions into it, one per line."
    )


@pytest.mark.slow
def test_a_chat_on_a_terminal_continues_after_a_stopped_answer(save, tuned, tmp_path):
    """A real terminal: Ctrl-C during the answer, Ctrl-C at the prompt sign, then /exit."""
    path = tuned(config=checkpoint_state("x" * 400, max_new_tokens=1_000_000)["config"])
    ours, theirs = pty.openpty()
    program = start(
        "--ckpt",
        path,
        "--chat",
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)
    received = b""

    def wait_for(what: bytes) -> None:
        nonlocal received
        while what not in received:
            received += os.read(ours, 4096)
        received = received.partition(what)[2]

    def interrupt_until(what: bytes) -> None:
        """Ctrl-C, again after 2 s of silence: readline misses one between its prompt and its wait."""
        nonlocal received
        program.send_signal(signal.SIGINT)
        while what not in received:
            if select.select([ours], [], [], 2.0)[0]:
                received += os.read(ours, 4096)
            else:
                program.send_signal(signal.SIGINT)
        received = received.partition(what)[2]

    wait_for(b"> ")
    os.write(ours, b"red\n")
    wait_for(b"xxxxxxxx")
    interrupt_until(b"> ")
    interrupt_until(b"> ")
    os.write(ours, b"/exit\n")
    assert program.wait(timeout=30) == 0
    os.close(ours)


# --- mistakes ---------------------------------------------------------------------------------


def error_of(result: tuple[int, str, str]) -> str:
    """The error line of a program that failed, without `error: `."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    return err.splitlines()[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--temperature", "-1"],
            f"--temperature: must be greater than or equal to 0, got -1. {HELP}",
        ),
        (["--temperature", "nan"], f"--temperature: must be a finite number, got nan. {HELP}"),
        (
            ["--temperature", "warm"],
            f"--temperature: must be a valid number, got 'warm'. {HELP}",
        ),
        (["--temperature", "none"], f"--temperature: must be a valid number, got None. {HELP}"),
        (["--top-k", "0"], f"--top-k: must be greater than or equal to 1, got 0. {HELP}"),
        (["--top-k", "2.5"], f"--top-k: must be a valid integer, got 2.5. {HELP}"),
        (["--top-p", "1.1"], f"--top-p: must be less than or equal to 1, got 1.1. {HELP}"),
        (
            ["--max-new-tokens", "9" * 5000],
            f"--max-new-tokens: must be a valid integer, got inf. {HELP}",
        ),
        (["--seed", "\x1b[31m"], f"--seed: must be a valid integer, got '\\x1b[31m'. {HELP}"),
        (["--stop", ""], f"--stop: must have at least 1 character, got ''. {HELP}"),
        (
            ["--n-beams", "2", "--n-samples", "2"],
            "--n-beams: --n-samples: beam search generates one text. Set one of them to 1.",
        ),
    ],
)
def test_an_out_of_range_flag_is_named(run, flags, message):
    """Checked before the checkpoint is loaded: there is none."""
    assert error_of(run("--prompt", "x", *flags)) == message


@pytest.mark.parametrize("name", SamplingConfig.model_fields)
@pytest.mark.parametrize("value", ["0", "-1", "1e308", "nan", "", "none", "[1]"])
def test_no_value_of_a_sampling_flag_causes_a_traceback(run, save, name, value):
    """F7: the program runs, or prints one error line."""
    code, _, err = run(
        "--ckpt",
        save("abc"),
        "--prompt",
        "x",
        "--max-new-tokens",
        "3",
        f"{flag(name)}={value}",
    )
    assert (code == 0) != err.splitlines()[-1].startswith("error: --")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dir", "nowhere"],
            "nowhere: contains no checkpoint. Train one (python train.py --config "
            "config_smoke.yaml), or give --ckpt FILE.",
        ),
        (
            ["--ckpt", "nowhere.ckpt"],
            "nowhere.ckpt: not found in {cwd}. Give a .ckpt file; `python list.py` lists them.",
        ),
        (
            ["--prompt", "\udcff"],
            "--prompt: not UTF-8 text. Type it in a UTF-8 terminal, or pipe a UTF-8 file "
            "into the program.",
        ),
    ],
)
def test_a_missing_input_is_named(run, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert error_of(run("--prompt", "x", *flags)) == message.format(cwd=tmp_path)


def test_without_a_prompt_the_program_does_not_wait_for_one(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert error_of(run()).startswith('--prompt: missing. Give --prompt "Attention is"')


def test_piped_bytes_that_are_not_utf8_are_an_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    assert error_of(run()) == "standard input: not UTF-8 text (byte 2). Convert it to UTF-8."


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_unavailable_device_is_an_error(run, save):
    """F6."""
    assert error_of(run("--ckpt", save(), "--prompt", "x", "--device", "cuda")).startswith(
        "--device: cuda is not available with PyTorch"
    )


def test_a_tokenizer_of_another_size_is_rejected(run, save, tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<eos>": 1}, "a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}', encoding="utf-8")
    message = error_of(run("--ckpt", save(), "--prompt", "x", "--tokenizer", tmp_path))
    assert (
        message
        == f"--tokenizer: {tmp_path} has 2 tokens, but the model was trained with 260. Remove --tokenizer."
    )


def test_an_empty_tokenizer_name_is_rejected(run, save):
    message = error_of(run("--ckpt", save(), "--prompt", "x", "--tokenizer", ""))
    assert message == "--tokenizer: is empty. Give auto, byte, or a Hugging Face name or folder."


def test_a_pickle_is_rejected_and_not_executed(run, tmp_path):
    """H1: unpickling it would create the file."""
    path, made = tmp_path / "evil.ckpt", tmp_path / "made"

    class Evil:
        def __reduce__(self):
            return (open, (str(made), "w"))

    path.write_bytes(pickle.dumps(Evil()))
    assert "reading such a file can run code" in error_of(run("--ckpt", path, "--prompt", "x"))
    assert not made.exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(UserError):
        infer.main(["--debug", "--prompt", "x", "--dir", str(tmp_path)])


@pytest.mark.parametrize(
    "flags",
    [
        ["--nonsense\x1b]52;c;x\n"],
        ["--device", "tpu\n"],
        ["--ckpt", "a", "--dir", "b"],
        ["--temp", "1"],
    ],
)
def test_a_wrong_command_line_is_one_line_without_escapes(capsys, flags):
    """J1, J2: argparse alone would print an unknown flag unescaped; abbreviations are rejected."""
    with pytest.raises(SystemExit) as stopped:
        infer.main(flags)
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.endswith(f". {HELP}\n") and err[:-1].isprintable()


# --- safe output ------------------------------------------------------------------------------


def test_generated_text_cannot_steer_a_terminal(run, save):
    """J1: ESC, OSC 52, bidi and carriage return are escaped; newline, tab and joiners are not."""
    text = "\x1b[2J\x1b]52;c;eA==\x07\u202e\r\n\t\xa0👩\u200d👧\x9b"
    _, out, _ = run("--ckpt", save(text), "--prompt", "x")
    assert out == "x\\x1b[2J\\x1b]52;c;eA==\\x07\\u202e\\r\n\t\xa0👩\u200d👧\\x9b\n"


def test_a_prompt_or_path_cannot_forge_a_line(run, save):
    """J2."""
    path = save(name="a\n\x1b[31mdevice: forged.ckpt")
    _, out, err = run("--ckpt", path, "--prompt", "x\x1b[31m", "--max-new-tokens", 1)
    assert "\x1b" not in out + err
    assert "a\\n\\x1b[31mdevice: forged.ckpt" in err


def test_json_is_ascii_and_keeps_every_character(run, save):
    _, out, _ = run("--ckpt", save("\x1b\u202eé"), "--prompt", "x", "--json")
    assert out.isascii() and "\x1b" not in out
    assert json.loads(out)["completions"][0]["text"] == "\x1b\u202eé"


def test_a_token_is_colored_by_its_probability_and_a_split_character_by_the_product():
    """0.8 is green; the two halves of é have 0.8 * 0.5 = 0.4, yellow; a text's end resets it."""
    form = ProbabilityColors()
    log = {p: torch.tensor(p, dtype=torch.float64).log().item() for p in (0.8, 0.5)}
    pieces = [
        ("a", 0.8, None),
        ("", 0.8, None),
        ("é", 0.5, None),
        ("", 0.5, "stop"),
        ("\x1b", 0.8, None),
    ]
    shown = [form(TokenOutput(text, 0, log[p], 0, end)) for text, p, end in pieces]
    assert shown == ["\x1b[32ma\x1b[0m", "", "\x1b[33mé\x1b[0m", "", "\x1b[32m\\x1b\x1b[0m"]


def on_terminal(path: Path, *flags: str, **env: str) -> str:
    """The bytes that a terminal receives as stdout."""
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")}
    program = start(
        "--ckpt",
        path,
        "--prompt",
        "x",
        *flags,
        stdout=theirs,
        env={**clean, "TERM": "xterm", **env},
    )
    os.close(theirs)
    received = b""
    try:
        while block := os.read(ours, 4096):
            received += block
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        pass
    assert program.wait() == 0
    os.close(ours)
    return received.decode()


@pytest.mark.slow
def test_a_terminal_gets_color_except_with_no_color(save):
    """The prompt is dim, likely tokens bright green; without color text is escaped as well."""
    path = save("a\x1b")
    assert (
        on_terminal(path, "--show-probs")
        == "\x1b[2mx\x1b[0m\x1b[92ma\x1b[0m\x1b[92m\\x1b\x1b[0m\r\n"
    )
    assert on_terminal(path, "--show-probs", NO_COLOR="1") == "a(1.00) \\x1b(1.00) \r\n"


# --- the process ------------------------------------------------------------------------------


def imports_of(*command: str | Path) -> list[str]:
    """The modules that a program imports: the time of its start, the same on every machine."""
    python = [sys.executable, "-X", "importtime", *map(str, command)]
    done = subprocess.run(python, capture_output=True, text=True, check=True)
    return re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE)


def packages_of(modules: list[str]) -> set[str]:
    """The packages that do not come with Python."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


def test_help_opens_with_the_command(capsys):
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    assert capsys.readouterr().out.startswith('usage: python infer.py --prompt "Attention is"')


def test_help_imports_nothing_slow():
    modules, of_python = imports_of(ROOT / "infer.py", "--help"), imports_of("-c", "pass")
    assert packages_of(modules) - packages_of(of_python) == {"tinylm"}
    assert len(modules) - len(of_python) < 100


def test_the_help_of_the_sampling_flags_agrees_with_the_schema():
    """They are read from its source text, for a fast --help: pydantic reads the same fields from the class."""
    found = {}
    for name, text in sampling_help().items():
        found[name] = re.fullmatch(r"(.*) \(default: (.*)\)", text).groups()
    expected = {}
    for name, field in SamplingConfig.model_fields.items():
        default = "none" if field.default in (None, ()) else str(field.default)
        expected[name] = (field.description.replace("null", "none"), default)
    assert found == expected


def test_help_shows_every_sampling_setting(capsys):
    with pytest.raises(SystemExit):
        infer.main(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in SamplingConfig.model_fields if flag(name) not in shown] == []


@pytest.mark.slow
def test_the_first_token_imports_little_more_than_torch(save):
    """Neither Lightning nor transformers, which would take longer than torch itself."""
    ask = ("--ckpt", save(), "--prompt", "x", "--max-new-tokens", "1")
    modules, of_torch = imports_of(ROOT / "infer.py", *ask), imports_of("-c", "import torch")
    assert packages_of(modules) - packages_of(of_torch) <= {
        *("annotated_types", "pydantic", "pydantic_core", "typing_inspection"),
        *("filelock", "regex", "tinylm", "yaml"),
        *(name for name in packages_of(modules) if name.startswith("_sysconfigdata")),
    }
    assert len(modules) < 1.3 * len(of_torch)


def cpu_seconds(*command: str | Path) -> float:
    """The processor time of a program that has ended."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python = [sys.executable, *map(str, command)]
    subprocess.run(
        python, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
def test_the_first_token_takes_little_longer_than_the_import_of_torch(save):
    """Under 1.5 times its processor time, in one of at most ten pairs that run one after the other:
    other programs slow down one of the two at times, and never all. Lightning alone would double it.
    """
    ask = ("--ckpt", save(), "--prompt", "", "--max-new-tokens", "1")
    ratios = []
    for _ in range(10):
        ratios.append(cpu_seconds(ROOT / "infer.py", *ask) / cpu_seconds("-c", "import torch"))
        if ratios[-1] < 1.5:
            break
    assert min(ratios) < 1.5


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 3])
def test_ctrl_c_ends_the_text_without_a_traceback(save, presses):
    """C2: the text so far stays; exit code 130, or the signal after a second Ctrl-C."""
    program = start("--ckpt", save("ab"), "--prompt", "x", "--max-new-tokens", 1_000_000)
    assert program.stdout.read(20).startswith(b"xab")
    for _ in range(presses):
        program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=30)
    assert program.returncode in ({130} if presses == 1 else {130, -signal.SIGINT})
    assert b"Traceback" not in err
    assert presses > 1 or err.endswith(b"\nstopped by Ctrl-C\n")


@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error(save):
    """C4: `| head -c 3`."""
    program = start("--ckpt", save("ab"), "--prompt", "x", "--max-new-tokens", 100_000)
    assert program.stdout.read(3) == b"xab"
    program.stdout.close()
    err = program.stderr.read()
    assert (program.wait(timeout=30), b"Traceback" in err, b"Error" in err) == (0, False, False)


@pytest.mark.slow
@pytest.mark.parametrize(("closed", "out"), [("2>&-", "xab\n"), (">&- 2>&- <&-", "")])
def test_closed_streams_are_not_an_error_and_logs_never_go_to_stdout(save, closed, out):
    """C4: a stream that was closed at the start is None in Python."""
    command = f'exec "$0" "$1" --ckpt "$2" --prompt x {closed}'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, ROOT / "infer.py", save("ab")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, out)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stream_that_is_not_utf8_gets_escapes(save):
    program = start(
        "--ckpt", save("é"), "--prompt", "x", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert program.communicate()[0] == b"x\\xe9\n"


def test_models_with_every_position_encoding_load_and_generate(run, tmp_path):
    """A buffer that is not in the file (ALiBi's slopes) must exist after loading."""
    for position in ("alibi", "rope"):
        config = Config.model_validate(
            {
                "model": {
                    "vocab_size": 260,
                    "n_layers": 1,
                    "d_model": 8,
                    "n_heads": 2,
                    "position": position,
                }
            }
        )
        checkpoint_format.write(
            tmp_path / "a.ckpt",
            {
                **checkpoint_state("x"),
                "config": config.to_plain(),
                "weights": Decoder(config.model).state_dict(),
            },
        )
        code, out, _ = run("--ckpt", tmp_path / "a.ckpt", "--prompt", "x", "--max-new-tokens", 5)
        assert (code, out[0]) == (0, "x")
