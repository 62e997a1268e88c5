"""Make the pictures of the training page, in two widths.

python -m demo.studio_picture [--folder out] [--out docs/studio.png]

docs/studio.png shows the newest run in the folder, together with the curves of the other runs.
docs/studio-390.png shows rows of the newest run's data on a phone, in the dark.

This program starts demo.serve and a Chromium. bash demo/demo-training-miss.sh makes a run in out/.
"""

from __future__ import annotations

import os
import shutil

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.studio_picture")

from src.common.startup import importing

with importing():
    from playwright.sync_api import Page, sync_playwright

    from demo.page_picture import BROWSERS, DEMO, serve
    from rwkv_miss import UserError
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.files import write_bytes

FOLDER, OUT = "out", "docs/studio.png"
WIDE, PHONE = (
    {"viewport": {"width": 1280, "height": 1180}},
    {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "is_mobile": True, "has_touch": True},
)


def run_and_others(page: Page) -> bytes:
    """Show the newest run with the curves of the others, and point at the middle of the curves."""
    page.click("#run-list button >> nth=0")
    page.wait_for_selector("#curves svg")
    for box in page.locator("#run-list input:enabled").all():
        box.check()
    # each run has one line in the legend; the newest has more if it is long or was evaluated
    page.locator(".legend li").nth(page.locator("#run-list li").count() - 1).wait_for()
    page.evaluate("window.scrollTo(0, 0)")
    page.hover(".charts", position={"x": 320, "y": 120})
    return page.screenshot()


def rows_of_data(page: Page) -> bytes:
    """Show the rows that the newest run was trained on."""
    page.click("#show-runs")
    page.click("#run-list button >> nth=0")
    page.click("#data h2 button")
    page.wait_for_selector("#preview:not([hidden])", timeout=120_000)
    page.evaluate("document.querySelector('#counts').scrollIntoView()")
    page.evaluate("window.scrollBy(0, -150)")
    return page.screenshot()


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m demo.studio_picture", description=__doc__)
    parser.add_argument("--folder", default=FOLDER, help="work folder of the page; default %(default)s")
    parser.add_argument("--out", default=OUT, help="file of the wide picture; default %(default)s")
    with one_line_errors():
        args = parser.parse_args(argv)
        browser = next(filter(None, map(shutil.which, BROWSERS)), None)
        if not browser:
            raise UserError("no Chromium is on PATH; on Debian: apt install chromium")
        server, url = serve("--train", args.folder, "--models", "demo")
        try:
            stem, kind = os.path.splitext(args.out)
            with sync_playwright() as playwright:
                chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
                for ending, size, shot in (("", WIDE, run_and_others), ("-390", PHONE, rows_of_data)):
                    page = chromium.new_page(locale="en-US", **size)
                    page.goto(url)
                    page.wait_for_selector("body.ready")
                    if not page.locator("#run-list button").count():
                        raise UserError(f"there is no run in {args.folder}; {DEMO} makes one in {FOLDER}")
                    write_bytes(f"{stem}{ending}{kind}", shot(page))
                chromium.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
