import json
from pathlib import Path

from tinylm.common.errors import UserError, printable, require_package, writing
from tinylm.common.hub import HF_PREFIX


def _task_type(hf_config: str | None) -> str | None:
    """What peft calls the kind of a Hugging Face model, which decides how it is wrapped; our decoder has none."""
    if hf_config is None:
        return None
    return "SEQ_2_SEQ_LM" if json.loads(hf_config).get("is_encoder_decoder") else "CAUSAL_LM"


def save_adapter(path: Path, folder: Path) -> None:
    """Write the adapter of the checkpoint at `path` as peft has it: adapter_config.json and adapter_model.safetensors.

    `peft.PeftModel.from_pretrained(base, folder)` loads it, on the Hugging Face model or on our decoder.

    Raises:
        UserError: the checkpoint holds no adapter, or the folder cannot be written.
    """
    require_package("peft")
    from peft import LoraConfig as PeftConfig
    from safetensors.torch import save_file

    from tinylm.checkpoint.format import read
    from tinylm.config.schema import Config

    payload = read(path)
    config = Config.from_plain(payload["config"])
    if config.lora is None:
        raise UserError(
            f"{printable(path)}: holds a whole model and no adapter. Give a checkpoint of a run with a lora section."
        )
    foreign = payload["hf_config"] is not None
    weights = {
        f"base_model.model.{name.removeprefix('inner.')}": weight.contiguous()
        for name, weight in payload["weights"].items()
    }
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in weights})
    described = PeftConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules or targets),
        fan_in_fan_out=foreign
        and json.loads(payload["hf_config"])["model_type"] == "gpt2",  # it stores (in, out)
        base_model_name_or_path=(config.training.init_from or "").removeprefix(HF_PREFIX),
        task_type=_task_type(payload["hf_config"]),
        inference_mode=True,
    )
    with writing(folder, "the folder"):
        folder.mkdir(parents=True, exist_ok=True)
        described.save_pretrained(str(folder))
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
