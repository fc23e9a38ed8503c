"""load_config on valid and invalid YAML; every message is compared in full."""

import json
import os
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.conftest import CONFIGS
from tinylm.common.errors import UserError
from tinylm.config.loader import load_config, require_here, with_model
from tinylm.config.messages import sections
from tinylm.config.schema import COUNT_LIMIT, Config, MixPart, ModelConfig
from tinylm.config.yaml_file import FILE_BYTES_LIMIT
from tinylm.model.decoder import Decoder, count_parameters

ROOT = Path(__file__).parents[2]
SECTIONS = ", ".join(Config.model_fields)
MEANING = {
    f"{key}.{name}": info.description
    for key, section in sections()
    for name, info in section.model_fields.items()
}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text: str | bytes, name: str = "c.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(text: str | bytes, *overrides: str) -> Config:
    return load_config(write(text), overrides)


def error_of(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    return str(caught.value)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("lr: 3e-4", "lr", 0.0003),
        ("lr: 3.E-4", "lr", 0.0003),
        ("lr: .5", "lr", 0.5),
        ("lr: 1", "lr", 1.0),
        ("lr: +1e-3", "lr", 0.001),
        ("max_steps: 1e5", "max_steps", 100000),
        ("max_steps: 10_000", "max_steps", 10000),
        ("max_steps: 010", "max_steps", 10),
        ("auto_resume: no", "auto_resume", False),
        ("auto_resume: On", "auto_resume", True),
        ("betas: [0.9, 1e-1]", "betas", (0.9, 0.1)),
        ("grad_clip: null", "grad_clip", None),
        ("grad_clip: ~", "grad_clip", None),
        ("grad_clip:", "grad_clip", None),
        ("sample_prompt: 12:30", "sample_prompt", "12:30"),
        ("sample_prompt: 12:30:45.5", "sample_prompt", "12:30:45.5"),
        ("sample_prompt: 0x1F", "sample_prompt", "0x1F"),
        ("run_name: 2026-11-21", "run_name", "2026-11-21"),
        ("sample_prompt: 2026-11-21 12:30:00", "sample_prompt", "2026-11-21 12:30:00"),
        ("run_name: '7'", "run_name", "7"),
        ("sample_prompt: !!str 7", "sample_prompt", "7"),
        ("loggers: []", "loggers", ()),
    ],
)
def test_yaml_values_are_read_as_people_mean_them(text, key, expected):
    """Floats need no dot (unlike YAML 1.1), 1e5 is a count, and dates and base-60 numbers of YAML 1.1 are text."""
    found = getattr(
        load(
            f"training: {{{text}}}" if not text.endswith(":") else f"training:\n  {text}"
        ).training,
        key,
    )
    assert found == expected
    assert type(found) is type(expected)


def test_precision_may_be_written_as_a_number():
    assert load("hardware: {precision: 16}").hardware.precision == "16"
    assert load("hardware: {precision: bf16}").hardware.precision == "bf16"


def test_a_byte_order_mark_and_windows_line_ends_are_accepted():
    assert load(b"\xef\xbb\xbftraining:\r\n  lr: 2\r\n").training.lr == 2.0


def test_settings_that_are_not_written_have_their_defaults():
    assert load("model: {n_layers: 2}") == Config.model_validate({"model": {"n_layers": 2}})


def test_a_tokenizer_path_means_hf():
    assert load("tokenizer: {path: gpt2}").tokenizer.kind == "hf"


# --- mistakes, one line each ----------------------------------------------------------------------

LOOK = "Check this line and the one above."
TEXT = "must be text (in quotes, if YAML reads it as something else)"
UNKNOWN = [
    (
        "training:\n  seed: 1\n  lrr: 3e-4\n",
        "c.yaml:3: training.lrr: no such setting. Did you mean lr?",
    ),
    (
        "model:\n  moe:\n    n_expert: 4\n",
        "c.yaml:3: model.moe.n_expert: no such setting. Did you mean n_experts?",
    ),
    ("trainig:\n  lr: 1\n", "c.yaml:1: trainig: no such setting. Did you mean training?"),
    (
        "dpo:\n  length_normalised: true\n",
        "c.yaml:2: dpo.length_normalised: this setting has a new name. "
        "Write dpo.length_normalized.",
    ),
    (
        "model: {seq_len: 64}",
        "c.yaml:1: model.seq_len: no such setting. Did you mean training.seq_len?",
    ),
    ("lr: 1", "c.yaml:1: lr: no such setting. Did you mean training.lr?"),
    (
        "model: {top_k: 1}",
        "c.yaml:1: model.top_k: no such setting. Did you mean model.moe.top_k or distill.top_k or sampling.top_k?",
    ),
    ("nonsense: 1", f"c.yaml:1: nonsense: no such setting. Settings here: {SECTIONS}."),
    ("7: 1", f"c.yaml:1: 7: no such setting. Settings here: {SECTIONS}."),
    (
        "model: {moe: {<<: {top_k: 1}}}",
        "c.yaml:1: model.moe.<<: no such setting. Settings here: n_experts, top_k, balance_coef.",
    ),
]
WRONG = [  # what is meant follows in each message
    ("lr: fast", 'training.lr: must be a number, got "fast".'),
    ("lr: no", "training.lr: must be a number, got false."),
    ("lr: 0", "training.lr: must be above 0.0, got 0."),
    ("lr: 1e999", "training.lr: must be a finite number, got Infinity."),
    ("lr: .nan", 'training.lr: must be a number, got ".nan".'),
    ("lr: 3 # rate\n", None),
    ("weight_decay: 101", "training.weight_decay: must be at most 100.0, got 101."),
    ("momentum: 1", "training.momentum: must be below 1.0, got 1."),
    ("max_steps: 0", "training.max_steps: must be at least 1, got 0."),
    ("micro_batch_size: 0", "training.micro_batch_size: must be at least 1 or auto, got 0."),
    ("max_steps: 2.5", "training.max_steps: must be a whole number, got 2.5."),
    ("max_steps: 5.0", "training.max_steps: must be a whole number, got 5.0."),
    ("max_steps: yes", "training.max_steps: must be a whole number, got true."),
    ("max_steps: 12:30", 'training.max_steps: must be a whole number, got "12:30".'),
    ("max_steps: 2026-11-21", 'training.max_steps: must be a whole number, got "2026-11-21".'),
    ("max_steps: 0x10", 'training.max_steps: must be a whole number, got "0x10".'),
    ("max_steps: 3000000000", "training.max_steps: must be at most 2147483647, got 3000000000."),
    ("auto_resume: 1", "training.auto_resume: must be true or false, got 1."),
    ("betas: [0.9]", "training.betas: must be a longer list, got [0.9]."),
    (
        "betas: [0.9, 0.9, 0.9]",
        "training.betas: must be a list of at most 2 items, got [0.9, 0.9, 0.9].",
    ),
    ("betas: 0.9", "training.betas: must be a list, [a, b], got 0.9."),
    ("betas: [0.9, 1]", "training.betas: must be below 1.0, got 1."),
    (
        "optimizer: adam",
        "training.optimizer: must be 'adamw', 'adamw_plain', 'adamw_8bit', 'sgd' or 'muon', got \"adam\".",
    ),
    (
        "loggers: [csv]",
        "training.loggers: must be 'tensorboard', 'wandb' or 'trackio', got \"csv\".",
    ),
    ("sample_prompt: no", f"training.sample_prompt: {TEXT}, got false."),
    ("checkpoint_dir: ''", 'training.checkpoint_dir: must be text that is not empty, got "".'),
    ("checkpoint_dir: 'x\u202e'", None),
    (
        'checkpoint_dir: "a\\0b"',
        r'training.checkpoint_dir: must be text that matches ^[^\x00]*$, got "a\u0000b".',
    ),
    (
        'checkpoint_dir: "\\ud800"',
        r'training.checkpoint_dir: must be text without lone surrogates, got "\ud800".',
    ),
    (
        f"checkpoint_dir: {'x' * 5000}",
        f'training.checkpoint_dir: must be text of at most 4096 characters, got "{"x" * 76}...',
    ),
    (
        "run_name: ../up",
        'training.run_name: must be text that matches ^[A-Za-z0-9][A-Za-z0-9._-]*$, got "../up".',
    ),
]
ELSEWHERE = [
    (
        "training:",
        "c.yaml:1: training: must be a section, got null. Write its settings indented below it, or remove it.",
    ),
    (
        "model:\n  moe: 3",
        "c.yaml:2: model.moe: must be a section, got 3. Write its settings indented below it, or remove it.",
    ),
    (
        "training:\n  lr: 3\n  seed: 1\n  lr: 4\n",
        "c.yaml:4: training.lr: already set on line 2. Keep one.",
    ),
    (
        "model: {}\ndata: {}\nmodel: {}\n",
        "c.yaml:3: model: already set on line 1. Keep one.",
    ),
    (
        "training.lr: 3",
        'c.yaml:1: a key must be one plain name, got "training.lr". Write section: and, indented '
        "below it, name: value.",
    ),
    (
        '"\\ud800": 3',
        r'c.yaml:1: a key must be one plain name, got "\ud800". Write section: and, indented below it, name: value.',
    ),
    (
        "? [a]\n: 3",
        "c.yaml:1: a key must be one plain name, got a list or mapping. Write section: and, "
        "indented below it, name: value.",
    ),
    (
        "training: {lr: !!int fast}",
        'c.yaml:1: training.lr: not a valid int: "fast". Write it out, or quote it if it is text.',
    ),
    (
        "training: {lr: !!bool fast}",
        'c.yaml:1: training.lr: not a valid bool: "fast". Write it out, or quote it if it is text.',
    ),
    (
        "training: {lr: 1__0}",
        'c.yaml:1: training.lr: not a valid int: "1__0". Write it out, or quote it if it is text.',
    ),
    (
        "sampling: {stop: [a: b]}",
        f'c.yaml:1: sampling.stop: {TEXT}, got {{"a": "b"}}. Meaning: {MEANING["sampling.stop"]}.',
    ),
    (
        "training: {betas: [0.9, !!float fast]}",
        'c.yaml:1: training.betas[1]: not a valid float: "fast". Write it out, or quote it if it is text.',
    ),
]
NOT_YAML = [
    (
        "training:\n\tlr: 3\n",
        f"c.yaml:2: not valid YAML: a tab indents this line, but YAML needs spaces. {LOOK}",
    ),
    (
        "training:\n  lr: 3\n seed: 3\n",
        f"c.yaml:3: not valid YAML: expected <block end>, but found '<block mapping start>'. {LOOK}",
    ),
    (
        "model: {}\n---\nmodel: {}\n",
        f"c.yaml:2: not valid YAML: but found another document. {LOOK}",
    ),
    (
        "training: {lr: 3",
        f"c.yaml:1: not valid YAML: expected ',' or '}}', but got '<stream end>'. {LOOK}",
    ),
    ("\n\nmodel: \x07", f"c.yaml:3: not valid YAML: the character '\\x07' is not allowed. {LOOK}"),
    ("\0" * 9000, f"c.yaml:1: not valid YAML: the character '\\x00' is not allowed. {LOOK}"),
    (
        "",
        "c.yaml: the file is empty. Write the settings that differ from the defaults, for example "
        "model: {n_layers: 4}.",
    ),
    (
        "# nothing yet\n",
        "c.yaml: the file is empty. Write the settings that differ from the defaults, for example "
        "model: {n_layers: 4}.",
    ),
    (
        "# a list\n- model\n",
        f"c.yaml:2: a config must have sections ({SECTIONS}). Write each section's name: and its "
        f"settings indented below it.",
    ),
    (
        "model",
        f"c.yaml:1: a config must have sections ({SECTIONS}). Write each section's name: and its "
        f"settings indented below it.",
    ),
    (b"\x89PNG\r\n\x1a\n\xff", "c.yaml: not UTF-8 text (byte 0). Save it as UTF-8."),
    ("[" * 10_000, f"c.yaml:1: not valid YAML: nested deeper than 12 levels. {LOOK}"),
    (
        "".join(f"{' ' * depth}a:\n" for depth in range(400)),
        f"c.yaml:13: not valid YAML: nested deeper than 12 levels. {LOOK}",
    ),
    (
        "a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        f"c.yaml:2: not valid YAML: aliases (*name) are not supported. {LOOK}",
    ),
    (
        "x" * 200_000,
        f"c.yaml: 200000 bytes, but a config has at most {FILE_BYTES_LIMIT}. Is it the right file?",
    ),
    (
        "data: {text_field: [" + "1" * 90_000 + "x]}",
        f'c.yaml:1: data.text_field: {TEXT}, got ["{"1" * 75}... Meaning: {MEANING["data.text_field"]}.',
    ),
    (
        "data: {mix: [" + "{}," * 15_000 + "]}",
        f"c.yaml:1: data.mix[0].dataset: required, but missing in {{}}. Meaning: {MEANING['data.mix[].dataset']}.",
    ),
    ("data: {val_fraction: 0." + "1" * 90_000 + "}", None),
    (
        "model: {d_model: " + "9" * 90_000 + "}",
        'c.yaml:1: model.d_model: not a valid int: "'
        + "9" * 76
        + "... Write it out, or quote it if it is text.",
    ),
]


@pytest.mark.parametrize(("text", "message"), UNKNOWN + ELSEWHERE)
def test_an_error_names_file_line_key_and_expectation(text, message):
    assert error_of(text) == message


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_an_invalid_value_is_shown_with_what_is_expected(text, message):
    """Each is on line 3; None marks a value that only looks wrong."""
    text = f"# a comment\ntraining:\n  {text}\n"
    if message is None:
        assert isinstance(load(text), Config)
    else:
        key = message.partition(":")[0]
        assert error_of(text) == f"c.yaml:3: {message} Meaning: {MEANING[key]}."


def yaml_seconds() -> float:
    """The processor time of PyYAML for 3,000 empty sections, about 0.17 s: the speed of the machine."""
    start = time.process_time()
    yaml.compose("[" + "{}," * 3000 + "]")
    return time.process_time() - start


@pytest.mark.parametrize(("text", "message"), NOT_YAML, ids=range(len(NOT_YAML)))
def test_a_file_that_is_not_a_config_is_rejected_within_a_second(text, message):
    """Processor time, so that a busy machine does not fail the test; the best of three, because a
    garbage collection over the objects of all earlier tests counts too. The largest file has 15,000
    sections: on a slow machine it may take three times what PyYAML alone needs for them.
    """
    for _ in range(3):
        start = time.process_time()
        if message is None:
            assert isinstance(load(text), Config)
        else:
            assert error_of(text) == message
        seconds = time.process_time() - start
        if seconds < 1 or seconds < 15 * yaml_seconds():
            return
    pytest.fail(f"{seconds:.2f} s")


def test_a_100_mb_file_is_rejected_unread():
    with Path("c.yaml").open("wb") as file:
        file.truncate(100_000_000)
    tracemalloc.start()
    with pytest.raises(UserError) as caught:
        load_config("c.yaml")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (
        str(caught.value)
        == f"c.yaml: 100000000 bytes, but a config has at most {FILE_BYTES_LIMIT}. Is it the right file?"
    )
    assert peak < 1e6


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "not found in .*"),
        (os.mkdir, "a directory"),
        (os.mkfifo, "not a regular file"),
        (lambda path: os.symlink(path, path), "Too many levels of symbolic links"),
    ],
    ids=["missing", "directory", "pipe", "circular link"],
)
def test_a_path_that_is_not_a_file_is_named(make, found):
    make("there")
    with pytest.raises(UserError, match=f"^there: {found}. Give the path of a YAML file.$"):
        load_config("there")


def test_control_characters_in_a_path_are_escaped():
    with pytest.raises(UserError) as caught:
        load_config("a\x1b[31m\nb")
    assert str(caught.value) == (
        rf"a\x1b[31m\nb: not found in {os.getcwd()}. Give the path of a YAML file."
    )


def test_a_path_too_long_is_a_user_error():
    with pytest.raises(UserError, match=": File name too long. Give the path of a YAML file.$"):
        load_config("x" * 5000)


@pytest.mark.parametrize(
    "place",
    [
        "training: {{run_name: {}}}",
        "training: {{loggers: {}}}",
        "model: {}",
        "{}",
        "extends: {}",
        "{} : 3",
    ],
)
@pytest.mark.parametrize(
    "shape", ["{tag} 'touch harmed'", "{tag} ['touch harmed']", "{tag} {{args: ['touch harmed']}}"]
)
def test_a_python_tag_is_rejected_and_nothing_runs(place, shape):
    tag = "!!python/object/apply:os.system"
    assert (
        error_of(place.format(shape.format(tag=tag)))
        == f"c.yaml:1: not valid YAML: the tag {tag} is not supported. {LOOK}"
    )
    assert not Path("harmed").exists()


@pytest.mark.parametrize(
    "tag", ["!local", "!!set", "!!timestamp", "!!binary", "!!python/name:os.system"]
)
def test_other_tags_are_rejected(tag):
    assert (
        error_of(f"training: {{run_name: {tag} x}}")
        == f"c.yaml:1: not valid YAML: the tag {tag} is not supported. {LOOK}"
    )


# --- rules between settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  d_model: 100\n  n_heads: 3\n",
            "3: model.n_heads: must divide d_model (100), got 3. Change one, or set head_dim.",
        ),
        (
            "model:\n  d_model: 100\n",
            "2: model.n_heads: must divide d_model (100), got 6. Change one, or set head_dim.",
        ),
        (
            "model:\n  n_kv_heads: 4\n",
            "2: model.n_kv_heads: must divide n_heads (6), got 4. Change one.",
        ),
        (
            "model:\n  head_dim: 5\n",
            "2: model.head_dim: must be even for position rope, got 5. Choose an even head_dim.",
        ),
        (
            "model: {d_model: 18}",
            "1: model.d_model: head_dim = d_model / n_heads = 18 / 6 must be even for position "
            "rope. Change one, or set an even head_dim.",
        ),
        (
            "model:\n  full_attention_interval: 6\n",
            "2: model.full_attention_interval: only valid with sliding_window (it is null). "
            "Set model.sliding_window, or remove it.",
        ),
        (
            "model:\n  sliding_window: 8\n  rope_local_theta: 500.0\n",
            "3: model.rope_local_theta: only valid with full_attention_interval (it is null). "
            "Set model.full_attention_interval, or remove it.",
        ),
        *(
            (
                f"model:\n  init: zero_outputs\n  norm_placement: {placement}\n",
                f"2: model.init: zero_outputs cannot be combined with norm_placement {placement}, whose norm of an "
                "all-zero output has a gradient of 1 / sqrt(norm_eps). Set model.init=normal or trunc_normal, or "
                "model.norm_placement=pre.",
            )
            for placement in ("output", "sandwich")
        ),
        (
            "model:\n  moe:\n    top_k: 9\n",
            "3: model.moe.top_k: must be at most n_experts (8), got 9. Lower top_k.",
        ),
        (
            "tokenizer:\n  kind: hf\n",
            "2: tokenizer.path: required for kind hf. Set it to a Hugging Face name or a folder.",
        ),
        (
            "tokenizer: {kind: byte, path: gpt2}",
            "1: tokenizer.path: only valid for kind hf (kind is byte). Remove it, or set tokenizer.kind=hf.",
        ),
        (
            "tokenizer: {unknown: unk}",
            "1: tokenizer.unknown: only valid for kind char (kind is byte). Remove it, or set tokenizer.kind=char.",
        ),
        (
            "tokenizer: {kind: bpe}",
            "1: tokenizer.vocab_size: required for kind bpe. Set it, for example tokenizer.vocab_size=4096.",
        ),
        (
            "tokenizer: {vocab_size: 300}",
            "1: tokenizer.vocab_size: only valid for kind bpe or unigram (kind is byte). Remove it, or set tokenizer.kind=bpe.",
        ),
        (
            "tokenizer: {pattern: gpt4}",
            "1: tokenizer.pattern: only valid for kind bpe or unigram (kind is byte). Remove it, or set tokenizer.kind=bpe.",
        ),
        (
            "tokenizer: {kind: bpe, vocab_size: 300, pattern: gpt5}",
            "1: tokenizer.pattern: must be gpt2, gpt4, qwen2 or a regular expression, got gpt5. Write "
            "gpt2, gpt4, qwen2, or a regular expression whose matches are the words, such as "
            r"' ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+'.",
        ),
        (
            "tokenizer: {learn_docs: 3}",
            "1: tokenizer.learn_docs: only valid for kind bpe, unigram or char (kind is byte). Remove it, or "
            "set tokenizer.kind=bpe.",
        ),
        (
            "tokenizer: {kind: char, learn_docs: 3}",
            "1: tokenizer.learn_docs: later documents can have characters that the first ones lack, "
            "and unknown is error. Set tokenizer.unknown=unk.",
        ),
        (
            "data: {val_dataset: a, val_split: b}",
            "1: data.val_split: cannot be combined with val_dataset. Remove one.",
        ),
        (
            "data:\n  streaming: yes\n  order: random",
            "3: data.order: random is not supported with streaming. Set data.order=shuffled or data.streaming=false.",
        ),
        *(
            (
                f"data:\n  {setting}\n  mix: [dataset: a]\n",
                f"2: data.{name}: cannot be combined with mix. Remove {name} or mix.",
            )
            for setting in (
                "streaming: yes",
                "dataset_config: a",
                "split: test",
                "val_split: test",
                "train_docs: 3",
            )
            if (name := setting.partition(":")[0])
        ),
        (
            "data:\n  mix: [dataset: a]\n  val_docs: 3\n",
            "3: data.val_docs: not supported with mix if val_fraction of each source is held out. "
            "Remove it, or set data.val_dataset.",
        ),
        (
            "data:\n  mix: [{dataset: a, weight: 1e6}, {dataset: b, weight: 0.5}]\n",
            "2: data.mix: the weight of b is less than a millionth of the sum of weights. Raise it, "
            "or remove the source.",
        ),
        (
            "data: {streaming: yes, stride: 1}",
            "1: data.stride: not supported with streaming, whose rows never overlap. Remove it, or "
            "set data.streaming=false.",
        ),
        (
            "training: {schedule: wsd, decay_ratio: 0.7, warmup_ratio: 0.5}",
            "1: training.decay_ratio: decay_ratio (0.7) + warmup_ratio (0.5) must be at most 1. Lower one.",
        ),
        (
            "training: {schedule: plateau, max_steps: 10}",
            "1: training.val_every_steps: must be at most max_steps (10) for schedule plateau, got 200. Lower it.",
        ),
        (
            "sampling: {n_beams: 2, n_samples: 2}",
            "1: sampling.n_samples: must be 1 for beam search, which returns one text, got 2. Set "
            "n_beams or n_samples to 1.",
        ),
        (
            "training:\n  seq_len: 4096\n",
            "2: training.seq_len: 4096 is more than model.max_seq_len (1024). Raise "
            "model.max_seq_len or lower training.seq_len.",
        ),
        (
            "model:\n  max_seq_len: 16\n",
            "2: training.seq_len: 256 is more than model.max_seq_len (16). Raise model.max_seq_len "
            "or lower training.seq_len.",
        ),
        (
            "data:\n  stride: 512\n",
            "2: data.stride: 512 is more than training.seq_len (256), which would skip tokens. Lower data.stride.",
        ),
    ],
)
def test_a_broken_rule_names_its_settings_and_the_line_of_one_that_is_written(text, message):
    """The line is that of the first of its settings that is in the file: the others may be defaults."""
    assert error_of(text) == f"c.yaml:{message}"


# --- a list of sections ---------------------------------------------------------------------------

MIX = "data:\n  mix:\n    - dataset: a.txt\n      weight: 3\n    - dataset: b.txt\n"


def test_a_list_of_sections_is_read_with_the_types_and_defaults_of_its_fields():
    parts = load(MIX).data.mix
    assert parts is not None
    assert [(part.dataset, part.weight) for part in parts] == [("a.txt", 3.0), ("b.txt", 1.0)]
    assert load("data: {}", "data.mix=[{dataset: c, weight: 1e-1}]").data.mix == (
        MixPart(dataset="c", weight=0.1),
    )
    assert load(MIX, "data.mix=null").data.mix is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MIX + "      weigth: 2\n", "6: data.mix[1].weigth: no such setting. Did you mean weight?"),
        (MIX + "      lr: 2\n", "6: data.mix[1].lr: no such setting. Did you mean training.lr?"),
        (
            MIX + "      x: [a: b]\n",
            "6: data.mix[1].x: no such setting. Settings here: dataset, weight, rows, columns, template.",
        ),
        (
            MIX + "      dataset: c.txt\n",
            "6: data.mix[1].dataset: already set on line 5. Keep one.",
        ),
        (
            MIX + "      weight: high\n",
            f'6: data.mix[1].weight: must be a number, got "high". Meaning: {MEANING["data.mix[].weight"]}.',
        ),
        (
            MIX + "      weight: !!int x\n",
            '6: data.mix[1].weight: not a valid int: "x". Write it out, or quote it if it is text.',
        ),
        (
            MIX + "    - weight: 2\n",
            f'6: data.mix[2].dataset: required, but missing in {{"weight": 2}}. Meaning: '
            f"{MEANING['data.mix[].dataset']}.",
        ),
        (
            MIX + "    - c.txt\n",
            '6: data.mix[2]: must be a section, got "c.txt". Write its settings indented below it, or remove it.',
        ),
        (
            MIX + "    - [dataset: c.txt]\n",
            '6: data.mix[2]: must be a section, got [{"dataset": "c.txt"}]. Write its settings '
            "indented below it, or remove it.",
        ),
        (
            "data:\n  mix: a.txt\n",
            f'2: data.mix: must be a list, [a, b], got "a.txt". Meaning: {MEANING["data.mix"]}.',
        ),
        (
            "data:\n  mix: []\n",
            f"2: data.mix: must be a list that is not empty, got []. Meaning: {MEANING['data.mix']}.",
        ),
        (
            "data:\n  mix:\n    weight: 1\n",
            f'2: data.mix: must be a list, [a, b], got {{"weight": 1}}. Meaning: {MEANING["data.mix"]}.',
        ),
        (
            "data:\n  weight: 1\n",
            "2: data.weight: no such setting. "
            "Did you mean data.mix[].weight or distill.weight or grpo.rewards[].weight?",
        ),
    ],
)
def test_an_error_in_a_list_of_sections_names_its_index_and_line(text, message):
    """Sections in a list are counted from 0."""
    assert error_of(text) == f"c.yaml:{message}"


def test_a_list_of_sections_replaces_one_and_its_lines_are_its_own():
    """The parent's second source has a dataset and a line; the child's lacks both, and must not get
    the parent's line.
    """
    write(MIX, "parent.yaml")
    assert [
        part.dataset
        for part in load("extends: parent.yaml\ndata:\n  mix: [dataset: c]\n").data.mix or ()
    ] == ["c"]
    message = error_of("extends: parent.yaml\ndata:\n  mix: [dataset: c, {}]\n")
    assert (
        message
        == f"c.yaml:3: data.mix[1].dataset: required, but missing in {{}}. Meaning: {MEANING['data.mix[].dataset']}."
    )


def test_an_error_in_a_mapping_of_names_is_one_line():
    """data.columns has names that the user chooses; the meaning in the error is that of the setting."""
    meaning = MEANING["data.columns"]
    assert (
        error_of("data:\n  columns:\n    prompt: 3\n")
        == f"c.yaml:3: data.columns.prompt: {TEXT}, got 3. Meaning: {meaning}."
    )
    assert (
        error_of("data: {columns: {input: {b: c}}}")
        == f'c.yaml:1: data.columns.input: {TEXT}, got {{"b": "c"}}. Meaning: {meaning}.'
    )
    assert (
        error_of("data: {columns: [a]}")
        == f'c.yaml:1: data.columns: must be names and values, {{a: b}}, got ["a"]. Meaning: {meaning}.'
    )


def test_an_unknown_column_is_named_with_the_known_ones():
    assert error_of("data:\n  columns:\n    question: q\n").startswith(
        "c.yaml:3: data.columns.question: must be 'instruction', 'input', "
    )


def test_null_widths_are_resolved():
    """8/3 of 96 is 256, a multiple of 64 already; 4 of 96 is 384; four heads of 96 / 4 = 24."""
    model = load("model: {d_model: 96, n_heads: 4}").model
    assert (model.n_kv_heads, model.head_dim, model.d_ff) == (4, 24, 256)
    assert load("model: {d_model: 96, n_heads: 4, ffn: gelu}").model.d_ff == 384


def test_a_null_that_is_written_is_not_a_written_setting():
    """A base model's own width must count in its place."""
    config = load("model: {n_kv_heads: null, n_heads: 3}")
    assert config.model.model_fields_set == {"n_heads"}
    base = ModelConfig(n_heads=3, n_kv_heads=1)
    assert with_model(config, base, config.tokenizer).model.n_kv_heads == 1


# --- every numeric setting against every odd value ------------------------------------------------


def _bounds(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The numeric alternatives in the schema of a setting."""
    return [
        choice
        for choice in (setting, *setting.get("anyOf", ()), *setting.get("prefixItems", ()))
        if choice.get("type") in ("integer", "number")
    ]


def _schema_of(key: str, section: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{key}.{name}": setting
        for name, setting in section.model_json_schema()["properties"].items()
        if _bounds(setting)
    }


NUMERIC = {
    setting: schema
    for key, section in sections()
    if key
    for setting, schema in _schema_of(key, section).items()
}


# What a section must have besides the setting that is tested.
REQUIRED = {
    "mix[]": {"dataset": "a"},
    "rewards[]": {"reward": "exact"},
    "distill": {"teacher": "a"},
    "rope_scaling": {"type": "yarn", "factor": 2, "original_max_seq_len": 64},
}


def _allows(schema: dict[str, Any], value: str) -> bool:
    """Whether the published schema allows the value."""
    if value == "null":
        return {"type": "null"} in schema.get("anyOf", ())
    if "prefixItems" in schema or value not in ("0", "-1", "1e308"):
        return False
    bound, number = _bounds(schema)[0], float(value)
    return (
        bound.get("minimum", number) <= number <= bound.get("maximum", number)
        and bound.get("exclusiveMinimum", number - 1)
        < number
        < bound.get("exclusiveMaximum", float("inf"))
        and (bound["type"] == "number" or number <= COUNT_LIMIT)
    )


def test_the_list_of_numeric_settings_is_complete():
    assert {
        "model.moe.top_k",
        "training.lr",
        "training.betas",
        "data.stride",
        "data.mix[].weight",
        "hardware.threads",
        "sampling.min_p",
    } <= set(NUMERIC)


VALUES = ("0", "-1", "1e308", ".nan", "nan", '""', "null", "[1, 2, 3]", "true", "{a: 1}")


@pytest.mark.parametrize("key", NUMERIC)
def test_a_numeric_setting_accepts_what_its_schema_allows_and_rejects_the_rest(key):
    """A value within its bounds can still break a rule, and then the message has no `Meaning`."""
    *sections_above, name = key.split(".")
    shown = key.replace("[]", "[0]")
    for value in VALUES:
        text = f"{name}: {value}"
        for section in reversed(sections_above):
            others = [f"{k}: {v}" for k, v in REQUIRED.get(section, {}).items() if k != name]
            settings = f"{{{', '.join([*others, text])}}}"
            text = (
                f"{section[:-2]}: [{settings}]"
                if section.endswith("[]")
                else f"{section}: {settings}"
            )
        if _allows(NUMERIC[key], value):
            try:
                assert isinstance(load(text), Config)
            except UserError as error:
                assert "Meaning" not in str(error)
                assert name in str(error)
        else:
            assert re.fullmatch(
                rf"c\.yaml:1: {re.escape(shown)}: must be .+, got .+ Meaning: {re.escape(MEANING[key])}\.",
                error_of(text),
            )


# --- one file extends another ---------------------------------------------------------------------


def test_settings_come_from_defaults_then_parents_then_the_file_then_the_command_line():
    """Each level leaves one setting of the previous level unchanged."""
    write(
        "training: {lr: 1, seed: 1, max_steps: 1, seq_len: 1}\nmodel: {moe: {top_k: 1, n_experts: 2}}",
        "base/grand.yaml",
    )
    write("extends: grand.yaml\ntraining: {seed: 2, max_steps: 2, seq_len: 2}", "base/parent.yaml")
    child = write(
        "training: {max_steps: 3, seq_len: 3}\nmodel: {moe: {n_experts: 3}}\nextends: ../base/parent.yaml",
        "runs/child.yaml",
    )
    config = load_config(child, ["training.seq_len=4", "training.seq_len=5"])
    assert (
        config.training.lr,
        config.training.seed,
        config.training.max_steps,
        config.training.seq_len,
    ) == (1.0, 2, 3, 5)
    assert (config.model.moe.top_k, config.model.moe.n_experts) == (1, 3)
    assert config.training.weight_decay == Config().training.weight_decay


def test_a_list_replaces_a_list_and_null_removes_a_section():
    write("training: {loggers: [tensorboard, wandb]}\nmodel: {moe: {top_k: 1}}", "parent.yaml")
    config = load("extends: parent.yaml\ntraining: {loggers: [wandb]}\nmodel: {moe: null}")
    assert config.training.loggers == ("wandb",)
    assert config.model.moe is None


def test_an_error_in_a_parent_names_the_parent_and_its_line():
    write("\ntraining:\n  lrr: 1\n", "base/parent.yaml")
    assert (
        error_of("extends: base/parent.yaml\ntraining: {lr: 1}")
        == "base/parent.yaml:3: training.lrr: no such setting. Did you mean lr?"
    )


def test_an_invalid_value_that_a_child_overrides_is_not_an_error():
    write("training: {lr: fast}", "parent.yaml")
    assert load("extends: parent.yaml\ntraining: {lr: 1}").training.lr == 1.0


def test_a_rule_between_two_files_names_the_file_of_a_setting_that_is_written():
    write("\n\nmodel:\n  d_model: 100\n", "parent.yaml")
    assert error_of("extends: parent.yaml\nmodel: {n_layers: 2}").startswith(
        "parent.yaml:4: model.n_heads: must divide d_model (100), got 6."
    )


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("none.yaml", "none.yaml: not a file. Write the path relative to this file."),
        (".", ".: not a file. Write the path relative to this file."),
        ('"a\\0"', r"a\x00: not a file. Write the path relative to this file."),
        ("x" * 5000, "x" * 5000 + ": not a file. Write the path relative to this file."),
        ("c.yaml", "c.yaml: circular, that file extends this one. Remove one extends:."),
        ("", "must be the path of one YAML file. Write it relative to this file."),
        ("[a.yaml, b.yaml]", "must be the path of one YAML file. Write it relative to this file."),
    ],
    ids=["missing", "folder", "nul", "long", "itself", "nothing", "list"],
)
def test_extends_names_one_file(extends, message):
    assert error_of(f"model: {{}}\nextends: {extends}") == f"c.yaml:2: extends: {message}"


def test_a_circle_of_files_is_found():
    write("extends: ./b.yaml\n", "a.yaml")
    write("extends: sub/../a.yaml\n", "b.yaml")
    Path("sub").mkdir()
    assert (
        error_of("extends: a.yaml")
        == "b.yaml:1: extends: sub/../a.yaml: circular, that file extends this one. Remove one extends:."
    )


# --- the command line -----------------------------------------------------------------------------


def test_overrides_have_the_types_of_yaml():
    config = load(
        "model: {}",
        "training.lr=1e-3",
        "training.auto_resume=no",
        "training.grad_clip=null",
        "training.sample_prompt='no'",
        "training.loggers=[tensorboard]",
    )
    training = config.training
    assert (
        training.lr,
        training.auto_resume,
        training.grad_clip,
        training.sample_prompt,
        training.loggers,
    ) == (0.001, False, None, "no", ("tensorboard",))


@pytest.mark.parametrize(
    "text",
    [
        "---", "##", "# a", "Yes", "no", "1e3", "7", "Q: What is it?", "[INST] hi", "{a", "*a", "&a", "!x", "@", "- a",
        "~", "Null", "NULL", "...", "|", ">", "%", "'", '"a" and "b"', "'a' or b'", "a: b: c", " a ", "\n\n", "\\n", "a #b",
        "\t", "2026-11-21", "0x1F", ".5", "true", "`",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.document_separator", "training.sample_prompt"])
def test_the_override_of_a_text_setting_is_the_text_as_typed(key, text):
    section, name = key.split(".")
    assert getattr(getattr(load("model: {}", f"{key}={text}"), section), name) == text


def test_only_null_is_null_in_the_override_of_a_text_setting():
    file = "training: {sample_prompt: a}"
    assert load(file, "training.sample_prompt=null").training.sample_prompt is None
    assert load(file, "training.sample_prompt='null'").training.sample_prompt == "null"
    assert load(file, r'training.sample_prompt="\n\n"').training.sample_prompt == "\n\n"
    assert load(file, "training.sample_prompt=").training.sample_prompt == ""
    assert load(file, "training.run_name=1e3").training.run_name == "1e3"
    assert load(file, "hardware.precision=16").hardware.precision == "16"
    assert load(file, "data.columns.prompt=1e3").data.columns == {"prompt": "1e3"}


@pytest.mark.parametrize("text", ["", "---", "#", "# a", "..."])
@pytest.mark.parametrize(
    "key", ["training.grad_clip", "training.val_batches", "sampling.stop", "lora", "data.mix"]
)
def test_an_override_that_yaml_reads_as_nothing_is_an_error(key, text):
    """Each of these settings can be null, which must be written."""
    assert f"command line: {key}: " in error_of("model: {}", f"{key}={text}")


def test_a_comment_in_place_of_a_value_is_an_error():
    assert error_of("data:\n  document_separator: ##\n") == (
        'c.yaml:2: data.document_separator: "##" is a comment in YAML, so nothing is set. '
        "Put quotes around it if it is text, or write null before it."
    )
    config = load("data: # of this run\n  document_separator:\n  # next\n  val_docs: null # all\n")
    assert config.data.document_separator is None


def test_a_path_can_begin_with_the_home_folder(monkeypatch):
    """A shell does not expand ~ after `key=`."""
    monkeypatch.setenv("HOME", "/users/me")
    config = load(
        "data: {dataset: ~/x.txt, mix: [{dataset: ~/y.txt}]}\ntraining: {checkpoint_dir: ~/out}",
        "data.val_dataset=~/v.txt",
        "tokenizer.path=~/t",
        "training.init_from=hf:~/m",
        "training.sample_prompt=~/x",
    )
    assert config.data.dataset == "/users/me/x.txt"
    assert config.data.mix[0].dataset == "/users/me/y.txt"
    assert config.data.val_dataset == "/users/me/v.txt"
    assert config.tokenizer.path == "/users/me/t"
    assert config.training.checkpoint_dir == "/users/me/out"
    assert config.training.init_from == "hf:/users/me/m"
    assert config.training.sample_prompt == "~/x"


@pytest.mark.parametrize("key", ["training.epochs", "training.num_train_epochs", "epochs"])
def test_epochs_are_answered_with_what_decides_the_length(key):
    length = "training.max_steps, in optimizer steps, decides the length of a run"
    assert error_of("model: {}", f"{key}=2") == f"command line: {key}: no such setting. {length}."


def test_an_override_creates_the_sections_around_it():
    moe = load("model: {moe: null}", "model.moe.top_k=1").model.moe
    assert (moe.top_k, moe.n_experts) == (1, 8)


def test_an_override_can_contain_an_equals_sign_or_be_a_whole_section():
    assert load("model: {}", "training.sample_prompt=a=b").training.sample_prompt == "a=b"
    assert load("model: {n_layers: 3}", "model={d_model: 12}").model.n_layers == 3


WRITTEN = "an override must be section.key=value. For example training.max_steps=100."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_steps", f"training.max_steps: {WRITTEN}"),
        ("=3", f"=3: {WRITTEN}"),
        ("training..lr=3", f"training..lr=3: {WRITTEN}"),
        ("--lr=3", f"--lr=3: {WRITTEN}"),
        ("a\x1b=3", rf"a\x1b=3: {WRITTEN}"),
        (
            "max_steps=3",
            "command line: max_steps: no such setting. Did you mean training.max_steps?",
        ),
        ("Training.lr=3", "command line: Training: no such setting. Did you mean training?"),
        ("training.lrr=3", "command line: training.lrr: no such setting. Did you mean lr?"),
        (
            "training.lr=",
            f'command line: training.lr: must be a number, got "". Meaning: {MEANING["training.lr"]}.',
        ),
        (
            "training.lr=@",
            "command line: training.lr: not valid YAML: found character '@' that cannot start any "
            "token. Put quotes around the value.",
        ),
        (
            "training.lr.x=3",
            f'command line: training.lr: must be a number, got {{"x": 3}}. Meaning: {MEANING["training.lr"]}.',
        ),
        (
            "model=3",
            "command line: model: must be a section, got 3. Write its settings indented below it, or remove it.",
        ),
        (
            "model.d_model=100",
            "command line: model.n_heads: must divide d_model (100), got 6. Change one, or set head_dim.",
        ),
        (
            "extends=b.yaml",
            f"command line: extends: no such setting. Settings here: {SECTIONS}.",
        ),
    ],
)
def test_an_invalid_override_is_named(override, message):
    assert error_of("training: {seed: 1}", override) == message


# --- the settings as values -----------------------------------------------------------------------


def test_settings_are_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.training.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.model = config.model


@pytest.mark.slow
@given(
    st.fixed_dictionaries(
        {
            "model": st.fixed_dictionaries(
                {
                    "d_model": st.sampled_from([12, 24, 384]),
                    "moe": st.none() | st.just({"top_k": 1}),
                }
            ),
            "training": st.fixed_dictionaries(
                {
                    "lr": st.floats(1e-300, 1e300),
                    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
                    "seed": st.integers(0, COUNT_LIMIT),
                    "sample_prompt": st.none() | st.text(),
                    "loggers": st.lists(st.sampled_from(["tensorboard", "wandb"]), unique=True),
                }
            ),
            "hardware": st.fixed_dictionaries(
                {"precision": st.sampled_from(["32", "16", "bf16", 32, 16])}
            ),
            "sampling": st.fixed_dictionaries({"stop": st.lists(st.text(min_size=1))}),
        }
    )
)
def test_from_plain_is_the_inverse_of_to_plain_through_json(values):
    config = Config.model_validate(values)
    assert Config.from_plain(json.loads(json.dumps(config.to_plain()))) == config


WORDS = [
    "\n  ",
    "training",
    "lr",
    "model",
    "moe",
    "top_k",
    "extends",
    "c.yaml",
    "1e9",
    "!!python/name:os",
    "\ud800",
    "0" * 5000,
]


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([*WORDS, *"[]{}:,-?&*!|>'\"#%@`\n\t =~\0"]), max_size=40).map("".join)
)
def test_any_text_is_a_config_or_a_user_error(text):
    try:
        assert isinstance(
            load(text.encode("utf-8", "surrogatepass"), f"training.sample_prompt={text}"), Config
        )
    except UserError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_of_the_project_loads(path):
    assert isinstance(load_config(path), Config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("configs/c4-char*.yaml")), ids=lambda path: path.stem
)
def test_the_comments_of_the_character_presets_are_true(path):
    """The command, the parameters without the vocabulary, the parameters per character, and the amount of text."""
    config, text = load_config(path), path.read_text(encoding="utf-8")
    assert f"\n#     python train.py --config configs/{path.name}\n" in text
    with torch.device("meta"):
        sizes = [
            count_parameters(Decoder(config.model.model_copy(update={"vocab_size": n})))
            for n in (100, 101)
        ]
    a_character = sizes[1] - sizes[0]
    assert (
        f"\n# {sizes[0] - 100 * a_character:,} parameters, and {a_character:,} more for each character "
        in text
    )
    training = config.training
    characters = (
        training.seq_len
        * training.micro_batch_size
        * training.grad_accum_steps
        * training.max_steps
    )
    assert f" {characters / 1e6:.0f}M characters in {training.max_steps} steps." in text
    assert config.training.run_name == Path(config.training.checkpoint_dir).name == path.stem, (
        "a run must not overwrite another's checkpoints"
    )


def test_a_tokenizer_path_on_the_command_line_replaces_a_trained_tokenizer(tmp_path):
    """kind, vocab_size and pattern belong to the trained one; overrides after the path still count."""
    path = tmp_path / "c.yaml"
    path.write_text("tokenizer: {kind: bpe, vocab_size: 300, pattern: gpt4}", encoding="utf-8")
    found = load_config(path, ["tokenizer.path=gpt2"]).tokenizer
    assert (found.kind, found.path, found.vocab_size, found.pattern) == ("hf", "gpt2", None, None)
    with pytest.raises(UserError, match="tokenizer.path: only valid for kind hf"):
        load_config(path, ["tokenizer.path=gpt2", "tokenizer.kind=byte"])


def test_the_items_of_a_list_of_texts_are_the_texts_as_typed() -> None:
    """K4: YAML reads true, 1 and false in them."""
    stops = load("{}", "sampling.stop=[Yes, 1, no, '###', 1e3]").sampling.stop
    assert stops == ("Yes", "1", "no", "###", "1e3")
    message = error_of("{}", "sampling.stop=Yes")
    assert 'sampling.stop: must be a list, [a, b], got "Yes".' in message


def test_the_built_in_rows_of_a_task_are_no_path(tmp_path, monkeypatch):
    """A folder of that name above the config is none of ours."""
    (tmp_path / "smoke").mkdir()
    file = tmp_path / "a" / "config.yaml"
    file.parent.mkdir()
    file.touch()
    monkeypatch.chdir(file.parent)
    require_here(Config.model_validate({"data": {"task": "sst2", "dataset": "smoke"}}), file)
    with pytest.raises(UserError, match="but it is in"):
        require_here(Config.model_validate({"data": {"dataset": "smoke"}}), file)
