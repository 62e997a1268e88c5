"""Contradictions: rows that ask the same and have different answers, found by hashes of tokens."""

from __future__ import annotations

import numpy as np

from ..common.formatting import counted
from .dataset import Loaded
from .encode import Encoder, Tokens
from .formats import SFT

BLOCK = 1 << 16  # documents that are looked at together
SEARCHED = 500_000  # documents of a file, from the first on, that are looked at
COMPARED = 1000  # rows with other tokens, from the first on, that are compared as text
THOUGHTS_END = "</think>"


def contradictions(loaded: Loaded) -> str:
    """Say how many rows have another answer than an earlier row with the same question; "" for none.

    The first answer of a row counts, without its thoughts. Running text has no question.
    """
    if loaded.rows != SFT:
        return ""
    encoder, places = loaded.encoder, []  # (file, document, where its prompt, answer and rest begin) of each
    prompts: list[int] = []
    answers: list[int] = []
    for number, (tokens, chosen) in enumerate(zip(loaded.files, loaded.chosen)):
        for document, begin, start, end in _first_answers(tokens, np.unique(chosen)[:SEARCHED], encoder):
            places.append((number, document, start, end))
            prompts.append(hash(tokens.ids[begin:start].tobytes()))
            answers.append(hash(tokens.ids[start:end].tobytes()))
    _, first, question = np.unique(np.array(prompts, np.int64), return_index=True, return_inverse=True)
    earlier, tokens_of_answer = first[question], np.array(answers, np.int64)

    end_of_document = encoder.tokenizer.decode(encoder.tokenizer.eod)

    def said(i: int) -> str:
        number, _, start, end = places[i]
        text = encoder.tokenizer.decode(loaded.files[number].ids[start:end].tolist())
        return text.removesuffix(end_of_document).rpartition(THOUGHTS_END)[2].strip()

    others = np.flatnonzero(tokens_of_answer != tokens_of_answer[earlier])
    different = [i for i in others[:COMPARED] if said(i) != said(earlier[i])]
    if not different:
        return ""
    number, document, *_ = places[different[0]]
    more = "more than " if len(others) > COMPARED else ""
    have = "has" if len(different) == 1 else "have"
    return (
        f"{more}{counted(len(different), 'row')} {have} another answer than an earlier row with the same"
        f" question, first {loaded.names[number]} {loaded.files[number].places[document]}; python -m"
        " scripts.preview shows more"
    )


def _first_answers(tokens: Tokens, documents: np.ndarray, encoder: Encoder) -> list[tuple[int, ...]]:
    """Return (document, begin, start, end): tokens begin to start are its prompt, start to end its answer.

    Documents without a prompt are left out.
    """
    answers: list[tuple[int, ...]] = []
    for at in range(0, len(documents), BLOCK):
        block = documents[at : at + BLOCK]
        ends = tokens.ends[block]
        begins = np.where(block > 0, tokens.ends[block - 1], 0)
        weights = tokens.weights[begins[0] : ends[-1]]
        is_answer = (weights != 0) & (weights != np.float32(encoder.prompt_weight))
        edges = np.flatnonzero(np.diff(is_answer, prepend=False, append=False)) + begins[0]
        firsts, lasts = (np.append(edges[i::2], ends[-1]) for i in (0, 1))  # where answers begin and end
        answer = np.searchsorted(firsts, begins)
        starts, stops = firsts[answer], np.minimum(lasts[answer], ends)
        has_prompt = (starts < ends) & (starts > begins + len(encoder.bos))
        answers += zip(*(column[has_prompt].tolist() for column in (block, begins, starts, stops)))
    return answers
