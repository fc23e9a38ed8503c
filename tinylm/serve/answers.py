"""The answers in OpenAI's shapes, whole or in chunks, from the tokens of the engine.

    ChatAnswer         chat.completion,  chat.completion.chunk    text without the template's spaces
    CompletionAnswer   text_completion                            `echo`: the prompt comes first

An answer takes the tokens one by one (`add`), which gives the chunks of a stream; at the end
`whole` is the answer of a request without stream.
"""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tinylm.generate.chat import StreamingStrip
from tinylm.generate.engine import Request
from tinylm.generate.output import Prompt, TokenOutput
from tinylm.generate.scoring import ScoredToken, score_prompts
from tinylm.serve.models import ServedModel
from tinylm.serve.prompts import chat_requests, completion_requests
from tinylm.serve.schema import ChatRequest, CompletionRequest
from tinylm.tokenizer.base import StreamDecoder, Tokenizer

FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
Json = dict[str, Any]


@dataclass
class Choice:
    """One text of an answer."""

    text: str = ""
    n_tokens: int = 0
    finish_reason: str | None = None
    logprobs: Json | None = None
    strip: StreamingStrip = field(default_factory=StreamingStrip)
    has_started: bool = False
    offsets: "Offsets | None" = None
    """where its tokens begin, if the request asks for log-probabilities"""


class Answer(ABC):
    """The answer to one request, while its tokens arrive."""

    prefix: str
    """of the id"""
    kind: str
    """`object` of the whole answer"""
    chunk_kind: str
    """`object` of a chunk"""

    def __init__(self, body: ChatRequest | CompletionRequest):
        self.body = body
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.choices: list[Choice] = []
        self.n_prompt_tokens = 0
        self.served: ServedModel | None = None
        self.prompts: list[Prompt] = []

    async def start(self, served: ServedModel) -> list[Request]:
        """The texts to generate; raises an ApiError if the request does not suit the model."""
        self.served = served
        requests = await self._requests(served)
        self.choices = [Choice() for _ in requests]
        self.prompts = [request.prompt for request in requests[:: self.body.n_choices]]
        self.n_prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        return requests

    def add(self, index: int, output: TokenOutput) -> Iterator[Json]:
        """Add the next token of a text, and give its chunks."""
        choice = self.choices[index]
        choice.n_tokens += 1
        if output.finish_reason is not None:
            choice.finish_reason = FINISH_REASONS[output.finish_reason]
        yield from self._chunks(index, choice, output)

    @property
    def usage(self) -> Json:
        """Tokens that were read and generated."""
        n_new = sum(choice.n_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.n_prompt_tokens,
            "completion_tokens": n_new,
            "total_tokens": self.n_prompt_tokens + n_new,
        }

    def whole(self) -> Json:
        """The answer without stream."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self.choices)]
        return self._frame(self.kind, choices) | {"usage": self.usage}

    def usage_chunk(self) -> Json:
        """The last chunk of a stream, if the request asks for usage."""
        return self._frame(self.chunk_kind, []) | {"usage": self.usage}

    def _frame(self, kind: str, choices: list[Json]) -> Json:
        name = self.served.name
        head = {"id": self.id, "object": kind, "created": self.created, "model": name}
        return head | {"choices": choices}

    async def score_prompts(self) -> None:
        """Compute what is needed of the prompts before the first token: nothing, without `echo`."""
        return

    def without_tokens(self) -> list[Json] | None:
        """The chunks of an answer that has only the prompts; None if there are tokens to generate."""
        return None

    @abstractmethod
    async def _requests(self, served: ServedModel) -> list[Request]: ...

    @abstractmethod
    def _chunks(self, index: int, choice: Choice, output: TokenOutput) -> Iterator[Json]: ...

    @abstractmethod
    def _whole(self, index: int, choice: Choice) -> Json: ...


class ChatAnswer(Answer):
    """The answer to POST /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: ChatRequest

    async def _requests(self, served: ServedModel) -> list[Request]:
        return await chat_requests(served, self.body)

    def _chunks(self, index: int, choice: Choice, output: TokenOutput) -> Iterator[Json]:
        text = choice.strip(output.text)
        choice.text += text
        logprobs = None
        # The token that ends an answer has no text, and no entry in OpenAI's lists.
        if self.body.logprobs and output.finish_reason != "eos":
            entry = token_entry(self.served.tokenizer, output)
            logprobs = {"content": [entry], "refusal": None}
            choice.logprobs = choice.logprobs or {"content": [], "refusal": None}
            choice.logprobs["content"].append(entry)
        if not choice.has_started:
            choice.has_started = True
            yield self._chunk(index, {"role": "assistant", "content": ""})
        if text or logprobs:
            yield self._chunk(index, {"content": text}, logprobs)
        if choice.finish_reason:
            yield self._chunk(index, {}, None, choice.finish_reason)

    def _chunk(
        self, index: int, delta: Json, logprobs: Json | None = None, reason: str | None = None
    ) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._frame(self.chunk_kind, [choice])

    def _whole(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }


class CompletionAnswer(Answer):
    """The answer to POST /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    body: CompletionRequest

    def __init__(self, body: CompletionRequest):
        super().__init__(body)
        self.echoes: list[tuple[str, Json | None]] = []
        """text and log-probabilities of each prompt"""

    async def _requests(self, served: ServedModel) -> list[Request]:
        return await completion_requests(served, self.body)

    async def score_prompts(self) -> None:
        """Texts of the prompts, with log-probabilities if they are asked for."""
        served = self.served
        if not self.body.echo:
            return
        scores: list[list[ScoredToken]] = []
        if self.body.logprobs is not None:
            n = self.body.logprobs
            for prompt in self.prompts:  # one by one: the texts of others continue in between
                scores += await served.worker.call(
                    lambda engine, prompt=prompt: score_prompts(engine, [prompt], n_alternatives=n)
                )
        for number, prompt in enumerate(self.prompts):
            given = self.body.prompts[number]
            text = given if isinstance(given, str) else served.tokenizer.decode(prompt.ids)
            logprobs = None
            if scores:
                offsets = Offsets(served.tokenizer.stream())
                logprobs = completion_logprobs(served.tokenizer, scores[number], offsets)
            self.echoes.append((text, logprobs))

    def without_tokens(self) -> list[Json] | None:
        """The prompts with their scores, if `max_tokens` is 0."""
        if self.body.max_tokens != 0:
            return None
        chunks: list[Json] = []
        for index, choice in enumerate(self.choices):
            choice.finish_reason = FINISH_REASONS["length"]
            chunks += self._chunks(index, choice, None)
        return chunks

    def _chunks(self, index: int, choice: Choice, output: TokenOutput | None) -> Iterator[Json]:
        tokenizer = self.served.tokenizer
        text, logprobs = "", None
        if self.body.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self.echoes and not choice.has_started:
            text, of_prompt = self.echoes[index // self.body.n_choices]
            _extend(logprobs, of_prompt)
        choice.has_started = True
        if logprobs is not None:
            choice.offsets = choice.offsets or Offsets(tokenizer.stream(), len(text))
            if output is not None:
                _extend(logprobs, completion_logprobs(tokenizer, [output], choice.offsets))
            choice.logprobs = choice.logprobs or {name: [] for name in logprobs}
            _extend(choice.logprobs, logprobs)
        if output is not None:
            text += output.text
        choice.text += text
        if text or logprobs or choice.finish_reason:
            part = {"index": index, "text": text, "logprobs": logprobs}
            part["finish_reason"] = choice.finish_reason
            yield self._frame(self.chunk_kind, [part])

    def _whole(self, index: int, choice: Choice) -> Json:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": choice.logprobs,
            "finish_reason": choice.finish_reason,
        }


def _extend(logprobs: Json | None, more: Json | None) -> None:
    for name, values in (more or {}).items():
        logprobs[name] += values


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token as text; half a character as `bytes:\xe2`, as OpenAI writes it."""
    if token_id in tokenizer.special_names:
        return tokenizer.special_names[token_id]
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_entry(tokenizer: Tokenizer, output: TokenOutput) -> Json:
    """A token of a chat with its alternatives."""

    def entry(token_id: int, log_prob: float) -> Json:
        data = list(tokenizer.token_bytes(token_id))
        return {"token": token_name(tokenizer, token_id), "logprob": log_prob, "bytes": data}

    best = [entry(token_id, log_prob) for token_id, log_prob in output.alternatives]
    return entry(output.token_id, output.log_prob) | {"top_logprobs": best}


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[ScoredToken | TokenOutput], offsets: "Offsets"
) -> Json:
    """The lists of a plain completion; the token itself is among its alternatives, as OpenAI's is."""
    lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        name = token_name(tokenizer, token.token_id)
        best: dict[str, float] | None = None
        if token.log_prob is not None:
            best = {name: token.log_prob}
            for token_id, log_prob in token.alternatives:
                other = token_name(tokenizer, token_id)
                best[other] = max(log_prob, best.get(other, log_prob))
        lists["tokens"].append(name)
        lists["token_logprobs"].append(token.log_prob)
        lists["top_logprobs"].append(best)
        lists["text_offset"].append(offsets.next(token.token_id))
    return lists


class Offsets:
    """Where each token begins in a text, in characters. A special token has none, and a token that is
    part of a character begins where the character does.

    >>> from tinylm.tokenizer.byte_char import ByteTokenizer
    >>> offsets = Offsets(ByteTokenizer().stream())
    >>> [offsets.next(byte) for byte in "aé!".encode()]
    [0, 1, 1, 2]
    """

    def __init__(self, characters: StreamDecoder, start: int = 0):
        self.characters, self.end = characters, start

    def next(self, token_id: int) -> int:
        """The first character of the next token."""
        start = self.end
        self.end += len(self.characters.feed(token_id))
        return start
