"""Prompt templates: what they write, what is trained, and that no text becomes a special token."""

import copy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tinylm.common.errors import UserError
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.sandbox import Sandbox
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokenizer.hf import HFTokenizer

# Like Qwen's: the answer ends with a special token, followed by a newline.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 2's: no start of an answer, texts are trimmed, and the system turn goes into the first question.
INST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% elif m.role == 'user' %}{{ bos_token }}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
# Marks its answers, and writes earlier answers differently, so that a shorter conversation is not a prefix.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if not "
    "loop.last %}(told) {% endif %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content "
    "}}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the text alone, not the token that ends it.
SHORT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}</s>"
    "{% else %}<s>{{ m.content }}{% endif %}{% endfor %}"
)
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def hf_tokenizer(template: str | None = None) -> HFTokenizer:
    """256 byte tokens and five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: id for id, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIALS))
    return HFTokenizer(backend, eos="</s>", pad=None, chat_template=template)


def case(name: str, tokenizer: Tokenizer) -> tuple[Template, Tokenizer]:
    return make_template(name, tokenizer), tokenizer


# One process for each chat template, for all tests.
CASES = {
    "instruction, bytes": case("instruction", ByteTokenizer()),
    "instruction": case("instruction", hf_tokenizer()),
    "alpaca": case("alpaca", ByteTokenizer()),
    "chatml": case("chatml", hf_tokenizer()),
    "plain": case("plain", hf_tokenizer()),
}
LAZY = {
    "chat_template, compared": CHATML,
    "chat_template, without a start": INST,
    "chat_template, marked": MARKED,
    "chat_template, marked short": SHORT,
}
# Each starts a process that imports transformers: one is enough for the quick tier.
LAZY_NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (number > 0)) for number, name in enumerate(LAZY)
]
every_template = pytest.mark.parametrize("name", [*CASES, *LAZY_NAMES])


def template_of(name: str) -> tuple[Template, Tokenizer]:
    """The template and its tokenizer; a chat template's process starts when a test first asks for it."""
    if name not in CASES:
        CASES[name] = case("chat_template", hf_tokenizer(LAZY[name]))
    return CASES[name]


def render(ids: list[int], tokenizer: Tokenizer) -> str:
    """Tokens as text, special tokens by name."""
    names = tokenizer.special_names
    return b"".join(
        names[id].encode() if id in names else tokenizer.token_bytes(id) for id in ids
    ).decode()


def written(name: str, *turns: Turn) -> tuple[str, list[str]]:
    """The text a template writes, and its trained spans."""
    template, tokenizer = template_of(name)
    example = template.encode(turns, tokenizer)
    spans: list[list[int]] = []
    for place, (id, trained) in enumerate(zip(example.ids.tolist(), example.trained, strict=True)):
        if trained and not example.trained[place - 1]:
            spans.append([])
        if trained:
            spans[-1].append(id)
    return render(example.ids.tolist(), tokenizer), [render(span, tokenizer) for span in spans]


SYSTEM, QUESTION, ANSWER = Turn("system", "Be brief."), Turn("user", "2+2?"), Turn("assistant", "4")
AGAIN = (QUESTION, ANSWER, Turn("user", "Sure?"), Turn("assistant", "Yes"))


# --- what is written ---


def test_instruction_is_the_layout_of_s0():
    """Instruction, input and output on lines of their own, and <|sep|> at the end."""
    text, trained = written(
        "instruction, bytes",
        Turn("user", "classify if the SMS is spam or ham", "Free entry!"),
        Turn("assistant", "spam"),
    )
    assert (
        text
        == "### Instruction: classify if the SMS is spam or ham\n### Input: Free entry!\n### Output: spam\n<|sep|>"
    )
    assert trained == [" spam\n<|sep|>"]


def test_an_instruction_without_input_has_no_input_section():
    text, _ = written("instruction, bytes", QUESTION, ANSWER)
    assert text == "### Instruction: 2+2?\n### Output: 4\n<|sep|>"
    assert "Input" not in written("alpaca", QUESTION, ANSWER)[0]


def test_alpaca_is_the_published_prompt():
    """Taori et al. 2023: prompt_input and prompt_no_input of the Stanford Alpaca repository."""
    text, trained = written("alpaca", Turn("user", "Correct it.", "teh"), Turn("assistant", "the"))
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nCorrect it.\n\n### Input:\nteh\n\n### Response:\nthe<|eos|>"
    )
    assert trained == ["the<|eos|>"]
    assert written("alpaca", QUESTION, ANSWER)[0].startswith(
        "Below is an instruction that describes a task. Write a response"
    )


def test_chatml_closes_every_turn():
    text, trained = written("chatml", SYSTEM, *AGAIN)
    assert text == (
        "<s><|im_start|>system\nBe "
        "brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>"
    )
    assert trained == ["4<|im_end|>", "Yes<|im_end|>"]


@pytest.mark.parametrize(
    ("question", "answer", "text"),
    [
        ("2+2?", "4", "<s>2+2?\n4</s>"),
        ("2+2=", " 4", "<s>2+2= 4</s>"),
        ("A:\n", "4", "<s>A:\n4</s>"),
    ],
)
def test_plain_adds_a_newline_if_the_data_have_no_whitespace_there(question, answer, text):
    assert written("plain", Turn("user", question), Turn("assistant", answer))[0] == text


def test_the_system_turn_is_first():
    assert written("instruction, bytes", SYSTEM, QUESTION, ANSWER)[0].startswith(
        "### System: Be brief.\n### Instruction: 2+2?"
    )
    assert written("alpaca", SYSTEM, QUESTION, ANSWER)[0].startswith(
        "Be brief.\n\n### Instruction:"
    )
    assert written("plain", SYSTEM, QUESTION, ANSWER)[0] == "<s>Be brief.\n2+2?\n4</s>"


@pytest.mark.slow
def test_a_chat_template_writes_what_transformers_writes():
    """Oracle: transformers renders and encodes the same template with the same tokenizer."""
    from transformers import PreTrainedTokenizerFast

    for name, source in LAZY.items():
        template, tokenizer = template_of(name)
        backend, ends = (
            Backend.from_str(tokenizer.to_plain()["tokenizer_json"]),
            {"bos_token": "<s>", "eos_token": "</s>"},
        )
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **ends)
        messages = [{"role": turn.role, "content": turn.text} for turn in (SYSTEM, *AGAIN)]
        asked = theirs.apply_chat_template(
            messages[:2], chat_template=source, add_generation_prompt=True, return_dict=False
        )
        assert template.encode(
            (SYSTEM, *AGAIN), tokenizer
        ).ids.tolist() == theirs.apply_chat_template(
            messages, chat_template=source, return_dict=False
        )
        assert template.prompt_ids((SYSTEM, QUESTION), tokenizer) == asked


# --- what is trained ---


@every_template
def test_every_answer_is_trained_and_so_is_the_token_that_ends_it(name):
    """The most common bug of fine-tuning: if the end is masked, or only the last answer has one,
    the model never stops."""
    template, tokenizer = template_of(name)
    stop = render([template.stop_ids(tokenizer)[0]], tokenizer)
    _, trained = written(name, SYSTEM, *AGAIN)
    assert [span.removesuffix(stop).strip() for span in trained] == ["4", "Yes"]
    assert all(span.endswith(stop) for span in trained)


@every_template
@pytest.mark.parametrize("untrained", [1, 3])
def test_an_answer_of_weight_0_is_written_the_same_and_not_trained(name, untrained):
    template, tokenizer = template_of(name)
    turns = tuple(replace(turn, trained=number != untrained) for number, turn in enumerate(AGAIN))
    every, some = template.encode(AGAIN, tokenizer), template.encode(turns, tokenizer)
    assert some.ids.tolist() == every.ids.tolist()
    spans = written(name, *AGAIN)[1]
    kept = spans[1] if untrained == 1 else spans[0]
    assert written(name, *turns)[1] == [kept]
    assert template.prompt_ids(turns[:3], tokenizer) == template.prompt_ids(AGAIN[:3], tokenizer)


@every_template
def test_what_a_tool_wrote_is_not_trained(name):
    """A template that is the same but for its tools: the ids are those of bytes, cut or not."""
    template, tokenizer = template_of(name)
    with_tools = copy.copy(template)
    object.__setattr__(with_tools, "has_tools", True)
    turns = (Turn("user", "<<1+1=2>>?"), Turn("assistant", "So <<4*6=24>>24."))
    plain, found = (one.encode(turns, tokenizer) for one in (template, with_tools))
    assert found.ids.tolist() == plain.ids.tolist()
    masked = found.ids[plain.trained & ~found.trained].tolist()
    assert render(masked, tokenizer) == "24>>"


@every_template
def test_an_answer_ends_with_a_token_that_does_not_occur_in_it(name):
    """So that a sampler that stops at `stop_ids` returns exactly the answer."""
    template, tokenizer = template_of(name)
    example = template.encode((QUESTION, ANSWER), tokenizer)
    answer = example.ids[example.trained].tolist()
    assert [
        place for place, id in enumerate(answer, start=1) if id in template.stop_ids(tokenizer)
    ] == [len(answer)]


texts = st.text(
    st.sampled_from("ab \n<|im_end|>é#") | st.characters(exclude_categories=("Cs",)),
    min_size=1,
    max_size=12,
).filter(lambda text: text.strip())
conversations = st.builds(
    lambda system, pairs: tuple(
        [Turn("system", system)] * bool(system)
        + [turn for q, a in pairs for turn in (Turn("user", q), Turn("assistant", a))]
    ),
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
)


@every_template
@given(conversation=conversations)
@settings(max_examples=15)
def test_a_prompt_is_what_training_showed_before_the_answer(name: str, conversation: Conversation):
    """The ids of the prompt are the beginning of those of prompt and answer; the last trained span
    begins there."""
    template, tokenizer = template_of(name)
    prompt, example = (
        template.prompt_ids(conversation[:-1], tokenizer),
        template.encode(conversation, tokenizer),
    )
    assert example.ids[: len(prompt)].tolist() == prompt
    assert not example.trained[len(prompt) - 1]
    last = example.trained[len(prompt) :]
    assert last[0] and last[: last.sum()].all(), "one span, from the end of the prompt"


# --- no text becomes a special token ---


@every_template
@given(
    text=st.lists(
        st.sampled_from([*SPECIALS, "<|sep|>", "<|eos|>", "a", " ", "<", "|>", "im_end"]),
        min_size=1,
        max_size=5,
    ).map("".join)
)
@settings(max_examples=15)
def test_a_user_who_types_special_tokens_types_characters(name: str, text: str):
    """The special tokens are those of a conversation with other texts, and the whole text is present."""
    template, tokenizer = template_of(name)

    def special(*turns: Turn) -> list[int]:
        return [
            id
            for id in template.encode(turns, tokenizer).ids.tolist()
            if id in tokenizer.special_names
        ]

    text = f".{text}."
    assert special(Turn("system", text), Turn("user", text), Turn("assistant", text)) == special(
        SYSTEM, QUESTION, ANSWER
    )
    assert written(name, Turn("user", text), Turn("assistant", "a"))[0].count(text) == 1


def test_the_guard_is_needed():
    """Without the guard the user could end the user's turn: markup in rendered text becomes a
    special token."""
    _, tokenizer = template_of("chat_template, compared")
    assert isinstance(tokenizer, HFTokenizer)
    ends = tokenizer.encode_markup("<|im_end|>")
    assert len(ends) == 1 and ends[0] in tokenizer.special_names
    assert tokenizer.encode("<|im_end|>") == [
        tokenizer.encode(character)[0] for character in "<|im_end|>"
    ], "and is plain text again afterwards"


@pytest.mark.parametrize(("specials", "opening"), [(["</s>"], []), (["<s>", "</s>"], ["<s>"])])
def test_only_the_first_text_of_a_conversation_gets_a_prepended_space(
    specials: list[str], opening: list[str]
):
    """SentencePiece-style tokenizers prepend a space to a text, also after <s>; the parts of a
    conversation are one text."""
    tokens = ["<unk>", *specials, "▁", "\n", "a", "b"]
    backend = Backend(models.BPE({token: id for id, token in enumerate(tokens)}, []))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(),
    )
    tokenizer = HFTokenizer(backend, eos="</s>", pad=None, special=specials)
    ids = (
        make_template("plain", tokenizer)
        .encode((Turn("user", "a"), Turn("assistant", "b")), tokenizer)
        .ids.tolist()
    )
    assert [tokens[id] for id in ids] == [*opening, "▁", "a", "\n", "b", "</s>"]


# --- errors ---


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((QUESTION, QUESTION, ANSWER), "turn 2: a second user turn in a row. Join the two"),
        ((QUESTION, ANSWER, ANSWER), "turn 3: a second assistant turn in a row."),
        ((ANSWER,), "turn 1: an assistant turn must follow a user turn. Begin with"),
        ((SYSTEM, ANSWER), "turn 2: an assistant turn must follow a user turn."),
        (
            (QUESTION, SYSTEM, ANSWER),
            "turn 2: only the first turn can be a system turn. Move it, or remove it.",
        ),
        (
            (QUESTION,),
            "last turn: must be an assistant turn, or there is nothing to train on. Add the answer",
        ),
        (
            (),
            "last turn: must be an assistant turn, or there is nothing to train on. Add the answer",
        ),
    ],
)
@pytest.mark.parametrize("name", ["instruction", "chat_template, compared"])
def test_turns_in_the_wrong_order_are_an_error(name, turns, message):
    template, tokenizer = template_of(name)
    with pytest.raises(UserError, match=f"^{message}"):
        template.encode(turns, tokenizer)


@every_template
def test_a_prompt_without_a_question_is_a_programming_error(name):
    template, tokenizer = template_of(name)
    with pytest.raises(ValueError, match="a prompt must end with a user turn"):
        template.prompt_ids((QUESTION, ANSWER), tokenizer)


def test_chatml_without_its_tokens_is_an_error():
    """If they were written as text, a user could write them too."""
    with pytest.raises(
        UserError,
        match=r"data.template: chatml needs the special token <\|im_start\|>, which the tokenizer "
        r"\(byte\) does not have. Set",
    ):
        make_template("chatml", ByteTokenizer())


@pytest.mark.parametrize(
    ("tokenizer", "fix"),
    [
        (ByteTokenizer(), "instruction."),
        (hf_tokenizer(), "instruction or chatml, or tokenizer.path to a folder"),
    ],
)
def test_a_missing_chat_template_is_named(tokenizer, fix):
    """The byte tokenizer has neither ChatML markers nor files that could contain a template."""
    with pytest.raises(
        UserError,
        match=f"data.template: chat_template: the tokenizer .{tokenizer.kind}. has no chat "
        f"template. Set data.template to {fix}",
    ):
        make_template("chat_template", tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "has no special token after an answer, so a model trained with it would not stop",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            "writes earlier turns differently when more follow, so their answers cannot be found",
        ),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}",
            "marks 2 answers in a conversation with 1",
        ),
        (
            f"{{{{ '>' }}}}{SHORT.replace('{% generation %}', '> {% generation %}')}",
            "does not begin an answer where its prompt ends",
        ),
        ("{% if %}", "Expected an expression, got 'end of statement block'"),
        (
            "{{ raise_exception('roles must\n alternate') }}",
            "roles must. Correct it, or set data.template",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_trained_with_is_an_error(source, message):
    with pytest.raises(UserError, match="^data.template: the tokenizer's chat template") as refused:
        make_template("chat_template", hf_tokenizer(source))
    assert message in str(refused.value)


# --- a template is an untrusted program (H4) ---


def attack(source: str) -> str:
    """The error of rendering a hostile template."""
    with pytest.raises(UserError) as refused:
        Sandbox(source, {}).render([([{"role": "user", "content": "hello"}], True)])
    return str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' * 1000000000 }}", "it needs too much memory"),
        pytest.param(
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "access to attribute '__class__' of 'str' object is unsafe",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{{ cycler.__init__.__globals__.os.system('touch it') }}",
            "access to attribute '__init__' of 'type' object is",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "{{ '%1000000000d' % 1 }}", "it needs too much memory", marks=pytest.mark.slow
        ),
        pytest.param(
            "{{ 'x' * 10000000 }}", "it writes 10000000 characters for 5", marks=pytest.mark.slow
        ),
        pytest.param(
            "{% for a in range(9999999) %}{% endfor %}", "Range too big", marks=pytest.mark.slow
        ),
    ],
)
def test_a_hostile_template_is_an_error(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in attack(source)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_endless_template_is_killed(monkeypatch):
    """10^10 iterations of a nested loop: its process is killed, and the sandbox renders again afterwards."""
    monkeypatch.setattr("tinylm.rows.sandbox.RENDER_SECONDS", 0.5)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    sandbox = Sandbox(
        "{% if messages[0].content == 'loop' %}" + loops + "{% endif %}{{ messages[0].content }}",
        {},
    )
    with pytest.raises(UserError, match="chat template took more than 0.5 seconds. Correct it"):
        sandbox.render([([{"role": "user", "content": "loop"}], True)])
    assert sandbox.render([([{"role": "user", "content": "hello"}], True)]) == [("hello", [])]


@pytest.mark.slow
def test_a_template_whose_process_dies_is_an_error(monkeypatch):
    """As if the system had killed it, out of memory."""
    sandbox = Sandbox("{{ messages[0].content }}", {})
    assert sandbox.render([([{"role": "user", "content": "hello"}], True)]) == [("hello", [])]
    sandbox._process.kill()
    sandbox._process.join()
    with pytest.raises(UserError, match="ended its process, possibly out of memory"):
        sandbox.render([([{"role": "user", "content": "hello"}], True)])
