"""Continue a prompt with a trained model, or ask one that was taught to answer, to the terminal as it is written.

    python infer.py --prompt "Attention is"
    echo "Attention is" | python infer.py --temperature 0 --json
    python infer.py --ckpt checkpoints/sft/best.ckpt --prompt "Name three primary colours."
    python infer.py --chat
    python infer.py --prompt "12 + 7 =" --best-of 8 --verifier checkpoints/verifier/best.ckpt

A fine-tuned checkpoint says how its questions were written, and the prompt is written so; --no-wrap leaves it as it is. A
base model only ever continues. Results go to stdout, everything else to stderr. No Lightning here, and torch only after --help.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tinylm.cli.program import Parser, run_program
from tinylm.common.console import readable, say
from tinylm.common.device import NAMES, pick_device
from tinylm.common.errors import UserError, printable
from tinylm.config.schema import SamplingConfig, TokenizerConfig

if TYPE_CHECKING:
    from tinylm.checkpoint.load import Loaded
    from tinylm.generate.chat import Chat
    from tinylm.generate.engine import Completion, Engine, Piece, Prompt
    from tinylm.rows.templates import Template
    from tinylm.tokenizer.base import Tokenizer

# Least probability of a token, and the terminal colour that shows it.
BANDS = ((0.9, "92"), (0.5, "32"), (0.2, "33"), (0.05, "35"), (0.0, "31"))


def main(argv: list[str] | None = None) -> int:
    """Run the program; its exit code comes back."""
    arguments = make_parser().parse_args(argv)
    return run_program(lambda: infer(arguments), debug=arguments.debug)


def infer(arguments: argparse.Namespace) -> int:
    """Load the model, write the text."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name in SamplingConfig.model_fields
    }
    sampling_settings(
        given, SamplingConfig()
    )  # a bad flag is told before the seconds that loading takes
    check_chat(arguments, given)
    check_best_of(arguments, given)
    prompt = None if arguments.chat else read_prompt(arguments.prompt)
    device, reason = pick_device(arguments.device)
    say(f"device: {device} ({reason})")
    loaded = load(arguments, device)
    say(f"checkpoint: {loaded.info.path}, step {loaded.info.step}")
    sampling = sampling_settings(given, loaded.config.sampling)

    from tinylm.generate.engine import Engine

    engine = Engine(loaded.model, choose_tokenizer(arguments.tokenizer, loaded.tokenizer))
    template = find_template(arguments, loaded, engine.tokenizer)
    if prompt is None:
        assert template is not None, "find_template sees to it"
        return chat(engine, template, sampling, arguments.system)
    return write_texts(prompt, engine, template, sampling, loaded, arguments)


def write_texts(
    prompt: str,
    engine: "Engine",
    template: "Template | None",
    sampling: SamplingConfig,
    loaded: "Loaded",
    arguments: argparse.Namespace,
) -> int:
    """The continuations of one prompt, or the answers to it."""
    from tinylm.generate.engine import Completion

    tokenizer = engine.tokenizer
    encoded, stop_ids = put(prompt, engine, template, arguments.system)
    say_what_is_left_out(encoded, sampling)
    if arguments.best_of is not None:
        return write_best(prompt, engine, encoded, sampling, arguments, stop_ids)
    show = Screen(prompt, tokenizer, sampling.n_samples, arguments, answers=template is not None)
    pieces: list[list[Piece]] = [[] for _ in range(sampling.n_samples)]
    start = time.perf_counter()
    for piece in engine.stream(encoded, sampling, stop_ids=stop_ids):
        pieces[piece.sample].append(piece)
        show.now(piece)
    seconds = time.perf_counter() - start
    show.rest(pieces)
    if template and not any(piece.text.strip() for row in pieces for piece in row):
        say(
            "the answer is blank: the model ended it at once, or wrote white space; more training may help"
        )
    if arguments.json:
        completions = [
            describe(Completion.of(encoded, row), row, tokenizer, show_probs=arguments.show_probs)
            for row in pieces
        ]
        of = {
            "prompt": prompt,
            "template": template and template.name,
            "checkpoint": str(loaded.info.path),
            "step": loaded.info.step,
        }
        write(json.dumps({**of, "completions": completions}, indent=2) + "\n")
    n_tokens = sum(map(len, pieces))
    say(f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s")
    return 0


def put(
    prompt: str, engine: "Engine", template: "Template | None", system: str | None
) -> "tuple[Prompt, tuple[int, ...]]":
    """The prompt as the model reads it, and the tokens that end its answer beside EOS."""
    from tinylm.rows.conversation import Turn

    if template is None:
        return engine.encode_prompt(prompt), ()
    before = () if system is None else (Turn("system", system),)
    return engine.fit_prompt(
        template.prompt_ids((*before, Turn("user", prompt)), engine.tokenizer)
    ), template.stop_ids(engine.tokenizer)


# --- a conversation ---------------------------------------------------------------------------------------------------


def chat(
    engine: "Engine", template: "Template", sampling: SamplingConfig, system: str | None
) -> int:
    """Answer line by line, until the lines end or /exit; what was said before is part of each question."""
    from tinylm.generate.chat import Chat

    talk, typed = Chat(engine, template, sampling.max_new_tokens, system), sys.stdin.isatty()
    say(
        "chat: one question a line; /reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
    )
    if typed:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # run_program puts its own back
    for line in lines_of_stdin(typed):
        if line == "/exit":
            break
        try:
            obey(line, talk, sampling)
        except KeyboardInterrupt:
            if not typed:  # nobody is there to go on
                raise
    return 0


def obey(line: str, talk: "Chat", sampling: SamplingConfig) -> None:
    """Answer a question, or do what a command says."""
    if line == "/reset":
        talk.forget()
        say("forgotten")
    elif re.fullmatch("/[a-z]+", line):
        say(f"{line}: no such command. There are /reset and /exit.")
    elif line.strip():
        try:
            answer(line, talk, sampling)
        except UserError as error:  # one question that cannot be asked is not the end
            say(f"error: {error}")


def answer(text: str, talk: "Chat", sampling: SamplingConfig) -> None:
    """Write the answer to a question as it comes; what was written is remembered, also of one that was stopped."""
    question = talk.ask(text)
    if question.forgotten:
        say(
            f"the context is full: the oldest {question.forgotten} of the answered questions are forgotten"
        )
    say_what_is_left_out(question.prompt, sampling)
    shown, trim = "", Trim()
    try:
        for piece in talk.engine.stream(
            question.prompt, sampling, stop_ids=talk.template.stop_ids(talk.engine.tokenizer)
        ):
            part = trim(piece.text)
            shown += part
            write(readable(part))
    finally:
        talk.remember(question, shown)
        write("\n")


def lines_of_stdin(typed: bool) -> Iterator[str]:
    """The lines that are typed, with a sign that one is waited for, or piped in; one that is no text is told and left out."""
    if typed:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (gives `input` its keys)
    while True:
        try:
            line = input("> " if sys.stdout.isatty() else "") if typed else piped_line()
        except EOFError:
            return
        except UnicodeDecodeError:
            say("error: standard input: not UTF-8 text. The line is left out.")
        except KeyboardInterrupt:
            if not typed:
                raise
            say("")
        else:
            yield line


def piped_line() -> str:
    """The next line of a pipe or file, without its end."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode().rstrip("\r\n")


# --- the best of several answers ------------------------------------------------------------------------------------


def check_best_of(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse flags that choosing among answers contradicts."""
    n = arguments.best_of
    if (n is None) != (arguments.verifier is None):
        raise UserError(
            "--best-of, --verifier: one needs the other. Give --best-of 8 --verifier FILE, or neither."
        )
    if n is None:
        return
    if arguments.chat:
        raise UserError("--best-of: it answers one prompt. Leave --chat or --best-of out.")
    if not isinstance(n, int) or not 2 <= n <= 1024:
        raise UserError(f"--best-of: expected a whole number from 2 to 1024, found {printable(n)}.")
    for name in ("n_samples", "n_beams"):
        if given.get(name, 1) != 1:
            raise UserError(
                f"{flag(name)}: --best-of says how many answers are drawn. Leave one of the two out."
            )
    if arguments.show_probs:
        raise UserError(
            "--show-probs: it shows one text as it is written, and --best-of chooses when all are. Leave one of the two out."
        )


def write_best(
    prompt: str,
    engine: "Engine",
    encoded: "Prompt",
    sampling: SamplingConfig,
    arguments: argparse.Namespace,
    stop_ids: Sequence[int],
) -> int:
    """Draw the answers, judge them, write the one that is most likely right; all, and how else one could be chosen, go to stderr, or into the JSON.

    The first that was drawn is a random choice. What an oracle would choose only a task with known answers tells: evaluate_checkpoints.py.
    """
    from tinylm.eval.best_of_n import majority_vote
    from tinylm.eval.verifier_scoring import VerifierScorer

    if sampling.temperature == 0:
        raise UserError(
            "--temperature: 0 writes the same answer each time, and --best-of chooses among different ones. Give --temperature 0.7."
        )
    judge = VerifierScorer.load(arguments.verifier, str(engine.model.embedding.weight.device))
    completions = engine.generate(
        encoded,
        sampling.model_copy(update={"n_samples": arguments.best_of, "n_beams": 1}),
        stop_ids=stop_ids,
    )
    texts = [completion.text for completion in completions]
    probabilities = judge.probabilities(prompt, texts)
    others = {"majority_vote": texts[majority_vote(texts)], "random_choice": texts[0]}
    ranked = sorted(zip(probabilities, completions, strict=True), key=lambda pair: -pair[0])
    if arguments.json:
        answers = [
            {"probability": probability, **dataclasses.asdict(completion)}
            for probability, completion in ranked
        ]
        write(
            json.dumps(
                {
                    "prompt": prompt,
                    "verifier": str(arguments.verifier),
                    "completions": answers,
                    **others,
                },
                indent=2,
            )
            + "\n"
        )
        return 0
    for probability, completion in ranked:
        say(f"verifier: {probability:.3f}  {completion.text.strip()}")
    for choice, text in others.items():
        say(f"{choice.replace('_', ' ')}: {text.strip()}")
    write(readable(ranked[0][1].text.strip()) + "\n")
    return 0


# --- the command line -----------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The flags; those of sampling are the fields of SamplingConfig."""
    parser = Parser(
        prog="python infer.py",
        usage='python infer.py --prompt "Attention is" [flags]',
        description="Continue a prompt with a trained model, or ask one that was fine-tuned.",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue, or question; - or no flag: read from standard input, without its last newline",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="talk with a fine-tuned model: one question a line, the answers are remembered",
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="what a fine-tuned model is told before the first question"
    )
    parser.add_argument(
        "--no-wrap",
        action="store_true",
        help="continue the prompt as it stands, also with a fine-tuned model",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--ckpt",
        type=Path,
        metavar="FILE",
        help="checkpoint; without it the newest sound one in --dir, for --chat of a fine-tuned model",
    )
    where.add_argument(
        "--dir",
        type=Path,
        default=Path("checkpoints"),
        metavar="FOLDER",
        help="folder of checkpoints (checkpoints)",
    )
    parser.add_argument(
        "--tokenizer",
        default="auto",
        metavar="NAME",
        help="auto: the one in the checkpoint; else byte, or a Hugging Face name or folder",
    )
    parser.add_argument(
        "--device", choices=NAMES, default="auto", help="auto: CUDA, else MPS, else the CPU"
    )
    parser.add_argument(
        "--show-probs",
        action="store_true",
        help="colour each token by its probability; without colour: token(probability)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the completions as JSON when they are finished"
    )
    parser.add_argument(
        "--best-of",
        type=number,
        metavar="N",
        help="draw N answers and print the one that --verifier finds most likely right",
    )
    parser.add_argument(
        "--verifier",
        type=Path,
        metavar="FILE",
        help="checkpoint of a verifier (finetune.py --config configs/verifier.yaml)",
    )
    sampling = parser.add_argument_group(
        "sampling",
        "a default that the checkpoint's config sets replaces the one shown; none switches a setting off",
    )
    for name, field in SamplingConfig.model_fields.items():
        shown = "off" if field.default in (None, ()) else field.default
        text = f"{field.description} ({shown})".replace("%", "%%")
        if name == "stop":
            sampling.add_argument(
                flag(name),
                action="append",
                default=argparse.SUPPRESS,
                metavar="TEXT",
                help=f"{text}; may be given several times",
            )
        else:
            sampling.add_argument(
                flag(name), type=number, default=argparse.SUPPRESS, metavar="N", help=text
            )
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
        if (
            error["type"] == "value_error"
        ):  # from a validator of ours, which names its setting first
            name, _, rest = str(error["ctx"]["error"]).partition(":")
            raise UserError(f"{flag(name)}:{rest}.") from None
        what = error["msg"].removeprefix("Input ").removeprefix("String ")
        raise UserError(
            f"{flag(str(error['loc'][0]))}: {what}, found {printable(repr(error['input']))[:80]}. The flags: python infer.py --help"
        ) from None


def check_chat(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Refuse flags that have no part in a chat."""
    if not arguments.chat:
        return
    flags = {
        "--prompt": arguments.prompt is not None,
        "--json": arguments.json,
        "--show-probs": arguments.show_probs,
        "--no-wrap": arguments.no_wrap,
    }
    flags["--n-samples"] = given.get("n_samples", 1) != 1
    for name in (name for name, present in flags.items() if present):
        raise UserError(f"{name}: it has no part in --chat. Leave one of the two out.")
    if sys.stdin is None:
        raise UserError(
            "--chat: standard input is closed. Start it in a terminal, or pipe questions into it, one a line."
        )


def read_prompt(argument: str | None) -> str:
    """The text of --prompt, or standard input."""
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except (
            UnicodeEncodeError
        ):  # Python keeps undecodable bytes of the command line as lone surrogates
            raise UserError(
                "--prompt: not UTF-8 text. Type it in a UTF-8 terminal, or pipe a UTF-8 file into the program."
            ) from None
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise UserError(
            '--prompt: missing. Give --prompt "Attention is", or pipe a text into the program; --prompt "" starts from nothing.'
        )
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input: not UTF-8 text (byte {error.start}). Convert it to UTF-8."
        ) from None


# --- what it needs --------------------------------------------------------------------------------------------------


def load(arguments: argparse.Namespace, device: str) -> "Loaded":
    """The model of --ckpt, or of the newest sound checkpoint in --dir; damaged ones that were passed over are named."""
    from tinylm.checkpoint.format import latest_valid
    from tinylm.checkpoint.load import load_model

    if arguments.chat and arguments.ckpt is None:
        return load_model(newest_answering(arguments.dir), device)
    path = arguments.ckpt or latest_valid(arguments.dir, lambda error: say(f"passed over: {error}"))
    if path is None:
        raise UserError(
            f"{printable(arguments.dir)}: no checkpoint here. Train one (python train.py --config config_smoke.yaml), or give --ckpt FILE."
        )
    return load_model(path, device)


def newest_answering(folder: Path) -> Path:
    """The newest sound checkpoint of each folder of runs in `folder`, itself included, that was taught to answer; the latest of them."""
    from tinylm.checkpoint.format import latest_valid
    from tinylm.checkpoint.info import describe
    from tinylm.rows.conversation import CHAT_STAGES

    below = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    newest = [
        latest_valid(place, lambda error: say(f"passed over: {error}"))
        for place in (folder, *below)
    ]
    answering = [
        info
        for info in (describe(path) for path in newest if path is not None)
        if info.stage in CHAT_STAGES
    ]
    if not answering:
        mend = "Teach a model to answer (python finetune.py --config config_finetune.yaml), or give --ckpt FILE"
        raise UserError(
            f"{printable(folder)}: no fine-tuned checkpoint here or in a folder below. {mend}."
        )
    return max(answering, key=lambda info: info.created).path


def find_template(
    arguments: argparse.Namespace, loaded: "Loaded", tokenizer: "Tokenizer"
) -> "Template | None":
    """How the checkpoint's questions are written, which is said; None for a base model and for --no-wrap.

    Raises:
        UserError: --chat or --system was given, and there is none.
    """
    from tinylm.rows.template_factory import make_template

    if loaded.template is not None and not arguments.no_wrap:
        otherwise = "" if arguments.chat else "; --no-wrap continues the prompt as it stands"
        say(f"template: {loaded.template}, as it was fine-tuned{otherwise}")
        return make_template(loaded.template, tokenizer)
    if arguments.chat:
        path = printable(loaded.info.path)
        mend = "Fine-tune it first (python finetune.py --config config_finetune.yaml), or continue a text: --prompt TEXT"
        raise UserError(
            f"--chat: {path} is a base model, which continues texts and was not taught to answer. {mend}."
        )
    if arguments.system is not None:
        raise UserError(
            "--system: only a fine-tuned model that is asked in its template is told something before. Leave it out."
        )
    return None


def choose_tokenizer(name: str, inside: "Tokenizer") -> "Tokenizer":
    """The tokenizer inside the checkpoint for `auto`, else the named one if its ids fit the model."""
    if name == "auto":
        return inside
    from tinylm.tokenizer.factory import make_tokenizer

    try:
        config = TokenizerConfig() if name == "byte" else TokenizerConfig(kind="hf", path=name)
    except ValidationError:
        raise UserError(
            f"--tokenizer: {printable(repr(name))[:80]} is no name or folder. Give auto, byte, or a Hugging Face name or folder."
        ) from None
    tokenizer = make_tokenizer(config, tuple)
    if tokenizer.vocab_size != inside.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, and this model was trained with {inside.vocab_size}"
        raise UserError(f"--tokenizer: {printable(name)} {sizes}. Leave --tokenizer out.")
    return tokenizer


def say_what_is_left_out(prompt: "Prompt", sampling: SamplingConfig) -> None:
    """Tell of a prompt that was cut and of settings that beam search does not use."""
    if prompt.truncated:
        total = len(prompt.ids) + prompt.truncated
        say(
            f"prompt: {total} tokens, and the context holds {len(prompt.ids)}: the first {prompt.truncated} are left out"
        )
    if sampling.n_beams > 1:
        say("beam search: temperature, top_k, top_p, min_p and seed have no part in it")


# --- what is seen ---------------------------------------------------------------------------------------------------


class Screen:
    """The texts on stdout: the first as it is written, the others after it, nothing with --json.

    Answers stand alone, without the white space of their template; a text that is continued stands before what was written.
    """

    def __init__(
        self,
        prompt: str,
        tokenizer: "Tokenizer",
        n_samples: int,
        arguments: argparse.Namespace,
        *,
        answers: bool = False,
    ):
        self.silent, self.n_samples, self.trim = arguments.json, n_samples, Trim()
        coloured = has_colour()
        self.opening = "" if answers else readable(prompt)
        if coloured and self.opening:
            self.opening = in_colour("2", self.opening)
        self.form: Callable[[Piece], str] = lambda piece: readable(
            self.trim(piece.text) if answers else piece.text
        )
        if arguments.show_probs and not self.silent:
            if coloured:
                self.form = Coloured()
                sys.stderr.write(
                    "probability: "
                    + "  ".join(in_colour(code, f"from {least:g}") for least, code in BANDS)
                    + "\n"
                )
            else:
                self.opening = ""
                self.form = lambda piece: (
                    f"{tokenizer.token_text(piece.token_id)}({piece.probability:.2f}) "
                )
        self.begin(0)

    def begin(self, sample: int) -> None:
        """Open the text of a sample."""
        self.trim = Trim()
        if not self.silent:
            write(
                (f"--- {sample + 1} of {self.n_samples}\n" if self.n_samples > 1 else "")
                + self.opening
            )

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


class Trim:
    """Lets a text through in parts, without the white space at its two ends.

    >>> trim = Trim()
    >>> [trim(part) for part in (" ", " red,", " ", "blue ", "")]
    ['', 'red,', '', ' blue', '']
    """

    def __init__(self) -> None:
        self.held, self.begun = "", False

    def __call__(self, text: str) -> str:
        text = self.held + text if self.begun else text.lstrip()
        shown = text.rstrip()
        self.begun = self.begun or bool(shown)
        self.held = text[len(shown) :]
        return shown


class Coloured:
    """Shows pieces coloured by probability; text that several tokens make together by the probability of them all."""

    def __init__(self) -> None:
        self.log_prob = 0.0

    def __call__(self, piece: "Piece") -> str:
        self.log_prob += piece.log_prob
        probability = math.exp(self.log_prob)
        if piece.text or piece.finish_reason:
            self.log_prob = 0.0
        return (
            in_colour(
                next(code for least, code in BANDS if probability >= least), readable(piece.text)
            )
            if piece.text
            else ""
        )


def describe(
    completion: "Completion", pieces: Iterable["Piece"], tokenizer: "Tokenizer", *, show_probs: bool
) -> dict[str, Any]:
    """A completion as plain values; with its tokens' probabilities if asked for."""
    tokens = [
        {"token": tokenizer.token_text(piece.token_id), "probability": piece.probability}
        for piece in pieces
    ]
    return {**dataclasses.asdict(completion), **({"tokens": tokens} if show_probs else {})}


def in_colour(code: str, text: str) -> str:
    """`text` in a terminal colour; the colour ends with it, so that an interrupt leaves none behind."""
    return f"\x1b[{code}m{text}\x1b[0m"


def has_colour() -> bool:
    """Whether stdout is a terminal whose user wants colour (https://no-color.org)."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def write(text: str) -> None:
    """Put a result on stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
