"""Special tokens that are added at fine-tuning time: the marks of chatml on bases without them, ours and
Hugging Face's, whole and under LoRA, saved, resumed, loaded and exported.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
import infer
from tests.training.test_finetune import home, make, refused  # noqa: F401
from tests.training.test_train import elsewhere
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.load import load_model
from tinylm.interchange.hf_export import export_hf
from tinylm.interchange.peft import save_adapter
from tinylm.model.growth import grow_vocabulary
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template

Make = Callable[..., Path]
MARKS = ["<|im_start|>", "<|im_end|>"]
CHATML = {
    "data": {"template": "chatml", "packing": "padded"},
    "tokenizer": {"special_tokens": MARKS},
}
LORA = {"lora": {"r": 2}}


def run(config: Path, *arguments: str) -> int:
    return finetune.main(["--config", str(config), *arguments])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hf_model", "lora"),
    [(False, {}), (False, LORA), (True, LORA)],
    ids=["whole", "lora", "hf lora"],
)
def test_chatml_is_learned_on_a_base_without_its_marks(
    hf_model: bool, lora: dict[str, Any], make: Make, home: Path, tmp_path: Path, capsys: Any
) -> None:
    """2 steps and 1 more are 3 in a row; the new rows are trained, under LoRA no old row is; the
    finished model is asked in chatml.
    """
    config = make(hf_model=hf_model, **CHATML, **lora, training={"schedule": "constant"})
    n_known = 257 if hf_model else 260
    for folder, steps in (("parted", 2), ("parted", 3), ("whole", 3)):
        assert run(config, f"training.max_steps={steps}", *elsewhere(tmp_path / folder)) == 0
    assert "new tokens: 2 rows of the embedding and the head" in capsys.readouterr().err
    final = tmp_path / "whole" / "checkpoints" / "final.ckpt"
    state = checkpoint_format.read(final)
    parted = checkpoint_format.read(tmp_path / "parted" / "checkpoints" / "final.ckpt")
    assert all(torch.equal(parted["weights"][n], w) for n, w in state["weights"].items())
    loaded = load_model(final)
    assert loaded.tokenizer.vocab_size == n_known + 2 == loaded.model.embedding.num_embeddings
    assert [loaded.tokenizer.special_names[n_known + i] for i in range(2)] == MARKS
    base = base_of(home, hf_model)
    for name, matrix in (("embedding", loaded.model.embedding), ("head", loaded.model.head)):
        old = getattr(base, name).weight
        moved = (matrix.weight[: len(old)] - old).abs().amax(dim=1)
        start = old.double().mean(dim=0).float()
        assert not torch.allclose(matrix.weight[n_known:], start.expand(2, -1)), name
        assert bool((moved > 0).any()) == (not lora), name
    if lora:
        assert all(".lora_" in name or ".added_rows" in name for name in state["weights"])
    template = make_template("chatml", loaded.tokenizer)
    ids = template.prompt_ids((Turn("user", "say one"),), loaded.tokenizer)
    assert ids[0] == n_known
    assert infer.main(["--ckpt", str(final), "--prompt", "say one", "--max-new-tokens", "2"]) == 0


def base_of(home: Path, hf_model: bool) -> Any:
    from tinylm.checkpoint.initial import open_initial_model

    name = f"hf:{home / 'llama'}" if hf_model else str(home / "base" / "final.ckpt")
    initial = open_initial_model(name)
    return initial.build(initial.model)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
def test_a_grown_model_is_exported_with_the_logits_of_transformers(
    lora: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    """transformers' logits are the oracle, to 1e-5, on ids that have the new tokens; its tokenizer
    reads the marks of a chat as ours.
    """
    import transformers

    config = make(**CHATML, **lora)
    assert run(config, "training.max_steps=2") == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    export_hf(final, tmp_path / "export")
    loaded = load_model(final)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    chat = [{"role": "user", "content": "say one"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    template = make_template("chatml", loaded.tokenizer)
    assert ids == template.prompt_ids((Turn("user", "say one"),), loaded.tokenizer)
    with torch.no_grad():
        ours = loaded.model(torch.tensor([ids]))
        torch.testing.assert_close(ours, theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("hf_model", [False, True], ids=["ours", "hf"])
def test_plain_peft_loads_an_adapter_with_new_tokens(
    hf_model: bool, make: Make, home: Path, tmp_path: Path
) -> None:
    """Its logits on the resized base are those of our merged model."""
    import peft
    import transformers

    config = make(hf_model=hf_model, **CHATML, **LORA)
    assert run(config, "training.max_steps=2") == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    save_adapter(final, tmp_path / "adapter")
    if hf_model:
        base = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
        base.resize_token_embeddings(259, mean_resizing=False)
    else:
        base = grow_vocabulary(base_of(home, False), range(260, 262))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.tensor([[257 if hf_model else 260, 97, 98, 258]])
    with torch.no_grad():
        logits = theirs(ids).logits if hf_model else theirs(ids)
        torch.testing.assert_close(load_model(final).model(ids), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_base_without_the_marks_says_the_line_that_adds_them(
    make: Make, tmp_path: Path, capsys: Any
) -> None:
    """The line is a valid override: with it the run starts."""
    config = make(data={"template": "chatml", "packing": "padded"})
    error = refused(config, tmp_path, capsys)
    fix = "tokenizer.special_tokens=[<|im_start|>,<|im_end|>]"
    assert error == (
        "error: data.template: chatml needs the special token <|im_start|>, which the tokenizer (byte) "
        f"does not have. Set {fix} to add it, or data.template=instruction."
    )
    assert run(config, fix, "training.max_steps=1") == 0


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_special_tokens(
    make: Make, tmp_path: Path, capsys: Any
) -> None:
    config = make(**CHATML)
    assert run(config, "training.max_steps=2") == 0
    error = refused(config, tmp_path, capsys, 'tokenizer.special_tokens=["<|a|>"]')
    assert "tokenizer.special_tokens was " in error


@pytest.mark.slow
def test_a_base_that_has_the_marks_does_not_grow_again(make: Make, tmp_path: Path) -> None:
    """The second run starts from the first one's model and names the same tokens."""
    config = make(**CHATML)
    assert run(config, "training.max_steps=1", *elsewhere(tmp_path / "first")) == 0
    first = tmp_path / "first" / "checkpoints" / "final.ckpt"
    settings = json.dumps(str(first))
    for more in ([], ["tokenizer.special_tokens=[]"]):
        folder = tmp_path / f"second{len(more)}"
        changed = [f"training.init_from={settings}", "training.max_steps=1", *more]
        assert run(config, *changed, *elsewhere(folder)) == 0
        second = checkpoint_format.read(folder / "checkpoints" / "final.ckpt")
        assert second["config"]["model"]["vocab_size"] == 262
        assert second["config"]["tokenizer"]["special_tokens"] == MARKS
