"""The adapter in a checkpoint as the two files that peft reads:
adapter_config.json and adapter_model.safetensors.
"""

import json
from pathlib import Path

from tinylm.checkpoint.check import tokenizer_of
from tinylm.checkpoint.format import read
from tinylm.common.bnb import block_downloads
from tinylm.common.errors import UserError, require_package
from tinylm.common.files import writing
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config
from tinylm.model.growth import ADDED_ROWS


def save_adapter(path: Path, folder: Path) -> None:
    """Write the adapter in the checkpoint at `path` into `folder`.

    `peft.PeftModel.from_pretrained(base, folder)` loads it,
    on the Hugging Face model or on our `Decoder`. A run that added special tokens needs a base with
    rows for them: `base.resize_token_embeddings(n)`, or `grow_vocabulary`.

    Raises:
        UserError: the checkpoint has no adapter, or the folder cannot be written.
    """
    require_package("peft")
    block_downloads()
    from peft import LoraConfig as PeftConfig
    from safetensors.torch import save_file

    state = read(path)
    config = Config.from_plain(state["config"])
    if config.lora is None:
        problem = "is a whole model, not an adapter"
        raise UserError(path, problem, "Give a checkpoint of a run with a lora section")
    weights, targets = {}, set()
    rows: dict[str, list[int]] = {}
    n_tokens = tokenizer_of(path, state).vocab_size
    for name, weight in state["weights"].items():
        layer, is_rows, _ = name.partition(ADDED_ROWS)
        if is_rows:  # the rows of the last tokens, which this run added
            name = f"{layer}.token_adapter.trainable_tokens_delta"
            rows[layer.rpartition(".")[2]] = list(range(n_tokens - len(weight), n_tokens))
        else:
            targets.add(name.partition(".lora_")[0].rpartition(".")[2])
        weights[f"base_model.model.{name.removeprefix('inner.')}"] = weight.contiguous()
        if is_rows and state["hf_config"] is None and config.model.tie_embeddings:
            # peft knows of the tied matrices of transformers' models only
            name, rows["head"] = name.replace("embedding", "head", 1), rows["embedding"]
            weights[f"base_model.model.{name}"] = weight.clone()
    # how peft wraps the base, and whether its layers store (in, out) as GPT-2's do;
    # our decoder needs neither
    task_type, fan_in_fan_out = None, False
    if state["hf_config"] is not None:
        settings = json.loads(state["hf_config"])
        task_type = "SEQ_2_SEQ_LM" if settings.get("is_encoder_decoder") else "CAUSAL_LM"
        fan_in_fan_out = settings["model_type"] == "gpt2"
    peft_config = PeftConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        use_rslora=config.lora.rslora,
        use_dora=config.lora.dora,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules or sorted(targets)),
        fan_in_fan_out=fan_in_fan_out,
        base_model_name_or_path=(config.training.init_from or "").removeprefix(HF_PREFIX),
        task_type=task_type,
        trainable_token_indices=rows or None,
        inference_mode=True,
    )
    with writing(folder, "the output folder"):
        folder.mkdir(parents=True, exist_ok=True)
        peft_config.save_pretrained(str(folder))
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
