"""Modes of thinking that a request may choose: forms of RWKV's template."""

from __future__ import annotations

from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import FLOWERS, MODES, RwkvTemplate
from .errors import wrong
from .fields import Fields

# OpenAI's names -> length of thoughts; "" is none
EFFORTS = {
    "none": "",
    "minimal": "short",
    "low": "short",
    "medium": "normal",
    "high": "long",
    "xhigh": "long",
}
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

    The form for none is that of a model that was not asked to think. Flowers know thoughts of one length.
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
    effort = fields.choice("reasoning_effort", EFFORTS)
    mode = fields.text("think_mode")
    kind = fields.choice("think_type", THINK_TYPES)
    given = [
        name
        for name, value in (("reasoning_effort", effort), ("think_mode", mode), ("think_type", kind))
        if value is not None
    ]
    if not given:
        return template
    if len(given) > 1:
        raise wrong(given[1], f"{given[0]} says it already; give one of the two")
    if not isinstance(template, RwkvTemplate):
        raise wrong(given[0], f"the template is Jinja ({template.name}), which has one form; leave it out")
    if mode is not None:
        chosen = mode
        if mode not in MODES:
            raise wrong("think_mode", f"got {mode[:60]!r}, expected one of {', '.join(MODES)}")
    elif kind is not None:
        chosen = THINK_TYPES[kind]
    else:
        chosen = mode_of_effort(template, effort)
        if not chosen:
            efforts = ", ".join(efforts_of(template))
            raise wrong(
                "reasoning_effort", f"template {template.name} has no form for {effort}; it has {efforts}"
            )
    return RwkvTemplate(chosen, template.tools.name)
