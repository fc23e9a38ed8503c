"""Attention over the last positions and the first tokens, against a plain forward pass over the kept tokens."""

import pytest
import torch

from tinylm.config.schema import ModelConfig
from tinylm.model.attention_sinks import QUERY_BLOCK, with_attention_sinks
from tinylm.model.decoder import Decoder

SMALL = {
    "vocab_size": 30,
    "max_seq_len": 64,
    "n_layers": 1,
    "d_model": 24,
    "n_heads": 4,
    "n_kv_heads": 2,
}


# The window is wider than the texts of these tests.
LAYERS_OF_TWO_KINDS = {
    "sliding_window": 30,
    "full_attention_interval": 2,
    "rope_local_theta": 50.0,
}


def make(**options) -> Decoder:
    """A model whose weights are large enough that attention matters."""
    torch.manual_seed(3)
    model = Decoder(ModelConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.4)
    return model


def some_ids(length: int) -> torch.Tensor:
    return torch.randint(30, (2, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
@pytest.mark.parametrize(("window", "first"), [(5, 0), (5, 3), (1, 2), (20, 4)])
@pytest.mark.parametrize("options", [{}, {"n_sinks": 2}, {"qk_norm": True}])
def test_one_layer_gives_at_each_position_the_logits_of_the_kept_tokens_alone(
    window, first, options
):
    """In one layer a key depends on its own token alone, so a plain forward pass over the kept tokens must agree."""
    model, ids = make(**options), some_ids(40)
    got = with_attention_sinks(model, window=window, n_first=first)(ids)
    for t in range(40):
        kept = list(range(min(first, t + 1))) + list(range(max(first, t - window + 1), t + 1))
        torch.testing.assert_close(got[:, t], model(ids[:, kept])[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_sinks": 2},
        {"norm_placement": "post"},
        {**LAYERS_OF_TWO_KINDS, "query_scalar": 3, "scale_embeddings": True},
    ],
)
def test_nothing_changes_until_a_token_is_dropped(options):
    model, ids = make(n_layers=3, **options), some_ids(20)
    torch.testing.assert_close(
        with_attention_sinks(model, window=17, n_first=3)(ids), model(ids), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_without_first_tokens_it_is_a_sliding_window_across_blocks_too():
    """RoPE depends on distances only, so positions within the kept tokens change nothing."""
    ids = some_ids(QUERY_BLOCK + 30)
    model = make(n_layers=2, max_seq_len=QUERY_BLOCK + 30)
    windowed = Decoder(model.config.model_copy(update={"sliding_window": 7})).eval()
    windowed.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        with_attention_sinks(model, window=7, n_first=0)(ids), windowed(ids), rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("window", [1000, 9])
@pytest.mark.parametrize("n_first", [0, 2])
def test_a_layer_with_a_smaller_window_keeps_it(window, n_first):
    """One layer of window 5: without first tokens it is the model itself; 20 more seen would differ."""
    model, ids = make(sliding_window=5), some_ids(25)
    got = with_attention_sinks(model, window=window, n_first=n_first)(ids)
    expected = with_attention_sinks(make(), window=5, n_first=n_first)(ids)
    torch.testing.assert_close(got, expected)
    if n_first == 0:
        torch.testing.assert_close(got, model(ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_layers_of_two_kinds_keep_their_windows_and_their_rotations():
    """The text is longer than the local window of 5 and shorter than the other: nothing is dropped."""
    mixed = LAYERS_OF_TWO_KINDS | {"sliding_window": 5}
    model, ids = make(n_layers=3, **mixed), some_ids(25)
    streaming = with_attention_sinks(model, window=1000, n_first=0)
    torch.testing.assert_close(streaming(ids), model(ids), rtol=1e-4, atol=1e-4)
    assert [kind.rope_theta for kind in streaming.kinds] == [50.0, 10000.0]


@torch.no_grad()
def test_only_the_first_and_the_last_tokens_matter():
    """One layer, window 4, 2 first: position 20 sees 0, 1 and 17 to 20."""
    model, ids = make(), some_ids(21)
    stream = with_attention_sinks(model, window=4, n_first=2)
    moved = []
    for changed in range(21):
        other = ids.clone()
        other[:, changed] = (other[:, changed] + 1) % 30
        moved.append(bool((stream(other)[:, 20] != stream(ids)[:, 20]).any()))
    assert [t for t in range(21) if moved[t]] == [0, 1, 17, 18, 19, 20]


@torch.no_grad()
def test_it_reads_beyond_max_seq_len_and_does_not_change_the_model():
    model = make()
    stream = with_attention_sinks(model, window=4, n_first=2)
    assert stream(some_ids(100)).shape == (2, 100, 30)
    assert stream.embedding.weight is model.embedding.weight
    with pytest.raises(ValueError, match="100 positions are more than max_seq_len"):
        model(some_ids(100))


def test_other_positions_than_rope_are_an_error():
    with pytest.raises(
        ValueError, match="attention sinks need model.position rope, and this model has alibi"
    ):
        with_attention_sinks(make(position="alibi"), window=4, n_first=0)
