"""Encoder-decoders such as T5: losses, texts and adapters equal those of transformers, with the programs that
other models use.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

import eval_val
import evaluate_checkpoints
import finetune
import infer
import train
from tests.training.test_train import Capture, assert_same_run, bytes_of, curve, elsewhere
from tinylm.checkpoint import info as checkpoint_info
from tinylm.checkpoint import initial as checkpoint_initial
from tinylm.checkpoint import load as checkpoint_load
from tinylm.common.errors import UserError
from tinylm.config.schema import LoraConfig, SamplingConfig
from tinylm.eval.perplexity import batch_sums
from tinylm.generate.beam_search import beam_search
from tinylm.generate.engine import Engine
from tinylm.generate.scoring import encode_continuation, score_continuations
from tinylm.interchange.peft import save_adapter
from tinylm.model.decoder import extra_inputs
from tinylm.model.hf_files import find_hf_model, rebuild_hf_model
from tinylm.model.hf_model import HFSeq2Seq
from tinylm.model.lora import (
    adapter_weights,
    adapters_off,
    attach,
    default_targets,
    load_adapter,
    merge,
)
from tinylm.objectives.cross_entropy import cross_entropy
from tinylm.rows.conversation import Turn
from tinylm.rows.template_factory import make_template
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import load_hf_tokenizer
from tinylm.tokenizer.pretokenize import CHARACTER_OF_BYTE
from tinylm.tokens.example_rows import n_answers
from tinylm.tokens.packing import IGNORE_INDEX

EOS, PAD = 256, 257
# The first T5, whose head is the embedding and whose logits are scaled; v1.1 and FLAN, with a head of their own;
# another family.
KINDS: dict[str, dict[str, Any]] = {
    "t5": {
        "model_type": "t5",
        "d_kv": 8,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "relu",
    },
    "flan": {
        "model_type": "t5",
        "d_kv": 6,
        "num_heads": 4,
        "num_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "eos_token_id": [EOS],
    },
    "bart": {
        "model_type": "bart",
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 200,
        "bos_token_id": None,
        "forced_eos_token_id": None,
    },
}


def random_model(kind: str, **more: Any) -> Any:
    """A model of random weights, large enough that every token matters."""
    import transformers

    settings = {
        "vocab_size": 258,
        "d_model": 32,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": PAD,
        "d_ff": 48,
    }
    settings |= {key: value for key, value in KINDS[kind].items() if key != "model_type"} | more
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        transformers.AutoConfig.for_model(KINDS[kind]["model_type"], **settings)
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
        if kind == "flan":
            model.lm_head.weight = torch.nn.Parameter(
                0.3 * torch.randn(model.lm_head.weight.shape, generator=generator)
            )
    return model.eval()


def save(folder: Path, kind: str, **more: Any) -> None:
    """Save the model and a byte tokenizer as a Hugging Face folder; the tokenizer appends EOS, as T5's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    random_model(kind, **more).save_pretrained(folder)
    backend = Tokenizer(
        models.BPE({character: byte for byte, character in CHARACTER_OF_BYTE.items()}, [])
    )
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    backend.add_special_tokens(["</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", EOS)]
    )
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "pad_token": "<pad>"}', encoding="utf-8"
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind; tests must not change it."""
    folder = tmp_path_factory.mktemp("home")
    for kind in KINDS:
        save(folder / kind, kind)
    return folder


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, home: Path) -> tuple[HFSeq2Seq, HFTokenizer]:
    """A model and its tokenizer, in evaluation mode."""
    model = find_hf_model(str(home / request.param)).load().eval()
    assert isinstance(model, HFSeq2Seq)
    return model, load_hf_tokenizer(str(home / request.param))


# --- the model ---


def rows() -> dict[str, torch.Tensor]:
    """Padded rows as in training: prompts of 3 and 5 tokens, answers of 2 and 4 with EOS, and a row of padding."""
    full = [([10, 11, 12, 20, EOS], 3), ([30, 31, 32, 33, 34, 40, 41, 42, EOS], 5)]
    inputs, labels = torch.full((3, 10), PAD), torch.full((3, 10), IGNORE_INDEX)
    for row, (ids, n_prompt) in enumerate(full):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, n_prompt - 1 : len(ids) - 1] = torch.tensor(ids[n_prompt:])
    return {"input_ids": inputs, "labels": labels}


@pytest.mark.slow
def test_rows_are_split_into_inputs_of_encoder_and_decoder(pair: Any) -> None:
    """By hand: prompts end with EOS, then -100 as padding; the decoder starts with its start id, and the labels
    are answer and EOS.
    """
    model, _ = pair
    batch = model.prepare_batch(rows())
    assert batch["prompt_ids"].tolist() == [
        [10, 11, 12, EOS, -100, -100],
        [30, 31, 32, 33, 34, EOS],
        [EOS] + [-100] * 5,
    ]
    assert batch["labels"].tolist() == [[20, EOS, -100, -100], [40, 41, 42, EOS], [-100] * 4]
    assert batch["input_ids"][:2].tolist() == [[PAD, 20, EOS, EOS], [PAD, 40, 41, 42]]


def test_the_loss_equals_that_of_transformers(pair: Any) -> None:
    """On the same batch, with transformers' own label shift and mask; gradients and validation sums agree too."""
    model, _ = pair
    batch = model.prepare_batch(rows())
    real = batch["prompt_ids"] != IGNORE_INDEX
    theirs = model.inner(
        input_ids=batch["prompt_ids"].masked_fill(~real, PAD),
        attention_mask=real.long(),
        labels=batch["labels"],
    ).loss
    expected = torch.autograd.grad(theirs, model.embedding.weight)[0]
    hidden = model.features(batch["input_ids"], **extra_inputs(batch)).hidden
    ours = cross_entropy(hidden.flatten(0, 1), model.head.weight, batch["labels"].flatten()) / 6
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(ours, model.embedding.weight)[0], expected, atol=1e-5)
    sums = batch_sums(model.features, model.head, batch, torch.ones(258, dtype=torch.long))
    assert sums[:3].tolist() == pytest.approx([6 * theirs.item(), 6, 6], abs=1e-4)


PROMPTS = ("the dog", "a", "Summarize this dialogue.\n\nIda: Is the library open today?")


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_texts_equal_those_of_transformers(pair: Any, prompt: str) -> None:
    """The oracle is `generate` on ids of its own tokenizer; ours uses the cache. All tokens are equal, EOS too.

    No pair of tokens twice: a random model would repeat one for ever, and little would be compared.
    """
    model, tokenizer = pair
    ids = torch.tensor([[*prompt.encode(), EOS]])
    theirs = model.inner.generate(
        ids,
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=EOS,
        num_beams=1,
        no_repeat_ngram_size=2,
    )[0, 1:].tolist()
    [ours] = Engine(model, tokenizer).generate(
        prompt, SamplingConfig(temperature=0, max_new_tokens=30, no_repeat_ngram=2)
    )
    assert list(ours.ids) == theirs
    assert len(set(theirs)) > 3


@pytest.mark.slow
def test_beams_and_samples_share_one_prompt(pair: Any) -> None:
    """One beam is greedy; each sample equals the one drawn alone; several beams find a text at least as probable
    as greedy.
    """
    model, tokenizer = pair
    engine = Engine(model, tokenizer)
    prompt = engine.encode_prompt("the dog")
    greedy = engine.generate(prompt, SamplingConfig(temperature=0, max_new_tokens=6))[0]
    beam = tuple(
        piece.token_id
        for piece in beam_search(
            model,
            tokenizer,
            prompt,
            SamplingConfig(max_new_tokens=6, n_beams=1),
            {tokenizer.eos_id},
        )
    )
    assert beam == greedy.ids
    [best] = engine.generate(prompt, SamplingConfig(max_new_tokens=6, n_beams=8))
    assert best.log_prob / len(best.ids) >= greedy.log_prob / len(greedy.ids) - 1e-5
    three = engine.generate(prompt, SamplingConfig(max_new_tokens=6, n_samples=3, seed=5))
    assert three[0].ids == engine.generate(prompt, SamplingConfig(max_new_tokens=6, seed=5))[0].ids


def test_the_score_of_a_target_is_the_decoders(pair: Any) -> None:
    """The sum of log p over the target's tokens by transformers' logits; pairs of different lengths in one batch.
    A prompt has no perplexity.
    """
    model, tokenizer = pair
    engine = Engine(model, tokenizer)
    texts = [("the dog", "barks"), ("a", "b"), ("a longer prompt than the others", " answer")]
    scores = score_continuations(
        engine, [encode_continuation(engine, *text) for text in texts], batch_size=2
    )
    for (prompt, target), score in zip(texts, scores, strict=True):
        wanted = torch.tensor([list(target.encode())])
        logits = model.inner(
            input_ids=torch.tensor([[*prompt.encode(), EOS]]), labels=wanted
        ).logits[..., : tokenizer.vocab_size]
        log_p = F.log_softmax(logits, dim=-1)[0].gather(1, wanted.T).sum()
        assert score.log_prob == pytest.approx(log_p.item(), abs=1e-3)
        assert score.prompt_perplexity is None


@pytest.mark.slow
def test_texts_can_be_longer_than_the_decoders_positions(home: Path) -> None:
    """Context shift: the decoder reads the end of its text again, the encoder the prompt. Finished texts do not
    affect the others.
    """
    model, tokenizer = (
        find_hf_model(str(home / "t5")).load().eval(),
        load_hf_tokenizer(str(home / "t5")),
    )
    model.config = model.config.model_copy(update={"max_seq_len": 8})
    engine, settings = (
        Engine(model, tokenizer),
        {"temperature": 1.0, "max_new_tokens": 30, "seed": 1},
    )
    four = engine.generate("the dog", SamplingConfig(n_samples=4, **settings), stop_ids=range(20))
    assert len({len(completion.ids) for completion in four}) > 2
    assert max(len(completion.ids) for completion in four) > 16
    assert (
        engine.generate("the dog", SamplingConfig(**settings), stop_ids=range(20))[0].ids
        == four[0].ids
    )


@torch.no_grad()
def test_selected_rows_of_a_cache_keep_their_prompt(pair: Any) -> None:
    """Two prompts of different lengths in one cache; the row of the shorter one is kept twice, and its logits
    equal those alone.
    """
    model, _ = pair
    starts, extra = model.decoder_start([[1, 2, 3, 4, 5], [6, 7]])
    _, alone = model.decoder_start([[6, 7]])
    cache = model.new_cache(2)
    model.features(torch.tensor(starts), cache=cache, **extra)
    cache.select(torch.tensor([1, 1]))
    found = model.features(torch.tensor([[9], [9]]), cache=cache, **extra).hidden
    expected = model.features(torch.tensor([[model.start_id, 9]]), **alone).hidden[:, -1:]
    assert torch.allclose(found, expected.expand_as(found), atol=1e-5)


def test_misuse_of_an_encoder_decoder_is_a_value_error(pair: Any) -> None:
    model, _ = pair
    with pytest.raises(ValueError, match="an encoder-decoder reads one prompt a row"):
        model.features(torch.tensor([[1]]))


@pytest.mark.slow
def test_a_checkpoint_rebuilds_the_model(pair: Any) -> None:
    """From settings and weights as in a checkpoint: equal weights and logits, and the head is tied or not as before."""
    model, _ = pair
    again = rebuild_hf_model(model.settings, model.state_dict()).eval()
    batch = model.prepare_batch(rows())
    assert checkpoint_initial.fingerprint_of(again) == checkpoint_initial.fingerprint_of(model)
    assert torch.allclose(
        *(each(batch["input_ids"], **extra_inputs(batch)) for each in (model, again)), atol=1e-5
    )
    assert (again.head.weight is again.embedding.weight) == (
        model.head.weight is model.embedding.weight
    )


# --- adapters ---


@pytest.mark.slow
@torch.no_grad()
def test_adapters_merge_can_be_disabled_and_fit_the_architecture(home: Path) -> None:
    """D8: self- and cross-attention and the feed-forward; merged equals separate, disabled equals the base exactly."""
    model, merged = (find_hf_model(str(home / "t5")).load().eval() for _ in range(2))
    assert default_targets(model) == ("k", "o", "q", "v", "wi", "wo")
    batch, lora = model.prepare_batch(rows()), LoraConfig(r=4)
    before = model(batch["input_ids"], **extra_inputs(batch))
    attach(model, lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in adapter_weights(dict(model.named_parameters())).items()
    }
    load_adapter(model, weights)
    separate = model.eval()(batch["input_ids"], **extra_inputs(batch))
    assert (separate - before).abs().max() > 0.01
    with adapters_off(model):
        assert torch.equal(model(batch["input_ids"], **extra_inputs(batch)), before)
    merge(merged, weights, lora)
    assert torch.allclose(
        merged(batch["input_ids"], **extra_inputs(batch)), separate, atol=1e-5, rtol=1e-5
    )


# --- runs ---

LORA = {"lora": {"r": 4, "dropout": 0.1}}


@pytest.fixture
def make(home: Path, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Writes a config of a tiny run on SAMSum's built-in rows."""
    before = bytes_of(home)

    def write(**sections: dict[str, Any]) -> Path:
        settings: dict[str, dict[str, Any]] = {
            "data": {
                "task": "samsum",
                "dataset": "smoke",
                "template": "plain",
                "packing": "padded",
            },
            "training": {
                "init_from": f"hf:{home / 't5'}",
                "seq_len": 256,
                "micro_batch_size": 2,
                "grad_accum_steps": 2,
                "max_steps": 4,
                "val_every_steps": 2,
                "log_every_steps": 1,
                "save_every_steps": 2,
                "lr": 1e-2,
                "sample_prompt": "hello",
                "checkpoint_dir": str(tmp_path / "checkpoints"),
                "log_dir": str(tmp_path / "logs"),
                "run_name": "tiny",
            },
            "hardware": {"accelerator": "cpu", "threads": 1},
            "sampling": {"max_new_tokens": 4},
        }
        for section, values in sections.items():
            settings.setdefault(section, {}).update(values)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    yield write
    assert bytes_of(home) == before


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA], ids=["whole", "lora"])
def test_a_run_learns_and_all_programs_read_its_checkpoint(
    sections: dict, make: Any, tmp_path: Path, capsys: Capture
) -> None:
    """Slow: with fewer steps the loss would not fall. ROUGE is computed by the same code as for other models."""
    assert finetune.main(["--config", str(make(**sections))]) == 0
    final = tmp_path / "checkpoints" / "final.ckpt"
    losses = [float.fromhex(loss) for loss in curve(tmp_path).values()]
    assert losses[-1] < losses[0]
    assert checkpoint_info.describe(final).shape == "2L 32d 4h" + (" + r4" if sections else "")
    capsys.readouterr()
    assert (
        infer.main(
            [
                "--ckpt",
                str(final),
                "--prompt",
                "hello",
                "--temperature",
                "0",
                "--max-new-tokens",
                "4",
                "--device",
                "cpu",
                "--json",
            ]
        )
        == 0
    )
    [completion] = json.loads(capsys.readouterr().out)["completions"]
    loaded = checkpoint_load.load_model(final)
    theirs = loaded.model.inner.generate(
        torch.tensor([[*b"hello", EOS]]),
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=EOS,
        num_beams=1,
    )
    assert completion["ids"] == theirs[0, 1:].tolist()
    flags = [
        "--tasks",
        "samsum",
        "--smoke",
        "--limit",
        "1",
        "--out",
        str(tmp_path / "results"),
        "--device",
        "cpu",
    ]
    assert evaluate_checkpoints.main(["--checkpoints", str(final), *flags]) == 0
    assert "rouge1" in capsys.readouterr().out


@pytest.mark.parametrize("template", ["plain", "instruction", "alpaca"])
def test_a_decoder_learns_the_answer_alone(
    template: str, home: Path, make: Any, capsys: Capture
) -> None:
    """Not the newline or space that is before an answer in one text, which the encoder does not read either. An
    earlier answer is a part of the prompt, in which the separators are.
    """
    tokenizer = load_hf_tokenizer(str(home / "t5"))
    one_text, apart = (make_template(template, tokenizer, has_encoder=on) for on in (False, True))
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d e")]
    prompt = one_text.prompt_ids(tuple(turns[:3]), tokenizer)
    assert apart.prompt_ids(tuple(turns[:3]), tokenizer) == prompt
    found = apart.encode(tuple(turns), tokenizer)
    assert found.ids.tolist() == [*prompt, *b"d e", EOS]
    assert found.trained[len(prompt) :].all()
    assert n_answers(found) == 2

    assert (
        finetune.main(
            [
                "--config",
                str(make(data={"template": template}, training={"seq_len": 512})),
                "--show-rows",
                "1",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert re.search(r"⟧\w.*</s>", shown), "no newline or space between the prompt and the answer"


@pytest.mark.slow
def test_conversations_with_several_answers_are_logged(
    make: Any, tmp_path: Path, capsys: Capture
) -> None:
    """Three of the four training rows have two answers, of which an encoder-decoder can learn one."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"n": n, "messages": turns[: 4 if n else 2]}) + "\n" for n in range(4)),
        encoding="utf-8",
    )
    settings = {"task": None, "dataset": str(path), "val_dataset": str(path)}
    assert finetune.main(["--config", str(make(data=settings)), "training.max_steps=1"]) == 0
    assert (
        "3 rows have more than one answer: an encoder-decoder learns the last one and reads the others"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, LORA], ids=["whole", "lora"])
def test_a_stopped_run_resumes_to_the_last_bit(sections: dict, make: Any, tmp_path: Path) -> None:
    """A12."""
    command = [
        "--config",
        str(make(**sections)),
        "training.schedule=constant",
    ]  # which does not depend on the number of steps
    assert finetune.main([*command, *elsewhere(tmp_path / "calm")]) == 0
    for steps in (2, 4):
        assert (
            finetune.main([*command, *elsewhere(tmp_path / "apart"), f"training.max_steps={steps}"])
            == 0
        )
    assert_same_run(tmp_path / "calm", tmp_path / "apart")


@pytest.mark.slow
def test_plain_peft_loads_the_saved_adapter(make: Any, home: Path, tmp_path: Path) -> None:
    """Plain peft on plain transformers gives the logits of the merged model."""
    import peft
    import transformers

    assert finetune.main(["--config", str(make(**LORA)), "training.max_steps=2"]) == 0
    save_adapter(tmp_path / "checkpoints" / "final.ckpt", tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSeq2SeqLM.from_pretrained(home / "t5"), tmp_path / "adapter"
    ).eval()
    assert theirs.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    ours = checkpoint_load.load_model(tmp_path / "checkpoints" / "final.ckpt").model
    ids = torch.tensor([[1, 2, 3, EOS]])
    expected = theirs(input_ids=ids, decoder_input_ids=ids).logits
    assert torch.allclose(ours(ids, prompt_ids=ids), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.packing=packed",
            "data.packing: packed puts several examples in a row, but an encoder-decoder reads one example at a time",
        ),
        (
            "training.train_on=all",
            "training.train_on: all trains the questions too, but an encoder-decoder generates answers only",
        ),
        (
            "lora.target_modules=[qkv]",
            "must name layers that can have an adapter (k, o, q, v, wi, wo), got qkv.",
        ),
    ],
)
def test_unsupported_settings_of_an_encoder_decoder_are_errors(
    override: str, words: str, make: Any, capsys: Capture
) -> None:
    assert (
        finetune.main(["--config", str(make(**(LORA if "lora" in override else {}))), override])
        == 2
    )
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_plain_text_is_not_supported(make: Any, tmp_path: Path, capsys: Capture) -> None:
    """Pretraining and its validation need the next token of a text, which an encoder-decoder does not predict."""
    (tmp_path / "corpus.txt").write_text(
        "".join(f"a line of text, number {i}\n" for i in range(300)), encoding="utf-8"
    )
    config = str(
        make(
            data={
                "task": None,
                "dataset": str(tmp_path / "corpus.txt"),
                "cache_dir": str(tmp_path / "cache"),
            }
        )
    )
    assert train.main(["--config", config, "training.seq_len=32"]) == 2
    assert (
        "training.init_from: an encoder-decoder learns from questions and answers only"
        in capsys.readouterr().err
    )
    assert finetune.main(["--config", str(make()), "training.max_steps=1"]) == 0
    assert (
        eval_val.main(["--ckpt", str(tmp_path / "checkpoints" / "final.ckpt"), "--config", config])
        == 2
    )
    assert (
        "an encoder-decoder, which answers questions and does not predict plain text. Use "
        "evaluate_checkpoints.py --tasks." in capsys.readouterr().err
    )


def test_an_encoder_decoder_without_a_start_id_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "t5", "t5", decoder_start_token_id=None)
    with pytest.raises(
        UserError,
        match=r"decoder_start_token_id: missing; an encoder-decoder needs it\. Download it again\.",
    ):
        find_hf_model(str(tmp_path / "t5"))
