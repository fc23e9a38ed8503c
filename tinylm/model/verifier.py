"""A verifier: an encoder that estimates how likely an answer to a problem is right
(Cobbe et al. 2021).

    ids of problem + answer ─▶ embedding ─▶ blocks ─▶ norm ─▶ error logit per token ─▶ one logit
            (B, T)             (B, T, D)    (B, T, D)                (B, T)              (B,)

Its blocks are those of decoder.py; only the mask differs, because every token sees the tokens on
both sides. So its weights can be initialized from a decoder. Three choices let it learn within
minutes to find a number that disagrees with the others; without any one of them it does not
(figures in docs/RESULTS.md):

- Errors are localized: the odds that the answer is wrong are the sum over tokens of the odds that
  this token is the error, and training says which token it is.
- A token does not see itself. A token that searches for its equal then finds another one, or none.
- The first block starts out searching for equals:
  its query weights are initialized with its key weights.

It finds numbers that disagree, but has to learn by itself that 8*7=53 is false. `NextTokenVerifier`
(`verifier.kind: decoder`) begins with what a trained decoder knows.

The loss and the scores of a verifier are in objectives/verifier.py.
"""


# B (problem, answer) pairs · T tokens of one pair · D model width
# H query heads · G key/value heads · K head width

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import (
    AttentionContext,
    Block,
    Decoder,
    make_norm,
    rotary_cos_sin,
)
from tinylm.model.initialization import init_weights

# Of the first token, which no token precedes: never the error. Finite, so that no loss is infinite.
FIRST_ODDS = -20.0


class Verifier(nn.Module):
    """`model(input_ids, attention_mask)` gives a logit (B,): above 0,
    the answer is more likely right than wrong.
    """

    separator_id: int | None = None
    """the token between problem and answer, if only errors after it count (kind decoder)"""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError(
                "model.vocab_size is not set; build the verifier from a config with a known "
                "vocabulary"
            )
        require_encoder_config(config)
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.residual_dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        last = config.norm_placement not in ("post", "none")
        self.norm = make_norm(config, config.d_model) if last else nn.Identity()
        self.suspicion = nn.Linear(config.d_model, 1)  # the error head; its name is in checkpoints
        init_weights(self)
        self._init_queries_as_keys()

    @torch.no_grad()
    def _init_queries_as_keys(self) -> None:
        """Copy the key weights of block 0 to its queries:
        equal tokens attend to each other from the start.
        """
        config = self.config
        H, G, K = config.n_heads, config.n_kv_heads, config.head_dim
        weight = self.blocks[0].attention.qkv.weight  # ((H + 2G) K, D)
        queries, keys, _ = weight.split((H * K, G * K, G * K))
        # Each key head once for each query head that shares it.
        per_head = keys.unflatten(0, (G, K)).repeat_interleave(H // G, dim=0)  # (H, K, D)
        queries.copy_(per_head.flatten(0, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B,) of ids (B, T), padded on the right where `attention_mask` (B, T) is False.

        The odds of an error are the sum of the tokens' odds; the logit of a right answer is minus
        the log of that sum.
        """
        return -self.error_logits(input_ids, attention_mask).logsumexp(dim=1)

    def error_logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) log-odds that each token is the error, against no error at all;
        -inf for padding.
        """
        config = self.config
        T = input_ids.size(1)
        if config.max_seq_len < T:
            raise ValueError(f"{T} positions are more than max_seq_len ({config.max_seq_len})")
        real = attention_mask.bool()
        # Embed the tokens.
        positions = torch.arange(T, device=input_ids.device)  # (T,)
        x = self.embedding(input_ids)  # (B, T, D)
        if config.position == "learned":
            x = x + self.positions(positions)  # (B, T, D)
        x = self.dropout(x)
        # The blocks of the decoder, with a mask that looks both ways.
        cos_sin = None
        if config.position == "rope":
            cos_sin = rotary_cos_sin(
                positions, config.head_dim, config.rope_theta, config.rope_scaling
            )  # (T, K)
        mask = self._attention_mask(real)  # (B, 1, T, n_sinks + T)
        context = AttentionContext(positions, cos_sin, mask, is_causal=False, cache=None)
        for block in self.blocks:
            x, _ = block(x, context)  # (B, T, D)
        logits = self._token_odds(self.norm(x), input_ids)  # (B, T)
        # Minus log T: the mean of the odds, so that at any length an untrained verifier is
        # undecided.
        logits = logits - attention_mask.sum(dim=1, keepdim=True).log()
        return logits.masked_fill(~real, -math.inf)

    def _token_odds(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T) log-odds in fp32 from the hidden states (B, T, D) of these tokens."""
        return self.suspicion(hidden).squeeze(-1).float()

    def _attention_mask(self, real: Tensor) -> Tensor:
        """(B, 1, T, n_sinks + T): all tokens but itself, no padding;
        a token that is alone sees itself.
        """
        itself = torch.eye(real.size(1), dtype=torch.bool, device=real.device)  # (T, T)
        hidden = itself & (real.sum(dim=1) > 1)[:, None, None]  # (B, T, T)
        mask = (real[:, None, :] & ~hidden)[:, None]  # (B, 1, T, T)
        return F.pad(mask, (self.config.n_sinks, 0), value=True)

    def init_from_decoder(self, decoder: Decoder) -> None:
        """Copy the weights of a decoder; the error head, which a decoder does not have,
        keeps its own.
        """
        theirs = decoder.state_dict()
        weights = {name: theirs.get(name, own) for name, own in self.state_dict().items()}
        self.load_state_dict(weights, strict=True)


class NextTokenVerifier(Verifier):
    """A verifier that starts as a decoder: the more a token surprises it, the more probably it is
    the error.

    Attention is causal. With the decoder's probability p of each token, given those before it,

        log-odds of an error at t = log((1 - p_t) / p_t) + error head(hidden state of t - 1)

    The first term is what the decoder knows already, facts too; the error head, which starts at 0,
    learns where a surprise says nothing. The problem surprises too: only tokens after `separator_id`
    can be the error, all of them if a row has none.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.head = nn.Linear(config.d_model, self.embedding.num_embeddings, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        else:
            init_weights(self)
        nn.init.zeros_(self.suspicion.weight)
        nn.init.zeros_(self.suspicion.bias)

    def _token_odds(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T) from the states before each token; the first token is never the error."""
        before = hidden[:, :-1]  # (B, T - 1, D)
        logits = self.head(before).float()  # (B, T - 1, V)
        own = logits.gather(2, input_ids[:, 1:, None])  # (B, T - 1, 1)
        others = logits.scatter(2, input_ids[:, 1:, None], -math.inf).logsumexp(dim=2)
        odds = others - own.squeeze(2)  # (B, T - 1): log (1 - p) - log p
        odds = odds + self.suspicion(before).squeeze(-1).float()
        odds = F.pad(odds, (1, 0), value=FIRST_ODDS)  # (B, T)
        if self.separator_id is None:
            return odds
        n_before = (input_ids == self.separator_id).cumsum(dim=1)  # (B, T), the token itself too
        in_problem = (n_before.roll(1, dims=1) == 0) & (n_before[:, -1:] > 0)
        in_problem[:, 0] = n_before[:, -1] > 0
        return odds.masked_fill(in_problem, FIRST_ODDS)

    def _attention_mask(self, real: Tensor) -> Tensor:
        """(B, 1, T, n_sinks + T): the token itself and those before it, which are no padding."""
        T = real.size(1)
        causal = torch.ones(T, T, dtype=torch.bool, device=real.device).tril()  # (T, T)
        mask = causal.expand(real.size(0), 1, T, T)
        return F.pad(mask, (self.config.n_sinks, 0), value=True)


def verifier_class(kind: Literal["encoder", "decoder"]) -> type[Verifier]:
    """The class for `verifier.kind`."""
    return NextTokenVerifier if kind == "decoder" else Verifier


def require_encoder_config(config: ModelConfig) -> None:
    """Check that no setting is used that only a decoder can have.

    Raises:
        UserError: naming the setting.
    """
    if config.position == "alibi":
        fix = "Set model.position to rope, learned or none"
        raise UserError("model.position", "alibi is not supported with a verifier", fix)
    if config.sliding_window is not None:
        problem = "not supported with a verifier, whose tokens see the whole text"
        raise UserError("model.sliding_window", problem, "Remove it")
    for name in ("input_scalars", "bigram_rows", "scale_embeddings"):
        if getattr(config, name):
            raise UserError(f"model.{name}", "not supported with a verifier", "Remove it")
    if config.moe is not None:
        raise UserError("model.moe", "not supported with a verifier", "Remove it")
