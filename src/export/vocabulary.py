"""A tokenizer as GGUF carries it: llama.cpp's "rwkv" is the greedy longest match in a table of byte strings,
which World and bytes are.
"""

from __future__ import annotations

import dataclasses

from ..data.chat_template import Template
from ..data.tokenizer import ByteTokenizer, Tokenizer
from .chat_template import jinja, thinks_aloud

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types
# before the texts of tokens that no text may spell, or a user who types <s> would end the document: a byte
# that UTF-8 never has, written as the texts of all tokens are, in which llama.cpp reads escapes
NEVER_TYPED = r"\xff"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """`tokens` is empty, and the model "none", for a tokenizer that llama.cpp has no form for: it then gives
    logits only. `eot` is the token that ends a turn, `notes` what the user should know.
    """

    model: str
    tokens: list[str] = dataclasses.field(default_factory=list)
    types: list[int] = dataclasses.field(default_factory=list)
    end: int = 0
    eot: int | None = None
    chat_template: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)


def vocabulary_of(tokenizer: Tokenizer | None, template: Template, vocab_size: int) -> Vocabulary:
    """What llama.cpp is told of a tokenizer; None is a model without one."""
    if reason := _no_form(tokenizer):
        return Vocabulary(
            "none", notes=[f"no tokenizer is in the file: {reason}; llama.cpp takes ids and gives logits"]
        )
    table = {token: repr(piece)[2:-1] or f"{NEVER_TYPED}<s>" for token, piece in tokenizer.table.items()}
    types = {token: NORMAL if piece else CONTROL for token, piece in tokenizer.table.items()}
    turn_end, notes = next((token for token, piece in tokenizer.table.items() if piece == b"\n\n"), None), []
    if turn_end is not None and thinks_aloud(template):
        turn_end = None
        notes = [
            f"template {template.name}: thoughts hold blank lines, so a blank line ends no turn; stop"
            " llama.cpp at 'User:' as well"
        ]
    ids = range(vocab_size)
    return Vocabulary(
        "rwkv",
        [table.get(i, f"{NEVER_TYPED}[PAD{i}]") for i in ids],
        [types.get(i, UNUSED) for i in ids],
        tokenizer.eod[-1],
        turn_end,
        jinja(template),
        notes,
    )


def _no_form(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none was asked for"
    if not isinstance(tokenizer, ByteTokenizer) or tokenizer.encoding != "utf-8":
        return f"llama.cpp has none like {tokenizer.name}"
    # without it llama.cpp ends the process
    return (
        ""
        if b"\n" in tokenizer.table.values()
        else f"{tokenizer.name} has no token for a newline, and llama.cpp needs one"
    )
