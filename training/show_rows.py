"""Print the first rows of a run as training sees them:
`--show-rows N` of train.py and finetune.py.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, count, islice

from rich.console import Console
from rich.text import Text

from data import PretrainData, RunData
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import AUTO, Config
from tinylm.rows.inspect import (
    CLOSE,
    OPEN,
    SEAM,
    WALL,
    InspectedRow,
    RowToken,
    render_row,
    row_tokens,
    with_borders,
)
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX
from training.build import find_initial_model, initialized_config, prepare_tokenizer
from training.context import RunContext
from training.run import Stage
from training.settle import with_max_steps, with_micro_batch
from training.support import require_supported

logger = logging.getLogger(__name__)

# Consecutive documents of a row get these colors in turn.
DOCUMENT_COLORS = ("default", "cyan", "yellow")


def show_rows_of_run(stage: Stage, config: Config, n_rows: int) -> int:
    """Print the first rows of the run that `config` describes, and return the exit code."""
    # a worker process would take longer to start than a few rows take to read
    data = config.data.model_copy(update={"num_workers": 0})
    config = config.model_copy(update={"data": data})
    require_supported(stage.name, config)
    if config.training.duration is not None:  # the rows do not depend on it
        config = with_max_steps(config, n_rows)
    if config.training.micro_batch_size == AUTO:
        config = with_micro_batch(config, config.training.batch_size)
    needed = config
    if stage.open_rows is not None:  # the training data alone
        data = config.data.model_copy(update={"val_dataset": None})
        needed = config.model_copy(update={"data": data})
    stage.find_data(needed)
    initial = find_initial_model(config, None)
    if initial is not None:
        config = initialized_config(config, initial)
    tokenizer, config = prepare_tokenizer(config, None, initial, stage.learn_tokenizer)
    device, _ = pick_device(config.hardware.accelerator, key="hardware.accelerator")
    open_rows = stage.open_rows or stage.open_data
    has_encoder = initial is not None and initial.has_encoder
    show_rows(
        open_rows(RunContext(stage.name, config, device, has_encoder=has_encoder), tokenizer),
        n_rows,
    )
    return 0


def show_rows(data: RunData, n_rows: int) -> None:
    """Print the first `n_rows` rows of a run on stdout, and no more than the run has.

    Args:
        data: a data module whose `prepare` was called.
        n_rows: at least 1.
    """
    if n_rows < 1:
        problem = f"must be at least 1, got {n_rows}"
        raise UserError("--show-rows", problem, "Give the number of rows to print")
    training = data.config.training
    in_run = training.max_steps * training.grad_accum_steps * training.micro_batch_size
    first = min(n_rows, in_run)
    rows = islice(
        inspect_tokens(data) if isinstance(data, PretrainData) else inspect_rows(data), first
    )
    labeled = "target"
    if data.config.verifier is not None:
        labeled = "departure"
    elif data.config.reward_model is not None:
        labeled = "rewarded token"
    print_rows(chain.from_iterable(rows), data.tokenizer, labeled)


def inspect_tokens(data: PretrainData) -> Iterator[list[InspectedRow]]:
    """The rows of pretraining in the order of the run,
    with the dataset and the first token of each.

    Of a stream only the start of each window is known, not the place of each row.
    """
    names = [data.config.data.dataset]
    if data.config.data.mix is not None:
        names = [part.dataset for part in data.config.data.mix]
    place = 0
    for k, batch in enumerate(data.train_dataloader()):
        for i, inputs in enumerate(batch["input_ids"]):
            where = printable(names[0])
            if data.train_files:
                origin = batch["origin"][i]
                source, start = origin if len(names) > 1 else (0, origin)
                where = f"{printable(names[source])} from token {start}"
            documents = batch["document_ids"][i].tolist() if "document_ids" in batch else None
            heading = f"row {place}, micro-batch {k}: {where}"
            yield [InspectedRow(heading, inputs.tolist(), batch["labels"][i].tolist(), documents)]
            place += 1


def inspect_rows(data: RunData) -> Iterator[list[InspectedRow]]:
    """The rows of another stage in the order of the run, each as one row to print or several."""
    dataset = data.train_dataset()
    for place in count():
        heading = f"row {place}, micro-batch {place // dataset.share.size}"
        yield list(data.inspect_row(heading, dataset.rows[dataset.order(place)], place))


def print_rows(rows: Iterable[InspectedRow], tokenizer: Tokenizer, labeled: str = "target") -> None:
    """Print rows on stdout, in color on a terminal that has it, with marks elsewhere;
    the legend goes to stderr.

    Args:
        rows: the rows, in order.
        tokenizer: decodes their tokens.
        labeled: the meaning of a label that is not IGNORE_INDEX.
    """
    console = Console(width=None if sys.stdout.isatty() else 400, highlight=False, markup=False)
    colored = console.is_terminal and not console.no_color
    legend = f"{OPEN}no {labeled}{CLOSE}"
    if colored:
        legend = f"dim: no {labeled}; another color: another document"
    logger.info(
        f"{SEAM} documents meet, {WALL}2{WALL} attention stops and document 2 begins, {legend}"
    )
    for row in rows:
        pieces = row_tokens(tokenizer, row.input_ids, row.labels, row.document_ids)
        masked = row.document_ids is not None
        text = (
            colored_row(pieces, masked=masked)
            if colored
            else Text(render_row(pieces, masked=masked))
        )
        n_labels = sum(label != IGNORE_INDEX for label in row.labels)
        n_documents = len({piece.document for piece in pieces})
        counts = f"{len(row.input_ids)} tokens, {labeled}s: {n_labels}, documents: {n_documents}\n"
        console.print(Text(row.heading, "bold"), soft_wrap=True)
        console.print(text, soft_wrap=True)
        console.print(counts, soft_wrap=True)


def colored_row(pieces: list[RowToken], *, masked: bool) -> Text:
    """A row with a color for each document, dim where a token is not a target."""
    text = Text()
    for border, piece in with_borders(pieces, masked=masked):
        color = DOCUMENT_COLORS[piece.document % len(DOCUMENT_COLORS)]
        text.append(border, "bold red")
        text.append(piece.text, color if piece.target else f"dim {color}")
    return text
