"""Continue a prompt with a trained model, to the terminal as it is written.

    python infer.py --prompt "Attention is"
    echo "Attention is" | python infer.py --temperature 0 --json
    python infer.py --prompt "12 + 7 =" --best-of 8 --verifier checkpoints/verifier/best.ckpt

Results go to stdout, everything else to stderr. No Lightning here, and torch only after --help.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tinylm.config import SamplingConfig, TokenizerConfig
from tinylm.device import NAMES, pick_device
from tinylm.errors import UserError, printable
from tinylm.program import Parser, readable, run_program, say

if TYPE_CHECKING:
    from tinylm.checkpoint import Loaded
    from tinylm.engine import Completion, Engine, Piece, Prompt
    from tinylm.tokenizer import Tokenizer

# Least probability of a token, and the terminal colour that shows it.
BANDS = ((0.9, "92"), (0.5, "32"), (0.2, "33"), (0.05, "35"), (0.0, "31"))


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit code comes back."""
    arguments = make_parser().parse_args(argv)
    return run_program(lambda: infer(arguments), debug=arguments.debug)


def infer(arguments: argparse.Namespace) -> int:
    """Load the model, write the text."""
    given = {name: value for name, value in vars(arguments).items() if name in SamplingConfig.model_fields}
    sampling_settings(given, SamplingConfig())  # a bad flag is told before the seconds that loading takes
    check_best_of(arguments, given)
    prompt = read_prompt(arguments.prompt)
    device, reason = pick_device(arguments.device)
    say(f"device: {device} ({reason})")
    loaded = load(arguments, device)
    say(f"checkpoint: {loaded.info.path}, step {loaded.info.step}")
    sampling = sampling_settings(given, loaded.config.sampling)

    from tinylm.engine import Completion, Engine

    tokenizer = choose_tokenizer(arguments.tokenizer, loaded.tokenizer)
    engine = Engine(loaded.model, tokenizer)
    encoded = engine.encode_prompt(prompt)
    say_what_is_left_out(encoded, sampling)
    if arguments.best_of is not None:
        return write_best(prompt, engine, encoded, sampling, arguments, device)

    show = Screen(prompt, tokenizer, sampling.n_samples, arguments)
    pieces: list[list[Piece]] = [[] for _ in range(sampling.n_samples)]
    start = time.perf_counter()
    for piece in engine.stream(encoded, sampling):
        pieces[piece.sample].append(piece)
        show.now(piece)
    seconds = time.perf_counter() - start
    show.rest(pieces)
    if arguments.json:
        completions = [describe(Completion.of(encoded, row), row, tokenizer, show_probs=arguments.show_probs) for row in pieces]
        write(json.dumps({"prompt": prompt, "checkpoint": str(loaded.info.path), "step": loaded.info.step, "completions": completions}, indent=2) + "\n")
    n_tokens = sum(map(len, pieces))
    say(f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s")
    return 0


# --- the best of several answers ------------------------------------------------------------------------------------


def check_best_of(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse flags that choosing among answers contradicts."""
    n = arguments.best_of
    if (n is None) != (arguments.verifier is None):
        raise UserError("--best-of, --verifier: one needs the other. Give --best-of 8 --verifier FILE, or neither.")
    if n is None:
        return
    if not isinstance(n, int) or not 2 <= n <= 1024:
        raise UserError(f"--best-of: expected a whole number from 2 to 1024, found {printable(n)}.")
    for name in ("n_samples", "n_beams"):
        if given.get(name, 1) != 1:
            raise UserError(f"{flag(name)}: --best-of says how many answers are drawn. Leave one of the two out.")
    if arguments.show_probs:
        raise UserError("--show-probs: it shows one text as it is written, and --best-of chooses when all are. Leave one of the two out.")


def write_best(
    prompt: str, engine: "Engine", encoded: "Prompt", sampling: SamplingConfig, arguments: argparse.Namespace, device: str, stop_ids: Sequence[int] = ()
) -> int:
    """Draw the answers, judge them, write the one that is most likely right; the probabilities of all go to stderr, or into the JSON."""
    from tinylm.judge import Judge

    if sampling.temperature == 0:
        raise UserError("--temperature: 0 writes the same answer each time, and --best-of chooses among different ones. Give --temperature 0.7.")
    judge = Judge.load(arguments.verifier, device)
    completions = engine.generate(encoded, sampling.model_copy(update={"n_samples": arguments.best_of, "n_beams": 1}), stop_ids=stop_ids)
    probabilities = judge.probabilities(prompt, [completion.text for completion in completions])
    ranked = sorted(zip(probabilities, completions, strict=True), key=lambda pair: -pair[0])
    if arguments.json:
        answers = [{"probability": probability, **dataclasses.asdict(completion)} for probability, completion in ranked]
        write(json.dumps({"prompt": prompt, "verifier": str(arguments.verifier), "completions": answers}, indent=2) + "\n")
        return 0
    for probability, completion in ranked:
        say(f"verifier: {probability:.3f}  {completion.text.strip()}")
    write(readable(ranked[0][1].text.strip()) + "\n")
    return 0


# --- the command line -----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The flags; those of sampling are the fields of SamplingConfig."""
    parser = Parser(
        prog="python infer.py",
        usage='python infer.py --prompt "Attention is" [flags]',
        description="Continue a prompt with a trained model.",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue; - or no flag: read from standard input, without its last newline")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ckpt", type=Path, metavar="FILE", help="checkpoint; without it the newest sound one in --dir")
    where.add_argument("--dir", type=Path, default=Path("checkpoints"), metavar="FOLDER", help="folder of checkpoints (checkpoints)")
    parser.add_argument("--tokenizer", default="auto", metavar="NAME", help="auto: the one in the checkpoint; else byte, or a Hugging Face name or folder")
    parser.add_argument("--device", choices=NAMES, default="auto", help="auto: CUDA, else MPS, else the CPU")
    parser.add_argument("--show-probs", action="store_true", help="colour each token by its probability; without colour: token(probability)")
    parser.add_argument("--json", action="store_true", help="print the completions as JSON when they are finished")
    parser.add_argument("--best-of", type=number, metavar="N", help="draw N answers and print the one that --verifier finds most likely right")
    parser.add_argument("--verifier", type=Path, metavar="FILE", help="checkpoint of a verifier (finetune.py --config configs/verifier.yaml)")
    sampling = parser.add_argument_group("sampling", "a default that the checkpoint's config sets replaces the one shown; none switches a setting off")
    for name, field in SamplingConfig.model_fields.items():
        shown = "off" if field.default in (None, ()) else field.default
        text = f"{field.description} ({shown})".replace("%", "%%")
        if name == "stop":
            sampling.add_argument(flag(name), action="append", default=argparse.SUPPRESS, metavar="TEXT", help=f"{text}; may be given several times")
        else:
            sampling.add_argument(flag(name), type=number, default=argparse.SUPPRESS, metavar="N", help=text)
    return parser


def flag(name: str) -> str:
    """The flag of a setting: max_new_tokens is --max-new-tokens."""
    return f"--{name.replace('_', '-')}"


def number(text: str) -> int | float | str | None:
    """What a flag's text is as a number; other text stays itself, for SamplingConfig to refuse by name."""
    if text == "none":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sampling_settings(given: dict[str, Any], base: SamplingConfig) -> SamplingConfig:
    """`base` with the given flags on top.

    Raises:
        UserError: naming the flag that is out of bounds.
    """
    try:
        return SamplingConfig.model_validate({**base.model_dump(), **given})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        if error["type"] == "value_error":  # from a validator of ours, which names its setting first
            name, _, rest = str(error["ctx"]["error"]).partition(":")
            raise UserError(f"{flag(name)}:{rest}.") from None
        what = error["msg"].removeprefix("Input ").removeprefix("String ")
        raise UserError(f"{flag(str(error['loc'][0]))}: {what}, found {printable(repr(error['input']))[:80]}. The flags: python infer.py --help") from None


def read_prompt(argument: str | None) -> str:
    """The text of --prompt, or standard input."""
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except UnicodeEncodeError:  # Python keeps undecodable bytes of the command line as lone surrogates
            raise UserError("--prompt: not UTF-8 text. Type it in a UTF-8 terminal, or pipe a UTF-8 file into the program.") from None
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise UserError('--prompt: missing. Give --prompt "Attention is", or pipe a text into the program; --prompt "" starts from nothing.')
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text (byte {error.start}). Convert it to UTF-8.") from None


# --- what it needs --------------------------------------------------------------------------------------------------


def load(arguments: argparse.Namespace, device: str) -> "Loaded":
    """The model of --ckpt, or of the newest sound checkpoint in --dir; damaged ones that were passed over are named."""
    from tinylm.checkpoint import load_model, newest_sound

    path = arguments.ckpt or newest_sound(arguments.dir, lambda error: say(f"passed over: {error}"))
    if path is None:
        raise UserError(f"{printable(arguments.dir)}: no checkpoint here. Train one (python train.py --config config_smoke.yaml), or give --ckpt FILE.")
    return load_model(path, device)


def choose_tokenizer(name: str, inside: "Tokenizer") -> "Tokenizer":
    """The tokenizer inside the checkpoint for `auto`, else the named one if its ids fit the model."""
    if name == "auto":
        return inside
    from tinylm.tokenizer import make_tokenizer

    try:
        config = TokenizerConfig() if name == "byte" else TokenizerConfig(kind="hf", path=name)
    except ValidationError:
        raise UserError(f"--tokenizer: {printable(repr(name))[:80]} is no name or folder. Give auto, byte, or a Hugging Face name or folder.") from None
    tokenizer = make_tokenizer(config, tuple)
    if tokenizer.vocab_size != inside.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, and this model was trained with {inside.vocab_size}"
        raise UserError(f"--tokenizer: {printable(name)} {sizes}. Leave --tokenizer out.")
    return tokenizer


def say_what_is_left_out(prompt: "Prompt", sampling: SamplingConfig) -> None:
    """Tell of a prompt that was cut and of settings that beam search does not use."""
    if prompt.truncated:
        total = len(prompt.ids) + prompt.truncated
        say(f"prompt: {total} tokens, and the context holds {len(prompt.ids)}: the first {prompt.truncated} are left out")
    if sampling.n_beams > 1:
        say("beam search: temperature, top_k, top_p, min_p and seed have no part in it")


# --- what is seen ---------------------------------------------------------------------------------------------------


class Screen:
    """The texts on stdout: the first as it is written, the others after it, nothing with --json."""

    def __init__(self, prompt: str, tokenizer: "Tokenizer", n_samples: int, arguments: argparse.Namespace):
        self.silent, self.n_samples = arguments.json, n_samples
        coloured = has_colour()
        self.opening = readable(prompt)
        if coloured and prompt:
            self.opening = in_colour("2", self.opening)
        self.form: Callable[[Piece], str] = lambda piece: readable(piece.text)
        if arguments.show_probs and not self.silent:
            if coloured:
                self.form = Coloured()
                sys.stderr.write("probability: " + "  ".join(in_colour(code, f"from {least:g}") for least, code in BANDS) + "\n")
            else:
                self.opening = ""
                self.form = lambda piece: f"{tokenizer.token_text(piece.token_id)}({piece.probability:.2f}) "
        self.begin(0)

    def begin(self, sample: int) -> None:
        """Open the text of a sample."""
        if not self.silent:
            write((f"--- {sample + 1} of {self.n_samples}\n" if self.n_samples > 1 else "") + self.opening)

    def now(self, piece: "Piece") -> None:
        """Show a piece of the first text at once."""
        if not self.silent and piece.sample == 0:
            write(self.form(piece) + ("\n" if piece.finish_reason else ""))

    def rest(self, pieces: Sequence[Sequence["Piece"]]) -> None:
        """Show the texts after the first."""
        for sample, of_sample in enumerate(pieces):
            if sample and not self.silent:
                self.begin(sample)
                write("".join(map(self.form, of_sample)) + "\n")


class Coloured:
    """Shows pieces coloured by probability; text that several tokens make together by the probability of them all."""

    def __init__(self) -> None:
        self.log_prob = 0.0

    def __call__(self, piece: "Piece") -> str:
        self.log_prob += piece.log_prob
        probability = math.exp(self.log_prob)
        if piece.text or piece.finish_reason:
            self.log_prob = 0.0
        return in_colour(next(code for least, code in BANDS if probability >= least), readable(piece.text)) if piece.text else ""


def describe(completion: "Completion", pieces: Iterable["Piece"], tokenizer: "Tokenizer", *, show_probs: bool) -> dict[str, Any]:
    """A completion as plain values; with its tokens' probabilities if asked for."""
    tokens = [{"token": tokenizer.token_text(piece.token_id), "probability": piece.probability} for piece in pieces]
    return {**dataclasses.asdict(completion), **({"tokens": tokens} if show_probs else {})}


def in_colour(code: str, text: str) -> str:
    """`text` in a terminal colour; the colour ends with it, so that an interrupt leaves none behind."""
    return f"\x1b[{code}m{text}\x1b[0m"


def has_colour() -> bool:
    """Whether stdout is a terminal whose user wants colour (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(text: str) -> None:
    """Put a result on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
