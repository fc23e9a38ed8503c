"""Every preset loads, says what it is for and how it is run, and has as many parameters, and takes as much memory, as it says."""

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
# Of tokenizers that are not here: what their authors say.
PUBLISHED = {"gpt2": 50257}


def vocabulary(config: Config) -> int | None:
    """The rows of the embedding that a run with these settings has; None where only its data say it."""
    tokenizer = config.tokenizer
    known = {
        "byte": 260,
        "bpe": tokenizer.vocab_size,
        "hf": PUBLISHED.get(tokenizer.path or ""),
        "char": None,
    }
    return config.model.vocab_size or known[tokenizer.kind]


def head_of(path: Path) -> str:
    """The comment that a preset opens with."""
    return "".join(
        line
        for line in re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0].splitlines(
            keepends=True
        )
    )


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_opens_with_the_command_that_runs_it(path):
    load_config(path)
    assert f"--config configs/{path.name}" in head_of(path)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_data_that_a_preset_brings_are_there(path):
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
def test_a_preset_has_as_many_parameters_as_it_says(path):
    config = load_config(path)
    with torch.device("meta"):
        model = Decoder(config.model.model_copy(update={"vocab_size": vocabulary(config)}))
    assert f"{count_parameters(model):,} parameters" in head_of(path)


# For a vocabulary that only the data say: what the presets that have one plan with.
CHARACTERS = 1000
PLANNED = re.compile(
    r"Planned(?:, not measured)?: (?P<number>[\d.]+) (?P<unit>[MG])B (?P<where>on the GPU|on each GPU|beside the program)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PRESETS if PLANNED.search(head_of(path))], ids=lambda path: path.stem
)
def test_a_preset_is_planned_with_as_much_memory_as_it_says(path):
    """The program's own memory left out, which is another one with each version of each library."""
    config = load_config(path)
    said = PLANNED.search(head_of(path))
    assert ("1,000 characters" in head_of(path)) == (vocabulary(config) is None)
    config = with_settings(config, {"model.vocab_size": vocabulary(config) or CHARACTERS})
    planned = plan_run(config, "cpu" if said["where"] == "beside the program" else "cuda")
    assert planned.peak == pytest.approx(
        float(said["number"]) * {"M": 1e6, "G": 1e9}[said["unit"]], rel=0.05
    )  # said to two digits


def test_every_preset_for_pretraining_says_its_memory():
    """That of corpus.yaml is begun by torchrun, and its vocabulary is the user's."""
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
def test_the_presets_for_small_graphics_cards_are_those_of_their_table(
    name, seq_len, layers, heads, width, batch, accumulation, lr
):
    """The table gives the rows of a whole step, and in how many parts they are computed."""
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
