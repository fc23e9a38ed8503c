"""README.md of an export, and the first question to the exported model.

The question fits the model: a message for a model with a chat template, text that its tokenizer can
write for others, and an answer that fits in its context.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tinylm.checkpoint.info import CheckpointInfo
from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError, printable
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config
from tinylm.interchange.gguf_tokenizer import vocabulary_of
from tinylm.model.decoder import count_parameters
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import CharTokenizer

# --- the first question ---


@dataclass(frozen=True)
class FirstQuestion:
    """What the printed command and the card ask the model."""

    text: str
    is_message: bool
    """whether it is a user's message, written by the chat template"""
    max_new_tokens: int
    """length of the answer, at most what is left of the context"""

    @property
    def argument(self) -> str:
        """The Python literal that `pipeline` takes."""
        if self.is_message:
            return f'[{{"role": "user", "content": "{self.text}"}}]'
        return f'"{self.text}"'

    @property
    def ids_code(self) -> str:
        """The Python expression for its ids."""
        if self.is_message:
            more = 'add_generation_prompt=True, return_tensors="pt"'
            return f'tokenizer.apply_chat_template({self.argument}, {more})["input_ids"]'
        return f'tokenizer({self.argument}, return_tensors="pt")["input_ids"]'


def first_question(
    tokenizer: Tokenizer, config: Config, template: str | None, *, has_template: bool
) -> FirstQuestion:
    """The first question to a model.

    Args:
        tokenizer: the model's.
        config: of its run.
        template: the name of the template of its fine-tuning; None for a base model.
        has_template: whether the export has a chat template.
    """
    text = writable_text("Hello" if has_template else "Once", tokenizer)
    n_prompt = len(tokenizer.encode(text))
    if has_template:
        try:
            turns = (Turn("user", text),)
            written = make_template(template or "chat_template", tokenizer)
            n_prompt = len(written.prompt_ids(turns, tokenizer))
        except UserError:  # a template of its authors that ours cannot train
            n_prompt += 32
    room = config.model.max_seq_len - n_prompt
    return FirstQuestion(text, has_template, max(1, min(config.sampling.max_new_tokens, room)))


def writable_text(text: str, tokenizer: Tokenizer) -> str:
    """`text`; for a tokenizer of other characters, some letters that it has."""
    if not isinstance(tokenizer, CharTokenizer) or set(text) <= set(tokenizer.characters):
        return text
    letters = [character for character in tokenizer.characters if character.isalpha()]
    return "".join(letters[:4]) or text


# --- the cards ---


def model_card(
    loaded: Loaded, model_type: str, tokenizer_class: str, question: FirstQuestion
) -> str:
    """README.md of a whole model: the model, its training data, and how to load it."""
    shape = loaded.model.config
    layers = f"{shape.n_layers} layers, width {shape.d_model}, {shape.n_heads} heads"
    rows = {
        "architecture": f"{model_type}: {layers}",
        "parameters": f"{count_parameters(loaded.model):,}",
        "context": f"{shape.max_seq_len:,} tokens",
        "tokenizer": f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} tokens",
    }
    specials = "The name of a special token in a text is text (`split_special_tokens`)."
    if question.is_message:
        specials = (
            "Unlike in the trainer, the name of a special token in a message becomes that token: "
            "in text from strangers, replace such names first."
        )
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---

# A language model trained with Tiny Transformer

{_table(rows | _training_rows(loaded.config, loaded.info))}

```python
from transformers import AutoModelForCausalLM, {tokenizer_class}

tokenizer = {tokenizer_class}.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
ids = {question.ids_code}
print(tokenizer.decode(model.generate(ids, max_new_tokens={question.max_new_tokens})[0]))
```

{serving_lines(loaded)}
Exported from a checkpoint in fp32, after comparing transformers' logits with the trainer's. No token is added before
a text. {specials}
"""


def serving_lines(loaded: Loaded) -> str:
    """How other programs serve the model; those that read GGUF only if it has the tokenizer."""
    context, checkpoint = loaded.model.config.max_seq_len, shlex.quote(loaded.info.path.name)
    text = f"""\
Other programs that serve it:

```bash
vllm serve . --max-model-len {context}
"""
    try:
        vocabulary_of(loaded.tokenizer)
    except UserError:
        return f"{text}```\n"
    merge = "" if loaded.config.lora is None else " --merge"
    return f"""\
{text}# from one GGUF file, where that format has the model
python -m tinylm export {checkpoint} model.gguf --format gguf --dtype q8_0{merge}
llama-server -m model.gguf -c {context}
ollama create model -f model.Modelfile
```
"""


def adapter_card(config: Config, info: CheckpointInfo, code: str) -> str:
    """README.md of an adapter: its base, its training data, and `code`, which loads the two."""
    assert config.lora is not None
    base = config.training.init_from or ""
    base_name = shown(base.removeprefix(HF_PREFIX))
    kind = "DoRA" if config.lora.dora else "LoRA"
    kind = f"rs{kind}" if config.lora.rslora else kind
    nf4 = ", trained on a base in nf4" if config.lora.base_weights == "nf4" else ""
    on_hub = base == HF_PREFIX + base_name
    rows = {
        "base": base_name,
        "adapter": f"{kind}, r {config.lora.r}, alpha {config.lora.alpha:g}{nf4}",
        "parameters": f"{info.parameters:,}",
    }
    note = "" if on_hub else "Replace the name of the base by its path. "
    front = "library_name: peft" + (f"\nbase_model: {base_name}" if on_hub else "")
    return f"""\
---
{front}
---

# An adapter trained with Tiny Transformer

{_table(rows | _training_rows(config, info))}

```python
{code}
```

{note}`python -m tinylm export CKPT OUT --merge` writes the whole model.
"""


def _table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {rows[name]} |" for name in rows)])


def _training_rows(config: Config, info: CheckpointInfo) -> dict[str, str]:
    """How the weights came to be."""
    origin = f"{info.step:,} optimizer steps, {info.tokens:,} tokens"
    names = [part.dataset for part in config.data.mix or ()]
    data = ", ".join(map(shown, names or [config.data.task or config.data.dataset]))
    if info.step == 0:
        origin = f"weights imported from {shown(config.tokenizer.path or '')}"
        data = "not known"
    if config.training.init_from is not None:
        origin += f", from {shown(config.training.init_from.removeprefix(HF_PREFIX))}"
    val_loss = "not measured"
    if info.val_loss is not None:
        val_loss = f"{info.val_loss:.4f} nats a token"
    return {"training": f"{info.stage}, {origin}", "data": data, "validation loss": val_loss}


def shown(name: str) -> str:
    """The name of a data set or model for strangers: on the hub, the whole name; of a path,
    only the last part.
    """
    is_path = Path(name).is_absolute() or Path(name).exists()
    return printable(Path(name).name if is_path else name).replace("|", "\\|")
