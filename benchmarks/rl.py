"""Rollouts per second of reinforcement learning, beside trl's GRPOTrainer, and where a step spends
its time.

    pip install --no-deps trl==1.16.0 && pip install accelerate datasets
    python benchmarks/rl.py [--steps 6 --rounds 2 --threads 1]
    python benchmarks/rl.py --model checkpoints/arithmetic/sft/final.ckpt \\
        --rows data/arithmetic/questions.jsonl --prompts 16 --new-tokens 120

Both train the same weights: a decoder of ours, and its export, a Llama. Both sample 8 answers to
each prompt in every optimizer step and score them with a function that counts characters. Without
--model the weights are random, so that nearly every answer has --new-tokens tokens; a trained model
ends its answers, some early, some late. Whole runs alternate in one process; the first step of a
run, which also makes caches, is not counted. Shares are of the median step: sampling, scoring, and
the rest, which is training. A step is also measured in processor seconds of this process, which
other work on the machine changes less than its duration.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import finetune  # noqa: E402
import train  # noqa: E402
from model import TrainingModule  # noqa: E402
from tinylm.checkpoint.load import load_model  # noqa: E402
from tinylm.common.tables import Table, print_table  # noqa: E402
from tinylm.config.schema import DataConfig  # noqa: E402
from tinylm.generate.engine import Engine  # noqa: E402
from tinylm.interchange.hf_export import export_hf  # noqa: E402
from tinylm.rewards.table import RewardSum  # noqa: E402
from tinylm.rows.prompts import build_prompts  # noqa: E402
from tinylm.rows.template_factory import make_template  # noqa: E402

GROUP = 8
# Tokens of a prompt and its answer.
MAX_LEN = 192


class Clock:
    """Adds up the seconds in functions, and closes a row at the end of each optimizer step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.spent = {"sampling": 0.0, "scoring": 0.0}
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        row = {"whole": now - self.last, "processor": cpu - self.last_cpu}
        self.rows.append(row | self.spent)
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.last, self.last_cpu = now, cpu

    def watch(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Time every call of a method; returns what undoes it."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            if part == "sampling" and hasattr(result, "__next__"):
                result = list(result)
            self.spent[part] += time.perf_counter() - start
            return result

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, original)


class Base(NamedTuple):
    """The model that both programs begin with, and their prompts."""

    checkpoint: Path
    llama: Path
    """the same model in files of transformers"""
    rows: Path
    template: str
    prompts: list[str]
    """of `rows`, as they are given to the model"""


def base_of(folder: Path, args: argparse.Namespace) -> Base:
    """The model of --model, or a random one, with its export and its prompts."""
    if args.model is None:
        checkpoint, rows = random_base(folder, args)
        data = DataConfig(dataset=str(rows), template="plain")
    else:
        checkpoint, rows = args.model, args.rows
        data = DataConfig(dataset=str(rows))
    export_hf(checkpoint, folder / "llama")
    tokenizer = load_model(checkpoint).tokenizer
    template = make_template(data.template, tokenizer)
    max_len = MAX_LEN - args.new_tokens
    found, _ = build_prompts(data, "train", 1, template, tokenizer, max_len)
    prompts = [tokenizer.decode(prompt.ids.tolist()) for prompt in found]
    for prompt, text in zip(found, prompts, strict=True):
        assert tokenizer.encode(text) == prompt.ids.tolist(), "trl would read another prompt"
    return Base(checkpoint, folder / "llama", rows, data.template, prompts)


def random_base(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint of a random decoder, and rows of prompts."""
    rows_path = folder / "rows.jsonl"
    (folder / "corpus.txt").write_text("".join(f"number {i}\n" for i in range(400)), "utf-8")
    rows = [{"prompt": f"write {i} and more", "completion": "yes"} for i in range(200)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    rows_path.write_text(text, encoding="utf-8")
    settings = (
        f"data.dataset={folder / 'corpus.txt'} data.cache_dir={folder / 'cache'} "
        f"model.n_layers={args.layers} model.d_model={args.width} model.n_heads=4 "
        f"model.max_seq_len={MAX_LEN} tokenizer.kind=byte training.seq_len=64 training.max_steps=1 "
        f"training.checkpoint_dir={folder / 'base'} training.log_dir={folder / 'logs'} "
        f"hardware.accelerator=cpu hardware.threads={args.threads}"
    )
    (folder / "base.yaml").write_text("{}", encoding="utf-8")
    assert train.main(["--config", str(folder / "base.yaml"), *settings.split()]) == 0
    return folder / "base" / "final.ckpt", rows_path


def ours(folder: Path, base: Base, args: argparse.Namespace, number: int) -> Clock:
    """A run of finetune.py."""
    reward = folder / "reward.py"
    reward.write_text(
        "def score(prompts, answers, targets):\n    return [float(len(a)) for a in answers]\n",
        encoding="utf-8",
    )
    settings = (
        f"data.dataset={base.rows} data.template={base.template} "
        f"training.init_from={base.checkpoint} training.seq_len={MAX_LEN - 1} "
        f"training.micro_batch_size={args.prompts * GROUP // args.parts} "
        f"training.grad_accum_steps={args.parts} training.max_steps={args.steps} "
        "training.val_every_steps=100000 training.val_batches=1 "
        f"training.lr=1e-6 training.checkpoint_dir={folder / f'run{number}'} "
        f"training.log_dir={folder / 'logs'} training.run_name=run{number} "
        f"hardware.accelerator=cpu hardware.threads={args.threads} grpo.slots={args.slots} "
        f"grpo.rewards=[{{reward:&{reward}:score}}] grpo.group_size={GROUP} "
        f"grpo.max_new_tokens={args.new_tokens} grpo.val_samples=1"
    )
    words = [word.replace("reward:&", "reward: ") for word in settings.split()]
    clock = Clock()
    step = TrainingModule.optimizer_step

    def optimizer_step(self: Any, *given: Any, **named: Any) -> None:
        step(self, *given, **named)
        clock.end_step()

    undo = [
        clock.watch(Engine, "complete", "sampling"),
        clock.watch(RewardSum, "__call__", "scoring"),
    ]
    TrainingModule.optimizer_step = optimizer_step
    (folder / "run.yaml").write_text("{}", encoding="utf-8")
    assert finetune.main(["--config", str(folder / "run.yaml"), *words]) == 0
    TrainingModule.optimizer_step = step
    for restore in undo:
        restore()
    return clock


def theirs(folder: Path, base: Base, args: argparse.Namespace, number: int) -> Clock:
    """A run of trl's GRPOTrainer with the same settings."""
    import datasets
    import transformers
    import trl

    clock = Clock()

    class EndStep(transformers.TrainerCallback):
        """Closes a row of the clock."""

        def on_step_end(self, *given: Any, **named: Any) -> None:
            clock.end_step()

    arguments = trl.GRPOConfig(
        output_dir=str(folder / f"trl{number}"),
        loss_type="grpo",
        beta=0.0,
        learning_rate=1e-6,
        temperature=1.0,
        num_generations=GROUP,
        per_device_train_batch_size=args.prompts * GROUP // args.parts,
        gradient_accumulation_steps=args.parts,
        max_completion_length=args.new_tokens,
        max_steps=args.steps,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(base.llama)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(base.llama, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in base.prompts]),
        callbacks=[EndStep()],
    )
    undo = [
        clock.watch(trainer, "_generate", "sampling"),
        clock.watch(trainer, "_calculate_rewards", "scoring"),
    ]
    trainer.train()
    for restore in undo:
        restore()
    return clock


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    for name, value in (("steps", 6), ("rounds", 2), ("threads", 1), ("slots", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("layers", 4), ("width", 128), ("prompts", 4), ("new-tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--parts", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a random decoder")
    parser.add_argument("--rows", type=Path, help="with --model: rows with prompts")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.rows is None):
        parser.error("--model and --rows go together")
    if args.prompts * GROUP % args.parts:
        parser.error(f"--parts must divide the {args.prompts * GROUP} answers of a step")
    torch.set_num_threads(args.threads)
    rows: dict[str, list[dict[str, float]]] = {"this project": [], "trl": []}
    ratios: dict[str, list[float]] = {"whole": [], "processor": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_of(folder, args)
        for number in range(args.rounds):
            own = ours(folder, base, args, number).rows[1:]
            other = theirs(folder, base, args, number).rows[1:]
            rows["this project"] += own
            rows["trl"] += other
            for part, found in ratios.items():
                found.append(median(row[part] for row in other) / median(row[part] for row in own))
    columns = ("", "rollouts/s", "step", "processor", "sampling", "scoring", "training")
    table = Table(columns, text=("",))
    for name, steps in rows.items():
        whole, cpu, sampling, scoring = (
            median(step[part] for step in steps)
            for part in ("whole", "processor", "sampling", "scoring")
        )
        table.add_row(
            name,
            f"{args.prompts * GROUP / whole:.1f}",
            f"{whole:.2f} s",
            f"{cpu:.2f} s",
            f"{sampling / whole:.0%}",
            f"{scoring / whole:.1%}",
            f"{(whole - sampling - scoring) / whole:.0%}",
        )
    print_table(table)
    for part, unit in (("whole", "seconds"), ("processor", "processor seconds")):
        print(f"ratio of each round, {unit}: " + ", ".join(f"{x:.2f}" for x in ratios[part]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
