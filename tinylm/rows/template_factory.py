"""The template that data.template names."""

from dataclasses import replace

from tinylm.rows.chat_template import ChatTemplate
from tinylm.rows.templates import IM_END, IM_START, WRITTEN, AnswerApart, Template, marker_id
from tinylm.rows.tool_calls import check_tokenizer
from tinylm.tokenizer.base import Tokenizer


def make_template(
    name: str, tokenizer: Tokenizer, *, tools: str | None = None, has_encoder: bool = False
) -> Template:
    """The template that data.template calls `name`, for training an encoder-decoder if
    `has_encoder`; prompts are the same for all models.

    Args:
        tools: data.tools.

    Raises:
        UserError: the tokenizer lacks what the template or the tool needs.
    """
    if has_encoder:
        return AnswerApart(make_template(name, tokenizer))
    if tools is not None:
        check_tokenizer(tokenizer)
    if name == "chat_template":
        return ChatTemplate(tokenizer, has_tools=tools is not None)
    if name == "chatml":
        for marker in (IM_START, IM_END):
            marker_id(tokenizer, marker)
    return replace(WRITTEN[name], has_tools=tools is not None)
