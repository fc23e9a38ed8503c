"""What a run will cost, before it runs: parameters, work, memory by part, and time from a second of real steps.

    plan_run       settings ─▶ Plan: counted, and traced without memory or arithmetic (fake tensors)
    measure_speed  settings ─▶ tokens a second of this machine, from real steps on random tokens
    advice         settings that are too large ─▶ the change of them that is large enough to fit

The peak of a step is where most is alive at once, either at the end of the forward pass (activations and the loss) or in the
optimizer's step (gradients and its scratch memory). Knows nothing of data: what a batch is made of costs little.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinylm.config import Config, ModelConfig
from tinylm.decoder import Decoder, count_parameters, flops_per_token
from tinylm.losses import CHUNK_TOKENS, cross_entropy
from tinylm.optim import is_matrix, make_optimizer

FLOAT_BYTES = 4
# Hoffmann et al. 2022: about so many tokens a parameter train a model of a given cost best.
CHINCHILLA_TOKENS = 20
# Beyond what a step needs at its peak: temporaries, and freed memory between pieces in use that no later piece fits into. On the
# CPU `keep_freed_memory` buys speed with it. As a share of the activations, measured by benchmarks/planner.py.
SCRATCH = {"cpu": 0.55, "cuda": 0.2, "mps": 0.2}
WARM_UP_STEPS = 2
MEASURED_SECONDS = 1.0


@dataclass(frozen=True)
class Plan:
    """What a run on one device needs; memory in bytes."""

    parameters: int
    flops_per_token: int
    """forward and backward, of one target token"""
    tokens: int
    """target tokens of the whole run"""
    checkpoint_bytes: int
    program: int
    """the interpreter and its libraries, as this process has them now"""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """what the forward pass keeps for the backward pass"""
    logits: int
    """the chunk of logits that is alive at once, and the gradients that the loss hands over"""
    scratch: int
    """temporaries, and what the allocator cannot use again"""

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """To be held beside CHINCHILLA_TOKENS."""
        return self.tokens / self.parameters

    @property
    def peak(self) -> int:
        """The most that is alive at once."""
        return self.program + self.weights + self.optimizer + self.gradients + self.activations + self.logits + self.scratch


def plan_run(config: Config, vocab_size: int, device: str) -> Plan:
    """What the settings need on one device of that kind, for a tokenizer of `vocab_size` tokens."""
    model_config = config.model if config.model.vocab_size else config.model.model_copy(update={"vocab_size": vocab_size})
    training = config.training
    with torch.device("meta"):
        model = Decoder(model_config)
    n = count_parameters(model)
    state = optimizer_bytes(model, training.optimizer)
    tokens_per_batch = training.micro_batch_size * training.seq_len
    activations = activation_bytes(model_config, config)
    return Plan(
        parameters=n,
        flops_per_token=flops_per_token(model, training.seq_len),
        tokens=training.max_steps * training.grad_accum_steps * tokens_per_batch * config.hardware.devices * config.hardware.num_nodes,
        checkpoint_bytes=n * FLOAT_BYTES + state,
        program=resident_bytes(),
        weights=n * FLOAT_BYTES,
        # A single micro-batch frees the gradients before the next forward pass: they and the activations are never both whole.
        gradients=n * FLOAT_BYTES if training.grad_accum_steps > 1 else 0,
        optimizer=state,
        activations=activations,
        logits=loss_bytes(model_config, tokens_per_batch, autocast=config.hardware.precision != "32"),
        scratch=round(SCRATCH[device] * activations),
    )


def optimizer_bytes(model: torch.nn.Module, name: str) -> int:
    """What the optimizer remembers: two moments a weight for AdamW, one for Muon's matrices, nothing for SGD."""
    if name == "sgd":
        return 0
    one_moment = {id(weight) for key, weight in model.named_parameters() if name == "muon" and "blocks" in key.split(".") and is_matrix(key, weight)}
    return sum(weight.numel() * FLOAT_BYTES * (1 if id(weight) in one_moment else 2) for weight in model.parameters())


def loss_bytes(model: ModelConfig, tokens: int, *, autocast: bool) -> int:
    """The loss at its peak: a chunk of logits and of log-probabilities, the features' gradient, and that of the head."""
    assert model.vocab_size is not None
    width = 2 if autocast else FLOAT_BYTES
    chunk = min(tokens, CHUNK_TOKENS) * model.vocab_size * (width + FLOAT_BYTES)
    return chunk + (tokens * model.d_model + model.vocab_size * model.d_model) * FLOAT_BYTES


def activation_bytes(model: ModelConfig, config: Config) -> int:
    """What a forward pass of one micro-batch keeps, counted from a forward pass of tensors that have no contents."""
    if not model.gradient_checkpointing:
        return _traced(model, config)
    # Of each block only its input stays; one block at a time is then computed again, whole.
    whole = model.model_copy(update={"gradient_checkpointing": False, "n_layers": 1})
    none = model.model_copy(update={"n_layers": 1})
    return _traced(model, config) + _traced(whole, config) - _traced(none, config)


def _traced(model: ModelConfig, config: Config) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    training = config.training
    with FakeTensorMode():
        decoder = Decoder(_without_experts(model)).train()
        own = {weight.untyped_storage()._cdata for weight in decoder.parameters()}
        ids = torch.zeros(training.micro_batch_size, training.seq_len, dtype=torch.int64)
        documents = torch.zeros_like(ids) if config.data.document_mask else None
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), _autocast(config, "cpu"):
            features = decoder.features(ids, document_ids=documents)
        note(features.hidden)
        return sum(size for storage, size in kept.items() if storage not in own)


def _without_experts(model: ModelConfig) -> ModelConfig:
    """A dense model with the activations of a mixture of experts, whose routing depends on contents: top_k times as wide."""
    if model.moe is None:
        return model
    return model.model_copy(update={"moe": None, "d_ff": model.hidden * model.moe.top_k})


def _autocast(config: Config, device: str) -> Any:
    dtypes = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}
    dtype = dtypes[config.hardware.precision]
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


# --- this machine -----------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Memory of this process; 0 where the system does not say (only Linux does so in a file)."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes(device: str) -> int | None:
    """Memory that a run could have on this device beside what this process has; None where nobody knows."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    if device == "cpu" and sys.platform.startswith("linux"):
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    return None


def measure_speed(config: Config, vocab_size: int, device: str) -> float:
    """Target tokens a second: real micro-batches of random tokens, and an optimizer step after each grad_accum_steps of them."""
    training = config.training
    torch.manual_seed(training.seed)
    model = Decoder(config.model if config.model.vocab_size else config.model.model_copy(update={"vocab_size": vocab_size})).to(device).train()
    optimizer = make_optimizer(model, training, fused=config.hardware.precision != "16")
    ids = torch.randint(vocab_size, (training.micro_batch_size, training.seq_len + 1), device=device)
    labels = ids[:, 1:].flatten()
    done, began = 0, time.perf_counter()
    while True:
        for _ in range(training.grad_accum_steps):
            with _autocast(config, device):
                hidden = model.features(ids[:, :-1]).hidden.flatten(0, 1)
                loss = cross_entropy(hidden, model.head.weight, labels)
            (loss / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        done += 1
        if done == WARM_UP_STEPS:
            began = time.perf_counter()
        seconds = time.perf_counter() - began
        if done > WARM_UP_STEPS and seconds >= MEASURED_SECONDS:
            return (done - WARM_UP_STEPS) * training.grad_accum_steps * labels.numel() / seconds


# --- what to change ---------------------------------------------------------------------------------------------------


def advice(config: Config, vocab_size: int, device: str, available: int) -> str:
    """The first change of settings, from the mildest on, with which the run fits into `available` bytes."""
    for words, changed in _milder(config):
        if plan_run(changed, vocab_size, device).peak <= available:
            return f"it fits with {words}"
    return "nothing but a smaller model fits: lower model.n_layers, model.d_model or training.seq_len"


def _milder(config: Config) -> Iterator[tuple[str, Config]]:
    """Settings that compute the same with less memory: first smaller micro-batches, then blocks that are computed again."""
    training, model = config.training, config.model
    checkpointing = config.model_copy(update={"model": model.model_copy(update={"gradient_checkpointing": True})})
    for base, more in ((config, ""), (checkpointing, " and model.gradient_checkpointing=true")):
        size, accumulate = training.micro_batch_size, training.grad_accum_steps
        while size % 2 == 0:
            size, accumulate = size // 2, accumulate * 2
            smaller = training.model_copy(update={"micro_batch_size": size, "grad_accum_steps": accumulate})
            yield f"training.micro_batch_size={size} training.grad_accum_steps={accumulate}{more}", base.model_copy(update={"training": smaller})
