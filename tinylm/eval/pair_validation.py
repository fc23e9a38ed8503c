"""A reward model on the validation pairs of any config: eval_val.py and align.py score with this."""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch

from tinylm.checkpoint.load import LoadedRewardModel
from tinylm.config.schema import Config
from tinylm.eval.validation import ValidationData, batches_in_order, log_notes
from tinylm.model.reward_model import RewardModel
from tinylm.objectives.reward_model import reward_metrics, score_rewards
from tinylm.rows.preferences import answers_of, build_pairs
from tinylm.rows.reward_pairs import collate_reward_pairs
from tinylm.rows.sft import fingerprint_of_examples
from tinylm.rows.template_factory import make_template
from tinylm.tokens.packing import Batch


def pair_validation(config: Config, loaded: LoadedRewardModel) -> ValidationData:
    """The validation pairs of a config, in the template and the length of the reward model.

    Raises:
        UserError: see `build_pairs`.
    """
    tokenizer, trained = loaded.tokenizer, loaded.config
    template = make_template(trained.data.template, tokenizer, tools=trained.data.tools)
    seq_len, seed = trained.training.seq_len, config.training.seed
    pairs, report = build_pairs(config.data, "val", seed, template, tokenizer, seq_len - 1)
    log_notes(report)
    collate = partial(collate_reward_pairs, seq_len=seq_len, pad_id=tokenizer.pad_id)
    return ValidationData(
        batches_in_order(pairs, collate, config), fingerprint_of_examples(answers_of(pairs))
    )


def score_reward_model(
    model: RewardModel, batches: Iterable[Batch], center_coef: float
) -> dict[str, float]:
    """`reward_metrics` over all batches, and the number of pairs."""
    device = next(model.parameters()).device
    totals = np.zeros(0)
    with torch.no_grad():
        for batch in batches:
            lengths = batch["lengths"].to(device)
            rewards = model(batch["input_ids"].to(device), lengths)
            found = score_rewards(rewards, lengths.chunk(2)[0] > 0, center_coef)
            n_pairs = found.loss.new_tensor([len(found.loss)])
            sums = torch.cat((found.loss.sum()[None], n_pairs, found.metrics))
            sums = sums.cpu().double().numpy()
            totals = totals + sums if len(totals) else sums
    return reward_metrics(totals.tolist()) | {"pairs": round(totals[1])}
