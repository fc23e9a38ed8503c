"""The verifier: attention to both sides but not to padding, initialization from a decoder, loss and scores."""

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import AttentionContext, Decoder
from tinylm.model.verifier import NextTokenVerifier, Verifier
from tinylm.objectives.verifier import (
    VerifierScore,
    area_under_curve,
    calibration_error,
    logit_counts,
    verifier_loss,
)
from tinylm.rows.numbers import NUMBER, corrupt_number

TINY = {"vocab_size": 19, "n_layers": 2, "d_model": 16, "n_heads": 2, "max_seq_len": 10}
SHAPES = [
    {},
    {"position": "learned"},
    {"position": "none"},
    {"n_kv_heads": 1},
    {"n_sinks": 2},
    {"norm_placement": "post"},
    {"qk_norm": True, "bias": "all"},
]


def make(**options) -> Verifier:
    torch.manual_seed(0)
    return Verifier(ModelConfig(**(TINY | options))).eval()


@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_every_token_counts_on_both_sides_and_padding_nowhere(options):
    """A changed token, first or last, changes the logit; a changed padding token, or more padding, does not."""
    model = make(**options)
    ids = torch.tensor([[3, 4, 5, 6, 0, 0]])
    mask = torch.tensor([[True] * 4 + [False] * 2])
    logit = model(ids, mask)
    for place, differs in ((0, True), (3, True), (4, False)):
        changed = ids.clone()
        changed[0, place] = 7
        assert bool((model(changed, mask) - logit).abs() > 1e-6) == differs
    torch.testing.assert_close(model(ids[:, :4], mask[:, :4]), logit)


def test_a_batch_gives_what_each_pair_gives_alone():
    model = make()
    ids, mask = torch.randint(19, (3, 8)), torch.arange(8) < torch.tensor([8, 5, 1])[:, None]
    alone = torch.cat(
        [
            model(row[None, : keep.sum()], keep[None, : keep.sum()])
            for row, keep in zip(ids, mask, strict=True)
        ]
    )
    torch.testing.assert_close(model(ids, mask), alone)


def test_it_is_initialized_from_a_decoder():
    """Afterwards blocks, embedding and last norm are the decoder's; the error head is unchanged."""
    decoder, model = Decoder(ModelConfig(**TINY)), make()
    own = model.suspicion.weight.clone()
    model.init_from_decoder(decoder)
    torch.testing.assert_close(model.suspicion.weight, own, rtol=0, atol=0)
    theirs = decoder.state_dict()
    shared = [name for name in model.state_dict() if not name.startswith("suspicion")]
    assert shared and all(torch.equal(model.state_dict()[name], theirs[name]) for name in shared)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"position": "alibi"}, "model.position: alibi is not supported with a verifier"),
        ({"sliding_window": 4}, "model.sliding_window: not supported with a verifier"),
        ({"input_scalars": True}, "model.input_scalars: not supported with a verifier"),
        ({"bigram_rows": 9}, "model.bigram_rows: not supported with a verifier"),
        ({"scale_embeddings": True}, "model.scale_embeddings: not supported with a verifier"),
        ({"moe": {}}, "model.moe: not supported with a verifier. Remove it."),
    ],
)
def test_settings_that_only_a_decoder_can_have_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_the_odds_of_being_wrong_are_the_sum_of_the_tokens():
    """The logit is minus the log of that sum; with a head of zeros right and wrong are equally likely at any length."""
    model = make()
    ids, mask = torch.randint(19, (2, 8)), torch.arange(8) < torch.tensor([8, 3])[:, None]
    logits = model.error_logits(ids, mask)
    assert logits.shape == (2, 8) and bool((logits[1, 3:] == -torch.inf).all())
    torch.testing.assert_close(model(ids, mask), -logits.exp().sum(dim=1).log())
    with torch.no_grad():
        model.suspicion.weight.zero_()
    torch.testing.assert_close(model(ids, mask), torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n_sinks", [0, 2])
def test_a_token_does_not_see_itself(n_sinks):
    """A token attends to all real tokens but itself; a token that is alone sees itself."""
    model = make(n_sinks=n_sinks, position="none")
    block = model.blocks[0]
    seen = model._attention_mask(
        torch.tensor([[True, True, True, False], [True, False, False, False]])
    )
    assert seen[0, 0, :, n_sinks:].tolist() == [
        [False, True, True, False],
        [True, False, True, False],
        [True, True, False, False],
        [True, True, True, False],
    ]
    assert seen[1, 0, 0, n_sinks:].tolist() == [True, False, False, False] and bool(
        seen[..., :n_sinks].all()
    )
    assert torch.isfinite(model(torch.tensor([[5]]), torch.tensor([[True]]))).all()
    assert block.attention.n_sinks == n_sinks


@pytest.mark.parametrize(
    "options",
    [{}, {"n_kv_heads": 1}, {"head_dim": 4, "n_heads": 4, "n_kv_heads": 2}, {"bias": "all"}],
    ids=str,
)
def test_equal_tokens_find_each_other_before_training(options):
    """Queries start as keys in block 0: in every head, a repeated token attends most to its other occurrence."""
    model = make(init="trunc_normal", position="none", d_model=64, **options)
    x = model.blocks[0].attention_norm(model.embedding(torch.tensor([[3, 4, 5, 3, 6]])))
    context = AttentionContext(
        torch.arange(5),
        None,
        model._attention_mask(torch.ones(1, 5, dtype=torch.bool)),
        is_causal=False,
        cache=None,
    )
    weights = model.blocks[0].attention.weights(x, context)[0]  # (H, T, S)
    assert weights[:, 0].argmax(dim=-1).tolist() == [3] * weights.size(0) and weights[:, 3].argmax(
        dim=-1
    ).tolist() == [0] * weights.size(0)


def test_its_loss_is_the_cross_entropy_of_which_token_is_wrong():
    """By hand, odds 1 and 3, and 1 for no error: a right answer costs ln 5; a wrong one ln 5/3 or ln 5/4.

    ln 5/3 if its error is the second token, ln 5/4 if it is the first or the second.
    """
    error_logits = torch.tensor([[1.0, 3.0, 0.0]]).log()
    for right, error_mask, expected in (
        (1, [0, 0, 0], 5),
        (0, [0, 1, 0], 5 / 3),
        (0, [1, 1, 0], 5 / 4),
    ):
        found = verifier_loss(
            error_logits, torch.tensor([right]), torch.tensor([error_mask]).bool()
        )
        assert found.item() == pytest.approx(np.log(expected), rel=1e-6)


def test_with_all_tokens_in_the_error_mask_the_loss_is_binary_cross_entropy():
    """And the gradients are finite for right and wrong answers in one batch."""
    error_logits = torch.randn(6, 5).requires_grad_()
    right, real = (
        torch.tensor([1, 0, 1, 0, 0, 1]),
        torch.arange(5) < torch.tensor([5, 5, 2, 2, 1, 1])[:, None],
    )
    odds = error_logits.masked_fill(~real, -torch.inf)
    found = verifier_loss(odds, right, real & ~right.bool()[:, None])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        -odds.logsumexp(dim=1), right.float(), reduction="sum"
    )
    torch.testing.assert_close(found, expected)
    found.backward()
    assert torch.isfinite(error_logits.grad).all() and bool((error_logits.grad[~real] == 0).all())


@pytest.mark.slow
@given(st.text(), st.integers(0, 10**6), st.integers(0, 99))
def test_one_number_is_another_and_the_rest_is_untouched(text, number, seed):
    """Between the numbers nothing changes, and of the numbers exactly one does."""
    answer = f"{text} {number:,} apples"
    wrong = corrupt_number(answer, random.Random(seed))
    assert NUMBER.split(answer) == NUMBER.split(wrong)
    before, after = NUMBER.findall(answer), NUMBER.findall(wrong)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    assert corrupt_number(answer, random.Random(seed)) == wrong


def test_a_number_keeps_its_form_and_text_without_one_has_no_wrong_answer():
    wrong = {corrupt_number("$5,234.50", random.Random(seed)) for seed in range(20)}
    assert (
        all(
            NUMBER.fullmatch(answer[1:]) and "," in answer and answer[-3] == "." for answer in wrong
        )
        and len(wrong) > 5
    )
    assert corrupt_number("none", random.Random(0)) is None


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2).filter(
        lambda rows: len({right for _, right in rows}) == 2
    )
)
def test_the_area_under_the_curve_is_that_of_scikit_learn(rows):
    from sklearn.metrics import roc_auc_score  # a second of imports

    scores, right = (np.array(column) for column in zip(*rows, strict=True))
    assert area_under_curve(scores / 5, right) == pytest.approx(roc_auc_score(right, scores))


def test_the_calibration_error_worked_by_hand():
    """Bin 0.9: two pairs of 0.9, one right: |1.8 - 1| = 0.8; bin 0.2: one wrong pair of 0.2. (0.8 + 0.2) / 3."""
    assert calibration_error(
        np.array([0.9, 0.9, 0.2]), np.array([True, False, False])
    ) == pytest.approx(1 / 3)


def test_a_score_shows_the_majority_beside_the_accuracy():
    score = VerifierScore.of(np.array([0.9, 0.8, 0.6, 0.1]), np.array([True, True, False, True]))
    assert (score.n, score.accuracy, score.majority, score.auc) == (
        4,
        0.5,
        0.75,
        pytest.approx(2 / 3),
    )


@pytest.mark.slow
@example([(0.0, False), (0.019999999552965164, True)])
@given(
    st.lists(st.tuples(st.floats(-30, 30, width=32), st.booleans()), min_size=2).filter(
        lambda rows: len({right for _, right in rows}) == 2
    )
)
def test_counted_logits_give_the_score_of_the_logits(rows):
    """Exact up to the width of a bin: a probability changes by at most 0.0025, and none crosses 1/2."""
    logits, right = (
        torch.tensor([logit for logit, _ in rows]),
        torch.tensor([right for _, right in rows]),
    )
    counts = sum(logit_counts(*part) for part in ((logits[:1], right[:1]), (logits[1:], right[1:])))
    found = VerifierScore.of_counts(counts.numpy())
    exact = VerifierScore.of(torch.sigmoid(logits.double()).numpy(), right.numpy())
    # In the logits' own precision: 0.02 in fp32 is a border of bins, and below it in fp64.
    binned = VerifierScore.of((logits / 0.02).floor().clamp(-1000, 999).numpy(), right.numpy())
    assert (found.n, found.accuracy, found.majority) == (
        exact.n,
        (torch.where(logits >= 0, 1, 0) == right).double().mean().item(),
        exact.majority,
    )
    assert found.auc == pytest.approx(binned.auc)


def test_the_interval_of_the_accuracy_is_wilsons():
    """60 of 100 (Wilson 1927): 0.502 to 0.691."""
    right = np.arange(100) < 50
    score = VerifierScore.of(np.where(np.arange(100) < 60, right, ~right).astype(float), right)
    assert score.accuracy == 0.6 and [round(end, 3) for end in score.interval] == [0.502, 0.691]


def make_next_token(**options) -> NextTokenVerifier:
    torch.manual_seed(0)
    return NextTokenVerifier(ModelConfig(**(TINY | options))).eval()


@pytest.mark.parametrize("options", [*SHAPES, {"tie_embeddings": False}], ids=str)
def test_kind_decoder_begins_with_the_odds_of_the_decoders_next_token(options):
    """The oracle is the decoder: log-odds (1 - p) / p of each token after those before it, minus
    log T.
    """
    torch.manual_seed(1)
    decoder, model = Decoder(ModelConfig(**(TINY | options))).eval(), make_next_token(**options)
    model.init_from_decoder(decoder)
    ids = torch.tensor([[3, 4, 5, 6, 0], [7, 3, 3, 9, 2]])
    mask = torch.tensor([[True] * 4 + [False], [True] * 5])
    p = decoder(ids).softmax(dim=-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    expected = ((1 - p) / p).log() - mask.sum(dim=1, keepdim=True).log()
    found = model.error_logits(ids, mask)
    torch.testing.assert_close(found[1, 1:], expected[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0, 1:4], expected[0, :3], atol=1e-4, rtol=1e-4)
    assert found[0, 4] == -torch.inf and bool((found[:, 0] < -20).all())


def test_a_token_of_kind_decoder_sees_nothing_after_it():
    """A changed token changes its own odds and those after it; padding changes nothing."""
    model = make_next_token()
    ids, mask = torch.tensor([[3, 4, 5, 6, 0, 0]]), torch.tensor([[True] * 4 + [False] * 2])
    before = model.error_logits(ids, mask)
    changed = ids.clone()
    changed[0, 2] = 7
    differs = (model.error_logits(changed, mask) - before).abs() > 1e-6
    assert differs[0, :4].tolist() == [False, False, True, True]
    torch.testing.assert_close(model(ids[:, :4], mask[:, :4]), model(ids, mask))


def test_the_error_head_of_kind_decoder_learns_from_the_state_before_a_token():
    """Its gradient is not 0, and a token of probability 1 has finite odds."""
    model = make_next_token()
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.bool)
    error_mask = torch.tensor([[False, False, True, False]])
    verifier_loss(model.error_logits(ids, mask), torch.tensor([0]), error_mask).backward()
    assert bool((model.suspicion.weight.grad != 0).any())
    assert bool((model.head.weight.grad != 0).any())


def test_only_tokens_after_the_separator_can_be_the_error_of_kind_decoder():
    """With separator 9: the tokens after it keep their odds, the problem and the separator have
    none; a row without it is answer alone.
    """
    model = make_next_token()
    ids = torch.tensor([[3, 4, 9, 5, 6, 9], [3, 4, 5, 6, 7, 8]])
    mask = torch.ones(2, 6, dtype=torch.bool)
    everywhere = model.error_logits(ids, mask)
    model.separator_id = 9
    found = model.error_logits(ids, mask)
    torch.testing.assert_close(found[0, 3:], everywhere[0, 3:])
    assert bool((found[0, :3] < -20).all())
    torch.testing.assert_close(found[1], everywhere[1])
