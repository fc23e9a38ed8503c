"""Hugging Face models with the interface of `Decoder`, so that training,
evaluation and sampling use them unchanged.

In reading order: `HFModel`, a decoder-only model; `HFSeq2Seq`, an encoder-decoder
such as T5; `model_sizes`, their config in our names; and two checks of how a model computes.
`hf_files` reads them from disk.
"""

# B batch · T positions · S positions of a prompt · D model width · V vocabulary

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tinylm.common.errors import UserError, first_line
from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import Features, positions_in_documents
from tinylm.model.hf_cache import HFCache
from tinylm.tokens.example_rows import split_answer
from tinylm.tokens.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

# T5's relative positions have no limit; it was trained on this many
# (Raffel et al. 2020, section 3.1.2).
T5_POSITIONS = 512


# --- decoder-only models ---


@dataclass(frozen=True)
class HFHead:
    """The output layer of a Hugging Face model, used as `Head` is.

    A bias, as GPT-J and Phi have, is a column of the weight: the hidden states end with a 1 for it.

        z = W h + b = [W b] [h 1]ᵀ
    """

    layer: nn.Linear
    softcap: float | None
    """the logits are softcap · tanh(W h / softcap), as in Gemma 2; None: W h"""

    @property
    def weight(self) -> Tensor:
        """W (V, D), or [W b] (V, D + 1)."""
        if self.layer.bias is None:
            return self.layer.weight
        return torch.cat((self.layer.weight, self.layer.bias[:, None]), dim=1)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits of hidden states."""
        logits = self.layer(hidden[..., : self.layer.in_features])
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class HFModel(nn.Module):
    """A Hugging Face decoder-only language model with the interface of `Decoder`.

    `config` has only its sizes; how it computes is in `inner.config`.
    """

    has_encoder = False
    has_independent_rows = False

    def __init__(self, inner: PreTrainedModel):
        super().__init__()
        self.inner = inner
        self.config = model_sizes(inner.config)
        settings = inner.config.to_dict()
        # Cohere multiplies its logits, Granite divides them; here, the hidden states before the head.
        self.scale = (settings.get("logit_scale") or 1.0) / (settings.get("logits_scaling") or 1.0)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self.inner.get_input_embeddings()

    @property
    def head(self) -> HFHead:
        """The output layer; its matrix, bias and soft cap are all of it (`require_plain_head`)."""
        softcap = self.inner.config.to_dict().get("final_logit_softcapping")
        return HFHead(self.inner.get_output_embeddings(), softcap)

    @property
    def settings(self) -> str:
        """Its config.json, as `rebuild_hf_model` takes it."""
        return json.dumps(self.inner.config.to_dict())

    def forward(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        cache: HFCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of ids (B, T)."""
        return self.head(self.features(input_ids, document_ids=document_ids, cache=cache).hidden)

    def features(
        self,
        input_ids: Tensor,
        *,
        document_ids: Tensor | None = None,
        cache: HFCache | None = None,
    ) -> Features:
        """Everything but the head; the arguments are those of `Decoder.features`."""
        if cache is not None and document_ids is not None:
            raise ValueError(
                "a cache holds one document a row: give document_ids or a cache, not both"
            )
        n_new = input_ids.size(1)
        length = self._length_after(n_new, cache)
        if cache is not None and len(input_ids) > 1:
            is_new = not cache.lengths.all()
            if is_new or cache.fixed_shapes or not self.can_pad:
                return self._features_by_row(input_ids, cache)
            return self._features_padded(input_ids, cache)
        if document_ids is None:
            positions = torch.arange(length - n_new, length, device=input_ids.device)
            positions = positions.expand_as(input_ids)  # (B, T)
        else:  # transformers stops attention where positions start again at 0
            positions = positions_in_documents(document_ids)  # (B, T)
        output = self.inner.base_model(
            input_ids=input_ids, position_ids=positions, **self._cache_arguments(cache)
        )
        if cache is not None:
            cache.lengths += n_new
        return self._as_features(output.last_hidden_state)

    def _features_padded(self, input_ids: Tensor, cache: HFCache) -> Features:
        """`features` of a batch with a cache, its rows padded on the left."""
        batch = cache.padded_batch()
        n_new = input_ids.size(1)
        positions = cache.lengths[:, None] + torch.arange(n_new)  # (B, T)
        output = self.inner.base_model(
            input_ids=input_ids,
            position_ids=positions.to(input_ids.device),
            attention_mask=batch.mask(n_new, input_ids.device),
            past_key_values=batch.inner,
            use_cache=True,
        )
        cache.lengths += n_new
        return self._as_features(output.last_hidden_state)

    @cached_property
    def can_pad(self) -> bool:
        """Whether rows of different lengths can be one padded batch: tried once, since not every
        architecture of transformers keeps its word.
        """
        ids = _few_ids(self).expand(2, -1)  # (2, T)
        together, apart = self.new_cache(2), self.new_cache(2)
        together.fixed_shapes = True
        new = ids[:, -1:]
        with torch.inference_mode():
            for row, n in enumerate((ids.size(1) - 1, 1)):
                for cache in (together, apart):
                    self.features(ids[row : row + 1, :n], cache=cache.rows(row, row + 1))
            expected = self.features(new, cache=together).hidden
            if not apart.is_plain:
                return False
            found = self._features_padded(new, apart).hidden
        tolerance = 1e-3 if found.dtype == torch.float32 else 5e-2
        return torch.allclose(found, expected, atol=tolerance, rtol=tolerance)

    def _features_by_row(
        self, input_ids: Tensor, cache: HFCache, **extra_inputs: Tensor
    ) -> Features:
        """`features` of a batch with a cache."""
        rows = []
        for row in range(len(input_ids)):
            of_row = {name: value[row : row + 1] for name, value in extra_inputs.items()}
            one = cache.rows(row, row + 1)
            rows.append(self.features(input_ids[row : row + 1], cache=one, **of_row).hidden)
        hidden = torch.cat(rows)  # (B, T, D)
        return Features(hidden, hidden.new_zeros((), dtype=torch.float32))

    def _as_features(self, hidden: Tensor) -> Features:
        """The last hidden states (B, T, D) as the head takes them."""
        hidden = hidden * self.scale
        if self.head.layer.bias is not None:
            hidden = F.pad(hidden, (0, 1), value=1.0)  # (B, T, D + 1)
        return Features(hidden, hidden.new_zeros((), dtype=torch.float32))

    def _length_after(self, n_new: int, cache: HFCache | None) -> int:
        """The number of positions with `n_new` more; ValueError if the model has not as many."""
        length = n_new if cache is None else cache.length + n_new
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} positions are more than max_seq_len ({self.config.max_seq_len})"
            )
        return length

    def logits_and_hidden(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, T, V) of transformers' own forward, and our hidden states (B, T, D),
        to compare them.
        """
        return self.inner(input_ids=ids, use_cache=False).logits, self.features(ids).hidden

    def checkpoint_gradients(self) -> None:
        """Recompute each block in the backward pass from now on (model.gradient_checkpointing)."""
        self.inner.activation_checkpointing_enable({"use_reentrant": False})

    def resize(self, vocab_size: int) -> None:
        """Give embedding and head `vocab_size` rows; new ones are zero."""
        with quiet_transformers():
            self.inner.resize_token_embeddings(vocab_size, mean_resizing=False)
        self.config = model_sizes(self.inner.config)

    def new_cache(self, batch_size: int, max_len: int | None = None) -> HFCache:
        """An empty cache for `max_len` positions of each row."""
        limit = max_len or self.config.max_seq_len
        return HFCache(batch_size, limit, self._new_inner_cache)

    def _cache_arguments(self, cache: HFCache | None) -> dict[str, Any]:
        """A cache of one row as transformers' models take it."""
        if cache is None:
            return {"use_cache": False}
        return {"past_key_values": cache.inner_of(0), "use_cache": True}

    def _new_inner_cache(self) -> Cache:
        from transformers import DynamicCache

        return DynamicCache(config=self.inner.config)


# --- encoder-decoders ---


class HFSeq2Seq(HFModel):
    """A Hugging Face encoder-decoder, such as T5: the encoder reads the prompt and EOS,
    the decoder writes the answer.

        prompt ids (B, S) ─▶ encoder ─▶ (B, S, D) ─┐
        start, answer ids (B, T) ─▶ decoder ───────┴─▶ hidden (B, T, D) ─▶ head ─▶ logits of answer, EOS

    `features` takes the decoder's ids and, as `prompt_ids`, the encoder's. Because `has_encoder` is
    true, sampling gets them from `decoder_start` and training from `prepare_batch`.
    """

    has_encoder = True

    def __init__(self, inner: PreTrainedModel):
        super().__init__(inner)
        settings = inner.config.to_dict()
        eos_id = settings["eos_token_id"]
        self.start_id: int = settings["decoder_start_token_id"]
        self.end_id: int = eos_id[0] if isinstance(eos_id, list) else eos_id
        # The first T5 scales the hidden states before the head; v1.1 and FLAN-T5 do not.
        self.scale = self.config.d_model**-0.5 if settings.get("scale_decoder_outputs") else 1.0

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, *, prompt_ids: Tensor, cache: HFCache | None = None
    ) -> Tensor:
        """Logits (B, T, V) of the decoder's ids (B, T) after prompts (B, S)."""
        return self.head(self.features(input_ids, prompt_ids=prompt_ids, cache=cache).hidden)

    def features(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        prompt_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: HFCache | None = None,
    ) -> Features:
        """Everything but the head, of the decoder's ids (B, T).

        Args:
            input_ids: (B, T) ids of the decoder; with a cache, only the new ones.
            prompt_ids: (B, S), or (1, S) for one prompt of all rows; not needed once it is cached;
                IGNORE_INDEX after the end of a shorter prompt.
            document_ids: must be None: an encoder reads one prompt a row.
            cache: keys and values of earlier positions; the prompt is encoded only the first time.
        """
        self._length_after(input_ids.size(1), cache)
        encoded_prompts = None if cache is None else cache.texts[0].encoded_prompt
        if (prompt_ids is None and encoded_prompts is None) or document_ids is not None:
            raise ValueError(
                "an encoder-decoder reads one prompt a row: give prompt_ids, and no document_ids"
            )
        if prompt_ids is not None:
            prompt_ids = prompt_ids.expand(len(input_ids), -1)  # (B, S)
        if cache is not None and len(input_ids) > 1:
            extra_inputs = {} if prompt_ids is None else {"prompt_ids": prompt_ids}
            return self._features_by_row(input_ids, cache, **extra_inputs)
        if encoded_prompts is None:
            encoded_prompts = self._encode(prompt_ids)
        encoded, mask = encoded_prompts  # (B, S, D), (B, S)
        output = self.inner.get_decoder()(
            input_ids=input_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=mask,
            **self._cache_arguments(cache),
        )
        if cache is not None:
            cache.lengths += input_ids.size(1)
            cache.texts[0].encoded_prompt = encoded_prompts
        return self._as_features(output.last_hidden_state)

    def _encode(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's output (B, S, D) for prompts (B, S), and its attention mask (B, S),
        1 for real ids.
        """
        is_real = prompt_ids != IGNORE_INDEX
        ids = prompt_ids.masked_fill(~is_real, self.end_id)
        mask = is_real.long()
        output = self.inner.get_encoder()(input_ids=ids, attention_mask=mask)
        return output.last_hidden_state, mask

    def decoder_start(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The decoder's start ids for each prompt,
        and the prompts as extra inputs of `features`.
        """
        rows = [torch.tensor([*prompt, self.end_id]) for prompt in prompts]
        prompt_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        starts = [[self.start_id] for _ in prompts]
        return starts, {"prompt_ids": prompt_ids.to(self.embedding.weight.device)}

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Padded rows of one example as inputs of encoder and decoder;
        of several answers in a row the last is trained.

        row          question answer EOS          (one row, the question's labels are IGNORE_INDEX)
        prompt_ids   question EOS                 (encoder)
        input_ids    start answer                 (decoder)
        labels       answer EOS
        """
        # Split each row into the prompt and its last answer.
        rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        pairs = [split_answer(ids, labels) for ids, labels in rows]
        starts, extra_inputs = self.decoder_start([prompt for prompt, _ in pairs])
        # Pad the answers: they are the labels.
        answers = [torch.tensor(answer or [IGNORE_INDEX]) for _, answer in pairs]
        labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)
        # The decoder reads them one position later, after its start id; padding has no label,
        # so any id will do.
        input_ids = torch.cat((torch.tensor(starts), labels[:, :-1]), dim=1)  # (B, T)
        input_ids = input_ids.masked_fill(input_ids == IGNORE_INDEX, self.end_id)
        device = batch["input_ids"].device
        inputs = {"input_ids": input_ids.to(device), "labels": labels.to(device)}
        return batch | extra_inputs | inputs

    def logits_and_hidden(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in `HFModel`, with `ids` for both sides."""
        theirs = self.inner(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        return theirs, self.features(ids, prompt_ids=ids).hidden

    def _new_inner_cache(self) -> Cache:
        from transformers import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())


# --- sizes ---


def model_sizes(config: PreTrainedConfig, where: str = "config.json") -> ModelConfig:
    """The sizes of a Hugging Face model in our names.

    Raises:
        UserError: one is missing or out of bounds.
    """
    settings = config.to_dict()
    # Attributes of a config have common names: transformers translates GPT-2's n_embd and n_head.
    try:
        if config.is_encoder_decoder:
            n_positions = settings.get("n_positions", T5_POSITIONS)
            max_seq_len = settings.get("max_position_embeddings", n_positions)
        else:
            max_seq_len = config.max_position_embeddings
        width, n_heads = config.hidden_size, config.num_attention_heads
        sizes = ModelConfig(
            vocab_size=config.vocab_size,
            max_seq_len=max_seq_len,
            n_layers=config.num_hidden_layers,
            d_model=width,
            n_heads=n_heads,
            head_dim=settings.get("head_dim") or settings.get("d_kv") or width // n_heads,
            tie_embeddings=config.tie_word_embeddings,
        )
        ModelConfig.model_validate(sizes.model_dump())  # what follows from them is in bounds too
        return sizes
    except (AttributeError, ArithmeticError) as error:
        why = first_line(error)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{first['loc'][0]}: {first['msg']}"
    problem = f"the sizes of this {config.model_type} model are not known ({why})"
    raise UserError(where, problem, "Choose another model, such as Llama, Qwen2 or T5")


# --- checks ---


def require_plain_head(model: HFModel, where: object) -> None:
    """Raise a UserError if the logits are not hidden states times a matrix, soft-capped or not:
    what else is done to them would be ignored.
    """
    model.eval()
    with torch.inference_mode():
        logits, hidden = model.logits_and_hidden(_few_ids(model))
        head = model.head
        ours = hidden @ head.weight.T
        if head.softcap is not None:
            ours = head.softcap * (ours / head.softcap).tanh()
    model.train()
    if not torch.allclose(logits, ours, atol=1e-4, rtol=1e-4):
        kind = model.inner.config.model_type
        problem = f"the logits of a {kind} model are not hidden states times a matrix"
        raise UserError(where, problem, "Choose another model")


def check_packing(model: HFModel) -> None:
    """Raise a UserError if the model attends from one document of a packed row to another."""
    ids = _few_ids(model)
    half = ids.size(1) // 2
    document_ids = (torch.arange(ids.size(1)) >= half).long()[None]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        packed = model.features(ids, document_ids=document_ids).hidden[:, half:]
        alone = model.features(ids[:, half:]).hidden
    model.train(was_training)
    if not torch.allclose(packed, alone, atol=1e-4, rtol=1e-4):
        kind = model.inner.config.model_type
        problem = f"a {kind} model does not keep the examples of a packed row apart"
        raise UserError("data.packing", problem, "Set data.packing: padded")


def _few_ids(model: HFModel) -> Tensor:
    """Some ids (1, T) that the model has."""
    ids = torch.arange(min(8, model.config.max_seq_len))[None]
    return ids % model.embedding.num_embeddings


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without progress bars and warnings of transformers:
    what matters in them is an error of ours.
    """
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
