"""The page in a browser: Debian's chromium, driven by playwright. Without one these tests skip, with
a line that says so; with TINYLM_NEEDS_BROWSER=1 (CI) they fail instead.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.config.schema import Config
from tinylm.generate.engine import Engine
from tinylm.model.decoder import Decoder
from tinylm.serve.pages import FILES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "**bold** <script>window.hacked=1</script><img src=x onerror='window.hacked=1'> [a](javascript:1)"
TEMPLATE = "### Instruction: {}\n### Output:"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if CHROMIUM is None or sync_playwright is None:
        missing = "chromium" if CHROMIUM is None else "playwright"
        if os.environ.get("TINYLM_NEEDS_BROWSER") == "1":
            pytest.fail(f"{missing} is not installed")
        pytest.skip(f"the page is not tested: {missing} is not installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


def write_speaker(path: Path, text: str, prompt: str, stage: str = "sft", room: int = 8) -> Path:
    """A model that answers the prompt with `text`, and then dots, of which its context has `room`:
    only the position of a token matters.
    """
    start = len((TEMPLATE if stage == "sft" else "{}").format(prompt).encode())
    ids = list(b"." * (start - 1) + text.encode() + b"." * room)
    shape = {
        "vocab_size": 260, "max_seq_len": len(ids), "d_model": len(ids), "n_heads": 1,
        "n_layers": 1, "position": "learned", "tie_embeddings": False,
    }  # fmt: skip
    config = Config.model_validate({"model": shape, "training": {"seq_len": len(ids)}})
    model = Decoder(config.model)
    block = model.blocks[0]
    with torch.no_grad():
        for weight in (model.embedding.weight, block.attention.out.weight, block.ffn.down.weight):
            weight.zero_()
        model.head.weight.zero_()
        model.positions.weight.copy_(torch.eye(len(ids)))
        model.head.weight[[*b"ABCDEF", 257]] = 1.0  # what it chooses from besides
        model.head.weight[ids, range(len(ids))] = 20.0
    state = state_of(config, model, stage)
    path.parent.mkdir(parents=True)
    checkpoint_format.write(path, state)
    return path


@pytest.fixture
def open_page(browser, run_server) -> Iterator[Callable[..., object]]:
    """Open the page of a server; its console must stay without errors."""
    opened = []

    def open_at(url: str, **options: object):
        context = browser.new_context(**options)
        page = context.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda line: page.problems.append(line.text) if line.type == "error" else None,
        )
        page.goto(url)
        page.wait_for_selector("#model option", state="attached")
        opened.append(context)
        return page

    yield open_at
    for context in opened:
        context.close()


def ask(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:visible")


def last_text(page) -> str:
    return page.inner_text(".turn.assistant:last-child .content")


def test_send_regenerate_edit_and_export(server, open_page, tmp_path: Path) -> None:
    page = open_page(server.url)
    page.select_option("#model", "chat")
    page.click("#settings summary")
    page.fill("#max_tokens", "12")
    page.fill("#seed", "3")
    ask(page, "hello")
    first = page.evaluate("document.querySelector('.turn.assistant .content').textContent")
    assert first.strip()
    page.click(".turn.assistant >> text=Regenerate")
    page.wait_for_selector("#send:visible")
    again = page.evaluate("document.querySelector('.turn.assistant .content').textContent")
    assert again == first  # the same seed
    page.click(".turn.assistant >> text=Edit")
    page.fill(".turn textarea", "A better answer.")
    page.click(".turn >> text=Save")
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(tmp_path / "rows.jsonl")
    [line] = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "A better answer."},
        ]
    }
    page.click(".turn.user >> text=Edit")
    page.fill(".turn textarea", "good-bye")
    page.click(".turn .actions >> text=Send")
    page.wait_for_selector("#send:visible")
    assert page.locator(".turn").count() == 2
    assert last_text(page) != "A better answer."
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert page.problems == []


def test_markup_of_a_model_stays_text_or_is_cleaned(run_server, open_page, tmp_path: Path) -> None:
    path = write_speaker(tmp_path / "evil" / "final.ckpt", EVIL, "x")
    with run_server(paths={"evil": path}) as running:
        page = open_page(running.url)
        ask(page, "x")
        shown = page.locator(".turn.assistant .content")
        assert shown.locator("strong").inner_text() == "bold"
        assert page.evaluate("window.hacked") is None
        assert shown.locator("script, img").count() == 0
        assert shown.locator("a[href^=javascript]").count() == 0
        assert "<script>window.hacked=1</script><img src=x onerror=" in shown.inner_text()
        page.click("#new")
        page.check("#inside")
        ask(page, "x")
        assert EVIL in page.locator(".turn.assistant .tokens").last.evaluate("e => e.textContent")
        assert page.evaluate("window.hacked") is None
        assert page.problems == []


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_tokens_show_what_they_were_chosen_from_and_continue_from_another(
    stage: str, run_server, open_page, tmp_path: Path
) -> None:
    path = write_speaker(tmp_path / "plain" / "final.ckpt", "abcdef", "hi", stage)
    with run_server(paths={"plain": path}) as running:
        page = open_page(running.url)
        page.click("#settings summary")
        page.fill("#max_tokens", "6")
        page.check("#inside")
        ask(page, "hi")
        tokens = page.locator(".turn.assistant .token")
        before = tokens.all_text_contents()
        assert before == list("abcdef")
        tokens.nth(1).click()
        choices = page.locator("#alternatives li button")
        assert choices.count() == 8
        special = [choice for choice in choices.all() if "<|" in choice.inner_text()]
        assert [choice.is_disabled() for choice in special] == [True]
        choices = page.locator("#alternatives li button:enabled")
        wanted = json.loads(choices.nth(3).locator("code").inner_text())
        choices.nth(3).click()
        page.wait_for_selector("#send:visible")
        after = page.locator(".turn.assistant .token").all_text_contents()
        assert after[0] == before[0] and after[1] == wanted
        # The browser's own line on the 400 that says "base model".
        assert all("400" in problem for problem in page.problems)


def test_stop_ends_the_answer_on_the_server_too(run_server, open_page, monkeypatch) -> None:
    step = Engine.step

    def slow_step(engine: Engine) -> object:
        time.sleep(0.2)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow_step)
    with run_server("base") as running:
        page = open_page(running.url)
        page.click("#settings summary")
        page.fill("#max_tokens", "90")
        page.fill("#text", "x")
        page.press("#text", "Enter")
        page.wait_for_selector("#stop:visible")
        # The model is loaded, and writes: a stop before that leaves nothing to look at.
        page.wait_for_selector(".turn.assistant .content:not(:empty)")
        page.dispatch_event("#stop", "click")
        page.wait_for_selector("#send:visible")
        assert page.locator("#error").is_hidden()
        for _ in range(50):
            if not running.worker.engine.is_busy:
                break
            time.sleep(0.1)
        # 90 tokens would have taken 18 seconds.
        assert not running.worker.engine.is_busy


def test_a_base_model_continues_the_text(server, open_page) -> None:
    page = open_page(server.url)
    page.select_option("#model", "base")
    page.click("#settings summary")
    page.fill("#max_tokens", "5")
    ask(page, "once")
    assert page.evaluate("document.querySelector('.turn.assistant .content').textContent")
    # The browser's own line on the 400 that says "base model".
    assert all("400" in problem for problem in page.problems)


def test_an_error_of_the_server_is_shown(server, open_page) -> None:
    page = open_page(server.url)
    page.select_option("#model", "chat")
    ask(page, "x" * 500)
    assert "maximum context length" in page.inner_text("#error")


def test_a_run_is_shown_and_follows_its_file(run_server, open_page, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "smoke"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,train_loss,val_loss,val_ppl,val_bpb,lr,grad_norm,tokens,tokens_per_s\n"
        "5,3.0,3.5,,,0.1,1.0,100,10\n10,2.0,2.5,,,0.1,1.0,200,10\n"
    )
    with run_server("chat", logs=tmp_path / "logs") as running:
        page = open_page(running.url)
        page.click("#show-runs")
        frame = page.frame_locator("#report")
        assert frame.locator("h1").inner_text() == "smoke"
        assert frame.locator("svg").count() >= 2
        # The style of the report applies, although the page allows no inline style but this one.
        assert (
            frame.locator(".card").first.evaluate("e => getComputedStyle(e).borderRadius") == "6px"
        )
        with open(folder / "metrics.csv", "a", encoding="utf-8") as file:
            file.write("15,1.0,1.5,,,0.1,1.0,300,10\n")
        page.click("#show-chat")
        page.click("#show-runs")
        frame.locator("text=1.5000 at step 15").wait_for()
        assert page.problems == []
        page.route("**/runs/smoke", lambda route: route.abort())
        with open(folder / "metrics.csv", "a", encoding="utf-8") as file:
            file.write("20,1.0,1.5,,,0.1,1.0,300,10\n")
        page.click("#show-chat")
        page.click("#show-runs")
        page.wait_for_selector("#error:visible")
        answer = running.request("GET", "/runs/..%2f..%2fetc%2fpasswd")
        assert answer.status == 404


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_400_pixels(scheme: str, server, open_page) -> None:
    page = open_page(server.url, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    page.select_option("#model", "chat")
    page.click("#settings summary")
    page.fill("#max_tokens", "12")
    ask(page, "hello")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert page.problems == []


def test_every_file_of_the_page_is_served_and_nothing_else(server) -> None:
    for path, (_, kind) in FILES.items():
        answer = server.request("GET", path)
        assert answer.status == 200 and answer.headers["content-type"].startswith(kind)
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/vendor/", "/vendor/../app.js", "/page/index.html", "/style.css/x"):
        assert server.request("GET", path).status == 404


def test_an_answer_is_continued_after_a_character_of_two_tokens(
    run_server, open_page, tmp_path: Path
) -> None:
    """é is two byte tokens, which the API writes as `bytes:\\xc3` and `bytes:\\xa9`."""
    path = write_speaker(tmp_path / "french" / "final.ckpt", "aé!", "x")
    with run_server(paths={"french": path}) as running:
        page = open_page(running.url)
        page.check("#inside")
        ask(page, "x")
        tokens = page.locator(".turn.assistant .token")
        tokens.nth(1).click()
        choices = page.locator("#alternatives li button")
        assert choices.nth(0).is_disabled()  # half a character
        page.click("#alternatives form button")
        tokens.nth(3).click()
        page.locator("#alternatives li button:enabled").nth(1).click()
        page.wait_for_selector("#send:visible")
        page.uncheck("#inside")
        assert last_text(page).startswith("aé")
        assert page.problems == []


# --- two models side by side ---


@pytest.fixture
def two_files(tmp_path: Path) -> dict[str, Path]:
    return {
        "left": write_speaker(tmp_path / "left" / "final.ckpt", "abcdef", "hi", room=200),
        "right": write_speaker(tmp_path / "right" / "final.ckpt", "uvwxyz", "hi", room=200),
    }


def asked_bodies(page) -> list[dict]:
    """The bodies of the chats that the page asks for from now on."""
    bodies: list[dict] = []

    def note(request) -> None:
        if request.url.endswith("/chat/completions"):
            bodies.append(json.loads(request.post_data))

    page.on("request", note)
    return bodies


def answers(page) -> list[str]:
    return page.locator(".turn.assistant .content").all_inner_texts()


def set_tokens(page, n: int) -> None:
    page.click("#settings summary")
    page.fill("#max_tokens", str(n))
    page.click("#settings summary")


def test_two_models_answer_the_same_conversation(
    run_server, open_page, two_files: dict[str, Path], tmp_path: Path
) -> None:
    """By keyboard: the second model is chosen with an arrow, and Regenerate pressed with Enter."""
    with run_server(paths=two_files, max_models=2) as running:
        page = open_page(running.url, viewport={"width": 1000, "height": 800})
        bodies = asked_bodies(page)
        set_tokens(page, 6)
        page.focus("#second")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert page.input_value("#second") == "right"
        ask(page, "hi")
        assert answers(page) == ["abcdef", "uvwxyz"]
        assert page.locator(".turn.user").count() == 1
        assert page.locator(".turn.assistant .who").all_inner_texts() == ["left", "right"]
        left, right = (page.locator(f".side-{side}").bounding_box() for side in (0, 1))
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        # Each has a Regenerate of its own, and each model sees its own answers.
        bodies.clear()
        page.focus(".side-1 >> text=Regenerate")
        page.keyboard.press("Enter")
        page.wait_for_selector("#send:visible")
        assert [body["model"] for body in bodies] == ["right"]
        assert answers(page) == ["abcdef", "uvwxyz"]
        bodies.clear()
        ask(page, "and")
        assert {body["model"]: body["messages"][1]["content"] for body in bodies} == {
            "left": "abcdef",
            "right": "uvwxyz",
        }
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(tmp_path / "rows.jsonl")
        written = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
        rows = [json.loads(line) for line in written.splitlines()]
        assert [row["messages"][1]["content"] for row in rows] == ["abcdef", "uvwxyz"]
        page.set_viewport_size({"width": 400, "height": 800})
        left, right = (page.locator(f".side-{side}").first.bounding_box() for side in (0, 1))
        assert left["x"] == right["x"] and left["y"] + left["height"] <= right["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.select_option("#second", "")
        assert len(answers(page)) == 2  # to two questions
        assert page.problems == []


def test_a_second_model_continues_a_conversation_and_its_tokens(
    run_server, open_page, two_files: dict[str, Path]
) -> None:
    with run_server(paths=two_files, max_models=2) as running:
        page = open_page(running.url)
        set_tokens(page, 6)
        ask(page, "hi")
        page.select_option("#second", "right")
        assert answers(page) == ["abcdef", "abcdef"]
        page.check("#inside")
        page.click(".side-1 >> text=Regenerate")
        page.wait_for_selector("#send:visible")
        assert page.locator(".side-1 .token").all_text_contents() == list("uvwxyz")
        page.locator(".side-1 .token").nth(1).click()
        choice = page.locator("#alternatives li button:enabled").nth(2)
        wanted = json.loads(choice.locator("code").inner_text())
        choice.click()
        page.wait_for_selector("#send:visible")
        after = page.locator(".side-1 .token").all_text_contents()
        assert after[:2] == ["u", wanted]
        assert answers(page)[0] == "abcdef"
        assert page.problems == []


def test_with_room_for_one_model_the_second_waits_for_the_first(
    run_server, open_page, two_files: dict[str, Path]
) -> None:
    with run_server(paths=two_files, max_models=1) as running:
        page = open_page(running.url)
        set_tokens(page, 6)
        page.select_option("#second", "right")
        ask(page, "hi")
        assert answers(page) == ["abcdef", "uvwxyz"]
        assert page.locator("#error").is_hidden()


def test_stop_stops_both_and_an_error_names_its_model(
    run_server, open_page, two_files: dict[str, Path], monkeypatch
) -> None:
    step = Engine.step

    def slow_step(engine: Engine) -> object:
        time.sleep(0.2)
        return step(engine)

    with run_server(paths=two_files, max_models=2) as running:
        page = open_page(running.url)
        page.select_option("#second", "right")
        ask(page, "x" * 500)
        lines = page.inner_text("#error").splitlines()
        assert sorted(line.partition(": This model")[0] for line in lines) == ["left", "right"]
        assert answers(page) == ["No answer.", "No answer."]
        page.click("#new")
        monkeypatch.setattr(Engine, "step", slow_step)
        page.fill("#text", "hi")
        page.press("#text", "Enter")
        page.wait_for_function("document.querySelectorAll('.turn.assistant').length === 2")
        workers = [served.worker for served in running.store.in_memory.values()]
        for _ in range(100):
            if sum(worker.engine.is_busy for worker in workers) == 2:
                break
            time.sleep(0.1)
        page.dispatch_event("#stop", "click")
        page.wait_for_selector("#send:visible")
        assert page.locator("#error").is_hidden()
        for _ in range(50):
            if not any(worker.engine.is_busy for worker in workers):
                break
            time.sleep(0.1)
        assert not any(worker.engine.is_busy for worker in workers)
