"""The flags of `infer.py` that say what is asked and what the text must be."""

import argparse
from pathlib import Path

from tinylm.cli.model_flags import BATCH_HELP, positive
from tinylm.cli.sampling_flags import parse_number


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags for a prompt, a file of prompts, and a conversation."""
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue, or question; - or no flag: standard input, "
        "without its last newline",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="file of prompts: .txt (one per line), .jsonl (prompt or messages) or .csv "
        "(column prompt); - is standard input, lines of text or JSON",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="of --input: the rows with their completions, as .jsonl; after a kill the same "
        "command continues it",
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help=f"of --input: {BATCH_HELP}"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="chat with a fine-tuned model: one question per line, the conversation is context",
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message for a fine-tuned model (default: the most common one of its rows)",
    )
    parser.add_argument(
        "--no-wrap", action="store_true", help="do not format the prompt with the model's template"
    )


def add_result_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags for how the text is made, chosen and printed."""
    parser.add_argument(
        "--show-probs",
        action="store_true",
        help="color each token by its probability; without color: token(probability)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the finished completions as JSON"
    )
    parser.add_argument(
        "--json-schema",
        metavar="FILE|JSON",
        help="let the text be JSON that is valid by this schema (needs llguidance)",
    )
    parser.add_argument(
        "--regex",
        metavar="PATTERN",
        help="let the text be one that this regular expression matches as a whole "
        "(Rust's syntax; needs llguidance)",
    )
    parser.add_argument(
        "--lookup",
        action="store_true",
        help="with --temperature 0: draft tokens from the prompt and the text so far; the same "
        "text, about 1.5 times as fast where it copies",
    )
    parser.add_argument(
        "--best-of",
        type=parse_number,
        metavar="N",
        help="draw N answers and print the one that --verifier scores highest",
    )
    parser.add_argument(
        "--verifier",
        type=Path,
        metavar="FILE",
        help="checkpoint of a verifier or a reward model (finetune.py --config configs/verifier.yaml)",
    )
