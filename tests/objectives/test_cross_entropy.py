"""The chunked loss against torch's over all logits: values, gradients, smoothing, ignored labels, bf16."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tinylm.objectives import cross_entropy as losses
from tinylm.objectives.cross_entropy import cross_entropy, score_targets
from tinylm.tokens.packing import IGNORE_INDEX


def example(
    n: int = 37,
    width: int = 8,
    vocab: int = 29,
    *,
    ignored: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and a head that require gradients, and labels, a fraction of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, weight, labels


def oracle(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """torch's cross entropy over all logits."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        labels,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 tokens, so that the tiny examples have several and a shorter last one."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_value_and_gradients_are_those_of_the_full_logits(
    smoothing: float, ignored: float, softcap: float | None, small_chunks: None
) -> None:
    """In fp64, where they differ only by the order of sums; scaled by 0.7, which the backward pass must apply."""
    hidden, weight, labels = example(ignored=ignored, dtype=torch.float64)
    expected = oracle(hidden, weight, labels, smoothing, softcap)
    expected_grads = torch.autograd.grad(0.7 * expected, (hidden, weight))
    actual = cross_entropy(hidden, weight, labels, label_smoothing=smoothing, softcap=softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(0.7 * actual, (hidden, weight)), expected_grads, rtol=1e-12, atol=1e-13
    )


def test_gradients_are_the_slopes_of_the_value(small_chunks: None) -> None:
    """Central differences in fp64 along random directions: independent of any other implementation."""
    hidden, weight, labels = example(dtype=torch.float64)
    cross_entropy(hidden, weight, labels, label_smoothing=0.1).backward()
    for tensor in (hidden, weight):
        direction, h = torch.randn_like(tensor), 1e-5
        ahead, behind = (
            cross_entropy(
                *(t + shift * direction if t is tensor else t for t in (hidden, weight)),
                labels,
                label_smoothing=0.1,
            ).item()
            for shift in (h, -h)
        )
        assert (ahead - behind) / (2 * h) == pytest.approx(
            (tensor.grad * direction).sum().item(), rel=1e-7
        )


def test_smoothing_mixes_the_label_with_the_uniform_distribution() -> None:
    """By hand: one token, logits ln 1, ln 2, ln 5, so p = 1/8, 2/8, 5/8; label 2, e = 0.3.

    The target is 0.1, 0.1, 0.7 + 0.1 and the loss its cross entropy with p.
    """
    hidden, weight = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [5.0]]).log()
    expected = -(0.1 * math.log(1 / 8) + 0.1 * math.log(2 / 8) + 0.8 * math.log(5 / 8))
    assert cross_entropy(
        hidden, weight, torch.tensor([2]), label_smoothing=0.3
    ).item() == pytest.approx(expected, rel=1e-6)


def test_equal_logits_cost_log_vocabulary() -> None:
    """With a head of zeros a token costs ln V, with or without smoothing."""
    hidden, _, labels = example(ignored=0.0)
    for smoothing in (0.0, 0.5):
        loss = cross_entropy(hidden, torch.zeros(29, 8), labels, label_smoothing=smoothing)
        assert loss.item() == pytest.approx(37 * math.log(29), rel=1e-6)


@hypothesis_settings(max_examples=30)
@given(
    chunk=st.integers(1, 50),
    n=st.integers(0, 40),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_chunk_borders_do_not_show(chunk: int, n: int, ignored: float, seed: int) -> None:
    """The same loss and gradients for any chunk size, down to no tokens at all."""
    hidden, weight, labels = example(n, ignored=ignored, dtype=torch.float64, seed=seed)
    whole = cross_entropy(hidden, weight, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_TOKENS", chunk)
        parts = cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(parts, (hidden, weight)),
        torch.autograd.grad(whole, (hidden, weight)),
        rtol=1e-11,
        atol=1e-12,
    )


def test_sums_of_parts_add_up_and_the_sum_is_the_mean_times_the_targets() -> None:
    """What gradient accumulation relies on, with micro-batches of unequal numbers of targets."""
    hidden, weight, labels = example()
    labels[:10] = IGNORE_INDEX
    whole = cross_entropy(hidden, weight, labels)
    parts = sum(
        cross_entropy(hidden[rows], weight, labels[rows]) for rows in (slice(0, 12), slice(12, 37))
    )
    mean = F.cross_entropy(hidden @ weight.T, labels)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(mean * (labels != IGNORE_INDEX).sum(), whole)


def test_no_target_at_all_is_zero_and_not_nan() -> None:
    """torch's mean over nothing is NaN; a sum over nothing is 0, and so are its gradients."""
    hidden, weight, labels = example(ignored=1.0)
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_ignored_tokens_never_reach_the_head() -> None:
    """Garbage under an ignored label changes nothing: NaN there would otherwise spread, as 0 * NaN is NaN."""
    hidden, weight, labels = example(dtype=torch.float64)
    expected = cross_entropy(hidden, weight, labels).item()
    with torch.no_grad():
        hidden[labels == IGNORE_INDEX] = math.nan
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert loss.item() == expected
    assert not hidden.grad[labels == IGNORE_INDEX].any()
    assert weight.grad.isfinite().all()


def test_an_improbable_label_costs_its_logit_and_not_infinity() -> None:
    """exp(-1000) is 0 in fp32, but log p is about -1000: the log is never taken of a probability."""
    hidden, weight = torch.tensor([[1000.0]]), torch.tensor([[0.0], [1.0]])
    assert cross_entropy(hidden, weight, torch.tensor([0])).item() == 1000


def test_a_number_that_is_not_finite_shows_in_the_loss() -> None:
    """Faults D1 and D2: nothing here may hide it from the guard."""
    hidden, weight, labels = example(ignored=0.0)
    with torch.no_grad():
        hidden[20, 0] = math.nan
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert math.isnan(loss.item())
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("wants", ["hidden", "weight"])
def test_only_wanted_gradients_are_computed(wants: str) -> None:
    """A frozen head, or features that need none: the other gradient is right and nothing fails."""
    hidden, weight, labels = example(dtype=torch.float64)
    expected = torch.autograd.grad(
        oracle(hidden, weight, labels), hidden if wants == "hidden" else weight
    )[0]
    (weight if wants == "hidden" else hidden).requires_grad_(False)
    cross_entropy(hidden, weight, labels).backward()
    torch.testing.assert_close((hidden if wants == "hidden" else weight).grad, expected)
    assert (weight if wants == "hidden" else hidden).grad is None


def test_validation_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under no_grad, and if no tensor requires one: the same value, and the gradient is never computed."""
    hidden, weight, labels = example()
    expected = cross_entropy(hidden, weight, labels).item()

    def forbidden(*_: object) -> Tensor:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(Tensor, "exp_", forbidden)  # p, the first step of the gradient
    with torch.no_grad():
        loss = cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad
    assert loss.item() == expected
    assert cross_entropy(hidden.detach(), weight.detach(), labels).item() == expected
    with pytest.raises(AssertionError, match="a gradient was computed"):
        cross_entropy(hidden, weight, labels)


def test_second_backward_is_an_error_and_not_a_wrong_number() -> None:
    """The gradients are scaled in place, so a second pass would scale them twice."""
    hidden, weight, labels = example()
    loss = 2 * cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_head_gets_both_its_gradients() -> None:
    """One matrix embeds and scores: the gradient is the sum of the two uses, as the full logits give it."""
    _, weight, labels = example(ignored=0.0, dtype=torch.float64)
    ids = labels.roll(1)
    expected = torch.autograd.grad(oracle(F.embedding(ids, weight).tanh(), weight, labels), weight)
    actual = torch.autograd.grad(
        cross_entropy(F.embedding(ids, weight).tanh(), weight, labels), weight
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bf16_and_keeps_the_rest_in_fp32(
    hidden_dtype: torch.dtype, small_chunks: None
) -> None:
    """At most twice as far from the exact value as torch's own autocast; gradients in their tensors' dtypes."""
    hidden, weight, labels = example(200, 64, 300)
    exact = oracle(hidden, weight, labels)
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        torchs, ours = oracle(hidden, weight, labels), cross_entropy(hidden, weight, labels)
    torchs_grads = torch.autograd.grad(torchs, (hidden, weight))
    ours_grads = torch.autograd.grad(ours, (hidden, weight))
    assert ours.dtype == torch.float32
    assert [grad.dtype for grad in ours_grads] == [hidden_dtype, torch.float32]
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)
    for ours_grad, torchs_grad, exact_grad in zip(
        ours_grads, torchs_grads, exact_grads, strict=True
    ):
        assert (
            0 < (ours_grad - exact_grad).norm() < 2 * (torchs_grad - exact_grad).norm()
        )  # 0: it was not in bf16


@pytest.mark.slow
def test_gradient_of_the_head_is_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """4096 equal gradients, one per chunk: a bf16 sum would stop growing when a summand is 1/256 of it.

    Hidden 1, two classes with equal logits, label 0: each token's gradient for the head's rows is p
    - target = -1/2, 1/2.
    """
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 1)
    weight = torch.zeros(2, 1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(torch.ones(4096, 1), weight, torch.zeros(4096, dtype=torch.long)).backward()
    assert weight.grad.tolist() == [[-2048.0], [2048.0]]


def test_weights_in_bf16_get_gradients_in_bf16() -> None:
    """A model that is bf16 through and through: the loss is fp32 still."""
    hidden, weight, labels = example(dtype=torch.bfloat16)
    loss = cross_entropy(hidden, weight, labels)
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, weight.grad.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    )
    assert loss.item() == pytest.approx(
        oracle(hidden.float(), weight.float(), labels).item(), rel=1e-2
    )


def test_all_logits_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of either pass has more elements than a chunk's logits: 5 * 29, where all logits are 37 * 29."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    hidden, weight, labels = example(ignored=0.0, width=2)
    with Largest() as full:
        oracle(hidden, weight, labels).backward()
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)
    with Largest() as chunked:
        cross_entropy(hidden, weight, labels).backward()
    assert full.elements == 37 * 29
    assert chunked.elements == 5 * 29


def test_a_label_outside_the_vocabulary_is_an_error() -> None:
    """-1 or V is a mistake of the caller, not the last class or an ignored one."""
    hidden, weight, labels = example()
    for wrong in (-1, 29):
        with pytest.raises(RuntimeError, match="out of bounds"):
            cross_entropy(hidden, weight, labels.fill_(wrong))


@pytest.mark.parametrize("n_tokens", [5, 1500])
def test_score_targets_is_the_same_loss_and_counts_the_hits_of_argmax(n_tokens):
    """Bit for bit the training loss; hits are torch's argmax over all logits; masked tokens do not count."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n_tokens, 16), torch.randn(50, 16)
    labels = torch.where(
        torch.rand(n_tokens) < 0.4,
        (hidden @ weight.T).argmax(dim=-1),
        torch.randint(50, (n_tokens,)),
    )
    labels[::3] = IGNORE_INDEX
    loss, n_right = score_targets(hidden, weight, labels)
    assert torch.equal(loss, cross_entropy(hidden, weight, labels))
    assert n_right == ((hidden @ weight.T).argmax(dim=-1) == labels).sum() > 0
    assert score_targets(hidden, weight, torch.full((n_tokens,), IGNORE_INDEX)) == (0, 0)
