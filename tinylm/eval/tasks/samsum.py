"""SAMSum: summarize a chat in a few sentences (Gliwa et al. 2019)."""

from tinylm.eval.metrics import rouge
from tinylm.eval.tasks.task import SHOT_SEPARATOR, Hub, Row, Task, text_of
from tinylm.rows.conversation import Turn


def question(row: Row) -> Turn:
    """The chat as the input of an instruction."""
    # The lines of the data end in \r\n.
    lines = [line.strip() for line in text_of(row, "dialogue").split("\n")]
    return Turn("user", "Summarize this dialogue.", "\n".join(lines))


SMOKE = (
    (
        "Ida: Is the library open today?\nBen: Only until two.\nIda: I'll hurry then.",
        "The library closes at two, so Ida will hurry.",
    ),
    (
        "Omar: I missed the bus.\nLea: Take my bike, it's in the yard.",
        "Omar missed the bus and Lea lends him her bike.",
    ),
    (
        "Kim: Who feeds the fish while I'm away?\nPat: I can.\nKim: Thanks! Once a day.",
        "Pat will feed Kim's fish once a day while Kim is away.",
    ),
    (
        "Noa: The cake fell.\nAvi: All of it?\nNoa: We'll have ice cream.",
        "Noa's cake fell, so they will have ice cream.",
    ),
    (
        "Tess: Can you proofread my letter?\nJon: Send it tonight.\nTess: Done.",
        "Jon will proofread the letter that Tess has sent.",
    ),
    (
        "Max: Football at five?\nEli: My knee still hurts.\nMax: Come and watch.",
        "Eli cannot play football at five because of his knee, but may watch.",
    ),
    (
        "Rosa: Your parcel is with me.\nUma: Great, I'll fetch it on Monday.",
        "Uma will fetch her parcel from Rosa on Monday.",
    ),
    (
        "Finn: Which paint did you choose?\nGwen: Green for the door.\nFinn: And the fence?\nGwen: White.",
        "Gwen chose green for the door and white for the fence.",
    ),
    (
        "Ivo: The heating is off again.\nMaja: I'll call the landlord.",
        "Maja will call the landlord because the heating is off again.",
    ),
    (
        "Zoe: Did we win?\nSam: Three to one!\nZoe: Finally.",
        "Sam tells Zoe that they won three to one.",
    ),
)

SAMSUM = Task(
    name="samsum",
    hub=Hub("knkarthick/samsum", None, train="train", test="test"),
    question=question,
    target=lambda row: text_of(row, "summary"),
    grade=rouge,
    frame=("", "\nSummary:"),
    stop=(SHOT_SEPARATOR,),
    max_new_tokens=128,
    smoke=tuple({"dialogue": dialogue, "summary": summary} for dialogue, summary in SMOKE),
)
