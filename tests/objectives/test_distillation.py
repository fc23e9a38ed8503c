"""The loss of distillation, worked by hand, by plain torch and by trl."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinylm.config.finetuning import DistillConfig
from tinylm.model.decoder import Head
from tinylm.objectives import cross_entropy as losses
from tinylm.objectives.distillation import (
    TeacherFeatures,
    distillation_loss,
    teacher_scores,
)
from tinylm.tokens.packing import IGNORE_INDEX


def head_of(weight: torch.Tensor) -> Head:
    """An output layer with this matrix."""
    head = Head(weight.size(1), weight.size(0), bias=False)
    head.weight = torch.nn.Parameter(weight)
    return head


def loss_of_logits(student: list[float], teacher: list[float], label: int, **settings: object):
    """The loss of one token whose logits are given: the heads are unit matrices."""
    unit = head_of(torch.eye(len(student)))
    distill = DistillConfig(teacher="t", **settings)
    hidden, theirs = torch.tensor([student]), torch.tensor([teacher])
    teacher = TeacherFeatures(theirs, unit)
    return distillation_loss(hidden, unit, teacher, torch.tensor([label]), distill)


def test_the_loss_of_one_token_worked_by_hand() -> None:
    """Student 1/2, 1/2; teacher 3/4, 1/4, so logits 0, 0 and ln 3, 0; the target is class 1.

    Cross entropy ln 2. Forward KL: 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812. Reverse: 1/2 ln(2/3) +
    1/2 ln 2 = 0.143841. At temperature 2 the teacher is √3 to 1: q = 0.633975, and
    Σ q ln(q / (1/2)) = 0.036339, times 4.
    """
    student, teacher = [0.0, 0.0], [math.log(3), 0.0]
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = loss_of_logits(student, teacher, 1, weight=0.25)
    assert found.kl.item() == pytest.approx(forward, rel=1e-6)
    assert found.cross_entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    assert found.loss.item() == pytest.approx(0.75 * math.log(2) + 0.25 * forward, rel=1e-6)
    found = loss_of_logits(student, teacher, 1, weight=1.0, kl="reverse")
    assert found.loss.item() == pytest.approx(reverse, rel=1e-6)
    q = math.sqrt(3) / (1 + math.sqrt(3))
    warm = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    found = loss_of_logits(student, teacher, 1, weight=1.0, temperature=2.0)
    assert found.loss.item() == pytest.approx(4 * warm, rel=1e-5)


def test_a_student_that_is_its_teacher_diverges_by_nothing() -> None:
    for kl in ("forward", "reverse"):
        found = loss_of_logits([0.3, -2.0, 1.0], [0.3, -2.0, 1.0], 2, kl=kl, temperature=3.0)
        assert found.kl.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_loss_and_gradients_in_chunks_are_those_of_all_logits(
    kl: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against torch's kl_div and cross_entropy over whole logits in fp64; 12 of 17 tokens are
    targets, in chunks of 5; the teacher is wider than the student.
    """
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 5)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(17, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = head_of(torch.randn(11, 6, generator=generator, dtype=torch.float64))
    theirs = torch.randn(17, 9, generator=generator, dtype=torch.float64)
    teacher = head_of(torch.randn(11, 9, generator=generator, dtype=torch.float64))
    head.softcap = softcap
    labels = torch.randint(11, (17,), generator=generator)
    labels[3:8] = IGNORE_INDEX
    distill = DistillConfig(teacher="t", weight=0.3, temperature=2.0, kl=kl)
    found = distillation_loss(hidden, head, TeacherFeatures(theirs, teacher), labels, distill)
    logits = hidden @ head.weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    is_target = labels != IGNORE_INDEX
    log_p = F.log_softmax(logits[is_target] / 2, dim=-1)
    log_q = F.log_softmax((theirs @ teacher.weight.T)[is_target] / 2, dim=-1).detach()
    ours, target = (log_p, log_q) if kl == "forward" else (log_q, log_p)
    divergence = F.kl_div(ours, target, reduction="sum", log_target=True)
    plain = F.cross_entropy(logits[is_target], labels[is_target], reduction="sum")
    expected = 0.7 * plain + 0.3 * 4 * divergence
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    inputs = (hidden, head.weight)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, inputs),
        torch.autograd.grad(expected, inputs),
        rtol=1e-9,
        atol=1e-12,
    )


def test_the_most_probable_classes_and_the_rest_worked_by_hand() -> None:
    """Teacher 1/2, 1/4, 1/8, 1/8, student 1/4 each, top 1: (1/2, 1/2) against (1/4, 3/4). With as many
    classes as there are, it is the whole divergence.
    """
    teacher = [math.log(q) for q in (0.5, 0.25, 0.125, 0.125)]
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    found = loss_of_logits([0.0] * 4, teacher, 3, top_k=1)
    assert found.kl.item() == pytest.approx(forward, rel=1e-6)
    found = loss_of_logits([0.0] * 4, teacher, 3, top_k=1, kl="reverse")
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.kl.item() == pytest.approx(reverse, rel=1e-6)
    for k in (4, 9):
        found = loss_of_logits([0.0] * 4, teacher, 3, top_k=k)
        assert found.kl.item() == loss_of_logits([0.0] * 4, teacher, 3).kl.item()


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_scores_of_targets_give_the_loss_of_features(
    kl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradient are equal up to rounding, in chunks of 4 of 9 targets; the divergence of
    the most probable classes and the rest grows with their number up to the whole one.
    """
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    generator = torch.Generator().manual_seed(0)
    hidden, theirs = (torch.randn(12, n, generator=generator).double() for n in (6, 9))
    hidden.requires_grad_()
    head, teacher = (head_of(torch.randn(11, n, generator=generator).double()) for n in (6, 9))
    labels = torch.randint(11, (12,), generator=generator)
    labels[2:5] = IGNORE_INDEX
    divergences = []
    for k in (1, 3, 10, None):
        distill = DistillConfig(teacher="t", temperature=1.5, kl=kl, top_k=k)
        features = TeacherFeatures(theirs, teacher)
        scores = teacher_scores(theirs[labels != IGNORE_INDEX], teacher, distill)
        assert scores.log_probs.shape == (9, k or 11)
        one, other = (
            distillation_loss(hidden, head, found, labels, distill) for found in (features, scores)
        )
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-6, atol=0)
        [grad], [other_grad] = (torch.autograd.grad(x.loss, hidden) for x in (one, other))
        torch.testing.assert_close(grad, other_grad, rtol=1e-5, atol=1e-6)
        divergences.append(one.kl.item())
    assert divergences == sorted(divergences)
    assert divergences[2] == pytest.approx(divergences[3], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kl", "beta"), [("forward", 0.0), ("reverse", 1.0)])
def test_the_divergence_is_that_of_trl(
    kl: str, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GKDTrainer.generalized_jsd_loss at its two ends, per target; trl does not multiply by the
    square of the temperature.
    """
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(1)
    logits, theirs = (torch.randn(6, 5, generator=generator) for _ in range(2))
    labels = torch.tensor([1, IGNORE_INDEX, 0, 4, 4, IGNORE_INDEX])
    expected = GKDTrainer.generalized_jsd_loss(
        logits[None], theirs[None], labels[None], beta=beta, temperature=1.5
    )
    unit = head_of(torch.eye(5))
    distill = DistillConfig(teacher="t", temperature=1.5, kl=kl)
    found = distillation_loss(logits, unit, TeacherFeatures(theirs, unit), labels, distill)
    torch.testing.assert_close(found.kl / 4, expected, rtol=1e-5, atol=1e-6)
