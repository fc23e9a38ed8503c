"""Arithmetic for a small model to learn: texts, questions with answers, and held-out questions.

    write_arithmetic(folder)
        text.jsonl         texts to pretrain on: tables, sums, stories; no question in them
        answers.jsonl      questions with written answers and short chats, for fine-tuning
        questions.jsonl    other questions, of which only the result is known, for learning by reward
        graded.jsonl       other questions with right and wrong answers, for a verifier
        dev.jsonl          questions to choose settings with
        test.jsonl         questions to report

Two things are held out *by construction*, not by comparing rows afterwards: every pair of numbers
and every wording belongs to one split (`split_of`), and a problem is in a split only if all of its
number pairs and its wording are (`Writer.problem`). A test question therefore has no sum, no story
and no phrase that any other file contains.

A question has one or two steps with + - * /. Three kinds of answers are written to them, all right:

    brief    #### 266
    sums     38*7=266.⏎#### 266
    digits   38*7: 8*7=56, 3*7+5=26, so 266.⏎#### 266     every step is a fact of the tables

The line `#### NUMBER` is that of GSM8K (Cobbe et al. 2021), which tasks and rewards read.
"""

import json
import random
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tinylm.common.files import write_atomic, writing
from tinylm.text.digits import KINDS, N_PLACES, Operator, Slip, Write, work_out, write_right

Split = Literal["train", "dev", "test"]
Style = Literal["brief", "sums", "digits"]
# Of 100 pairs of numbers and of 100 wordings.
N_DEV, N_TEST = 10, 10
# The largest number of a question, besides the product that is divided.
LARGEST = 99


# --- one step: two numbers and an operator ---


@dataclass(frozen=True)
class Step:
    """`first operator second`, whose result is a whole number that is not negative."""

    first: int
    operator: Operator
    second: int

    @property
    def result(self) -> int:
        """The number after the equals sign."""
        match self.operator:
            case "+":
                return self.first + self.second
            case "-":
                return self.first - self.second
            case "*":
                return self.first * self.second
            case _:
                return self.first // self.second

    @property
    def pair(self) -> tuple[int, int]:
        """Its numbers, the smaller one first: 7*38 is not new to one who knows 38*7.

        A division is a multiplication read backwards, a subtraction an addition.

        >>> Step(266, "/", 7).pair, Step(38, "*", 7).pair, Step(50, "-", 20).pair
        ((7, 38), (7, 38), (20, 30))
        """
        known = self.second
        other = self.first if self.operator in "+*" else self.result
        return min(known, other), max(known, other)

    @property
    def expression(self) -> str:
        """The step without its result."""
        return f"{self.first}{self.operator}{self.second}"

    @property
    def sum(self) -> str:
        """The step with its result.

        >>> Step(38, "*", 7).sum
        '38*7=266'
        """
        return f"{self.expression}={self.result}"

    @property
    def digits(self) -> str:
        """The work that leads to the result, a digit at a time.

        >>> Step(472, "+", 385).digits, Step(472, "-", 385).digits
        ('2+5=7, 7+8=15, 4+3+1=8', '12-5=7, 17-8-1=8, 4-3-1=0')
        >>> Step(38, "*", 7).digits, Step(266, "/", 7).digits
        ('8*7=56, 3*7+5=26', '2/7=0r2, 26/7=3r5, 56/7=8r0')
        """
        return ", ".join(work_out(self.first, self.operator, self.second)[0])


# --- which split ---


def split_of(key: object) -> Split:
    """The split that a pair of numbers or a wording belongs to: a function of its hash alone.

    >>> split_of((7, 38)) == split_of((7, 38))
    True
    """
    number = zlib.crc32(repr(key).encode()) % 100
    return "test" if number < N_TEST else "dev" if number < N_TEST + N_DEV else "train"


# --- problems ---

NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana", "Ida", "Jon", "Kim", "Leo")
THINGS = ("pears", "stamps", "marbles", "coins", "shells", "books", "cards", "pens", "nuts", "figs")
OPENINGS = (
    "",
    "Hello! ",
    "Please help. ",
    "A question: ",
    "Tell me: ",
    "Quickly: ",
    "My homework: ",
)
CLOSINGS = ("", " Thank you.", " I need the number.", " What do you get?", " Is it large?")
SUMS = {
    "+": ("What is {a}+{b}?", "Add {a} and {b}.", "How much is {a} plus {b}?", "{a}+{b}=?"),
    "-": ("What is {a}-{b}?", "Take {b} from {a}.", "How much is {a} minus {b}?", "{a}-{b}=?"),
    "*": ("What is {a}*{b}?", "Multiply {a} by {b}.", "How much is {a} times {b}?", "{a}*{b}=?"),
    "/": ("What is {a}/{b}?", "Divide {a} by {b}.", "How much is {a} over {b}?", "{a}/{b}=?"),
}
# The operators of the steps, what is told, and what is asked. {c} is the number of a second step.
STORIES: tuple[tuple[str, str, str], ...] = (
    ("+", "{name} has {a} {thing} and finds {b} more.", "How many {thing} has {name} now?"),
    ("-", "{name} has {a} {thing} and loses {b}.", "How many {thing} are left?"),
    ("*", "{name} has {a} boxes of {b} {thing}.", "How many {thing} are that?"),
    ("*", "{name} buys {b} {thing} for {a} cents each.", "What does {name} pay?"),
    ("/", "{name} shares {a} {thing} among {b} friends.", "How many does each get?"),
    ("++", "{name} has {a} {thing}, finds {b} and buys {c}.", "How many {thing} is that in all?"),
    ("+-", "{name} has {a} {thing}, finds {b} and sells {c}.", "How many {thing} has {name} now?"),
    ("-+", "{name} has {a} {thing}, sells {b} and buys {c}.", "How many {thing} has {name} then?"),
    ("*+", "{name} has {a} bags of {b} {thing} and {c} more.", "How many {thing} are that in all?"),
    ("*-", "{name} has {a} bags of {b} {thing} and eats {c}.", "How many {thing} are left?"),
    ("/+", "{name} divides {a} {thing} by {b} and adds {c}.", "What does {name} get?"),
    ("/-", "{b} friends share {a} {thing} and each loses {c}.", "How many {thing} has each?"),
)


@dataclass(frozen=True)
class Problem:
    """A question and the steps to its result."""

    told: str
    """a story, or "" """
    asked: str
    wording: str
    """the question with other numbers is the same wording"""
    steps: tuple[Step, ...]

    @property
    def question(self) -> str:
        """What a user writes."""
        return f"{self.told} {self.asked}".strip()

    @property
    def result(self) -> int:
        """The number to find."""
        return self.steps[-1].result

    def answer(self, style: Style) -> str:
        """The answer, which ends with the line `#### NUMBER`.

        >>> problem = Problem("", "What is 38*7?", "", (Step(38, "*", 7),))
        >>> problem.answer("digits"), problem.answer("brief")
        ('38*7: 8*7=56, 3*7+5=26, so 266.\\n#### 266', '#### 266')
        """
        return "\n".join((*self.work(style), f"#### {self.result}"))

    def work(self, style: Style) -> Iterator[str]:
        """A line for each step; none in style brief."""
        for step in self.steps:
            if style == "sums":
                yield f"{step.sum}."
            elif style == "digits":
                yield f"{step.expression}: {step.digits}, so {step.result}."

    def work_out(self, write: Write = write_right) -> "Work":
        """The answer in style digits, as `write` copies its numbers and works them out."""
        steps, lines, result = [], [], 0
        for number, step in enumerate(self.steps):
            first = write(step.first, 0, "copy") if number == 0 else result
            copied = Step(first, step.operator, write(step.second, 0, "copy"))
            facts, result = work_out(copied.first, copied.operator, copied.second, write)
            steps.append(copied)
            lines.append(f"{copied.expression}: {', '.join(facts)}, so {result}.")
        return Work(tuple(steps), "\n".join((*lines, f"#### {result}")), result)

    def wrong_answer(self, rng: random.Random) -> str:
        """An answer in style digits with one mistake, which all that comes after it follows.

        Its pairs of numbers are of the split of the problem.

        >>> Problem("", "", "", (Step(38, "*", 7),)).wrong_answer(random.Random(7))
        '38*7: 8*7=53, 3*7+5=26, so 263.\\n#### 263'
        """
        split = split_of(self.steps[0].pair)
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        while True:
            slip = Slip(kind, rng.randrange(N_PLACES), rng)
            work = self.work_out(slip)
            negative = any(step.operator == "-" and step.result < 0 for step in work.steps)
            splits = {split_of(step.pair) for step in work.steps}
            if work.result != self.result and not negative and splits == {split}:
                return work.answer


class Work(NamedTuple):
    """An answer in style digits."""

    steps: tuple[Step, ...]
    """as they are written in it"""
    answer: str
    result: int


class Writer:
    """Random problems of one split."""

    def __init__(self, split: Split, seed: int):
        self.split = split
        self.rng = random.Random(f"{seed} {split}")  # noqa: S311  (no secret)

    def problem(self) -> Problem:
        """A problem whose number pairs and wording all belong to the split."""
        template = self._template()
        return self._fill(*template)

    def problems(self, n: int, *, avoid: Collection[str] = ()) -> Iterator[Problem]:
        """`n` problems with different questions, none of which is in `avoid`."""
        known = set(avoid)
        while n:
            problem = self.problem()
            if problem.question not in known:
                known.add(problem.question)
                n -= 1
                yield problem

    def _template(self) -> tuple[str, str, str, str]:
        """Operators, story, question and wording; the wording belongs to the split."""
        while True:
            if self.rng.random() < 0.4:
                operators = self.rng.choice("+-*/")
                opening, closing = self.rng.choice(OPENINGS), self.rng.choice(CLOSINGS)
                told, asked = "", opening + self.rng.choice(SUMS[operators]) + closing
            else:
                operators, told, asked = self.rng.choice(STORIES)
                names = {"name": self.rng.choice(NAMES), "thing": self.rng.choice(THINGS)}
                for key, value in names.items():
                    told = told.replace(f"{{{key}}}", value)
                    asked = asked.replace(f"{{{key}}}", value)
            wording = f"{told} {asked}".strip()
            if split_of(wording) == self.split:
                return operators, told, asked, wording

    def _fill(self, operators: str, told: str, asked: str, wording: str) -> Problem:
        while True:
            steps = self._steps(operators)
            if all(split_of(step.pair) == self.split for step in steps):
                break
        numbers = {"a": steps[0].first, "b": steps[0].second, "c": steps[-1].second}
        return Problem(told.format(**numbers), asked.format(**numbers), wording, steps)

    def _steps(self, operators: str) -> tuple[Step, ...]:
        first = self._step(operators[0])
        if len(operators) == 1:
            return (first,)
        # what a story takes away is not more than there is
        most = min(first.result, LARGEST) if operators[1] == "-" else LARGEST
        return first, Step(first.result, operators[1], self.rng.randint(1, max(most, 1)))

    def _step(self, operator: str) -> Step:
        """A first step."""
        rng = self.rng
        if operator in "*/":
            factor, other = rng.randint(3, 9), rng.randint(12, LARGEST)
            product = other * factor
            return Step(other, "*", factor) if operator == "*" else Step(product, "/", factor)
        first, second = rng.randint(10, LARGEST), rng.randint(10, LARGEST)
        if operator == "+":
            return Step(first, "+", second)
        return Step(max(first, second), "-", min(first, second))


# --- the files ---

# How many answers of each kind people have written.
STYLES: dict[Style, float] = {"brief": 0.1, "sums": 0.1, "digits": 0.8}
SMALL_TALK = (
    ("Hello!", "Hello! Ask me a sum."),
    ("Hi", "Hello! Ask me a sum."),
    ("Who are you?", "I am a small model that does sums."),
    ("What can you do?", "I add, subtract, multiply and divide."),
    ("Thank you!", "You are welcome."),
    ("Bye", "Goodbye!"),
)
FOLLOW_UPS = {
    "+": ("And {c} more?", "Add {c} to it."),
    "-": ("Now take {c} away.", "And {c} less?"),
}


def texts(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` documents to pretrain on: sums alone, sums with their digits, and stories with their sums.

    Some are questions without an answer: a base model has not seen how to answer.
    """
    writer = Writer("train", seed)
    rng = random.Random(f"{seed} texts")  # noqa: S311  (no secret)
    for _ in range(n):
        problem = writer.problem()
        kind = rng.random()
        if kind < 0.1:
            yield {"text": f"{problem.question} {writer.problem().question}"}
        elif kind < 0.2:
            yield {"text": " ".join(f"{writer.problem().steps[0].sum}." for _ in range(4))}
        else:
            work = " ".join(problem.work("digits" if kind < 0.9 else "sums"))
            yield {"text": f"{problem.told} {work}".strip()}


def answers(n: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` rows to fine-tune on, each about another problem: a question and an answer, or a short
    chat.
    """
    writer = Writer("train", seed + 1)
    rng = writer.rng
    for problem in writer.problems(n):
        style = rng.choices(list(STYLES), list(STYLES.values()))[0]
        answer = problem.answer(style)
        if rng.random() < 0.9:
            yield {"question": problem.question, "answer": answer}
            continue
        turns = [problem.question, answer]
        if rng.random() < 0.5:
            turns = [*rng.choice(SMALL_TALK), *turns]
        else:
            turns += _follow_up(problem, writer, style)
        roles = ("user", "assistant") * 2
        yield {"messages": [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]}


def _follow_up(problem: Problem, writer: Writer, style: Style) -> list[str]:
    """A second question, about the result of the first one, and its answer."""
    rng = writer.rng
    while True:
        operator = rng.choice("+-") if problem.result else "+"
        most = min(problem.result, LARGEST) if operator == "-" else LARGEST
        step = Step(problem.result, operator, rng.randint(1, most))
        if split_of(step.pair) == "train":
            break
    asked = rng.choice(FOLLOW_UPS[operator]).format(c=step.second)
    return [asked, Problem("", asked, asked, (step,)).answer(style)]


def questions(
    split: Split, n: int, seed: int, style: Style = "brief", *, avoid: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """`n` different questions that are not in `avoid`, each with an answer of this style."""
    for problem in Writer(split, seed).problems(n, avoid=avoid):
        yield {"question": problem.question, "answer": problem.answer(style)}


def graded(n: int, seed: int, *, avoid: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """`n` different questions that are not in `avoid`, each with a right answer in style digits
    (label 1) and N_WRONG with a mistake (label 0).
    """
    writer = Writer("train", seed)
    for problem in writer.problems(n, avoid=avoid):
        yield {"question": problem.question, "answer": problem.answer("digits"), "label": 1}
        wrong: dict[str, None] = {}
        while len(wrong) < N_WRONG:
            wrong[problem.wrong_answer(writer.rng)] = None
        for answer in wrong:
            yield {"question": problem.question, "answer": answer, "label": 0}


# Wrong answers to each question of a verifier.
N_WRONG = 2
# Rows of each file.
SIZES = {
    "text": 60_000,
    "answers": 6_000,
    "questions": 8_000,
    "graded": 12_000,
    "dev": 400,
    "test": 500,
}


def write_arithmetic(out: Path, *, sizes: dict[str, int] | None = None, seed: int = 0) -> None:
    """Write the six files into the folder `out`: the same ones for the same sizes and seed.

    Args:
        out: the folder, which is made.
        sizes: rows of each file; None: SIZES.
        seed: of all that is random.

    Raises:
        UserError: a file cannot be written.
    """
    sizes = SIZES | (sizes or {})
    answered = list(answers(sizes["answers"], seed))
    turns = [turn for row in answered for turn in row.get("messages", ())]
    avoid = {row["question"] for row in answered if "question" in row}
    avoid |= {turn["content"] for turn in turns}
    asked = list(questions("train", sizes["questions"], seed + 2, avoid=avoid))
    avoid |= {row["question"] for row in asked}
    files = {
        "text": texts(sizes["text"], seed),
        "answers": answered,
        "questions": asked,
        "graded": graded(sizes["graded"] // (1 + N_WRONG), seed + 3, avoid=avoid),
        "dev": questions("dev", sizes["dev"], seed + 2),
        "test": questions("test", sizes["test"], seed + 2),
    }
    with writing(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(out / f"{name}.jsonl", lines, "--out")
