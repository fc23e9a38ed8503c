"""model.depth: each rule, each setting that replaces one, and what a resolved config is."""

import logging
from pathlib import Path

import pytest

from tinylm.common.errors import UserError
from tinylm.config.depth import RULES
from tinylm.config.loader import load_config
from tinylm.config.schema import Config, ModelConfig
from tinylm.config.yaml_text import config_text


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Settings from overrides, over a config with nothing but a depth of 4 and Muon."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("model: {depth: 4}\ntraining: {optimizer: muon}\n", encoding="utf-8")
    return lambda *overrides: load_config("c.yaml", overrides)


def value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


# --- the rules ---


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # 4 · 32 wide in 2 heads of 64; 4 · 1024 tokens are 16 rows of 256
        ("", {"model.n_layers": 4, "model.d_model": 128, "model.n_heads": 2}),
        ("", {"training.micro_batch_size": 16, "training.grad_accum_steps": 1}),
        ("", {"training.lr": 3e-3, "training.muon_lr": 0.02, "training.weight_decay": 0.1}),
        ("", {"training.embedding_lr": None, "training.head_lr": None}),
        # half as wide: one head; a wider one: 5 · 32 / 64 = 2.5, and 3 do not divide 160
        ("model.depth=2", {"model.d_model": 64, "model.n_heads": 1}),
        ("model.depth=5", {"model.d_model": 160, "model.n_heads": 4}),
        # 37 · 32 = 1184 in 19 heads or more: of the divisors 32 and 37, 37 leaves an even width
        ("model.depth=37", {"model.n_heads": 37}),
        # Muon: the rates stay, the decay falls with the steps, 4² / 8², and is never above 0.1
        ("model.depth=8", {"training.muon_lr": 0.02, "training.weight_decay": 0.025}),
        ("model.depth=2", {"training.weight_decay": 0.1}),
        # AdamW: the rate falls with the width, 128 / 256, and rate x decay with the steps
        (
            "model.depth=8 training.optimizer=adamw",
            {"training.lr": 1.5e-3, "training.muon_lr": 0.02, "training.weight_decay": 0.05},
        ),
        # a head of its own: 0.01 · 128 / 256
        (
            "model.depth=8 model.tie_embeddings=false",
            {"training.embedding_lr": 0.1, "training.head_lr": 0.005},
        ),
        # no rule for SGD: the defaults
        ("training.optimizer=sgd", {"training.lr": 3e-4, "training.weight_decay": 0.1}),
        # 12 · 1024 tokens in two parts of at most 8192, 24 rows of 256 each
        (
            "model.depth=12",
            {"training.micro_batch_size": 24, "training.grad_accum_steps": 2},
        ),
        # 13 rows of 1024 tokens are not two equal parts: 14 are
        (
            "model.depth=13 training.seq_len=1024",
            {"training.micro_batch_size": 7, "training.grad_accum_steps": 2},
        ),
        # a row of more tokens than a step has
        (
            "model.depth=1 training.seq_len=4096 model.max_seq_len=4096",
            {"training.micro_batch_size": 1, "training.grad_accum_steps": 1},
        ),
        # two devices share the batch
        ("hardware.devices=2", {"training.micro_batch_size": 8}),
    ],
)
def test_a_rule_gives_the_value_of_its_formula(load, overrides, expected):
    config = load(*overrides.split())
    assert {key: value(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("model.d_model=256", {"model.d_model": 256, "model.n_heads": 4}),
        ("model.n_heads=8", {"model.d_model": 128, "model.n_heads": 8}),
        ("model.head_dim=16", {"model.n_heads": 8, "model.head_dim": 16}),
        ("model.n_kv_heads=4", {"model.n_heads": 4, "model.n_kv_heads": 4}),
        ("training.lr=0.5", {"training.lr": 0.5}),
        ("training.muon_lr=0.5", {"training.muon_lr": 0.5}),
        ("training.embedding_lr=0.5", {"training.embedding_lr": 0.5}),
        (
            "model.tie_embeddings=false training.head_lr=0.5",
            {"training.embedding_lr": 0.1, "training.head_lr": 0.5},
        ),
        ("training.weight_decay=0.5", {"training.weight_decay": 0.5}),
        (
            "training.micro_batch_size=4",
            {"training.micro_batch_size": 4, "training.grad_accum_steps": 4},
        ),
        (
            "training.grad_accum_steps=2",
            {"training.micro_batch_size": 8, "training.grad_accum_steps": 2},
        ),
        (
            "training.micro_batch_size=auto",
            {"training.batch_size": 16, "training.grad_accum_steps": 1},
        ),
        (
            "training.micro_batch_size=auto training.batch_size=5",
            {"training.batch_size": 5, "training.micro_batch_size": "auto"},
        ),
        # the width of the rates is the one that was written: 3e-3 · 128 / 384
        (
            "model.d_model=384 training.optimizer=adamw",
            {"training.lr": 1e-3, "model.n_heads": 6},
        ),
        # null leaves a setting to its rule
        ("model.d_model=null training.lr=null", {"model.d_model": 128, "training.lr": 3e-3}),
    ],
)
def test_a_written_value_replaces_its_rule_and_counts_in_the_others(load, overrides, expected):
    config = load(*overrides.split())
    assert {key: value(config, key) for key in expected} == expected


def test_a_recipe_chooses_the_optimizer_and_the_rules_its_rates(load):
    """Its own head_lr, 0.01, is for one width; 128 / 256 here. What is written stays."""
    Path("r.yaml").write_text("recipe: research\nmodel: {depth: 8}\n", encoding="utf-8")
    training = load_config("r.yaml").training
    assert (training.optimizer, training.lr, training.weight_decay) == ("muon", 3e-3, 0.025)
    assert (training.muon_lr, training.momentum, training.betas) == (0.02, 0.85, (0.7, 0.95))
    assert (training.embedding_lr, training.head_lr, training.decay_ratio) == (0.1, 0.005, 0.65)
    assert load_config("r.yaml", ["training.head_lr=0.02"]).training.head_lr == 0.02
    # no rule: the default, not the value of the recipe
    tied = load_config("r.yaml", ["model.tie_embeddings=true"]).training
    assert (tied.embedding_lr, tied.head_lr) == (None, None)
    sgd = load_config("r.yaml", ["training.optimizer=sgd"]).training
    assert (sgd.lr, sgd.embedding_lr, sgd.head_lr) == (3e-4, None, None)


def test_every_rule_has_a_test_of_its_setting():
    """The two tables above name every setting that a rule sets."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert [rule.key for rule in RULES if source.count(f'"{rule.key}"') < 2] == []


# --- the resolved config ---


def test_a_resolved_config_is_plain_and_loads_as_itself(load):
    """config.yaml of a run and its checkpoint have it; neither needs the rules again."""
    config = load("model.tie_embeddings=false", "training.micro_batch_size=auto")
    assert config.model.depth is None
    assert Config.from_plain(config.to_plain()) == config
    Path("again.yaml").write_text(config_text(config), encoding="utf-8")
    assert load_config("again.yaml") == config


def test_a_depth_is_the_config_with_its_values_written(load):
    Path("written.yaml").write_text(
        "model: {n_layers: 4, d_model: 128, n_heads: 2}\n"
        "training: {optimizer: muon, lr: 0.003, muon_lr: 0.02, weight_decay: 0.1, "
        "micro_batch_size: 16, grad_accum_steps: 1}\n",
        encoding="utf-8",
    )
    assert load() == load_config("written.yaml")


def test_loading_logs_what_was_set_and_what_was_written(load, caplog):
    with caplog.at_level(logging.INFO, logger="tinylm"):
        load("training.lr=0.5", "model.n_kv_heads=1")
    assert caplog.messages == [
        "model.depth 4 sets d_model 128, n_heads 2, grad_accum_steps 1, micro_batch_size 16, "
        "muon_lr 0.02, weight_decay 0.1; as written: lr 0.5"
    ]


# --- errors ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "model.n_layers=3",
            "command line: model.n_layers: cannot be combined with model.depth (4): both are the "
            "number of layers. Remove one; on the command line model.n_layers=null removes it",
        ),
        (
            "training.init_from=a.ckpt",
            "c.yaml:1: model.depth: cannot be combined with training.init_from, whose model has a "
            "shape. Remove one",
        ),
        ("model.depth=0", "command line: model.depth: must be at least 1, got 0"),
        ("model.depth=1001", "command line: model.depth: must be at most 1000, got 1001"),
        ("model.depth=deep", 'command line: model.depth: must be a whole number, got "deep"'),
        # wrong settings that rules read are the errors that they are without a depth
        ("model.d_model=wide", 'command line: model.d_model: must be a whole number, got "wide"'),
        (
            "model.d_model=99",
            "command line: model.d_model: head_dim = d_model / n_heads = 99 / 1 must be even for "
            "position rope. Change one, or set an even head_dim",
        ),
        (
            "training.batch_size=4",
            "command line: training.batch_size: only valid for micro_batch_size auto "
            "(micro_batch_size is 16). Set training.micro_batch_size and "
            "training.grad_accum_steps, or micro_batch_size to auto",
        ),
    ],
)
def test_a_conflict_or_a_wrong_value_is_named_with_its_place(load, overrides, message):
    with pytest.raises(UserError) as caught:
        load(*overrides.split())
    assert str(caught.value).partition(". Meaning:")[0].rstrip(".") == message


def test_n_layers_of_a_preset_can_be_removed_for_a_depth(load):
    Path("preset.yaml").write_text("model: {n_layers: 9}\n", encoding="utf-8")
    config = load_config("preset.yaml", ["model.depth=2", "model.n_layers=null"])
    assert config.model.n_layers == 2


def test_a_depth_without_a_config_file_is_an_error_of_the_caller():
    with pytest.raises(ValueError, match="depth.*must be null once"):
        ModelConfig(depth=3)
