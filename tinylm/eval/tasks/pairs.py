"""A user's own rows with a prompt and a target: the target is the exact continuation of the
prompt.
"""

from tinylm.eval.metrics import exact_match, token_f1
from tinylm.eval.tasks.task import SHOT_SEPARATOR, Task, text_of
from tinylm.rows.conversation import Turn


def grade(output: str, target: str) -> dict[str, float]:
    """Whether the text is the same, and the overlap of words."""
    return {"exact_match": float(exact_match(output, target)), "token_f1": token_f1(output, target)}


SMOKE = (
    ("The opposite of up is", " down."),
    ("The opposite of left is", " right."),
    ("The opposite of early is", " late."),
    ("The opposite of full is", " empty."),
    ("The opposite of warm is", " cool."),
    ("The opposite of young is", " old."),
    ("The opposite of loud is", " quiet."),
    ("The opposite of open is", " closed."),
)

PAIRS = Task(
    name="pairs",
    hub=None,
    question=lambda row: Turn("user", text_of(row, "prompt")),
    target=lambda row: text_of(row, "target"),
    grade=grade,
    answer_separator="",
    stop=(SHOT_SEPARATOR,),
    smoke=tuple({"prompt": prompt, "target": target} for prompt, target in SMOKE),
)
