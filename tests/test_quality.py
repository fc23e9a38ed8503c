"""benchmarks/quality.py trains configs and a peer on the same rows, and tells when one reaches the
other's end.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

PEER = '''
"""A bigram model with the interface of nanoGPT's model.py."""
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.next = nn.Embedding(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.next.weight)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas)

    def forward(self, idx, targets):
        logits = self.next(idx)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.view(-1))
'''


@pytest.fixture
def quality(monkeypatch):
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality_peers
    import quality_results

    return quality_peers, quality_results


def test_a_curve_reaches_a_value_on_the_line_between_two_points(quality):
    """From 4 at 10 s to 2 at 20 s: 2.5 after three quarters of the way, 17.5 s."""
    results = quality[1]
    curve = [results.Point(1, 10, 0, 4.0, 0, 0), results.Point(2, 20, 0, 2.0, 0, 0)]
    assert results.seconds_to(curve, 2.5) == 17.5
    assert results.seconds_to(curve, 5.0) == 10  # the first point is already below
    assert results.seconds_to(curve, 1.9) is None


def test_a_folder_without_the_code_of_a_peer_is_named(quality, tmp_path):
    with pytest.raises(UserError) as caught:
        quality[0].import_from(tmp_path / "nanochat", "nanochat.gpt")
    assert str(caught.value) == (
        f"{tmp_path}/nanochat: has no nanochat/gpt.py. "
        "Clone https://github.com/karpathy/nanochat and give its folder."
    )


@pytest.mark.slow
@pytest.mark.long
def test_configs_and_a_peer_train_on_the_same_rows(tmp_path):
    """The peer is a table of 300 x 300 logits, all 0 at first: ln 300 nats per token before its
    first step. One that learns is below that at the end, in bits per byte at most log2(300), for a
    token has at least one byte.
    """
    peer = tmp_path / "nanoGPT"
    peer.mkdir()
    (peer / "model.py").write_text(PEER, encoding="utf-8")
    base = ROOT / "configs/experiments/recipe/base.yaml"
    small = {
        "training.max_steps": 4,
        "training.micro_batch_size": 2,
        "training.grad_accum_steps": 2,
        "training.seq_len": 16,
        "model.n_layers": 1,
        "model.d_model": 32,
        "tokenizer.vocab_size": 300,
    }
    command = [
        sys.executable,
        str(ROOT / "benchmarks/quality.py"),
        str(base),
        "--data",
        str(ROOT / "data/tiny_corpus.txt"),
        "--nanogpt",
        str(peer),
        "--set",
        *(f"{key}={value}" for key, value in small.items()),
        "--turns",
        "2",
        "--val-rows",
        "8",
        "--seeds",
        "1",
        "--json",
        "quality.json",
        "--picture",
        "quality.png",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert list(curves) == [str(base), "nanogpt"]
    for (points,) in curves.values():
        assert [point["step"] for point in points] == [2, 4]
        assert 0 < points[1]["bits_per_byte"] < points[0]["bits_per_byte"]
        assert 0 < points[0]["seconds"] < points[1]["seconds"]
        assert points[0]["peak_mb"] == points[1]["peak_mb"]
    assert curves["nanogpt"][0][0]["parameters"] == 300 * 300
    # embedding (tied), attention 4·32², SwiGLU 3·32·128, three norms
    assert curves[str(base)][0][0]["parameters"] == 300 * 32 + 4 * 32**2 + 3 * 32 * 128 + 3 * 32
    assert (tmp_path / "quality.png").stat().st_size > 0
    assert "nanogpt's end" in done.stdout
