"""Exact-answer accuracy: greedy answers of many prompts at once."""

from __future__ import annotations

import itertools

import torch

from rwkv_miss.errors import UserError

from .data import read_rows
from .model import RWKV
from .template import prompt


def read_questions(path) -> list[tuple[str, str]]:
    """(prompt text, right answer) of every row: {"messages": [..., {"role": "assistant", "content": answer}]}."""
    questions = []
    for where, row in read_rows(path):
        if "messages" not in row:
            raise UserError(f"{where}: expected messages that end with the right answer, got text")
        *before, answer = row["messages"]
        questions.append((prompt(before), answer["content"].strip()))
    if not questions:
        raise UserError(f"{path} holds no rows; expected one JSON object per line")
    return questions


@torch.no_grad()
def greedy_answers(model: RWKV, tokenizer, prompts: list[str], max_tokens: int, batch: int = 256) -> list[str]:
    """The greedy answer to each prompt, up to the end of document or max_tokens; prompts of one length run together."""
    answers = [""] * len(prompts)
    encoded = sorted(((tokenizer.encode(text), i) for i, text in enumerate(prompts)), key=lambda pair: len(pair[0]))
    for _, same_length in itertools.groupby(encoded, key=lambda pair: len(pair[0])):
        pairs = list(same_length)
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            logits, state = model.next_logits(torch.tensor([ids for ids, _ in part], device=model.emb.weight.device))
            produced = []
            for _ in range(max_tokens):
                token = logits[:, : tokenizer.vocab_size].argmax(-1, keepdim=True)
                produced.append(token)
                if all(_before_end(ids, tokenizer.eod) != ids for ids in torch.cat(produced, 1).tolist()):
                    break
                logits, state = model.next_logits(token, state)
            for (_, i), ids in zip(part, torch.cat(produced, 1).tolist(), strict=True):
                answers[i] = tokenizer.decode(_before_end(ids, tokenizer.eod)).strip()
    return answers


def _before_end(ids: list[int], eod: tuple[int, ...]) -> list[int]:
    size = len(eod)
    end = next((i for i in range(0, len(ids), size) if tuple(ids[i : i + size]) == eod), len(ids))
    return ids[:end]


def exact_accuracy(model: RWKV, tokenizer, questions: list[tuple[str, str]], max_tokens: int) -> tuple[float, list[str]]:
    """(share of answers that are right as a whole, the answers)."""
    answers = greedy_answers(model, tokenizer, [text for text, _ in questions], max_tokens)
    return sum(a == right for a, (_, right) in zip(answers, questions, strict=True)) / len(questions), answers
