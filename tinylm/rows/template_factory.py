"""The template that data.template names."""

from tinylm.rows.chat_template import ChatTemplate
from tinylm.rows.templates import IM_END, IM_START, WRITTEN, Template, marker_id
from tinylm.tokenizer.base import Tokenizer


def make_template(name: str, tokenizer: Tokenizer) -> Template:
    """The template that data.template calls `name`.

    Raises:
        UserError: the tokenizer lacks what the template needs.
    """
    if name == "chat_template":
        return ChatTemplate(tokenizer)
    if name == "chatml":
        for marker in (IM_START, IM_END):
            marker_id(tokenizer, marker)
    return WRITTEN[name]
