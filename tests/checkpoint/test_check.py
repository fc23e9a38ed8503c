"""Checkpoints with a right digest that no run wrote: each is one error line, in every program."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval_val
import infer
import list as list_program
import train
from tests.checkpoint.test_checkpoint import make_state
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.info import describe
from tinylm.checkpoint.load import load_model
from tinylm.common.errors import DamagedError, UserError

WEIGHT = "blocks.0.attention.out.weight"


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a dotted key of a state."""

    def change(state: dict[str, Any]) -> None:
        *sections, last = key.split(".")
        for section in sections:
            state = state[int(section) if section.isdigit() else section]  # type: ignore[index]
        state[last] = value

    return change


def weight(change: Callable[[torch.Tensor], Any], name: str = WEIGHT) -> Callable[..., None]:
    """Changes a weight of a state."""

    def apply(state: dict[str, Any]) -> None:
        state["weights"] |= {name: change(state["weights"][WEIGHT])}

    return apply


# what is changed in a valid state, and what the error says after the path
ODD = {
    "config is a list": (put("config", [1]), "config: must be of type dict, got list"),
    "section is a list": (put("config.model", [1]), "config.model: must be of type dict, got list"),
    "unknown setting": (put("config.model.deep", 3), "config: model.deep: no such setting"),
    "a depth": (put("config.model.depth", 3), "model.depth: must be null once the settings are"),
    "unknown section": (put("config.modle", {}), "config: modle: no such setting"),
    "names that are numbers": (put("config.model", {1: 2}), "config: must be plain values with"),
    "a tensor": (put("config.model.n_layers", torch.ones(2)), "config: must be plain values with"),
    "n_layers 1e9": (put("config.model.n_layers", 10**9), "model.n_layers: must be at most 1000"),
    "n_layers 10**400": (put("config.model.n_layers", 10**400), "must be at most 1000, got 1000"),
    "more layers": (put("config.model.n_layers", 2), "blocks.1.attention.out.weight: missing"),
    "huge width": (put("config.model.d_model", 2**31 - 2), "must have the shape (2147483646, 8)"),
    "no vocabulary": (put("config.model.vocab_size", None), "config.model: make no model: model."),
    "heads": (put("config.model.n_heads", 3), "model.n_kv_heads: must divide n_heads (3), got 2"),
    "weights is a list": (put("weights", []), "weights: must be of type dict, got list"),
    "no weights": (put("weights", {}), "missing weight"),
    "unknown weight": (weight(torch.clone, "x"), "weights: x: not a weight of the model"),
    "misshapen weight": (weight(lambda w: w[:3]), "must have the shape (8, 8) of its settings"),
    "NaN": (weight(lambda w: w * torch.nan), "weights that are not finite numbers"),
    "infinity": (weight(lambda w: w + torch.inf), "weights that are not finite numbers"),
    "integers": (weight(torch.Tensor.int), "must be a tensor of 32-bit floats, got torch.int32"),
    "16 bits": (weight(torch.Tensor.half), "must be a tensor of 32-bit floats, got torch.float16"),
    "sparse": (weight(torch.Tensor.to_sparse), "must be a tensor of 32-bit floats"),
    "meta": (weight(lambda w: w.to("meta")), "must be a tensor of 32-bit floats"),
    "no tensor": (weight(torch.Tensor.tolist), "must be a tensor with a name"),
    "4 TB in 4 bytes": (
        weight(lambda w: torch.zeros(1).expand(10**6, 10**6)),
        "has 1000000000000 numbers, more than the file",
    ),
    "stage": (put("stage", 5), "stage: must be of type str, got int"),
    "another stage": (put("stage", "verifier"), "head.weight: not a weight of the model"),
    "step is text": (put("step", "3"), "step: must be of type int, got str"),
    "negative step": (put("step", -1), "step: must be a count of at least 0, got -1"),
    "long step": (put("step", 10**30), "step: must be a count of at least 0, got 1000"),
    "date": (put("created", "now"), "created: must be of type float or int, got str"),
    "loss": (put("val_loss", "low"), "val_loss: must be of type float or int or null, got str"),
    "no tokens": (put("tokens", None), "tokens: must be of type int, got null or missing"),
    "schema is text": (put("schema", "2"), "schema: must be of type int, got str"),
    "schema 0": (put("schema", 0), "schema: must be a count of at least 1, got 0"),
    "tokenizer": (put("tokenizer", None), "tokenizer: must be of type dict, got null or missing"),
    "hf_config": (put("hf_config", "{"), "hf_config: not JSON"),
    "hf_config list": (put("hf_config", "[]"), "hf_config: must be of type dict, got list"),
    "adapter": (put("config.lora", {"r": 2}), "base: missing, but this is an adapter"),
    "base": (put("base", {"path": 5}), "base.path: must be of type str, got int"),
    "data": (put("data", {"train": "x"}), "data.val: must be of type str, got null or missing"),
    "optimizer alone": (put("optimizer", {}), "data: must be of type dict, got null or"),
}


@pytest.mark.parametrize("name", ODD)
def test_a_sealed_but_odd_checkpoint_names_what_is_wrong(tmp_path: Path, name: str) -> None:
    change, found = ODD[name]
    state = make_state()
    change(state)
    path = tmp_path / "odd.ckpt"
    checkpoint_format.write(path, state)
    with pytest.raises(DamagedError, match=f"^{re.escape(str(path))}: .*{re.escape(found)}"):
        checkpoint_format.read(path)


@pytest.mark.slow
def test_a_setting_that_a_checkpoint_lacks_has_its_default(tmp_path: Path) -> None:
    """As in one of an older version; every setting of every section, one at a time."""
    state = make_state(3)
    path = tmp_path / "a.ckpt"
    for section, values in state["config"].items():
        for name in values if isinstance(values, dict) else ():
            lacking = {key: value for key, value in values.items() if key != name}
            config = state["config"] | {section: lacking}
            checkpoint_format.write(path, state | {"config": config})
            try:
                found = checkpoint_format.read(path)["config"][section]
            except UserError:  # without it the settings do not fit the weights
                continue
            assert found.keys() == values.keys()
            describe(path)


@pytest.mark.parametrize(
    ("tokenizer", "found"),
    [
        ({"kind": "words"}, "kind must be one of byte, char, hf in this version, got words"),
        ({"kind": "char", "characters": [1], "unknown": 5}, "kind char cannot be read: TypeError"),
        ({"kind": "char"}, "kind char cannot be read: KeyError"),
        (
            {"kind": "hf", "tokenizer_json": "{}"},
            "kind hf cannot be read: RuntimeError: Model missing",
        ),
        (
            {"kind": "char", "characters": "".join(map(chr, range(32, 500))), "unknown": "error"},
            "has 470 tokens, but the model has 260",
        ),
    ],
    ids=["kind", "characters", "nothing", "tokenizer.json", "too many tokens"],
)
def test_an_odd_tokenizer_in_a_checkpoint_is_one_line(
    tmp_path: Path, tokenizer: dict[str, Any], found: str
) -> None:
    """E14. It can be listed, because nothing of the tokenizer is in the list."""
    path = tmp_path / "odd.ckpt"
    checkpoint_format.write(path, make_state(tokenizer=tokenizer))
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: tokenizer: {found}"):
        load_model(path)


def test_list_shows_an_odd_checkpoint_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_format.write(tmp_path / "a.ckpt", make_state(1))
    checkpoint_format.write(tmp_path / "b.ckpt", make_state(2, config=[1]))
    checkpoint_format.write(tmp_path / "c.ckpt", make_state(3))
    assert list_program.main(["--dir", str(tmp_path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("step") for row in rows] == [1, 3, None]
    assert rows[2]["damaged"].startswith("config: must be of type dict, got list")


def test_every_program_refuses_weights_that_are_not_finite(
    tmp_path: Path, make_config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line in place of a traceback, or of a loss of nan with exit code 0."""
    state = make_state()
    weight(lambda w: w * torch.nan)(state)
    path = tmp_path / "odd.ckpt"
    checkpoint_format.write(path, state)
    config = str(make_config())
    for main, arguments in (
        (infer.main, ["--ckpt", str(path), "--prompt", "a"]),
        (eval_val.main, ["--ckpt", str(path), "--config", config]),
        (train.main, ["--config", config, f"training.init_from={path}"]),
    ):
        assert main(arguments) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert f"{path}: has weights that are not finite numbers" in last


@pytest.fixture
def stopped(make_config: Callable[..., Path], tmp_path: Path) -> Path:
    """The config of a run that was stopped after step 2 of 6."""
    path = make_config()
    assert train.main(["--config", str(path), "training.max_steps=2"]) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (put("optimizer", {}), "optimizer in the checkpoint: not the state of this optimizer"),
        (put("optimizer.state.0.exp_avg", torch.ones(3)), "optimizer in the checkpoint: not the"),
        (lambda state: state["optimizer"]["state"][0].pop("exp_avg"), "optimizer in the"),
        (lambda state: state["optimizer"]["param_groups"].pop(), "optimizer in the checkpoint"),
        (put("progress.step", "x"), "progress: step: Input should be a valid integer"),
        (put("progress.step", 7), "progress: step must be 2, got 7"),
        (put("progress.extra", 7), "progress: not that of a run: Progress.__init__() got an"),
        (put("progress.validations", [[1]]), "progress.validations: must be pairs of a step"),
        (put("cursor", "x"), "cursor: must be of type list or null, got str"),
        (put("cursor", [0, "x"]), "cursor: must be five counts"),
    ],
)
def test_an_odd_state_of_a_run_is_not_resumed(
    stopped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], Any],
    found: str,
) -> None:
    path = tmp_path / "checkpoints" / "step-000002.ckpt"
    state = torch.load(path, weights_only=True)
    change(state)
    for other in path.parent.glob("*.ckpt"):
        other.unlink()
    checkpoint_format.write(path, state)
    capsys.readouterr()
    assert train.main(["--config", str(stopped)]) == 2
    assert found in capsys.readouterr().err.splitlines()[-1]


def test_a_pipe_or_device_is_not_a_checkpoint(tmp_path: Path) -> None:
    """E8: named for what it is, and never opened."""
    os.mkfifo(tmp_path / "pipe.ckpt")
    for path in (tmp_path / "pipe.ckpt", Path("/dev/zero")):
        with pytest.raises(DamagedError, match=f"^{path}: not a regular file. Give a .ckpt file"):
            checkpoint_format.read(path)
