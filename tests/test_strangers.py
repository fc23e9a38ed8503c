"""Files from strangers: whatever is in them, a program ends with a result or one UserError (FAULTS E, F, H).

Each test changes valid files with hypothesis: seeded (`derandomize`) and bounded, so that it is the same on every machine. Any other
exception is a bug, and a hang is ended by pytest's time limit in CI.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.info import describe
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import UserError
from tinylm.common.files import open_regular, read_regular
from tinylm.config.loader import load_config
from tinylm.config.messages import sections
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import parse_conversation
from tinylm.rows.row_files import read_rows
from tinylm.tokens.token_file import TokenFile

BOUNDED = settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# odd values of JSON: other types, sizes that nothing has, numbers that are none
VALUES = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            0,
            -1,
            1,
            7,
            2**31,
            2**63,
            10**30,
            0.5,
            -0.0,
            1e308,
            float("nan"),
            float("inf"),
        ]
    ),
    st.sampled_from(
        ["", "x", "\0", "\ud800", "../x", "hf:x", [], {}, [1], {"a": 1}, [[1]], {1: 2}]
    ),
)


def paths_of(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The places in a tree of dicts and lists."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = [prefix] if prefix else []
    for key, part in items:
        found += paths_of(part, (*prefix, key))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any, *, remove: bool) -> Any:
    """A copy of the tree with another value at a place, or without it."""
    value = copy.copy(value)
    key, *rest = path
    if rest:
        value[key] = changed(value[key], tuple(rest), new, remove=remove)
    elif remove:
        del value[key]
    else:
        value[key] = new
    return value


def clean(action: Any) -> None:
    """Run it; a UserError is one line without control characters, everything else is raised."""
    try:
        action()
    except UserError as error:
        assert str(error).isprintable()


STATE = make_state(
    optimizer={"state": {}, "param_groups": []},
    precision={},
    progress={"step": 3, "validations": [[3, 1.0]]},
    cursor=None,
    data={"train": "a", "val": "b"},
    world_size=1,
    threads=1,
)
STATE_PATHS = paths_of(STATE)


@pytest.mark.slow
@BOUNDED
@given(st.sampled_from(STATE_PATHS), VALUES, st.booleans())
def test_any_checkpoint_is_read_or_refused(tmp_path_factory, path, value, remove) -> None:
    """One place of a state has another value, or is missing; the digest is right."""
    if isinstance(value, str) and "\ud800" in value:
        value = "x"  # torch cannot write it
    file = tmp_path_factory.getbasetemp() / "fuzz.ckpt"
    checkpoint_format.write(file, changed(STATE, path, value, remove=remove))
    clean(lambda: describe(file))
    clean(lambda: load_model(file))


@pytest.mark.slow
@BOUNDED
@given(st.binary(max_size=300), st.integers(0, 4000), st.booleans())
def test_any_bytes_in_a_signed_checkpoint_are_refused(tmp_path_factory, junk, place, cut) -> None:
    """The zip itself is damaged, and its digest is that of the damaged file."""
    file = tmp_path_factory.getbasetemp() / "junk.ckpt"
    with open(file, "w+b") as opened:
        torch.save(STATE, opened)
        content = opened.seek(0) or opened.read()
        body, end = content[:-22], content[-22:]
        body = body[:place] + junk + (b"" if cut else body[place + len(junk) :])
        opened.seek(0)
        opened.truncate()
        opened.write(body + end)
        checkpoint_format._append_digest(opened)
    clean(lambda: load_model(file))


HF_FILES = pytest.importorskip("transformers") and {
    "config.json": {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "head_dim": 4,
        "eos_token_id": 0,
    },
    "tokenizer.json": {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": "<eos>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "a+"},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {"<eos>": 0, "a": 1, "<unk>": 2},
            "unk_token": "<unk>",
        },
    },
    "tokenizer_config.json": {"eos_token": "<eos>"},
}


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A tiny Llama with its tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("hf")
    for name, content in HF_FILES.items():
        (folder / name).write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**HF_FILES["config.json"]))
    weights = {name: w.contiguous() for name, w in model.state_dict().items()}
    weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def open_folder(folder: Path) -> None:
    """What fine-tuning from hf:FOLDER does."""
    from tinylm.model.hf_files import find_hf_model
    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    find_hf_model(str(folder)).load()
    load_hf_tokenizer(str(folder)).encode("aab" + "a" * 30)


def test_the_folder_itself_is_valid(hf_folder: Path) -> None:
    open_folder(hf_folder)


@pytest.mark.slow
@BOUNDED
@given(
    st.sampled_from([(name, path) for name, tree in HF_FILES.items() for path in paths_of(tree)]),
    VALUES,
    st.booleans(),
)
def test_any_json_of_a_hugging_face_model_is_read_or_refused(hf_folder, place, value, remove):
    name, path = place
    file = hf_folder / name
    before = file.read_bytes()
    file.write_text(json.dumps(changed(HF_FILES[name], path, value, remove=remove)))
    try:
        clean(lambda: open_folder(hf_folder))
    finally:
        file.write_bytes(before)


@pytest.mark.slow
@BOUNDED
@given(
    st.sampled_from(["model.safetensors", *HF_FILES]), st.integers(0, 3000), st.binary(max_size=9)
)
def test_any_bytes_of_a_hugging_face_model_are_read_or_refused(hf_folder, name, place, junk):
    file = hf_folder / name
    before = file.read_bytes()
    place %= len(before)
    file.write_bytes(before[:place] + junk + before[place + max(1, len(junk)) :])
    try:
        clean(lambda: open_folder(hf_folder))
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("kind", ["default", "zzz", 5])
def test_an_unknown_rope_type_is_one_line(hf_folder, kind) -> None:
    file = hf_folder / "config.json"
    before = file.read_bytes()
    rope = {"rope_type": kind, "rope_theta": 10000.0}
    file.write_text(json.dumps(HF_FILES["config.json"] | {"rope_parameters": rope}))
    try:
        if kind == "default":
            open_folder(hf_folder)
        else:
            with pytest.raises(UserError, match="transformers cannot"):
                open_folder(hf_folder)
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*$"])
def test_a_regular_expression_that_takes_forever_is_one_line(hf_folder, capfd, pattern) -> None:
    """A panic of the tokenizers library, which is no Exception, and writes its own lines."""
    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    file = hf_folder / "tokenizer.json"
    before = file.read_bytes()
    file.write_bytes(before.replace(b'"Regex": "a+"', f'"Regex": "{pattern}"'.encode()))
    try:
        tokenizer = load_hf_tokenizer(str(hf_folder))
        with pytest.raises(UserError, match="^tokenizer: the tokenizers library cannot encode"):
            tokenizer.encode("a" * 40 + "b")
    finally:
        file.write_bytes(before)
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.slow
@BOUNDED
@given(st.sampled_from([".jsonl", ".json"]), st.lists(VALUES, max_size=3), st.binary(max_size=20))
def test_any_rows_are_read_or_refused(tmp_path_factory, suffix, values, junk) -> None:
    file = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    rows = [{"prompt": value, "completion": "b"} for value in values] + values
    text = "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows)
    file.write_bytes(text.encode() + junk)
    data = DataConfig(dataset=str(file))

    def use() -> None:
        for _, row in read_rows(data, "train", 1):
            clean(lambda row=row: parse_conversation(row, data))

    clean(use)


@pytest.mark.slow
@BOUNDED
@given(st.integers(0, 900), st.binary(max_size=40), st.booleans())
def test_any_token_file_is_read_or_refused(tmp_path_factory, place, junk, cut) -> None:
    from tests.conftest import write_token_file
    from tinylm.tokenizer.byte_char import ByteTokenizer

    file = tmp_path_factory.getbasetemp() / "tokens.bin"
    file.unlink(missing_ok=True)
    write_token_file(file, ["one", "two"], ByteTokenizer())
    content = file.read_bytes()
    file.write_bytes(content[:place] + junk + (b"" if cut else content[place + len(junk) :]))

    def use() -> None:
        found = TokenFile.open(file)
        found.verify()
        list(found.documents(found.tokens.dtype))

    clean(use)


@pytest.mark.slow
@BOUNDED
@given(st.text(max_size=60), VALUES)
def test_any_yaml_is_read_or_refused(tmp_path_factory, text, value) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    for content in (text, "model:\n  n_layers: " + text, yaml.dump({"training": value})):
        file.write_bytes(content.encode("utf-8", "surrogatepass"))
        clean(lambda: load_config(file))


NUMBERS = sorted(
    f"{key}.{name}"
    for key, section in sections()
    if key and "[]" not in key
    for name, info in section.model_fields.items()
    if "int" in str(info.annotation) or "float" in str(info.annotation)
)


@pytest.mark.parametrize("value", ["0", "-1", "1e308", "nan", "''", "null", "[1]"])
def test_every_numeric_setting_takes_or_refuses_an_odd_value(tmp_path: Path, value: str) -> None:
    """F7, over the whole schema."""
    file = tmp_path / "any.yaml"
    file.write_text("training: {seed: 1}\n")
    assert "training.lr" in NUMBERS and "lora.r" in NUMBERS and len(NUMBERS) > 60
    for key in NUMBERS:
        clean(lambda key=key: load_config(file, [f"{key}={value}"]))


def test_rates_that_overflow_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "any.yaml"
    file.write_text("training: {seed: 1}\n")
    for overrides, found in (
        (["training.muon_lr=1e21"], "training.muon_lr: must be at most 1e\\+20"),
        (["training.optimizer=muon", "training.lr=1e38"], "at most 1e20 with optimizer muon"),
        (["training.optimizer=sgd", "training.lr=1e38"], "at most 1e20 with optimizer sgd"),
    ):
        with pytest.raises(UserError, match=found):
            load_config(file, overrides)
    # torch's fused AdamW diverges, which is seen after the step
    assert load_config(file, ["training.lr=1e38"]).training.lr == 1e38


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_a_folder_is_refused(hf_folder: Path, name: str) -> None:
    """E8: it would hang until something writes into it."""
    (hf_folder / name).rename(hf_folder / "kept")
    os.mkfifo(hf_folder / name)
    try:
        with pytest.raises(UserError, match=f"{name}: not a regular file"):
            open_folder(hf_folder)
    finally:
        (hf_folder / "kept").replace(hf_folder / name)


def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        for read in (open_regular, read_regular):
            with pytest.raises(UserError, match="not a regular file. Give the path of a file on"):
                read(path)
    with pytest.raises(UserError, match="^a.x00b: embedded null byte"):
        read_regular("a\0b")


def test_a_file_that_becomes_a_pipe_after_the_check_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tinylm.common.files.require_regular", lambda path: None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_token_file_that_is_cut_in_use_is_one_line(tmp_path: Path) -> None:
    """Reading the mapped file beyond its end would kill the process with SIGBUS."""
    from tests.conftest import write_token_file
    from tinylm.tokenizer.byte_char import ByteTokenizer
    from tinylm.tokens.packing import TokenRows

    path = tmp_path / "tokens.bin"
    write_token_file(path, ["one two three"] * 2000, ByteTokenizer())
    rows = TokenRows(TokenFile.open(path), seq_len=16, stride=16, pad_id=0)
    rows[1000]
    os.truncate(path, 10_000)
    with pytest.raises(UserError, match="has become shorter while it is in use: 10000 of"):
        rows[1000]
