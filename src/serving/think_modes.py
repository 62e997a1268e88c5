"""Modes of thinking that a request may choose: forms of RWKV's template."""

from __future__ import annotations

from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import FLOWERS, MODES, RwkvTemplate
from .errors import wrong
from .fields import Fields

# OpenAI's names -> length of thoughts; "" is none
EFFORTS = dict(none="", minimal="short", low="short", medium="normal", high="long", xhigh="long")
# rwkv_lightning's names
THINK_TYPES = {
    "fast": "fake-think-compact",
    "free": "think",
    "preferChinese": "think-chinese",
    "en": "think-normal",
    "enShort": "think-short",
    "enLong": "think-long",
}


def modes_of(template: Template) -> list[str]:
    """List the values of `think_mode`; [] with a Jinja template, which has one form."""
    return list(MODES) if isinstance(template, RwkvTemplate) else []


def efforts_of(template: Template) -> list[str]:
    """List the values of `reasoning_effort`."""
    if not isinstance(template, RwkvTemplate):
        return []
    return [effort for effort in EFFORTS if mode_of_effort(template, effort)]


def mode_of_effort(template: RwkvTemplate, effort: str) -> str:
    """Return the mode for an effort, of the template's family; "" if the family has none.

    For none it is the form of a model that was not asked to think. Flowers know thoughts of one length.
    """
    length = EFFORTS[effort]
    if template.form is FLOWERS:
        return {"": "flower-fake-think", "normal": "flower"}.get(length, "")
    if not length:
        thinks = begins_thoughts(template.opening)
        return "fake-think-compact" if thinks else template.name
    mode = f"think-{length}"
    return f"{mode}-2025" if template.name.endswith("-2025") else mode


def read_mode(fields: Fields, template: Template) -> Template:
    """Return the template in the form that a request asks for. Raises Refused for unknown or double ones."""
    by_field = {
        "reasoning_effort": fields.choice("reasoning_effort", EFFORTS),
        "think_mode": fields.text("think_mode"),
        "think_type": fields.choice("think_type", THINK_TYPES),
    }
    names = [name for name, value in by_field.items() if value is not None]
    if not names:
        return template
    name, value = names[0], by_field[names[0]]
    if len(names) > 1:
        raise wrong(names[1], f"{name} says it already; give one of the two")
    if not isinstance(template, RwkvTemplate):
        raise wrong(name, f"the template is Jinja ({template.name}), which has one form; leave it out")
    if name == "reasoning_effort":
        mode = mode_of_effort(template, value)
        if not mode:
            efforts = ", ".join(efforts_of(template))
            raise wrong(name, f"template {template.name} has no form for {value}; it has {efforts}")
    else:
        mode = THINK_TYPES[value] if name == "think_type" else value
        if mode not in MODES:
            raise wrong(name, f"got {mode[:60]!r}, expected one of {', '.join(MODES)}")
    return RwkvTemplate(mode, template.tools.name)
