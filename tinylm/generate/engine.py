"""Text from a model: the prompt is read once, then one token at a time is chosen and read through the cache.

    prompt ─▶ Prompt (ids that fit) ─▶ Reader (logits of the next token) ─▶ sampling ─▶ Piece, Piece, ... ─▶ Completion

In reading order: what goes in and comes out, `StopGate` (stop strings), `Reader` (the cache and the context shift), and
`Engine`, whose `stream` holds the one decode loop; `beam_search` searches with the same reader. How a token is chosen from
its logits is in sampling.py.

**Longer than the context.** A model knows `max_seq_len` positions. A prompt beyond that keeps its last tokens, and
`Prompt.truncated` says how many were left out. When writing reaches the last position, the last half of the context is read
again from position 0 and writing goes on (a context shift), so max_new_tokens may be any number; what lies further back
is forgotten by the model, though not by the repetition penalty and the forbidden n-grams.
"""


# B rows (samples or beams) · T tokens · V vocabulary

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.sampling import constrain, log_probabilities, make_generator, next_token
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer

FinishReason = Literal["stop", "length", "eos"]


@dataclass(frozen=True)
class Prompt:
    """The token ids that the model reads first, and how many were left out before them because the context is full."""

    ids: tuple[int, ...]
    truncated: int = 0


@dataclass(frozen=True)
class Piece:
    """One token of a text that is being written."""

    text: str
    """what may be shown now: nothing while a character is incomplete or could begin a stop string"""
    token_id: int
    log_prob: float
    """log-probability by the model itself, before temperature, filters and penalties"""
    sample: int = 0
    """number of the text, from 0"""
    finish_reason: FinishReason | None = None
    """why the text ends here; None: it goes on"""

    @property
    def probability(self) -> float:
        """The probability of the token by the model itself."""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Completion:
    """A text that continues a prompt."""

    text: str
    ids: tuple[int, ...]
    """the tokens written, with the EOS or the stop string that ended them"""
    log_prob: float
    """sum over `ids` of the log-probabilities by the model itself"""
    finish_reason: FinishReason
    prompt_tokens: int
    """tokens of the prompt that the model read"""
    truncated: int
    """tokens of the prompt left out at its front, because the context holds no more"""

    @classmethod
    def of(cls, prompt: Prompt, pieces: Sequence[Piece]) -> "Completion":
        """The completion that the pieces of one sample make up."""
        reason = pieces[-1].finish_reason
        assert reason is not None  # noqa: S101  (our own invariant: the decode loop closes every text)
        text, ids = (
            "".join(piece.text for piece in pieces),
            tuple(piece.token_id for piece in pieces),
        )
        return cls(
            text,
            ids,
            sum(piece.log_prob for piece in pieces),
            reason,
            len(prompt.ids),
            prompt.truncated,
        )


@dataclass(frozen=True)
class Pair:
    """A prompt and the text wanted after it, as the token ids that the model reads together."""

    ids: tuple[int, ...]
    n_target: int
    """how many of the last ids are the target"""
    truncated: int = 0
    """tokens of the prompt left out at its front, because the context holds no more"""


@dataclass(frozen=True)
class Score:
    """How well a model expects a given text after a prompt."""

    log_probs: tuple[float, ...]
    """natural log-probability of each of the target's tokens"""
    ranks: tuple[int, ...]
    """of each target token among all tokens, 1 for the most probable one"""
    prompt_perplexity: float | None
    """exp of the mean negative log-probability of the prompt's tokens after its first; None for fewer than two"""

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole target."""
        return sum(self.log_probs)

    @property
    def n_tokens(self) -> int:
        """Tokens of the target."""
        return len(self.log_probs)

    @property
    def greedy_match(self) -> bool:
        """Whether greedy decoding would write exactly the target."""
        return all(rank == 1 for rank in self.ranks)


# --- showing no more than is certain --------------------------------------------------------------------------------


class StopGate:
    """Lets text through up to the first stop string, holding back what could still become one.

    >>> gate = StopGate(["###"])
    >>> gate.feed("a#"), gate.feed("b##"), gate.feed("#c"), gate.stopped
    ('a', '#b', '', True)
    """

    def __init__(self, stops: Iterable[str]):
        self.stops = tuple(stops)
        self.held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """What may be shown now that `text` was added."""
        if self.stopped:
            return ""
        self.held += text
        start = find_stop(self.held, self.stops)
        self.stopped = start is not None
        if start is None:
            start = len(self.held) - max(
                (
                    n
                    for stop in self.stops
                    for n in range(1, len(stop))
                    if self.held.endswith(stop[:n])
                ),
                default=0,
            )
        shown, self.held = self.held[:start], self.held[start:]
        return shown

    def rest(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.stopped else self.held


def find_stop(text: str, stops: Iterable[str]) -> int | None:
    """Where the stop string that is complete first begins in `text`; None if there is none.

    Complete first, not begun first: the answer must not depend on how the text was cut into tokens.

    >>> find_stop("abcd", ["abcd", "bc"]), find_stop("abcd", ["x"])
    (1, None)
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(found)[1] if found else None


class _Writer:
    """One text being written: turns its tokens into pieces and knows when it ends."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Iterable[str], end_ids: Collection[int], sample: int = 0
    ):
        self.end_ids = end_ids
        self.decoder = tokenizer.stream()
        self.gate = StopGate(stops)
        self.sample = sample
        self.finish_reason: FinishReason | None = None

    def write(self, token_id: int, log_prob: float, *, last: bool) -> Piece:
        """The piece of the next token; `last` ends the text for its length."""
        ends = token_id in self.end_ids
        text = "" if ends else self.decoder.feed(token_id)
        if ends or last:
            text += self.decoder.finish()
        shown = self.gate.feed(text)
        if self.gate.stopped:
            self.finish_reason = "stop"
        elif ends or last:
            self.finish_reason = "eos" if ends else "length"
            shown += self.gate.rest()
        return Piece(shown, token_id, log_prob, self.sample, self.finish_reason)


# --- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """Rows of token ids of one length, the cache of what the model has read of them, and the logits of what comes next."""

    def __init__(
        self, model: Decoder, prompt_ids: Sequence[int], *, vocab_size: int, max_new_tokens: int
    ):
        """One row, read at once; `max_new_tokens` are the most that will be added."""
        ids = prompt_ids
        self.extra_inputs: dict[str, Tensor] = {}
        if model.has_encoder:
            [ids], self.extra_inputs = model.decoder_start([prompt_ids])
        self.model, self.vocab_size = model, vocab_size
        self.slots = min(model.config.max_seq_len, len(ids) + max_new_tokens)
        self.buffer = torch.tensor(
            [ids], device=model.embedding.weight.device
        )  # (B, room), of which `length` are used
        self.start = self.length = len(ids)
        self.cache = model.new_cache(1, self.slots)
        self._read(self.length)

    @property
    def context(self) -> Tensor:
        """All tokens so far, (B, T)."""
        return self.buffer[:, : self.length]

    @property
    def written(self) -> Tensor:
        """The tokens that were added, (B, T)."""
        return self.buffer[:, self.start : self.length]

    def append(self, ids: Tensor) -> None:
        """Add one token (B,) to each row and read it."""
        if self.length == self.buffer.size(1):  # doubling keeps the copying linear in the length
            self.buffer = F.pad(self.buffer, (0, self.length))
        self.buffer[:, self.length] = ids
        self.length += 1
        self._read(1)

    def select(self, rows: Tensor) -> None:
        """Keep these rows in this order, repeats allowed: one prompt to many samples, or the texts that go on."""
        self.buffer, self.logits = self.buffer[rows], self.logits[rows]
        self.cache.select(rows)

    def _read(self, n_new: int) -> None:
        """Read the last `n_new` tokens into the cache and set `logits` (B, V) of the token after them."""
        if self.cache.length + n_new > self.slots:  # the context shift that the module describes
            n_new = max(1, self.slots // 2)
            self.cache = self.model.new_cache(self.buffer.size(0), self.slots)
        for ids in self.context[:, -n_new:].split(self.cache.chunk, dim=1):
            hidden = self.model.features(ids, cache=self.cache, **self.extra_inputs).hidden
        # The embedding may have more rows than there are tokens; those beyond stand for nothing.
        self.logits = self.model.head(hidden[:, -1])[:, : self.vocab_size].float()


# --- the engine -----------------------------------------------------------------------------------------------------


class Engine:
    """A model and its tokenizer, ready to write."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        if model.embedding.num_embeddings < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.embedding.num_embeddings}"
            )
        self.model, self.tokenizer = model, tokenizer

    def encode_prompt(self, text: str) -> Prompt:
        """The last tokens of `text` that fit in the context; EOS for an empty text, since EOS opens every document."""
        return self.fit_prompt(self.tokenizer.encode(text) or [self.tokenizer.eos_id])

    def fit_prompt(self, ids: Sequence[int]) -> Prompt:
        """The last of `ids` that fit in the context."""
        truncated = max(0, len(ids) - self.model.config.max_seq_len)
        return Prompt(tuple(ids[truncated:]), truncated)

    def stream(
        self, prompt: str | Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int] = ()
    ) -> Iterator[Piece]:
        """The tokens of all samples as they are written, sample by sample at each step; each sample's last piece says why it ends.

        Sample s depends on (prompt, seed, s) and not on the number of samples. With n_beams > 1 all pieces come at the end.

        Args:
            stop_ids: tokens that end a text as EOS always does, and show as little: those of a template.
        """
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        write = self.beam_search if sampling.n_beams > 1 else self._decode
        return write(prompt, sampling, stop_ids=stop_ids)

    def generate(
        self, prompt: str | Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int] = ()
    ) -> list[Completion]:
        """The finished texts, `n_samples` of them; arguments as those of `stream`."""
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        pieces: list[list[Piece]] = [[] for _ in range(sampling.n_samples)]
        for piece in self.stream(prompt, sampling, stop_ids=stop_ids):
            pieces[piece.sample].append(piece)
        return [Completion.of(prompt, of_sample) for of_sample in pieces]

    @torch.inference_mode()
    def _decode(
        self, prompt: Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int]
    ) -> Iterator[Piece]:
        """The decode loop: choose a token for every text that goes on, show it, read it."""
        reader, end_ids = self._reader(prompt, sampling), {self.tokenizer.eos_id, *stop_ids}
        writers = [
            _Writer(self.tokenizer, sampling.stop, end_ids, sample)
            for sample in range(sampling.n_samples)
        ]
        generators = [
            make_generator(sampling.seed, sample, reader.logits.device)
            for sample in range(sampling.n_samples)
        ]
        reader.select(
            torch.zeros(sampling.n_samples, dtype=torch.long, device=reader.logits.device)
        )
        for step in range(1, sampling.max_new_tokens + 1):
            ids, log_probs = next_token(reader.logits, reader.context, sampling, generators)
            for writer, token_id, log_prob in zip(
                writers, ids.tolist(), log_probs.tolist(), strict=True
            ):
                yield writer.write(token_id, log_prob, last=step == sampling.max_new_tokens)
            going_on = [row for row, writer in enumerate(writers) if writer.finish_reason is None]
            if not going_on:
                return
            if len(going_on) < len(writers):
                writers, generators = (
                    [writers[row] for row in going_on],
                    [generators[row] for row in going_on],
                )
                rows = torch.tensor(going_on, device=ids.device)
                reader.select(rows)
                ids = ids[rows]
            reader.append(ids)

    @torch.inference_mode()
    def beam_search(
        self, prompt: Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int] = ()
    ) -> Iterator[Piece]:
        """The text of the highest mean log-probability a token that `n_beams` beams find (Sutskever et al. 2014, section 3.2).

        Each step keeps the `n_beams` most probable continuations of the live texts. One that ends (EOS, stop id or string, or
        max_new_tokens) is put aside and leaves its place empty, until no place is left; of those put aside the best mean
        wins, so that a short text is not preferred for being short. EOS counts as a token. One beam is greedy decoding.
        The repetition penalty and forbidden n-grams apply and the search ranks by what they leave; temperature, top_k,
        top_p, min_p and seed have no part.
        """
        reader, end_ids = self._reader(prompt, sampling), {self.tokenizer.eos_id, *stop_ids}
        device = reader.logits.device
        totals = torch.zeros(1, device=device)  # log-probability of each live text
        log_probs = torch.zeros(1, 0, device=device)  # of its tokens, by the model itself
        ended: list[tuple[float, list[int], list[float]]] = []
        for step in range(1, sampling.max_new_tokens + 1):
            rows, ids, totals = self._best_continuations(
                reader, totals, sampling, sampling.n_beams - len(ended)
            )
            log_probs = torch.cat(
                (log_probs[rows], log_probabilities(reader.logits)[rows, ids, None]), dim=1
            )
            texts = torch.cat((reader.written[rows], ids[:, None]), dim=1)
            ends = [
                step == sampling.max_new_tokens or self._ends(text, sampling.stop, end_ids)
                for text in texts.tolist()
            ]
            for beam in (beam for beam, end in enumerate(ends) if end):
                ended.append(
                    (totals[beam].item() / step, texts[beam].tolist(), log_probs[beam].tolist())
                )
            live = torch.tensor(
                [beam for beam, end in enumerate(ends) if not end], dtype=torch.long, device=device
            )
            if not len(live):
                break
            totals, log_probs = totals[live], log_probs[live]
            reader.select(rows[live])
            reader.append(ids[live])
        _, text, text_log_probs = max(ended, key=lambda found: found[0])
        writer = _Writer(self.tokenizer, sampling.stop, end_ids)
        for place, (token_id, log_prob) in enumerate(
            zip(text, text_log_probs, strict=True), start=1
        ):
            yield writer.write(token_id, log_prob, last=place == len(text))

    @staticmethod
    def _best_continuations(
        reader: Reader, totals: Tensor, sampling: SamplingConfig, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row, token and total log-probability of the `n` most probable continuations; fewer if there are not so many."""
        scores = totals[:, None] + constrain(reader.logits, reader.context, sampling).log_softmax(
            dim=-1
        )  # (B, V)
        best, places = scores.flatten().topk(min(n, scores.numel()))
        possible = best > -math.inf
        places = places[possible]
        return places // scores.size(1), places % scores.size(1), best[possible]

    def _ends(self, ids: list[int], stops: tuple[str, ...], end_ids: Collection[int]) -> bool:
        return ids[-1] in end_ids or (
            bool(stops) and find_stop(self.tokenizer.decode(ids), stops) is not None
        )

    def _reader(self, prompt: Prompt, sampling: SamplingConfig) -> Reader:
        """A reader that has read the prompt."""
        if self.model.training:
            raise ValueError(
                "the model is in training mode, and dropout would disturb the text; call model.eval() first"
            )
        n, room = len(prompt.ids), self.model.config.max_seq_len
        if not 1 <= n <= room:
            raise ValueError(
                f"a prompt of {n} tokens, and the context holds 1 to {room}; use encode_prompt or fit_prompt"
            )
        return Reader(
            self.model,
            prompt.ids,
            vocab_size=self.tokenizer.vocab_size,
            max_new_tokens=sampling.max_new_tokens,
        )

    def score(self, prompt: str | Prompt, target: str) -> Score:
        """How well the model expects `target` right after `prompt`; raises as `encode_pair` does."""
        return self.score_pairs([self.encode_pair(prompt, target)])[0]

    def encode_pair(self, prompt: str | Prompt, target: str) -> Pair:
        """Prompt and target, each encoded by itself; an empty prompt is EOS.

        Raises:
            UserError: the target has no token, or fills the context.
        """
        prompt = (
            prompt
            if isinstance(prompt, Prompt)
            else Prompt(tuple(self.tokenizer.encode(prompt) or [self.tokenizer.eos_id]))
        )
        pair = self.fit_pair(prompt.ids, self.tokenizer.encode(target))
        return replace(pair, truncated=pair.truncated + prompt.truncated)

    def fit_pair(self, before: Sequence[int], wanted: Sequence[int]) -> Pair:
        """The last of the ids of a prompt, at least one, that fit in the context with those of a target; raises as `encode_pair` does."""
        if not before:
            raise ValueError(
                "a target is scored after at least one token; take the id of EOS for an empty prompt"
            )
        room = self.model.config.max_seq_len
        if not 1 <= len(wanted) <= room:
            raise UserError(
                f"a target of {len(wanted)} tokens, and it needs 1 to {room}. Change the target."
            )
        ids = (*before, *wanted)[-room - 1 :]  # the last token is never read
        return Pair(ids, len(wanted), len(before) + len(wanted) - len(ids))

    @torch.inference_mode()
    def score_pairs(self, pairs: Sequence[Pair], *, batch_size: int = 16) -> list[Score]:
        """The scores in the order of `pairs`; those of like length are read together."""
        order = sorted(
            range(len(pairs)), key=lambda place: -len(pairs[place].ids)
        )  # what would not fit in memory fails at once
        scores: dict[int, Score] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            scores.update(
                zip(places, self._score_batch([pairs[place] for place in places]), strict=True)
            )
        return [scores[place] for place in range(len(pairs))]

    def _score_batch(self, pairs: Sequence[Pair]) -> list[Score]:
        """Rows padded at their end: under causal attention a real token never sees padding."""
        openings: Sequence[Sequence[int]] = [pair.ids[: -pair.n_target] for pair in pairs]
        extra_inputs: dict[str, Tensor] = {}
        if self.model.has_encoder:
            openings, extra_inputs = self.model.decoder_start(openings)
        rows = [
            torch.tensor((*opening, *pair.ids[-pair.n_target :]))
            for opening, pair in zip(openings, pairs, strict=True)
        ]
        device, lengths = (
            self.model.embedding.weight.device,
            torch.tensor([len(row) - 1 for row in rows]),
        )
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self.tokenizer.eos_id
        ).to(device)
        real = (torch.arange(ids.size(1) - 1) < lengths[:, None]).to(device)  # (B, T)
        hidden, labels = (
            self.model.features(ids[:, :-1], **extra_inputs).hidden[real],
            ids[:, 1:][real],
        )
        # The head a few positions at a time: all logits of a long context at once would be the largest tensor by far.
        chunks = zip(hidden.split(256), labels.split(256), strict=True)
        parts = [
            _expected(self.model.head(part)[:, : self.tokenizer.vocab_size].float(), wanted)
            for part, wanted in chunks
        ]
        log_probs, ranks = (
            torch.cat(part).split(lengths.tolist()) for part in zip(*parts, strict=True)
        )
        return [_score_of(pair, *row) for pair, *row in zip(pairs, log_probs, ranks, strict=True)]


def _score_of(pair: Pair, log_probs: Tensor, ranks: Tensor) -> Score:
    """The score from the log-probability and rank of every token but the first."""
    of_prompt = log_probs[: -pair.n_target]
    perplexity = math.exp(-of_prompt.mean().item()) if len(of_prompt) else None
    return Score(
        tuple(log_probs[-pair.n_target :].tolist()),
        tuple(ranks[-pair.n_target :].tolist()),
        perplexity,
    )


def _expected(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability (T,) and rank (T,) of each label; of equal logits the lower id ranks first, as argmax has it."""
    chosen = logits.gather(1, labels[:, None])
    ids = torch.arange(logits.size(1), device=logits.device)
    better = (logits > chosen) | ((logits == chosen) & (ids < labels[:, None]))
    return log_probabilities(logits).gather(1, labels[:, None]).squeeze(1), better.sum(dim=1) + 1
