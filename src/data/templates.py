"""Chat templates: a conversation becomes segments of text, each tokenised on its own, trained or not.

Training, chat and evaluation use one template: RWKV's own or the user's Jinja file. So a model is asked in
the very tokens it was trained on. What stands before an answer, the answer, and the end of its turn are
segments of their own. A chat tokenises them one by one too, because the first is read before the second
exists. Adapters and merged files record their template.
"""

from __future__ import annotations

import re

from rwkv_miss.errors import UserError
from rwkv_miss.files.model_files import model_metadata
from rwkv_miss.files.template_record import HERMES, TOOL_STYLES, current, is_jinja

from ..common.files import read_text
from .chat_template import Template, before_stops
from .rwkv_template import MODES, RwkvTemplate
from .tokenizer import WORLD_IDS, Tokenizer
from .tool_styles import STYLES

AUTO = "auto"


def from_record(record: str, eos: str = "") -> Template:
    """The template that a checkpoint's metadata name.

    `eos` is the text of the tokenizer's end of document. UserError for a name that this version lacks.
    """
    if _is_jinja(record):
        return _jinja("the recorded template", record, eos)
    name, _, tool_style = current(str(record)).partition(":")
    if name not in MODES or tool_style not in STYLES:
        raise UserError(
            f"the template that the file records is {str(record)[:60]!r}, expected NAME:TOOL_STYLE with a"
            f" name of {', '.join(MODES)} and a style of {', '.join(STYLES)}, or Jinja source; a newer"
            " release may know it. --template and --tool_style choose another one"
        )
    return RwkvTemplate(name, tool_style)


def load_template(spec: str, eos: str = "", tool_style: str = HERMES) -> Template:
    """The template `spec`: one of MODES, the path of a Jinja file, or such a file's content; `auto` is rwkv.

    Raises UserError for a file that is missing, wrong, or fails on a trial conversation.
    """
    if spec in (AUTO, *MODES):
        return RwkvTemplate("rwkv" if spec == AUTO else spec, tool_style)
    if is_jinja(spec):
        return _jinja("the given template", spec, eos)
    content = read_text(spec, "a template", f"--template takes auto, {', '.join(MODES)}, or a Jinja file")
    return _jinja(spec, content, eos)


def choose_template(
    spec: str, tool_style: str, recorded: str | None, tokenizer: Tokenizer | None
) -> Template:
    """The template of --template and --tool_style, each of which is what was recorded where it is auto.

    Where nothing was recorded, auto is rwkv. Its tools are written as JSON with the World vocabulary, of
    which the G1 models are, and else as hermes. UserError for a tool style with a Jinja template, which
    writes tools by itself.
    """
    eos = tokenizer.decode(tokenizer.eod) if tokenizer else ""
    base = from_record(recorded, eos) if recorded and (spec == AUTO or not _is_jinja(recorded)) else None
    if tool_style != AUTO:
        style = tool_style
    elif isinstance(base, RwkvTemplate):
        style = base.tools.name
    else:
        style = automatic_style(tokenizer)
    if spec != AUTO:
        chosen = load_template(spec, eos, style)
    elif isinstance(base, RwkvTemplate):
        chosen = RwkvTemplate(base.name, style)
    else:
        chosen = base or RwkvTemplate("rwkv", style)
    # hermes is what a config.yaml from before there were tool styles has, also with a Jinja template
    if tool_style not in (AUTO, HERMES) and not isinstance(chosen, RwkvTemplate):
        raise UserError(
            f"--tool_style {tool_style} is about RWKV's template, and this one is Jinja ({chosen.name}),"
            " which writes tools in its own way; drop the flag, or choose a --template of its names"
        )
    return chosen


def automatic_style(tokenizer: Tokenizer | None) -> str:
    """How tools are written where nobody says it."""
    return "json" if tokenizer and tokenizer.vocab_size == WORLD_IDS else HERMES


def recorded_template(spec: str, tokenizer: Tokenizer, *paths, tool_style: str = AUTO) -> Template:
    """choose_template(), where the first checkpoint with a record tells what was recorded."""
    records = (((model_metadata(path) or {}).get("template")) for path in filter(None, paths))
    return choose_template(spec, tool_style, next(filter(None, records), None), tokenizer)


def add_template_flags(add) -> None:
    """--template and --tool_style for a program of its own flags; `add` is its parser's add_argument."""
    add(
        "--template",
        default=AUTO,
        help=f"auto (as recorded in the file, else rwkv), {', '.join(MODES)}, or a Jinja file; default"
        " %(default)s",
    )
    add(
        "--tool_style",
        default=AUTO,
        choices=(AUTO, *TOOL_STYLES),
        help="how tools and their calls are written. auto: as recorded in the file, else json with the World"
        " vocabulary and hermes with others; default %(default)s",
    )


def _is_jinja(record) -> bool:
    return isinstance(record, str) and is_jinja(record)


def _jinja(name: str, source: str, eos: str) -> Template:
    from .jinja_template import JinjaTemplate  # jinja2 is needed for such templates only

    return JinjaTemplate(name, source, eos)


def answer_text(text: str, template: Template, opening: str) -> str:
    """What a generated answer says: the text up to the end of its turn, without the thoughts before it.

    `opening` is what the answer begins with, though it was not generated.
    """
    text = opening + before_stops(text, template.stops)
    return re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
