"""Exact-answer accuracy: greedy answers of many prompts at once."""

from __future__ import annotations

import itertools

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


@torch.no_grad()
def greedy_answers(model: RWKV, tokenizer, prompts: list[list[int]], max_tokens: int, batch: int = 256) -> list[str]:
    """The greedy answer to each prompt of tokens, up to the end of document or max_tokens; `batch` answers are made at a time."""
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        logits, state = _read(model, [prompts[i] for i in part])
        produced = torch.empty(len(part), 0, dtype=torch.int64, device=logits.device)
        for _ in range(max_tokens):
            token = logits[:, : tokenizer.vocab_size].argmax(-1, keepdim=True)
            produced = torch.cat([produced, token], 1)
            if all(len(_before_end(ids, tokenizer.eod)) < len(ids) for ids in produced.tolist()):
                break
            logits, state = model.next_logits(token, state)
        for i, ids in zip(part, produced.tolist(), strict=True):
            answers[i] = tokenizer.decode(_before_end(ids, tokenizer.eod)).strip()
    return answers


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


def exact_accuracy(
    model: RWKV, tokenizer, questions: list[tuple[list[str], str]], max_tokens: int, template: Template = DEFAULT
) -> tuple[float, list[str]]:
    """(share of answers that are right as a whole, the answers); `questions` are read_questions() with the same template."""
    prompts = [[token for piece in pieces for token in tokenizer.encode(piece)] for pieces, _ in questions]
    answers = [answer_text(text, template) for text in greedy_answers(model, tokenizer, prompts, max_tokens)]
    return sum(a == right for a, (_, right) in zip(answers, questions, strict=True)) / len(questions), answers
