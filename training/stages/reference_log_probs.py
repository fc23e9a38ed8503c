"""The reference's log-probabilities of all pairs, computed once and kept in a file
(dpo.reference: cached).

So that training holds one model, not two, and computes one forward pass per batch, not two.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.common.files import make_once, read_regular
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.objectives.preferences import score_pairs

_DIGEST_BYTES = hashlib.sha256().digest_size


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


def cached_log_probs(path: Path, n_pairs: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The (n_pairs, 2) array in the file `path`; if there is no such file, `compute` makes it.

    Only one process computes it, others wait. The file is a SHA-256 digest and little-endian
    float32.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """

    def make(temporary: Path) -> None:
        content = compute().astype("<f4").tobytes()
        temporary.write_bytes(hashlib.sha256(content).digest() + content)

    make_once(path, make, setting="data.cache_dir")
    raw = read_regular(path)
    digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != digest or len(content) != n_pairs * 2 * 4:
        problem = "the content does not match its checksum"
        raise UserError(path, problem, "Delete the file; it is computed again")
    return np.frombuffer(content, dtype="<f4").reshape(n_pairs, 2)
