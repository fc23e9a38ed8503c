"""Settings of preference optimization: the section `dpo`."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tinylm.config.rules import Number, Rule, Section, Switch

DPO = (
    Rule(
        ("label_smoothing", "loss"),
        lambda dpo: dpo.loss != "sigmoid" and dpo.label_smoothing,
        "only valid for loss sigmoid (loss is {loss})",
        "Remove it, or set dpo.loss=sigmoid",
    ),
    Rule(
        ("length_normalized", "loss"),
        lambda dpo: dpo.loss in ("ipo", "orpo", "simpo") and dpo.length_normalized,
        "not valid for loss {loss}, which always normalizes by length",
        "Remove it",
    ),
    Rule(
        ("reference", "loss"),
        lambda dpo: dpo.loss in ("orpo", "simpo") and dpo.reference is not None,
        "not valid for loss {loss}, which has no reference model",
        "Remove it",
    ),
    Rule(
        ("gamma", "loss"),
        lambda dpo: dpo.loss != "simpo" and dpo.gamma is not None,
        "only valid for loss simpo (loss is {loss})",
        "Remove it, or set dpo.loss=simpo",
    ),
    Rule(
        ("sft_coef", "loss"),
        lambda dpo: dpo.loss == "orpo" and dpo.sft_coef,
        "not valid for loss orpo, which contains the cross entropy of the chosen answers",
        "Remove it",
    ),
)


class DpoConfig(Section):
    """Preference optimization on pairs of a chosen and a rejected answer
    (DPO, Rafailov et al. 2023, and its relatives).
    """

    rules: ClassVar = DPO

    beta: Annotated[Number, Field(gt=0, le=100)] = 0.1
    """how strongly the policy is kept close to the reference; orpo: weight of the odds ratio; simpo: reward scale"""
    loss: Literal["sigmoid", "ipo", "hinge", "orpo", "simpo"] = "sigmoid"
    """DPO, IPO (Azar et al. 2023), SLiC (Zhao et al. 2023), ORPO (Hong et al. 2024) or SimPO (Meng et al. 2024)"""
    gamma: Annotated[Number, Field(ge=0, le=100)] | None = None
    """simpo: margin between the rewards of chosen and rejected answers; null: beta / 2"""
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = 0.0
    """sigmoid: assumed share of pairs whose labels are swapped"""
    length_normalized: Switch = False
    """log-probabilities per token, so that long answers do not weigh more; always so for ipo, orpo and simpo"""
    sft_coef: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the chosen answers' cross entropy per token, added to the preference loss"""
    reference: Literal["copy", "adapters_off", "cached"] | None = None
    """a frozen copy, the policy without its LoRA, or log-probabilities computed once; null: copy; orpo, simpo: none"""

    @model_validator(mode="after")
    def _resolve_nulls(self) -> Self:
        """Replace null by its meaning, as `ModelConfig` does.

        >>> DpoConfig().reference, DpoConfig(loss="simpo", beta=2.0).reference
        ('copy', None)
        """
        if self.loss == "simpo" and self.gamma is None:
            self.__dict__["gamma"] = self.beta / 2
        if self.loss not in ("orpo", "simpo") and self.reference is None:
            self.__dict__["reference"] = "copy"
        return self
