"""Make the picture of the chat page, docs/serving.png: the demo's base beside the adapter that it has
trained.

python -m demo.page_picture [--run out/demo] [--base FILE] [--out docs/serving.png]

It reads the files of demo/demo-training-miss.sh, starts demo.serve and a Chromium, and types questions.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

if not __package__:  # started by its path, from which src is not found
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


def picture(url: str, browser: str) -> bytes:
    """Take a PNG of the page after the questions."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1080, "height": 760}, locale="en-US")
        page.goto(url)
        shot = after_questions(page)
        chromium.close()
        return shot


def after_questions(page: Page) -> bytes:
    page.wait_for_selector("body.ready")
    page.check("#compare")
    page.click("#show-settings")
    page.fill("#temperature", "0")
    for question in QUESTIONS:
        ask(page, question)
    return page.screenshot()


def ask(page: Page, question: str) -> None:
    page.fill("#draft", question)
    page.press("#draft", "Enter")
    page.wait_for_selector(".turn:last-child .answer.running", state="detached")


def serve(base: str, adapter: str) -> tuple[subprocess.Popen, str]:
    """Start the server: (its process, its address)."""
    command = [sys.executable, "-m", "demo.serve", "--model", base, "--adapter", f"sorts={adapter}"]
    server = subprocess.Popen(
        [*command, "--name", "reverses", "--port", "0"], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    for line in server.stderr:
        if found := re.search(r"http://[^/]+/", line):
            return server, found[0]
    raise UserError(f"the server did not start: {' '.join(command)} says why")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m demo.page_picture", description=__doc__)
    parser.add_argument("--run", default=RUN, help="folder of the demo's run; default %(default)s")
    parser.add_argument("--base", default=BASE, help="the base model of the run; default %(default)s")
    parser.add_argument("--out", default=OUT, help="file of the picture; default %(default)s")
    with one_line_errors():
        args = parser.parse_args(argv)
        adapter = os.path.join(args.run, "adapter.pth")
        if not os.path.exists(adapter):
            raise UserError(f"there is no {adapter}; {DEMO} trains it")
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not browser:
            raise UserError("no Chromium is on PATH; on Debian: apt install chromium")
        server, url = serve(args.base, adapter)
        try:
            write_bytes(args.out, picture(url, browser))
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
