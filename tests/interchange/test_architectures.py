"""Our decoder and transformers' own models give the same logits, in both directions; what one side
cannot compute is an error.

The oracle is transformers: other people's code for the same papers. All weights are random and large enough (std 0.3,
norms and biases too) that a swapped, transposed or forgotten matrix moves the logits by far more than the tolerance.
"""

import json

import pytest
import torch
import transformers

from tinylm.common.errors import UserError
from tinylm.config.model import ModelConfig, MoEConfig
from tinylm.interchange import architectures, conversion
from tinylm.model.decoder import Decoder

SHAPE = {
    "vocab_size": 97,
    "max_seq_len": 32,
    "n_layers": 2,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 48,
}
GPT2 = {"position": "learned", "norm": "layernorm", "ffn": "gelu", "bias": "all"}
MIXED = {"sliding_window": 5, "full_attention_interval": 2}
GEMMA = {"ffn": "geglu", "scale_embeddings": True}
GEMMA3 = MIXED | {"norm_placement": "sandwich", "qk_norm": True, "rope_local_theta": 300.0}
OLMO2 = {"norm_placement": "output", "qk_norm": "all_heads"}
EXPRESSIBLE = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_embeddings": False}),
    "llama, grouped heads": ("llama", {"n_kv_heads": 2}),
    "llama, one kv head": ("llama", {"n_kv_heads": 1, "rope_theta": 500.0}),
    "llama, wide heads": ("llama", {"head_dim": 14, "n_kv_heads": 2, "norm_eps": 1e-3}),
    "llama, biases": ("llama", {"bias": "all"}),
    "mistral": ("mistral", {"sliding_window": 5, "n_kv_heads": 2}),
    "mistral, untied": (
        "mistral",
        {"sliding_window": 8, "tie_embeddings": False, "n_heads": 5, "head_dim": 8, "d_model": 36},
    ),
    "mistral, odd width": ("mistral", {"n_heads": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {"bias": "qkv", "n_kv_heads": 2}),
    "qwen2, untied": ("qwen2", {"bias": "qkv", "tie_embeddings": False, "rope_theta": 1e6}),
    "qwen2, window": ("qwen2", {"bias": "qkv", "sliding_window": 6, "n_kv_heads": 1}),
    "qwen3": ("qwen3", {"qk_norm": True, "n_kv_heads": 2, "head_dim": 10}),
    "qwen3, untied": (
        "qwen3",
        {"qk_norm": True, "tie_embeddings": False, "norm_eps": 1e-2, "d_model": 34, "head_dim": 8},
    ),
    "qwen3, window": ("qwen3", {"qk_norm": True, "sliding_window": 3}),
    "mixtral": ("mixtral", {"moe": MoEConfig(n_experts=4, top_k=2), "n_kv_heads": 2}),
    "mixtral, one of three": (
        "mixtral",
        {"moe": MoEConfig(n_experts=3, top_k=1), "tie_embeddings": False},
    ),
    "mixtral, window": ("mixtral", {"moe": MoEConfig(n_experts=4, top_k=4), "sliding_window": 5}),
    "qwen3_moe": (
        "qwen3_moe",
        {"moe": MoEConfig(n_experts=4, top_k=2), "qk_norm": True, "head_dim": 10, "n_kv_heads": 2},
    ),
    "smollm3": ("smollm3", {"no_rope_interval": 2, "n_kv_heads": 2}),
    "olmo2": ("olmo2", OLMO2),
    "olmo2, untied": ("olmo2", OLMO2 | {"n_kv_heads": 2, "tie_embeddings": False}),
    "olmo3": ("olmo3", OLMO2 | MIXED | {"rope_local_theta": 10000.0}),
    "ministral": ("ministral", MIXED | {"n_kv_heads": 2, "head_dim": 6}),
    "qwen2, two kinds": ("qwen2", MIXED | {"bias": "qkv", "rope_theta": 500.0}),
    "qwen3, two kinds": ("qwen3", MIXED | {"qk_norm": True, "tie_embeddings": False}),
    "gemma": ("gemma", GEMMA | {"head_dim": 10, "n_kv_heads": 1}),
    "gemma3": ("gemma3_text", GEMMA | GEMMA3),
    "gemma3, scaled": (
        "gemma3_text",
        {**GEMMA, **GEMMA3, "rope_scaling": {"type": "linear", "factor": 4.0}, "query_scalar": 3},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_embeddings": False, "norm_eps": 1e-3}),
    "gpt2, silu": ("gpt2", GPT2 | {"ffn": "silu"}),
    "gpt2, relu2": ("gpt2", GPT2 | {"ffn": "relu2"}),
}


def scrambled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random weights, norms and biases too, far from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def random_decoder(settings: dict) -> Decoder:
    return scrambled(Decoder(ModelConfig(**SHAPE | settings)))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(0))


def largest_difference(ours: Decoder, theirs: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        expected, actual = theirs(ids).logits, ours(ids)
    assert expected.std() > 0.1, "logits that hardly vary compare nothing"
    return (expected - actual).abs().max().item()


# --- to Hugging Face ---


@pytest.mark.parametrize(("architecture", "settings"), EXPRESSIBLE.values(), ids=EXPRESSIBLE)
def test_exported_model_gives_the_same_logits(architecture, settings, ids):
    model = random_decoder(settings)
    exported = conversion.to_hf(model)
    assert exported.config.model_type == architecture
    assert largest_difference(model, exported, ids) < 1e-4


def greedy(model: Decoder, ids: torch.Tensor, n_new: int) -> torch.Tensor:
    """`n_new` tokens after `ids`, generated greedily with the cache."""
    cache, found = model.new_cache(ids.size(0)), ids
    with torch.no_grad():
        for _ in range(n_new):
            logits = model(found[:, cache.length :], cache=cache)
            found = torch.cat((found, logits[:, -1:].argmax(dim=-1)), dim=1)
    return found


@pytest.mark.parametrize(
    "key",
    [
        "llama, grouped heads",
        "mistral",
        "qwen2",
        "qwen2, window",
        "qwen3",
        "mixtral",
        "olmo2",
        "ministral",
        "gemma3",
        "gpt2",
    ],
)
def test_exported_model_generates_the_same_text_from_its_cache(key, ids):
    """Both caches keep only the last positions of a window: 8 prompt tokens and 20 more exceed every window."""
    model = random_decoder(EXPRESSIBLE[key][1])
    theirs = conversion.to_hf(model).generate(
        ids[:, :8], max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(greedy(model, ids[:, :8], 20), theirs)


@pytest.mark.parametrize(
    "settings", [settings for _, settings in EXPRESSIBLE.values()], ids=EXPRESSIBLE
)
def test_round_trip_keeps_settings_and_every_bit_of_the_weights(settings):
    """Copying, stacking, splitting and transposing do no arithmetic, so no bit may change; nor in the norms of Gemma,
    which are stored less 1: with bf16 numbers the difference is exact.
    """
    model = random_decoder(settings).bfloat16().float()
    back = conversion.from_hf(conversion.to_hf(model))
    assert set(back.state_dict()) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, back.state_dict()[name]), name
    assert conversion._flat(back.config) == conversion._flat(model.config)


def test_a_tied_head_stays_tied_both_ways():
    exported = conversion.to_hf(random_decoder({"tie_embeddings": True}))
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    back = conversion.from_hf(exported)
    assert back.head.weight is back.embedding.weight


@pytest.mark.parametrize(
    "key",
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen2, window",
        "qwen3",
        "mixtral",
        "qwen3_moe",
        "smollm3",
        "olmo2",
        "qwen3, two kinds",
        "gemma3, scaled",
        "gpt2",
    ],
)
def test_saved_folder_gives_the_same_logits_after_transformers_reads_it(key, ids, tmp_path):
    """transformers renames weights when it saves them (Mixtral's experts); the reader must find all of them."""
    model = random_decoder(EXPRESSIBLE[key][1])
    conversion.to_hf(model).save_pretrained(tmp_path)
    assert (
        largest_difference(model, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids)
        < 1e-4
    )


@pytest.mark.parametrize("key", ["llama", "mistral", "qwen2", "qwen3", "mixtral"])
def test_config_json_has_rope_theta_for_old_readers_and_rope_parameters_for_new_ones(key, tmp_path):
    """transformers 5 writes only rope_parameters; a reader of rope_theta would use its default of 10000."""
    conversion.hf_config(
        ModelConfig(**SHAPE, **EXPRESSIBLE[key][1], rope_theta=777.0)
    ).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == 777.0
    assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 777.0}


def test_config_json_has_no_special_tokens():
    """Llama's defaults, 1 and 2, are ordinary tokens of our tokenizers: generation would stop at the byte 0x02."""
    config = conversion.hf_config(ModelConfig(**SHAPE))
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


def test_dropout_is_exported_to_gpt2():
    config = conversion.hf_config(
        ModelConfig(**SHAPE, **GPT2, attention_dropout=0.2, residual_dropout=0.3)
    )
    assert (config.attn_pdrop, config.resid_pdrop, config.embd_pdrop) == (0.2, 0.3, 0.3)


def test_export_keeps_the_precision_of_the_weights():
    model = random_decoder({}).to(torch.bfloat16)
    assert conversion.to_hf(model).lm_head.weight.dtype == torch.bfloat16


# --- from Hugging Face ---

THEIR_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LONGROPE = {
    **{"rope_theta": 1e4, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 16},
    **{"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}
GROUPED = THEIR_SHAPE | {"num_key_value_heads": 2}
THEIRS = {
    "llama": lambda **more: transformers.LlamaConfig(**THEIR_SHAPE | more),
    "mistral": lambda **more: transformers.MistralConfig(**GROUPED | more),
    "qwen2": lambda **more: transformers.Qwen2Config(**GROUPED | more),
    "qwen3": lambda **more: transformers.Qwen3Config(**GROUPED | more),
    "qwen3_moe": lambda **more: transformers.Qwen3MoeConfig(
        **GROUPED | MOE | {"norm_topk_prob": True, "head_dim": 12} | more
    ),
    "phi3": lambda **more: transformers.Phi3Config(**GROUPED | {"pad_token_id": 0} | more),
    "smollm3": lambda **more: transformers.SmolLM3Config(**GROUPED | {"pad_token_id": 0} | more),
    "olmo2": lambda **more: transformers.Olmo2Config(**GROUPED | {"pad_token_id": 0} | more),
    "mixtral": lambda **more: transformers.MixtralConfig(
        **GROUPED | {"num_local_experts": 4} | more
    ),
    "gpt2": lambda **more: transformers.GPT2Config(
        **{"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32} | more
    ),
}


def gemma3(**more) -> transformers.Gemma3TextConfig:
    return transformers.Gemma3TextConfig(**THEIR_SHAPE | more)


LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 1e4,
}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", **LLAMA3_SCALING}}),
        ("qwen3_moe", {}),
        ("phi3", {"resid_pdrop": 0.1}),
        ("phi3", {"sliding_window": 5}),
        ("smollm3", {"num_hidden_layers": 5}),
        (
            "smollm3",
            {"no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "yarn", **YARN}},
        ),
        ("olmo2", {}),
        ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-2}),
        ("mistral", {"rope_parameters": {"rope_type": "yarn", **YARN}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "mscale": 1.0,
                    "mscale_all_dim": 0.7,
                    **YARN,
                }
            },
        ),
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        (
            "llama",
            {"head_dim": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        ),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": None, "head_dim": 6, "tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("qwen3", {}),
        ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 0,
                "head_dim": 8,
            },
        ),
        ("mixtral", {}),
        ("mixtral", {"sliding_window": 4, "num_experts_per_tok": 3}),
        ("gpt2", {}),
        ("gpt2", {"n_inner": 40, "activation_function": "silu"}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": False}),
    ],
)
def test_imported_model_gives_the_same_logits(architecture, settings, ids):
    """Settings that are not given are transformers' defaults: rms_norm_eps 1e-6, Mixtral's rope_theta of a million."""
    theirs = scrambled(
        transformers.AutoModelForCausalLM.from_config(THEIRS[architecture](**settings))
    )
    assert largest_difference(conversion.from_hf(theirs), theirs, ids) < 1e-4


def test_import_of_bf16_weights_is_an_fp32_decoder_with_their_values():
    theirs = scrambled(transformers.AutoModelForCausalLM.from_config(THEIRS["llama"]())).to(
        torch.bfloat16
    )
    weight = conversion.from_hf(theirs).embedding.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, theirs.model.embed_tokens.weight.float())


def test_imported_gpt2_keeps_its_dropout():
    config = conversion.our_config(THEIRS["gpt2"](attn_pdrop=0.2, resid_pdrop=0.3))
    assert (config.attention_dropout, config.residual_dropout) == (0.2, 0.3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            THEIRS["llama"](hidden_act="gelu"),
            'hidden_act: must be "silu", got "gelu"',
        ),
        (
            THEIRS["llama"](attention_bias=True),
            "attention_bias: must be false, got true",
        ),
        (
            THEIRS["llama"](
                rope_parameters={"rope_type": "proportional", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rope_parameters.rope_type: must be one of default, linear, dynamic, yarn, llama3, got "
            '"proportional"',
        ),
        (
            THEIRS["llama"](
                rope_parameters={"rope_type": "yarn", **YARN, "truncate": False},
            ),
            "rope_parameters.truncate: false is not supported with rope_type yarn",
        ),
        (
            THEIRS["llama"](num_hidden_layers=2000),
            "num_hidden_layers: 2000 .*less than or equal to 1000",
        ),
        (
            THEIRS["qwen2"](use_sliding_window=True, sliding_window=4, max_window_layers=1),
            'layer_types: .*"full_attention".* "sliding_attention"',
        ),
        (
            THEIRS["qwen3"](use_sliding_window=True, sliding_window=4, max_window_layers=1),
            "layer_types: ",
        ),
        (
            THEIRS["qwen3"](attention_bias=True),
            "attention_bias: must be false, got true",
        ),
        (
            THEIRS["gpt2"](scale_attn_by_inverse_layer_idx=True),
            "scale_attn_by_inverse_layer_idx: must be false, got true",
        ),
        (THEIRS["gpt2"](scale_attn_weights=False), "scale_attn_weights"),
        (THEIRS["gpt2"](activation_function="relu"), 'activation_function: .*"relu"'),
        (THEIRS["qwen3_moe"](norm_topk_prob=False), "norm_topk_prob: must be true, got false"),
        (
            THEIRS["smollm3"](no_rope_layers=[0, 1]),
            r'no_rope_layers: must be "every no_rope_layer_interval-th", got \[0, 1\]',
        ),
        (
            THEIRS["phi3"](rope_parameters={"rope_type": "longrope", **LONGROPE}),
            'rope_parameters.rope_type: must be one of .* got "longrope"',
        ),
        (
            transformers.Gemma2Config(),
            "model_type: gemma2 is not supported by this decoder: it limits attention scores and logits by a tanh. "
            "Choose another model",
        ),
        (
            transformers.Gemma3Config(),
            "model_type: gemma3 is not supported by this decoder: it reads images too",
        ),
        (
            gemma3(layer_types=["full_attention", "sliding_attention"]),
            'layer_types: must be "full_attention in every n-th layer, sliding_attention in the others", got '
            r'\["full_attention", "sliding_attention"\]',
        ),
        (gemma3(final_logit_softcapping=30.0), "final_logit_softcapping: must be null, got 30.0"),
        (
            gemma3(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            'rope_parameters.sliding_attention.rope_type: must be default, got "linear"',
        ),
        (THEIRS["olmo2"](attention_bias=True), "attention_bias: must be false, got true"),
        (
            transformers.BloomConfig(),
            "model_type: must be one of gemma, gemma3_text, gpt2, llama, ministral, mistral, mixtral, olmo2, olmo3, phi3, "
            "qwen2, qwen3, qwen3_moe, smollm3, got bloom. Choose another model",
        ),
    ],
)
def test_settings_that_our_decoder_cannot_compute_are_errors(config, words):
    with pytest.raises(UserError, match=words):
        conversion.our_config(config)


# --- unsupported settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"position": "alibi"}, 'model.position: "alibi" .* nearest, llama, has "rope"'),
        ({"position": "none"}, 'model.position: "none"'),
        ({"norm": "layernorm"}, 'model.norm: "layernorm" .* llama, has "rmsnorm"'),
        ({"norm_placement": "post"}, 'model.norm_placement: "post" .* has "pre"'),
        ({"norm_placement": "none"}, 'model.norm_placement: "none"'),
        (
            {"norm_placement": "output", "qk_norm": True},
            'model.norm_placement: "output" .* nearest, qwen3, has "pre"',
        ),
        ({"qk_norm": "all_heads"}, 'model.qk_norm: "all_heads" .* nearest, llama, has false'),
        (GPT2 | {"sliding_window": 8}, "model.sliding_window: 8 .* nearest, gpt2, has null"),
        (
            {"qk_norm": True, "moe": MoEConfig(), "sliding_window": 4},
            "model.moe: .* nearest, qwen3, has null",
        ),
        ({"n_sinks": 2}, "model.n_sinks: 2 .* has 0"),
        (MIXED | {"bias": "all"}, 'model.bias: "all" .* nearest, ministral, has "none"'),
        ({"moe": MoEConfig(), **MIXED}, "model.moe: .* nearest, ministral, has null"),
        (GPT2 | MIXED, "model.full_attention_interval: 2 .* nearest, gpt2, has null"),
        ({"input_scalars": True}, "model.input_scalars: true .* llama, has false"),
        ({"bigram_rows": 9}, "model.bigram_rows: 9 .* llama, has 0"),
        ({"ffn": "relu2"}, 'model.ffn: "relu2" .* llama, has "swiglu"'),
        ({"ffn": "geglu"}, 'model.ffn: "geglu" .* llama, has "swiglu"'),
        ({"query_scalar": 3}, "model.query_scalar: 3 .* llama, has 8"),
        (
            GEMMA | GEMMA3 | {"rope_local_theta": None},
            "model.rope_local_theta: null .* has 10000.0",
        ),
        ({"bias": "qkv", "head_dim": 6}, "model.head_dim: 6 .* nearest, qwen2, has 8|model.bias: "),
        (
            {"moe": MoEConfig(), "bias": "all"},
            'model.moe: {"n_experts": 8, .* nearest, llama, has null',
        ),
        ({"n_heads": 5, "head_dim": 8, "bias": "all"}, "model.d_model: 32 .* has 35"),
        (GPT2 | {"n_kv_heads": 2}, "model.n_kv_heads: 2 .* nearest, gpt2, has 4"),
        (GPT2 | {"head_dim": 6}, "model.head_dim: 6 .* gpt2, has 8"),
    ],
)
def test_settings_that_no_architecture_computes_are_errors(settings, words):
    with pytest.raises(UserError, match=words):
        conversion.hf_config(ModelConfig(**SHAPE | settings))
    with pytest.raises(UserError, match=words):
        conversion.to_hf(Decoder(ModelConfig(**SHAPE | settings)))


@pytest.mark.parametrize(
    "architecture",
    architectures.ARCHITECTURES,
    ids=lambda a: f"{a.model_type}-{a.ours['ffn']}-{a.ours['bias']}",
)
def test_every_setting_that_changes_the_logits_has_a_place_in_each_architecture(architecture):
    """A setting forgotten in a table would be exported as transformers' default, with other logits
    and without an error.

    What remains belongs to training. GPT-2 needs no rope_theta, as it has no rope.
    """
    placed = set(architecture.ours) | set(architecture.settings)
    placed |= set(architecture.limits_of(ModelConfig()))
    placed |= {key.partition(".")[0] for key in placed}
    left = {"depth", "init", "gradient_checkpointing", "residual_dropout"} | (
        {"rope_theta"} if architecture.ours["position"] != "rope" else set()
    )
    assert set(ModelConfig.model_fields) - placed <= left
