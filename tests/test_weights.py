"""Weights of tokens in the loss: which token gets which, and what a loss is with them."""

import json

import numpy as np
import pytest
import torch

import rwkv_miss
from rwkv_miss.errors import UserError
from src.common.token_loss import L2WRAP, loss_sum
from src.config import Config, settle
from src.config.validate import check_data
from src.data.collate import collate
from src.data.dataset import Document, Documents, load
from src.data.encode import Encoder
from src.data.held_out import questions
from src.data.rwkv_template import MODES
from src.data.templates import load_template
from src.data.thoughts import thought_spans
from src.data.tokenizer import load_tokenizer
from src.model import RWKV, rwkv
from src.model import loss as losses
from src.model.loss import head_loss
from src.reporting import document_text
from src.sources import source_of
from src.training.short_runs import held_out_loss, put_back, train

from .conftest import make_arch, random_tensors, write_rows
from .test_data import assistant, user

BYTES, WORLD = load_tokenizer("bytes", 256), load_tokenizer("world", 65536)


def weighed(tokenizer, record, *template, **settings):
    """The document of a record in runs of one weight, as the preview has it."""
    encoder = Encoder(tokenizer, *template, **settings)
    [document] = encoder.encode(record)
    parts = document_text.parts_of(Document(*document), tokenizer)
    return [(text, round(weight, 6)) for text, weight in parts]


# which token has which weight


def test_an_answer_has_its_weight_with_the_end_of_its_turn_and_of_the_document():
    turns = [user("a"), {**assistant("b"), "weight": 2.5}, user("c"), {**assistant("d"), "weight": 0}]
    turns += [user("e"), {**assistant("f"), "weight": 0.5}]
    assert weighed(BYTES, {"messages": turns}) == [
        ("User: a\n\nAssistant:", 0),
        (" b\n\n", 2.5),
        ("User: c\n\nAssistant: d\n\nUser: e\n\nAssistant:", 0),
        (" f␀", 0.5),
    ]
    # the end of a document is trained where the answer before it is context only, as it always was
    assert weighed(BYTES, {"messages": [user("a"), {**assistant("b"), "weight": 0}]})[-1] == ("␀", 1)


def test_prompts_have_the_prompt_weight_and_answers_without_loss_have_none():
    turns = [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")]
    assert weighed(BYTES, {"messages": turns}, bos=(33,), prompt_weight=0.1) == [
        ("!", 0),
        ("User: a\n\nAssistant:", 0.1),
        (" b\n\n", 0),
        ("User: c\n\nAssistant:", 0.1),
        (" d␀", 1),
    ]
    # no answer comes before the end of this document
    row = {"messages": [*turns, user("e")]}
    assert weighed(BYTES, row, prompt_weight=0.1)[-2:] == [("User: e", 0.1), ("␀", 1)]
    row = {"prompt": "Q", "completion": "A"}
    assert weighed(BYTES, row, prompt_weight=0.25) == [("Q", 0.25), ("A␀", 1)]
    marked = {"loss_mask": "A:", "prompt_weight": 0.25}
    for record in ({"text": "Q: 1 A: 2"}, {"ids": list(b"Q: 1 A: 2")}):
        assert weighed(BYTES, record, **marked) == [("Q: 1 A:", 0.25), (" 2␀", 1)]
    for record in ({"text": "A: 2\n\nUser:"}, {"ids": list(b"A: 2\n\nUser:")}):
        assert weighed(BYTES, record, **marked)[-2:] == [("User:", 0.25), ("␀", 1)]


def test_without_these_settings_the_hash_is_that_of_a_mask():
    """Old checkpoints have this hash: the number is that of commit 92657c3 for these rows."""
    rows = [
        {"messages": [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")]},
        {"text": "é"},
        {"prompt": "x", "completion": "<think>y</think>z"},
    ]
    encoder = Encoder(BYTES)
    documents = Documents([Document(*encoder.encode(row)[0]) for row in rows])
    assert documents.digest == "a795edc56fc903160fac678440538a2ed1e2e514e156ef21c09456098c53fbda"
    documents.items[0].weights[-1] = 0.5
    assert Documents(documents.items).digest != documents.digest


@pytest.mark.parametrize("name", sorted(MODES))
@pytest.mark.parametrize("tokenizer", [BYTES, WORLD])
def test_thoughts_are_weighed_in_every_mode(name, tokenizer):
    """Thoughts are what lies inside of the tags; a token that reaches into a tag is none of them."""
    template = load_template(name)
    has_place = "</think" not in template.opening
    answer = assistant("so é, 3") | ({"reasoning_content": "1+2\n\nhm 嗯"} if has_place else {})
    found = weighed(tokenizer, {"messages": [user("<think>?"), answer]}, template, think_weight=0.25)
    thoughts = "".join(text for text, weight in found if weight == 0.25)
    text = "".join(text for text, weight in found)
    begun = template.opening.rpartition("<think>")[2] if template.opening.startswith(" <think>") else ""
    inside = text.rpartition("<think>" + begun)[2].partition("</think>")[0] if has_place else ""
    assert thoughts == inside if tokenizer is BYTES else thoughts in inside
    assert ("1+2\n\nhm 嗯" if has_place else "") in thoughts
    rest = "".join(text for text, weight in found if weight == 1)
    assert rest.rstrip("✿␀␃").endswith("so é, 3")
    assert ("</think>" in rest) == has_place and {weight for _, weight in found} <= {0, 0.25, 1}


# as Hugging Face's official template ends its question, and as others write thoughts
JINJA = (
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: OPENING{% endif %}"
)


@pytest.mark.parametrize("opening", ["", "<think", "<think>"])
@pytest.mark.parametrize("tokenizer", [BYTES, WORLD])
def test_thoughts_are_weighed_in_a_jinja_template(tmp_path, opening, tokenizer):
    path = tmp_path / "template.jinja"
    path.write_text(JINJA.replace("OPENING", opening))
    answer = {"role": "assistant", "content": " Four.", "reasoning_content": " add them ", "weight": 2}
    template = load_template(str(path), tokenizer.decode(tokenizer.eod))
    found = weighed(tokenizer, {"messages": [user("2+2"), answer]}, template, think_weight=0.25)
    assert [text for text, weight in found if weight == 0.5] == [" add them "] or tokenizer is WORLD
    assert "".join(text for text, weight in found if weight == 0.5).strip() == "add them"
    assert "</think> Four." in "".join(text for text, weight in found if weight == 2)


@pytest.mark.parametrize(
    "before, text, expected",
    [
        ("", "<think>a</think>b<think>c</think>", ["a", "c"]),
        ("Assistant: <think>嗯", "hm</think>b", ["hm"]),
        ("### Assistant\n<think>\n嗯", "hm</think>b", ["hm"]),
        ("Assistant: <th", "ink>hm</think>b", ["hm"]),
        ("Assistant: <think>\n</think", ">\nb", []),
        ("Assistant: <think></think", ">b", []),
        ("Assistant: <think", ">cut off", ["cut off"]),
        ("", " <think>cut off", ["cut off"]),
        ("", "the tag <think> in a text", []),
        ("", "<think>a</think>b <think>c", ["a"]),
        ("User: what is <think>?\n\nAssistant:", " a tag</think>", []),
        ("User✿<think>✿\nBot✿", "a tag</think>", []),
    ],
)
def test_where_thoughts_stand(before, text, expected):
    assert [text[begin:end] for begin, end in thought_spans(before, text)] == expected


def test_thoughts_in_token_ids():
    assert weighed(BYTES, {"ids": list(b"a<think>b</think>c")}, think_weight=0.5) == [
        ("a<think>", 1),
        ("b", 0.5),
        ("</think>c␀", 1),
    ]
    with pytest.raises(UserError, match="--think_weight 0.5 is looked for in text"):
        Encoder(load_tokenizer("utf16", 256), think_weight=0.5).encode({"ids": [97, 0, 98, 0]})


def test_a_sample_asks_what_stands_before_the_answer_also_where_prompts_are_trained():
    # with weight 1 nothing tells a prompt from an answer, and the first half asks
    for weight, prompt in (
        (0, "User: abc\n\nAssistant:"),
        (0.1, "User: abc\n\nAssistant:"),
        (1, "User: abc\n\n"),
    ):
        encoder = Encoder(BYTES, prompt_weight=weight)
        [document] = encoder.encode({"messages": [user("abc"), assistant("d")]})
        [found] = questions(Documents([Document(*document)]), 1, encoder)
        assert bytes(found.prompt).decode() == prompt


# mistakes


@pytest.mark.parametrize("weight", ["1", -0.5, 100.1, True, [1], 1e999, "NaN"])
def test_a_wrong_weight_is_an_error_with_file_and_row(tmp_path, weight):
    path = tmp_path / "rows.jsonl"
    rows = [[user("a"), assistant("b")], [{**user("a"), "weight": 1}, {**assistant("b"), "weight": weight}]]
    write_rows(path, ({"messages": messages} for messages in rows))
    with pytest.raises(UserError) as error:
        load(path, Encoder(BYTES))
    assert f"{path}, line 2: " in str(error.value)
    if weight != 1e999:  # JSON has no Infinity, which is said first
        assert "the weight of a message must be a number from 0, no loss, to 100, got" in str(error.value)


def test_weights_with_another_loss_mask_are_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}))
    for loss_mask in ("all", "Assistant:"):
        with pytest.raises(
            UserError, match=f"line 1: an answer has the weight 0.5, and --loss_mask {loss_mask}"
        ):
            load(path, Encoder(BYTES, loss_mask=loss_mask))
    for flags, words in (
        ({"prompt_weight": 0.1, "loss_mask": "all"}, "no meaning with --loss_mask all"),
        ({"prompt_weight": 101.0}, "must not be above 100"),
        ({"think_weight": -1.0}, "--think_weight -1.0: must"),
    ):
        with pytest.raises(UserError, match=words):
            check_data(Config(data_file="a", **flags))


# the loss


def reference(x, weight, targets, weights):
    """(loss, dx, dweight) in float64, from the formulas; L2Wrap adds to the gradient alone."""
    x, weight, weights = x.detach().double(), weight.detach().double(), weights.double()
    logits = x @ weight.t()
    rows = torch.arange(len(x))
    shares = torch.exp(logits - torch.logsumexp(logits, 1, keepdim=True))
    top, where = logits.max(1)
    dlogits = shares.clone()
    dlogits[rows, targets] -= 1
    dlogits[rows, where] += L2WRAP * top
    dlogits *= weights[:, None]
    return -(weights * shares[rows, targets].log()).sum(), dlogits @ weight, dlogits.t() @ x


def inputs(dtype, rows=13):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(rows, 11).to(dtype).requires_grad_(),
        torch.randn(31, 11).to(dtype).requires_grad_(),
    )
    return x, weight, torch.randint(31, (rows,)), torch.tensor([0.1, 3.0, 1.0, 42.5, 0.007]).repeat(3)[:rows]


# the worst of 20 seeds: 9e-16, 5e-7 and 7e-3
@pytest.mark.parametrize(
    "dtype, ratio", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1.5e-2)]
)
@pytest.mark.parametrize("form", ["all logits", "plain", "native"])
def test_loss_and_gradients_with_weights_against_float64(monkeypatch, form, dtype, ratio):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * 31)  # blocks of 5 rows
    x, weight, targets, weights = inputs(dtype)
    if form == "all logits":
        loss = loss_sum(x @ weight.t(), targets, weights)
    else:
        loss = head_loss(x, weight, targets, form == "native", weights)
    got = [loss.detach(), *(d / 2.5 for d in torch.autograd.grad(2.5 * loss, [x, weight]))]
    for name, mine, exact in zip(("loss", "dx", "dweight"), got, reference(x, weight, targets, weights)):
        assert (mine.double() - exact).norm() <= ratio * exact.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_weight_1_changes_no_bit(dtype, native):
    x, weight, targets, _ = inputs(dtype)
    found = []
    for weights in (None, torch.ones(13)):
        loss = head_loss(x, weight, targets, native, weights)
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_an_adapted_head_takes_weights(monkeypatch):
    monkeypatch.setattr(rwkv, "LOGITS_AT_ONCE", 5 * 67)
    model = RWKV(make_arch(7, n_layer=1))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "lora", ["head"], rank=4)
    x = torch.randn(13, model.arch.n_embd, requires_grad=True)
    targets, weights = torch.randint(67, (13,)), torch.rand(13)
    loss = model.loss(x, targets, weights)
    [dx] = torch.autograd.grad(loss, [x])
    exact = reference(x, model.head.weight, targets, weights)
    for name, mine, want in (("loss", loss, exact[0]), ("dx", dx, exact[1])):
        assert (mine.double() - want).norm() <= 1e-6 * want.norm(), name  # the worst of 10 seeds: 2e-7


def test_native_weights_of_a_wrong_kind_are_an_error():
    for wrong in (torch.ones(2, dtype=torch.float64), torch.ones(3)):
        with pytest.raises(ValueError, match=r"weights are torch.float\d\d .* expected torch.float32 \(2,\)"):
            torch.ops.rwkv.softmax_loss_(torch.randn(2, 5), torch.tensor([0, 1]), wrong)


def test_a_batch_has_weights_where_they_are_not_0_and_1():
    plain = Document(np.array([5, 6, 7], np.int32), np.array([0, 1, 0], np.float32))
    other = Document(np.array([8, 9, 8], np.int32), np.array([9, 0.5, 1], np.float32))
    assert collate([[plain]], 1).weights is None
    batch = collate([[plain, other], [plain]], 2.5)
    assert batch.weights.tolist() == [1, 0.5, 1, 1] and batch.step_weight == 2.5
    assert batch.where.tolist() == [0, 2, 3, 4]
    assert Documents([plain, other]).weight == 2.5 and Documents([plain, other]).targets == 3


def test_a_short_run_weighs_as_the_run_does():
    """The loss of a short run's first step, which has all rows, and that on held-out documents."""
    rng = np.random.default_rng(0)
    rows = [
        (rng.integers(1, 67, n).astype(np.int32), 5 * rng.random(n).astype(np.float32)) for n in (3, 9, 14)
    ]
    rows[1][1][2:5] = 0
    documents = Documents([Document(*row) for row in rows])
    model = RWKV(make_arch(7, n_layer=1))
    model.load_state_dict(random_tensors(model.arch))
    total = 0.0
    with torch.no_grad():
        for ids, weights in rows:
            tokens = torch.from_numpy(ids).long()
            each = torch.nn.functional.cross_entropy(
                model(tokens[None, :-1])[0][0], tokens[1:], reduction="none"
            )
            total += float((each * torch.from_numpy(weights[1:])).sum())
    want = total / sum(float(weights[1:].sum()) for _, weights in rows)
    for packing in (False, True):  # in fp32; the worst error seen is 1.2e-7
        config = Config(
            peft="none",
            precision="fp32",
            lr_init=1e-3,
            ctx_len=16,
            micro_bsz=3,
            packing=packing,
            warmup_steps=0,
            lr_schedule="cos",
        ).settled()
        assert held_out_loss(model, source_of(config), documents) == pytest.approx(want, rel=1e-6)
        with put_back(model):
            assert next(train(model, source_of(config), documents, 1)) == pytest.approx(want, rel=1e-6)


def test_the_settings_are_written_and_a_config_of_before_means_none(tmp_path):
    (tmp_path / "config.yaml").write_text("data_file: a\n")
    before = settle({"config": str(tmp_path / "config.yaml")})
    assert (before.think_weight, before.prompt_weight) == (1, 0)
