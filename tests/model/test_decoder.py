"""The decoder against a second one, written in plain loops, and against hand computations.

`slow_logits` below is the oracle: the same model with one Python loop for each head, query and
token, and no masks. Every
option, and a set of combinations in which each pair of options meets, must agree with it, and so must cached decoding.
Weights are random with a large spread, so that attention is far from uniform and a wrong term shows.
"""

import cmath
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tinylm.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from tinylm.model import decoder
from tinylm.model.decoder import (
    AttentionContext,
    Decoder,
    MixtureOfExperts,
    alibi_slopes,
    apply_rotary,
    attention_context,
    causal_mask,
    count_parameters,
    flops_per_token,
    positions_in_documents,
    rotary_cos_sin,
)
from tinylm.model.kv_cache import KVCache

T = 12
SMALL = {
    "vocab_size": 31,
    "max_seq_len": 64,
    "n_layers": 2,
    "d_model": 24,
    "n_heads": 4,
    "d_ff": 20,
}
AXES = {
    "position": ("rope", "learned", "alibi", "none"),
    "ffn": ("swiglu", "geglu", "silu", "gelu", "relu2"),
    "norm": ("rmsnorm", "layernorm"),
    "norm_placement": ("pre", "post", "output", "sandwich", "none"),
    "n_kv_heads": (None, 2, 1),
    "qk_norm": (False, True, "all_heads"),
    "sliding_window": (None, 4, 1),
    "n_sinks": (0, 3),
    "moe": (None, MoEConfig(n_experts=3, top_k=2)),
    "bias": ("none", "qkv", "all"),
    "tie_embeddings": (True, False),
    "input_scalars": (False, True),
    "bigram_rows": (0, 13),
    "scale_embeddings": (False, True),
}
# Layers of two kinds; in a model of two layers, the first has the window.
MIXED = {"sliding_window": 4, "full_attention_interval": 2}


# Only for position rope, so no axis. All three kinds of pairs occur: K is 6, and theta 10000.
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_seq_len": 6,
    "beta_fast": 0.9,
    "beta_slow": 1e-4,
}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_max_seq_len": 6} | {
    "low_freq_factor": 0.01,
    "high_freq_factor": 0.9,
}


def single_options() -> list[dict]:
    """Each value of each option alone, the rest at its default; some more that are no axis."""
    alone = [{name: value} for name, values in AXES.items() for value in values[1:]]
    return [
        {},
        *alone,
        {"head_dim": 10},
        {"n_heads": 6},
        {"n_heads": 6, "position": "alibi"},
        {"moe": MoEConfig(n_experts=3, top_k=3)},
        {"rope_scaling": YARN},
        {"no_rope_interval": 2},
        {"query_scalar": 3},
        MIXED,
        MIXED | {"position": "alibi", "n_kv_heads": 2},
        MIXED | {"rope_local_theta": 20.0, "rope_scaling": YARN, "n_sinks": 2},
        {"rope_scaling": LLAMA3, "n_kv_heads": 2},
    ]


def pairwise() -> list[dict]:
    """Few combinations that contain each pair of values of two options; chosen greedily."""
    wanted = {
        pair
        for a, b in itertools.combinations(AXES, 2)
        for pair in itertools.product([(a, v) for v in AXES[a]], [(b, v) for v in AXES[b]])
    }
    rows = []
    while wanted:
        row: dict = dict(min(wanted, key=repr))
        for name in AXES:
            if name not in row:
                row[name] = max(
                    AXES[name],
                    key=lambda value, name=name: len(wanted & pairs_of(row | {name: value})),
                )
        wanted -= pairs_of(row)
        rows.append(row)
    return rows


def pairs_of(row: dict) -> set:
    items = [(name, row[name]) for name in AXES if name in row]
    return set(itertools.combinations(items, 2))


def label(options: dict) -> str:
    return (
        "-".join(
            f"{name}={'yes' if name == 'moe' and value else value}"
            if name != "rope_scaling"
            else f"{name}={value['type']}"
            for name, value in options.items()
        )
        or "default"
    )


EACH = pytest.mark.parametrize("options", single_options(), ids=label)
# The quick tier has each option alone.
COMBINED = pytest.mark.parametrize(
    "options",
    [*single_options(), *(pytest.param(row, marks=pytest.mark.slow) for row in pairwise())],
    ids=label,
)


def make(spread: float = 0.3, **options) -> Decoder:
    """A small decoder in eval mode; all weights, norms and biases included, are random with std `spread`."""
    model = Decoder(ModelConfig(**SMALL | options))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(spread * torch.randn(weight.shape, generator=generator))
    return model.eval()


def some_ids(batch: int = 2, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(
        SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to fp32 rounding, relative to the largest value, and not constant."""
    assert expected.std() > 1e-3, "values that hardly vary compare nothing"
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


# --- the oracle -----------------------------------------------------------------------------------


def slow_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of one document a row, written out from the papers' formulas."""
    return torch.stack([slow_row(model, row) for row in ids])


@torch.no_grad()
def slow_row(model: Decoder, ids: Tensor) -> Tensor:
    config = model.config
    x = model.embedding.weight[ids]
    if config.scale_embeddings:
        x = x * math.sqrt(config.d_model)
    if config.position == "learned":
        x = x + model.positions.weight[: len(ids)]
    if config.bigram_rows:
        x = x + model.bigram_embedding.weight[slow_bigrams(ids.tolist(), config.bigram_rows)]
    embedded = x
    for layer, block in enumerate(model.blocks):
        if config.input_scalars:
            x = model.stream_scalars[layer] * x + model.input_scalars[layer] * embedded
        if config.norm_placement == "post":
            x = slow_norm(
                block.attention_norm, x + slow_attention(block.attention, x, config), config
            )
            x = slow_norm(block.ffn_norm, x + slow_feed(block.ffn, x, config), config)
        elif config.norm_placement == "pre":
            x = x + slow_attention(
                block.attention, slow_norm(block.attention_norm, x, config), config
            )
            x = x + slow_feed(block.ffn, slow_norm(block.ffn_norm, x, config), config)
        elif config.norm_placement in ("output", "sandwich"):
            is_sandwich = config.norm_placement == "sandwich"
            into = slow_norm(block.attention_norm, x, config) if is_sandwich else x
            mixed = slow_attention(block.attention, into, config)
            x = x + slow_norm(block.attention_output_norm, mixed, config)
            into = slow_norm(block.ffn_norm, x, config) if is_sandwich else x
            x = x + slow_norm(block.ffn_output_norm, slow_feed(block.ffn, into, config), config)
        else:
            x = x + slow_attention(block.attention, x, config)
            x = x + slow_feed(block.ffn, x, config)
    if config.norm_placement in ("pre", "output", "sandwich"):
        x = slow_norm(model.norm, x, config)
    return x @ (model.embedding if config.tie_embeddings else model.head).weight.T


def slow_bigrams(ids: list[int], n_rows: int) -> list[int]:
    """The row of each token with the one before, in Python's integers, which have no limit."""
    rows = []
    for before, token in zip([-1, *ids], ids, strict=False):
        mixed = ((before + 1) * 2654435761) ^ (token * 805459861)
        rows.append((mixed ^ (mixed >> 17)) % n_rows)
    return rows


def slow_norm(norm: torch.nn.Module, x: Tensor, config: ModelConfig) -> Tensor:
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
    return x + norm.bias if config.norm == "layernorm" and config.bias == "all" else x


def slow_attention(attention: torch.nn.Module, x: Tensor, config: ModelConfig) -> Tensor:
    H, G, K = (
        config.n_heads,
        config.n_kv_heads or config.n_heads,
        config.head_dim or config.d_model // config.n_heads,
    )
    q, k, v = attention.qkv(x).split((H * K, G * K, G * K), dim=-1)
    if config.qk_norm == "all_heads":
        q = torch.stack([rms_normed(row, config) for row in q]) * attention.q_norm.weight
        k = torch.stack([rms_normed(row, config) for row in k]) * attention.k_norm.weight
    sees_all = config.full_attention_interval == 2 and attention.layer == 1
    window = len(x) if sees_all else config.sliding_window or len(x)
    base, scaling = config.rope_theta, config.rope_scaling
    if config.rope_local_theta is not None and not sees_all:
        base, scaling = config.rope_local_theta, None
    rotation = slow_frequencies(K // 2, base, scaling)
    rows = []
    for t in range(len(x)):
        heads = []
        for head in range(H):
            group = head // (H // G)
            part, kv_part = slice(head * K, (head + 1) * K), slice(group * K, (group + 1) * K)
            # position 0 turns nothing
            turns = config.no_rope_interval is None or (attention.layer + 1) % 2 != 0
            query = slow_query(q[t, part], turns * t, attention.q_norm, config, rotation)
            scores, values = [], []
            for sink in range(config.n_sinks):
                scores.append(query @ attention.sink_keys[group, sink])
                values.append(attention.sink_values[group, sink])
            for s in range(max(0, t - window + 1), t + 1):
                key = slow_query(k[s, kv_part], turns * s, attention.k_norm, config, rotation)
                score = query @ key
                if config.position == "alibi":
                    # the bias is not divided
                    bias = SLOPES[H][head] * (t - s)
                    score = score - bias * math.sqrt(config.query_scalar or K)
                scores.append(score)
                values.append(v[s, kv_part])
            divisor = math.sqrt(config.query_scalar or K)
            heads.append((torch.stack(scores) / divisor).softmax(0) @ torch.stack(values))
        rows.append(torch.cat(heads))
    return attention.out(torch.stack(rows))


SLOPES = {4: [2**-2, 2**-4, 2**-6, 2**-8], 6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]}


def slow_query(
    x: Tensor,
    position: int,
    norm: torch.nn.Module,
    config: ModelConfig,
    rotation: tuple[float, list[float]],
) -> Tensor:
    """One query or key (K,): normalized, then rotated pair by pair as complex numbers."""
    if config.qk_norm is True:
        x = rms_normed(x, config) * norm.weight
    if config.position != "rope":
        return x
    half = len(x) // 2
    size, frequencies = rotation
    turned = [
        size * complex(x[i], x[i + half]) * cmath.exp(1j * position * frequencies[i])
        for i in range(half)
    ]
    return torch.tensor([z.real for z in turned] + [z.imag for z in turned])


def rms_normed(x: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.square().mean() + config.norm_eps).sqrt()


def slow_frequencies(
    n_pairs: int, theta: float, scaling: RopeScalingConfig | None
) -> tuple[float, list[float]]:
    """What rotated vectors are multiplied by, and the angle per position of each pair."""
    plain = [theta ** (-i / n_pairs) for i in range(n_pairs)]
    if scaling is None:
        return 1.0, plain
    s, L = scaling.factor, scaling.original_max_seq_len
    if scaling.type == "llama3":
        scaled = []
        for f in plain:
            turns = L * f / math.tau
            if turns < scaling.low_freq_factor:
                scaled.append(f / s)
            elif turns > scaling.high_freq_factor:
                scaled.append(f)
            else:
                share = turns - scaling.low_freq_factor
                share /= scaling.high_freq_factor - scaling.low_freq_factor
                scaled.append((1 - share) * f / s + share * f)
        return 1.0, scaled
    # The pair i that turns r times in L: L · theta^(-i/n) / 2π = r, in whole pairs.
    first = max(0, math.floor(n_pairs * math.log(L / math.tau / scaling.beta_fast, theta)))
    last = math.ceil(n_pairs * math.log(L / math.tau / scaling.beta_slow, theta))
    shares = [min(1, max(0, (i - first) / (last - first))) for i in range(n_pairs)]
    scaled = [share * f / s + (1 - share) * f for share, f in zip(shares, plain, strict=True)]
    return 0.1 * math.log(s) + 1, scaled


def slow_feed(ffn: torch.nn.Module, x: Tensor, config: ModelConfig) -> Tensor:
    if config.moe is None:
        return torch.stack(
            [
                slow_expert(row, ffn.up.weight, ffn.up.bias, ffn.down.weight, ffn.down.bias, config)
                for row in x
            ]
        )
    rows = []
    for row in x:
        probabilities = (ffn.router.weight @ row).softmax(0)
        best = sorted(range(config.moe.n_experts), key=lambda e, p=probabilities: -p[e])[
            : config.moe.top_k
        ]
        total = sum(probabilities[e] for e in best)
        biases = [
            (None, None) if ffn.up_bias is None else (ffn.up_bias[e], ffn.down_bias[e])
            for e in best
        ]
        outputs = [
            slow_expert(row, ffn.up[e], up_bias, ffn.down[e], down_bias, config)
            for e, (up_bias, down_bias) in zip(best, biases, strict=True)
        ]
        rows.append(
            sum(probabilities[e] / total * output for e, output in zip(best, outputs, strict=True))
        )
    return torch.stack(rows)


def slow_expert(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    config: ModelConfig,
) -> Tensor:
    hidden = up @ x + (0 if up_bias is None else up_bias)
    value = None
    if config.ffn in ("swiglu", "geglu"):
        hidden, value = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
    if config.ffn in ("swiglu", "silu"):
        hidden = hidden * hidden.sigmoid()
    elif config.ffn in ("geglu", "gelu"):
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        hidden = 0.5 * hidden * (1 + torch.tanh(inner))
    else:
        hidden = hidden.clamp(min=0) ** 2
    if value is not None:
        hidden = hidden * value
    return down @ hidden + (0 if down_bias is None else down_bias)


def test_the_combinations_hold_every_pair_of_options():
    met = set().union(*(pairs_of(row) for row in pairwise()))
    for a, b in itertools.combinations(AXES, 2):
        for pair in itertools.product(AXES[a], AXES[b]):
            assert ((a, pair[0]), (b, pair[1])) in met


@COMBINED
@torch.no_grad()
def test_logits_equal_the_ones_written_out_in_loops(options):
    model, ids = make(**options), some_ids(batch=1)
    assert_same(model(ids), slow_logits(model, ids))


# --- causality ------------------------------------------------------------------------------------


def gradients_of_positions(model: Decoder, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
    """For each t, the size (T,) of d logits[t] / d embedding of each token, summed over the batch."""
    kept: list[Tensor] = []
    handle = model.embedding.register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    logits = model(ids)
    handle.remove()
    for t in range(ids.size(1)):
        (gradient,) = torch.autograd.grad(
            (logits[:, t] * torch.randn_like(logits[:, t])).sum(), kept[0], retain_graph=True
        )
        yield t, gradient.abs().sum(dim=(0, 2))


@COMBINED
def test_no_logit_depends_on_a_later_token(options):
    """The gradient is exactly zero, not small; it is not zero for the token itself, as it would be for a constant."""
    for t, size in gradients_of_positions(make(**options), some_ids()):
        assert size[t + 1 :].eq(0).all()
        assert size[t] > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"n_sinks": 2}, {"position": "alibi"}, {"position": "learned", "norm_placement": "post"}],
    ids=label,
)
@pytest.mark.parametrize("window", [1, 2, 5, T, T + 3])
def test_a_window_admits_exactly_that_many_positions_itself_included(options, window):
    """In one layer, logits[t] depends on tokens t-W+1 ... t. The old bug was W+1 of them."""
    for t, size in gradients_of_positions(
        make(n_layers=1, sliding_window=window, **options), some_ids()
    ):
        assert size.gt(0).tolist() == [t - window < s <= t for s in range(T)]


def test_a_window_sees_the_tokens_before_it_through_the_layers_below():
    """Two layers of a window of W reach 2(W - 1) tokens back."""
    *_, (t, size) = gradients_of_positions(make(sliding_window=3), some_ids())
    assert size.gt(0).tolist() == [s >= t - 4 for s in range(T)]


@EACH
@torch.no_grad()
def test_padding_on_the_right_changes_no_real_token(options):
    model, ids = make(**options), some_ids()
    padded = torch.cat((ids, torch.zeros(2, 5, dtype=torch.long)), dim=1)
    assert_same(model(padded)[:, :T], model(ids))


# --- the cache ------------------------------------------------------------------------------------


def cached_logits(
    model: Decoder,
    ids: Tensor,
    chunks: list[int],
    *,
    chunk: int,
    max_len: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Logits of `ids` fed through a cache in pieces of these sizes, then token by token."""
    cache = model.new_cache(ids.size(0), max_len or ids.size(1), chunk=chunk, dtype=dtype)
    chunks = chunks + [1] * (ids.size(1) - sum(chunks))
    return torch.cat([model(piece, cache=cache) for piece in ids.split(chunks, dim=1)], dim=1)


@COMBINED
@torch.no_grad()
def test_cached_logits_equal_full_forward(options):
    """Token by token, a long prompt first, and chunks of many sizes; with windows of 4 and 1 the ring wraps around."""
    model, ids = make(**options), some_ids(length=20)
    expected = model(ids)
    for chunks in ([], [13], [3, 4, 1, 1, 4, 2, 4]):
        assert_same(cached_logits(model, ids, chunks, chunk=max(chunks, default=1)), expected)
        assert_same(
            cached_logits(model, ids, chunks, chunk=max(chunks, default=1) + 3, max_len=64),
            expected,
        )


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(1, 9), st.integers(1, 7), st.data())
@torch.no_grad()
def test_a_ring_of_any_size_fed_in_any_chunks_gives_the_logits_of_the_full_forward(
    window, chunk, data
):
    length = data.draw(st.integers(1, 30))
    chunks: list[int] = []
    while sum(chunks) < length:
        chunks.append(data.draw(st.integers(1, min(chunk, length - sum(chunks)))))
    model, ids = make(n_layers=1, sliding_window=window), some_ids(batch=1, length=length)
    assert_same(cached_logits(model, ids, chunks, chunk=chunk), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"n_sinks": 2}, {"position": "alibi"}], ids=label)
@pytest.mark.parametrize("chunks", [[], [6]], ids=["tokens", "prompt"])
@torch.no_grad()
def test_a_window_admits_exactly_that_many_positions_in_the_cache_too(options, chunks):
    """The last of 12 tokens sees 8..11 through a window of 4: token 7 does not matter to it, token 8 does.

    The old bug trimmed keys and values but not the mask.
    """
    model, ids = make(n_layers=1, sliding_window=4, **options), some_ids(batch=1)
    last = cached_logits(model, ids, chunks, chunk=6)[0, -1]
    for position in range(T):
        changed = ids.clone()
        changed[0, position] = (ids[0, position] + 1) % SMALL["vocab_size"]
        equal = torch.equal(cached_logits(model, changed, chunks, chunk=6)[0, -1], last)
        assert equal == (position < 8), position


def test_cache_holds_grouped_heads_and_under_a_window_a_ring():
    """2 key heads, not 4, are stored; W + chunk - 1 slots, since the oldest of `chunk` new queries looks W - 1 back."""
    model = Decoder(ModelConfig(**SMALL | {"n_kv_heads": 2, "sliding_window": 5}))
    assert model.new_cache(3, 60, chunk=4).keys.shape == (2, 3, 2, 5 + 4 - 1, 6)
    assert model.new_cache(3, 7, chunk=4).keys.shape == (2, 3, 2, 7, 6)
    assert Decoder(ModelConfig(**SMALL)).new_cache(1).keys.shape == (2, 1, 4, 64, 6)
    # a layer without a window needs all positions
    mixed = Decoder(ModelConfig(**SMALL | MIXED))
    assert mixed.new_cache(1, chunk=4).keys.shape == (2, 1, 4, 64, 6)


@torch.no_grad()
def test_selected_rows_of_a_cache_continue_as_the_same_rows():
    model, ids = make(sliding_window=4, bigram_rows=13), some_ids(batch=3)
    cache = model.new_cache(3, T, chunk=8)
    model(ids[:, :8], cache=cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.select(rows)
    assert_same(model(ids[rows, 8:], cache=cache), model(ids)[rows, 8:])


@COMBINED
@pytest.mark.parametrize("padded", [False, True], ids=["apart", "padded"])
@torch.no_grad()
def test_rows_of_different_lengths_decode_together_as_each_alone(options, padded, monkeypatch):
    """Prompts of 3, 11, 6 and 1 tokens, each read into its own row; then 7 decode steps of all, with the first two
    rows exchanged in between. Under a window of 4 with chunks of 11, the longest row wraps around its ring of 14.
    Attention takes the rows apart, as on the CPU, or padded and masked, as on a GPU.
    """
    if padded:
        monkeypatch.setattr(KVCache, "row_lengths", None)
    model, ids = make(**options), some_ids(batch=4, length=18)
    expected, lengths = model(ids), [3, 11, 6, 1]
    cache = model.new_cache(5, 18, chunk=11)  # row 4 stays empty
    for row, length in enumerate(lengths):
        one = cache.rows(row, row + 1)
        assert_same(model(ids[row : row + 1, :length], cache=one)[0], expected[row, :length])
    batch = cache.rows(0, 4)
    order = [0, 1, 2, 3]
    for step in range(7):
        if step == 4:
            cache.swap_rows(0, 1)
            order = [1, 0, 2, 3]
        new = torch.stack([ids[row, lengths[row] + step] for row in order])[:, None]
        logits = model(new, cache=batch)[:, 0]
        assert_same(logits, torch.stack([expected[row, lengths[row] + step] for row in order]))
    assert cache.lengths.tolist() == [18, 10, 13, 8, 0]


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 4}, {"sliding_window": 4, "bigram_rows": 13}], ids=label
)
@torch.no_grad()
def test_a_row_may_begin_as_another_one(options):
    """Row 1 copies the first 9 of 12 positions of row 0 and continues otherwise; then row 0 itself is shortened.
    A ring of 4 + 6 - 1 slots has the last 9 positions of 12: 7 to 9 see 4 to 8, which it still has.
    """
    model, ids = make(**options), some_ids(batch=1, length=16)
    cache = model.new_cache(2, 16, chunk=6)
    model(ids[:, :6], cache=cache.rows(0, 1))
    model(ids[:, 6:12], cache=cache.rows(0, 1))
    other = torch.cat((ids[:, :9], ids[:, :4]), dim=1)
    model(ids[:, 3:9], cache=cache.rows(1, 2))  # row 1 held another text
    for target in (1, 0):
        assert cache.can_shorten(0, 9)
        cache.copy_row(0, target, 9)
        assert_same(model(other[:, 9:], cache=cache.rows(target, target + 1)), model(other)[:, 9:])
    assert cache.can_shorten(0, 5) == (options == {})
    assert not cache.can_shorten(0, 14)


@torch.no_grad()
def test_a_cache_that_grows_keeps_what_it_has():
    model, ids = make(bigram_rows=13), some_ids(batch=2, length=12)
    cache = model.new_cache(1, 6)
    model(ids[:1, :6], cache=cache)
    cache.reserve(2, 12)
    model(ids[1:, :6], cache=cache.rows(1, 2))
    assert_same(model(ids[:, 6:], cache=cache), model(ids)[:, 6:])


@torch.no_grad()
def test_tokens_that_do_not_fit_in_a_cache_are_an_error_and_change_nothing():
    model, ids = make(sliding_window=3), some_ids(batch=1, length=20)
    cache = model.new_cache(1, 10, chunk=4)
    model(ids[:, :4], cache=cache)
    with pytest.raises(ValueError, match="4 [+] 7 positions do not fit in a cache of 10"):
        model(ids[:, 4:11], cache=cache)
    with pytest.raises(
        ValueError, match="5 positions at once, but this ring cache takes at most 4"
    ):
        model(ids[:, 4:9], cache=cache)
    with pytest.raises(ValueError, match="document_ids cannot be combined with a cache"):
        model(ids[:, 4:6], cache=cache, document_ids=torch.zeros(1, 2))
    assert cache.length == 4
    assert_same(model(ids[:, 4:8], cache=cache), model(ids[:, :8])[:, 4:])


@pytest.mark.parametrize("position", AXES["position"])
def test_more_than_max_seq_len_positions_are_an_error(position):
    model, ids = make(position=position, max_seq_len=8), some_ids(batch=1)
    with pytest.raises(ValueError, match=r"12 positions are more than max_seq_len \(8\)"):
        model(ids)
    cache = model.new_cache(1, T)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        with pytest.raises(ValueError, match=r"9 positions are more than max_seq_len \(8\)"):
            model(ids[:, 8:9], cache=cache)
    assert cache.length == 8


# --- positions ------------------------------------------------------------------------------------


def rotated(x: Tensor, position: int, theta: float = 10000.0) -> Tensor:
    """A vector (K,) as a query at that position."""
    return apply_rotary(
        x[None, None, None], *rotary_cos_sin(torch.tensor([position]), len(x), theta)
    )[0, 0, 0]


def test_rope_rotates_pairs_as_complex_numbers():
    """Pair i, of dimensions i and i + K/2 (half-split), is one complex number, multiplied by exp(j p theta^(-2i/K)).

    Pairing neighbors (2i, 2i + 1), or angles laid out for neighbors, gives other numbers: the old bug.
    """
    x, half = torch.randn(8, generator=torch.Generator().manual_seed(0)), 4
    expected = [
        complex(x[i], x[i + half]) * cmath.exp(1j * 5 * 100.0 ** (-2 * i / 8)) for i in range(half)
    ]
    actual = rotated(x, 5, theta=100.0)
    torch.testing.assert_close(
        actual, torch.tensor([z.real for z in expected] + [z.imag for z in expected])
    )


def test_rope_at_position_0_changes_nothing():
    x = torch.randn(8)
    assert torch.equal(rotated(x, 0), x)


@pytest.mark.slow
@settings(max_examples=50)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rope_scores_depend_on_distance_only_and_keep_lengths(p, q, shift):
    """<R(p)x, R(q)y> = <R(p+s)x, R(q+s)y>; a mixture of two layouts is no rotation and fails both."""
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(p))
    torch.testing.assert_close(
        rotated(x, p) @ rotated(y, q),
        rotated(x, p + shift) @ rotated(y, q + shift),
        rtol=1e-3,
        atol=2e-3,
    )
    torch.testing.assert_close(rotated(x, p).norm(), x.norm())


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_rotation_is_the_one_that_differences_give(transposed):
    """It is written by hand: checked in fp64, also with the transposed layout that CPU attention gives for keys."""
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cos_sin = rotary_cos_sin(torch.arange(4), 6, 100.0)
    layout = (lambda y: y.mT.contiguous().mT) if transposed else (lambda y: y)
    assert torch.autograd.gradcheck(lambda x: layout(apply_rotary(x, *cos_sin)), x)


def test_rope_angles_of_far_positions_are_not_rounded_to_bf16():
    """bf16 has 8 bits: 300 and 301 would both be 300."""
    model = make(n_layers=1, max_seq_len=512).to(torch.bfloat16)
    cos, _ = attention_context(model.config, torch.tensor([300, 301])).cos_sin
    assert cos.dtype == torch.float32
    assert cos[0, 0] == pytest.approx(math.cos(300), abs=1e-4)
    assert cos[1, 0] == pytest.approx(math.cos(301), abs=1e-4)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@torch.no_grad()
def test_relative_positions_shift_with_the_text(position):
    """With a window of 4 in one layer, the last logits depend on the last 4 tokens, not on where they are."""
    model, ids = make(n_layers=1, sliding_window=4, position=position), some_ids()
    assert_same(model(ids[:, 5:])[:, -1], model(ids)[:, -1])


@torch.no_grad()
def test_without_positions_a_single_layer_sees_the_past_as_a_set():
    model, ids = make(n_layers=1, position="none"), some_ids()
    shuffled = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), dim=1)
    assert_same(model(shuffled)[:, -1], model(ids)[:, -1])
    assert not torch.allclose(
        make(n_layers=1)(shuffled)[:, -1], make(n_layers=1)(ids)[:, -1], atol=1e-3
    )


@pytest.mark.parametrize(
    ("n_heads", "exponents"),
    [
        (1, [8]),
        (2, [4, 8]),
        (4, [2, 4, 6, 8]),
        (6, [2, 4, 6, 8, 1, 3]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_slopes(n_heads, exponents):
    """Powers of two: 2^(-8/H), 2^(-16/H), ...

    Otherwise: the slopes for the power of two below, then every other slope for the one above.

    For 6 heads: the four of 4 heads, then the first and third of 8 heads, 2^-1 and 2^-3.
    """
    torch.testing.assert_close(alibi_slopes(n_heads), torch.tensor([2.0**-e for e in exponents]))


def test_alibi_bias_is_minus_slope_times_distance():
    """Heads of 4: head 1 has slope 1/16, so at position 2 the biases are -2/16, -1/16, 0; the future is masked."""
    bias = attention_context(make(position="alibi").config, torch.arange(3)).attention_mask
    assert bias.shape == (4, 3, 3)
    assert bias[1, 2].tolist() == [-2 / 16, -1 / 16, 0]
    assert bias[1, 0].tolist() == [0, -math.inf, -math.inf]


def mask_of_7(window: int) -> Tensor | None:
    config = ModelConfig(**SMALL | {"sliding_window": window})
    return attention_context(config, torch.arange(7)).attention_mask


def test_plain_causal_attention_needs_no_mask():
    """The kernels without a mask are the fast ones; a mask of T x T is memory as well."""
    model = make()
    context = attention_context(model.config, torch.arange(7))
    assert (context.attention_mask, context.is_causal) == (None, True)
    assert mask_of_7(7) is None
    assert mask_of_7(6) is not None
    cache = model.new_cache(1, T)
    cache.advance(5)
    context = attention_context(model.config, cache.advance(1), cache)
    assert isinstance(context, AttentionContext)
    assert (context.attention_mask, context.is_causal) == (None, False)


def test_causal_mask_counts_a_window_from_the_token_itself():
    assert causal_mask(torch.tensor([5]), torch.arange(8), 3).int().tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0]
    ]
    assert causal_mask(torch.tensor([2]), torch.arange(5), None).int().tolist() == [[1, 1, 1, 0, 0]]


# --- documents in one row -------------------------------------------------------------------------


def test_positions_start_again_in_each_document():
    ids = torch.tensor([[7, 7, 7, 8, 9, 9], [1, 2, 2, 1, 1, 1]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 0, 1, 2]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 3},
        {"n_sinks": 2},
        {"sliding_window": 3, "n_sinks": 2},
        {"n_kv_heads": 2},
    ],
    ids=label,
)
@pytest.mark.parametrize("position", AXES["position"])
@torch.no_grad()
def test_packed_documents_give_the_logits_of_each_alone(position, options):
    """Two rows packed differently; an id that occurs again later (5, 6, 5) is a new document."""
    model, ids = make(position=position, **options), some_ids()
    lengths, numbers = ([5, 1, 6], [2, 7, 3]), ([5, 6, 5], [1, 1, 0])
    numbers[1][:2] = [1, 4]
    document_ids = torch.stack(
        [
            torch.tensor(n).repeat_interleave(torch.tensor(size))
            for n, size in zip(numbers, lengths, strict=True)
        ]
    )
    packed = model(ids, document_ids=document_ids)
    for row, sizes in enumerate(lengths):
        alone = torch.cat([model(document[None])[0] for document in ids[row].split(sizes)])
        assert_same(packed[row], alone)


@torch.no_grad()
def test_without_document_ids_packed_documents_see_each_other():
    """Without the mask, the second document's logits depend on the first."""
    model, ids = make(), some_ids(batch=1)
    assert not torch.allclose(model(ids)[:, 6:], model(ids[:, 6:]), atol=1e-3)
    assert_same(model(ids, document_ids=torch.zeros(1, T, dtype=torch.long)), model(ids))


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, MIXED], ids=label)
def test_documents_one_after_another_give_the_gradients_of_a_mask(options, monkeypatch):
    """MIXED: only the layer without a window splits documents."""
    ids, models, splits = some_ids(batch=3), [], []
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * T, list(range(T))])
    for shortest in (1, T):  # the mean of these documents is 36 tokens / 15
        monkeypatch.setattr(decoder, "SHORT_DOCUMENTS", shortest)
        model = make(**options)
        model(ids, document_ids=documents).square().sum().backward()
        context = attention_context(model.kinds[-1], positions_in_documents(documents))
        models.append(model)
        splits.append(context.document_lengths)
    assert splits == [[[5, 7], [T], [1] * T], None]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert_same(ours.grad, theirs.grad)


def test_no_gradient_crosses_a_document_border():
    model, ids, kept = make(), some_ids(batch=1), []
    model.embedding.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = model(ids, document_ids=torch.tensor([[0] * 5 + [1] * 7]))
    (gradient,) = torch.autograd.grad(logits[:, 5:].square().sum(), kept[0])
    assert gradient[:, :5].eq(0).all()
    assert gradient[:, 5:].ne(0).all()


# --- sinks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["normal", "trunc_normal", "zero_outputs"])
def test_sinks_are_initialized(init):
    """N(0, 0.02²) with every kind of init. The old bug left them as torch.empty had them."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**SMALL | {"n_sinks": 200, "init": init}))
    for block in model.blocks:
        for sink in (block.attention.sink_keys, block.attention.sink_values):
            assert sink.std().item() == pytest.approx(0.02, rel=0.05)
            assert abs(sink.mean().item()) < 0.002


def test_every_position_sees_the_sinks_also_outside_the_window():
    """d logits / d sink is not zero at any position, for keys and values, with a window of 2."""
    model = make(n_layers=1, n_sinks=2, sliding_window=2)
    attention, logits = model.blocks[0].attention, model(some_ids(batch=1))
    for t in range(T):
        for gradient in torch.autograd.grad(
            logits[0, t].square().sum(),
            [attention.sink_keys, attention.sink_values],
            retain_graph=True,
        ):
            assert gradient.ne(0).all()


@torch.no_grad()
def test_changed_sinks_change_far_positions_in_the_cache_too():
    model, ids = make(n_sinks=2, sliding_window=2), some_ids(batch=1)
    before = cached_logits(model, ids, [5], chunk=5)
    for block in model.blocks:
        block.attention.sink_values.add_(1.0)
    after = cached_logits(model, ids, [5], chunk=5)
    assert (after - before).abs().amax(dim=2).gt(1e-3).all()
    assert_same(after, model(ids))


# --- heads and experts ----------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(groups):
    grouped, full, ids = make(n_kv_heads=groups), make(), some_ids()
    K, repeats = 6, 4 // groups
    weights = grouped.state_dict()
    for name in [name for name in weights if "qkv" in name]:
        q, k, v = weights[name].split((4 * K, groups * K, groups * K))
        k, v = (
            part.view(groups, K, -1).repeat_interleave(repeats, dim=0).flatten(0, 1)
            for part in (k, v)
        )
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    assert_same(grouped(ids), full(ids))


@torch.no_grad()
def test_qk_norm_makes_scores_independent_of_the_size_of_queries():
    model, ids = make(qk_norm=True, norm_eps=1e-12), some_ids()
    before = model(ids)
    for block in model.blocks:
        block.attention.qkv.weight[: 2 * 24].mul_(50)
    assert_same(model(ids), before)


def mixture(n_experts: int, top_k: int) -> MixtureOfExperts:
    return make(moe=MoEConfig(n_experts=n_experts, top_k=top_k)).blocks[0].ffn


@torch.no_grad()
def test_balance_loss_is_1_for_equal_use_and_the_number_of_experts_if_one_does_all():
    """E · Σ share · probability. Tokens ±u, router rows ±u: half the tokens each, mean probability 1/2.

    So 2 · (1/2 · 1/2 + 1/2 · 1/2) = 1.

    With +u only, large enough for probability 1: 2 · (1 · 1 + 0 · 0) = 2.
    """
    ffn, u = mixture(2, 1), torch.ones(24)
    ffn.router.weight.copy_(torch.stack((u, -u)))
    assert ffn(torch.stack((u, -u, -u, u))[None])[1].item() == pytest.approx(1)
    assert ffn(torch.stack((u, u))[None])[1].item() == pytest.approx(2)


@torch.no_grad()
def test_balance_loss_of_the_model_is_the_mean_over_layers():
    """A router of zeros gives every expert 1/E, and Σ share is 1: E · 1/E = 1 per layer, so the mean is 1."""
    model = make(moe=MoEConfig(n_experts=3, top_k=2))
    for block in model.blocks:
        block.ffn.router.weight.zero_()
    assert model.features(some_ids()).balance_loss.item() == pytest.approx(1)
    assert make().features(some_ids()).balance_loss.item() == 0


@pytest.mark.parametrize("source", ["logits", "balance"])
def test_gradients_reach_the_router_and_every_visited_expert(source):
    model = make(moe=MoEConfig(n_experts=3, top_k=2))
    features = model.features(some_ids())
    (
        model.head(features.hidden).square().mean() if source == "logits" else features.balance_loss
    ).backward()
    for block in model.blocks:
        assert block.ffn.router.weight.grad.norm() > 0
        if source == "logits":
            assert block.ffn.up.grad.flatten(1).norm(dim=1).gt(0).all()


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    """Not None, which the optimizer would skip on one rank and not on another."""
    ffn = mixture(3, 1)
    with torch.no_grad():
        ffn.router.weight.copy_(torch.stack((torch.ones(24), -torch.ones(24), -torch.ones(24))))
    ffn(torch.ones(1, 5, 24))[0].sum().backward()
    assert ffn.down.grad[0].norm() > 0
    assert ffn.down.grad[1:].eq(0).all()


# --- memory and dropout ---------------------------------------------------------------------------


def gradients(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(11)
    features = model.features(ids)
    (model.head(features.hidden).square().mean() + features.balance_loss).backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe": MoEConfig(n_experts=3, top_k=2)},
        {"sliding_window": 4, "n_sinks": 2},
        {"position": "alibi"},
    ],
    ids=label,
)
def test_gradient_checkpointing_gives_the_same_gradients_to_the_last_bit(options, dropout):
    """The recomputed block draws the same dropout, because torch restores the generator."""
    options = options | {"attention_dropout": dropout, "residual_dropout": dropout}
    expected = gradients(make(**options).train(), some_ids())
    actual = gradients(make(**options, gradient_checkpointing=True).train(), some_ids())
    assert {
        name: torch.equal(actual[name], gradient) for name, gradient in expected.items()
    } == dict.fromkeys(expected, True)


def test_gradient_checkpointing_keeps_fewer_tensors_for_the_backward_pass():
    def kept(model: Decoder) -> int:
        numbers = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(some_ids())
        return numbers

    assert kept(make(gradient_checkpointing=True).train()) < kept(make().train()) / 2


@pytest.mark.parametrize("setting", ["attention_dropout", "residual_dropout"])
@torch.no_grad()
def test_dropout_acts_in_training_only(setting):
    dropping, plain, ids = make(**{setting: 0.5}), make(), some_ids()
    assert torch.equal(dropping(ids), plain(ids))
    dropping.train()
    assert not torch.equal(dropping(ids), dropping(ids))


@EACH
def test_every_weight_gets_a_gradient(options):
    model = make(**options)
    missing = {
        name
        for name, gradient in gradients(model, some_ids()).items()
        if gradient is None or not gradient.norm() > 0
    }
    assert missing == set()


# --- weights --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_tied_head_is_the_embedding():
    tied, untied = make(tie_embeddings=True), make(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert count_parameters(untied) - count_parameters(tied) == 31 * 24
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_weights_depend_on_the_seed_alone():
    def weights(seed: int, **options) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(Decoder(ModelConfig(**SMALL | options)).state_dict().values())

    first = weights(5)
    assert all(map(torch.equal, first, weights(5)))
    assert all(
        map(
            torch.equal,
            first,
            weights(
                5,
                attention_dropout=0.1,
                residual_dropout=0.1,
                gradient_checkpointing=True,
                sliding_window=3,
            ),
        )
    )
    assert not torch.equal(first[0], weights(6)[0])


BIG = {
    "vocab_size": 300,
    "max_seq_len": 200,
    "n_layers": 1,
    "d_model": 120,
    "n_heads": 6,
    "n_kv_heads": 2,
    "d_ff": 200,
    "bias": "all",
}
CUT = 0.98658  # std of a standard normal cut at 3: sqrt(1 - 6 phi(3) / (2 Phi(3) - 1))


def test_normal_initialization_is_std_002_everywhere():
    """GPT-2: N(0, 0.02²) for matrices and embeddings; norms 1; biases 0.

    Not cut: of 36,000 numbers about 97 are beyond 3 std.
    """
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(
            **BIG,
            position="learned",
            norm="layernorm",
            tie_embeddings=False,
            moe=MoEConfig(n_experts=3),
        )
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            assert weight.eq(0).all(), name
        elif "norm" in name:
            assert weight.eq(1).all(), name
        elif "router" not in name:
            assert weight.std().item() == pytest.approx(0.02, rel=0.03), name
            assert weight.abs().max() > 3 * 0.02, name


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4)], ids=["dense", "experts"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_truncated_initialization_is_sqrt_2_over_in_plus_out_cut_at_3_std(tied, moe):
    """Each by its own size, although queries, keys and values are one matrix, and gate and value another.

    120 in, 120 out: queries, output. 120 in, 2 x 20 out: keys, values. 120 in, 200 out: gate, value; back: down.
    An embedding is N(0, 1); if tied it is also the head, and 1/sqrt(120) keeps normalized logits near 1.
    """
    torch.manual_seed(0)
    model = Decoder(
        ModelConfig(**BIG, init="trunc_normal", position="learned", tie_embeddings=tied, moe=moe)
    )
    block = model.blocks[0]
    query, key, value = block.attention.qkv.weight.split((120, 40, 40))
    up, down = (
        (block.ffn.up, block.ffn.down) if moe else (block.ffn.up.weight, block.ffn.down.weight)
    )
    gate, gated = up.chunk(2, dim=-2)
    embedding_std = 120**-0.5 if tied else 1.0
    expected = [
        (query, math.sqrt(2 / 240)),
        (key, math.sqrt(2 / 160)),
        (value, math.sqrt(2 / 160)),
        (block.attention.out.weight, math.sqrt(2 / 240)),
        (gate, math.sqrt(2 / 320)),
        (gated, math.sqrt(2 / 320)),
        (down, math.sqrt(2 / 320)),
        (model.embedding.weight, embedding_std),
        (model.positions.weight, embedding_std),
        (model.head.weight, embedding_std if tied else math.sqrt(2 / 420)),
    ]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(CUT * std, rel=0.03)
        assert 2.7 * std < weight.abs().max() <= 3 * std
    assert block.attention.qkv.bias.eq(0).all()
    assert block.attention_norm.weight.eq(1).all()


@pytest.mark.parametrize("moe", [None, MoEConfig(n_experts=4)], ids=["dense", "experts"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_blocks_add_nothing_at_first_with_zero_outputs(tied, moe):
    """The stream is the embedding; layers are N(0, 1/120), and an untied head is N(0, 0.001²)."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**BIG, init="zero_outputs", tie_embeddings=tied, moe=moe))
    ids = some_ids(batch=1)
    assert_same(model.features(ids).hidden, model.norm(model.embedding(ids)))
    block = model.blocks[0]
    up = block.ffn.up if moe else block.ffn.up.weight
    stds = [
        (block.attention.qkv.weight, 120**-0.5),
        (up, 120**-0.5),
        (model.embedding.weight, 0.02 if tied else 1.0),
        (model.head.weight, 0.02 if tied else 0.001),
    ]
    for weight, std in stds:
        assert weight.std().item() == pytest.approx(std, rel=0.03)


@EACH
@pytest.mark.parametrize("init", ["normal", "trunc_normal", "zero_outputs"])
def test_first_logits_are_finite_and_nearly_uniform(init, options):
    """The cross entropy of new weights is near ln V = 3.43, within what random logits add."""
    if init == "zero_outputs" and options.get("norm_placement") in ("output", "sandwich"):
        pytest.skip("refused by a rule of the config")
    torch.manual_seed(0)
    model, ids = Decoder(ModelConfig(**SMALL | options | {"init": init})), some_ids(batch=8)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    if init != "trunc_normal":
        assert loss == pytest.approx(math.log(31), abs=0.05)
    elif (
        options.get("norm_placement") != "none"
    ):  # without norms, embeddings of std 1 meet squared activations
        assert math.log(31) - 0.5 < loss < math.log(31) + 2.5


# --- sizes ----------------------------------------------------------------------------------------


def parameters(**options) -> int:
    with torch.device("meta"):
        return count_parameters(Decoder(ModelConfig(**options)))


def test_gpt2_small_has_124439808_parameters():
    """The from-scratch course project S4 prints this number under its GPT-2 style model.

    It is the number of GPT-2 small: learned positions, LayerNorm, biases, GELU, tied head:
        embeddings 50257 · 768 + 1024 · 768 = 39,383,808
        a layer    (768 · 2304 + 2304) + (768 · 768 + 768) + (768 · 3072 + 3072) + (3072 · 768 +
        768) + 2 · 2 · 768 = 7,087,872
        all        39,383,808 + 12 · 7,087,872 + 2 · 768 = 124,439,808
    """
    gpt2 = {
        "vocab_size": 50257,
        "max_seq_len": 1024,
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "d_ff": 3072,
    }
    assert (
        parameters(
            **gpt2,
            position="learned",
            norm="layernorm",
            ffn="gelu",
            bias="all",
            tie_embeddings=True,
        )
        == 124_439_808
    )


def test_the_gpt2_style_code_that_s4_lists_has_162148608_parameters():
    """The code above that number builds another model: no positions, RMSNorm, no biases, SiLU, untied.

    2 · 50257 · 768 + 12 · (4 · 768² + 2 · 768 · 3072 + 2 · 768) + 768 = 162,148,608
    """
    listed = {
        "vocab_size": 50257,
        "max_seq_len": 1024,
        "n_layers": 12,
        "d_model": 768,
        "n_heads": 12,
        "d_ff": 3072,
    }
    assert (
        parameters(
            **listed, position="none", norm="rmsnorm", ffn="silu", bias="none", tie_embeddings=False
        )
        == 162_148_608
    )


def test_the_modern_configuration_of_s4_has_6738415616_parameters():
    """The shape of Llama 2 7B; S4 prints the count and does not state it.

        2 · 32000 · 4096 + 32 · (4 · 4096² + 3 · 4096 · 11008 + 2 · 4096) + 4096 = 6,738,415,616
    Built on the meta device, which holds shapes and no numbers.
    """
    modern = {
        "vocab_size": 32000,
        "max_seq_len": 2048,
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "d_ff": 11008,
    }
    assert (
        parameters(**modern, rope_theta=10000.0, ffn="swiglu", tie_embeddings=False)
        == 6_738_415_616
    )


@EACH
@pytest.mark.parametrize("init", ["normal", "trunc_normal"])
def test_every_option_can_be_built_without_memory(init, options):
    with torch.device("meta"):
        model = Decoder(ModelConfig(**SMALL | options | {"init": init}))
    assert {weight.device.type for weight in model.state_dict().values()} == {"meta"}
    assert count_parameters(model) == count_parameters(make(**options))


def test_flops_of_a_token():
    """6 per weight of a product, 12 · L · H · K · S for attention; an embedding is looked up, a tied head multiplies.

    A layer: qkv 24 · 3 · 24 = 1728, out 576, gate and value 24 · 40 = 960, down 480: 3744.
    Head 31 · 24 = 744. At S = 10:
    6 · (2 · 3744 + 744) + 12 · 2 · 4 · 6 · 10 = 49,392 + 5,760 = 55,152.
    """
    assert flops_per_token(make(), 10) == 55_152
    assert flops_per_token(make(tie_embeddings=False), 10) == 55_152


def test_flops_count_visited_experts_and_seen_positions():
    """2 of 3 experts: 1440 · 2 = 2880 and a router of 72 per layer, not 1440. Window 4 and 3 sinks: S = 7."""
    experts = 6 * (2 * (1728 + 576 + 2880 + 72) + 744) + 12 * 2 * 4 * 6 * 10
    assert flops_per_token(make(moe=MoEConfig(n_experts=3, top_k=2)), 10) == experts
    assert flops_per_token(make(sliding_window=4, n_sinks=3), 10) == 49_392 + 12 * 2 * 4 * 6 * 7
    assert flops_per_token(make(**MIXED), 10) == 49_392 + 12 * 4 * 6 * (4 + 10)


def test_a_decoder_without_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        Decoder(ModelConfig())


# --- precision and compilation --------------------------------------------------------------------


@pytest.fixture
def attention_dtypes(monkeypatch) -> list[torch.dtype]:
    """The dtypes of queries, keys, values and mask that reach the attention kernel."""
    seen: list[torch.dtype] = []
    kernel = F.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **options):
        seen.extend((q.dtype, k.dtype, v.dtype))
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            seen.append(attn_mask.dtype)
        return kernel(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return seen


@COMBINED
@torch.no_grad()
def test_bf16_autocast_reaches_attention_with_and_without_a_cache(options, attention_dtypes):
    """Norms and rotations are in fp32; attention must not be: slow, and with mixed dtypes an error."""
    model, ids = make(**options), some_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(ids)
        pieces = cached_logits(model, ids, [7], chunk=7, dtype=torch.bfloat16)
    assert set(attention_dtypes) == {torch.bfloat16}
    assert torch.isfinite(whole).all()
    assert torch.isfinite(pieces).all()


@pytest.mark.parametrize(
    "options", [options for options in single_options() if "moe" not in options], ids=label
)
@torch.no_grad()
def test_bf16_weights_give_nearly_the_logits_of_fp32(options):
    """8 bits are 0.4% per operation. Without experts: rounding may send a token to another one."""
    model, ids = make(spread=0.1, **options), some_ids()
    expected = model(ids)
    model.to(torch.bfloat16)
    for actual in (model(ids), cached_logits(model, ids, [7], chunk=7)):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    "options",
    [{}, {"init": "trunc_normal", "n_kv_heads": 2, "moe": MoEConfig(n_experts=3)}],
    ids=label,
)
def test_bf16_autocast_trains(options):
    model = make(**options).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = model.features(some_ids())
        loss = model.head(features.hidden).float().square().mean() + features.balance_loss
    loss.backward()
    assert all(
        weight.grad.isfinite().all() and weight.grad.dtype == torch.float32
        for weight in model.parameters()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("inductor", {}),
        ("aot_eager", {"sliding_window": 4, "n_sinks": 2, "position": "alibi"}),
        ("aot_eager", {"moe": MoEConfig(n_experts=3)}),
    ],
    ids=["generated", "traced", "traced experts"],
)
def test_compiled_features_equal_eager_ones(backend, options):
    """Forward and gradients; graph breaks (the experts' counts) are allowed. Generating code is what takes long."""
    torch._dynamo.reset()
    plain, compiled = make(n_layers=1, **options), make(n_layers=1, **options)
    compiled.features = torch.compile(compiled.features, backend=backend)
    assert_same(
        compiled.features(some_ids()).hidden.detach(), plain.features(some_ids()).hidden.detach()
    )
    expected = gradients(plain, some_ids())
    for name, gradient in gradients(compiled, some_ids()).items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item()
        )
