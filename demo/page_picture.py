"""Make the pictures of the chat page, in three widths.

python -m demo.page_picture [--run out/demo] [--base FILE] [--out docs/serving.png]

docs/serving.png shows the demo's base next to the adapter that the demo trained. docs/serving-820.png and
docs/serving-390.png show an imported conversation, in the dark and on a phone, because the demo's model can
only sort letters.

This program reads the files of demo/demo-training-miss.sh, starts demo.serve and a Chromium, and types
questions.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.page_picture")

from src.common.startup import importing

with importing():
    from playwright.sync_api import Page, sync_playwright

    from rwkv_miss import UserError
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.files import write_bytes

DEMO = "bash demo/demo-training-miss.sh"
BASE, RUN, OUT = "demo/rwkv7-reverse.pth", "out/demo", "docs/serving.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUESTIONS = ("sort kitchen", "sort garden")
WIDE, TABLET, PHONE = (
    {"viewport": {"width": 1440, "height": 860}},
    {"viewport": {"width": 820, "height": 1080}, "color_scheme": "dark"},
    {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True},
)
QUESTION = "How does RWKV-7 update its state?"
ANSWER = r"""Each head keeps a matrix $S$. A token lets it decay, takes something out, and puts something in:

$$S_t = S_{t-1} \operatorname{diag}(w_t) + (S_{t-1} a_t)\, b_t^\top + v_t k_t^\top, \qquad y_t = S_t\, r_t$$

In **NumPy** this is short:

```python
def step(S, r, w, k, v, a, b):
    # one token: its output and the next state
    S = S * w + np.outer(S @ a, b) + np.outer(v, k)
    return S @ r, S  # shapes: (64,) and (64, 64)
```

| vector | what it does |
|:------:|---|
| $w$ | how much of each column stays |
| $a$, $b$ | what is taken out, and where |
| $k$, $v$ | what is put in, and where |
| $r$ | what is read |

1. The state has *one size*, however long the text is.
2. So a long chat costs no more per token than a short one.
"""


def pictures(url: str, browser: str) -> dict[str, bytes]:
    """Take the PNGs: ending of the file's name -> its bytes."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        found = {}
        for ending, size, shot in (
            ("", WIDE, after_questions),
            ("-820", TABLET, after_import),
            ("-390", PHONE, after_import),
        ):
            page = chromium.new_page(locale="en-US", **size)
            page.goto(url)
            found[ending] = shot(page)
        chromium.close()
        return found


def after_questions(page: Page) -> bytes:
    page.wait_for_selector("body.ready")
    page.check("#compare")
    page.click("#show-chats")
    page.check("#keep")
    page.click("#show-settings")
    page.fill("#temperature", "0")
    for question in QUESTIONS:
        ask(page, question)
    return page.screenshot()


def after_import(page: Page) -> bytes:
    page.wait_for_selector("body.ready")
    answer = {"label": "an example", "content": ANSWER}
    conversation = {"id": "", "system": "", "tools": "", "turns": [{"text": QUESTION, "answers": [answer]}]}
    file = json.dumps({"format": "rwkv-miss-conversations", "conversations": [conversation]}).encode()
    page.set_input_files("#import-file", {"name": "example.json", "mimeType": "text/json", "buffer": file})
    page.wait_for_selector(".answer table math")
    page.evaluate("window.scrollTo(0, 0)")
    return page.screenshot()


def ask(page: Page, question: str) -> None:
    page.fill("#draft", question)
    page.press("#draft", "Enter")
    page.wait_for_selector(".turn:last-child .answer.running", state="detached")


def serve(*flags: str) -> tuple[subprocess.Popen, str]:
    """Start the server: (its process, its address)."""
    command = [sys.executable, "-m", "demo.serve", *flags, "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, bufsize=1)
    for line in server.stderr:
        if found := re.search(r"http://[^/\s]+", line):
            return server, found[0]
    raise UserError(f"the server did not start: {' '.join(command)} says why")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m demo.page_picture", description=__doc__)
    parser.add_argument("--run", default=RUN, help="folder of the demo's run; default %(default)s")
    parser.add_argument("--base", default=BASE, help="the base model of the run; default %(default)s")
    parser.add_argument("--out", default=OUT, help="file of the widest picture; default %(default)s")
    with one_line_errors():
        args = parser.parse_args(argv)
        adapter = os.path.join(args.run, "adapter.pth")
        if not os.path.exists(adapter):
            raise UserError(f"there is no {adapter}; {DEMO} trains it")
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not browser:
            raise UserError("no Chromium is on PATH; on Debian: apt install chromium")
        flags = ["--model", args.base, "--adapter", f"sorts={adapter}", "--name", "reverses"]
        server, url = serve(*flags)
        try:
            stem, kind = os.path.splitext(args.out)
            for ending, picture in pictures(url, browser).items():
                write_bytes(f"{stem}{ending}{kind}", picture)
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
