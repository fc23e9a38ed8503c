"""hardware.precision: auto, as one of 32, 16 and bf16, with the reason.

    CUDA   bf16, or 16 on a GPU without bf16; 32 where 16 is not supported
    MPS    bf16 needs macOS 14; then the faster of 32 and bf16
    CPU    the faster of 32 and bf16: with AMX bf16 is, on an older CPU it is slower than 32

The faster one is measured for about half a second, on a block and a head of the model's shapes.
"""

import time
from typing import Any

import torch

from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.planning.probes import Probe, random_batch

MEASURED_SECONDS = 0.5
# 32 is exact, so bf16 must be more than a little faster.
WORTHWHILE = 1.05
# Tokens of a measured micro-batch: enough that products are most of it.
LARGEST_BATCH = 4096


def choose_precision(config: Config, device: str) -> tuple[str, str]:
    """The precision of a run, and why.

    Args:
        config: the settings; a vocabulary that is not known yet is left out of the measurement.
        device: cpu, cuda or mps.
    """
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this GPU has bf16 arithmetic"
        if config.hardware.strategy == "fsdp":
            return "32", "this GPU has no bf16 arithmetic, and fsdp does not support 16"
        return "16", "this GPU has no bf16 arithmetic"
    if config.hardware.devices * config.hardware.num_nodes > 1:
        return "32", "several processes must agree, so it is not measured"
    if device == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return "32", "bf16 on MPS needs macOS 14"
    ratio = measure_ratio(config, device)
    why = f"bf16 takes {1 / ratio:.2f} times the time of 32 for this model's shapes, measured"
    return ("bf16" if ratio >= WORTHWHILE else "32"), why


def measure_ratio(config: Config, device: str) -> float:
    """How many times as fast bf16 is as 32, forward and backward, by the fastest of several
    micro-batches that are taken in turn.
    """
    vocab_size = config.model.vocab_size or config.tokenizer.vocab_size or 256
    changes: dict[str, Any] = {"n_layers": 1, "vocab_size": vocab_size}
    changes["gradient_checkpointing"] = False
    shape = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    training = config.training
    size = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    rows = max(1, min(size, LARGEST_BATCH // training.seq_len))
    batch = random_batch(shape, rows)
    probes = {}
    for precision in ("32", "bf16"):
        hardware = config.hardware.model_copy(update={"precision": precision})
        settings = shape.model_copy(update={"hardware": hardware})
        probes[precision] = Probe(Decoder(shape.model), settings, device)
        probes[precision].micro_batch(batch)  # without the costs of a first step
    fastest = dict.fromkeys(probes, float("inf"))
    began, n_rounds = time.perf_counter(), 0
    while n_rounds < 2 or time.perf_counter() - began < MEASURED_SECONDS:
        for precision, probe in probes.items():
            start = time.perf_counter()
            probe.micro_batch(batch)
            fastest[precision] = min(fastest[precision], time.perf_counter() - start)
        n_rounds += 1
    return fastest["32"] / fastest["bf16"]
