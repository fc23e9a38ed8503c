"""SST-2: is a sentence of a film review positive or negative?
(Socher et al. 2013; as in GLUE, Wang et al. 2018.)
"""

from tinylm.eval.tasks.task import Hub, Row, Task, label_of, text_of
from tinylm.rows.conversation import Turn

LABELS = ("negative", "positive")  # 0 and 1 in the data


def question(row: Row) -> Turn:
    """The sentence as the input of a question."""
    return Turn(
        "user",
        "Is the sentiment of this review positive or negative?",
        text_of(row, "sentence").strip(),
    )


SMOKE = (
    ("a warm , funny film that earns every one of its tears", 1),
    ("two hours of people shouting in corridors", 0),
    ("the script has no idea what to do with its best character", 0),
    ("i left the cinema humming and wanting to see it again", 1),
    ("beautifully shot , and quietly devastating", 1),
    ("the jokes were old when the studio was young", 0),
    ("never has a car chase felt so long", 0),
    ("a small story , told with great patience and greater skill", 1),
    ("its young lead is a discovery", 1),
    ("muddled , noisy and in love with itself", 0),
    ("even the music sounds bored", 0),
    ("one of the year's happiest surprises", 1),
)

SST2 = Task(
    name="sst2",
    # The labels of the test split are not published.
    hub=Hub("nyu-mll/glue", "sst2", train="train", test="validation"),
    question=question,
    target=lambda row: label_of(row, "label", LABELS),
    labels=LABELS,
    frame=("", "\nSentiment:"),
    smoke=tuple({"sentence": sentence, "label": label} for sentence, label in SMOKE),
)
