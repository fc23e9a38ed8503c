"""Shapes that need options of the decoder which our own models seldom use: imported, they compute what transformers
computes, token by token too, are fine-tuned, and become the same folder again.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import finetune
from tests.interchange.conftest import THEIR_SHAPE, quick
from tests.interchange.test_architectures import scrambled
from tinylm.__main__ import main
from tinylm.checkpoint.load import load_model
from tinylm.generate.lean_step import LeanStep
from tinylm.interchange import conversion
from tinylm.interchange.hf_import import import_hf

GEMMA3 = {"head_dim": 12, "query_pre_attn_scalar": 9, "sliding_window": 5}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
NO_TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
SHAPES = {
    "olmo2": lambda: transformers.Olmo2Config(**THEIR_SHAPE | NO_TOKENS),
    "olmo2, tied": lambda: transformers.Olmo2Config(
        **THEIR_SHAPE | NO_TOKENS, tie_word_embeddings=True, rms_norm_eps=1e-2, rope_theta=300.0
    ),
    "olmo3": lambda: transformers.Olmo3Config(
        **THEIR_SHAPE | NO_TOKENS | {"num_hidden_layers": 5, "sliding_window": 6},
        rope_scaling={
            **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
            **{"attention_factor": 1.2, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "ministral": lambda: transformers.MinistralConfig(
        **THEIR_SHAPE | {"bos_token_id": None, "eos_token_id": None},
        **{"head_dim": 12, "sliding_window": 6},
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma": lambda: transformers.GemmaConfig(**THEIR_SHAPE | NO_TOKENS, head_dim=12),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **THEIR_SHAPE | NO_TOKENS | GEMMA3 | {"num_hidden_layers": 7},
        rope_parameters={
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gemma3_text, 2 layers": lambda: transformers.Gemma3TextConfig(
        **THEIR_SHAPE | NO_TOKENS | GEMMA3, tie_word_embeddings=False
    ),
    "gemma3_text, older keys": lambda: transformers.Gemma3TextConfig(
        **THEIR_SHAPE | NO_TOKENS | GEMMA3 | {"num_hidden_layers": 4, "sliding_window": 64},
        sliding_window_pattern=3,
        rope_theta=5e5,
        rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    ),
}
# Written by transformers or by the reader of a folder, or for readers of another version.
NOT_OF_THE_SHAPE = ("architectures", "transformers_version", "dtype", "rope_theta")
NOT_OF_THE_SHAPE += ("_sliding_window_pattern", "sliding_window_pattern")  # layer_types has it


def random_model(shape: str) -> transformers.PreTrainedModel:
    """Random weights that are bf16 numbers, as those that are published: 1 + w of Gemma's norms is exact then."""
    theirs = scrambled(transformers.AutoModelForCausalLM.from_config(SHAPES[shape]()))
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.bfloat16())
    return theirs


def assert_equal_logits(actual: Tensor, expected: Tensor) -> None:
    """Equal to five digits of the largest logit."""
    assert expected.std() > 0.1, "logits that hardly vary compare nothing"
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("shape", quick(SHAPES, "olmo2", "gemma3_text"))
@torch.no_grad()
def test_logits_are_those_of_transformers_in_one_pass_from_a_cache_and_step_by_step(shape):
    """A prompt of 9 in two parts; then 9 tokens one by one, through the decoder and through its lean step."""
    theirs = random_model(shape)
    model = conversion.from_hf(theirs)
    ids = torch.randint(300, (2, 18), generator=torch.Generator().manual_seed(0))
    expected = theirs(ids).logits
    assert_equal_logits(model(ids), expected)
    lean = LeanStep(model)
    caches = [model.new_cache(2) for _ in range(2)]
    for cache in caches:
        prompt = [model(part, cache=cache) for part in ids[:, :9].split(5, dim=1)]
        assert_equal_logits(torch.cat(prompt, dim=1), expected[:, :9])
    for t in range(9, 18):
        one = ids[:, t]
        assert_equal_logits(model(one[:, None], cache=caches[0])[:, 0], expected[:, t])
        assert_equal_logits(lean(one, caches[1]), expected[:, t])


@pytest.mark.parametrize("shape", quick(SHAPES, "olmo2", "gemma3_text"))
def test_an_import_is_exported_with_the_config_and_the_weights_that_it_had(shape):
    theirs = random_model(shape)
    again = conversion.to_hf(conversion.from_hf(theirs))
    expected, actual = theirs.config.to_dict(), again.config.to_dict()
    for name in NOT_OF_THE_SHAPE:
        expected.pop(name, None), actual.pop(name, None)
    assert actual == expected
    assert actual["model_type"] == shape.partition(",")[0]
    weights = again.state_dict()
    assert weights.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["olmo2", "gemma3_text"])
def test_an_import_is_fine_tuned_and_exported(shape: str, bpe: Callable, tmp_path: Path) -> None:
    """Thirty sums; transformers computes the same logits from the export of what was learned."""
    folder, ckpt = tmp_path / "theirs", tmp_path / "in.ckpt"
    tokenizer = bpe("gpt2")
    config = SHAPES[shape]()
    config.vocab_size = tokenizer.vocab_size
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    plain = tokenizer.to_plain()
    (folder / "tokenizer.json").write_text(plain["tokenizer_json"], encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": plain["eos"]}), "utf-8")
    import_hf(str(folder), ckpt)
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"{n} and {n}?", "output": f"It is {2 * n}."} for n in range(30)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = tmp_path / "a.yaml"
    settings.write_text(f"data: {{dataset: {rows}}}\nhardware: {{accelerator: cpu}}\n", "utf-8")
    steps = ["training.max_steps=12", "training.seq_len=64", "training.micro_batch_size=4"]
    places = [f"training.checkpoint_dir={tmp_path / 'runs'}", f"training.log_dir={tmp_path / 'l'}"]
    start = [f"training.init_from={ckpt}", "training.lr=0.01", "training.val_every_steps=6"]
    assert finetune.main(["--config", str(settings), *start, *steps, *places]) == 0
    [file] = (tmp_path / "l").rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines_of_file:
        losses = [
            float(row["val_loss"]) for row in csv.DictReader(lines_of_file) if row["val_loss"]
        ]
    assert losses[-1] < losses[0]

    tuned = tmp_path / "runs" / "final.ckpt"
    assert main(["export", str(tuned), str(tmp_path / "out")]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.model_type == shape
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_equal_logits(load_model(tuned).model.eval()(ids), theirs(ids).logits)
