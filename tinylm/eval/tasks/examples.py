"""The examples of a split for fine-tuning and its validation, from each source of a config."""

from dataclasses import dataclass

from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.row_sources import RowSource, row_sources
from tinylm.rows.sft import build_examples
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import Example


@dataclass(frozen=True)
class SourceExamples:
    """The examples of one source, and what was truncated and skipped."""

    source: RowSource
    examples: list[Example]
    report: RowReport


def source_examples(
    config: Config, which: Which, tokenizer: Tokenizer, has_encoder: bool = False
) -> list[SourceExamples]:
    """The examples of a split, of each source in the template of that source.

    Args:
        config: of a fine-tuning run; its data and training sections are used.
        which: training or validation.
        tokenizer: encodes the rows.
        has_encoder: whether they are for an encoder-decoder.

    Raises:
        UserError: see `build_examples`.
    """
    training, found = config.training, []
    for source in row_sources(config.data, which):
        data = source.data
        try:
            examples, report = build_examples(
                data,
                which,
                training.seed,
                make_template(data.template, tokenizer, tools=data.tools, has_encoder=has_encoder),
                tokenizer,
                training.seq_len,
                train_on=training.train_on,
                to_conversation=conversation_parser(data),
                built_in=requested_built_in_rows(data),
                source=data.dataset if source.is_part else "",
            )
        except UserError as error:
            raise source.renamed(error) from None
        found.append(SourceExamples(source, examples, report))
    return found
