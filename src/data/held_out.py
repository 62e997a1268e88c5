"""Held-out documents, which are not trained on, and the questions that samples answer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import progress

from ..common.first_process import is_first_process
from ..common.formatting import counted
from ..config import Config
from .batches import pack
from .bos import begins_with
from .dataset import Document
from .encode import Encoder
from .examples import Examples
from .preferences import Preference

Batch = list[list[Document]] | list[list[Preference]]  # rows
EVALUATION = 0.1  # the share of a run's time that all its evaluations may take; time is counted in tokens
FORWARD = 1 / 3  # the time of a token without a backward pass, as a share of a trained token's time
SAMPLE_CHARACTERS = 300  # characters of a sample answer that are kept
SAMPLE_TOKENS = 300  # the most tokens of a sample answer; a character may take more than one
# Tokens of a sample answer that a plan counts with. SAMPLE_CHARACTERS are about 75 World tokens in English
# and 200 in Chinese.
USUAL_SAMPLE_TOKENS = 100


def hold_out(
    config: Config, documents: Examples, load: Callable[[str], Examples]
) -> tuple[Examples, Examples]:
    """Split into (documents to train on, documents held out); they may be preferences or questions.

    The documents of --eval_file are held out, or the share --eval_split of `documents`; without either, none.
    --eval_split keeps the documents of one conversation together. A document that is in both, word for word,
    is held out. Of preferences and questions the prompt decides, so that those with one prompt stay together.
    The choice depends on the documents' own content and the seed, so that it is the same in every process and
    in a resumed run. Raises UserError where either side would be left without a trained token.
    """
    if not config.eval_file and not config.settled().eval_split:
        return documents, documents.take(np.zeros(0, np.int64))
    keys = _keys(documents.held_out_by(), documents, config.random_seed)
    if config.eval_file:
        source, held = config.eval_file, load(config.eval_file)
        is_held = np.isin(keys, _keys(held.held_out_by(), held, config.random_seed))
    else:
        source = f"--eval_split {config.eval_split} of {config.data_file}"
        of_conversations = _conversation_keys(keys, documents)
        chosen = np.sort(of_conversations)[: max(1, round(config.eval_split * len(keys)))]
        is_held = np.isin(of_conversations, chosen)
        # hold out exact copies of held-out documents, too, such as the first turn of another conversation
        is_held |= np.isin(keys, keys[is_held])
        held = documents.take(np.flatnonzero(is_held))
    trained = np.flatnonzero(~is_held)
    rest = documents.take(trained)
    if not rest.targets:
        others = ", and the others have no trained token" if len(trained) else ""
        if documents.by_prompt and len(np.unique(keys)) == 1:
            others = ", as all have one prompt, by which they are held out"
        raise UserError(
            f"{source}: nothing is left to train on; {len(keys) - len(trained)} of"
            f" {counted(len(keys), documents.word)} of {config.data_file} would be held out{others}"
        )
    if not held.targets:
        raise UserError(f"{source}: none of the {len(held)} held-out {held.word}s has a trained token")
    return rest, held


def _keys(parts: Iterable[np.ndarray], examples: Examples, seed: int) -> np.ndarray:
    """Make (n,) keys of 16 bytes for these parts of the examples: equal for equal tokens, else random."""
    key, names, count = seed.to_bytes(8, "little"), f"{examples.word}s", len(examples)
    watched = progress(parts, f"choosing held-out {names}", count, unit=names, shown=is_first_process())
    digests = (hashlib.blake2b(part, digest_size=16, key=key).digest() for part in watched)
    return np.fromiter(digests, "S16", count)


def _conversation_keys(keys: np.ndarray, documents: Examples) -> np.ndarray:
    """Make the keys of documents, where those of one conversation have one key in common."""
    if documents.conversation is None:
        return keys
    keys = keys.copy()
    places = np.argsort(documents.conversation, kind="stable")
    # the -1 of documents that are no part of a conversation come first
    starts = np.flatnonzero(np.diff(documents.conversation[places], prepend=-1))
    for members in np.split(places, starts)[1:]:
        keys[members] = hashlib.blake2b(b"".join(keys[members]), digest_size=16).digest()
    return keys


def evaluations(steps: int, eval_steps: int) -> int:
    """Count the evaluations of a run of `steps` steps: first, every eval_steps, and last."""
    return 2 + ((steps - 1) // eval_steps if eval_steps else 0)


def in_hash_order(held_out: Examples, seed: int) -> np.ndarray:
    """Order the places of the documents with a trained token by their content alone."""
    places = np.flatnonzero(held_out.target_counts)
    chosen = held_out.take(places)
    keys = _keys(chosen.contents(), chosen, seed)
    return places[np.argsort(keys, kind="stable")]


def paid_for(costs: np.ndarray, budget: float) -> int:
    """Count the items, from the first on, of these costs (n,) that a budget pays for; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(costs), budget, side="right")))


def evaluation_rows(
    held_out: Examples, ctx_len: int, micro_bsz: int, random_seed: int
) -> list[list[list[int]]]:
    """Make batches of micro_bsz packed rows, the longest first, so that memory runs out at once if it does.

    A row is the places of its documents.
    """
    lengths = (held_out.lengths - 1).tolist()
    packed = pack(lengths, ctx_len, random_seed)
    rows = sorted(packed, key=lambda row: -sum(lengths[i] for i in row))
    return [rows[at : at + micro_bsz] for at in range(0, len(rows), micro_bsz)]


def evaluation_batches(held_out: Examples, ctx_len: int, micro_bsz: int, random_seed: int) -> list[Batch]:
    """Return the documents of evaluation_rows()."""
    batches = evaluation_rows(held_out, ctx_len, micro_bsz, random_seed)
    return [[[held_out[i] for i in row] for row in rows] for rows in batches]


@dataclasses.dataclass(frozen=True)
class SampleQuestion:
    """Tokens before an answer, and those of the reference answer."""

    prompt: list[int]
    answer: list[int]
    is_text: bool = False  # the halves of a text, and no question


def questions(held_out: Examples, count: int, encoder: Encoder) -> list[SampleQuestion]:
    """Choose the questions for samples: the first `count` documents, up to their last answer.

    A conversation of several documents gives the first one. Preferences give preferred answers, one a prompt.
    A document that is trained as a whole but for its BOS is asked with its first half. The encoder
    is the one that made the documents.
    """
    eod = tuple(encoder.tokenizer.eod)
    chosen: list[SampleQuestion] = []
    conversations: set[int] = set()
    for i, document in enumerate(held_out.to_ask(count)):
        if len(chosen) == count:
            break
        conversation = -1 if held_out.conversation is None else int(held_out.conversation[i])
        if conversation in conversations:
            continue
        ids = document.ids.tolist()
        end = len(ids) - (len(eod) if tuple(ids[-len(eod) :]) == eod else 0)
        answers = encoder.answers(document.weights)
        trained = np.flatnonzero(answers[:end])
        if not len(trained):
            continue
        last = int(trained[-1]) + 1
        text = len(encoder.bos) if begins_with(document.ids, encoder.bos) else 0
        before = np.flatnonzero(~answers[text:last])
        start = text + (int(before[-1]) + 1 if len(before) else (last - text) // 2)
        if start > text:
            chosen.append(SampleQuestion(ids[:start], ids[start:last], not len(before)))
            conversations |= {conversation} - {-1}
    return chosen
