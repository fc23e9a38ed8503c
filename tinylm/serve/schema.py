"""The requests that the server answers: the fields of OpenAI's API, their types and bounds.

A field that is neither in a model here nor in `IGNORED` is an error, so that a misspelled setting is
reported. The answers are in answers.py.
"""

import logging
import secrets
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tinylm.config.schema import SamplingConfig
from tinylm.generate.constraint import Constraint

logger = logging.getLogger(__name__)

# Fields of OpenAI's API that change nothing in the text here. They are accepted and logged once.
IGNORED = frozenset(
    {
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Fields that would change the text. Accepted with the values that ask for nothing.
UNSUPPORTED = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}
MAX_TOKENS = 1_000_000
MAX_PROMPTS = 1024
MAX_N = 128
MAX_LOGPROBS = 20

Limit = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
# Lists end at their first wrong item: an error for each of two million takes half a minute.
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompts = Field(max_length=MAX_PROMPTS, fail_fast=True)

_logged: set[str] = set()


class Body(BaseModel):
    """A request: no type is converted to another, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, harmless in UNSUPPORTED.items():
            value = fields.get(name)
            if name in cls.model_fields or value in harmless:
                continue
            raise ValueError(f"{name} is not supported")
        dropped = (IGNORED | UNSUPPORTED.keys()) - cls.model_fields.keys()
        for name in sorted(dropped & fields.keys() - _logged):
            _logged.add(name)
            logger.info("the field %s of a request has no effect (logged once)", name)
        return {name: value for name, value in fields.items() if name not in dropped}


class StreamOptions(BaseModel):
    """What a stream contains besides the text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    include_usage: bool = False
    include_obfuscation: bool = False
    """padding against observers of the network; there is none here"""


class JsonSchema(BaseModel):
    """The JSON schema of the text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str = ""
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The format of the text."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def constraint(self) -> Constraint | None:
        """The same for the engine; None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return Constraint.json_schema({"type": "object"}, "response_format")
        return Constraint.json_schema(self.json_schema.json_schema, "response_format")

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and only then")
        return self


class Generation(Body):
    """The settings that chat and plain completions share."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """0 and -1: off, as in vLLM and llama.cpp"""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _stream_options_of_a_stream(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only valid with stream")
        return self

    @property
    def n_choices(self) -> int:
        """Texts of each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """The settings for the engine; a request without a seed gets a new one."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = secrets.randbits(31) if self.seed is None else self.seed % 2**31
        return SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=None if self.top_p is None else float(self.top_p),
            min_p=float(self.min_p) if self.min_p else None,
            presence_penalty=float(self.presence_penalty or 0),
            frequency_penalty=float(self.frequency_penalty or 0),
            repetition_penalty=float(self.repetition_penalty or 1),
            stop=stops,
            seed=seed,
        )


class CompletionRequest(Generation):
    """POST /v1/completions: a text to continue."""

    prompt: str | Ids | Annotated[list[str], Prompts] | Annotated[list[Ids], Prompts]
    echo: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    """0, only valid with echo: the prompt is scored, and nothing is generated"""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One or more prompts."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if prompt and isinstance(prompt[0], int) else prompt

    @model_validator(mode="after")
    def _has_prompts(self) -> "CompletionRequest":
        if not self.prompts:
            raise ValueError(f"prompt must have 1 to {MAX_PROMPTS} texts")
        return self

    @field_validator("max_tokens")
    @classmethod
    def _zero_tokens_of_an_echo(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value == 0 and not info.data.get("echo"):
            raise ValueError("0 is only valid with echo")
        return value


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["text", "input_text", "refusal"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    @property
    def text(self) -> str:
        """The whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatRequest(Generation):
    """POST /v1/chat/completions: a conversation to answer."""

    messages: Messages
    continue_final_message: bool = False
    """the last message is the beginning of the answer (as in vLLM)"""
    max_tokens: Limit | None = None
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        role = "assistant" if self.continue_final_message else "user"
        if self.messages[-1].role != role:
            raise ValueError(f"the last of messages must be from the {role}")
        return self


class TokenizeRequest(Body):
    """POST /tokenize: a text, or a conversation in the model's template.

    A text that is the name of a special token, and nothing else, is that token.
    """

    add_special_tokens: bool | None = None
    """no effect: a text gets none here"""
    prompt: str | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize: the ids of a text."""

    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
