"""A vocabulary that grows: the new rows, transformers' logits as the oracle, and the rows under LoRA."""

from typing import Any

import pytest
import torch

from tinylm.config.schema import LoraConfig, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.model.growth import grow_vocabulary
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import adapter_weights, adapters_off, attach, merge, require_adapter

IDS = torch.tensor([[1, 40, 7, 41]])


def ours(*, tied: bool, vocab_size: int = 40) -> Decoder:
    torch.manual_seed(0)
    sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 8}
    return Decoder(ModelConfig(vocab_size=vocab_size, tie_embeddings=tied, **sizes)).eval()


def theirs(kind: str) -> Any:
    """A tiny model of transformers: tied (gpt2), untied (llama), with a bias of the head (phi)."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24}
    common |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    config: Any = {
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8
        ),
        "llama": lambda: transformers.LlamaConfig(**common, tie_word_embeddings=False),
        "phi": lambda: transformers.PhiConfig(**common),
    }[kind]()
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi"])
def test_logits_are_those_of_a_model_of_transformers_that_grew(kind: str) -> None:
    """transformers resizes its own copy, whose new rows are set to the mean of the 40 known ones."""
    model, expected = HFModel(theirs(kind)), theirs(kind)
    expected.resize_token_embeddings(42, mean_resizing=False)
    head = expected.get_output_embeddings()
    with torch.no_grad():
        for weight in {expected.get_input_embeddings().weight, head.weight}:
            weight[40:] = weight[:40].mean(dim=0)
        if head.bias is not None:
            head.bias[40:] = head.bias[:40].mean()
        grow_vocabulary(model, range(40, 42))
        torch.testing.assert_close(model(IDS), expected(IDS).logits, atol=1e-5, rtol=1e-5)
    assert model.config.vocab_size == model.embedding.num_embeddings == 42


@pytest.mark.parametrize("tied", [True, False])
def test_old_logits_stay_and_a_new_one_is_their_mean(tied: bool) -> None:
    """Of each position, since the new row of the head is the mean of the others."""
    model = ours(tied=tied)
    ids = IDS % 40
    with torch.no_grad():
        before = model(ids)
        after = grow_vocabulary(model, range(40, 42))(ids)
    assert torch.equal(after[..., :40], before)
    torch.testing.assert_close(after[..., 40], before.mean(dim=-1))
    assert (model.head.weight is model.embedding.weight) == tied


def test_rows_of_a_padded_vocabulary_are_filled_before_it_grows() -> None:
    """A model of 40 rows whose tokenizer has 37 tokens: new tokens 37 and 38 need no new row."""
    model = ours(tied=False)
    known = model.embedding.weight[:37].detach().clone()
    grow_vocabulary(model, range(37, 39))
    assert model.embedding.num_embeddings == 40
    torch.testing.assert_close(model.embedding.weight[38], known.mean(dim=0))
    assert torch.equal(model.embedding.weight[:37], known)


@pytest.mark.parametrize("tied", [True, False])
def test_under_lora_the_new_rows_alone_are_trained_and_merged(tied: bool) -> None:
    """After a step the model with adapters, its file merged into a grown base, and the base for
    `adapters_off` are compared.
    """
    new, lora = range(40, 42), LoraConfig(r=2)
    model = grow_vocabulary(ours(tied=tied), new)
    base = grow_vocabulary(ours(tied=tied), new)
    attach(model, lora, seed=1, new_tokens=new)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    torch.nn.functional.cross_entropy(model(IDS)[0], IDS[0]).backward()
    optimizer.step()
    weights = adapter_weights(model.state_dict())
    names = {name for name in weights if "added_rows" in name}
    assert names == {"embedding.added_rows"} | (set() if tied else {"head.added_rows"})
    with torch.no_grad():
        whole = model(IDS)
        assert torch.equal(model.embedding.weight[:40], base.embedding.weight[:40])
        assert not torch.equal(model.embedding.weight[40:], base.embedding.weight[40:])
        with adapters_off(model):
            assert torch.equal(model(IDS), base(IDS))
        require_adapter(base, weights, lora, new)
        merge(base, weights, lora, new)
        torch.testing.assert_close(base(IDS), whole, atol=1e-5, rtol=1e-5)
