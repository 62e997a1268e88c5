"""Preview of data samples, for scripts.preview: documents, pairs and labelled answers, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from src.common.formatting import counted
from src.data.answer_example import prompt_length
from src.data.dataset import Document
from src.data.examples import Examples
from src.data.preferences import Preference, Preferences
from src.data.tokenizer import Tokenizer
from src.reporting import document_text

Shades = tuple[str, str]
# two shades for each kind of token, as parameters of terminal escape sequences
TRAINED, NOT_TRAINED, LIGHT, HEAVY, AVOIDED = (
    ("30;42", "30;102"),
    ("90", "37"),
    ("30;43", "30;103"),
    ("30;45", "30;105"),
    ("30;41", "30;101"),
)
SHOWN_TOKENS = 600


def spread_places(count: int, documents: Sequence) -> list[int]:
    """Choose the numbers of at most `count` documents, evenly spread over the data."""
    spread = np.linspace(0, len(documents) - 1, min(count, len(documents)))
    return np.unique(spread.astype(int)).tolist()


def parts_of_example(row: Document | Preference, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Split a document or an example into texts with their weights; a rejected answer has negative ones."""
    if not isinstance(row, Preference):
        return document_text.parts_of(shortened(row), tokenizer)
    prompt = Document(row.prompt, np.zeros(len(row.prompt), np.float32))
    parts = document_text.parts_of(shortened(prompt), tokenizer)
    for answer, is_chosen in zip(row.answers, row.chosen):
        begin, sign = prompt_length(answer), 1 if is_chosen else -1
        after = shortened(Document(answer.ids[begin:], answer.weights[begin:]))
        parts += [(text, sign * weight) for text, weight in document_text.parts_of(after, tokenizer)]
    return parts


def shortened(row: Document) -> Document:
    return Document(row.ids[:SHOWN_TOKENS], row.weights[:SHOWN_TOKENS])


def coloured(row: Document, tokenizer: Tokenizer, trained: Shades = TRAINED) -> str:
    """Colour the tokens of a document: trained ones with `trained`, on yellow with a weight below 1, on
    magenta with a weight above 1."""
    pieces, decoder, shade = [], tokenizer.decoder(), 0
    if document_text.begins_silently(row, tokenizer):
        pieces, shade = [f"\x1b[{NOT_TRAINED[shade]}m␂\x1b[0m"], 1
    ended = len(row.ids) - (
        len(tokenizer.eod) if tuple(row.ids[-len(tokenizer.eod) :].tolist()) == tuple(tokenizer.eod) else 0
    )
    for token, weight in zip(row.ids[: min(ended, SHOWN_TOKENS)].tolist(), row.weights.tolist()):
        # a part of a character is shown with the token that completes it
        if text := decoder.push(token):
            colour, shade = colours_of(weight, trained)[shade], 1 - shade
            # colours end before a line break, else the terminal would fill the rest of the line
            pieces.append(
                "\n".join(f"\x1b[{colour}m{part}\x1b[0m" for part in text.replace("\n", "⏎\n").split("\n"))
            )
    if len(row.ids) > SHOWN_TOKENS:
        pieces.append(f"{decoder.flush()} ... ({len(row.ids)} tokens)")
    elif ended < len(row.ids):
        pieces.append(f"{decoder.flush()}\x1b[{colours_of(row.weights[-1], trained)[shade]}m␃\x1b[0m")
    return "\n".join(f"    | {line}" for line in "".join(pieces).split("\n"))


def colours_of(weight: float, trained: Shades) -> Shades:
    """Return the two shades of tokens with this weight in the loss."""
    if weight in (0, 1):
        return trained if weight else NOT_TRAINED
    return LIGHT if weight < 1 else HEAVY


def shown(row: Document, tokenizer: Tokenizer, plain: bool, trained: Shades = TRAINED) -> str:
    """Write a document as text: trained parts between « and » if `plain`, else in colours."""
    return document_text.sample(row, tokenizer, 2000) if plain else coloured(row, tokenizer, trained)


def sample_lines(documents: Examples, i: int, tokenizer: Tokenizer, plain: bool) -> list[str]:
    """Show document or example i, with a line about it."""
    row = documents[i]
    if isinstance(row, Preference):
        return _example_lines(documents, i, tokenizer, plain)
    about = f"document {i + 1} of {len(documents)}, {len(row.ids)} tokens, {row.targets} trained:"
    return [about, shown(row, tokenizer, plain)]


def _example_lines(examples: Preferences, i: int, tokenizer: Tokenizer, plain: bool) -> list[str]:
    """Show the prompt of an example, and the compared part of each of its answers."""
    example = examples[i]
    lines = [f"{examples.word} {i + 1} of {len(examples)}, {example.inputs} tokens of a row; the prompt:"]
    prompt = Document(example.prompt, np.zeros(len(example.prompt), np.float32))
    lines.append(shown(prompt, tokenizer, plain))
    for answer, is_chosen in zip(example.answers, example.chosen):
        begin = prompt_length(answer)
        words = "chosen" if is_chosen else "rejected"
        if not examples.paired:
            words = f"completion, label {str(is_chosen).lower()}"
        lines.append(f"  {words}, {counted(answer.targets, 'token')} compared:")
        after = Document(answer.ids[begin:], answer.weights[begin:])
        lines.append(shown(after, tokenizer, plain, TRAINED if is_chosen else AVOIDED))
    return lines
