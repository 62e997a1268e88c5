"""Tokenizer of a model: as its file records, else from its Hugging Face folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.hf_folder import is_folder
from rwkv_miss.files.hf_names import TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from rwkv_miss.files.model_files import model_metadata
from rwkv_miss.files.untrusted import read_json
from rwkv_miss.progress import clear, print_notes

from ..common.first_process import is_first_process
from .tokenizer import BUILT_IN, WORLD_IDS, ByteTokenizer, Tokenizer, byte_names, load_tokenizer

ALIKE = 0.99  # share of World's pieces that a tokenizer.json must have under World's ids


def recorded_tokenizer(spec: str, eod: str, vocab_size: int, *paths) -> Tokenizer:
    """Load a tokenizer; "auto" is the one that the first model or adapter with a record was trained with.

    Another one gives a warning on stderr. Without a record "auto" is the tokenizer of a model's folder.
    """
    path, recorded, recorded_eod = None, None, ""
    for path in filter(None, paths):
        metadata = model_metadata(path) or {}
        recorded, recorded_eod = metadata.get("tokenizer"), metadata.get("eod") or ""
        if recorded:
            break
    if spec == "auto" and recorded:
        return load_tokenizer(recorded, vocab_size, eod or recorded_eod)
    if spec == "auto" and (folder := next(filter(is_folder, filter(None, paths)), None)):
        return folder_tokenizer(folder, vocab_size, eod)
    tokenizer = load_tokenizer(spec, vocab_size, eod)
    # two files of different names may hold the same tokenizer
    is_certain = bool({recorded, tokenizer.name} & set(BUILT_IN))
    if recorded and recorded != tokenizer.name and is_certain and is_first_process():
        clear()  # a bar may be half drawn
        print(
            f"WARNING: {path} was trained with the tokenizer {recorded}, {tokenizer.name} is another one; "
            "leave --tokenizer out to use the recorded one",
            file=sys.stderr,
        )
    return tokenizer


def folder_tokenizer(path, vocab_size: int, eod: str = "") -> Tokenizer:
    """Load the tokenizer of a model's folder: world for World's vocabulary, else its file; a note says so.

    Without one in the folder, it is load_tokenizer("auto"). Raises UserError as that does.
    """
    file = next(
        (os.path.join(path, n) for n in (VOCABULARY, TOKENIZER) if os.path.exists(os.path.join(path, n))), ""
    )
    if not file:
        return load_tokenizer("auto", vocab_size, eod)
    world = load_tokenizer("world", vocab_size) if vocab_size >= WORLD_IDS and not eod else None
    if isinstance(world, ByteTokenizer) and _has_vocabulary_of(world, file):
        return world
    if file.endswith(TOKENIZER):
        eod = eod or _end_of_text(path)
    tokenizer = load_tokenizer(file, vocab_size, eod)
    if is_first_process():
        print_notes([f"--tokenizer auto: {file}, whose vocabulary is not World's"])
    return tokenizer


def _has_vocabulary_of(world: ByteTokenizer, file: str) -> bool:
    """Tell whether a folder's file has World's pieces under World's ids, without building a tokenizer."""
    pieces = {token: piece for token, piece in world.table.items() if piece}
    if not file.endswith(TOKENIZER):
        other = load_tokenizer(file, max(world.table) + 1)
        return isinstance(other, ByteTokenizer) and pieces == {t: p for t, p in other.table.items() if p}
    texts = _vocabulary(file)
    same = sum(texts.get(token) in _forms(piece) for token, piece in pieces.items())
    return same >= ALIKE * len(pieces)


def _forms(piece: bytes) -> tuple[str, ...]:
    """Return the texts by which a tokenizer.json may call a piece: a character for each byte, or its text."""
    return "".join(map(byte_names().__getitem__, piece)), piece.decode("utf-8", "replace")


def _vocabulary(file: str) -> dict[int, str]:
    """Read id -> text from a tokenizer.json with a table of texts or a list of texts with scores."""
    model = read_json(file).get("model")
    vocab: Any = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, Mapping):
        return {token: text for text, token in vocab.items() if isinstance(token, int)}
    if isinstance(vocab, list):
        return {i: str(entry[0]) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    raise UserError(f"{file} has no vocabulary under model; give --tokenizer world, or another file")


def _end_of_text(path) -> str:
    """Return the text of the token that ends a document, as transformers know it; "" without one."""
    file = os.path.join(path, TOKENIZER_CONFIG)
    token = read_json(file).get("eos_token") if os.path.exists(file) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""
