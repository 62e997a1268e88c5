"""Text of a document for people, in the plan and in the preview: its trained parts stand between marks."""

from __future__ import annotations

from ..data.answer_example import prompt_length
from ..data.bos import begins_with
from ..data.dataset import Document
from ..data.preferences import Preference
from ..data.questions import Question

SAMPLE = 80  # characters of each part of short_sample()


def sample(row: Document, tokenizer, limit: int = 600) -> str:
    """Decode a document, its trained parts between the marks. A weight that is not 1 follows them."""
    text = "".join(marked(part, weight) for part, weight in parts_of(row, tokenizer))
    shown = text if len(text) <= limit else f"{text[:limit]} ... ({len(row.ids)} tokens)"
    return "\n".join(f"    | {line}" for line in shown.splitlines())


def marked(part: str, weight: float) -> str:
    """Put a part of a document between the marks, if it is trained."""
    times = "" if weight in (0, 1) else f"×{weight:g}"
    return f"«{part}»{times}" if weight else part


def short_sample(row: Document, tokenizer) -> str:
    """Write a document's beginning and its first part of the largest weight, on one line with a mark between.

    Of each it shows the SAMPLE characters that are next to the mark.
    """
    shown, largest = "", float(row.weights.max())
    for part, weight in parts_of(row, tokenizer):
        line = "⏎".join(part.splitlines())
        if weight == largest:
            begin = line if len(line) <= SAMPLE else f"{line[:SAMPLE]} ..."
            shown += marked(begin, weight)
            break
        shown += line if len(line) <= SAMPLE else f"... {line[-SAMPLE:]}"
    alike = set(row.weights.tolist()) <= {0.0, largest}
    return f"{shown} (« » is what {'is trained' if alike else 'weighs most in the loss'})"


def short_example(example: Document | Preference | Question, tokenizer) -> str:
    """Write short_sample() of a document, or the prompt with its answers, on one line."""
    if isinstance(example, Document):
        return short_sample(example, tokenizer)
    if isinstance(example, Question):
        prompt, right = ("⏎".join(text.splitlines()) for text in (example.prompt, str(example.answer)))
        prompt = prompt if len(prompt) <= SAMPLE else f"... {prompt[-SAMPLE:]}"
        return f"{prompt} (right: {right if len(right) <= SAMPLE else f'{right[:SAMPLE]} ...'})"
    shown, ends = "", []
    for answer in example.answers:
        begin = prompt_length(answer)
        prompt, compared = (
            Document(answer.ids[part], answer.weights[part]) for part in (slice(0, begin), slice(begin, None))
        )
        line = one_line(prompt, tokenizer)
        shown = line if len(line) <= SAMPLE else f"... {line[-SAMPLE:]}"
        line = one_line(compared, tokenizer)
        ends.append(f"«{line if len(line) <= SAMPLE else f'{line[:SAMPLE]} ...'}»")
    if len(ends) == 1:
        return f"{shown}{ends[0]} ({'to be' if example.chosen[0] else 'not to be'} preferred)"
    return f"{shown}{ends[0]} rather than {ends[1]}"


def one_line(row: Document, tokenizer) -> str:
    """Write all of a document on one line."""
    return "⏎".join("".join(part for part, _ in parts_of(row, tokenizer)).splitlines())


def example_sample(example: Document | Preference | Question, tokenizer) -> str:
    """Write sample() of a document or of each compared answer; a question with its reference answer."""
    if isinstance(example, Document):
        return sample(example, tokenizer)
    if isinstance(example, Question):
        return "\n".join(
            f"    | {line}" for line in f"{example.prompt}\nright: {example.answer}".splitlines()
        )
    names = {True: "chosen", False: "rejected"}
    shown = [
        f"    {names[chosen]}:\n{sample(answer, tokenizer)}"
        for answer, chosen in zip(example.answers, example.chosen)
    ]
    return "\n".join(shown)


def parts_of(row: Document, tokenizer) -> list[tuple[str, float]]:
    """Split a document's text into pieces with their weights. Invisible characters have a sign."""
    parts: list[tuple[str, float]] = []
    decoder = tokenizer.decoder()
    text, inside = "␂" if begins_silently(row, tokenizer) else "", float(row.weights[0])
    for token, weight in zip(row.ids.tolist(), row.weights.tolist(), strict=True):
        if weight != inside:
            parts.append((text + decoder.flush(), inside))
            text, inside = "", weight
        text += decoder.push(token)
    parts.append((text + decoder.flush() + ("␃" if ends_silently(row, tokenizer) else ""), inside))
    # a NUL, the end of document of bytes and utf16, would make a log a binary file
    return [(part.replace("\0", "␀"), weight) for part, weight in parts]


def begins_silently(row: Document, tokenizer) -> bool:
    """Tell whether a document begins with a textless end of document, as World's, which is its --bos."""
    end = tuple(tokenizer.eod)
    return begins_with(row.ids, end) and len(row.ids) > len(end) and not tokenizer.decode(end)


def ends_silently(row: Document, tokenizer) -> bool:
    """Tell whether a document ends with an end of document that has no text, as World's."""
    end = list(tokenizer.eod)
    return row.ids[-len(end) :].tolist() == end and not tokenizer.decode(end)
