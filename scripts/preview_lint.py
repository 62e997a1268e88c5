"""Lint of training data, for scripts.preview: likely mistakes, found by reading all rows."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np

from src.common.formatting import counted
from src.data.chat_template import begins_thoughts, thoughts_of, weight_of
from src.data.encode import Encoder, Tokens, tokens_of
from src.data.encode_answers import conversations, labels_of
from src.data.formats import PAIRS, SFT, place_of
from src.data.rwkv_template import FLOWER, FLOWERS, HEADINGS, OTHER_FLOWER, ROLES, TURN_END, RwkvTemplate

CHAT_FORM = re.compile(r"(?:System|User): ?[^\n]")
FLOWER_FORM = re.compile(rf"(?:System|User){FLOWER}")
HEADING_FORM = re.compile(r"### (?:System|User)\n")
GLUED = re.compile(r"[A-Za-z.!:][A-Za-z]")  # last letter of a prompt and first of its answer, without a space
TURN = re.compile(rf"({'|'.join(ROLES.values())}):")

# finding -> its meaning
MEANINGS = {
    "bad row": "cannot be used; train.py stops there, or leaves it out with --on_bad_row skip",
    "rows in a cell": (
        "a cell of CSV between double quotes holds lines that look like rows; close its quote where it ends,"
        ' or write "" for a quote in a cell'
    ),
    "empty answer": "there are no words to learn, so the row is left out",
    "blank line": (
        "inside a turn that is not the assistant's; it becomes a single newline, because a blank line ends a"
        " turn"
    ),
    "flower": (
        f"{FLOWER} inside a turn that is not the assistant's; it becomes {OTHER_FLOWER}, because {FLOWER}"
        " ends a turn"
    ),
    "blank line in text": (
        "a text in chat form with a blank line inside a turn that is not the assistant's, which is where a"
        " turn ends"
    ),
    "trained question": (
        "a text in chat form is trained as a whole, questions included; --loss_mask Assistant:,"
        f" {FLOWERS.ask} where flowers end the turns, or {HEADINGS.ask!r} where they have headings, trains"
        " the answers alone"
    ),
    "bare question": (
        "a raw prompt that looks like a question; texts under prompt go on as they are, without User: and"
        " Assistant:, which a chat writes around them; name the column question, or give messages"
    ),
    "open thoughts": "an answer opens <think> and never closes it",
    "no thoughts": "an answer without thoughts; the template writes an empty <think></think>",
    "lost thoughts": (
        "the template does not write an answer's thoughts, so they are not learned; choose another"
        " --template, or name them as it does: reasoning_content, reasoning, or <think> in the content"
    ),
    "asked otherwise": (
        "an answer without thoughts; the template asks for it with a tag that it does not write before it, so"
        " that a chat asks otherwise than was trained; give the answers thoughts, or take the tag out of what"
        " asks"
    ),
    "broken text": "U+FFFD, which stands where bytes were no text",
    "only the end": "nothing is trained but the end of the document",
    "cut": "a conversation is longer than --ctx_len and loses its end",
    "no target": "no token within --ctx_len is trained, so it teaches nothing",
    "too long": (
        "a pair, an answer with a label, or a question with an answer of --max_tokens takes more tokens than"
        " --ctx_len of a row, and is left out; both answers of a pair lie in one row"
    ),
    "left out": (
        "half of the rows or more teach nothing, as answers are empty or equal; look at what wrote them"
    ),
    "nothing asked": "the question or its reference answer is empty; the row is left out",
    "long answer": "the reference answer has more tokens than --max_tokens, so no rollout can equal it",
    "unrewarded": "the reference answer does not get the full reward, so perhaps no rollout can",
    "duplicate": "a copy of an earlier row",
    "other answer": "an earlier row asks the same and has another reference answer",
    "contradiction": (
        "an earlier row has another answer to the same prompt, or prefers the other one; if not both are"
        " good, take one row out"
    ),
    "held out": "a held-out row is in the training data too, word for word, and is left out there",
    "known prompt": (
        "a held-out row asks what a row of the training data asks, word for word; of preferences these"
        " rows of the training data are left out"
    ),
}


@dataclasses.dataclass
class Finding:
    """Finding: `count` records with a possible mistake, and the place of the first one."""

    name: str
    count: int
    first: str

    def __str__(self) -> str:
        return f"{self.name}, {counted(self.count, 'row')}: {MEANINGS[self.name]}; first: {self.first}"


def for_machines(findings: Iterable[Finding]) -> list[dict]:
    """Return findings for --json."""
    return [{**dataclasses.asdict(finding), "meaning": MEANINGS[finding.name]} for finding in findings]


class Lint:
    """Collector of findings, record by record."""

    def __init__(self, encoder: Encoder, ctx_len: float, rows: str = SFT):
        self.encoder, self.ctx_len, self.rows = encoder, ctx_len, rows
        self.found: dict[str, Finding] = {}
        # arrays from which tokens() makes Tokens, in order
        self.documents: list[tuple[np.ndarray, np.ndarray]] = []  # (ids, weights)
        self.texts: list[bool] = []
        self.begins: list[bool] = []
        self.labels: list[int] = []
        self.places: list[int] = []
        self.seen: set[bytes] = set()
        self.prompts: set[bytes] = set()
        self.answers: dict[bytes, bytes] = {}  # prompt -> its first answer, both hashed

    def note(self, name: str, where: str, count: int = 1) -> None:
        finding = self.found.setdefault(name, Finding(name, 0, where))
        finding.count += count

    def tokens(self) -> Tokens:
        """Return the documents of the records looked at since the last call."""
        tokens = tokens_of(self.documents, self.texts, self.begins, self.labels, self.places)
        for of_each in (self.documents, self.texts, self.begins, self.labels, self.places):
            of_each.clear()
        return tokens

    def look(self, where: str, record: dict) -> None:
        """Encode a record and note its oddities. Raises UserError for a record that cannot be encoded."""
        documents = self.encoder.encode(record)
        labels = labels_of(record, len(documents))
        self.documents += documents
        self.texts += [self.encoder.is_text(record)] * len(documents)
        self.begins += [True] + [False] * (len(documents) - 1)
        self.labels += labels
        self.places += [place_of(where)[1]] * len(documents)
        names = [*_odd_words(record, self.encoder)]
        if _key(documents, labels) in self.seen:
            names.append("duplicate")
        if any(labels):
            if _opposite(documents, labels) in self.seen:
                names.append("contradiction")
            if self.rows == PAIRS:
                inputs = sum(len(ids) - 1 for ids, _ in documents)
            else:
                inputs = max(len(ids) - 1 for ids, _ in documents)
            if inputs > self.ctx_len:
                names.append("too long")
        elif any(self.answers.setdefault(asked, said) != said for asked, said in _answers(record)):
            names.append("contradiction")
        for ids, weights in documents:
            names += self._odd_tokens(record, ids, weights)
        for name in dict.fromkeys(names):
            self.note(name, where)
        self.seen.add(_key(documents, labels))
        self.prompts.add(self._prompt_key(*documents[0]))

    def _odd_tokens(self, record: dict, ids: np.ndarray, weights: np.ndarray) -> Iterator[str]:
        if "\ufffd" in self.encoder.tokenizer.decode(ids.tolist()):
            yield "broken text"
        if np.count_nonzero(self.encoder.answers(weights)) <= len(self.encoder.tokenizer.eod):
            yield "only the end"
        if self.rows == SFT and len(ids) > self.ctx_len + 1 and not self.encoder.is_text(record):
            yield "cut"
            if not weights[1 : int(self.ctx_len) + 1].any():
                yield "no target"

    def compare(self, where: str, record: dict) -> None:
        """Note if a record of the held-out data is among the records looked at."""
        documents = self.encoder.encode(record)
        if _key(documents, labels_of(record, len(documents))) in self.seen:
            self.note("held out", where)
        elif self._prompt_key(*documents[0]) in self.prompts:
            self.note("known prompt", where)

    def _prompt_key(self, ids: np.ndarray, weights: np.ndarray) -> bytes:
        """Hash the text before the first answer, or the whole text if it begins with an answer."""
        start = len(self.encoder.bos)
        first = int(self.encoder.answers(weights)[start:].argmax())
        return _hash(ids[: start + first] if first else ids)

    @property
    def findings(self) -> list[Finding]:
        """Return the findings in the order of MEANINGS."""
        return [self.found[name] for name in MEANINGS if name in self.found]


def _answers(record: dict) -> Iterator[tuple[bytes, bytes]]:
    """Yield hashes of (the text before, the answer) for each trained answer, without thoughts."""
    if "prompt" in record:
        yield _digest(record["prompt"].encode()), _digest(record["completion"].strip().encode())
    before = hashlib.blake2b(repr(record.get("tools")).encode(), digest_size=16)
    for message in record.get("messages", ()):
        said = repr((message["role"], thoughts_of(message)[1], message.get("tool_calls"))).encode()
        if message["role"] == "assistant" and weight_of(message):
            yield before.digest(), _digest(said)
        before.update(said)


def _odd_words(record: dict, encoder: Encoder) -> Iterator[str]:
    """Yield names of findings about a record's text."""
    if "text" in record:
        yield from _odd_text(record["text"], encoder)
    if "prompt" in record and ("chosen" in record or "label" in record):
        answer = record.get("chosen") or record["completion"]
        if _is_bare_question(record["prompt"], answer):
            yield "bare question"
    for context, turns in conversations(record):
        yield from _odd_turns([*context, *turns], len(context), record, encoder)


def _odd_turns(messages: list[dict], first: int, record: dict, encoder: Encoder) -> Iterator[str]:
    """Yield names of findings about turns; answers from turn number `first` on are trained."""
    for i, message in enumerate(messages):
        content = message.get("content") or ""
        if message["role"] == "assistant" and i >= first:
            yield from _odd_answer(message, content, encoder)
            # an answer with weight 0 would teach no thoughts in any case
            if weight_of(message) and encoder.template.drops_thoughts(messages[: i + 1], record.get("tools")):
                yield "lost thoughts"
        elif message["role"] != "assistant" and isinstance(encoder.template, RwkvTemplate):
            if "\n\n" in content.replace("\r\n", "\n").strip():
                yield "blank line"
            if encoder.template.form.end and encoder.template.form.end in content:
                yield "flower"


def odd_question(record: dict, encoder: Encoder) -> set[str]:
    """Return the names of findings about a record's question alone."""
    if "prompt" in record:
        return {"bare question"} if _is_bare_question(record["prompt"], record["completion"]) else set()
    prompt = [message for message in record["messages"][:-1] if message["role"] != "assistant"]
    return set(_odd_turns(prompt, 0, record, encoder))


def _is_bare_question(prompt: str, answer: str) -> bool:
    """Tell whether a prompt outside of a chat is a question, or its answer can't follow without a space."""
    if TURN.search(prompt) or any(mark in prompt for mark in (FLOWER, "### ", "<|")):
        return False
    return prompt.rstrip().endswith(("?", "？")) or bool(GLUED.match(prompt[-1] + answer[:1]))


def _odd_text(text: str, encoder: Encoder) -> Iterator[str]:
    """Yield names of findings about a text that is written as a chat."""
    forms = ((FLOWER_FORM, FLOWERS), (HEADING_FORM, HEADINGS))
    if any(begin.match(text) and form.between + form.ask in text for begin, form in forms):
        if encoder.loss_mask == "assistant":
            yield "trained question"
    if not CHAT_FORM.match(text) or f"{TURN_END}{ROLES['assistant']}:" not in text:
        return
    if encoder.loss_mask == "assistant":
        yield "trained question"
    turn = ""
    for part in text.split(TURN_END):
        if match := TURN.match(part):
            turn = match[1]
        elif turn != ROLES["assistant"]:
            yield "blank line in text"


def _odd_answer(message: dict, content: str, encoder: Encoder) -> Iterator[str]:
    if "<think>" in content and "</think>" not in content:
        yield "open thoughts"
    elif encoder.template.asked_only and not thoughts_of(message)[0]:
        yield "asked otherwise"
    elif begins_thoughts(encoder.template.opening) and not thoughts_of(message)[0]:
        yield "no thoughts"


def _key(documents: list[tuple[np.ndarray, np.ndarray]], labels: list[int]) -> bytes:
    return _hash(np.concatenate([*(ids for ids, _ in documents), np.array(labels, np.int32)]))


def _opposite(documents: list[tuple[np.ndarray, np.ndarray]], labels: list[int]) -> bytes:
    """Hash the same row with the other answer preferred."""
    if len(documents) == 2:
        return _key(documents[::-1], labels)
    return _key(documents, [-label for label in labels])


def _hash(ids: np.ndarray) -> bytes:
    return _digest(ids.tobytes())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
