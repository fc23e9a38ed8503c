"""Settings of a reward model: the section `reward_model`."""

from typing import Annotated

from pydantic import Field

from tinylm.config.rules import Number, Section


class RewardModelConfig(Section):
    """A reward model: a decoder with one number as its output, which is higher for the better of
    two answers (Stiennon et al. 2020; Ouyang et al. 2022).
    """

    center_coef: Annotated[Number, Field(ge=0, le=100)] = 0.0
    """weight of the squared sum of the two rewards of a pair, which keeps rewards near 0 (Eisenstein et al. 2023)"""
