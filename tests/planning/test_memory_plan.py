"""The plan against what is really there: state_dicts, saved tensors, counted by hand.
`benchmarks/planner.py` measures whole runs.
"""

from typing import Any

import pytest
import torch

from tinylm.config.schema import Config
from tinylm.model import decoder
from tinylm.model.decoder import Decoder
from tinylm.optim.optimizers import make_optimizer
from tinylm.planning import memory_plan
from tinylm.planning.memory_plan import (
    largest_batch,
    plan_run,
    suggest_overrides,
    with_settings,
)
from tinylm.planning.probes import autocast, random_batch
from tinylm.planning.step_memory import trace_step

# So large a vocabulary that the loss is the peak, where all activations are alive.
BASE: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": 3000, "n_layers": 2, "d_model": 32, "n_heads": 4, "max_seq_len": 32},
    "training": {"seq_len": 16, "micro_batch_size": 2, "max_steps": 10},
}
MOE = {"n_experts": 4, "top_k": 2}


def settings(changes: dict[str, Any] | None = None) -> Config:
    """The settings of a tiny run, some changed by dotted key."""
    return with_settings(Config.model_validate(BASE), changes or {})


# --- weights and optimizer --------------------------------------------------------------------------------------------


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    inner = (
        values.values()
        if isinstance(values, dict)
        else values
        if isinstance(values, list | tuple)
        else ()
    )
    return sum(map(tensor_bytes, inner))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_plain", "adamw_8bit", "sgd", "muon"])
def test_weights_and_optimizer_take_what_their_state_dicts_do(optimizer):
    """The values of the codes of 8 bits, 1 kB for each moment, are one tensor for all weights, and not planned."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    config = settings({"training.optimizer": optimizer, "model.moe": MOE})
    model = Decoder(config.model)
    real = make_optimizer(model, config.training, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    real.step()
    planned = plan_run(config, "cpu")
    assert planned.weights == sum(weight.nbytes for weight in model.parameters())
    state = real.state_dict()["state"].values()
    tensors = [{name: values[name] for name in values if "qmap" not in name} for values in state]
    assert any("absmax1" in values for values in tensors) == (optimizer == "adamw_8bit")
    assert planned.optimizer == tensor_bytes(tensors)
    assert planned.checkpoint_bytes == planned.weights + planned.optimizer


@pytest.mark.slow
def test_only_the_visited_experts_are_active():
    """Four experts a layer and two visited: half of 2 layers · 4 · (2 · 128 · 32 + 32 · 128)
    weights of experts is idle.
    """
    config = settings({"model.moe": MOE})
    planned = plan_run(config, "cpu")
    assert planned.parameters - planned.active_parameters == 2 * 2 * 3 * config.model.d_ff * 32
    assert plan_run(settings(), "cpu").active_parameters == plan_run(settings(), "cpu").parameters


def test_a_bigram_embedding_is_not_in_the_size():
    """100 rows of 32; the tokens per parameter are those of the same model without it."""
    planned, without = (plan_run(settings({"model.bigram_rows": rows}), "cpu") for rows in (100, 0))
    assert planned.parameters - planned.sized_parameters == 100 * 32
    assert planned.tokens_per_parameter == without.tokens_per_parameter


@pytest.mark.slow
def test_work_and_files_are_counted():
    """10 steps of 3 micro-batches of 2 rows of 16 tokens are 960; keep_last, the best one and the one in the making."""
    planned = plan_run(settings({"training.grad_accum_steps": 3}), "cpu")
    assert planned.tokens == 960
    assert planned.flops == 960 * planned.flops_per_token
    assert planned.tokens_per_parameter == 960 / planned.parameters
    assert planned.checkpoint_files == 4
    assert plan_run(settings({"training.keep_last": None}), "cpu").checkpoint_files is None


def test_the_peak_is_the_sum_of_its_parts():
    planned = plan_run(settings(), "cpu", program=1000)
    assert planned.parts["program"] == 1000
    assert planned.peak == sum(planned.parts.values()) == 1000 + plan_run(settings(), "cpu").peak


# --- activations ------------------------------------------------------------------------------------------------------

QUICK: list[dict[str, Any]] = [
    {},
    {"model.sliding_window": 4, "model.n_sinks": 3, "model.n_kv_heads": 1},
    {
        "model.moe": MOE,
        "model.bias": "all",
        "model.ffn": "gelu",
        "model.norm": "layernorm",
        "hardware.precision": "bf16",
    },
    {
        "model.gradient_checkpointing": True,
        "training.micro_batch_size": 16,
        "model.residual_dropout": 0.1,
    },
]
OPTIONS: list[dict[str, Any]] = [
    {"model.ffn": "silu"},
    {"model.ffn": "gelu"},
    {"model.ffn": "relu2"},
    {"model.position": "learned"},
    {"model.position": "alibi"},
    {"model.position": "none"},
    {"model.norm": "layernorm", "model.bias": "all"},
    {"model.bias": "qkv"},
    {"model.norm_placement": "post"},
    {"model.norm_placement": "none"},
    {"model.qk_norm": True},
    {"model.n_kv_heads": 1},
    {"model.n_kv_heads": 2, "model.head_dim": 16},
    {"model.sliding_window": 4},
    {"model.sliding_window": 4, "model.n_sinks": 3},
    {"model.moe": MOE},
    {"model.moe": MOE, "model.bias": "all", "model.ffn": "gelu"},
    {"model.residual_dropout": 0.1},
    {"model.attention_dropout": 0.1},
    {"model.tie_embeddings": False, "model.init": "trunc_normal"},
    {"model.gradient_checkpointing": True, "training.micro_batch_size": 16, "model.moe": MOE},
    {"data.document_mask": True},
    {"data.document_mask": True, "model.position": "alibi"},
    {"hardware.precision": "bf16"},
    {"hardware.precision": "bf16", "model.moe": MOE},
]


def kept_by_forward(config: Config) -> int:
    """Bytes that a real forward pass saves for backward, plus its result; no weights, shared storage once."""
    torch.manual_seed(0)
    model, batch = (
        Decoder(config.model).train(),
        random_batch(config, config.training.micro_batch_size),
    )
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = batch["input_ids"].contiguous()
    with (
        autocast(config, "cpu"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        features = model.features(ids, document_ids=batch.get("document_ids"))
        for tensor in (features.hidden, features.balance_loss, ids):
            note(tensor)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        return sum(size for pointer, size in kept.items() if pointer not in weights)


@pytest.mark.parametrize(
    "changes",
    [*QUICK, *(pytest.param(changes, marks=pytest.mark.slow) for changes in OPTIONS)],
    ids=str,
)
def test_activations_are_what_a_real_forward_pass_keeps(changes, monkeypatch):
    """A few bytes of scalars and positions that only one of the two sees. The plan has the mask of
    packed documents, which is not kept where a CPU takes them one after another.
    """
    config = settings(changes)
    without_mask = kept_by_forward(config)
    monkeypatch.setattr(decoder, "can_split_documents", lambda config, positions: False)
    rows, T = config.training.micro_batch_size, config.training.seq_len
    of_mask = config.model.n_layers * rows * T * T * 4  # as the kernel of each layer keeps it
    assert 0 <= kept_by_forward(config) - without_mask <= of_mask
    assert trace_step(config).at_peak["activations"] == pytest.approx(
        kept_by_forward(config), rel=0.01, abs=600
    )


def test_the_loss_holds_a_chunk_of_logits_and_two_gradients():
    """32 tokens of 3000 classes: log-probabilities and the gradient of the head, with products and
    features of some size beside them.
    """
    at_peak = trace_step(settings()).at_peak
    chunk, head = 32 * 3000 * 4, 3000 * 32 * 4
    assert chunk + head <= at_peak["logits"] <= 3 * chunk + head


@pytest.mark.slow
def test_a_second_micro_batch_finds_gradients():
    one, two = (
        trace_step(settings({"training.grad_accum_steps": parts})).at_peak["gradients"]
        for parts in (1, 2)
    )
    assert (one, two) == (0, plan_run(settings(), "cpu").weights)


@pytest.mark.slow
def test_blocks_that_are_computed_again_take_less_by_the_layer():
    """Without it every block keeps its activations; with it one block's are alive at a time, and the others' inputs."""

    def at_peak(n_layers: int, checkpointing: bool) -> int:
        changes = {
            "model.n_layers": n_layers,
            "model.gradient_checkpointing": checkpointing,
            "training.micro_batch_size": 64,
            "model.vocab_size": 300,
        }
        parts = trace_step(settings(changes)).at_peak
        return parts["activations"] + parts["scratch"]

    recomputed = trace_step(
        settings(
            {
                "model.gradient_checkpointing": True,
                "training.micro_batch_size": 64,
                "model.vocab_size": 300,
            }
        )
    ).at_peak
    assert (
        recomputed["activations"] > recomputed["scratch"]
    )  # the block that is recomputed has activations
    of_input = 64 * 16 * 32 * 4
    assert at_peak(8, True) - at_peak(4, True) == pytest.approx(4 * of_input, rel=0.1)
    assert at_peak(8, False) - at_peak(4, False) > 4 * 8 * of_input


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("training.micro_batch_size", (1, 2, 4, 64)),
        ("training.seq_len", (8, 16, 32)),
        ("model.n_layers", (1, 2, 3)),
        ("model.d_model", (16, 32, 64)),
        ("model.vocab_size", (300, 3000, 6000)),
    ],
)
def test_more_of_anything_takes_more(key, values):
    peaks = [plan_run(settings({key: value}), "cpu").peak for value in values]
    assert peaks == sorted(set(peaks))


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddp_holds_every_gradient_a_second_time():
    alone, two = plan_run(settings(), "cpu"), plan_run(settings({"hardware.devices": 2}), "cpu")
    assert two.gradients == alone.gradients + alone.weights
    assert two.tokens == 2 * alone.tokens
    assert plan_run(settings({"hardware.devices": 2, "hardware.strategy": "ddp"}), "cpu") == two


@pytest.mark.slow
def test_fsdp_divides_weights_and_optimizer_and_holds_some_blocks_whole():
    """Each with its gradient: two blocks, and what is no block."""
    alone = plan_run(settings(), "cpu")
    four = plan_run(settings({"hardware.devices": 4, "hardware.strategy": "fsdp"}), "cpu")
    assert (four.weights, four.optimizer) == (alone.weights // 4, alone.optimizer // 4)
    assert four.scratch - alone.scratch == 2 * alone.weights  # of two layers, two are everything


@pytest.mark.slow
def test_a_graphics_card_keeps_no_mask_of_attention_dropout():
    dropped = settings({"model.attention_dropout": 0.1})
    assert plan_run(dropped, "cuda").activations == plan_run(settings(), "cuda").activations
    assert plan_run(dropped, "cpu").activations > plan_run(settings(), "cpu").activations


# --- advice -----------------------------------------------------------------------------------------------------------


def follow(config: Config, overrides: tuple[str, ...]) -> Config:
    """The settings with the overrides, as the command line reads them."""
    import yaml

    return with_settings(
        config,
        {
            key: yaml.safe_load(value)
            for key, value in (override.split("=") for override in overrides)
        },
    )


LARGE = {
    "training.micro_batch_size": 12,
    "training.seq_len": 32,
    "model.n_layers": 3,
    "model.vocab_size": 300,
    "model.d_model": 128,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "first", "last"),
    [
        (0.9, "training.micro_batch_size=", "training.grad_accum_steps="),
        (0.4, "training.micro_batch_size=1", "model.gradient_checkpointing=true"),
        (0.25, "training.micro_batch_size=1", "model.n_layers="),
    ],
)
def test_a_run_that_follows_the_advice_fits(share, first, last, monkeypatch):
    """From what changes nothing to what is another model; the rows of a step stay as many."""
    monkeypatch.setattr(
        memory_plan, "CPU_PAGES", 0
    )  # else it would be all that a model so small takes
    config = settings(LARGE)
    limit = round(share * plan_run(config, "cpu").peak)
    overrides = suggest_overrides(config, "cpu", limit)
    changed = follow(config, overrides)
    assert plan_run(config, "cpu").peak > limit >= plan_run(changed, "cpu").peak
    assert overrides[0].startswith(first)
    assert overrides[-1].startswith(last)
    assert changed.training.micro_batch_size * changed.training.grad_accum_steps == 12


@pytest.mark.slow
def test_the_advice_is_the_mildest_of_its_kind(monkeypatch):
    """Twelve rows do not fit and six do: 4 x 3, 3 x 4 and so on would be slower for nothing."""
    monkeypatch.setattr(memory_plan, "CPU_PAGES", 0)
    config = settings(LARGE)
    limit = plan_run(
        with_settings(config, {"training.micro_batch_size": 6, "training.grad_accum_steps": 2}),
        "cpu",
    ).peak
    assert suggest_overrides(config, "cpu", limit) == (
        "training.micro_batch_size=6",
        "training.grad_accum_steps=2",
    )


@pytest.mark.slow
def test_where_nothing_helps_there_is_no_advice():
    assert suggest_overrides(settings(), "cpu", 1000) == ()


@pytest.mark.slow
def test_the_largest_batch_is_the_last_power_of_two_that_fits():
    limit = plan_run(settings({"training.micro_batch_size": 9}), "cpu").peak
    assert largest_batch(settings(), "cpu", limit) == 8
    assert largest_batch(settings(), "cpu", 1000) == 0
    assert largest_batch(settings(), "cpu", limit, most=4) == 4
