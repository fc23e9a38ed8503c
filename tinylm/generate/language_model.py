"""A trained model as a Python object: `tinylm.load` opens a checkpoint.

    model = tinylm.load("checkpoints/final.ckpt")
    model.generate("Attention is", max_new_tokens=40)    a text, or a list of texts for a list
    model.stream("Attention is")                         the same, piece by piece
    model.chat("What colour is snow?")                   an answer, in the template of its tuning
    model.score("The sky is", " blue")                   how well it expects a text
    model.tokenizer, model.model, model.config           the parts

Everything is done by the parts that the programs use: `Engine`, `format_prompt`, scoring.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from tinylm.checkpoint.load import Loaded
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.chat import FormattedPrompt, format_prompt
from tinylm.generate.engine import DEFAULT_SLOTS, Engine, Request
from tinylm.generate.scoring import ContinuationScore, encode_continuation, score_continuations
from tinylm.generate.weights import Precision, open_model, round_weights
from tinylm.rows.conversation import Conversation, Role, Turn

Message = Mapping[str, str]
"""a turn as OpenAI's API writes it: {"role": "user", "content": "..."}"""
ROLES = ("system", "user", "assistant")


class LanguageModel:
    """A language model, ready to generate text. Sampling settings are keyword arguments with the
    names of the config's `sampling` section; without them, those of the checkpoint count.

    It is used by one thread at a time.
    """

    def __init__(self, loaded: Loaded, engine: Engine):
        self.loaded, self.engine = loaded, engine
        self.config, self.tokenizer, self.model = loaded.config, engine.tokenizer, engine.model
        self.template = loaded.make_template(engine.tokenizer)

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> Any:
        """The continuation of a text, without the text; for a list of texts, a list. With
        `n_samples` above 1, a list of as many continuations in place of each.

        Raises:
            UserError: a sampling setting is unknown or out of range.
        """
        settings = self._sampling(sampling)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        formatted = [FormattedPrompt(self.engine.encode_prompt(text), ()) for text in prompts]
        texts = self._texts(formatted, settings)
        return texts[0] if isinstance(prompt, str) else texts

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """The continuation of a text, in pieces, as they are generated; raises as `generate`."""
        settings = self._one_text(sampling)
        return self._pieces(FormattedPrompt(self.engine.encode_prompt(prompt), ()), settings)

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        **sampling: Any,
    ) -> str:
        """The answer to a question, or to the last message of a conversation.

        Args:
            messages: a question, or messages of which the last one is the user's.
            system: the system message; None: that of the messages, else the most common one of
            the rows that the model was tuned on; "": none.

        Raises:
            UserError: it is a base model, a message is not as expected, or as `generate`.
        """
        settings = self._one_text(sampling)
        formatted = self._format(messages, system)
        [text] = self._texts([formatted], settings)
        return text.strip()

    def chat_stream(
        self,
        messages: str | Sequence[Message],
        *,
        system: str | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """The answer of `chat`, in pieces, as they are generated."""
        settings = self._one_text(sampling)
        return self._pieces(self._format(messages, system), settings)

    def score(self, prompt: str, target: str) -> ContinuationScore:
        """How well the model expects `target` after `prompt`: log-probabilities and ranks.

        Raises:
            UserError: the target has no token, or more than the context holds.
        """
        pair = encode_continuation(self.engine, prompt, target)
        return score_continuations(self.engine, [pair])[0]

    def _texts(self, formatted: Sequence[FormattedPrompt], settings: SamplingConfig) -> list[Any]:
        """The continuations of prompts, generated side by side."""
        requests = [
            Request(question.prompt, settings, question.stop_ids, sample)
            for question in formatted
            for sample in range(settings.n_samples)
        ]
        texts = [completion.text for completion in self.engine.complete(requests)]
        if settings.n_samples == 1:
            return texts
        n = settings.n_samples
        return [texts[start : start + n] for start in range(0, len(texts), n)]

    def _pieces(self, formatted: FormattedPrompt, settings: SamplingConfig) -> Iterator[str]:
        for output in self.engine.stream(formatted.prompt, settings, stop_ids=formatted.stop_ids):
            if output.text:
                yield output.text

    def _format(self, messages: str | Sequence[Message], system: str | None) -> FormattedPrompt:
        if self.template is None:
            raise UserError(
                self.loaded.info.path,
                "a base model, which continues text and does not answer questions",
                "Use generate, or fine-tune it first",
            )
        turns = (Turn("user", messages),) if isinstance(messages, str) else turns_of(messages)
        has_system = turns[0].role == "system"
        if system is not None and has_system:
            raise UserError("system", "is given, and the messages have one too", "Remove one")
        if system is None and not has_system:
            system = self.loaded.system
        return format_prompt(self.engine, turns, self.template, system=system or None)

    def _one_text(self, sampling: dict[str, Any]) -> SamplingConfig:
        settings = self._sampling(sampling)
        if settings.n_samples > 1:
            raise UserError("n_samples", "must be 1 here", "Use generate for several samples")
        return settings

    def _sampling(self, given: dict[str, Any]) -> SamplingConfig:
        """The checkpoint's sampling settings, with those that are given."""
        try:
            return SamplingConfig.model_validate({**self.config.sampling.model_dump(), **given})
        except ValidationError as invalid:
            error = invalid.errors()[0]
            names = ", ".join(SamplingConfig.model_fields)
            where = ".".join(map(str, error["loc"])) or "sampling"
            raise UserError(where, error["msg"], f"The settings are {names}") from None


def turns_of(messages: Sequence[Message]) -> Conversation:
    """A conversation from messages.

    Raises:
        UserError: there is none, a role or a content is not as expected, or the last message is not
            the user's.
    """
    turns = []
    for number, message in enumerate(messages):
        where = f"message {number + 1}"
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise UserError(where, f"role must be one of {', '.join(ROLES)}, got {role!r}")
        if not isinstance(content, str):
            raise UserError(where, f"content must be text, got {content!r}")
        turns.append(Turn(cast(Role, role), content))
    if not turns or turns[-1].role != "user":
        raise UserError("messages", "the last message must be the user's", "Add a question")
    return tuple(turns)


def load(
    path: str | PathLike[str],
    *,
    device: str = "auto",
    weights: Precision | None = None,
    slots: int = DEFAULT_SLOTS,
    deterministic: bool = False,
) -> LanguageModel:
    """The model in a checkpoint, an adapter merged into its base.

    Args:
        path: a checkpoint, such as checkpoints/final.ckpt.
        device: auto, cpu, cuda or mps.
        weights: fp32, bf16, int8 or int4; None: as in the checkpoint.
        slots: texts that are generated side by side.
        deterministic: whether a text must be the same to the last bit whatever is generated beside
            it.

    Raises:
        UserError: there is no such file or device, or the checkpoint is damaged or a verifier.
    """
    precisions = get_args(Precision)
    if weights is not None and weights not in precisions:
        raise UserError("weights", f"must be one of {', '.join(precisions)}, got {weights!r}")
    chosen, _ = pick_device(device, key="device")
    loaded = open_model(Path(path), chosen, weights)
    round_weights(loaded.model, loaded.tokenizer, weights)
    return LanguageModel(loaded, Engine.of(loaded, slots=slots, deterministic=deterministic))
