"""Generated text on stdout: streamed, escaped, and colored by probability if asked for."""

import logging
import math
import os
import sys
from collections.abc import Sequence

from tinylm.common.console import readable
from tinylm.config.schema import SamplingConfig
from tinylm.generate.chat import StreamingStrip
from tinylm.generate.constraint import Constraint
from tinylm.generate.output import FinishReason, Prompt, TokenOutput
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

# Lower bound of a token's probability, and the terminal color for it.
PROBABILITY_COLORS = ((0.9, "92"), (0.5, "32"), (0.2, "33"), (0.05, "35"), (0.0, "31"))
DIM = "2"


class Screen:
    """The generated texts on stdout: the first while it is generated, the others after it.

    A continuation is printed after its prompt; an answer alone, without surrounding whitespace.
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: Tokenizer,
        n_samples: int,
        *,
        is_answer: bool,
        show_probs: bool,
    ):
        self._tokenizer, self._n_samples = tokenizer, n_samples
        self._strip = StreamingStrip()
        self._opening = "" if is_answer else readable(prompt)
        self._format = self._stripped if is_answer else self._plain
        if has_color():
            if self._opening:
                self._opening = in_color(DIM, self._opening)
            if show_probs:
                self._format = ProbabilityColors()
                sys.stderr.write(f"probability: {ProbabilityColors.legend()}\n")
        elif show_probs:
            self._opening = ""
            self._format = self._with_probability
        self._begin(0)

    def show(self, output: TokenOutput) -> None:
        """Print a token of the first text at once."""
        if output.sample == 0:
            write(self._format(output) + ("\n" if output.finish_reason else ""))

    def show_rest(self, samples: Sequence[Sequence[TokenOutput]]) -> None:
        """Print the texts after the first."""
        for number, outputs in enumerate(samples[1:], start=1):
            self._begin(number)
            write("".join(map(self._format, outputs)) + "\n")

    def _begin(self, sample: int) -> None:
        """Print what is before the text of a sample."""
        self._strip = StreamingStrip()
        heading = f"--- {sample + 1} of {self._n_samples}\n" if self._n_samples > 1 else ""
        write(heading + self._opening)

    def _plain(self, output: TokenOutput) -> str:
        return readable(output.text)

    def _stripped(self, output: TokenOutput) -> str:
        return readable(self._strip(output.text))

    def _with_probability(self, output: TokenOutput) -> str:
        return f"{self._tokenizer.token_text(output.token_id)}({output.probability:.2f}) "


class ProbabilityColors:
    """Colors text by its probability; text of several tokens by the product of theirs."""

    def __init__(self) -> None:
        self._log_prob = 0.0

    def __call__(self, output: TokenOutput) -> str:
        self._log_prob += output.log_prob
        probability = math.exp(self._log_prob)
        if output.text or output.finish_reason:
            self._log_prob = 0.0
        if not output.text:
            return ""
        color = next(color for least, color in PROBABILITY_COLORS if probability >= least)
        return in_color(color, readable(output.text))

    @staticmethod
    def legend() -> str:
        """The colors and their probabilities, on one line."""
        return "  ".join(in_color(color, f"from {least:g}") for least, color in PROBABILITY_COLORS)


def in_color(code: str, text: str) -> str:
    """`text` in a terminal color that ends with it, so that an interrupt leaves no color on."""
    return f"\x1b[{code}m{text}\x1b[0m"


def has_color() -> bool:
    """Whether stdout is a terminal whose user wants color (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return sys.stdout.isatty()


def write(text: str) -> None:
    """Print a part of a result at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def log_ignored(prompt: Prompt, sampling: SamplingConfig) -> None:
    """Log how many tokens of the prompt were dropped, and which settings beam search ignores."""
    if prompt.truncated:
        logger.info(
            "prompt: %d tokens, but the context holds %d: the first %d are dropped",
            len(prompt.ids) + prompt.truncated,
            len(prompt.ids),
            prompt.truncated,
        )
    if sampling.n_beams > 1:
        logger.info("beam search ignores temperature, top_k, top_p, min_p and seed")


def log_incomplete(
    constraint: Constraint | None, finish_reasons: Sequence[FinishReason | None]
) -> None:
    """Log how many texts of a constraint were cut off, so that they are not what it demands."""
    n = finish_reasons.count("length")
    if constraint is not None and n:
        logger.info(
            "%d of %d texts ended before the %s was complete; raise --max-new-tokens",
            *(n, len(finish_reasons), constraint.name),
        )
