"""Fast tokenizer: a table of byte strings, matched greedily, as a tokenizer.json for `tokenizers`.

No model of that package matches greedily over bytes in linear time. So the match is a
regular expression. ByteLevel writes each byte as one character, the expression splits the text into the
tokens' names, and the model looks each up whole (`ignore_merges`, no merges).

The expression is the trie of all names. A node that ends a token has its children as an optional group, so a
longer token is tried first, and what fails falls back to the longest that fits. It is bounded by the longest
token, whatever the text.
"""

from __future__ import annotations

import json
from typing import Any

from ..data.tokenizer import ByteTokenizer, byte_names

END = "<|endoftext|>"  # name of an end of document that no text spells
LONGEST = 512  # bytes of a token; a longer one would nest groups beyond the engine's limit
SYNTAX = frozenset("\\^$.|?*+()[]{}/-")


def no_form(tokenizer: ByteTokenizer) -> str:
    """Say why the tokenizer has no such form, "" if it has."""
    if tokenizer.encoding != "utf-8" or len(tokenizer.eod) != 1:
        return f"tokenizer.json has no form for {tokenizer.name}, whose end of document is two bytes"
    spelled = tokenizer.table.values()
    missing = set(range(256)) - {piece[0] for piece in spelled if len(piece) == 1}
    if missing:
        return f"{tokenizer.name} has no token for the byte {min(missing)}, so some texts would be lost"
    if b"" in spelled and END.encode() in spelled:
        return f"{tokenizer.name} has a token {END}, which is the name of its end of document there"
    longest = max(map(len, spelled))
    if longest > LONGEST:
        return f"{tokenizer.name} has a token of {longest} bytes, more than {LONGEST}"
    return ""


def token_names(tokenizer: ByteTokenizer) -> dict[int, str]:
    """Map id -> its name in tokenizer.json; END for the id that no text spells."""
    names = byte_names()
    return {token: "".join(names[byte] for byte in piece) or END for token, piece in tokenizer.table.items()}


def tokenizer_json(tokenizer: ByteTokenizer) -> bytes:
    """Write tokenizer.json for a tokenizer for which no_form() is "".

    The end of document is no added token. Else a user who types its name would end the document.
    """
    names = token_names(tokenizer)
    spelled = [names[token] for token, piece in tokenizer.table.items() if piece]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                {
                    "type": "Split",
                    "pattern": {"Regex": longest_match(spelled)},
                    "behavior": "Isolated",
                    "invert": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: token for token, name in sorted(names.items())},
            "merges": [],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def with_beginning(content: bytes, token: int, name: str) -> bytes:
    """Put a token before a text in a tokenizer.json, wherever special tokens are asked for."""
    piece = {"SpecialToken": {"id": name, "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, *({"Sequence": {"id": part, "type_id": 0}} for part in "AB")],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
    return json.dumps(json.loads(content) | {"post_processor": processor}, ensure_ascii=False).encode()


def longest_match(names: list[str]) -> str:
    """Build the regular expression that matches the longest of these names, at any place."""
    root: dict[str, Any] = {}
    for name in names:
        node = root
        for character in name:
            node = node.setdefault(character, {})
        node[""] = True
    return _expression(root)[0]


def _expression(node: dict[str, Any]) -> tuple[str, int]:
    """Build (the expression for the rest of a name after a node, the number of such names)."""
    # characters with the same expression behind them share a class
    characters: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for character, child in node.items():
        if character:
            rest, count = _expression(child)
            characters.setdefault(rest, []).append(character)
            counts[rest] = counts.get(rest, 0) + count
    total = sum(counts.values()) + ("" in node)
    # the most names first: on texts this halves the time
    likely = sorted(characters, key=counts.__getitem__, reverse=True)
    choices = "|".join(_class(characters[rest]) + rest for rest in likely)
    if "" in node:
        return (f"(?:{choices})?" if choices else ""), total
    return (f"(?:{choices})" if len(likely) > 1 else choices), total


def _class(characters: list[str]) -> str:
    escaped = [f"\\{character}" if character in SYNTAX else character for character in sorted(characters)]
    return escaped[0] if len(escaped) == 1 else f"[{''.join(escaped)}]"
