"""Adapters: which weights are trained, that the base is unchanged, and that merged, separate and peft's own
adapters agree (FAULTS: B14, D8).
"""

import importlib.util
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tinylm.checkpoint.initial import fingerprint_of
from tinylm.common.errors import UserError
from tinylm.config.model import ModelConfig, MoEConfig
from tinylm.config.schema import LoraConfig, TrainingConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import (
    adapter_weights,
    adapters_off,
    attach,
    default_targets,
    load_adapter,
    merge,
    target_layers,
)
from tinylm.optim.optimizers import make_optimizer

SHAPE = {
    "vocab_size": 97,
    "max_seq_len": 32,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 48,
}
LORA = LoraConfig(r=4, alpha=8.0)
KINDS = {"LoRA": LORA, "DoRA": LORA.model_copy(update={"dora": True})}


def ours(**settings: Any) -> Decoder:
    """A decoder of random weights."""
    torch.manual_seed(0)
    return Decoder(ModelConfig(**SHAPE, **settings)).eval()


def theirs(kind: str) -> HFModel:
    """A Hugging Face model of random weights."""
    import transformers

    torch.manual_seed(0)
    names = {
        "vocab_size": 97,
        "max_position_embeddings": 32,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
    }
    extra = {"bos_token_id": None, "eos_token_id": None} | (
        {} if kind == "gpt2" else {"intermediate_size": 48, "num_key_value_heads": 2}
    )
    if kind == "qwen2_moe":  # the gate of its shared expert has one output
        extra |= {"num_experts": 3, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16}
    config = transformers.AutoConfig.for_model(kind, **names, **extra)
    return HFModel(
        transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    )


MODELS = {
    "ours": lambda: ours(),
    "ours with biases and few kv heads": lambda: ours(
        bias="all", n_kv_heads=2, ffn="gelu", tie_embeddings=False
    ),
    "ours with experts": lambda: ours(moe=MoEConfig(n_experts=3, top_k=2)),
    "gpt2": lambda: theirs("gpt2"),
    "llama": lambda: theirs("llama"),
    "qwen2_moe": lambda: theirs("qwen2_moe"),
}


def randomize_adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random adapters, as after training: B is not zero. They are put into the model and returned."""
    generator = torch.Generator().manual_seed(1)
    made = {
        name: 0.3 * torch.randn(weight.shape, generator=generator)
        for name, weight in adapter_weights(dict(model.named_parameters())).items()
    }
    load_adapter(model, made)
    return made


def logits(model: nn.Module) -> torch.Tensor:
    """Logits of fixed ids, without dropout."""
    with torch.no_grad():
        return model.eval()(torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_merged_and_separate_adapters_give_the_same_logits_and_disabled_ones_the_base(
    name: str, kind: str
) -> None:
    """D8: disabled adapters equal the base exactly, and so do new ones (B = 0); merged equals separate up to
    rounding, and both differ from the base. Separate ones are peft's code, merged ones ours.
    """
    lora = KINDS[kind]
    base, model, merged = (MODELS[name]() for _ in range(3))
    before = logits(base)
    attach(model, lora, seed=0)
    assert torch.equal(logits(model), before)
    weights = randomize_adapters(model)
    separate = logits(model)
    assert (separate - before).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), separate)
    merge(merged, weights, lora)
    assert torch.allclose(logits(merged), separate, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_rows_of_a_matrix_merged_by_dora_have_the_trained_lengths(name: str) -> None:
    """Equation 5 of arXiv:2402.09353 divides each row by its length, so that m alone sets it; at first m is the
    length in the base.
    """
    model, merged = MODELS[name](), MODELS[name]()
    attach(model, KINDS["DoRA"], seed=0)
    found = adapter_weights(dict(model.named_parameters()))
    layers = {
        layer: merged.get_submodule(layer)
        for layer in (key.removesuffix(".lora_magnitude_vector") for key in found)
        if f"{layer}.lora_magnitude_vector" in found
    }
    assert len(layers) == 8

    def lengths(layer: nn.Module) -> torch.Tensor:
        return layer.weight.detach().norm(dim=1 if isinstance(layer, nn.Linear) else 0)

    for layer, module in layers.items():
        assert torch.equal(found[f"{layer}.lora_magnitude_vector"], lengths(module))
    weights = randomize_adapters(model)
    merge(merged, weights, KINDS["DoRA"])
    for layer, module in layers.items():
        expected = weights[f"{layer}.lora_magnitude_vector"].abs()
        assert torch.allclose(lengths(module), expected, rtol=1e-4)


def test_dora_refuses_a_row_of_zeros() -> None:
    """Its direction is 0 / 0, and the first loss would be NaN."""
    model = ours()
    model.blocks[1].ffn.up.weight.data[3:5] = 0.0
    words = (
        "^lora.dora: blocks.1.ffn.up has 2 all-zero rows, whose direction DoRA cannot normalize. Remove "
        "it, or name other lora.target_modules.$"
    )
    with pytest.raises(UserError, match=words):
        attach(model, KINDS["DoRA"], seed=0)
    attach(model, LORA, seed=0)


@pytest.mark.parametrize("name", ["ours", "gpt2"])
def test_rslora_multiplies_by_alpha_over_the_root_of_r(name: str) -> None:
    """peft's own layers are the oracle: it computes with alpha / sqrt(r), here sqrt(r) times as much as LoRA."""
    own = LORA.model_copy(update={"rslora": True})
    model, merged, plain = (MODELS[name]() for _ in range(3))
    attach(model, own, seed=0)
    weights = randomize_adapters(model)
    merge(merged, weights, own)
    assert torch.allclose(logits(merged), logits(model), atol=1e-4, rtol=1e-4)
    merge(plain, weights, LORA)
    assert (logits(plain) - logits(model)).abs().max() > 0.01
    assert own.scale == pytest.approx(LORA.scale * own.r**0.5)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_are_trained_and_the_base_is_unchanged_to_the_last_bit(name: str) -> None:
    """A step of AdamW with weight decay changes A and B, and no weight of the base."""
    model, base = MODELS[name](), MODELS[name]()
    attach(model, LORA, seed=0)
    randomize_adapters(model)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    optimizer = make_optimizer(model, TrainingConfig(lr=1e-2), fused=True)
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    adapters = [weight for key, weight in model.named_parameters() if ".lora_" in key]
    assert held == {id(weight) for weight in adapters}
    model.train()
    model(torch.arange(16)[None]).square().mean().backward()
    optimizer.step()
    moved = {
        key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])
    }
    assert moved == {key for key in before if ".lora_" in key}
    assert len(moved) == len(adapters) > 0
    with adapters_off(model):
        assert torch.equal(logits(model), logits(base))


def test_initial_adapters_depend_on_the_seed_alone() -> None:
    """Not on random numbers drawn before; another seed gives other values."""
    made = []
    for seed in (0, 0, 1):
        model = ours()
        torch.rand(len(made) + 1)
        attach(model, LORA, seed=seed)
        made.append(fingerprint_of(model))
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", ("down", "out", "qkv", "up")),
        ("ours with experts", ("out", "qkv")),
        ("gpt2", ("c_attn", "c_fc", "c_proj")),
        ("llama", ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")),
        (
            "qwen2_moe",
            ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
        ),
    ],
)
def test_the_defaults_fit_each_architecture(name: str, expected: tuple[str, ...]) -> None:
    """Attention and feed-forward, never the head; a mixture's experts are not modules, and its router is not a
    default target.
    """
    model = MODELS[name]()
    assert default_targets(model) == expected
    layers = target_layers(model, LORA)
    assert {layer.rpartition(".")[2] for layer in layers} == set(expected)
    assert len(layers) == 2 * len(expected) + (2 if name == "gpt2" else 0), (
        "GPT-2 has a c_proj in attention and one in the feed-forward"
    )


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "ours",
            {"target_modules": ("qkv", "q_proj")},
            "lora.target_modules: must name layers that can have an adapter (down, out, qkv, up), got q_proj.",
        ),
        ("ours", {"target_modules": ("head",)}, "), got head."),
        (
            "ours",
            {"target_modules": ("embedding",)},
            "), got embedding.",
        ),
        (
            "ours with experts",
            {"target_modules": ("up",)},
            "must name layers that can have an adapter (out, qkv, router), got up.",
        ),
        (
            "llama",
            {"target_modules": ("lm_head",)},
            "), got lm_head.",
        ),
        (
            "ours",
            {"r": 33},
            "lora.r: must be at most 32, the smaller side of blocks.0.ffn.down, got 33.",
        ),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_errors(
    name: str, settings: dict[str, Any], words: str
) -> None:
    """D8: the loss uses the head's matrix, not the module, so an adapter on it would be ignored."""
    with pytest.raises(UserError) as error:
        attach(MODELS[name](), LoraConfig(**settings), seed=0)
    assert words in str(error.value)


def test_layers_that_peft_refuses_are_an_error() -> None:
    """Mamba's kernels read the weights of some layers, so that adapters on them would be ignored."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "mamba",
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},  # which no Mamba has
    )
    model = HFModel(transformers.AutoModelForCausalLM.from_config(config))
    words = (
        "^lora.target_modules: peft refuses a layer: .*out_proj.*"
        "Name others of dt_proj, in_proj, out_proj, x_proj.$"
    )
    with pytest.raises(UserError, match=words):
        attach(model, LoraConfig(r=2), seed=0)
    attach(model, LoraConfig(r=2, target_modules=("in_proj", "x_proj")), seed=0)


def test_without_peft_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """F8."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="peft: this package is needed and is not installed. pip install peft."
    ):
        attach(ours(), LORA, seed=0)


def test_merging_needs_no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """So infer.py with an adapter of our decoder starts in one second instead of five."""
    weights = {
        "blocks.0.attention.qkv.lora_A.weight": torch.ones(1, 32),
        "blocks.0.attention.qkv.lora_B.weight": torch.ones(96, 1),
    }
    monkeypatch.setitem(sys.modules, "peft", None)
    model = ours()
    before = model.blocks[0].attention.qkv.weight.clone()
    merge(model, weights, LoraConfig(r=1, alpha=0.5))
    assert torch.allclose(model.blocks[0].attention.qkv.weight, before + 0.5)


def test_adapters_of_another_shape_are_not_loaded() -> None:
    """A caller's mistake: it must compare the settings first."""
    model, other = ours(), ours()
    attach(model, LORA, seed=0)
    attach(other, LoraConfig(r=2), seed=0)
    with pytest.raises(UserError, match=r"^adapter: .*: must have the shape \(.*\), got \("):
        load_adapter(model, adapter_weights(other.state_dict()))
