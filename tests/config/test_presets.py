"""Every preset loads, and its comment is true: the command, the number of parameters and the memory."""

import re
from pathlib import Path

import pytest
import torch

from tests.conftest import CONFIGS
from tinylm.config.loader import load_config
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder, count_parameters
from tinylm.planning.memory_plan import plan_run, with_settings

ROOT = Path(__file__).parents[2]
PRESETS = [path for path in CONFIGS if path.parent.name == "configs"]
# Vocabulary sizes of tokenizers that are not here: as published, and as docs/RECIPES.md learns it.
PUBLISHED = {"gpt2": 50257, "tokenizers/tinystories": 8192}


def vocabulary(config: Config) -> int | None:
    """The vocabulary size of a run with these settings; None if it depends on the data."""
    tokenizer = config.tokenizer
    known = {
        "byte": 260,
        "bpe": tokenizer.vocab_size,
        "hf": PUBLISHED.get(tokenizer.path or ""),
        "char": None,
    }
    return config.model.vocab_size or known[tokenizer.kind]


def head_of(path: Path) -> str:
    """The comment at the top of a preset."""
    return "".join(
        line
        for line in re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0].splitlines(
            keepends=True
        )
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_begins_with_the_command_that_runs_it(path):
    load_config(path)
    assert f"--config configs/{path.name}" in head_of(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_local_data_of_a_preset_exist(path):
    data = load_config(path).data
    own = [
        name
        for name in (data.dataset, data.val_dataset)
        if name is not None and name.startswith("data/")
    ]
    assert [name for name in own if not (ROOT / name).is_file()] == []


COUNTED = [
    path for path in PRESETS if " parameters" in head_of(path) and vocabulary(load_config(path))
]


@pytest.mark.parametrize("path", COUNTED, ids=lambda path: path.stem)
def test_a_preset_has_the_number_of_parameters_in_its_comment(path):
    config = load_config(path)
    with torch.device("meta"):
        model = Decoder(config.model.model_copy(update={"vocab_size": vocabulary(config)}))
    assert f"{count_parameters(model):,} parameters" in head_of(path)


# The vocabulary size that presets with a character tokenizer plan with.
CHARACTERS = 1000
PLANNED = re.compile(
    r"Planned(?:, not measured)?: (?P<number>[\d.]+) (?P<unit>[MG])B (?P<where>on the GPU|on each "
    r"GPU|beside the program)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PRESETS if PLANNED.search(head_of(path))], ids=lambda path: path.stem
)
def test_a_preset_is_planned_with_the_memory_in_its_comment(path):
    """Without the program's own memory, which differs between versions of the libraries."""
    config = load_config(path)
    match = PLANNED.search(head_of(path))
    assert ("1,000 characters" in head_of(path)) == (vocabulary(config) is None)
    config = with_settings(config, {"model.vocab_size": vocabulary(config) or CHARACTERS})
    if config.hardware.precision == "auto":  # the larger one
        config = with_settings(config, {"hardware.precision": "32"})
    planned = plan_run(config, "cpu" if match["where"] == "beside the program" else "cuda")
    assert planned.peak == pytest.approx(
        float(match["number"]) * {"M": 1e6, "G": 1e9}[match["unit"]], rel=0.05
    )  # given to two digits


def test_every_preset_for_pretraining_gives_its_memory():
    """Except corpus.yaml, which is started by torchrun and has the user's vocabulary."""
    pretraining = [
        path for path in PRESETS if f"python train.py --config configs/{path.name}" in head_of(path)
    ]
    assert len(pretraining) > 10
    assert [path.stem for path in pretraining if not PLANNED.search(head_of(path))] == []


@pytest.mark.parametrize(
    ("name", "seq_len", "layers", "heads", "width", "batch", "accumulation", "lr"),
    [
        ("tiny-8g", 256, 6, 8, 512, 32, 1, 3e-4),
        ("compact-8g", 384, 6, 8, 512, 24, 2, 3e-4),
        ("small-16g", 512, 8, 8, 640, 32, 1, 2e-4),
        ("cpu-debug", 128, 2, 4, 256, 8, 1, 5e-4),
    ],
)
def test_the_presets_for_small_gpus_have_the_settings_of_their_table(
    name, seq_len, layers, heads, width, batch, accumulation, lr
):
    """The table gives the rows per optimizer step and the number of micro-batches."""
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model, training = config.model, config.training
    assert (training.seq_len, model.n_layers, model.n_heads, model.d_model) == (
        seq_len,
        layers,
        heads,
        width,
    )
    assert (
        training.micro_batch_size * training.grad_accum_steps,
        training.grad_accum_steps,
        training.lr,
    ) == (batch, accumulation, lr)
