"""Time and memory of the loss, beside torch's two ways to the same number.

    python benchmarks/losses.py [--tokens 4096 --width 384 --vocab 8192 --threads 2 --rounds 10]

Forward and backward. Times are the best of interleaved rounds; memory is the peak of what torch allocated beyond
the hidden states, the head and the labels (the gradients of the first two are in it), from torch's profiler.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import print
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from tinylm.objectives.cross_entropy import cross_entropy  # noqa: E402

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits, F.cross_entropy": lambda h, w, y: F.cross_entropy(
        (h @ w.T).float(), y, reduction="sum"
    ),
    "F.linear_cross_entropy, chunked": lambda h, w, y: F.linear_cross_entropy(
        h, w, y, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    ),
    "tinylm.objectives.cross_entropy.cross_entropy": cross_entropy,
}


def step(
    way: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    bf16: bool,
) -> float:
    """Milliseconds of one forward and backward."""
    hidden, weight, _ = tensors
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = way(*tensors)
    loss.backward()
    return 1000 * (time.perf_counter() - start)


def peak_mb(
    way: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    bf16: bool,
) -> float:
    """The most that one step held at once, in units of 10^6 bytes."""
    tensors[0].grad = tensors[1].grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(way, tensors, bf16=bf16)
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 1e6


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("tokens", 4096),
        ("width", 384),
        ("vocab", 8192),
        ("threads", 2),
        ("rounds", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, requires_grad=True)
    weight = (0.02 * torch.randn(options.vocab, options.width)).requires_grad_()
    tensors = hidden, weight, torch.randint(options.vocab, (options.tokens,))
    for bf16 in (False, True):
        times = [
            {name: step(way, tensors, bf16=bf16) for name, way in WAYS.items()}
            for _ in range(options.rounds + 1)
        ][1:]
        for name, way in WAYS.items():
            milliseconds = min(t[name] for t in times)
            print(
                f"{'bf16' if bf16 else 'fp32'}  {name:<32} {milliseconds:7.0f} ms  {peak_mb(way, tensors, bf16=bf16):7.0f} MB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
