"""Tools of a chat request, and whether one must be called."""

from __future__ import annotations

from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..common.formatting import shown
from ..data.tool_styles import read_function, read_parameters
from .errors import wrong
from .fields import Fields


class Tools(NamedTuple):
    """Tools described to the model."""

    described: list[dict[str, Any]]
    forced: list[dict[str, Any]]  # the functions of which one has to be called; [] leaves the choice
    parallel: bool  # whether an answer may call several

    @property
    def functions(self) -> list[dict[str, Any]]:
        return [read_function(tool) for tool in self.described]


NO_TOOLS = Tools([], [], True)


def read_tools(fields: Fields) -> Tools:
    """Read the fields tools, tool_choice and parallel_tool_calls. Raises Refused."""
    if fields.take("functions") or fields.take("function_call"):
        raise wrong("functions", "OpenAI has replaced them; send tools and tool_choice")
    described = fields.objects("tools") or []
    functions = []
    for i, tool in enumerate(described):
        if (kind := tool.get("type", "function")) != "function":
            inner = tool.get(kind) if isinstance(kind, str) else None  # a chat has the name of a tool there
            name = inner.get("name") if isinstance(inner, dict) else tool.get("name")
            called = "" if name is None else f" for the tool {shown(name)}"
            raise wrong(f"tools[{i}].type", f"got {shown(kind)}{called}, expected function; leave it out")
        try:
            function = read_function(tool)
            read_parameters(function)
        except UserError as error:
            raise wrong(f"tools[{i}]", str(error)) from None
        except RecursionError:
            raise wrong(f"tools[{i}]", "its schema is nested too deeply; nest it less") from None
        if any(map(str.isspace, function["name"])):
            raise wrong(f"tools[{i}]", f"the name {shown(function['name'])} has a blank; write _ for it")
        functions.append(function)
    parallel = fields.flag("parallel_tool_calls", True)
    choice = fields.take("tool_choice")
    if choice == "none" or not described and choice in (None, "auto"):
        return NO_TOOLS
    if not described:
        raise wrong("tool_choice", f"got {shown(choice)} without tools; send some, or leave it out")
    if choice in (None, "auto"):
        return Tools(described, [], parallel)
    if choice == "required":
        return Tools(described, functions, parallel)
    return Tools(described, [_wanted(choice, functions)], False)


def _wanted(choice: Any, functions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the function that must be called."""
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type", "function") != "function":
        raise wrong(
            "tool_choice",
            f"got {shown(choice)}, expected none, auto, required, or"
            ' {"type": "function", "function": {"name": "..."}}',
        )
    named = [function for function in functions if function["name"] == name]
    if not named:
        names = ", ".join(function["name"] for function in functions)
        raise wrong("tool_choice", f"there is no tool {name!r}; there are {names}")
    return named[0]
