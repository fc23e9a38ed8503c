"""Hugging Face models with our decoder's interface, so that training, evaluation and sampling take them as they are.

    folder or hub name ─▶ config.json, checked ─▶ safetensors, checked ─▶ HFModel, or HFSeq2Seq for T5 and its like

In reading order: `HFCache` and `HFModel`, the wrapper, and `HFSeq2Seq`, which has an encoder before the
decoder; `find_hf_model` and `HFModelFiles`, which read a model's files; `rebuild_hf_model`, which makes one from what a checkpoint of ours
holds. Files come from strangers: weights are read from safetensors alone, no code of a model's author is ever run, and
every name, shape and type is compared with what config.json asks for before memory is taken. What is no model that writes
text is refused.
"""


# B batch · T positions · S positions of a prompt · D model width · V vocabulary

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tinylm.common.errors import UserError, first_line, printable, require_package
from tinylm.common.hub import hub_errors, is_hub_name, require_hub
from tinylm.config.schema import ModelConfig
from tinylm.model.decoder import Features, positions_in_documents
from tinylm.tokenizer.hf_files import OLDER_VOCABULARIES, TOKENIZER_FILES
from tinylm.tokens.packing import IGNORE_INDEX, split_answer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
JSON_BYTES_LIMIT = 50_000_000  # the index of the largest published models has some megabytes
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
# T5's positions are relative and have no end; this many it was trained on (Raffel et al. 2020, section 3.1.2).
T5_POSITIONS = 512
# Keys of config.json that would make transformers run or fetch something else than its own model code.
REFUSED_KEYS = {
    "auto_map": "it asks for code of its author to be run, which this program never does",
    "quantization_config": "its weights are quantized, and training needs them whole",
}


class HFCache:
    """Keys and values of the positions so far, kept by transformers; the part of our `KVCache` that sampling uses."""

    def __init__(self, config: "PreTrainedConfig", max_len: int):
        from transformers import DynamicCache

        self.inner = DynamicCache(config=config)
        self.length, self.max_len, self.chunk = 0, max_len, max_len

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed."""
        self.inner.batch_select_indices(rows)


class HFModel(nn.Module):
    """A Hugging Face decoder-only language model, used like our `Decoder`.

    `config` holds its sizes in our names and nothing else of it: how it computes is in its own config.
    """

    has_encoder = False

    def __init__(self, inner: "PreTrainedModel"):
        super().__init__()
        self.inner = inner
        self.config = sizes(inner.config)

    @property
    def embedding(self) -> nn.Embedding:
        """The layer that embeds tokens."""
        return self.inner.get_input_embeddings()

    @property
    def head(self) -> nn.Linear:
        """The layer that scores tokens, by its matrix alone (`_check_head`)."""
        return self.inner.get_output_embeddings()

    @property
    def settings(self) -> str:
        """Its config.json: what `rebuild_hf_model` takes."""
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
        length = input_ids.size(1) + (0 if cache is None else cache.length)
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} positions are more than max_seq_len ({self.config.max_seq_len})"
            )
        if cache is not None and document_ids is not None:
            raise ValueError(
                "a cache holds one document a row: give document_ids or a cache, not both"
            )
        if (
            document_ids is not None
        ):  # transformers keeps documents apart where positions start again
            positions = positions_in_documents(document_ids)
        else:
            positions = torch.arange(
                length - input_ids.size(1), length, device=input_ids.device
            ).expand_as(input_ids)
        past = (
            {"use_cache": False}
            if cache is None
            else {"past_key_values": cache.inner, "use_cache": True}
        )
        hidden = self.inner.base_model(
            input_ids=input_ids, position_ids=positions, **past
        ).last_hidden_state
        if cache is not None:
            cache.length = length
        return Features(hidden, hidden.new_zeros((), dtype=torch.float32))

    def compared(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) by transformers' own forward, and our hidden states (B, T, D), to be held against each other."""
        return self.inner(input_ids=ids, use_cache=False).logits, self.features(ids).hidden

    def checkpoint_gradients(self) -> None:
        """Recompute each block in the backward pass from now on, as model.gradient_checkpointing does in our decoder."""
        self.inner.activation_checkpointing_enable({"use_reentrant": False})

    def new_cache(self, batch_size: int, max_len: int | None = None) -> HFCache:
        """An empty cache for `max_len` positions; it takes any batch that is fed first."""
        return HFCache(self.inner.config, max_len or self.config.max_seq_len)


class Seq2SeqCache(HFCache):
    """The same for a decoder behind an encoder, with what the encoder has made of the prompt."""

    def __init__(self, max_len: int):
        from transformers import DynamicCache, EncoderDecoderCache

        self.inner = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.length, self.max_len, self.chunk = 0, max_len, max_len
        self.memory: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows `rows`, in that order, repeats allowed."""
        super().select(rows)
        if self.memory is not None:
            encoded, real = self.memory
            self.memory = encoded[rows], real[rows]


class HFSeq2Seq(HFModel):
    """A Hugging Face encoder-decoder, such as T5: its encoder reads the prompt, closed by EOS, its decoder writes the answer.

    `features` takes the decoder's ids and, as `prompt_ids`, the encoder's. Where `has_encoder` is true, sampling gets them
    from `decoder_start` and training from `prepare_batch`.
    """

    has_encoder = True

    def __init__(self, inner: "PreTrainedModel"):
        super().__init__(inner)
        settings = inner.config.to_dict()
        self.start_id: int = settings["decoder_start_token_id"]
        ends = settings["eos_token_id"]
        self.end_id: int = ends[0] if isinstance(ends, list) else ends
        # The first T5 scales what it hands to the head; v1.1 and FLAN-T5 do not.
        self.scale = self.config.d_model**-0.5 if settings.get("scale_decoder_outputs") else 1.0

    def forward(
        self, input_ids: Tensor, *, prompt_ids: Tensor, cache: HFCache | None = None
    ) -> Tensor:  # type: ignore[override]
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
            prompt_ids: (B, S), or (1, S) for one prompt of all rows; IGNORE_INDEX behind the end of a shorter one.
            document_ids: must be None: an encoder reads one prompt a row.
            cache: what was read before; the prompt is read the first time.
        """
        length = input_ids.size(1) + (0 if cache is None else cache.length)
        if length > self.config.max_seq_len:
            raise ValueError(
                f"{length} positions are more than max_seq_len ({self.config.max_seq_len})"
            )
        if prompt_ids is None or document_ids is not None:
            raise ValueError(
                "an encoder-decoder reads one prompt a row: give prompt_ids, and no document_ids"
            )
        assert cache is None or isinstance(cache, Seq2SeqCache)
        memory = None if cache is None else cache.memory
        encoded, real = memory or self._encode(prompt_ids.expand(len(input_ids), -1))
        past = (
            {"use_cache": False}
            if cache is None
            else {"past_key_values": cache.inner, "use_cache": True}
        )
        decoder = self.inner.get_decoder()
        hidden = decoder(
            input_ids=input_ids, encoder_hidden_states=encoded, encoder_attention_mask=real, **past
        ).last_hidden_state
        if cache is not None:
            cache.length, cache.memory = length, (encoded, real)
        return Features(hidden * self.scale, hidden.new_zeros((), dtype=torch.float32))

    def decoder_start(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[list[int]], dict[str, Tensor]]:
        """The decoder's start ids for each prompt, and the prompts as extra inputs of `features`."""
        rows = [torch.tensor([*prompt, self.end_id]) for prompt in prompts]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORE_INDEX)
        return [[self.start_id] for _ in prompts], {
            "prompt_ids": padded.to(self.embedding.weight.device)
        }

    def prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Padded rows of one example as inputs of encoder and decoder; of several answers in a row the last is trained."""
        pairs = [
            split_answer(*row)
            for row in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
        starts, extra_inputs = self.decoder_start([prompt for prompt, _ in pairs])
        answers = [torch.tensor(answer or [IGNORE_INDEX]) for _, answer in pairs]
        labels = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORE_INDEX)
        inputs = torch.cat((torch.tensor(starts), labels[:, :-1]), dim=1)
        inputs = inputs.masked_fill(
            inputs == IGNORE_INDEX, self.end_id
        )  # behind the end of an answer, where nothing is asked
        device = batch["input_ids"].device
        return batch | extra_inputs | {"input_ids": inputs.to(device), "labels": labels.to(device)}

    def compared(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in `HFModel`, with `ids` for both sides."""
        theirs = self.inner(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        return theirs, self.features(ids, prompt_ids=ids).hidden

    def new_cache(self, batch_size: int, max_len: int | None = None) -> Seq2SeqCache:
        """An empty cache for `max_len` positions of the decoder."""
        return Seq2SeqCache(max_len or self.config.max_seq_len)

    def _encode(self, prompt_ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of prompts (B, S), (B, S, D), and where they are real, (B, S)."""
        real = prompt_ids != IGNORE_INDEX
        ids = prompt_ids.masked_fill(~real, self.end_id)
        return self.inner.get_encoder()(
            input_ids=ids, attention_mask=real.long()
        ).last_hidden_state, real.long()


def sizes(config: "PreTrainedConfig", where: str = "config.json") -> ModelConfig:
    """The sizes of a Hugging Face model in our names.

    Raises:
        UserError: the model does not say how many positions it knows, or another size.
    """
    settings = config.to_dict()
    try:
        width, n_heads = (
            config.hidden_size,
            config.num_attention_heads,
        )  # transformers translates: GPT-2 calls them n_embd and n_head
        relative = settings.get(
            "max_position_embeddings", settings.get("n_positions", T5_POSITIONS)
        )
        return ModelConfig(
            vocab_size=config.vocab_size,
            max_seq_len=relative if config.is_encoder_decoder else config.max_position_embeddings,
            n_layers=config.num_hidden_layers,
            d_model=width,
            n_heads=n_heads,
            head_dim=settings.get("head_dim") or settings.get("d_kv") or width // n_heads,
            tie_embeddings=config.tie_word_embeddings,
        )
    except (AttributeError, ArithmeticError) as error:
        why = first_line(error)
    except ValidationError as error:
        why = f"{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}"
    raise UserError(
        f"{where}: the sizes of a {printable(config.model_type)} model cannot be told: {why}. Choose another model, such as Llama, Qwen2 or T5."
    )


# --- a model's files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFModelFiles:
    """A Hugging Face model on disk, its settings read and checked, its weights not read yet."""

    folder: Path
    config: "PreTrainedConfig"

    @property
    def sizes(self) -> ModelConfig:
        """Its sizes in our names."""
        return sizes(self.config)

    def load(self) -> HFModel:
        """The model in fp32.

        Raises:
            UserError: naming the file and the tensor that is damaged, missing, of another shape or not asked for.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = {}
        for file in self._weight_files():
            try:
                _check_types(file)
                weights |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{printable(file)}: not sound safetensors: {first_line(error)}. Download it again."
                ) from None
        return _assemble(self.config, weights, printable(self.folder))

    def _weight_files(self) -> list[Path]:
        """The files that hold the weights: one, or those that an index names."""
        single, index = (
            self.folder / "model.safetensors",
            self.folder / "model.safetensors.index.json",
        )
        if single.is_file():
            return [single]
        if not index.is_file():
            raise UserError(
                f"{printable(self.folder)}: no model.safetensors here. Weights in another format are not read: convert them to safetensors."
            )
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError(
                f"{printable(index)}: weight_map: expected an object from tensor to file. Download it again."
            )
        for name in shards.values():
            if (
                not isinstance(name, str)
                or not name.endswith(".safetensors")
                or Path(name).name != name
            ):
                raise UserError(
                    f"{printable(index)}: weight_map: {printable(repr(name))[:80]} is not the name of a safetensors file beside it. Do not use it."
                )
        return [self.folder / name for name in sorted(set(shards.values()))]


def find_hf_model(name: str) -> HFModelFiles:
    """The model in the folder `name` or, where nothing has that name here, of the Hugging Face hub.

    Raises:
        UserError: it is not there, or not a model that writes text and can be read without its author's code.
    """
    require_package("transformers")
    if not os.path.isdir(name) and (os.path.lexists(name) or not is_hub_name(name)):
        found = "is not a folder" if os.path.lexists(name) else "not found"
        raise UserError(
            f"{printable(name)}: {found}. Give a folder with config.json and model.safetensors, or a Hugging Face name such as gpt2."
        )
    folder = Path(name) if os.path.isdir(name) else _download(name)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{printable(folder)}: an adapter, not a whole model. Give the model that it belongs to."
        )
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{printable(folder)}: no config.json here. Give the folder of a Hugging Face model."
        )
    return HFModelFiles(folder, _read_config(_read_json(file), printable(file)))


def rebuild_hf_model(settings: str, weights: Mapping[str, Tensor]) -> HFModel:
    """The model that a checkpoint holds: its `settings`, and its weights by the names that `HFModel.state_dict` gives."""
    require_package("transformers")
    inner = {name.removeprefix("inner."): weight for name, weight in weights.items()}
    return _assemble(
        _read_config(json.loads(settings), "the checkpoint's hf_config"), inner, "the checkpoint"
    )


def _download(name: str) -> Path:
    """The folder in the hub library's cache that holds the model `name`."""
    from huggingface_hub import snapshot_download

    mend = "Give a local folder with config.json and model.safetensors."
    require_hub(name, mend)
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=[*MODEL_FILES, *TOKENIZER_FILES, *OLDER_VOCABULARIES]
            )
        )
    except (*hub_errors(), ValueError) as error:
        raise UserError(
            f"{name}: not a folder here, and the Hugging Face hub says: {first_line(error)}. {mend}"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > JSON_BYTES_LIMIT:
            raise UserError(f"{printable(file)}: larger than any such file is. Download it again.")
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(file)}: not readable JSON: {first_line(error)}. Download it again."
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{printable(file)}: expected a JSON object. Download it again.")
    return values


def _read_config(values: dict[str, Any], where: str) -> "PreTrainedConfig":
    """The settings as transformers has them, of a model that its own code can build."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
    )

    for key, why in REFUSED_KEYS.items():
        if values.get(key) is not None:
            raise UserError(f"{where}: {key}: {why}. Choose another model.")
    kind = values.get("model_type")
    settings = {key: value for key, value in values.items() if key != "model_type"}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(kind, **settings)
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
    ) as error:  # what its classes make of odd values
        raise UserError(
            f"{where}: transformers cannot read it: {first_line(error)}. Choose another model, or download it again."
        ) from None
    if type(config) not in (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if config.is_encoder_decoder
        else MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        raise UserError(
            f"{where}: model_type: {printable(kind)} is no model that writes text. Choose one, such as GPT-2, Llama, Qwen2 or T5."
        )
    for key in ("decoder_start_token_id", "eos_token_id") if config.is_encoder_decoder else ():
        if config.to_dict().get(key) is None:
            raise UserError(
                f"{where}: {key}: missing, and an encoder-decoder needs it. Download it again."
            )
    sizes(config, where)
    return config


# --- from settings and weights to a model -----------------------------------------------------------------------------


def _check_types(file: Path) -> None:
    """Refuse tensors that cannot be weights, from the file's header alone."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            kind = opened.get_slice(name).get_dtype()
            if kind not in WEIGHT_TYPES:
                raise UserError(
                    f"{printable(file)}: {printable(name)}: weights are {', '.join(WEIGHT_TYPES)}, found {kind}. Choose another model."
                )


def _assemble(config: "PreTrainedConfig", weights: Mapping[str, Tensor], where: str) -> HFModel:
    """The model with exactly these weights, in fp32, in training mode as ours is when it is built."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind, wrapper = (
        (AutoModelForSeq2SeqLM, HFSeq2Seq)
        if config.is_encoder_decoder
        else (AutoModelForCausalLM, HFModel)
    )
    with quiet_transformers():
        try:
            with torch.device("meta"):
                empty = kind.from_config(config, attn_implementation="sdpa")
        except (
            RuntimeError,
            ValueError,
            TypeError,
        ) as error:  # sizes that make no tensor; no such attention
            raise UserError(
                f"{where}: config.json: transformers cannot build it: {first_line(error)}. Choose another model."
            ) from None
        wanted, found = (
            sum(weight.numel() for weight in some)
            for some in (empty.parameters(), weights.values())
        )
        if wanted > found:  # else a config.json alone could ask for all memory
            raise UserError(
                f"{where}: config.json asks for {wanted:,} weights, and the files hold {found:,}. Download both again."
            )
        inner, report = type(empty).from_pretrained(
            None, config=config, state_dict=dict(weights), attn_implementation="sdpa", dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    for problem, key in (
        ("is not there", "missing_keys"),
        ("is not asked for", "unexpected_keys"),
        ("has another shape", "mismatched_keys"),
    ):
        names = [name if isinstance(name, str) else name[0] for name in report[key]]
        if names:
            raise UserError(
                f"{where}: {printable(min(names))}: a weight that {problem} by config.json. Download both again."
            )
    for weight in inner.parameters():
        weight.data = weight.data.clone()  # off the mapped file, which may be replaced
        weight.requires_grad_(True)
    model = wrapper(inner.train())
    _check_head(model, where)
    return model


def _check_head(model: HFModel, where: str) -> None:
    """Refuse a model whose logits are more than its hidden states times a matrix: a bias, a scale or a cap would be left out."""
    ids = torch.arange(min(8, model.config.max_seq_len))[None] % model.embedding.num_embeddings
    model.eval()
    with torch.inference_mode():
        theirs, hidden = model.compared(ids)
        ours = hidden @ model.head.weight.T
    model.train()
    if not torch.allclose(theirs, ours, atol=1e-4, rtol=1e-4):
        raise UserError(
            f"{where}: the logits of a {model.inner.config.model_type} model are more than a matrix product. Choose another model."
        )


def check_packing(model: HFModel) -> None:
    """Refuse packed rows for a model that would look from one document of a row into another.

    Raises:
        UserError: naming the setting.
    """
    ids = torch.arange(min(8, model.config.max_seq_len))[None] % model.embedding.num_embeddings
    documents = (torch.arange(ids.size(1)) >= ids.size(1) // 2).long()[None]
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        packed = model.features(ids, document_ids=documents).hidden[:, ids.size(1) // 2 :]
        alone = model.features(ids[:, ids.size(1) // 2 :]).hidden
    model.train(was_training)
    if not torch.allclose(packed, alone, atol=1e-4, rtol=1e-4):
        kind = printable(model.inner.config.model_type)
        raise UserError(
            f"data.packing: a {kind} model does not keep the examples of a packed row apart. Set data.packing: padded."
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the bars and warnings of transformers: what matters of them is an error of ours."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
