"""Loss and gradients of GRPO equal to trl's on the same rollouts (bench tier: needs trl, which
requirements-bench.txt names).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_finetune import save_llama
from tinylm.config.finetuning import GrpoConfig
from tinylm.objectives.grpo import group_advantages, loss_of_answers, policy_loss, score_tokens
from tinylm.tokens.packing import IGNORE_INDEX

N, PROMPT, ANSWER, TEMPERATURE = 6, 5, 7, 0.8
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny llama."""
    folder = tmp_path_factory.mktemp("trl") / "llama"
    save_llama(folder)
    return folder


def trl_trainer(llama: Path, folder: Path, grpo: GrpoConfig) -> Any:
    """trl's trainer with the same settings."""
    trl = pytest.importorskip("trl")
    import datasets
    import transformers

    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        loss_type=grpo.loss,
        beta=grpo.kl,
        epsilon=grpo.clip_low,
        epsilon_high=grpo.clip_high,
        temperature=grpo.temperature,
        num_generations=3,
        per_device_train_batch_size=N,
        max_completion_length=grpo.max_new_tokens,
        num_iterations=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_dropout=True,
        use_bias_correction_kl=False,  # of DeepSeek-V3.2; ours is the term of Shao et al. 2024
    )
    return trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(llama / "tokenizer.json"),
            eos_token="<|endoftext|>",  # noqa: S106
            pad_token="<|endoftext|>",  # noqa: S106
        ),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * N),
    )


def some_rollouts() -> dict[str, torch.Tensor]:
    """Random prompts and answers of several lengths, with old and reference log-probabilities near
    those of the model, some outside the band.
    """
    torch.manual_seed(1)
    lengths = torch.tensor([7, 3, 1, 5, 7, 2])
    ids = torch.randint(0, 256, (N, PROMPT + ANSWER))
    return {
        "ids": ids,
        "mask": (torch.arange(ANSWER) < lengths[:, None]).long(),
        "noise": torch.randn(N, ANSWER) * 0.3,
        "reference_noise": torch.randn(N, ANSWER) * 0.5,
        "rewards": torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]]),
    }


@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("kl", [0.0, 0.05])
def test_loss_and_gradients_equal_trl(loss: str, kl: float, llama: Path, tmp_path: Path) -> None:
    """The same weights, tokens, advantages, old and reference log-probabilities."""
    grpo = GrpoConfig(
        loss=loss, kl=kl, clip_high=0.28, max_new_tokens=ANSWER, temperature=TEMPERATURE
    )
    trainer = trl_trainer(llama, tmp_path, grpo)
    given = some_rollouts()
    model = trainer.model.eval()  # the attention has dropout
    ids, mask = given["ids"], given["mask"]
    labels = torch.full_like(ids, IGNORE_INDEX)  # the label of a place is the token after it
    labels[:, PROMPT - 1 : -1] = torch.where(mask.bool(), ids[:, PROMPT:], IGNORE_INDEX)
    answer = slice(PROMPT - 1, -1)
    advantages = group_advantages(given["rewards"], normalize_std=True).flatten()

    def scores() -> Any:
        hidden = model.model(ids).last_hidden_state
        return score_tokens(hidden, model.lm_head.weight, labels, temperature=TEMPERATURE)

    with torch.no_grad():
        now = scores().log_probs
    old, reference = now.clone(), now.clone()
    old[:, answer] += given["noise"] * mask
    reference[:, answer] += given["reference_noise"] * mask

    # ours
    target = labels != IGNORE_INDEX
    found = policy_loss(scores().log_probs, old, advantages, reference if kl else None, grpo)
    own = loss_of_answers(found.loss, target, grpo, int(mask.sum()) / N).mean()
    own_grads = torch.autograd.grad(own, list(model.parameters()))

    # theirs
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones(N, PROMPT, dtype=torch.long),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old[:, answer],
        "ref_per_token_logps": reference[:, answer],
        "num_items_in_batch": mask.sum(),
    }
    theirs = trainer._compute_loss(model, inputs)
    their_grads = torch.autograd.grad(theirs, list(model.parameters()))
    assert found.clipped[target].any(), "some tokens must be outside the band"
    assert own.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    for one, other in zip(own_grads, their_grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
