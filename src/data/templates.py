"""Chat templates: a conversation becomes segments of text, each tokenised on its own, trained or not.

Training, chat and evaluation use one template: RWKV's own or the user's Jinja file. So a model is prompted
with exactly the tokens it was trained on. The text before an answer, the answer, and the end of its turn are
separate segments. A chat tokenises them one by one too, because the first is read before the second exists.
Adapters and merged files record their template.
"""

from __future__ import annotations

import os
import re

from rwkv_miss.errors import UserError
from rwkv_miss.files.hf_folder import is_folder
from rwkv_miss.files.hf_names import CHAT_TEMPLATE, TOKENIZER_CONFIG
from rwkv_miss.files.model_files import model_metadata
from rwkv_miss.files.untrusted import read_json
from rwkv_miss.progress import print_notes

from ..common.files import read_text
from ..common.first_process import is_first_process
from ..config.data_settings import HERMES, TOOL_STYLES
from .chat_template import Template, before_stops
from .rwkv_template import MODES, RwkvTemplate
from .tokenizer import WORLD_IDS, Tokenizer
from .tool_styles import STYLES

AUTO = "auto"
# Stanford Alpaca's form, in which RWKV-PEFT wrote the rows of --data_type sft
ALPACA = (
    "{% for message in messages %}{{ '' if loop.first else '\\n\\n' }}"
    "{% if message.role == 'system' %}{{ message.content }}"
    "{% elif message.role == 'user' %}{% if loop.first %}Below is an instruction that describes a task. Write"
    " a response that appropriately completes the request.{{ '\\n\\n' }}{% endif %}"
    "### Instruction:{{ '\\n' + message.content }}"
    "{% elif message.role == 'assistant' %}### Response:{{ message.content }}"
    "{% else %}{{ raise_exception('alpaca has no form for a turn of ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n\\n' }}### Response:{% endif %}"
)
JINJA = {"alpaca": ALPACA}  # forms without a mode of RwkvTemplate
NAMES = (AUTO, *MODES, *JINJA)


def from_record(record: str, eos: str = "") -> Template:
    """Load the template that a checkpoint's metadata name.

    `eos` is the text of the tokenizer's end of document. Raises UserError for a name that this version lacks.
    """
    if is_jinja(record):
        return _jinja("the recorded template", record, eos)
    name, _, tool_style = str(record).partition(":")
    if name not in MODES or tool_style not in STYLES:
        raise UserError(
            f"the template that the file records is {str(record)[:60]!r}, expected NAME:TOOL_STYLE with a"
            f" name of {', '.join(MODES)} and a style of {', '.join(STYLES)}, or Jinja source; a newer"
            " release may know it. --template and --tool_style choose another one"
        )
    return RwkvTemplate(name, tool_style)


def load_template(spec: str, eos: str = "", tool_style: str = HERMES) -> Template:
    """Load the template `spec`: one of NAMES, a Jinja file's path, or such a file's content; `auto` is rwkv.

    Raises UserError for a file that is missing, wrong, or fails on a trial conversation.
    """
    if spec in (AUTO, *MODES):
        return RwkvTemplate("rwkv" if spec == AUTO else spec, tool_style)
    if spec in JINJA:
        return _jinja(spec, JINJA[spec], eos)
    if is_jinja(spec):
        return _jinja("the given template", spec, eos)
    if os.path.basename(spec) == TOKENIZER_CONFIG:
        if not (content := _chat_template(spec)):
            raise UserError(f"{spec} has no chat_template; give another --template")
        return _jinja(spec, content, eos)
    expected = f"--template takes {', '.join(NAMES)}, or a Jinja file"
    content = read_text(spec, "a template", expected, NAMES)
    return _jinja(spec, content, eos)


def choose_template(
    spec: str, tool_style: str, recorded: str | None, tokenizer: Tokenizer | None
) -> Template:
    """Choose the template by --template and --tool_style; auto stands for the record.

    Without a record, auto is rwkv. It writes tools as JSON with the World vocabulary, which the G1 models
    have, and else as hermes. Raises UserError for a tool style with a Jinja template.
    """
    eos = tokenizer.decode(tokenizer.eod) if tokenizer else ""
    base = None
    if recorded and (spec == AUTO or tool_style == AUTO and not is_jinja(recorded)):
        base = from_record(recorded, eos)
    if tool_style != AUTO:
        style = tool_style
    elif isinstance(base, RwkvTemplate):
        style = base.tools.name
    else:
        style = "json" if tokenizer and tokenizer.vocab_size == WORLD_IDS else HERMES
    if spec != AUTO:
        chosen = load_template(spec, eos, style)
    elif isinstance(base, RwkvTemplate):
        chosen = RwkvTemplate(base.name, style)
    else:
        chosen = base or RwkvTemplate("rwkv", style)
    if tool_style != AUTO and not isinstance(chosen, RwkvTemplate):
        raise UserError(
            f"--tool_style {tool_style} is about RWKV's template, and this one is Jinja ({chosen.name}),"
            " which writes tools in its own way; drop the flag, or choose a --template of its names"
        )
    return chosen


def recorded_template(spec: str, tokenizer: Tokenizer | None, *paths, tool_style: str = AUTO) -> Template:
    """Choose the template as choose_template() does, with the record of the first checkpoint that has one.

    Without a record, auto does not take the template of a Hugging Face folder, and says how to.
    """
    paths = [path for path in paths if path]
    recorded = next(filter(None, ((model_metadata(path) or {}).get("template") for path in paths)), None)
    if spec == AUTO and not recorded and is_first_process():
        print_notes([note for path in paths if (note := _note_of_folder(path))])
    return choose_template(spec, tool_style, recorded, tokenizer)


def _note_of_folder(path) -> str:
    """Tell the user about the chat template in another program's folder; "" without one."""
    if not is_folder(path) or model_metadata(path) is not None:
        return ""
    for file in (os.path.join(path, CHAT_TEMPLATE), os.path.join(path, TOKENIZER_CONFIG)):
        if os.path.exists(file) and (not file.endswith(TOKENIZER_CONFIG) or _chat_template(file)):
            return (
                f"{path} has a chat template of its own; --template auto is rwkv all the same, and --template"
                f" {file} takes it"
            )
    return ""


def _chat_template(file: str) -> str:
    """Read the template in a tokenizer_config.json, "" for none."""
    template = read_json(file).get("chat_template")
    if isinstance(template, list):  # several by name, as {"name": ..., "template": ...}
        default = (one for one in template if isinstance(one, dict) and one.get("name") == "default")
        template = next(default, {}).get("template")
    return template if isinstance(template, str) else ""


# the flags of the programs, for flag()
TEMPLATE_FLAG = {
    "default": AUTO,
    "help": f"auto (as recorded in the file, else rwkv), {', '.join(NAMES[1:])}, or a Jinja file; default"
    " %(default)s",
}
TOOL_STYLE_FLAG = {
    "default": AUTO,
    "choices": (AUTO, *TOOL_STYLES),
    "help": "how tools and their calls are written. auto: as recorded in the file, else json with the World"
    " vocabulary and hermes with others; default %(default)s",
}


def is_jinja(record) -> bool:
    """Tell a Jinja template's source from a name."""
    return isinstance(record, str) and "{" in record


def _jinja(name: str, source: str, eos: str) -> Template:
    from .jinja_template import JinjaTemplate  # jinja2 is needed for such templates only

    return JinjaTemplate(name, source, eos)


def whole_text(text: str, template: Template, opening: str) -> str:
    """Return a generated answer up to the end of its turn, with its thoughts.

    `opening` is the beginning of the answer, which was not generated.
    """
    return opening + before_stops(text, template.stops)


def answer_text(text: str, template: Template, opening: str) -> str:
    """Return a generated answer up to the end of its turn, without the thoughts that it begins with."""
    whole = whole_text(text, template, opening)
    return re.sub(r"^\s*<think>.*?</think>", "", whole, flags=re.DOTALL).strip()
