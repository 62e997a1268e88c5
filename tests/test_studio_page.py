"""The training page in a real Chromium: from rows to a model that answers, by visible labels alone."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): the page is not tested")
pytest.importorskip("uvicorn", reason="NO uvicorn (the extra test has it): the page is not tested")
pytest.importorskip("playwright", reason="NO playwright (the extra test has it): the page is not tested")

from playwright.sync_api import expect

from demo import serve, studio_picture, task
from scripts.preview_lint import MEANINGS
from src.inference.load import load_with
from src.reporting.diagnosis import RULES
from src.serving.uvicorn_server import Server
from src.studio import program
from src.studio.app import PAGE
from src.studio.settings import ALLOWED

from .answering import engine_of, greedy_text
from .conftest import ROOT, write_rows
from .test_studio import eventually, made_run

BASE = ROOT / "demo" / "rwkv7-reverse.pth"
QUESTIONS = ["wqa", "tgc", "xnd", "kfb", "zme"]
PATIENCE = 60_000  # milliseconds for a process of the server's on a busy machine
DROP = """text => {
    const files = new DataTransfer()
    files.items.add(new File([text], 'rows.jsonl'))
    return files
}"""


@contextlib.contextmanager
def serving(folder, port=0):
    """The address of a server of the page, in a thread of this process."""
    ready, servers = threading.Event(), []

    def server(app, trial, listener, say_where, *tls):
        servers.append(Server(app, trial, listener, ready.set, *tls))
        return servers[0]

    args = serve.parse(
        ["--train", str(folder), "--port", str(port), "--temperature", "0", "--accelerator", "cpu"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Server", server)
        thread = threading.Thread(target=program.run, args=[args], daemon=True)
        thread.start()
        assert ready.wait(20), "the server did not start"
    try:
        yield f"http://127.0.0.1:{servers[0].listener.getsockname()[1]}"
    finally:
        servers[0].should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server does not end"


@contextlib.contextmanager
def killed_server(folder):
    """The address of a server that is a process of its own, and gets a SIGKILL at the end."""
    words = ["-m", "demo.serve", "--train", str(folder), "--port", "0", "--accelerator", "cpu"]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            yield server.stderr.readline().split()[-1].rstrip("/")
        finally:
            server.kill()


class Visitor:
    """Somebody who sees a page, and has only its visible labels to go by."""

    def __init__(self, context, url):
        self.page, self.errors, self.foreign = context.new_page(), [], set()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self.heard)
        self.page.on("request", lambda request: self.asked(request.url, url))
        self.page.goto(url)
        self.page.wait_for_selector("body.ready")

    def heard(self, said):
        # that a request was refused, or that no server was there, is what some of the tests are about
        if said.type in ("error", "warning") and "Failed to load resource" not in said.text:
            self.errors.append(said.text)

    def asked(self, url, own):
        if not url.startswith((own.partition("#")[0], "data:", "blob:")):
            self.foreign.add(url)

    def button(self, name):
        return self.page.get_by_role("button", name=name, exact=True)

    def press(self, name):
        self.button(name).click()

    def step(self, name):
        return self.page.locator(".step", has=self.page.locator("h2", has_text=name))


@contextlib.contextmanager
def visiting(browser, url, **context):
    """A visitor of the page. At the end: no error in it, nothing its policy stopped, no foreign request."""
    expect.set_options(timeout=PATIENCE)
    context = browser.new_context(**{"locale": "en-US", **context})
    visitor = Visitor(context, url)
    yield visitor
    assert (visitor.errors, visitor.foreign) == ([], set())
    context.close()


def rows(count):
    """Rows of the demo's task with strings of three letters, which is learnt in few steps."""
    return "".join(json.dumps(row) + "\n" for row in task.rows("sort", count, 1, lengths=[3]))


@pytest.mark.slow
def test_from_a_dropped_file_to_a_merged_model_that_answers_right(browser, tmp_path):
    shutil.copy(BASE, tmp_path)
    run = tmp_path / "runs" / "letters"
    with killed_server(tmp_path) as url, visiting(browser, url) as visitor:
        prepare(visitor)
        visitor.press("Start training")
        expect(visitor.step("Run")).to_contain_text("Starting")
        os.kill(json.loads((run / "studio.json").read_text())["pid"], signal.SIGKILL)
        expect(visitor.step("Run")).to_contain_text("ended from outside, before its first checkpoint")
        visitor.press("Go on")
        expect(visitor.step("Run")).to_contain_text("Starting")
    address = f"{url}/#run=runs%2Fletters"
    # page and server are gone, and the run goes on
    with serving(tmp_path, int(url.rpartition(":")[2])), visiting(browser, address) as visitor:
        with visiting(browser, url) as other:  # a second tab, which knows nothing of the first but its run
            expect(other.step("Run")).to_contain_text("Start a training first")
            other.page.get_by_role("button", name=re.compile("^letters")).click()
            expect(other.step("Run")).to_contain_text(re.compile("Training · step [1-9]"))
            other.press("Stop and save")
        expect(visitor.step("Run")).to_contain_text(re.compile("Stopped · step [1-9]"))
        visitor.press("Go on")
        expect(visitor.page.locator("#verdict")).to_contain_text("learnt", timeout=2 * PATIENCE)
        assert [json.loads(line)["step"] for line in open(run / "metrics.jsonl")] == list(range(1, 73))
        expect(visitor.page.locator("#answers")).to_contain_text("Step 72")
        assert not (run / "running.json").exists()
        assert (run / "train.log").read_text().count("\n$ python train.py ") == 2
        visitor.press("Try the model")
        visitor.press("Merge into one model")
        with visitor.page.expect_download() as download:
            visitor.page.get_by_role("link", name="merged.pth").click()
        assert download.value.path().read_bytes() == (run / "merged.pth").read_bytes()
        models = visitor.page.request.get(f"{url}/studio/models").json()
        assert "runs/letters/merged.pth" in [model["name"] for model in models]
        answers_right(visitor)
    adapters, tokenizer = load_with(str(run / "merged.pth"), {}, "auto", accelerator="cpu")
    engine = engine_of(adapters.model, tokenizer)
    said = [greedy_text(engine, f"User: sort {letters}\n\nAssistant:", 8) for letters in QUESTIONS]
    assert are_right(said), said


def are_right(answers):
    """Tell whether at least four of the five are sorted."""
    sorts = ["".join(sorted(letters)) for letters in QUESTIONS]
    return sum(one.strip() == right for one, right in zip(answers, sorts, strict=True)) >= 4


def prepare(visitor):
    """The steps before the training, with a wrong file first."""
    expect(visitor.step("Plan")).to_contain_text("Choose data that the model can read first.")
    visitor.press("Use this model")  # the only one is chosen
    for text, complaint in (('{"text": 1', "line 1: not valid JSON"), ("", "empty")):
        page = visitor.page
        page.dispatch_event(".drop", "drop", {"dataTransfer": page.evaluate_handle(DROP, text)})
        expect(visitor.step("Data").locator("[role=alert]")).to_contain_text(complaint)
        expect(visitor.button("Use this data")).to_be_disabled()
    page.dispatch_event(".drop", "drop", {"dataTransfer": page.evaluate_handle(DROP, rows(400))})
    expect(page.locator("#counts")).to_contain_text("400 rows")
    assert page.locator("#samples li").count() == 10
    assert re.fullmatch(r"User: sort (\w{3})\n\nAssistant:( \w{3}.*)", page.inner_text("#samples li"), re.S)
    assert re.match(r" \w{3}", page.text_content("#samples mark"))
    visitor.press("Use this data")
    page.get_by_label("Name", exact=True).fill("letters")
    page.get_by_text("The settings that matter most").click()
    page.get_by_label("Learning rate lr_init").fill("fast")
    expect(page.locator(".field", has_text="lr_init").get_by_role("alert")).to_contain_text(
        "expected a number"
    )
    expect(visitor.button("Start training")).to_be_disabled()
    for label, value in {
        "Learning rate lr_init": "0.01",
        "Rows at once": "8",
        "Passes over the data": "9",
    }.items():
        page.get_by_label(label).fill(value)
    expect(visitor.button("Start training")).to_be_enabled()
    assert re.search("--lr_init 0.01 .*--proj_dir .*/runs/letters", page.inner_text("#command"))
    expect(page.locator("#needs")).to_contain_text("It fits")


def answers_right(visitor):
    """In the chat the base reverses, and the adapter sorts."""
    visitor.press("Chat: base beside adapter")
    chat = visitor.page.frame_locator("iframe")
    for turn, letters in enumerate(QUESTIONS, 1):
        chat.get_by_label("Message").fill(f"sort {letters}")
        chat.get_by_label("Message").press("Enter")
        expect(chat.locator(".answer:not(.running)")).to_have_count(2 * turn)
    said = [text.strip() for text in chat.locator(".answer .text").all_text_contents() if text.strip()]
    assert are_right(said[1::2]) and said[::2] != said[1::2], said


def test_rows_for_another_loss_lead_to_the_plan_with_a_terminals_settings(browser, tmp_path):
    base, asked = shutil.copy(BASE, tmp_path), []
    run = made_run(tmp_path / "runs" / "whole", verdict=VERDICT)
    (run / "config.yaml").write_text(f"load_model: {base}\npacking: false\nwandb: mine\nloss: kto\n")
    shutil.copy(BASE, run / "model.pth")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "(1) 数据.jsonl").write_text("{}\n")

    def refuse(route):
        asked.append(route.request.post_data_json)
        route.fulfill(status=400, json={"error": {"message": "a pair is for --loss dpo"}})

    with serving(tmp_path) as url, visiting(browser, f"{url}/#run=runs%2Fwhole") as visitor:
        page = visitor.page
        page.route("**/studio/jobs", refuse)  # a preview is a process, which takes seconds
        expect(visitor.button("Try the model")).to_be_enabled()
        visitor.step("Data").get_by_role("button").first.click()
        page.get_by_label("(1) 数据.jsonl").check()
        expect(visitor.step("Data")).to_contain_text("say so in the plan's settings")
        assert asked[-1]["kind"] == "preview"
        assert {"packing": "false", "loss": "kto"}.items() <= asked[-1]["settings"].items()
        assert "wandb" not in asked[-1]["settings"]
        visitor.step("Plan").get_by_role("button").first.click()
        assert page.get_by_label("Name", exact=True).input_value() == "1-数据"
        assert page.locator("#set-packing").input_value() == "false"
        visitor.step("Try").get_by_role("button").first.click()
        expect(visitor.button("Export to GGUF")).to_be_disabled()
        expect(page.locator("#blocked")).to_contain_text("heads of 32")


VERDICT = {
    "name": "learnt",
    "rule": "answers learnt",
    "numbers": {"loss": [1.5, 0.25], "right_answers": [0.125, 0.875], "steps": 3000},
    "remedy": "more passes: --epoch_count 2",
    "offered": True,
    "reason": "right answers 1 to 7 of 8",
    "forgotten": 4.7,
}


def evaluated(step, loss, answer):
    samples = [{"prompt": "User: sort cba\n\nAssistant:", "right": "abc", "answer": answer}]
    return {"step": step, "loss": loss, "right_answers": 0.1, "samples": samples}


def test_curves_are_read_zoomed_and_laid_over_each_other(browser, tmp_path):
    long = made_run(tmp_path / "runs" / "long", 3000, verdict=VERDICT, best="best.pth", best_step=2000)
    lines = [evaluated(0, 1.5, "cba"), evaluated(2000, 0.2, "abc"), evaluated(3000, 0.25, "acb")]
    write_rows(long / "validation.jsonl", lines)
    rewards = made_run(tmp_path / "runs" / "rewards", 20)  # no step has a loss yet
    metrics = (rewards / "metrics.jsonl").read_text()
    (rewards / "metrics.jsonl").write_text(re.sub('"loss": [^,]*', '"loss": null, "reward": 0.25', metrics))
    made_run(tmp_path / "runs" / "killed", 20)
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True}
    with serving(tmp_path) as url, visiting(browser, f"{url}/#run=runs%2Flong", **phone) as visitor:
        page = visitor.page
        readout, curves = page.locator(".readout"), page.get_by_role("slider")
        expect(readout).to_have_text(re.compile("^step 3000 · loss 3.33e-4 · .* held out 0.25 .step 3000."))
        assert page.locator("td.right").all_inner_texts() == ["abc"]
        told = (
            "Verdict learnt: right answers 1 to 7 of 8. Chat and merging take best.pth, of step 2000."
            " KL to the base: 4.70 per token on a fixed text. What the base could do besides may be lost."
            " Try more passes: --epoch_count 2."
        )
        expect(page.locator("#verdict")).to_have_text(told)
        curves.press("Home")
        expect(readout).to_contain_text("step 1 · loss 1 ·")
        assert page.evaluate("document.documentElement.scrollWidth") == 360

        asked = []
        page.on("request", lambda request: asked.append(request.url))
        for _ in range(4):
            curves.press("+")
        # in a part of the run no step is left out
        eventually(lambda: any("&to=189" in request for request in asked))
        curves.press("End")
        expect(readout).to_contain_text(re.compile("^step 18[89] "))
        curves.press("ArrowLeft")
        expect(readout).to_contain_text(re.compile("^step 18[78] "))
        page.locator(".charts").tap(position={"x": 60, "y": 100})
        number = re.search(r"^step (\d+) · loss (\S+)", readout.inner_text())
        assert float(number[2]) == pytest.approx(1 / int(number[1]), rel=1e-3) and int(number[1]) < 40
        page.get_by_label("Logarithmic").check()
        labels = page.locator(".charts svg >> nth=0").locator("text")
        pairs = labels.evaluate_all("found => found.map(one => [one.textContent, +one.getAttribute('y')])")
        place = dict(pairs)
        assert place["0.1"] - place["1"] == pytest.approx(place["0.01"] - place["0.1"])

        visitor.press("Runs")
        page.get_by_label("Lay the curve of killed over it").check()
        visitor.press("Runs")
        expect(page.locator(".legend")).to_contain_text("killed")
        visitor.press("All")
        curves.press("Home")
        expect(readout).to_contain_text("killed 1")
        visitor.press("中文")
        expect(page.locator("#verdict")).to_have_text(
            re.compile("学会了.* 1.5000 → 0.2500 · 答对比例 13 % → 88 % .*2000 步.*4.70.* 可尝试.*_count 2。")
        )
        names = page.locator(".field :is(input, select)").evaluate_all("found => found.map(one => one.id)")
        assert sorted(names) == sorted(f"set-{name}" for name in ALLOWED[2:])  # model and data come before
        page.reload()
        expect(page.locator("#verdict")).to_contain_text("学会了")
        expect(page.locator(".legend")).to_contain_text("killed")
        page.goto(f"{url}/#run=runs%2Fkilled")
        expect(visitor.step("训练")).to_contain_text("进程被外部终止")
        expect(visitor.button("继续")).to_be_enabled()
        others_are_longer(visitor, url)
        # the page writes its address itself before it hears of the new one
        page.evaluate("location.hash = 'run=runs%2Fremoved'; history.replaceState(null, '', '#run=runs%2Fa')")
        expect(page.locator("#problem")).to_contain_text("removed")
        with visiting(browser, url) as wide:
            assert studio_picture.run_and_others(wide.page).startswith(b"\x89PNG")
            assert wide.page.evaluate("document.documentElement.scrollWidth") == 1280


def others_are_longer(visitor, url):
    """Zoom to steps that only an overlaid run has, and choose another run meanwhile."""
    page, readout = visitor.page, visitor.page.locator(".readout")
    visitor.press("训练记录")
    page.get_by_label("叠加 long 的曲线").check()
    visitor.press("训练记录")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuemax", "20")  # the steps of this run
    visitor.press("全部")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuemax", "3000")
    box = page.locator(".charts").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 100)
    page.mouse.up()
    expect(readout).to_contain_text("损失 –")
    page.get_by_role("slider").press("End")
    expect(readout).to_have_text(re.compile("^步 3000 · 损失 – · 学习率 – · long 3"))
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuemax", "3000")
    expect(page.locator(".legend")).to_have_text("损失long")
    expect(visitor.button("全部")).to_be_enabled()
    with page.expect_request(lambda request: request.url.endswith("runs/rewards?points=400")):
        page.goto(f"{url}/#run=runs%2Frewards")
    expect(readout).to_contain_text("步 20 · 奖励 0.25 · 学习率")
    expect(page.get_by_role("slider")).to_have_attribute("aria-valuemax", "20")


def test_a_file_is_linked_whatever_its_name(browser, tmp_path):
    run = made_run(tmp_path / "runs/a", verdict=VERDICT)
    name = "adapter #1? 100%.pth"
    (run / "adapter.pth").write_bytes(b"others")
    (run / name).write_bytes(b"its bytes")
    with serving(tmp_path) as url, visiting(browser, f"{url}/#run=runs%2Fa") as visitor:
        visitor.press("Try the model")
        link = visitor.page.get_by_role("link", name=name)
        expect(link).to_be_visible()
        with visitor.page.expect_download() as download:
            link.click()
        assert download.value.suggested_filename.startswith("adapter #1")
        with open(download.value.path(), "rb") as file:
            assert file.read() == b"its bytes"


def test_a_job_is_followed_over_an_outage(browser, tmp_path):
    states = iter([None, {"state": "running"}, None, {"state": "done", "result": 7}])

    def answer(route):
        if route.request.method == "POST":
            return route.fulfill(json={"id": "mine"})
        state = next(states)
        return route.fulfill(json=state) if state else route.abort()

    with serving(tmp_path) as url, visiting(browser, url) as visitor:
        visitor.page.route(re.compile("/studio/jobs"), answer)
        assert visitor.page.evaluate("import('/page/jobs.js').then(m => m.work('fetch', {}))") == 7
        assert visitor.page.evaluate("import('/page/state.js').then(m => m.state.jobs)") == {}


def test_the_first_findings_are_shown_and_the_others_on_demand(browser, tmp_path):
    shutil.copy(BASE, tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text(rows(20))
    names = [*MEANINGS, "new finding"][-7:]
    findings = [{"name": name, "count": 1, "first": f"{data}, line {i}"} for i, name in enumerate(names, 1)]
    result = {"rows": 20, "tokens": 99, "trained": 9, "findings": findings, "samples": []}
    with serving(tmp_path) as url, visiting(browser, url) as visitor:
        page = visitor.page
        done = {"id": "a", "state": "done", "result": result}
        page.route(re.compile("/studio/jobs"), lambda route: route.fulfill(json=done))
        visitor.press("Use this model")
        page.get_by_label("rows.jsonl").check()
        expect(page.locator("#findings li")).to_have_count(4)
        last = page.locator("#more-findings li").last
        expect(last).to_be_hidden()
        page.get_by_text("Show all").click()
        expect(last).to_be_visible()
        expect(last).to_contain_text("line 7")
        expect(last).to_contain_text("new finding")  # without a meaning, its name
        assert page.locator("#more-findings li").count() == 3


def test_every_word_is_there_in_both_languages(browser, tmp_path):
    with serving(tmp_path) as url, visiting(browser, url) as visitor:
        english, chinese = visitor.page.evaluate("import('/page/words.js').then(m => m.languages)")
        expect(visitor.page.locator("#no-models")).to_contain_text(str(tmp_path))
        counted = "import('/page/words.js').then(m => m.word('counts', {rows: 1, tokens: 11, trained: 1}))"
        assert visitor.page.evaluate(counted) == "1 row, 11 tokens, 1 of them trained"
    # sentences that the program says in English itself
    messages = {f"rule {rule.name}" for rule in RULES} | {f"finding {name}" for name in MEANINGS}
    remedies = {name for name in chinese if name.startswith("remedy ")}
    source = (ROOT / "src" / "reporting" / "diagnosis.py").read_text()
    assert [name for name in remedies if name.removeprefix("remedy ") not in source] == []
    messages |= remedies
    assert set(chinese) == set(english) | messages
    for name, text in english.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", chinese[name])), name
    scripts = "".join(path.read_text(encoding="utf-8") for path in PAGE.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", scripts)


def test_a_run_that_is_not_worth_using_has_no_green_merge_and_a_lower_rate(browser, tmp_path):
    poor = {
        "name": "answers collapsed",
        "rule": "collapsed",
        "numbers": {"loss": [1.5, 0.75], "right_answers": [0.5, 0.0], "steps": 20},
        "remedy": "a third of the rate: --lr_init 0.0033",
        "offered": False,
        "reason": "every answer is 'abc'",
    }
    run = made_run(tmp_path / "runs" / "poor", planned_steps=55, verdict=poor)
    held_out = [{"step": step, "loss": loss} for step, loss in ((0, 1.5), (15, 0.75), (20, 0.9))]
    write_rows(run / "validation.jsonl", held_out)
    base = shutil.copy(BASE, tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text(rows(20))
    (run / "config.yaml").write_text(f"load_model: {base}\ndata_file: {data}\nlr_init: 0.01\n")
    (run / "adapter.pth").touch()
    with serving(tmp_path) as url, visiting(browser, f"{url}/#run=runs%2Fpoor") as visitor:
        page = visitor.page
        expect(page.locator("#verdict")).to_contain_text("The adapter is not worth using")
        expect(page.locator("#run-list .chat small")).to_have_text(
            "Done · 20/55 · held out 0.7500 · right answers 0 %"
        )
        bar = page.locator("#run-body > .progress progress")
        assert bar.evaluate("bar => bar.position") == 1  # the run has ended early
        visitor.press("Try the model")
        expect(visitor.step("Try")).to_contain_text("The adapter is not worth using")
        merge = visitor.button("Merge into one model")
        assert "main" not in (merge.get_attribute("class") or "").split()
        expect(visitor.button("Export to GGUF")).to_be_disabled()
        expect(visitor.step("Try")).to_contain_text(
            "GGUF: an RWKV-7 with heads of 32 would load in llama.cpp"
        )
        visitor.press("中文")
        expect(page.locator("#verdict")).to_contain_text("可尝试：三分之一的学习率：--lr_init 0.0033。")
        expect(page.locator("#verdict")).not_to_contain_text("third")
        visitor.press("English")
        visitor.step("Run").get_by_role("button").first.click()
        visitor.press("Train again with 0.0033")
        assert page.locator("#set-lr_init").input_value() == "0.0033"
        expect(page.get_by_label("Name", exact=True)).to_have_value("rows")


def test_pairs_choose_their_loss_and_bad_rows_are_left_out_by_a_button(browser, tmp_path):
    shutil.copy(BASE, tmp_path)
    (tmp_path / "data").mkdir()
    pairs = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(12)]
    write_rows(tmp_path / "data" / "pairs.jsonl", pairs)
    (tmp_path / "data" / "rows.jsonl").write_text(rows(20) + '{"x": 1}\n{"y": 1}\n')
    with serving(tmp_path) as url, visiting(browser, url) as visitor:
        page = visitor.page
        visitor.press("Use this model")
        page.get_by_label("pairs.jsonl").check()
        expect(visitor.step("Data")).to_contain_text("The rows are pairs, so the loss is dpo")
        expect(page.locator("#samples li").first).to_contain_text("good")
        assert "good" in page.locator("#samples mark").first.inner_text()
        assert "bad" in page.locator("#samples del").first.inner_text()
        assert page.locator("#samples mark", has_text="bad").count() == 0
        assert page.locator("#set-loss").input_value() == "dpo"
        page.get_by_label("rows.jsonl", exact=False).last.check()
        expect(visitor.button("Leave out these 2 rows")).to_be_visible()
        assert page.locator("#set-loss").input_value() == "" and page.locator("#pairs").is_hidden()
        visitor.press("Use this data")
        expect(visitor.button("Leave out rows that cannot be used")).to_be_visible()
        expect(page.locator("#plan .problem").first).not_to_contain_text("--on_bad_row")
        assert not page.locator("#others").is_visible() and not page.locator("#common").is_visible()
        visitor.press("Leave out rows that cannot be used")
        expect(page.locator("#needs")).to_contain_text("It fits")
        assert page.locator("#set-on_bad_row").input_value() == "skip"
        visitor.step("Data").get_by_role("button").first.click()
        expect(visitor.step("Data")).to_contain_text("These rows are left out")
