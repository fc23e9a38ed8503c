"""Time and memory of the chunked cross entropy, compared with two implementations of torch.

    python benchmarks/losses.py [--tokens 4096 --width 384 --vocab 8192 --threads 2 --rounds 10]

One forward and backward pass. Times are the minimum of interleaved rounds. Memory is the peak of
torch's allocations (from its profiler) beyond hidden states, head and labels; gradients are included.
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

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all logits, F.cross_entropy": lambda h, w, y: F.cross_entropy(
        (h @ w.T).float(), y, reduction="sum"
    ),
    "F.linear_cross_entropy, chunked": lambda h, w, y: F.linear_cross_entropy(
        h, w, y, reduction="sum", options=torch.nn.LinearCrossEntropyOptions()
    ),
    "tinylm.objectives.cross_entropy.cross_entropy": cross_entropy,
}


def step(
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    bf16: bool,
) -> float:
    """Milliseconds of one forward and backward pass."""
    hidden, weight, _ = tensors
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_fn(*tensors)
    loss.backward()
    return 1000 * (time.perf_counter() - start)


def peak_mb(
    loss_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
    tensors: tuple[Tensor, Tensor, Tensor],
    *,
    bf16: bool,
) -> float:
    """Peak memory of one step, in 10^6 bytes."""
    tensors[0].grad = tensors[1].grad = None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(loss_fn, tensors, bf16=bf16)
    allocated = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak / 1e6


def main(argv: list[str] | None = None) -> int:
    """Print time and memory of each implementation, in fp32 and under bf16 autocast."""
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
            {name: step(loss_fn, tensors, bf16=bf16) for name, loss_fn in IMPLEMENTATIONS.items()}
            for _ in range(options.rounds + 1)
        ][1:]
        for name, loss_fn in IMPLEMENTATIONS.items():
            milliseconds = min(t[name] for t in times)
            peak = peak_mb(loss_fn, tensors, bf16=bf16)
            dtype = "bf16" if bf16 else "fp32"
            print(f"{dtype}  {name:<45} {milliseconds:7.0f} ms  {peak:7.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
