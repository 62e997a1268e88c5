"""BOS, the token that every document begins with: --bos.

In pre-training a document follows the end of another one, which in World is token 0. Whether a tuned model
should be prompted after it depends on its training, so adapters and merged files record it. It is in front of
the ids, is never trained, and is not written twice.
"""

from __future__ import annotations

from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.model_files import model_metadata

from ..config.validate import check_bos
from .tokenizer import Tokenizer

# help for --bos in programs that read a record; train.py has its own
HELP = (
    "the token that every conversation or text begins with: recorded (by the adapter's file, without an"
    " adapter by the model's, else none), none, auto (the end-of-document token, 0 in World), or the id of a"
    " token; default %(default)s"
)


def bos_ids(spec: str, tokenizer: Tokenizer, *paths) -> tuple[int, ...]:
    """Return the ids that a document begins with; () for none.

    `spec` is none, auto, an id, or recorded. auto is the end of document, 0 in World. recorded is the record
    of the first of the files at `paths`. A file without a record means none, as does no file. Empty paths are
    left out. Raises UserError for any other text, and for an id that the tokenizer lacks.
    """
    check_bos(spec)
    if spec == "none":
        return ()
    if spec == "auto":
        return tuple(tokenizer.eod)
    if spec == "recorded":
        path = next(filter(None, paths), None)
        return recorded_bos(path, model_metadata(path) or {}, tokenizer) if path else ()
    token = int(spec)
    others = f"auto is its end of document, {text_of(tokenizer.eod)}; none is no token"
    if token not in tokenizer.ids:
        raise UserError(
            f"--bos {spec}: tokenizer {tokenizer.name} has no such id; its ids go from {min(tokenizer.ids)}"
            f" to {max(tokenizer.ids)}. {others}"
        )
    if len(tokenizer.eod) > 1:
        raise UserError(
            f"--bos {spec}: tokenizer {tokenizer.name} has several ids for a character, so that a single one"
            f" would shift all others. {others}"
        )
    return (token,)


def recorded_bos(path, metadata: dict[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Read the BOS in a file's metadata; () without one. Raises UserError for no list of ids."""
    ids = metadata.get("bos") or []
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise UserError(
            f"{path} is damaged: its bos is {str(ids)[:60]!r}, expected a list of ids; give --bos none or"
            " auto instead"
        )
    if not tokenizer.ids.issuperset(ids):
        raise UserError(
            f"the documents of {path} began with {text_of(tuple(ids))}, which tokenizer {tokenizer.name}"
            " lacks; give the tokenizer that they were made with, or --bos none"
        )
    return tuple(ids)


def with_bos(ids: list[int], bos: tuple[int, ...]) -> list[int]:
    """Put the BOS before the ids of a document, unless it is there."""
    return ids if begins_with(ids, bos) else [*bos, *ids]


def without_bos(ids: list[int], bos: tuple[int, ...]) -> list[int]:
    """Return the ids of a document after its BOS."""
    return ids[len(bos) :] if begins_with(ids, bos) else ids


def begins_with(ids, bos: tuple[int, ...]) -> bool:
    """Tell whether a document, a list or an array of ids, begins with these."""
    return tuple(ids[: len(bos)]) == bos


def text_of(bos: tuple[int, ...]) -> str:
    """Describe the ids for people: "token 0"."""
    return f"token {bos[0]}" if len(bos) == 1 else f"tokens {' '.join(map(str, bos))}"


def describe_bos(bos: tuple[int, ...]) -> str:
    """Describe the setting for people: "no BOS", "BOS token 0"."""
    return f"BOS {text_of(bos)}" if bos else "no BOS"
