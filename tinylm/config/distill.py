"""Settings of distillation: the section `distill`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tinylm.config.rules import Count, Number, PathName, Rule, Section, Switch

DISTILL = (
    Rule(
        ("cached", "own_samples"),
        lambda distill: distill.cached and distill.own_samples > 0,
        "cannot be combined with own_samples, which are other texts in every step",
        "Set cached=false, or own_samples=0",
    ),
    Rule(
        ("max_new_tokens", "own_samples"),
        lambda distill: distill.max_new_tokens is not None and not distill.own_samples,
        "only valid with own_samples, which is 0",
        "Set own_samples, or remove it",
    ),
)


class DistillConfig(Section):
    """Distillation: the model learns the whole distribution of a teacher at every target, beside
    the target itself (Hinton et al. 2015).
    """

    rules: ClassVar = DISTILL

    teacher: PathName
    """a checkpoint, hf:NAME or hf:FOLDER, with the tokenizer of the model that is trained"""
    weight: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """share of the divergence from the teacher in the loss; the rest is the cross entropy of the target"""
    temperature: Annotated[Number, Field(gt=0, le=100)] = 1.0
    """the logits of both models are divided by it in the divergence, which is multiplied by its square"""
    kl: Literal["forward", "reverse"] = "forward"
    """forward: cover all that the teacher says; reverse: say only what it says (Gu et al. 2023, MiniLLM)"""
    top_k: Count | None = None
    """compare the k classes that the teacher finds most probable, and all others as one; null: every class"""
    cached: Switch = False
    """compute the teacher's probabilities of all targets once, in data.cache_dir, and train without the teacher"""
    own_samples: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """share of micro-batches whose answers the student samples, in place of the rows' (Agarwal et al. 2024, GKD)"""
    max_new_tokens: Annotated[Count, Field(le=1_000_000)] | None = None
    """own_samples: maximum tokens of an answer; null: up to training.seq_len with its prompt"""
