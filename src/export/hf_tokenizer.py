"""Tokenizer files in a Hugging Face folder, and the chat template with them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from rwkv_miss.files.hf_names import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from rwkv_miss.files.output import write_bytes, write_json, write_text

from ..data.bos import text_of
from ..data.chat_template import Template
from ..data.rwkv_template import RwkvTemplate
from ..data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from . import fast_tokenizer
from .chat_template import rwkv_jinja
from .fast_tokenizer import END

PADDING = "<|padding|>"
FAST = "PreTrainedTokenizerFast"
# (writers of the files by name, notes)
Files = tuple[dict[str, Callable[[str], None]], list[str]]


def official_files(tokenizer: Tokenizer | None, template: Template, bos: tuple[int, ...]) -> Files:
    """Write tokenizer.json for any tokenizer that has the form; a byte table is matched greedily.

    It adds the BOS `bos` wherever special tokens are asked for.
    """
    described: dict[str, object] = {"tokenizer_class": FAST, "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, JsonTokenizer):
        content, end = Path(tokenizer.name).read_bytes(), tokenizer.decode(tokenizer.eod)
    elif isinstance(tokenizer, ByteTokenizer) and not fast_tokenizer.no_form(tokenizer):
        content = fast_tokenizer.tokenizer_json(tokenizer)
        end = fast_tokenizer.token_names(tokenizer)[tokenizer.eod[0]]
        described["split_special_tokens"] = True  # a user's text stays text, also the end's name
    else:
        reason = fast_tokenizer.no_form(tokenizer) if tokenizer else "none was asked for"
        return {}, [f"no tokenizer is in the folder: {reason}"]
    described |= {"eos_token": end, "pad_token": end}
    notes = []
    if bos:
        content = _begun(content, described, tokenizer, bos)
        notes = [_beginning_note(bos)]
    return {
        TOKENIZER: functools.partial(write_bytes, content=content),
        TOKENIZER_CONFIG: functools.partial(write_json, content=described),
        CHAT_TEMPLATE: functools.partial(write_text, text=_jinja(template)),
    }, notes


def fla_files(
    tokenizer: Tokenizer | None, template: Template, bos: tuple[int, ...], vocab_size: int
) -> Files:
    """Write rwkv7-hf's tokenizer, whose vocabulary is a file in World format, or copy a tokenizer.json."""
    notes: list[str] = []
    if isinstance(tokenizer, JsonTokenizer):
        described: dict[str, object] = {"tokenizer_class": FAST, "eos_token": tokenizer.decode(tokenizer.eod)}
        table, content = TOKENIZER, Path(tokenizer.name).read_bytes()
        if bos:
            content = _begun(content, described, tokenizer, bos)
            notes = [_beginning_note(bos)]
    elif isinstance(tokenizer, ByteTokenizer) and tokenizer.encoding == "utf-8" and tokenizer.eod == (0,):
        described = {
            "tokenizer_class": "RWKV7Tokenizer",
            "model_vocab_size": vocab_size,
            "eos_token": END,
            "pad_token": PADDING,
            "errors": "replace",
            "split_special_tokens": True,  # a user's text stays text, also END
        }
        pieces = [(token, piece) for token, piece in sorted(tokenizer.table.items()) if piece]
        table = VOCABULARY
        content = "".join(f"{token} {piece!r} {len(piece)}\n" for token, piece in pieces).encode()
        if bos:
            notes = [f"rwkv7-hf's tokenizer adds no BOS; put {text_of(bos)} before a text yourself"]
    else:
        reason = f"rwkv7-hf has none like {tokenizer.name}" if tokenizer else "none was asked for"
        return {}, [f"no tokenizer is in the folder: {reason}"]
    described["chat_template"] = _jinja(template)
    return {
        table: lambda path: write_bytes(path, content),
        TOKENIZER_CONFIG: lambda path: write_json(path, described),
    }, notes


def _begun(content: bytes, described: dict[str, object], tokenizer: Tokenizer, bos: tuple[int, ...]) -> bytes:
    """Put the BOS before a text in a tokenizer.json and its configuration."""
    (token,) = bos
    if isinstance(tokenizer, JsonTokenizer):
        name = tokenizer.inner.id_to_token(token)
    else:
        name = fast_tokenizer.token_names(tokenizer)[token]
    described |= {"bos_token": name, "add_bos_token": True}
    return fast_tokenizer.with_beginning(content, token, name)


def _beginning_note(bos: tuple[int, ...]) -> str:
    return (
        f"the tokenizer puts {text_of(bos)} before a text, but apply_chat_template asks it for none; have it"
        " return the text (tokenize=False), and tokenise that"
    )


def _jinja(template: Template) -> str:
    return rwkv_jinja(template) if isinstance(template, RwkvTemplate) else template.record
