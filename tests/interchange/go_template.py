"""The part of Go's template language that our Modelfiles use, executed as Ollama does (template/template.go):
`.Messages` is the conversation, `.Prompt` the text of a model without a chat template.
"""

import json
import re
from typing import Any

Scope = dict[str, Any]


def execute(template: str, messages: list[dict[str, str]]) -> str:
    """The text of a template for these messages."""
    root: Scope = {"Prompt": messages[-1]["content"]}
    root["Messages"] = [
        {"Role": message.get("role"), "Content": message["content"]} for message in messages
    ]
    return _run(_parse(template), root, {"$": root})


def _parse(template: str) -> list[Any]:
    """Nodes: text, ("value", ACTION), and ["if" or "range", CONDITION, nodes, nodes of else]."""
    root: list[Any] = []
    open_lists = [root]
    for number, part in enumerate(re.split(r"\{\{ (.*?) \}\}", template)):
        word, _, rest = part.partition(" ")
        if number % 2 == 0:
            open_lists[-1].append(part)
        elif word in ("if", "range"):
            open_lists[-1].append([word, rest, [], []])
            open_lists.append(open_lists[-1][-1][2])
        elif word == "else":
            open_lists.pop()
            node = open_lists[-1][-1]
            while node[3]:  # the `if` of the last `else if`
                [node] = node[3]
            if rest:
                node[3].append(["if", rest.removeprefix("if "), [], []])
                open_lists.append(node[3][0][2])
            else:
                open_lists.append(node[3])
        elif word == "end":
            open_lists.pop()
        else:
            open_lists[-1].append(("value", part))
    assert open_lists == [root]
    return root


def _run(nodes: list[Any], dot: Scope, variables: Scope) -> str:
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += node
        elif node[0] == "value":
            out += str(_value(node[1], dot, variables))
        elif node[0] == "if":
            out += _run(node[2] if _value(node[1], dot, variables) else node[3], dot, variables)
        else:
            names, _, over = node[1].partition(" := ")
            assert names == "$i, $_"
            for number, item in enumerate(_value(over, dot, variables)):
                out += _run(node[2], item, variables | {"$i": number})
    return out


FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "not": lambda value: not value,
    "len": len,
    "slice": lambda items, start: items[start:],
    "printf": lambda form, text: text[: int(re.fullmatch(r"%\.(\d+)s", form)[1])],
}


def _value(text: str, dot: Scope, variables: Scope) -> Any:
    """An operand, or a function and its operands."""
    function, *operands = words = _words(text)
    if function in FUNCTIONS:
        return FUNCTIONS[function](*(_value(word, dot, variables) for word in operands))
    [word] = words
    if word.startswith("("):
        return _value(word[1:-1], dot, variables)
    if word.startswith('"'):
        return json.loads(re.sub(r"\\U([0-9a-f]{8})", lambda m: chr(int(m[1], 16)), word))
    if word.isdigit():
        return int(word)
    if word in variables:
        return variables[word]
    variable, _, name = word.partition(".")
    return (variables[variable] if variable else dot)[name]


def _words(text: str) -> list[str]:
    """The words of an action; a string is one, and so is what is in parentheses."""
    words, depth = [""], 0
    for part in re.findall(r'"(?:[^"\\]|\\.)*"|[() ]|[^"() ]+', text):
        depth += (part == "(") - (part == ")")
        if part == " " and not depth:
            words.append("")
        else:
            words[-1] += part
    return words
