"""Requests for a text's tokens and back, and about the tokenizer, as vLLM and llama-server have them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..data.bos import with_bos, without_bos
from ..data.rwkv_template import RwkvTemplate
from ..data.tokenizer import Tokenizer
from .errors import wrong
from .fields import Fields
from .openai_objects import TokenNames
from .request_parsing import RequestReader, checked, encoded, is_id, read_chat

# World's end of document is in no text. Its Hugging Face tokenizers call it so.
NO_TEXT = "<|rwkv_tokenizer_end_of_text|>"


class TokensReply(NamedTuple):
    """Reply: a JSON object, and the fields that nobody has read."""

    value: dict[str, Any]
    ignored: list[str]


def read_tokenize(reader: RequestReader, body: dict[str, Any]) -> TokensReply:
    """Answer a request to /tokenize: ids of a text, with BOS, or of the prompt of a chat. Raises Refused."""
    fields = Fields(body)
    chosen = reader.find(fields)
    names_tokens = fields.flag("return_token_strs")
    if fields.take("messages") is not None:
        begins = fields.flag("add_special_tokens", True)
        if fields.take("prompt") is not None:
            raise wrong("messages", "there is a prompt, too; give one of the two")
        parsed = read_chat(reader, body)
        tokens, ignored = list(parsed.requests[0].tokens), sorted({*parsed.ignored} - fields.seen)
        tokens = tokens if begins else without_bos(tokens, chosen.bos)
    else:
        text = fields.text("prompt")
        begins = fields.flag("add_special_tokens", True) if text is not None else fields.flag("add_special")
        text = fields.text("content") if text is None else text
        if text is None:
            raise wrong("prompt", "is missing; give a prompt, content or messages")
        tokens = _ids(reader, text)
        tokens, ignored = with_bos(tokens, chosen.bos) if begins else tokens, fields.ignored()
    names = list(map(TokenNames(reader.tokenizer).name, tokens)) if names_tokens else None
    sizes = {"count": len(tokens), "max_model_len": reader.limits.prompt_tokens}
    return TokensReply({**sizes, "tokens": tokens, "token_strs": names}, ignored)


def _ids(reader: RequestReader, text: str) -> list[int]:
    if text == end_name(reader.tokenizer):
        return list(reader.tokenizer.eod)
    try:
        return encoded(reader, [text], "prompt")
    except UserError as error:
        raise wrong("prompt", str(error)) from None


def read_detokenize(reader: RequestReader, body: dict[str, Any]) -> TokensReply:
    """Answer a request to /detokenize: the text of ids. Raises Refused."""
    fields = Fields(body)
    reader.find(fields)
    tokens = fields.take("tokens")
    if not isinstance(tokens, list) or not all(map(is_id, tokens)):
        raise fields.refuse("tokens", tokens, "a list of ids")
    checked(reader, tokens, "tokens")  # before each id becomes a text
    try:
        text = reader.tokenizer.decode(tokens)
    except UserError as error:
        raise wrong("tokens", str(error)) from None
    return TokensReply({"prompt": text, "content": text}, fields.ignored())


def tokenizer_info(reader: RequestReader) -> dict[str, Any]:
    """Describe the tokenizer with the names of tokenizer_config.json."""
    tokenizer, chosen = reader.tokenizer, reader.find(Fields({}))
    info = {
        "tokenizer_class": type(tokenizer).__name__,
        "name": os.path.basename(tokenizer.name),
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": reader.limits.prompt_tokens,
        "eos_token": end_name(tokenizer),
        "bos_token": _name(tokenizer, chosen.bos) if chosen.bos else None,
        "pad_token": end_name(tokenizer),
    }
    if not isinstance(chosen.template, RwkvTemplate):
        info["chat_template"] = chosen.template.record
    return info


def end_name(tokenizer: Tokenizer) -> str:
    """Name the end of document: by its text, if it has one."""
    return _name(tokenizer, tokenizer.eod)


def _name(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids) or NO_TEXT
