"""A reward model: a decoder whose output is one number for a whole text
(Stiennon et al. 2020; Ouyang et al. 2022).

    ids of prompt + answer ─▶ embedding ─▶ blocks ─▶ norm ─▶ the last token's hidden state ─▶ reward
           (B, T)             (B, T, D)    (B, T, D)                     (B, D)                (B,)

The last token sees all others, so its hidden state can hold a judgment of the whole answer. Only
differences between rewards of answers to the same prompt have a meaning; the loss is in
objectives/reward_model.py. A verifier (verifier.py) is for another question: it says how probable
it is that an answer is right, and learns that from single answers.
"""

# B texts · T tokens of one · D model width

import torch
from torch import Tensor, nn

from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import Decoder


class RewardModel(Decoder):
    """`model(input_ids, lengths)` gives a reward (B,) for each text; its features are a decoder's."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        # One number in place of a logit for each token. It starts at 0: no answer is preferred,
        # and the first loss is log 2.
        del self.head
        self.reward_head = nn.Linear(config.d_model, 1, bias=False)
        nn.init.zeros_(self.reward_head.weight)

    def forward(self, input_ids: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        """Rewards (B,) in fp32 of ids (B, T), padded on the right to T.

        Args:
            input_ids: (B, T) token ids.
            lengths: (B,) tokens of each text; 0 in a row of padding, whose reward has no meaning.
        """
        return self.rewards(self.features(input_ids).hidden, lengths)

    def rewards(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Rewards (B,) from the hidden states (B, T, D)."""
        rows = torch.arange(len(lengths), device=lengths.device)  # (B,)
        last = hidden[rows, (lengths - 1).clamp(min=0)]  # (B, D)
        return self.reward_head(last).squeeze(-1).float()

    def init_from_decoder(self, decoder: Decoder) -> None:
        """Copy the weights of a decoder, without its head; the reward head keeps its own."""
        theirs = decoder.state_dict()
        weights = {name: theirs.get(name, own) for name, own in self.state_dict().items()}
        self.load_state_dict(weights, strict=True)
