"""Held-out documents: which they are, the questions and batches that are made of them, and that a look at the
model leaves no trace.
"""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

from rwkv_miss import UserError
from src.config import Config
from src.data.dataset import Document, Documents, load_documents
from src.data.encode import Encoder
from src.data.held_out import evaluation_batches, hold_out, questions
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.planning.draft import Draft
from src.planning.plan import read_data
from src.sources.policy import undisturbed

from .conftest import write_rows

BYTES = load_tokenizer("bytes", 256, "")


def document(text, trained=None):
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    return Document(ids, np.ones(len(ids), bool) if trained is None else np.array(trained, bool))


def texts(documents):
    return [bytes(row.ids.tolist()).decode() for row in documents]


def test_a_share_is_held_out_by_content():
    rows = [document(f"document {i}") for i in range(200)]
    rows += rows[:50]  # both copies of a document are on one side
    config = Config(eval_split=0.1, random_seed=5)
    train, held = hold_out(config, Documents(rows), None)
    assert len(train) + len(held) == 250 and 25 <= len(held) <= 26
    assert not set(texts(train)) & set(texts(held))
    shuffled = random.Random(0).sample(rows, len(rows))
    again = hold_out(config, Documents(shuffled), None)[1]
    assert sorted(texts(again)) == sorted(texts(held))
    assert texts(held) == [text for text in texts(Documents(rows)) if text in set(texts(held))]
    other = hold_out(dataclasses.replace(config, random_seed=6), Documents(rows), None)[1]
    assert set(texts(other)) != set(texts(held))
    assert len(hold_out(dataclasses.replace(config, eval_split=1e-9), Documents(rows[:50]), None)[1]) == 1
    assert not hold_out(Config(), Documents(rows), None)[1]
    for few in (rows[:1], [document("same")] * 4):
        with pytest.raises(UserError, match="nothing is left to train on; .* would be held out$"):
            hold_out(dataclasses.replace(config, eval_split=0.5), Documents(few), None)
    rows = Documents([document(text * 2, [0, 0]) for text in "abcdef"] + [document("trained")])
    with pytest.raises(UserError, match="none of the 3 held-out documents has a trained token"):
        hold_out(Config(eval_split=0.4, random_seed=0), rows, None)
    with pytest.raises(
        UserError, match="nothing is left to train on; 3 of 7 .*, and the others have no trained token"
    ):
        hold_out(Config(eval_split=0.4, random_seed=2), rows, None)


def test_an_evaluation_file_takes_its_documents_out_of_the_training(tmp_path):
    for name, letters in (("rows", "abcdef"), ("held", "xbyd")):
        write_rows(tmp_path / name, ({"text": letter * 5} for letter in letters))
    config = Config(data_file=str(tmp_path / "rows"), eval_file=str(tmp_path / "held"))
    read = read_data(Draft(config), BYTES, DEFAULT)
    train, held = read.documents, read.held_out
    assert (
        f"left out   2 documents of {config.data_file}, word for word in {config.eval_file} too"
        in read.found.lines()
    )
    assert [text[0] for text in texts(held)] == list("xbyd")
    assert [text[0] for text in texts(train)] == list("acef")


def test_what_is_cut_is_counted_on_the_side_where_it_is(tmp_path):
    """Conversations of which every other one is cut, and long texts whose parts may fall on both sides."""
    rows = [{"prompt": f"{i:02}", "completion": "b" * (7 + 20 * (i % 2))} for i in range(20)] + [
        {"text": "".join(random.Random(letter).choices(letter + letter.upper(), k=40))} for letter in "vwxyz"
    ]
    write_rows(tmp_path / "rows", rows)
    whole = load_documents(str(tmp_path / "rows"), BYTES, 9)
    assert (whole.cut, whole.cut_tokens, whole.split) == (10, 200, 5)
    train, held = hold_out(Config(data_file=str(tmp_path / "rows"), eval_split=0.3), whole, None)
    for side in (train, held):
        conversations = [text for text in texts(side) if "b" in text]
        assert side.cut == sum(int(text[:2]) % 2 for text in conversations) > 0
        assert side.cut_tokens == 20 * side.cut
        assert side.split == len({text[0].lower() for text in texts(side) if text[0].isalpha()}) > 1


@pytest.mark.parametrize(
    "text, trained, prompt, answer",
    [
        ("Q: 1\n\nA: 2\n\nQ: 3\n\nA: 4\0", "________####________###", "Q: 1\n\nA: 2\n\nQ: 3\n\nA:", " 4"),
        ("Q: 1\n\nA: 23", "________###", "Q: 1\n\nA:", " 23"),  # cut: the end of document is missing
        ("Q: 1\n\nA: 2, good.\0", "________##_______#", "Q: 1\n\nA:", " 2"),
        ("trained as one\0", "###############", "trained", " as one"),
    ],
)
def test_a_question_is_what_stands_before_the_last_answer(text, trained, prompt, answer):
    trained = [letter == "#" for letter in trained]
    useless = [document("\0"), document("no answer\0", [0] * 9 + [1]), document("x\0")]
    [found] = questions(
        Documents([*useless, document(text, trained[: len(text)])] + [document("more\0")]), 1, Encoder(BYTES)
    )
    assert (bytes(found.prompt).decode(), bytes(found.answer).decode()) == (prompt, answer)


def test_every_document_is_evaluated_once_the_longest_first():
    held = Documents([document(str(i) * (1 + 7 * i % 23)) for i in range(10, 40)])
    batches = evaluation_batches(held, ctx_len=50, micro_bsz=3, random_seed=42)
    rows = itertools.chain.from_iterable(batches)
    evaluated = Documents([*itertools.chain.from_iterable(rows)])
    assert sorted(texts(evaluated)) == sorted(texts(held))
    widths = [sum(len(row.ids) - 1 for row in documents) for rows in batches for documents in rows]
    assert widths == sorted(widths, reverse=True) and max(widths) <= 50
    assert all(len(rows) == 3 for rows in batches[:-1])


def test_a_look_at_the_model_leaves_no_trace():
    model = torch.nn.Sequential(
        torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
    )
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), undisturbed(model, torch.device("cpu")):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
