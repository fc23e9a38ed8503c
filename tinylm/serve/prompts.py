"""From a request to what the engine generates: prompts as ids that fit, and the length of the text."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from tinylm.common.errors import UserError
from tinylm.generate.engine import Request
from tinylm.generate.output import Prompt
from tinylm.rows.conversation import Turn
from tinylm.serve.errors import bad_request, of_user_error
from tinylm.serve.models import ServedModel
from tinylm.serve.schema import ChatRequest, CompletionRequest, Generation, Message

DEFAULT_TOKENS = 16  # of a plain completion, as in OpenAI's API


async def chat_requests(served: ServedModel, body: ChatRequest) -> list[Request]:
    """The texts that a chat asks for; without a limit they may fill the context.

    Raises:
        ApiError: it is a base model, or the conversation cannot be formatted or is too long.
    """
    if body.continue_final_message:
        *messages, begun = body.messages
        ids = await conversation_ids(served, messages) + await text_ids(served, begun.text)
    else:
        ids = await conversation_ids(served, body.messages)
    limit = body.max_completion_tokens or body.max_tokens or served.context
    stop_ids = served.template.stop_ids(served.tokenizer)
    n_alternatives = body.top_logprobs or 0
    return _requests(served, body, [ids], limit, stop_ids, n_alternatives, "messages")


async def completion_requests(served: ServedModel, body: CompletionRequest) -> list[Request]:
    """The texts that a plain completion asks for; raises as `chat_requests`."""
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            prompts.append(await text_ids(served, prompt) or [served.tokenizer.eos_id])
        else:
            require_known(served, prompt, "prompt")
            prompts.append(prompt)
    # Only a prompt with its scores: no request has less than one token, and none is generated.
    limit = DEFAULT_TOKENS if body.max_tokens is None else max(body.max_tokens, 1)
    return _requests(served, body, prompts, limit, (), body.logprobs or 0, "prompt")


async def conversation_ids(served: ServedModel, messages: Sequence[Message]) -> list[int]:
    """A conversation in the model's template, up to where its answer begins."""
    if served.template is None:
        raise bad_request(
            "This is a base model, which continues text and has no chat template; "
            "use /v1/completions.",
            "model",
        )
    if not messages or messages[-1].role != "user":
        raise bad_request("The last message must be from the user.", "messages")
    turns = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, message.text))
    if turns[0].role != "system" and served.loaded.system is not None:
        turns.insert(0, Turn("system", served.loaded.system))
    async with served.encoding:
        try:
            return await asyncio.to_thread(
                served.template.prompt_ids, tuple(turns), served.tokenizer
            )
        except UserError as error:
            raise of_user_error(error, "messages") from None


async def text_ids(served: ServedModel, text: str) -> list[int]:
    """The ids of a text."""
    async with served.encoding:
        try:
            return await asyncio.to_thread(served.tokenizer.encode, text)
        except UserError as error:
            raise of_user_error(error, "prompt") from None


def require_known(served: ServedModel, ids: Sequence[int], param: str) -> None:
    """Raise an ApiError for an id that the model does not have."""
    n_ids = served.tokenizer.vocab_size
    if ids and max(ids) >= n_ids:
        raise bad_request(f"Token ids must be below {n_ids}.", param)


def _requests(
    served: ServedModel,
    body: Generation,
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop_ids: tuple[int, ...],
    n_alternatives: int,
    param: str,
) -> list[Request]:
    """`n` texts of each prompt, one prompt after the other."""
    constraint = None if body.response_format is None else body.response_format.constraint
    requests = []
    for ids in prompts:
        if len(ids) > served.context:
            raise bad_request(
                f"This model's maximum context length is {served.context} tokens, "
                f"but the prompt has {len(ids)}.",
                param,
                "context_length_exceeded",
            )
        # The last token is not read, so a full context has room for one.
        room = served.context - len(ids) + 1
        sampling = body.sampling(min(limit, room))
        request = Request(
            Prompt(tuple(ids)),
            sampling,
            stop_ids,
            n_alternatives=n_alternatives,
            constraint=constraint,
        )
        requests += [replace(request, sample=sample) for sample in range(body.n_choices)]
    return requests
