"""Two-step word problems in the format of GSM8K, which a model of 0.4M parameters can partly solve.

    python benchmarks/word_problems.py --out DIR [--train 4000 --test 400 --largest 12 --seed 0]

    DIR/text.jsonl    text to pretrain a model on
    DIR/rows.jsonl    the same problems, for a verifier
    DIR/test.jsonl    other problems

Used by docs/RESULTS.md: small models do not solve GSM8K, so best-of-n needs an easier task.
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
    """A problem and its correct answer, which ends with the line `#### NUMBER`."""

    question: str
    answer: str


def make_row(name: str, thing: str, verbs: tuple[str, str], numbers: tuple[int, int, int]) -> Row:
    """A problem: how many things remain after a gain and a loss.

    >>> make_row("Ana", "pears", ("finds", "sells"), (5, 4, 7)).answer
    'First Ana has 5 + 4 = 9 pears.\\nThen Ana has 9 - 7 = 2 pears.\\n#### 2'
    """
    first, gain, loss = numbers
    total = first + gain
    left = total - loss
    question = (
        f"{name} has {first} {thing}, {verbs[0]} {gain} and {verbs[1]} {loss}. "
        f"How many {thing} has {name} now?"
    )
    answer = (
        f"First {name} has {first} + {gain} = {total} {thing}.\n"
        f"Then {name} has {total} - {loss} = {left} {thing}.\n#### {left}"
    )
    return Row(question, answer)


def make_rows(n: int, *, largest: int, seed: int) -> list[Row]:
    """`n` different problems with numbers from 2 to `largest`; at least one thing remains."""
    rng = random.Random(seed)  # noqa: S311  (no secret)
    rows: dict[Row, None] = {}  # an ordered set
    while len(rows) < n:
        first, gain = rng.randint(2, largest), rng.randint(2, largest)
        verbs = (rng.choice(GAINS), rng.choice(LOSSES))
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        loss = rng.randint(1, first + gain - 1)
        rows[make_row(name, thing, verbs, (first, gain, loss))] = None
    return list(rows)


def main(argv: list[str] | None = None) -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("train", 4000), ("test", 400), ("largest", 12), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    rows = make_rows(options.train + options.test, largest=options.largest, seed=options.seed)
    train, test = rows[: options.train], rows[options.train :]
    files = {
        "text": [{"text": f"Question: {row.question}\nAnswer: {row.answer}"} for row in train],
        "rows": [row._asdict() for row in train],
        "test": [row._asdict() for row in test],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (options.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
