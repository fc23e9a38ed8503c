"""GSM8K: grade-school word problems, whose answers reason step by step and end
in `#### number` (Cobbe et al. 2021).
"""

from tinylm.eval.tasks.task import Hub, Task, text_of
from tinylm.rows.conversation import Turn
from tinylm.rows.numbers import same_number

SMOKE = (
    (
        "A box holds 6 eggs. How many eggs are in 4 boxes?",
        "There are 4*6=<<4*6=24>>24 eggs.\n#### 24",
    ),
    (
        "Ana has 15 stamps and gives 7 away. How many are left?",
        "She has 15-7=<<15-7=8>>8 stamps left.\n#### 8",
    ),
    (
        "A ticket costs $9. Three friends go, and one has a coupon for $5 off. "
        "What do they pay together?",
        "Three tickets cost 3*9=$<<3*9=27>>27.\nWith the coupon they pay "
        "27-5=$<<27-5=22>>22.\n#### 22",
    ),
    (
        "A train covers 80 km an hour. How far is it after 2.5 hours?",
        "It is 80*2.5=<<80*2.5=200>>200 km away.\n#### 200",
    ),
    (
        "Half of a class of 28 plays chess. How many do not?",
        "Chess is played by 28/2=<<28/2=14>>14.\nThe others are 28-14=<<28-14=14>>14.\n#### 14",
    ),
    (
        "A baker sells 120 rolls by noon and 65 after. How many is that?",
        "It is 120+65=<<120+65=185>>185 rolls.\n#### 185",
    ),
    (
        "Tom reads 12 pages a day. How many days does a book of 96 pages take?",
        "It takes 96/12=<<96/12=8>>8 days.\n#### 8",
    ),
    (
        "A garden has 5 rows of 9 tulips, and 6 of them wilt. How many stand?",
        "There were 5*9=<<5*9=45>>45 tulips.\nNow 45-6=<<45-6=39>>39 stand.\n#### 39",
    ),
    (
        "A coat of $80 is reduced by a quarter. What does it cost?",
        "A quarter is 80/4=$<<80/4=20>>20.\nIt costs 80-20=$<<80-20=60>>60.\n#### 60",
    ),
    (
        "Eve is twice as old as Max, who is 7. How old are they together?",
        "Eve is 2*7=<<2*7=14>>14.\nTogether they are 14+7=<<14+7=21>>21.\n#### 21",
    ),
    (
        "A tank loses 3 litres a day. How much is lost in 2 weeks?",
        "Two weeks have 2*7=<<2*7=14>>14 days.\nIt loses 14*3=<<14*3=42>>42 litres.\n#### 42",
    ),
    (
        "Five bags of 20 marbles are shared by 4 children. How many has each?",
        "There are 5*20=<<5*20=100>>100.\nEach has 100/4=<<100/4=25>>25.\n#### 25",
    ),
)

GSM8K = Task(
    name="gsm8k",
    hub=Hub("openai/gsm8k", "main", train="train", test="test"),
    question=lambda row: Turn("user", text_of(row, "question").strip()),
    target=lambda row: text_of(row, "answer"),
    grade=lambda output, target: {"exact_match": float(same_number(output, target))},
    frame=("Question: ", "\nAnswer:"),
    stop=("Question:",),
    smoke=tuple({"question": question, "answer": answer} for question, answer in SMOKE),
)
