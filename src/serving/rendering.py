"""Markdown of answers as HTML that is safe to show: `html_of`, and the colours of its code.

As a program it reads texts from stdin and writes their HTML, for src/serving/renderer.py.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from html import escape, unescape
from unicodedata import east_asian_width
from xml.etree.ElementTree import tostring

import nh3
from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline, emphasis
from markdown_it.token import Token
from mdit_py_plugins.gfm_autolink import gfm_autolink_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

CPU_SECONDS = 2  # for one text
MEMORY = 1 << 30  # bytes of address space
STYLES = ("xcode", "github-dark")  # Pygments' styles for a light and a dark page
TEXT_TAGS = set("a blockquote br code del em h3 h4 h5 h6 hr li ol p pre s span strong ul".split())
TABLE_TAGS = set("table tbody td th thead tr".split())
MATH_TAGS = set(
    "math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace msqrt"
    " mstyle msub msubsup msup mtable mtd mtext mtr munder munderover none".split()
)
MATH_ATTRIBUTES = set(
    "accent accentunder columnalign columnlines depth display displaystyle fence form height linebreak"
    " linethickness lspace mathbackground mathcolor mathsize mathvariant maxsize minsize movablelimits"
    " notation rowlines rspace scriptlevel separator stretchy symmetric voffset width".split()
)
ATTRIBUTES = {
    "a": {"href"},
    "code": {"class"},
    "ol": {"start"},
    "span": {"class"},
    "td": {"align"},
    "th": {"align"},
    **dict.fromkeys(MATH_TAGS, MATH_ATTRIBUTES),
}
BREAK = re.compile(r"<br ?/?>")
DISPLAY = {"$$": "$$", "\\[": "\\]"}
LONGEST_FORMULA = 60  # lines
# \(...\), \[...\], $$...$$, and $...$ unless it is about money
INLINE_FORMULA = re.compile(
    r"\\\((.{1,2000}?)\\\)|\\\[(.{1,2000}?)\\\]|\$\$(.{1,2000}?)\$\$"
    r"|(?<![\w$])\$(?!\s)([^$\n]{1,2000}?)(?<![\s\\])\$(?![\w$])",
    re.S,
)
# environments that latex2mathml does not have, and that look like align*
ENVIRONMENTS = re.compile(r"(\\(?:begin|end)){(?:aligned|gather\*?|gathered)}")


def html_of(markdown: str, unfinished: bool = False) -> str:
    """Render Markdown with tables, formulas and highlighted code: of unfinished text the part that stays."""
    return nh3.clean(
        PARSER.render(settled(markdown) if unfinished else markdown),
        tags=TEXT_TAGS | TABLE_TAGS | MATH_TAGS,
        attributes=ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def settled(markdown: str) -> str:
    """Leave out what would look different a moment later: half a row of a table, half a formula."""
    for opening, closing in DISPLAY.items():
        before, opened, after = markdown.rpartition(opening)
        closes = opening == closing and before.count(opening) % 2
        if opened and not closes and closing not in after and "\n\n" not in after:
            return before
    *lines, last = markdown.split("\n")
    if last and not _is_row(last):
        return markdown
    if lines and _is_row(lines[-1]) and not _is_row("".join(lines[-2:-1])):
        lines.pop()  # a heading without the line below it
    return "\n".join(lines)


def _is_row(line: str) -> bool:
    return line.lstrip().startswith("|")


def highlight_css() -> str:
    """Write the rules for code in Pygments' own colours."""
    light, dark = map(get_style_by_name, STYLES)
    rules = []
    for kind, name in STANDARD_TYPES.items():
        day, night = light.style_for_token(kind), dark.style_for_token(kind)
        if not name or not (day["color"] or night["color"]):
            continue
        colors = (f"#{style['color']}" if style["color"] else "currentColor" for style in (day, night))
        italic = "; font-style: italic" if day["italic"] else ""
        rules.append(f".code .{name} {{ color: light-dark({', '.join(colors)}){italic} }}\n")
    return "".join(rules)


def _code(text: str, language: str, attributes: str) -> str:
    try:
        lexer = get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(text.removesuffix("\n"))
    return highlight(text.removesuffix("\n"), lexer, HtmlFormatter(nowrap=True)).removesuffix("\n")


def _read_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Read a formula that begins a line and ends one."""
    begin = state.bMarks[start] + state.tShift[start]
    opening = state.src[begin : begin + 2]
    if opening not in DISPLAY:
        return False
    lines = state.getLines(start, min(end, start + LONGEST_FORMULA), state.blkIndent, False)
    inside, closed, after = lines.lstrip()[2:].partition(DISPLAY[opening])
    if not closed or after.partition("\n")[0].strip(" .,"):
        return False
    if not silent:
        _push_formula(state, inside, opening, "block")
        state.line = start + inside.count("\n") + 1
    return True


def _read_inline(state: StateInline, silent: bool) -> bool:
    match = INLINE_FORMULA.match(state.src, state.pos)
    if not match:
        return False
    if not silent:
        opening = match[0][: 1 if match[4] else 2]
        _push_formula(state, match[match.lastindex], opening, "block" if opening in DISPLAY else "inline")
    state.pos = match.end()
    return True


def _push_formula(state: StateBlock | StateInline, formula: str, opening: str, display: str) -> None:
    token = state.push("formula", "math", 0)
    token.content, token.markup, token.info = formula, opening, display


def _read_emphasis(state: StateInline, silent: bool) -> bool:
    """Read * and _ as CommonMark does, and * also between CJK characters and marks: **注意：**这是."""
    start, count = state.pos, len(state.delimiters)
    if not emphasis.tokenize(state, silent):
        return False
    before, after = state.src[max(start - 1, 0) : start], state.src[state.pos : state.pos + 1]
    for delimiter in state.delimiters[count:] if state.src[start] == "*" else ():
        delimiter.open |= _is_wide(before) and bool(after.strip())
        delimiter.close |= _is_wide(after) and bool(before.strip())
    return True


def _is_wide(text: str) -> bool:
    return text != "" and east_asian_width(text) in "WF"


def _read_break(state: StateInline, silent: bool) -> bool:
    """Read <br>, which models write into the cells of tables."""
    match = BREAK.match(state.src, state.pos)
    if not match:
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos = match.end()
    return True


def _formula(renderer, tokens: list[Token], place: int, options, env) -> str:
    """Render a formula as MathML; as its source if latex2mathml can't read it."""
    token = tokens[place]
    try:
        tree = convert_to_element(ENVIRONMENTS.sub(r"\1{align*}", token.content), display=token.info)
    except Exception:  # the converter raises many kinds of errors for wrong LaTeX
        return f"<code>{escape(token.content.strip())}</code>"
    for element in tree.iter():
        # the text holds entities, and the formula's own < as they are
        element.text = unescape(element.text or "")
    return tostring(tree, encoding="unicode")


def _image(renderer, tokens: list[Token], place: int, options, env) -> str:
    """Show an image as a link: the page loads nothing from other sites."""
    token = tokens[place]
    return f'<a href="{escape(str(token.attrs["src"]))}">{escape(token.content or "image")}</a>'


def _cell(renderer, tokens: list[Token], place: int, options, env) -> str:
    """Align a cell without a style, which the page's policy forbids."""
    token = tokens[place]
    align = str(token.attrs.pop("style", "")).removeprefix("text-align:")
    if align:
        token.attrs["align"] = align
    return renderer.renderToken(tokens, place, options, env)


def _heading(renderer, tokens: list[Token], place: int, options, env) -> str:
    """Set a heading below the page's own, which name who speaks."""
    tokens[place].tag = f"h{min(int(tokens[place].tag[1]) + 2, 6)}"
    return renderer.renderToken(tokens, place, options, env)


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True, "highlight": _code})
    parser.enable(["table", "strikethrough"])
    parser.use(gfm_autolink_plugin)
    ends = {"alt": ["paragraph", "reference", "blockquote", "list"]}  # blocks that a formula ends
    parser.block.ruler.before("fence", "formula", _read_block, ends)
    parser.inline.ruler.before("escape", "formula", _read_inline)
    parser.inline.ruler.before("escape", "break", _read_break)
    parser.inline.ruler.at("emphasis", _read_emphasis)
    parser.add_render_rule("formula", _formula)
    for name in ("th_open", "td_open"):
        parser.add_render_rule(name, _cell)
    for name in ("heading_open", "heading_close"):
        parser.add_render_rule(name, _heading)
    parser.add_render_rule("image", _image)
    return parser


PARSER = _parser()


def main() -> None:
    """Answer each line of stdin, a JSON list of html_of's arguments, with a line: its HTML or null."""
    os.nice(5)  # the engine goes first
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the signal ends the process, also within C
        try:
            html = html_of(*json.loads(line))
        except (RecursionError, MemoryError, UnicodeError):
            html = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(html), flush=True)


if __name__ == "__main__":
    main()
