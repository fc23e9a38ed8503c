"""Alpaca: instructions, some with an input, and answers of a model (Taori et al. 2023).

instruction-data.json has the same columns.
"""

from tinylm.eval.metrics import token_f1
from tinylm.eval.tasks.task import Hub, Row, Task, text_of
from tinylm.rows.conversation import Turn


def question(row: Row) -> Turn:
    """The instruction, and the input if there is one: some files lack the column."""
    given = text_of(row, "input") if row.get("input") is not None else ""
    return Turn("user", text_of(row, "instruction"), given if given.strip() else "")


SMOKE = (
    ("Name three primary colours.", "", "Red, yellow and blue."),
    ("Write the plural.", "mouse", "Mice."),
    ("Correct the sentence.", "She go to school.", "She goes to school."),
    ("Give the opposite of hot.", "", "The opposite of hot is cold."),
    ("How many days has a leap year?", "", "A leap year has 366 days."),
    ("Put the words in alphabetical order.", "pear, apple, fig", "apple, fig, pear"),
    ("Convert to metres.", "3 kilometres", "3 kilometres are 3000 metres."),
    ("Name a mammal that can fly.", "", "The bat is a mammal that can fly."),
    ("Say it in the past tense.", "I write a letter.", "I wrote a letter."),
    (
        "Shorten the sentence.",
        "Due to the fact that it rained, we stayed.",
        "Because it rained, we stayed.",
    ),
)

ALPACA = Task(
    name="alpaca",
    # One split: examples are held out of it.
    hub=Hub("tatsu-lab/alpaca", None, train="train", test="train"),
    question=question,
    target=lambda row: text_of(row, "output"),
    grade=lambda output, target: {"token_f1": token_f1(output, target)},
    frame=("Instruction: ", "\nResponse:"),
    stop=("Instruction:",),
    max_new_tokens=200,
    smoke=tuple(
        {"instruction": instruction, "input": given, "output": output}
        for instruction, given, output in SMOKE
    ),
)
