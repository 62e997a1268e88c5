"""Tools of a chat request, and whether one must be called."""

from __future__ import annotations

from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..common.formatting import short
from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import RwkvTemplate
from ..data.tool_styles import read_function
from .errors import wrong
from .fields import Fields


class Tools(NamedTuple):
    """Tools described to the model, and the forced beginning of its answer."""

    described: list[dict[str, Any]]
    begun: str  # the beginning of a call, after what the template's opening leaves open; "" for none
    parallel: bool  # whether an answer may call several


NO_TOOLS = Tools([], "", True)


def read_tools(fields: Fields, template: Template) -> Tools:
    """Read the fields tools, tool_choice and parallel_tool_calls. Raises Refused."""
    if fields.take("functions") or fields.take("function_call"):
        raise wrong("functions", "OpenAI has replaced them; send tools and tool_choice")
    described = fields.objects("tools") or []
    names = []
    for i, tool in enumerate(described):
        if (kind := tool.get("type", "function")) != "function":
            raise wrong(f"tools[{i}].type", f"got {short(kind)}, expected function")
        try:
            names.append(read_function(tool)["name"])
        except UserError as error:
            raise wrong(f"tools[{i}]", str(error)) from None
    parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.take("tool_choice")
    if choice == "none" or not described and choice in (None, "auto"):
        return NO_TOOLS
    if not described:
        raise wrong("tool_choice", f"got {short(choice)} without tools")
    if choice in (None, "auto"):
        return Tools(described, "", parallel)
    return Tools(described, _begun_call(template, _wanted(choice, names)), parallel)


def _wanted(choice: Any, names: list[str]) -> str:
    """Return the function that must be called; "" for any."""
    if choice == "required":
        return ""
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise wrong(
            "tool_choice",
            f"got {short(choice)}, expected none, auto, required, or"
            ' {"type": "function", "function": {"name": "..."}}',
        )
    if name not in names:
        raise wrong("tool_choice", f"there is no tool {name!r}; there are {', '.join(names)}")
    return name


def _begun_call(template: Template, name: str) -> str:
    """Write the beginning of an answer that must call a function, any if the name is "". Raises Refused."""
    if not isinstance(template, RwkvTemplate):
        raise wrong(
            "tool_choice", f"the template is Jinja ({template.name}); only auto and none are possible"
        )
    if begins_thoughts(template.opening):
        raise wrong(
            "tool_choice",
            'an answer that begins with thoughts can\'t be made to call; "reasoning_effort":'
            ' "none" leaves them out',
        )
    style = template.tools
    begun = style.before_call
    if name:
        call = style.dump({"name": name, "arguments": {}})
        begun += call.rpartition("{}")[0]
    return (">\n" if template.opening else template.form.gap) + begun.rstrip()
