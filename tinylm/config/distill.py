"""Settings of distillation: the section `distill`."""

from typing import Annotated, Literal

from pydantic import Field

from tinylm.config.rules import Count, Number, PathName, Section, Switch


class DistillConfig(Section):
    """Distillation: the model learns the whole distribution of a teacher at every target, beside
    the target itself (Hinton et al. 2015).
    """

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
