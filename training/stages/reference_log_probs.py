"""The reference's log-probabilities of all pairs, which dpo.reference: cached computes once
(cached_array.py).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.objectives.preferences import score_pairs


def pair_log_probs(
    model: Decoder | HFModel, batches: Iterable[dict[str, Any]], dtype: torch.dtype | None
) -> np.ndarray:
    """(n, 2) float32: log p of the chosen and the rejected answer of every pair in `batches`.

    The model is switched to evaluation mode.

    Args:
        model: on the device where it computes; batches are moved there.
        batches: as `score_pairs` takes them; rows of padding are skipped.
        dtype: of the products, by autocast; None: fp32.
    """
    device = model.embedding.weight.device
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    model.eval()
    found = []
    with torch.no_grad(), autocast:
        for batch in batches:
            tensors = {
                name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)
            }
            scores = score_pairs(model.features, model.head, tensors)
            log_probs = torch.stack(scores.log_probs, dim=1)  # (B, 2)
            real = scores.lengths.chosen > 0
            found.append(log_probs[real].float().cpu().numpy())
    return np.concatenate(found)
