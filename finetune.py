"""Supervised fine-tuning: a trained model learns to answer, whole or by small adapters.

    python finetune.py --config config_finetune.yaml
    python finetune.py --config configs/lora-smollm2.yaml data.dataset=mine.jsonl
    python finetune.py --config configs/sst2-gpt2-lora.yaml
    python finetune.py --config configs/instructions-from-scratch.yaml

It begins with the weights that training.init_from names, a checkpoint of ours or a Hugging Face model (hf:NAME), and is
otherwise train.py: the same flags, the same steps, the same exact resume. What it eats are rows of questions and answers
(`LitExamples` in data.py), of which the answers are learned; with training.train_on=all the questions are learned too,
and then it may also begin with new weights.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from tinylm.errors import UserError
from tinylm.program import run_program
from train import Say, make_parser, run_stage

if TYPE_CHECKING:
    from data import LitExamples
    from tinylm.config import Config, DataConfig
    from tinylm.tokenizer import Tokenizer


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    description = "Teach a trained model to answer. The same command again goes on from the newest checkpoint."
    return make_parser("finetune.py", "config_finetune.yaml", description).parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


def run(args: argparse.Namespace) -> int:
    """Fine-tune as the command line says."""
    from tinylm.config import load_config

    config = with_data_of_task(load_config(args.config, args.overrides))
    check_beginning(config)
    return run_stage("sft", config, args, open_examples)


def check_beginning(config: "Config") -> None:
    """Refuse new weights where they could not learn: without the questions, or with a tokenizer that is learned from documents.

    Raises:
        UserError: naming the setting.
    """
    if config.training.init_from is not None:
        return
    if config.training.train_on == "response":
        mend = "Set it to a checkpoint or to hf:NAME, or begin with new weights and training.train_on=all"
        raise UserError(f"training.init_from: answers alone are learned by a model that was trained before. {mend}.")
    if config.tokenizer.kind in ("bpe", "char"):
        learned = f"kind {config.tokenizer.kind} is learned from documents, and these are rows of questions and answers"
        raise UserError(f"tokenizer.kind: {learned}. Set byte, or tokenizer.path to one learned before (python -m tinylm tokenizer train).")


SMOKE = "smoke"  # what data.dataset says for the rows that a task brings


def with_data_of_task(config: "Config") -> "Config":
    """The settings with the task's rows on the hub, where there is a task and data.dataset is left out; it is trained on the training split."""
    from tinylm.tasks import NAMED

    data = config.data
    if data.task is None or "dataset" in data.model_fields_set:
        return config
    hub = NAMED[data.task].hub
    assert hub is not None, "only pairs has none, and data.task cannot name it"
    named = {"dataset": hub.dataset, "dataset_config": data.dataset_config or hub.config, "split": hub.train}
    return config.model_copy(update={"data": data.model_copy(update=named)})


def on_hub(data: "DataConfig") -> bool:
    """Whether the rows are those of a task on the hub."""
    from tinylm.tasks import NAMED

    hub = NAMED[data.task].hub if data.task else None
    return hub is not None and data.dataset == hub.dataset and not os.path.exists(hub.dataset)


def rows_of_task(data: "DataConfig") -> dict[str, Any]:
    """What `LitExamples` is told of a task: how its rows are read, and the built-in ones where they are asked for; a file of that name wins."""
    from tinylm.tasks import NAMED
    from tinylm.tasks.data import built_in_rows

    if data.task is None:
        return {}
    task = NAMED[data.task]
    built_in = data.dataset == SMOKE and not os.path.exists(SMOKE)
    return {"conversation_of": task.conversation, "built_in": built_in_rows(task) if built_in else ()}


def open_examples(config: "Config", tokenizer: "Tokenizer", say: Say) -> "LitExamples":
    """The questions and answers of a run."""
    from data import LitExamples

    data = LitExamples(config, tokenizer, **rows_of_task(config.data))
    try:
        data.prepare()
    except UserError as problem:
        if not on_hub(config.data):
            raise
        raise UserError(f"{problem} For task {config.data.task} that is data.dataset=PATH; data.dataset={SMOKE} takes a few built-in rows.") from None
    say(data.describe())
    for note in data.notes:
        say(note)
    return data


if __name__ == "__main__":
    sys.exit(main())
