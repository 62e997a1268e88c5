"""Vocabulary of a tokenizer, as GGUF carries it.

llama.cpp's tokenizer "rwkv" is the greedy longest match in a table of byte strings. World and bytes are.
"""

from __future__ import annotations

import dataclasses

from ..data.bos import text_of
from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import HEADINGS, TURN_END, RwkvTemplate
from ..data.tokenizer import ByteTokenizer, Tokenizer
from .chat_template import jinja

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types
# A token that no text may spell begins with this byte, which UTF-8 never has. Else a user who types <s> would
# end the document. It is an escape, because llama.cpp reads escapes in the texts of tokens.
NEVER_TYPED = r"\xff"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokenizer for llama.cpp.

    If llama.cpp has no form for it, `tokens` is empty and the model "none". llama.cpp then gives only logits.
    """

    model: str
    tokens: list[str] = dataclasses.field(default_factory=list)
    types: list[int] = dataclasses.field(default_factory=list)
    end: int = 0
    eot: int | None = None  # the token that ends a turn
    bos: int | None = None  # the token that every document begins with
    chat_template: str = ""
    notes: list[str] = dataclasses.field(default_factory=list)  # sentences for the user


def vocabulary_of(
    tokenizer: Tokenizer | None, template: Template, bos: tuple[int, ...], vocab_size: int
) -> Vocabulary:
    """Describe a tokenizer for llama.cpp; None is a model without one."""
    if reason := _no_form(tokenizer):
        note = f"no tokenizer is in the file: {reason}; llama.cpp takes ids and gives logits"
        return Vocabulary("none", notes=[note])
    table = {token: repr(piece)[2:-1] or f"{NEVER_TYPED}<s>" for token, piece in tokenizer.table.items()}
    types = {token: NORMAL if piece else CONTROL for token, piece in tokenizer.table.items()}
    end = template.turn_end or (TURN_END if isinstance(template, RwkvTemplate) else "")
    turn_end = next(
        (token for token, piece in tokenizer.table.items() if end and piece == end.encode()), None
    )
    notes = []
    if end.strip() and turn_end is None:
        turn = end.strip()
        notes = [f"template {template.name}: no token is {turn}, which ends a turn; let llama.cpp stop at it"]
    # a flower ends a turn even if thoughts hold blank lines
    headings = isinstance(template, RwkvTemplate) and template.form == HEADINGS
    if turn_end is not None and end == TURN_END and (headings or begins_thoughts(template.opening)):
        turn_end = None
        holder = "answers" if headings else "thoughts"
        stops = " and ".join(repr(stop.strip()) for stop in template.stops)
        notes = [
            f"template {template.name}: {holder} hold blank lines, so a blank line ends no turn; stop"
            f" llama.cpp at {stops} as well"
        ]
    # the text of a control token is no part of an answer; llama.cpp cuts such texts out before longer tokens
    if turn_end is not None and end.strip():
        if not any(end.encode() in piece for token, piece in tokenizer.table.items() if token != turn_end):
            types[turn_end] = CONTROL
    begin = ""
    if bos:
        # chat programs look for the texts of control tokens; a user's words can't spell them
        begin = table[bos[0]] if types[bos[0]] == CONTROL else ""
        by_whom = "the chat template begins with it" if begin else "no chat template can"
        notes.append(
            f"add_bos_token says that a document begins with {text_of(bos)}, but llama.cpp's tokenizer of"
            f" RWKV adds it to nothing: {by_whom}; before any other text put the id yourself"
        )
    ids = range(vocab_size)
    return Vocabulary(
        "rwkv",
        [table.get(i, f"{NEVER_TYPED}[PAD{i}]") for i in ids],
        [types.get(i, UNUSED) for i in ids],
        tokenizer.eod[-1],
        turn_end,
        bos[0] if bos else None,
        begin + jinja(template),
        notes,
    )


def _no_form(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none was asked for"
    if not isinstance(tokenizer, ByteTokenizer) or tokenizer.encoding != "utf-8":
        return f"llama.cpp has none like {tokenizer.name}"
    # without it llama.cpp ends the process
    if b"\n" not in tokenizer.table.values():
        return f"{tokenizer.name} has no token for a newline, and llama.cpp needs one"
    return ""
