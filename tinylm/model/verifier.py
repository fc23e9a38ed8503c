"""A verifier: an encoder that reads a problem with an answer and says how likely the answer is right (Cobbe et al. 2021).

    ids of problem and answer ─▶ embedding ─▶ n_layers × [ attention to the others ─▶ feed-forward ] ─▶ norm ─▶ a suspicion a token ─▶ one logit

Its blocks are the decoder's; only the mask differs, since here every token sees every other, on both sides. So it can begin
with a decoder's weights. Three things make it learn in minutes that a number disagrees with the others, which without any
one of them it does not (docs/RESULTS.md has the numbers):

    the odds of the answer being wrong are the sum of the tokens' odds of being the wrong one, and it is taught which that is;
    a token does not see itself, so that what it finds when it looks for its like is another one, or none;
    in the first block it begins by looking for its like: queries are keys there.

After it: how a verifier's scores are judged.
"""


# B pairs · T tokens of one · D model width

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import Block, Decoder, Sight, initialise, make_norm, rope_angles

# Scores of many pairs are counted in bins of logits so wide, up to this distance from 0, which is a border of bins: sums of counts
# can be added over batches and devices, and within a bin a probability moves by 0.0025 at most.
LOGIT_STEP, LOGIT_LIMIT = 0.02, 20


class Verifier(nn.Module):
    """`model(input_ids, attention_mask)` gives a logit (B,): above 0, the answer is more likely right than wrong."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "the verifier needs model.vocab_size; build it from a config whose vocabulary is known"
            )
        check_shape(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = (
            make_norm(config, config.d_model) if config.norm_placement == "pre" else nn.Identity()
        )
        self.suspicion = nn.Linear(config.d_model, 1)
        initialise(self)
        self._look_for_the_like()

    @torch.no_grad()
    def _look_for_the_like(self) -> None:
        """Make the queries of the first block its keys: equal tokens then find each other before anything is learned."""
        config, weight = self.config, self.blocks[0].attention.qkv.weight
        queries, keys, _ = weight.split(
            [n * config.size_of_head for n in (config.n_heads, config.kv_heads, config.kv_heads)]
        )
        of_heads = keys.unflatten(0, (config.kv_heads, config.size_of_head))
        queries.copy_(
            of_heads.repeat_interleave(config.n_heads // config.kv_heads, dim=0).flatten(0, 1)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B,) of ids (B, T), padded on the right where `attention_mask` (B, T) is False."""
        return -self.places(input_ids, attention_mask).logsumexp(dim=1)

    def places(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) log-odds of each token being the wrong one against none being wrong; -inf for padding."""
        T = input_ids.size(1)
        if self.config.max_seq_len < T:
            raise ValueError(f"{T} positions are more than max_seq_len ({self.config.max_seq_len})")
        positions = torch.arange(T, device=input_ids.device)
        x = self.embedding(input_ids)
        if self.config.position == "learned":
            x = x + self.positions(positions)
        x = self.dropout(x)
        angles = (
            rope_angles(positions, self.config.size_of_head, self.config.rope_theta)
            if self.config.position == "rope"
            else None
        )
        sight = Sight(
            positions, angles, self._seen(attention_mask.bool()), is_causal=False, cache=None
        )
        for block in self.blocks:
            x, _ = block(x, sight)
        # In the mean and not in the sum over the tokens, so that before training right and wrong are equally likely at any length.
        odds = (
            self.suspicion(self.norm(x)).squeeze(-1).float()
            - attention_mask.sum(dim=1, keepdim=True).log()
        )
        return odds.masked_fill(~attention_mask.bool(), -math.inf)

    def _seen(self, real: Tensor) -> Tensor:
        """(B, 1, T, n_sinks + T): the others, no padding; a token that is alone sees itself."""
        itself = (
            torch.eye(real.size(1), dtype=torch.bool, device=real.device)
            & (real.sum(dim=1) > 1)[:, None, None]
        )  # (B, T, T)
        return F.pad((real[:, None, :] & ~itself)[:, None], (self.config.n_sinks, 0), value=True)

    def begin_with(self, decoder: Decoder) -> None:
        """Take over a decoder's weights; only the suspicion has nothing to begin with."""
        theirs = decoder.state_dict()
        self.load_state_dict(
            {name: theirs.get(name, own) for name, own in self.state_dict().items()}, strict=True
        )


def check_shape(config: ModelConfig) -> None:
    """UserError for settings that only a decoder can have."""
    for name, value, reason in (
        (
            "position",
            config.position == "alibi",
            "alibi looks back only; use rope, learned or none",
        ),
        (
            "sliding_window",
            config.sliding_window is not None,
            "a verifier reads everything; take it out",
        ),
        ("moe", config.moe is not None, "a verifier has no experts; take it out"),
    ):
        if value:
            raise UserError(f"model.{name}: {reason} for the verifier.")
