"""Answers as HTML: Markdown, formulas and code, nothing that acts, and an end to every text."""

import concurrent.futures
import json
import re
import sys
import time

import pytest

pytest.importorskip("starlette", reason="NO starlette (the extra test has it): no rendering")
pytest.importorskip("httpx", reason="NO httpx (the extra test has it): no rendering")
pytest.importorskip("markdown_it", reason="NO markdown_it (the extra test has it): no rendering")
pytest.importorskip("mdit_py_plugins", reason="NO mdit_py_plugins (the extra test has it): no rendering")
pytest.importorskip("nh3", reason="NO nh3 (the extra test has it): no rendering")
pytest.importorskip("pygments", reason="NO pygments (the extra test has it): no rendering")
pytest.importorskip("latex2mathml", reason="NO latex2mathml (the extra test has it): no rendering")

import httpx

from src.serving import renderer
from src.serving.app import PAGE
from src.serving.guard import Guard
from src.serving.rendering import highlight_css, html_of, settled

from .serving import scripted

LINK = 'target="_blank" rel="noopener noreferrer"'


@pytest.mark.parametrize(
    "markdown, html",
    [
        ("# One\n\nTwo\n---", "<h3>One</h3><h4>Two</h4>"),  # below the headings that name who speaks
        ("a\n**b** ~~c~~ `<d>`", "<p>a<br><strong>b</strong> <s>c</s> <code>&lt;d&gt;</code></p>"),
        ("**注意：**这是**“好”**的", "<p><strong>注意：</strong>这是<strong>“好”</strong>的</p>"),
        ("a<br>b `<br>` ** c**", "<p>a<br>b <code>&lt;br&gt;</code> ** c**</p>"),
        ("3. a\n   - b", '<ol start="3"><li>a<ul><li>b</li></ul></li></ol>'),
        ("[a](https://e.org)", f'<p><a href="https://e.org" {LINK}>a</a></p>'),
        ("see https://e.org/b.", f'<p>see <a href="https://e.org/b" {LINK}>https://e.org/b</a>.</p>'),
        ("![a](https://e.org/b.png)", f'<p><a href="https://e.org/b.png" {LINK}>a</a></p>'),
        (
            "|a|b|\n|-|-:|\n|1|2|",
            '<table><thead><tr><th>a</th><th align="right">b</th></tr></thead>'
            '<tbody><tr><td>1</td><td align="right">2</td></tr></tbody></table>',
        ),
        (
            "```python\nif 1:",
            '<pre><code class="language-python"><span class="k">if</span> <span class="mi">1</span>'
            '<span class="p">:</span></code></pre>',
        ),
        ("```nothing\n<b>", '<pre><code class="language-nothing">&lt;b&gt;</code></pre>'),
    ],
)
def test_markdown(markdown, html):
    assert re.sub(r"\n", "", html_of(markdown)) == html


@pytest.mark.parametrize(
    "text, display",
    [
        ("as in $x<1$.", "inline"),
        (r"as in \(x<1\).", "inline"),
        ("as in $$x<1$$", "block"),
        ("as in\n\\[\nx\n<1\n\\]", "block"),
        ("> - $$\n>   x\n>   <1\n>   $$", "block"),
    ],
)
def test_formulas(text, display):
    inside = "<mrow><mi>x</mi><mo>&lt;</mo><mn>1</mn></mrow>"
    assert f'<math display="{display}">{inside}</math>' in html_of(text)


def test_what_is_no_formula_stays_as_it_is():
    for text in ("$5 and $6, or $5-$6", "$x$y", "`$x$`", r"\(x", "$$ x"):
        assert "<math" not in html_of(text)
    assert html_of("$\\frac{$") == "<p><code>\\frac{</code></p>\n"
    assert "<mtable" in html_of("\\[\n\\begin{aligned}\na &= b \\\\\n&+ c\n\\end{aligned}\n\\]")


ACTS = (
    "<script>hacked()</script>",
    "<img src=x onerror=hacked()>",
    "<svg onload=hacked()><a xlink:href='javascript:hacked()'>x</a></svg>",
    "<math><mtext><style><img src=x onerror=hacked()></style></mtext></math>",
    "<iframe srcdoc='<script>hacked()</script>'></iframe>",
    "[x](javascript:hacked()) [y](JaVaScRiPt&colon;hacked()) [v](vbscript:hacked())",
    "[z](data:text/html,hacked())",
    "<javascript:hacked()>",
    '[x](https://e.org"onmouseover="hacked())',
    '![x" onerror="hacked()](x)',
    r"$\href{javascript:hacked()}{x} \style{background:url(//e.org)}{x}$",
    r"$$\text{<img src=x onerror=hacked()>}\text{</math><script>hacked()</script>}$$",
    r"$\unicode{<script>hacked()</script>} \class{x\" onclick=\"hacked()}{x}$",
    '```x" onclick="hacked()\n<script>hacked()</script>\n```',
    "```html\n<script>hacked()</script>\n```",
    "|<img src=x onerror=hacked()>|\n|-|\n|<script>hacked()</script>|",
)


@pytest.mark.parametrize("text", ACTS)
def test_nothing_in_an_answer_acts(text):
    tags = re.findall(r"<[^>]*>", html_of(text))
    assert not [tag for tag in tags if re.search(r"script|img|svg|style|iframe|\bon\w+=|:hacked|data:", tag)]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\n| b | c", "a"),
        ("a\n\n| b | c |\n|--", "a\n"),
        ("| b | c |\n|---|---|\n| 1 ", "| b | c |\n|---|---|"),
        ("| b | c |\n|---|---|\n| 1 | 2 |\n", "| b | c |\n|---|---|\n| 1 | 2 |"),
        ("as in $$x", "as in "),
        ("as in $$x$$ and", "as in $$x$$ and"),
        ("as in \\[x", "as in "),
        ("costs 5 $$\n\nand more", "costs 5 $$\n\nand more"),
    ],
)
def test_half_a_table_and_half_a_formula_wait(text, shown):
    assert settled(text) == shown


def luminance(color):
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(map(lambda weight, part: weight * part, (0.2126, 0.7152, 0.0722), linear))


def test_the_colours_of_code_can_be_read_in_both_schemes():
    grounds = re.search(r"--sunken: light-dark\((#\w{6}), (#\w{6})\)", (PAGE / "style.css").read_text())
    rules = re.findall(r"\.code \.(\w+) { color: light-dark\((\S+), (\S+)\)", highlight_css())
    assert len(rules) > 50
    for name, *colors in rules:
        if name.startswith("g") or name == "w":  # colours of diffs and terminals; blanks
            continue
        for color, ground in zip(colors, grounds.groups()):
            if color != "currentColor":
                bright = sorted((luminance(color), luminance(ground)))
                assert (bright[1] + 0.05) / (bright[0] + 0.05) >= 4.5, (name, color, ground)


def test_the_server_renders_and_ends_what_takes_too_long(monkeypatch):
    body = "from src.serving import rendering; rendering.CPU_SECONDS = 0.3; rendering.main()"
    monkeypatch.setattr(renderer, "COMMAND", (sys.executable, "-c", body))
    with scripted(guard=Guard(("secret",))) as server:
        client = httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"})

        def render(**body):
            return client.post("/page/render", content=json.dumps(body))

        assert render(text="*a*").json() == {"html": "<p><em>a</em></p>\n"}
        assert render(text="a $$x", unfinished=True).json() == {"html": "<p>a</p>\n"}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            slow = pool.submit(render, text="![" * 60000)
            time.sleep(0.1)
            assert client.get("/health").status_code == 200 and not slow.done()
        assert slow.result().status_code == 503
        assert render(text="> " * 60000).status_code == 200  # a new process
        assert render(text="a" * (renderer.MOST_BYTES + 1)).status_code == 413
        assert render(text=1).status_code == 400
        broken = render(text="\ud800").json()["error"]
        assert (broken["param"], broken["code"]) == ("text", "invalid_value")
        assert httpx.post(f"{server.url}/page/render", json={"text": ""}).status_code == 401
        rules = client.get("/page/highlight.css")
        assert rules.text == highlight_css() and rules.headers["content-type"].startswith("text/css")


def test_without_the_packages_answers_are_plain(monkeypatch):
    monkeypatch.setattr(renderer, "PACKAGES", {"json": "json", "absent_package": "absent"})
    assert renderer.plain_note().endswith("pip install absent")
    with scripted() as server:
        assert httpx.get(f"{server.url}/v1/server").json()["renders"] is False
        reply = httpx.post(f"{server.url}/page/render", json={"text": "a"})
        assert reply.status_code == 501 and "absent" in reply.json()["error"]["message"]
        assert httpx.get(f"{server.url}/page/highlight.css").text == ""
