"""Adapters on a base in 4 bits: beside transformers and peft on the same weights of bitsandbytes, merged, and refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.model.test_lora import logits, ours, randomize_adapters, theirs
from tinylm.common.errors import UserError
from tinylm.config.model import MoEConfig
from tinylm.config.schema import LoraConfig
from tinylm.model.decoder import count_parameters, flops_per_token
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import (
    adapter_weights,
    adapters_off,
    attach,
    frozen_matrices,
    merge,
)
from tinylm.model.nf4 import block_scales

pytestmark = [
    pytest.mark.slow,  # the first import of bitsandbytes and peft takes seconds
    pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="needs bitsandbytes"),
]

NF4 = LoraConfig(r=4, alpha=8.0, base_weights="nf4")


MODELS = {
    "ours": lambda: ours(bias="all"),
    "ours with experts": lambda: ours(moe=MoEConfig(n_experts=3, top_k=2)),
    "gpt2": lambda: theirs("gpt2"),
    "llama": lambda: theirs("llama"),
}


@pytest.mark.parametrize(
    ("name", "dora"), [*((name, False) for name in MODELS), ("ours", True), ("gpt2", True)]
)
def test_a_merged_adapter_has_the_logits_of_training(name: str, dora: bool) -> None:
    """Rounded weights differ from those of the base; the merged model has the rounded ones."""
    lora = NF4.model_copy(update={"dora": dora})
    base, model, merged = (MODELS[name]() for _ in range(3))
    attach(model, lora, seed=0)
    rounded = logits(model)
    assert 1e-3 < (rounded - logits(base)).abs().max() < 0.2
    weights = randomize_adapters(model)
    separate = logits(model)
    assert (separate - rounded).abs().max() > 0.1
    merge(merged, weights, lora)
    assert torch.allclose(logits(merged), separate, atol=1e-5, rtol=1e-5)
    with adapters_off(model):
        assert torch.equal(logits(model), rounded)


def test_matrices_take_half_a_byte_a_weight_and_a_scale_for_64() -> None:
    """Two blocks with matrices of 32·96, 32·32, 32·96 and 48·32 weights; everything else stays in fp32."""
    base, model = ours(), ours()
    attach(model, NF4, seed=0)
    n = 2 * (32 * 96 + 32 * 32 + 32 * 96 + 48 * 32)
    packed = [weight for weight in model.parameters() if weight.dtype == torch.uint8]
    assert sum(weight.nbytes for weight in packed) == n // 2
    assert sum(scale.nbytes for scale in block_scales(model)) == n // 64 * 4
    n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert count_parameters(model) == count_parameters(base) + n_trained


def test_a_router_keeps_its_weights() -> None:
    """Which expert computes does not depend on rounding; experts are stacks, which are not rounded either."""
    model = MODELS["ours with experts"]()
    attach(model, NF4, seed=0)
    packed = [name for name, weight in model.named_parameters() if weight.dtype == torch.uint8]
    assert {name.split(".")[3] for name in packed} == {"qkv", "out"}


def test_a_router_of_hugging_face_keeps_its_weights() -> None:
    """Mixtral calls it mlp.gate, JetMoe's layer is in mlp.router; gate_proj of Llama is no router."""
    model = MODELS["llama"]()
    layers = set(frozen_matrices(model))
    assert {name.rpartition(".")[2] for name in layers} >= {"gate_proj", "up_proj", "q_proj"}
    for block in model.inner.model.layers:
        block.mlp.gate = nn.Linear(32, 3)
        block.mlp.router = nn.ModuleDict({"layer": nn.Linear(32, 3)})
    assert set(frozen_matrices(model)) == layers


def test_models_that_read_weights_themselves_are_refused() -> None:
    """Mamba multiplies by dt_proj.weight, which would be packed, even if it has no adapter."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "mamba",
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "max_position_embeddings": 64},  # which no Mamba has
    )
    model = HFModel(transformers.AutoModelForCausalLM.from_config(config))
    words = (
        "^lora.base_weights: nf4 is not supported with mamba, whose code reads the weights of some "
        "layers. Set lora.base_weights=fp32.$"
    )
    with pytest.raises(UserError, match=words):
        attach(model, NF4.model_copy(update={"r": 2, "target_modules": ("in_proj",)}), seed=0)


def test_a_target_that_matches_no_layer_leaves_the_base_in_fp32() -> None:
    model = ours()
    with pytest.raises(UserError, match="^lora.target_modules: must name layers"):
        attach(model, NF4.model_copy(update={"target_modules": ("q_proj",)}), seed=0)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())


@pytest.mark.parametrize("name", ["ours", "ours with experts"])
def test_a_base_in_4_bits_has_the_flops_of_one_in_32(name: str) -> None:
    """Products are of the whole matrices, whatever their storage; the adapters are the same."""
    wide, packed = MODELS[name](), MODELS[name]()
    attach(wide, NF4.model_copy(update={"base_weights": "fp32"}), seed=0)
    attach(packed, NF4, seed=0)
    assert flops_per_token(packed, 20) == flops_per_token(wide, 20)


def test_products_are_in_the_precision_of_the_run() -> None:
    """In bf16 the logits differ from those in fp32, by about one in 2**8."""
    wide, narrow = ours(), ours()
    attach(wide, NF4, seed=0)
    attach(narrow, NF4, seed=0, dtype=torch.bfloat16)
    assert 1e-5 < (logits(wide) - logits(narrow)).abs().max() < 2e-2


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_and_gradients_are_those_of_transformers_and_peft(kind: str, tmp_path: Path) -> None:
    """The base is saved, loaded by transformers in 4 bits, and given the same adapters by peft. Both compute in fp32:
    the differences are those of the order of sums.
    """
    import transformers
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = MODELS[kind]()
    model.inner.save_pretrained(tmp_path)
    attach(model, NF4, seed=0)
    weights = randomize_adapters(model)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights})
    config = PeftConfig(r=NF4.r, lora_alpha=NF4.alpha, target_modules=targets)
    other = get_peft_model(base, config).eval()
    for layer in other.modules():
        # On a CPU with bf16, bitsandbytes packs the weights for it: another precision, and an error
        # in layers that are narrower than a block.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if ".lora_" in name:
                own = name.removeprefix("base_model.model.").replace(".default.", ".")
                weight.copy_(weights[f"inner.{own}"])
    ids = torch.randint(97, (3, 17), generator=torch.Generator().manual_seed(3))

    def loss_of(found: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    ours_loss, their_loss = loss_of(model(ids)), loss_of(other(input_ids=ids).logits)
    assert ours_loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    ours_loss.backward()
    their_loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if ".lora_" in name}
    for name, weight in other.named_parameters():
        if ".lora_" in name:
            own = found.pop(f"inner.{name.removeprefix('base_model.model.')}")
            torch.testing.assert_close(own, weight.grad, rtol=1e-4, atol=1e-6)
    assert not found


def test_a_merge_without_bitsandbytes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours()
    attach(model, NF4, seed=0)
    weights = adapter_weights(dict(model.named_parameters()))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="^bitsandbytes: this package is needed and is not installed"
    ):
        merge(ours(), weights, NF4)
