"""SMS spam: is a text message spam or ham (Almeida et al. 2011)?"""

from tinylm.eval.tasks.task import Hub, Row, Task, label_of, text_of
from tinylm.rows.columns import SMS_INSTRUCTION
from tinylm.rows.conversation import Turn

LABELS = ("ham", "spam")  # 0 and 1 on the hub, names in the file SMSSpamCollection


def question(row: Row) -> Turn:
    """The message as the input of an instruction;
    its column is text in SMSSpamCollection and sms on the hub.
    """
    return Turn("user", SMS_INSTRUCTION, text_of(row, "text" if "text" in row else "sms").strip())


SMOKE = (
    ("Running ten minutes late, order me a coffee?", 0),
    (
        "WINNER!! You have been picked for a 900 pound voucher. Call 090 5550 0199 now, "
        "lines close tonight",
        1,
    ),
    ("Mum says dinner is at seven, bring nothing", 0),
    ("Free ringtones every week! Text TUNE to 80555. 1.50 a message, stop any time", 1),
    ("did you feed the cat", 0),
    ("URGENT your account has a bonus of 5000 points waiting, reply CLAIM before midnight", 1),
    ("Can we move the meeting to Thursday? My train is cancelled", 0),
    ("Happy birthday old friend, see you at the weekend", 0),
    ("Singles in your town want to meet you! Send MEET to 61555, adults only", 1),
    ("I found your blue scarf, it was behind the door", 0),
    ("Last chance: two nights in Paris for the price of one, ring 0800 555 0123 quoting LUCKY", 1),
    ("ok thanks, talk tomorrow", 0),
)

SMS = Task(
    name="sms",
    # One split: examples are held out of it.
    hub=Hub("ucirvine/sms_spam", "plain_text", train="train", test="train"),
    question=question,
    target=lambda row: label_of(row, "label", LABELS),
    labels=LABELS,
    frame=("", "\nAnswer:"),
    smoke=tuple({"sms": sms, "label": label} for sms, label in SMOKE),
)
