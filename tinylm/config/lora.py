"""Settings of adapters: the section `lora`."""

import math
from typing import Annotated, Literal

from pydantic import Field

from tinylm.config.rules import Count, Fraction, Name, Number, Section, Switch


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021): only they are trained, the other weights are frozen."""

    r: Annotated[Count, Field(le=4096)] = 8
    """rank of the adapters"""
    alpha: Annotated[Number, Field(gt=0, le=1e6)] = 16.0
    """scale: the output of the adapters is multiplied by alpha / r"""
    rslora: Switch = False
    """multiply by alpha / sqrt(r) in place of alpha / r, so that a large rank learns as fast (Kalajdzievski 2023)"""
    dora: Switch = False
    """trains the magnitude of each row separately; the adapter changes its direction only (Liu et al. 2024)"""
    dropout: Fraction = 0.0
    """dropout on the input of the adapters"""
    base_weights: Literal["fp32", "nf4"] = "fp32"
    """how the frozen matrices are kept: nf4 in 4 bits, by bitsandbytes (QLoRA; Dettmers et al. 2023)"""
    target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """name suffixes of the linear layers with adapters; null: attention and feed-forward"""

    @property
    def scale(self) -> float:
        """What the output of the adapters is multiplied by.

        >>> LoraConfig(r=16, alpha=8.0).scale, LoraConfig(r=16, alpha=8.0, rslora=True).scale
        (0.5, 2.0)
        """
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
