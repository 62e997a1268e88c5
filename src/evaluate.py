"""Exact-answer accuracy: greedy answers of many prompts at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from rwkv_miss.errors import UserError

from .formats import BY_NAME, Reading, read_rows
from .model import RWKV, LayerState, State
from .template import DEFAULT, Template, answer_text, thoughts_of


def read_questions(path, template: Template = DEFAULT, reading: Reading = BY_NAME) -> list[tuple[list[str], str]]:
    """(the pieces of the prompt, the right answer without its thoughts) of every row {"messages": [..., {"role": "assistant", ...}]}; a
    {"prompt", "completion"} is taken as it stands.

    Raises UserError for data that cannot be read, and for a row that has no answer.
    """
    questions = []
    for where, row in read_rows(path, reading=reading):
        if "prompt" in row:
            questions.append(([row["prompt"]], row["completion"].strip()))
            continue
        if "messages" not in row:
            raise UserError(f"{where}: expected messages, a question and its answer, or a prompt and its completion; got {' and '.join(row)}")
        *before, answer = row["messages"]
        pieces = [piece for piece, _ in template.segments(before, row.get("tools"), ask=True)]
        questions.append((pieces, thoughts_of(answer)[1]))
    return questions


def greedy_answers(model: RWKV, tokenizer, prompts: list[list[int]], max_tokens: int, batch: int = 256, stops: Sequence[str] = ()) -> list[str]:
    """greedy_texts() without the space around them."""
    return [text.strip() for text in greedy_texts(model, tokenizer, prompts, max_tokens, batch, stops)]


@torch.no_grad()
def greedy_texts(model: RWKV, tokenizer, prompts: list[list[int]], max_tokens: int, batch: int = 256, stops: Sequence[str] = ()) -> list[str]:
    """What the model says after each prompt of tokens, up to the end of document, a text of `stops`, or max_tokens; `batch` are made at a time."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        going = order[start : start + batch]
        said: dict[int, list[int]] = {i: [] for i in going}
        logits, state = _read(model, [prompts[i] for i in going])
        for _ in range(max_tokens):
            tokens = logits[:, : tokenizer.vocab_size].argmax(-1)
            for i, token in zip(going, tokens.tolist(), strict=True):
                said[i].append(token)
            left = [row for row, i in enumerate(going) if not _is_over(said[i], tokenizer, stops)]
            if not left:
                break
            if len(left) < len(going):  # what is complete costs nothing more
                rows = torch.tensor(left, device=tokens.device)
                going, tokens = [going[row] for row in left], tokens[rows]
                state = [LayerState(*(part[rows] for part in layer)) for layer in state]
            logits, state = model.next_logits(tokens[:, None], state)
        for i, ids in said.items():
            text = tokenizer.decode(_before_end(ids, tokenizer.eod))
            texts[i] = text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]
    return texts


def _is_over(ids: list[int], tokenizer, stops: Sequence[str]) -> bool:
    """Whether the last of these ids ends the text."""
    size = len(tokenizer.eod)
    if len(ids) % size:
        return False  # in the middle of a unit of utf16
    if tuple(ids[-size:]) == tokenizer.eod:
        return True
    # every token has a byte of its own, so that a stop is in as many of them at most; a decoder may leave out a space that it begins with
    tail = ids[-max((len(stop.encode(tokenizer.encoding)) + 2 * size for stop in stops), default=0) :] if stops else []
    return bool(tail) and any(stop in tokenizer.decode(tail) for stop in stops)


def _read(model: RWKV, prompts: list[list[int]]) -> tuple[torch.Tensor, State]:
    """Logits (B, V) after each prompt, and the states: prompts of one length are read together, without padding."""
    device = model.emb.weight.device
    read = [model.next_logits(torch.tensor(list(same), device=device)) for _, same in itertools.groupby(prompts, key=len)]
    logits, states = zip(*read, strict=True)
    return torch.cat(logits), [LayerState(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(*states, strict=True)]


def _before_end(ids: list[int], eod: tuple[int, ...]) -> list[int]:
    size = len(eod)
    end = next((i for i in range(0, len(ids), size) if tuple(ids[i : i + size]) == eod), len(ids))
    return ids[:end]


def answers_to(
    model: RWKV, tokenizer, questions: Sequence[tuple[list[str], Any]], max_tokens: int, template: Template = DEFAULT, batch: int = 256
) -> list[str]:
    """What the model answers to each of (the pieces of the prompt, ...), without thoughts; the prompts are made with the same template."""
    prompts = [[token for piece in pieces for token in tokenizer.encode(piece)] for pieces, _ in questions]
    stops = [template.stop] if template.stop else []
    return [answer_text(text, template) for text in greedy_answers(model, tokenizer, prompts, max_tokens, batch, stops)]


def exact_accuracy(
    model: RWKV, tokenizer, questions: list[tuple[list[str], str]], max_tokens: int, template: Template = DEFAULT
) -> tuple[float, list[str]]:
    """(share of answers that are right as a whole, the answers); `questions` are read_questions() with the same template."""
    answers = answers_to(model, tokenizer, questions, max_tokens, template)
    return sum(a == right for a, (_, right) in zip(answers, questions, strict=True)) / len(questions), answers
