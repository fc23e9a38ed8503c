"""Text from a model: the prompt is read once, then one token at a time is sampled
and read through the cache.

    Prompt ─▶ DecodingState: prefill ─▶ logits ─▶ next_token ─▶ TextWriter ─▶ TokenOutput
                                          ▲           │
                                          └─ decode ◀─┘

`Engine._decode_loop` is this picture, and the one loop that samples. Its parts: decoding.py
(prefill, decode and the context shift), sampling.py (from logits to a token), output.py (from
tokens to text, stop strings); beam_search.py searches instead of sampling. Scores of given texts
are in scoring.py, conversations in chat.py.

A prompt longer than the context keeps its last tokens, and `Prompt.truncated` counts the others.
max_new_tokens may be any number: see "Context shift" in decoding.py.
"""


# B rows, one per unfinished sample

from collections.abc import Iterable, Iterator, Sequence

import torch

from tinylm.config.schema import SamplingConfig
from tinylm.generate.beam_search import beam_search
from tinylm.generate.decoding import DecodingState
from tinylm.generate.output import Completion, Prompt, TextWriter, TokenOutput
from tinylm.generate.sampling import make_generator, next_token
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer


class Engine:
    """A model and its tokenizer, ready to generate text."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer):
        n_embeddings = model.embedding.num_embeddings
        if n_embeddings < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, "
                f"but the model only {n_embeddings}"
            )
        self.model, self.tokenizer = model, tokenizer

    def encode_prompt(self, text: str) -> Prompt:
        """The last tokens of `text` that fit; if it is empty EOS, which opens every document."""
        return self.fit_prompt(self.tokenizer.encode(text) or [self.tokenizer.eos_id])

    def fit_prompt(self, ids: Sequence[int]) -> Prompt:
        """The last of `ids` that fit in the context."""
        truncated = max(0, len(ids) - self.model.config.max_seq_len)
        return Prompt(tuple(ids[truncated:]), truncated)

    def generate(
        self, prompt: str | Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int] = ()
    ) -> list[Completion]:
        """The finished texts, `n_samples` of them; the arguments are those of `stream`."""
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        outputs: list[list[TokenOutput]] = [[] for _ in range(sampling.n_samples)]
        for output in self.stream(prompt, sampling, stop_ids=stop_ids):
            outputs[output.sample].append(output)
        return [Completion.of(prompt, of_sample) for of_sample in outputs]

    def stream(
        self, prompt: str | Prompt, sampling: SamplingConfig, *, stop_ids: Iterable[int] = ()
    ) -> Iterator[TokenOutput]:
        """The tokens as they are generated: at each step, one of each unfinished sample, in order.

        Sample s depends on (prompt, seed, s), not on the number of samples. The last output of a
        sample has its finish_reason. With n_beams > 1 all outputs come at the end.

        Args:
            stop_ids: tokens that end a text like EOS and are not shown, such as those of a
            template.
        """
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        end_ids = {self.tokenizer.eos_id, *stop_ids}
        if sampling.n_beams > 1:
            return beam_search(self.model, self.tokenizer, prompt, sampling, end_ids)
        return self._decode_loop(prompt, sampling, end_ids)

    @torch.inference_mode()
    def _decode_loop(
        self, prompt: Prompt, sampling: SamplingConfig, end_ids: set[int]
    ) -> Iterator[TokenOutput]:
        # Prefill: the prompt is read once, then its row is repeated for each sample.
        state = DecodingState(
            self.model,
            prompt.ids,
            vocab_size=self.tokenizer.vocab_size,
            max_new_tokens=sampling.max_new_tokens,
        )
        device, n = state.logits.device, sampling.n_samples
        state.select(torch.zeros(n, dtype=torch.long, device=device))
        # Each sample has its own text and its own random numbers.
        writers = [TextWriter(self.tokenizer, sampling.stop, end_ids, s) for s in range(n)]
        generators = [make_generator(sampling.seed, s, device) for s in range(n)]
        for step in range(1, sampling.max_new_tokens + 1):
            # Sample one token for each row.
            ids, log_probs = next_token(state.logits, state.context, sampling, generators)  # (B,)
            # Hand them out as text.
            last = step == sampling.max_new_tokens
            tokens = zip(writers, ids.tolist(), log_probs.tolist(), strict=True)
            for writer, token_id, log_prob in tokens:
                yield writer.write(token_id, log_prob, last=last)
            # Drop the rows of finished samples.
            unfinished = [row for row, writer in enumerate(writers) if not writer.finish_reason]
            if not unfinished:
                return
            if len(unfinished) < len(writers):
                writers = [writers[row] for row in unfinished]
                generators = [generators[row] for row in unfinished]
                rows = torch.tensor(unfinished, device=device)
                state.select(rows)
                ids = ids[rows]
            # Decode: read the new tokens, which gives the next logits.
            state.decode(ids)
