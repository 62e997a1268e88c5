"""The chat page in a real Chromium: what a reader sees, and what must not happen.

Playwright drives it, because it presses keys and clicks as a person does; it starts the browser of the
system, and none of its own.
"""

import contextlib
import json
import re
import time

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the chat page is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the chat page is not tested")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): the chat page is not tested")
pytest.importorskip("playwright", reason="NO playwright (the extra test has it): the chat page is not tested")

import httpx
from playwright.sync_api import expect

import rwkv_miss
from demo import page_picture
from src.data.rwkv_template import RwkvTemplate
from src.inference.engine import Engine
from src.inference.load import load_with
from src.inference.torch_decoder import TorchDecoder
from src.serving import renderer
from src.serving.app import PAGE
from src.serving.guard import Guard
from src.serving.limits import Limits
from src.serving.request_parsing import Defaults
from src.serving.served_models import ServedModels

from .serving import records, running, scripted
from .test_generate import letters, mixing_tensors  # noqa: F401  (a fixture)
from .test_live_adapters import train
from .test_rendering import ACTS

LONG = Defaults(2000, "", {"temperature": 0.0}, 0)
ANSWER = ".turn:last-child .answer"
DONE = f"{ANSWER}:not(.running)"


@contextlib.contextmanager
def opened(browser, server, **context):
    """A page of the server. At the end: no error in it, nothing its policy stopped, no foreign request."""
    context = browser.new_context(**{"locale": "en-US", **context})
    page = context.new_page()
    page.set_default_timeout(10_000)
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.goto(server.url)
    page.wait_for_selector("body.ready")
    yield page
    assert {url for url in requests if not url.startswith(f"{server.url}/")} == set()
    # that a request was refused is what some of the tests are about
    assert [error for error in errors if "Failed to load resource" not in error] == []
    context.close()


def ask(page, text):
    page.fill("#draft", text)
    page.press("#draft", "Enter")
    page.wait_for_selector(DONE)


def asked(page):
    """The bodies of the requests for answers, as they come."""
    bodies = []

    def note(request):
        if request.url.endswith("/v1/chat/completions"):
            bodies.append(json.loads(request.post_data))

    page.on("request", note)
    return bodies


def begun(page):
    """Some of the answer that is being written."""
    page.wait_for_selector(f"{ANSWER}.running > .text > p")
    return page.text_content(f"{ANSWER}.running > .text > p")


def prompts(server):
    """List the prompts that the model has read, each once."""
    return [text for text in server.engine.decoder.prompts if text.endswith("Assistant:")]


def eventually(holds, seconds=5.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_a_conversation_streams_is_asked_again_is_edited_and_survives_a_reload(browser):
    said = "Good morning.\nIt rains, and it will rain all day."
    with scripted(said, defaults=LONG) as server, opened(browser, server) as page:
        sent = []
        page.on("request", lambda one: sent.append(one))
        server.engine.decoder.pause = 0.05
        page.fill("#draft", "hi")
        page.press("#draft", "Enter")
        part = begun(page)
        assert said.startswith(part) and part != said
        assert page.get_attribute(ANSWER, "aria-busy") == "true"
        server.engine.decoder.pause = 0
        page.wait_for_selector(DONE)
        eventually(lambda: page.inner_text(f"{DONE} .text >> nth=1") == said)  # rendered by the server
        # the reply for an empty text would hide the first words
        assert "" not in [one.post_data_json["text"] for one in sent if "page/render" in one.url]
        figures = page.inner_text(f"{DONE} .figures")
        assert re.fullmatch(rf"{len(said) + 1} tokens · [\d.]+ tokens/s · first after \d+\.\d\d s", figures)

        page.evaluate("() => { document.querySelector('.turn').seen = true }")
        ask(page, "and then?")
        # an answer that is read aloud as it comes is not made anew, or it would be read aloud again
        assert page.evaluate("document.querySelector('.turn').seen")
        first = "User: hi\n\nAssistant:"
        second = f"{first} {said}\n\nUser: and then?\n\nAssistant:"
        assert prompts(server) == [first, second]
        page.click("text=Retry >> visible=true")
        eventually(lambda: len(prompts(server)) == 3)
        page.wait_for_selector(DONE)
        page.reload()
        page.wait_for_selector("body.ready")
        assert page.locator(".said").all_inner_texts() == ["hi", "and then?"]
        assert page.inner_text(f"{DONE} .text >> nth=1") == said

        page.click("text=Edit >> nth=0")
        page.fill(".edit textarea", "hello <b>you</b>")
        page.press(".edit textarea", "Enter")
        eventually(lambda: len(prompts(server)) == 4)
        page.wait_for_selector(DONE)
        assert prompts(server)[2:] == [second, "User: hello <b>you</b>\n\nAssistant:"]
        assert page.locator(".said").all_inner_texts() == ["hello <b>you</b>"]
        page.click("#new")
        assert page.locator(".turn").count() == 0


def with_adapters(folder, letters, names="ab"):  # noqa: F811
    """(engine, served models): a base that says something, with these adapters."""
    rwkv_miss.write_checkpoint(folder / "tiny.pth", mixing_tensors(7).items())
    paths = {}
    for seed, name in enumerate(names):
        paths[name] = str(train(folder / "tiny.pth", folder / f"{name}.pth", "miss", seed))
    adapters, tokenizer = load_with(str(folder / "tiny.pth"), paths, letters, accelerator="cpu")
    engine = Engine(TorchDecoder(adapters.model, 4, adapters), tokenizer, chunk=16, reads_first=False)
    return engine, ServedModels("tiny", adapters, records(tokenizer), 1.0, None)


def test_two_adapters_answer_side_by_side(browser, tmp_path, letters):  # noqa: F811
    defaults = Defaults(12, "", {"temperature": 1.0, "top_p": 1.0}, 5)
    engine, served = with_adapters(tmp_path, letters)
    with running(engine, served, defaults=defaults) as server, opened(browser, server) as page:
        bodies = asked(page)
        page.evaluate("() => { Math.random = () => 0.3 }")  # the seed of both sides
        page.select_option("#adapter-0", "a")
        page.fill("#scale-0", "0.5")
        page.check("#compare")
        assert page.input_value("#adapter-1") == ""  # the base answers, too
        page.select_option("#adapter-1", "b")
        for text in ("one", "two"):
            ask(page, text)
            page.wait_for_selector(f"{ANSWER}.running", state="detached")
        labels = page.locator(f"{ANSWER} .label").all_inner_texts()
        assert labels == ["a × 0.5", "b"]
        shown = page.locator(f"{ANSWER} > .text").all_text_contents()
        assert shown[0] != shown[1]
        both = sorted(bodies[-2:], key=lambda body: body["adapter_id"])
        assert [body["adapter_id"] for body in both] == ["a", "b"]
        assert [body.get("adapter_scale") for body in both] == [0.5, None]
        assert both[0]["seed"] == both[1]["seed"]
        for body, text in zip(both, shown):
            whole = {**body, "stream": False, "stream_options": None}
            reply = httpx.post(f"{server.url}/v1/chat/completions", json=whole).json()
            assert reply["choices"][0]["message"]["content"].split() == text.split()
            assert [message["content"] for message in body["messages"]][::2] == ["one", "two"]
        assert both[0]["messages"][1] != both[1]["messages"][1]
        page.click("#new")
        assert page_picture.after_questions(page).startswith(b"\x89PNG")
        assert page.locator(".said").all_inner_texts() == list(page_picture.QUESTIONS)
        assert page.locator(".answer").count() == 4
        assert page_picture.after_import(page).startswith(b"\x89PNG")
        assert page.locator(".answer :is(.code .k, table math, ol)").count() > 3


def test_the_composer_leaves_a_phone_to_the_answers(browser, tmp_path, letters):  # noqa: F811
    engine, served = with_adapters(tmp_path, letters)
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with running(engine, served) as server, opened(browser, server, **phone) as page:
        height = "e => e.getBoundingClientRect().height"
        for what in ("one side", "two sides", "a long draft"):
            if what == "two sides":
                page.check("#compare")
                page.select_option("#adapter-0", "a")
                page.select_option("#adapter-1", "b")
            if what == "a long draft":
                page.fill("#draft", "a line\n" * 30)
            assert page.eval_on_selector("#composer", height) <= 844 / 6, what
            assert page.evaluate("document.documentElement.scrollWidth") == 390, what
        send = page.locator("#send").bounding_box()
        assert 0 < send["x"] and send["x"] + send["width"] < 390  # in sight, next to what scrolls
        assert page.eval_on_selector("#draft", "e => e.clientHeight") >= 40


def test_the_only_adapter_is_chosen_at_first(browser, tmp_path, letters):  # noqa: F811
    engine, served = with_adapters(tmp_path, letters, "a")
    with running(engine, served, defaults=LONG) as server, opened(browser, server) as page:
        assert page.input_value("#adapter-0") == "a"
        assert page.inner_text("#side-0 label") == "Scale" and page.is_visible("#scale-0")
        page.check("#compare")
        assert page.input_value("#adapter-1") == ""
        page.select_option("#adapter-0", "")
        assert not page.is_visible("#side-0 label")
        page.reload()
        page.wait_for_selector("body.ready")
        assert page.input_value("#adapter-0") == ""  # as it was chosen


def test_the_picture_needs_the_demo_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["page_picture", "--run", str(tmp_path)])
    with pytest.raises(SystemExit):
        page_picture.main()
    assert f"{page_picture.DEMO} trains it" in capsys.readouterr().err


def test_what_is_typed_into_the_settings_is_asked_for(browser):
    with scripted("Hello.") as server, opened(browser, server) as page:
        bodies = asked(page)
        assert not page.is_visible("#adapter-0") and not page.is_visible("#compare")  # there is no adapter
        page.click("#show-settings")
        assert page.get_attribute("#temperature", "placeholder") == "0"
        typed = {"temperature": 0.3, "top_p": 0.9, "top_k": 7, "presence_penalty": 0.2, "seed": 9}
        typed |= {"frequency_penalty": 0.1, "penalty_decay": 0.99, "max_tokens": 3}
        for name, value in typed.items():
            page.fill(f"#{name}", str(value))
        page.fill("#system", "Be brief.")
        page.select_option("#mode", "fake-think-compact")
        ask(page, "hi")
        body = bodies[-1]
        assert {name: body[name] for name in typed} == typed
        assert body["think_mode"] == "fake-think-compact"
        assert prompts(server) == []
        assert server.engine.decoder.prompts == ["System: Be brief.\n\nUser: hi\n\nAssistant: <think></think"]
        expect(page.locator(f"{DONE} .note")).to_have_text("Cut off at max tokens.")
        page.click("#reset")
        assert page.get_attribute("#top_p", "placeholder") == "0.7"
        ask(page, "again")
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = bodies[-1]
        assert body.pop("messages")[-1] == {"role": "user", "content": "again"}
        assert body == {"model": "tiny", **options}


def test_stop_in_the_middle_frees_the_row_and_keeps_what_was_said(browser):
    said = "on and on " * 100
    with scripted(said, pause=0.01, defaults=LONG) as server, opened(browser, server) as page:
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
            page.fill("#draft", "talk")
            page.press("#draft", "Enter")
            begun(page)
            assert server.dispatcher.open == 1
            stop()
            eventually(lambda: server.dispatcher.open == 0 and not server.dispatcher.running)
            expect(page.locator(f"{DONE} .note")).to_have_text("Stopped.")
            assert said.startswith(page.text_content(f"{DONE} > .text").rstrip())
        assert server.dispatcher.metrics.gone == 2


@pytest.mark.parametrize("packages", [renderer.PACKAGES, {"absent_package": "absent"}])
def test_markup_in_an_answer_is_text(browser, monkeypatch, packages):
    monkeypatch.setattr(renderer, "PACKAGES", packages)
    evil = "<script>window.hacked = 1</script><img src=/x onerror='window.hacked = 2'><a href=//e.org>x</a>"
    fence = f"```html\n{evil}\n\n  end\n```"
    said = f"<think>\n{evil}\n</think>\n{evil}\n\nand `{evil}`\n{fence}\n```\nopen {evil}"
    with scripted(said, defaults=LONG) as server, opened(browser, server) as page:
        ask(page, evil)
        assert page.evaluate("window.hacked") is None
        assert page.locator("#log :is(script, img, a, b, iframe, svg, style)").count() == 0
        assert page.text_content(".said") == evil
        assert page.locator(".thoughts").get_attribute("open") is None
        page.click(".thoughts summary")
        expect(page.locator(".thoughts .text")).to_have_text(evil)
        # the renderer's reply comes after the answer's end, on a busy machine seconds later
        paragraphs, want = page.locator(f"{DONE} > .text > p"), [evil, f"and {evil}"]
        eventually(lambda: paragraphs.all_text_contents() == want, 30)
        eventually(lambda: page.locator(f"{DONE} > .text pre code").count() == 2, 30)
        codes = page.locator(f"{DONE} > .text pre code").all_text_contents()
        assert codes == [f"{evil}\n\n  end", f"open {evil}"]
        assert page.inner_text(".code-head span >> nth=0") == "html"
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click(".code button >> nth=0")
        expect(page.locator(".code button >> nth=0")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == codes[0]
    scripts = "".join(path.read_text() for path in PAGE.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", scripts)


def test_an_answer_is_rendered_as_it_comes_and_nothing_in_it_acts(browser):
    table = "| a | b |\n|--:|---|\n| $x^2$ | [link](https://e.org) |\n"
    said = "\n\n".join(["# Title", table, "```python\nif True:\n    pass\n```", *ACTS])
    with scripted(said, defaults=LONG, pause=0.02) as server, opened(browser, server) as page:
        page.evaluate("() => { window.hacked = () => { window.ran = true } }")
        times = []  # milliseconds

        def note(request):
            if request.url.endswith("/render") and json.loads(request.post_data)["unfinished"]:
                times.append(request.timing["startTime"])

        page.on("requestfinished", note)
        page.fill("#draft", "show")
        page.press("#draft", "Enter")
        page.wait_for_selector(f"{ANSWER}.running h3:text('Title')", timeout=30_000)
        expect(page.locator(f"{ANSWER}.running td math msup")).to_be_visible()
        assert page.locator(f"{ANSWER} p:text-matches('^[|]')").count() == 0  # half a table waits
        page.eval_on_selector(f"{ANSWER} h3", "e => { e.seen = true }")
        page.eval_on_selector(f"{ANSWER} table", "e => { e.seen = true }")
        while len(times) < 4:
            page.wait_for_timeout(20)
        assert min(later - time for time, later in zip(times, times[1:])) > 190  # a few times a second
        server.engine.decoder.pause = 0
        page.wait_for_selector(DONE)
        expect(page.locator(f"{DONE} .code-head span >> nth=-1")).to_have_text("html")
        # blocks that have not changed stay, with what is selected in them
        assert page.eval_on_selector(f"{ANSWER} h3", "e => e.seen")
        assert page.eval_on_selector(f"{ANSWER} table", "e => e.seen")
        assert page.evaluate("window.ran") is None
        assert page.locator("#log :is(script, img, iframe, svg, style, [style], [onerror])").count() == 0
        link = page.locator(f"{DONE} td a")
        assert (link.get_attribute("target"), link.get_attribute("rel")) == ("_blank", "noopener noreferrer")
        assert page.eval_on_selector("td", "e => getComputedStyle(e).textAlign") == "right"
        assert page.eval_on_selector("math", "e => e.namespaceURI").endswith("/MathML")
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.click(f"{DONE} > .foot >> text=Copy")
        expect(page.locator(f"{DONE} > .foot button >> nth=0")).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == said
        page.click("#show-settings")
        colors = []
        for theme in ("light", "dark"):
            page.select_option("#theme", theme)
            colors.append(page.eval_on_selector(".code .k", "e => getComputedStyle(e).color"))
        assert colors == ["rgb(169, 13, 145)", "rgb(255, 123, 114)"]
        page.reload()
        page.wait_for_selector(f"{DONE} h3")
        assert page.eval_on_selector(".code .k", "e => getComputedStyle(e).color") == colors[1]


def test_conversations_are_kept_if_the_reader_says_so(browser, tmp_path):
    with scripted("The *river* is long.", defaults=LONG) as server, opened(browser, server) as page:
        page.on("dialog", lambda dialog: dialog.accept())
        chats = page.locator(".chat span")
        ask(page, "A river")
        page.click("#show-chats")
        expect(page.locator("#no-chats")).to_have_text("No conversation is kept.")
        assert page.evaluate("localStorage.length") == 0
        page.check("#keep")
        expect(chats).to_have_text(["A river"])
        page.click("#show-settings")
        page.fill("#system", "Be brief.")
        page.click("#new")
        page.fill("#system", "Be kind.")
        ask(page, "B 山")
        expect(chats).to_have_text(["B 山", "A river"])
        for query, found in (("山", ["B 山"]), ("RIVER long", ["B 山", "A river"]), ("brief", ["A river"])):
            page.fill("#search", query)
            expect(chats).to_have_text(found)
        page.fill("#search", "zebra")
        expect(page.locator("#no-chats")).to_have_text("None has these words.")
        page.fill("#search", "")
        page.click(".chat >> nth=1")
        assert page.inner_text(".said") == "A river" and page.input_value("#system") == "Be brief."
        ask(page, "more")
        expect(chats).to_have_text(["A river", "B 山"])
        assert prompts(server)[-1].startswith("System: Be brief.\n\nUser: A river\n\nAssistant: The *river*")

        files = {}
        for button in ("export-all", "export-json", "export-markdown"):
            with page.expect_download() as started:
                page.click(f"#{button}")
            files[button] = tmp_path / started.value.suggested_filename
            started.value.save_as(files[button])
        assert [file.name for file in files.values()] == ["conversations.json", "A-river.json", "A-river.md"]
        turns = json.loads(files["export-json"].read_text())["conversations"][0]["turns"]
        assert [turn["text"] for turn in turns] == ["A river", "more"]
        blocks = files["export-markdown"].read_text().split("\n\n")
        assert blocks[:3] == ["# A river", "## System prompt", "Be brief."]
        assert blocks[3:7] == ["## You", "A river", "## tiny", "The *river* is long."]
        page.click("[aria-label='Remove B 山']")
        expect(chats).to_have_text(["A river"])
        page.click("#drop-all")
        expect(chats).to_have_count(0)
        assert page.locator(".turn").count() == 0  # the open one was among them
        assert page.evaluate("Object.keys(localStorage)") == ["rwkv-miss-keep"]
        page.set_input_files("#import-file", files["export-all"])
        expect(chats).to_have_text(["A river", "B 山"])
        expect(page.locator(".said")).to_have_text(["A river", "more"])
        page.set_input_files("#import-file", files["export-all"])  # again: nothing is doubled
        page.set_input_files("#import-file", files["export-markdown"])
        expect(page.locator("#problem")).to_have_text(re.compile("^This file has no conversations"))
        expect(chats).to_have_count(2)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n</tool_call>'


def test_a_tool_is_called_and_its_result_is_typed(browser):
    template = RwkvTemplate("rwkv", "hermes")
    with scripted(f"{CALL}\n{CALL}", template, defaults=LONG) as server, opened(browser, server) as page:
        bodies = asked(page)
        page.click("#show-settings")
        for wrong in ("[", '{"name": "weather"}', "[{}]"):
            page.fill("#tools", wrong)
            expect(page.locator("#tools-problem")).to_be_visible()
        page.fill("#draft", "Is it warm?")
        page.press("#draft", "Enter")
        expect(page.locator("#tools")).to_be_focused()
        assert bodies == []
        schema = {"type": "object", "properties": {"city": {"type": "string"}}}
        tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
        page.fill("#tools", json.dumps(tools))
        expect(page.locator("#tools-problem")).to_be_hidden()
        ask(page, "Is it warm?")
        assert bodies[0]["tools"] == tools
        expect(page.locator(".call h3")).to_have_text(["Calls weather"] * 2)
        assert json.loads(page.inner_text(".call code >> nth=0")) == {"city": "Bonn"}
        server.engine.decoder.script = "Yes."
        assert page.get_attribute("#draft", "placeholder") == "Result of weather"
        page.fill("#draft", "21 degrees")
        page.press("#draft", "Enter")  # the second call waits for its result still
        expect(page.locator(".result")).to_have_text(["Result of weather"])
        assert len(bodies) == 1
        page.reload()
        page.wait_for_selector("body.ready")
        ask(page, "22 degrees")
        expect(page.locator(f"{DONE} > .text")).to_have_text("Yes.")
        question, call, *results = bodies[1]["messages"]
        assert [called["function"]["name"] for called in call["tool_calls"]] == ["weather"] * 2
        identities = [called["id"] for called in call["tool_calls"]]
        assert [(m["role"], m["tool_call_id"], m["content"]) for m in results] == [
            ("tool", identities[0], "21 degrees"),
            ("tool", identities[1], "22 degrees"),
        ]
        assert page.get_attribute("#draft", "placeholder") == "Write a message"


def test_a_text_file_is_put_before_the_message(browser, tmp_path):
    (tmp_path / "notes.md").write_text("# Notes\n```\ncode\n```\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "large.txt").write_text("x" * 300_000)
    with scripted("Read.", defaults=LONG) as server, opened(browser, server) as page:
        for name, problem in (("picture.png", "is no text"), ("large.txt", "is too large")):
            page.set_input_files("#file", tmp_path / name)
            expect(page.locator("#problem")).to_have_text(re.compile(f"{name} {problem}"))
        page.set_input_files("#file", tmp_path / "notes.md")
        page.set_input_files("#file", tmp_path / "notes.md")
        expect(page.locator(".chip")).to_have_count(2)
        page.click("[aria-label='Remove notes.md'] >> nth=1")
        page.reload()
        page.wait_for_selector("body.ready")
        expect(page.locator(".chip span")).to_have_text(["notes.md · 21 B"])
        ask(page, "What is it?")
        read = "User: notes.md:\n````\n# Notes\n```\ncode\n```\n````\nWhat is it?\n\nAssistant:"
        assert prompts(server) == [read]
        assert page.locator(".chip").count() == 0 and page.inner_text(".said") == "What is it?"
        page.click(".file summary")
        assert "code" in page.inner_text(".file pre")
        page.click("text=Edit")
        page.fill(".edit textarea", "And now?")
        page.press(".edit textarea", "Enter")
        eventually(lambda: prompts(server)[1:] == [read.replace("What is it?", "And now?")])
        page.wait_for_selector(DONE)


def luminance(page, selector, kind):
    red, green, blue, *_ = map(
        float, re.findall(r"[\d.]+", page.eval_on_selector(selector, f"e => getComputedStyle(e).{kind}"))
    )
    parts = (part / 255 for part in (red, green, blue))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(map(lambda weight, part: weight * part, (0.2126, 0.7152, 0.0722), linear))


def contrast(page, selector, ground="body"):
    """As WCAG has it."""
    bright = luminance(page, selector, "color"), luminance(page, ground, "backgroundColor")
    return (max(bright) + 0.05) / (min(bright) + 0.05)


def test_a_phone_a_dark_room_and_chinese(browser):
    said = "<think>\nx\n</think>\n" + "w" * 300 + "\n\n```\n" + "c" * 300 + "\n```"
    small = "button, select, summary, textarea, .check, input:not([type=checkbox])"
    box = "all => all.map(e => [e.getBoundingClientRect(), e.outerHTML]).filter(([b]) => b.width)"
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with scripted(said, defaults=LONG) as server:
        with opened(browser, server, locale="zh-CN", color_scheme="dark", **phone) as page:
            ask(page, "你好" + "w" * 200)
            assert page.evaluate("document.documentElement.lang") == "zh-CN"
            assert page.inner_text("#send") == "发送"
            wide = "document.documentElement.scrollWidth"
            assert page.evaluate(wide) == 360
            assert luminance(page, "body", "backgroundColor") < 0.02
            for selector in (f"{DONE} p", ".figures", ".label", ".foot button"):
                assert contrast(page, selector) > 4.5, selector
            for panel in ("chats", "settings"):
                page.click(f"#show-{panel}")
                assert page.evaluate(wide) == 360 and not page.is_visible("#draft")
                for rect, shown in page.eval_on_selector_all(small, box):
                    assert min(rect["width"], rect["height"]) >= 40, shown
                page.click(f"#close-{panel}")
                assert page.is_visible("#draft")
            for rect, shown in page.eval_on_selector_all(small, box):
                assert min(rect["width"], rect["height"]) >= 40, shown
            assert re.fullmatch(r"模板 rwkv。rwkv-miss [\w.+]+。", page.text_content("#about"))
            page.click("#language")
            assert page.inner_text("#send") == "Send" and page.inner_text("text=Retry")
            page.eval_on_selector("#model", "e => { e.textContent = 'w'.repeat(60) }")
            fits = "all => all.every(e => e.scrollWidth <= e.clientWidth)"
            assert page.eval_on_selector_all("header button", fits)
            page.reload()
            page.wait_for_selector("body.ready")
            assert page.inner_text("#send") == "Send"  # as it was chosen, not as the browser says
            page.emulate_media(color_scheme="light")
            assert luminance(page, "body", "backgroundColor") > 0.9
            for selector in (f"{DONE} p", ".figures", ".label", ".foot button"):
                assert contrast(page, selector) > 4.5, selector
            english, chinese = page.evaluate("import('/page/words.js').then(m => m.languages)")
            assert english.keys() == chinese.keys()
            for name, text in english.items():
                assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", chinese[name]))
            server.stop()  # a notice pushes nothing out of sight
            page.evaluate("scrollTo(0, 9999); document.dispatchEvent(new Event('visibilitychange'))")
            expect(page.locator("#problem")).to_be_visible()
            assert page.evaluate("innerHeight + scrollY > document.documentElement.scrollHeight - 1")


def test_it_is_used_with_the_keyboard_alone(browser):
    with scripted("Yes.", defaults=LONG) as server, opened(browser, server) as page:
        focused = "(document.activeElement.id || document.activeElement.textContent)"
        assert page.evaluate(focused) == "draft"
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.wait_for_selector(DONE)
        assert page.text_content(".said") == "one\ntwo"
        assert page.evaluate(focused) == "draft"
        order = []
        for _ in range(3):
            page.keyboard.press("Shift+Tab")
            order.append(page.evaluate(focused))
        assert order == ["Retry", "Copy", "Edit"]
        assert page.eval_on_selector(":focus", "e => getComputedStyle(e).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.keyboard.type(" three")
        page.keyboard.press("Escape")  # nothing changes
        assert page.evaluate(focused) == "Edit" and page.text_content(".said") == "one\ntwo"
        page.keyboard.press("Enter")
        page.keyboard.press("Control+A")
        page.keyboard.type("four")
        page.keyboard.press("Enter")
        eventually(lambda: len(prompts(server)) == 2)
        page.wait_for_selector(DONE)
        for _ in range(3):
            page.keyboard.press("Shift+Tab")
        page.keyboard.press("Shift+Tab")
        assert page.evaluate(focused) == "show-settings"
        page.keyboard.press("Space")
        assert page.is_visible("#system")
        page.keyboard.press("Escape")
        assert not page.is_visible("#system") and page.evaluate(focused) == "show-settings"
        # every control has a name
        named = "e => Boolean(e.labels?.length || e.ariaLabel || e.textContent.trim())"
        for control in page.locator("button, input, select, textarea").all():
            assert control.evaluate(named), control.evaluate("e => e.outerHTML")
        # Enter within an input method ends a word and sends nothing
        page.fill("#draft", "ni")
        enter = "new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true})"
        page.eval_on_selector("#draft", f"e => e.dispatchEvent({enter})")
        assert page.input_value("#draft") == "ni" and page.locator(".turn").count() == 1


def test_it_asks_for_the_key_and_says_what_is_wrong(browser):
    limits = Limits(waiting=0, finishing=5)
    options = {"rows": 1, "limits": limits, "guard": Guard(("secret",)), "defaults": LONG}
    with scripted("Hello.", **options) as server, opened(browser, server) as page:
        assert page.is_visible("#key-form") and not page.is_visible("#problem")
        assert page.is_disabled("#send")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        expect(page.locator("#problem")).to_have_text("The key is wrong.")
        page.click("#language")
        expect(page.locator("#problem")).to_have_text("密钥不正确。")
        page.click("#language")
        page.fill("#draft", "kept")
        page.press("#draft", "Enter")
        expect(page.locator("#key")).to_be_focused()
        assert page.input_value("#draft") == "kept" and page.locator(".turn").count() == 0
        page.fill("#key", "secret")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-form", state="hidden")
        assert page.is_enabled("#send") and not page.is_visible("#problem")
        page.reload()
        page.wait_for_selector("body.ready")
        assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0
        ask(page, "hi")
        assert page.text_content(f"{DONE} > .text") == "Hello."
        figures = page.inner_text(f"{DONE} .figures")
        assert re.fullmatch(r"7 tokens · first after [\d.]+ s", figures)  # too few for a speed
        # another client has the only row
        server.engine.decoder.pause = 0.3
        headers = {"Authorization": "Bearer secret"}
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", headers=headers, json=body):
            ask(page, "more")
            note = page.locator(f"{DONE} .note.error")
            expect(note).to_have_text(re.compile(r"The server is busy\. Try again in \d+ s\."))
        server.engine.decoder.pause = 0
        eventually(lambda: server.dispatcher.open == 0)
        page.click("text=Retry >> visible=true")
        expect(page.locator(f"{DONE} > .text")).to_have_text("Hello.")
        page.click("#show-settings")
        page.fill("#top_k", "0.5")
        page.click("#show-settings")
        page.fill("#draft", "wrong")
        page.press("#draft", "Enter")
        expect(page.locator("#top_k")).to_be_focused()  # the browser says there what is wrong with it
        page.click("text=Retry >> visible=true")
        assert page.input_value("#draft") == "wrong" and page.locator(".turn").count() == 2
        expect(page.locator(f"{DONE} > .text")).to_have_text("Hello.")
        page.eval_on_selector("#top_k", "e => { e.step = 'any' }")  # the server knows better than the page
        ask(page, "wrong")
        expect(page.locator(f"{DONE} .note.error")).to_have_text(
            re.compile("The server refused: top_k: got 0.5")
        )
        expect(page.locator("#told")).to_have_text(re.compile("The server refused: top_k"))
        for _ in range(2):
            page.click("#language")
            expect(page.locator("#told")).to_have_text("")
        server.stop()
        page.fill("#top_k", "")
        page.click("text=Edit >> nth=-1")  # a failed question is asked in other words
        page.fill(".edit textarea", "gone")
        page.press(".edit textarea", "Enter")
        expect(page.locator(".said >> nth=-1")).to_have_text("gone")
        expect(page.locator(f"{DONE} .note.error")).to_have_text(
            "The server can't be reached. Does it still run?"
        )
