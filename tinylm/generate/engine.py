"""Text from a model, for many prompts at once: each text has its own prompt, sampling settings,
random numbers and end, and texts join and leave at any step.

    add ─▶ waiting ─▶ free row? prefill ─▶ logits ─▶ next_token ─▶ TextWriter ─▶ Event
                                             ▲           │
                                             └─ decode ◀─┘      `Engine.step`: prefill, or once around

    engine = Engine(model, tokenizer, slots=8)
    engine.add(Request(engine.encode_prompt("Once"), SamplingConfig(seed=1)))  # the number 1
    engine.add(Request(engine.encode_prompt("Yesterday"), SamplingConfig(seed=2)))  # the number 2
    while engine.is_busy:
        for event in engine.step():  # the first token of a prompt's texts, or the next of each text
            print(event.number, event.output.text, event.output.finish_reason)

A server calls `add`, `step` and `cancel`; everyone else one of the methods around them: `run` and
`complete` (many requests, results in order), `generate` (the finished samples of one prompt) and
`stream` (their tokens as they are generated). One prompt is a batch of one.

Its parts: decoding.py (the rows: prefill, decode, prefixes, the context shift), sampling.py (from
logits to a token), constraint.py (which tokens may come), tool_text.py (tokens that a tool writes),
output.py (from tokens to text, stop strings); beam_search.py searches instead of sampling. Scores
of given texts are in scoring.py, conversations in chat.py.

A prompt longer than the context keeps its last tokens, and `Prompt.truncated` counts the others.
max_new_tokens may be any number: see "Context shift" in decoding.py.
"""


# B rows, one per running text · V vocabulary

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.beam_search import beam_search
from tinylm.generate.constraint import Constraint, Grammars
from tinylm.generate.decoding import DecodingBatch, check_prompt
from tinylm.generate.lookup import check_lookup, lookup_decoding
from tinylm.generate.output import Completion, Prompt, TextWriter, TokenOutput
from tinylm.generate.sampling import (
    has_penalties,
    log_probabilities,
    make_generator,
    most_probable,
    next_token,
)
from tinylm.generate.tool_text import ToolText, refuse_tools
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer

DEFAULT_SLOTS = 8
# Settings that do not matter to how one token is drawn from its logits.
NOT_OF_A_STEP = ("max_new_tokens", "stop", "seed", "n_samples", "n_beams")


@dataclass(frozen=True)
class Request:
    """A text to be generated."""

    prompt: Prompt
    sampling: SamplingConfig
    """a request is one text: `n_samples` has no effect, `n_beams` only in `run`"""
    stop_ids: tuple[int, ...] = ()
    """tokens that end a text like EOS and are not shown, such as those of a template"""
    sample: int = 0
    """number of the text among those with this prompt and seed"""
    n_alternatives: int = 0
    """most probable tokens to report at each step (`TokenOutput.alternatives`)"""
    constraint: Constraint | None = None
    """what the text must be, such as JSON; it ends when that is complete, with the reason `stop`"""


@dataclass(frozen=True)
class Event:
    """The next token of a text, or the error that ended it."""

    number: int
    """of the request, from `Engine.add`"""
    output: TokenOutput | None
    error: UserError | None = None

    @property
    def ends(self) -> bool:
        """Whether it is the last of its text."""
        return self.output is None or self.output.finish_reason is not None


class Text:
    """A request that is being carried out."""

    def __init__(self, number: int, request: Request, engine: "Engine"):
        self.number, self.request = number, request
        end_ids = {engine.tokenizer.eos_id, *request.stop_ids}
        sampling = request.sampling
        self.writer = TextWriter(engine.tokenizer, sampling.stop, end_ids, request.sample)
        self.generator = make_generator(sampling.seed, request.sample, engine.device)
        self.matcher = None
        if request.constraint is not None:
            self.matcher = engine.grammars.start(request.constraint, end_ids)
        # Texts of an equal group are sampled together; those with penalties or a constraint one by
        # one.
        alike = [value for name, value in sampling if name not in NOT_OF_A_STEP]
        is_alone = has_penalties(sampling) or self.matcher is not None
        self.group = (*alike, number if is_alone else None)
        self.tool = None
        if engine.tools is not None and self.matcher is None:
            self.tool = ToolText(engine.tokenizer)
        self.n_new = 0
        self.last_id = -1


class Engine:
    """A model and its tokenizer, ready to generate text.

    Args:
        slots: texts that are generated at once; more wait.
        deterministic: whether a text must be the same to the last bit whatever else is generated
            beside it and was before it; every step then costs as much as with all slots in use.
        tools: data.tools: what writes the results of calls; not in a text with a constraint.
    """

    @classmethod
    def of(cls, loaded: Loaded, tokenizer: Tokenizer | None = None, **settings: Any) -> Self:
        """The engine of a loaded model, with the tool that it was tuned to call.

        Args:
            tokenizer: in place of its own.
            settings: slots, deterministic.
        """
        return cls(loaded.model, tokenizer or loaded.tokenizer, tools=loaded.tools, **settings)

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        slots: int = DEFAULT_SLOTS,
        deterministic: bool = False,
        tools: str | None = None,
    ):
        n_embeddings = model.embedding.num_embeddings
        if n_embeddings < tokenizer.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, "
                f"but the model only {n_embeddings}"
            )
        self.model, self.tokenizer = model, tokenizer
        self.slots, self.deterministic, self.tools = slots, deterministic, tools
        self.grammars = Grammars(tokenizer)
        self._batch: DecodingBatch | None = None
        self._lookup_batch: DecodingBatch | None = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: list[Text] = []  # text i is in row i of the batch
        self._undelivered: list[Event] = []
        self._n_added = 0

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.embedding.weight.device

    # --- prompts ---

    def encode_prompt(self, text: str) -> Prompt:
        """The last tokens of `text` that fit; if it is empty EOS, which opens every document."""
        return self.fit_prompt(self.tokenizer.encode(text) or [self.tokenizer.eos_id])

    def fit_prompt(self, ids: Sequence[int]) -> Prompt:
        """The last of `ids` that fit in the context."""
        truncated = max(0, len(ids) - self.model.config.max_seq_len)
        return Prompt(tuple(ids[truncated:]), truncated)

    # --- step by step ---

    def add(self, request: Request) -> int:
        """Let a text be generated from the next step with a free slot on; returns its number.

        Raises:
            ValueError: the model is in training mode, or the prompt is empty or longer than the
            context. Nothing is added.
            UserError: the constraint is not valid, or not supported with this tokenizer.
        """
        check_prompt(self.model, request.prompt.ids)
        if request.constraint is not None:
            self.grammars.compile(request.constraint)
        self._n_added += 1
        self._waiting.append((self._n_added, request))
        return self._n_added

    def cancel(self, *numbers: int) -> None:
        """End texts; no event of them follows. One that has ended already is ignored."""
        ended = set(numbers)
        self._waiting = deque(item for item in self._waiting if item[0] not in ended)
        self._undelivered = [event for event in self._undelivered if event.number not in ended]
        self._finish(ended)

    @property
    def is_busy(self) -> bool:
        """Whether there are texts to be generated or events to be delivered."""
        return bool(self._running or self._waiting or self._undelivered)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Begin the waiting texts that have the next prompt, and return their first tokens; if none
        can begin, the next token of each running text, in the order in which they began.
        """
        events, self._undelivered = self._undelivered, []
        if self._batch is None:
            self._batch = DecodingBatch(
                self.model,
                slots=self.slots,
                vocab_size=self.tokenizer.vocab_size,
                deterministic=self.deterministic,
            )
        if self._waiting and len(self._running) < self.slots:
            self._begin_next_prompt()
        new: Sequence[int] = [row for row, text in enumerate(self._running) if text.n_new == 0]
        if self._running and not new:
            # Decode: read the token that each text got last.
            self._batch.decode([text.last_id for text in self._running])
            new = range(len(self._running))
        # A tool's next token, or sample: texts with the same settings together.
        groups: dict[tuple[Any, ...], list[int]] = {}
        for row in new:
            text = self._running[row]
            if text.tool is not None and text.tool.has_token:
                events.append(self._write(row, text.tool.next_token(), 0.0, by_tool=True))
            else:
                groups.setdefault(text.group, []).append(row)
        for rows in groups.values():
            events += self._sample(rows)
        # Free the rows of the texts that ended.
        self._finish({event.number for event in events if event.ends})
        return sorted(events, key=lambda event: event.number)

    def _begin_next_prompt(self) -> None:
        """Prefill: the first waiting text takes a free row, and so do those after it that have the
        same prompt, which is read once. The next prompt has a step of its own, so that a first token
        does not wait until other prompts are read.
        """
        prompt = self._waiting[0][1].prompt
        while self._waiting and self._waiting[0][1].prompt == prompt:
            if len(self._running) == self.slots:
                return
            number, request = self._waiting.popleft()
            text = Text(number, request, self)
            self._batch.start(prompt.ids, request.sampling.max_new_tokens)
            self._running.append(text)

    def _sample(self, rows: list[int]) -> list[Event]:
        """The next token of texts with the same settings."""
        batch, texts = self._batch, [self._running[row] for row in rows]
        logits = batch.logits[rows]  # (B, V)
        sampling = texts[0].request.sampling
        # Only penalties read the context, and texts with penalties or a constraint come one by one.
        text = texts[0]
        context = torch.tensor([batch.rows[rows[0]].context], device=logits.device)  # (1, T)
        generators = [text.generator for text in texts]
        try:
            allowed = None
            if text.matcher is not None:
                allowed = torch.from_numpy(text.matcher.allowed()).to(logits.device)[None]  # (1, V)
            # (B,) each
            ids, log_probs = next_token(logits, context, sampling, generators, text.n_new, allowed)
        except UserError as error:  # must not end the other texts
            return [Event(text.number, None, error)]
        tokens = zip(rows, ids.tolist(), log_probs.tolist(), strict=True)
        return [self._write(row, token_id, log_prob) for row, token_id, log_prob in tokens]

    def _write(self, row: int, token_id: int, log_prob: float, *, by_tool: bool = False) -> Event:
        """Add a token to the text in a row of the batch."""
        text = self._running[row]
        text.last_id = token_id
        text.n_new += 1
        last = text.n_new == text.request.sampling.max_new_tokens
        complete = False
        if text.matcher is not None:
            text.matcher.advance(token_id)
            complete = text.matcher.is_complete
        if text.tool is not None and not by_tool:
            text.tool.read(token_id)
        output = text.writer.write(token_id, log_prob, last=last, complete=complete)
        if by_tool:
            output = replace(output, by_tool=True)
        elif text.request.n_alternatives:
            row_log_probs = log_probabilities(self._batch.logits[row : row + 1])  # (1, V)
            [best] = most_probable(row_log_probs, text.request.n_alternatives)
            output = replace(output, alternatives=best)
        return Event(text.number, output)

    @torch.inference_mode()
    def _finish(self, numbers: set[int]) -> None:
        """Free the rows of these texts, the last row first: a gap is filled by the last one."""
        for row in reversed(range(len(self._running))):
            if self._running[row].number in numbers:
                self._batch.finish(row)
                self._running[row] = self._running[-1]
                self._running.pop()

    # --- all at once ---

    def run(self, requests: Iterable[Request]) -> Iterator[list[TokenOutput]]:
        """The tokens of each text, in the order of the requests, as soon as a text has ended.

        Raises:
            UserError: a text cannot be continued (no_repeat_ngram, constraint), or as `add`; the
            others are canceled.
        """
        outputs: dict[int, list[TokenOutput]] = {}
        try:
            for request in requests:
                number = self.add(request)
                outputs[number] = []
                if request.sampling.n_beams > 1:  # a search is a batch of its own
                    self.cancel(number)
                    outputs[number] += self._beam_search(request)
            for number in list(outputs):
                while not (outputs[number] and outputs[number][-1].finish_reason):
                    for event in self._events_of(outputs.keys()):
                        outputs[event.number].append(event.output)
                yield outputs.pop(number)
        finally:
            self.cancel(*outputs)

    def complete(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """The finished text of each request, in order; raises as `run`."""
        requests = list(requests)
        for request, outputs in zip(requests, self.run(requests), strict=True):
            yield Completion.of(request.prompt, outputs)

    def _beam_search(self, request: Request) -> Iterator[TokenOutput]:
        if request.constraint is not None:
            problem = "not supported with beam search"
            raise UserError(request.constraint.where, problem, "Set n_beams to 1")
        refuse_tools(self.tools, "beam search", "Set n_beams to 1")
        end_ids = {self.tokenizer.eos_id, *request.stop_ids}
        sampling = request.sampling
        return beam_search(self.model, self.tokenizer, request.prompt, sampling, end_ids)

    def _lookup(self, request: Request) -> Iterator[TokenOutput]:
        is_constrained = request.constraint is not None
        refuse_tools(self.tools, "lookup", "Generate without lookup")
        check_lookup(
            request.sampling, is_constrained=is_constrained, deterministic=self.deterministic
        )
        if self._lookup_batch is None:  # kept: the next question of a chat reuses its cache
            vocab_size = self.tokenizer.vocab_size
            self._lookup_batch = DecodingBatch(self.model, slots=1, vocab_size=vocab_size)
        end_ids = {self.tokenizer.eos_id, *request.stop_ids}
        batch, prompt, sampling = self._lookup_batch, request.prompt, request.sampling
        return lookup_decoding(batch, self.tokenizer, prompt, sampling, end_ids)

    def _events_of(self, numbers: Iterable[int]) -> list[Event]:
        """One step; the events of other texts are kept for those who wait for them.

        Raises:
            UserError: one of the texts ended with an error.
        """
        events = self.step()
        self._undelivered = [event for event in events if event.number not in numbers]
        own = [event for event in events if event.number in numbers]
        for event in own:
            if event.error:
                raise event.error
        return own

    def stream(
        self,
        prompt: str | Prompt,
        sampling: SamplingConfig,
        *,
        stop_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
        lookup: bool = False,
    ) -> Iterator[TokenOutput]:
        """The tokens as they are generated: at each step, one of each unfinished sample, in order.

        Sample s depends on (prompt, seed, s), not on the number of samples. The last output of a
        sample has its finish_reason. With n_beams > 1 all outputs come at the end.

        Args:
            stop_ids: tokens that end a text like EOS and are not shown, such as those of a
            template.
            constraint: what each text must be, such as JSON.
            lookup: whether to draft tokens from the text so far (lookup.py): faster if it copies.
        """
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        request = Request(prompt, sampling, tuple(stop_ids), constraint=constraint)
        if lookup:
            yield from self._lookup(request)
            return
        if sampling.n_beams > 1:
            yield from self._beam_search(request)
            return
        samples = range(sampling.n_samples)
        unfinished = {self.add(replace(request, sample=sample)) for sample in samples}
        try:
            while unfinished:
                for event in self._events_of(unfinished):
                    if event.output.finish_reason:
                        unfinished.discard(event.number)
                    yield event.output
        finally:
            self.cancel(*unfinished)

    def generate(
        self,
        prompt: str | Prompt,
        sampling: SamplingConfig,
        *,
        stop_ids: Iterable[int] = (),
        constraint: Constraint | None = None,
    ) -> list[Completion]:
        """The finished texts, `n_samples` of them; the arguments are those of `stream`."""
        prompt = self.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        outputs: list[list[TokenOutput]] = [[] for _ in range(sampling.n_samples)]
        for output in self.stream(prompt, sampling, stop_ids=stop_ids, constraint=constraint):
            outputs[output.sample].append(output)
        return [Completion.of(prompt, of_sample) for of_sample in outputs]
