"""Word problems of two steps with answers like GSM8K's, so small that a model of 0.4M parameters solves some of them.

    python benchmarks/word_problems.py --out DIR [--train 4000 --test 400 --largest 12 --seed 0]

DIR/text.jsonl is text that a writer is pretrained on, DIR/rows.jsonl the same problems for a verifier, DIR/test.jsonl others. What they
are for, and what came of it, is in docs/RESULTS.md: without such a task best-of-n shows nothing, since no small model solves GSM8K.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
THINGS = ("pears", "stamps", "marbles", "coins", "shells", "books")
GAINS, LOSSES = ("finds", "buys", "gets"), ("loses", "sells", "gives away")


class Row(NamedTuple):
    """A problem with its right answer, whose last line is `#### NUMBER`."""

    question: str
    answer: str


def row_of(name: str, thing: str, verbs: tuple[str, str], numbers: tuple[int, int, int]) -> Row:
    """Who has how many of what after a gain and a loss.

    >>> row_of("Ana", "pears", ("finds", "sells"), (5, 4, 7)).answer
    'First Ana has 5 + 4 = 9 pears.\\nThen Ana has 9 - 7 = 2 pears.\\n#### 2'
    """
    first, gain, loss = numbers
    question = f"{name} has {first} {thing}, {verbs[0]} {gain} and {verbs[1]} {loss}. How many {thing} has {name} now?"
    both, left = first + gain, first + gain - loss
    return Row(
        question,
        f"First {name} has {first} + {gain} = {both} {thing}.\nThen {name} has {both} - {loss} = {left} {thing}.\n#### {left}",
    )


def rows(n: int, *, largest: int, seed: int) -> list[Row]:
    """`n` different problems with numbers from 2 to `largest`; something is always left."""
    draw = random.Random(seed)  # noqa: S311  (no secret)
    found: dict[Row, None] = {}
    while len(found) < n:
        first, gain = draw.randint(2, largest), draw.randint(2, largest)
        verbs = (draw.choice(GAINS), draw.choice(LOSSES))
        found[
            row_of(
                draw.choice(NAMES),
                draw.choice(THINGS),
                verbs,
                (first, gain, draw.randint(1, first + gain - 1)),
            )
        ] = None
    return list(found)


def main(argv: list[str] | None = None) -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("train", 4000), ("test", 400), ("largest", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    made = rows(options.train + options.test, largest=options.largest, seed=options.seed)
    train, test = made[: options.train], made[options.train :]
    files = {"text": [{"text": f"Question: {row.question}\nAnswer: {row.answer}"} for row in train]}
    files |= {
        name: [row._asdict() for row in part] for name, part in (("rows", train), ("test", test))
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (options.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in content), encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
