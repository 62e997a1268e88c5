"""From JSONL to batches: the very tokens that chat uses, every row once, and a loss that does not see how the
rows were cut up.
"""

import itertools
import json
import random
import types

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F

import rwkv_miss
from rwkv_miss import UserError
from rwkv_miss.files.checkpoint import read_checkpoint
from src.config import Config
from src.data import batches as rows_and_steps
from src.data import dataset
from src.data.batches import Batches, Schedule, pack
from src.data.chat_template import Segment
from src.data.collate import collate, trained_tokens
from src.data.contradictions import contradictions
from src.data.dataset import Document, Documents, load_documents
from src.data.encode import Encoder
from src.data.formats import Reading, Report
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.model import RWKV
from src.reporting import data_text, document_text
from src.sources import source_of
from src.training.run_folder import checkpoint_step, list_checkpoints

from .conftest import close, make_arch, random_tensors, read_rows, write_rows


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world", 65536)


@pytest.fixture(scope="module")
def raw():
    return load_tokenizer("bytes", 256)


@pytest.fixture
def load(tmp_path, raw):
    """load(rows, tokenizer, ctx_len): rows as objects, or as a line of text or bytes."""

    def make(rows, tokenizer=raw, ctx_len=1000):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows]
        path.write_bytes(
            b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        )
        return load_documents(path, tokenizer, ctx_len)

    return make


def encode(segments, tokenizer):
    return Document(*Encoder(tokenizer).encode_segments(segments))


def render(messages):
    return DEFAULT.segments(messages)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def marked(row):
    """The bytes of a document as text, the trained ones between < and >; the end of document shows as $."""
    groups = itertools.groupby(zip(row.ids.tolist(), row.weights.tolist()), key=lambda pair: pair[1])
    pieces = [(trained, bytes(i or ord("$") for i, _ in pairs).decode()) for trained, pairs in groups]
    return "".join(f"<{text}>" if trained else text for trained, text in pieces)


# rows


def test_world_ids_and_mask(load, world):
    text, chat = load([{"text": "hello"}, {"messages": [user("hi"), assistant("hello")]}], world)
    assert text.ids.tolist() == [*world.encode("hello"), 0] and text.weights.all()
    assert text.targets == len(text.ids) - 1
    # User : hi \n\n Ass istant : | hello, end
    assert chat.ids.tolist() == [24281, 59, 4571, 261, 5585, 41693, 59, 38685, 0]
    assert chat.weights.tolist() == [False] * 7 + [True] * 2 and chat.targets == 2


AB, SYSTEM = [user("a"), assistant("b")], {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "messages, expected",
    [
        ([user("hi"), assistant("yo")], "User: hi\n\nAssistant:< yo$>"),
        ([*AB, user("c"), assistant("d")], "User: a\n\nAssistant:< b\n\n>User: c\n\nAssistant:< d$>"),
        ([SYSTEM | {"content": " s\n"}, *AB], "System: s\n\nUser: a\n\nAssistant:< b$>"),
        ([user("a"), SYSTEM, user("c"), AB[1]], "User: a\n\nSystem: s\n\nUser: c\n\nAssistant:< b$>"),
        (
            [user(" 1\n\n\n2\r\n\r\n3\n4 "), assistant("\n5\n\n6 ")],
            "User: 1\n2\n3\n4\n\nAssistant:< 5\n\n6$>",
        ),
        ([user("a"), assistant("b"), assistant("c")], "User: a\n\nAssistant:< b\n\n>Assistant:< c$>"),
        ([assistant("b")], "Assistant:< b$>"),
        ([user(""), assistant("b")], "User: \n\nAssistant:< b$>"),
    ],
)
def test_conversations_train_the_assistants_turns_and_their_ends(load, messages, expected):
    assert marked(load([{"messages": messages}])[0]) == expected


def test_a_text_is_trained_whole_and_kept_as_it_is(load):
    assert marked(load([{"text": " a\n\n\nb\r\n", "source": "ignored"}])[0]) == "< a\n\n\nb\r\n$>"


def test_the_end_of_utf16_is_a_whole_unit(load):
    row = load([{"messages": [user("é"), assistant("ab")]}], load_tokenizer("utf16", 256))[0]
    assert bytes(row.ids.tolist()).decode("utf-16-le") == "User: é\n\nAssistant: ab\0"
    assert row.ids[-2:].tolist() == [0, 0] and row.weights.sum() == 2 * len(" ab\0")


def whole_blank_line_tokenizer(tmp_path):
    """A tokenizer.json, as GPT-2's, in which a blank line is one token by itself and two before a word."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "ĊĊ", "<end>"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("Ċ", "Ċ")]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(str(tmp_path / "tokenizer.json"), 258)


def test_pieces_are_tokenised_as_chat_does(tmp_path, world, raw):
    """The prompt before the answer exists, the answer on its own, the blank line between turns on its own."""
    first, second = [user("1\n\n\n2 "), assistant(" x y")], [user("é🙂"), assistant("z")]
    strict = whole_blank_line_tokenizer(tmp_path)
    assert strict.encode("\n\nUser") != strict.encode("\n\n") + strict.encode("User"), (
        "or this tokenizer tests nothing"
    )
    for tokenizer in (world, raw, load_tokenizer("utf16", 256), strict):
        enc = tokenizer.encode
        asked = ["User: 1\n2\n\nAssistant:", "User: é🙂\n\nAssistant:"]
        chat = [enc(asked[0]), enc(" x y"), enc("\n\n"), enc(asked[1]), enc(" z"), list(tokenizer.eod)]
        row = encode(render(first + second), tokenizer)
        assert row.ids.tolist() == [i for piece in chat for i in piece]
        assert row.weights.tolist() == [flag for piece, flag in zip(chat, [0, 1, 1, 0, 1, 1]) for _ in piece]


def test_conversations_are_cut_at_ctx_len_targets_and_texts_become_several_documents(load):
    rows = [
        {"text": "12345678"},
        {"text": "123456789"},
        {"messages": [user("ab"), assistant("c")]},
        {"text": "1"},
    ]
    documents = load(rows, ctx_len=8)
    # 8 inputs with their targets are 9 tokens, the end of document among them
    assert [marked(row) for row in documents] == ["<12345678$>", "<123456789>", "<9$>", "<1$>"], (
        "the fourth is left out"
    )
    assert (documents.split, documents.cut, documents.cut_tokens, documents.untrained) == (1, 0, 0, 1)
    assert documents.target_counts.tolist() == [row.targets for row in documents] == [8, 8, 1, 1]
    assert documents.targets == 18 and documents.tokens == 22

    config = Config(ctx_len=8)
    schedule = rows_and_steps.make_schedule(documents, config, 1)
    plan = types.SimpleNamespace(settings=config, schedule=schedule, source=source_of(config))
    assert len(schedule.rows) == 3 and data_text.rows(plan) == "rows of 8 tokens, 75% full"
    assert data_text.long_texts(documents, 8) == [
        "long texts 1 text of more than --ctx_len 8 tokens, cut into several documents, each of which begins"
        " with the last token of the one before"
    ]
    warned = [*data_text.cut_warnings(documents, 8)]
    assert warned == ["1 document left out: nothing in the first 8 tokens is trained"]
    cut = load(rows[2:], ctx_len=26)
    assert (cut.cut, cut.cut_tokens) == (0, 0)
    assert load([{"messages": [user("ab"), assistant("c" * 9)]}, rows[3]], ctx_len=26).cut == 1
    assert not data_text.long_texts(load(rows), 0)


# broken rows


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message is from user"),
        (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte at byte 11)"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(load, line, words):
    """The other rows are those of test_formats."""
    with pytest.raises(UserError) as caught:
        load(["", '{"text": "fine"}', line])
    assert str(caught.value).partition(": ")[0].endswith("rows.jsonl, line 3") and words in str(caught.value)


def test_files_without_rows_and_rows_without_targets(load, tmp_path):
    for rows in ([], ["", "  "]):
        with pytest.raises(UserError, match="rows.jsonl .JSONL. holds no rows"):
            load(rows)
    with pytest.raises(
        UserError, match="no token is trained; every answer is cut off at --ctx_len 5, raise it"
    ):
        load([{"messages": [user("long"), assistant("b")]}], ctx_len=5)
    with pytest.raises(UserError, match="can't be read: No such file"):
        load_documents(tmp_path / "absent", None, 1)


EMPTY_ANSWERS = [
    {"instruction": "a", "output": ""},
    {"prompt": "a", "completion": " "},
    {"messages": [user("a"), assistant("\n"), user("b"), assistant("c")]},
]


def test_an_empty_answer_is_left_out_whatever_the_layout(load, tmp_path, raw):
    """Thoughts, calls of tools and what is context only are no empty answers."""
    call = {**assistant(""), "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    kept = [
        {"messages": [user("a"), {**assistant(""), "weight": 0}, user("b"), assistant("c")]},
        {"messages": [user("a"), {**assistant(""), "reasoning": "hm"}]},
        {"messages": [user("a"), call], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    assert len(load([*EMPTY_ANSWERS, *kept])) == len(kept)
    table, report = tmp_path / "rows.csv", Report()
    table.write_text("question,answer,response\na,,\n\na,b,\na,,c\n")
    (tmp_path / "one.csv").write_text("question,answer,remark\na,,c\na,b,\n")
    files = f"{tmp_path}/rows.jsonl,{tmp_path}/one.csv"
    assert len(load_documents(files, raw, 1000, report=report)) == len(kept) + 1
    by_name, named = Reading(("question", "remark")), Report()
    assert len(load_documents(tmp_path / "one.csv", raw, 1000, reading=by_name, report=named)) == 1
    assert "line 3" in named.lines()[-1] and not named.bad
    left_out = [line.partition(": ") for line in report.lines() if line.startswith("left out")]
    assert [what for what, _, _ in left_out] == [
        "left out   3 rows, in which an answer is empty",
        "left out   1 row, in which an answer is empty",
    ]
    # a column with words counts before empty ones, and no row is ambiguous for its empty cells
    with pytest.raises(UserError, match="rows.csv, line 2: the row has several layouts"):
        load_documents(table, raw, 1000)


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(load):
    documents = load([b'\xef\xbb\xbf{"text": "a"}\r', b'{"text": "b"}\r'])
    assert [marked(row) for row in documents] == ["<a$>", "<b$>"]


# the schedule

SIZES = [*itertools.product([1, 2, 7, 24, 25], [1, 3, 8], [1, 2, 5], [1, 2, 3])]


def make_schedule(rows, micro_bsz, accumulate, world, seed=1):
    rng = random.Random(rows)
    lengths = tuple(rng.randint(1, 9) for _ in range(rows))
    targets, indices = tuple(rng.randint(0, n) for n in lengths), [[i] for i in range(len(lengths))]
    return Schedule(indices, lengths, targets, targets, micro_bsz, accumulate, world, seed)


def micro_batches(schedule, step):
    return [
        [schedule.micro_rows(step, m, r) for m in range(schedule.accumulate)] for r in range(schedule.world)
    ]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "-".join(map(str, sizes)))
def test_a_pass_has_every_row_once(sizes):
    schedule = make_schedule(*sizes)
    rows, micro_bsz, accumulate, world = sizes
    for turn in range(2):
        seen = []
        for step in range(turn * schedule.steps_per_pass, (turn + 1) * schedule.steps_per_pass):
            of_step = []
            for of_rank in micro_batches(schedule, step):
                assert len(of_rank) == accumulate and all(len(batch) <= micro_bsz for batch in of_rank)
                of_step += [row for batch in of_rank for row in batch]
            full = step % schedule.steps_per_pass < schedule.steps_per_pass - 1
            assert len(of_step) == (micro_bsz * accumulate * world if full else rows - len(seen))
            assert sorted(of_step) == sorted(schedule.step_rows(step))
            assert schedule.step_targets(step) == sum(schedule.targets[row] for row in of_step)
            assert schedule.step_tokens(step) == sum(schedule.lengths[row] for row in of_step)
            seen += of_step
        assert sorted(seen) == list(range(rows))


def test_passes_differ_seeds_differ_and_nothing_else_does():
    one, same, other = (
        make_schedule(24, 2, 2, 2),
        make_schedule(24, 2, 2, 2),
        make_schedule(24, 2, 2, 2, seed=2),
    )
    passes = [[one.step_rows(step) for step in range(turn * 3, turn * 3 + 3)] for turn in range(4)]
    assert len({str(steps) for steps in passes}) == 4
    assert passes[2] == [same.step_rows(step) for step in (6, 7, 8)], (
        "asked of another object, in another order"
    )
    assert passes[0] != [other.step_rows(step) for step in range(3)]
    # how the step is cut up does not change what is in it
    assert passes[0] == [make_schedule(24, 8, 1, 1).step_rows(step) for step in range(3)]
    lengths = [one.lengths[row] for row in passes[0][0]]
    assert lengths == sorted(lengths)


# batches


def make_document(rng, length, trained):
    return Document(
        np.array([rng.randrange(1, 67) for _ in range(length)], dtype=np.int32),
        np.array(trained(length), dtype=np.float32),
    )


def test_collate_pads_on_the_right_and_never_trains_the_padding():
    long = Document(np.array([5, 6, 7, 8], np.int32), np.array([1, 0, 1, 1], bool))
    short = Document(np.array([3, 4], np.int32), np.array([1, 1], bool))
    batch = collate([[long], [short]], 9)
    assert batch.ids.tolist() == [[5, 6, 7], [3, 0, 0]] and batch.targets.tolist() == [7, 8, 4]
    assert batch.where.tolist() == [1, 2, 3]
    assert batch.step_weight == 9
    assert {batch.ids.dtype, batch.where.dtype, batch.targets.dtype} == {torch.int64}


def test_no_rows_are_one_masked_row():
    end_only = Document(np.array([0], np.int32), np.array([True]))
    for rows in ([], [[end_only]]):
        batch = collate(rows, 3)
        assert batch.ids.shape == (1, 1) and not len(batch.where) and not len(batch.targets)


@pytest.mark.parametrize("chunk", [0, 1, 4, 5, 6, 7, 13, 20])
def test_trained_tokens_are_named_by_their_place_in_their_chunk(chunk):
    """Against masks: the tokens of every chunk in the order in which a mask would choose them."""
    rng = np.random.default_rng(chunk)
    targets, weights = rng.integers(67, size=(3, 13)), rng.random((3, 13)).astype(np.float32)
    weights[rng.random((3, 13)) < 0.4] = 0
    weights[:, 4:6] = 0  # a chunk without any
    found, size = trained_tokens(targets, weights, chunk), chunk or 13
    assert len(found["ends"]) == -(-13 // size) and found["ends"][-1] == np.count_nonzero(weights)
    for i, (start, stop) in enumerate(itertools.pairwise((0, *found["ends"]))):
        part = np.s_[:, i * size : (i + 1) * size]
        mask = weights[part] != 0
        assert found["where"][start:stop].tolist() == np.flatnonzero(mask).tolist()
        assert found["targets"][start:stop].tolist() == targets[part][mask].tolist()
        assert found["weights"][start:stop].tolist() == weights[part][mask].tolist()
    assert trained_tokens(targets, weights != 0, chunk)["weights"] is None


def test_batches_begin_at_any_step():
    rng = random.Random(0)
    documents = Documents([make_document(rng, n, lambda n: [True] * n) for n in (2, 3, 4, 5, 6, 7, 8)])
    schedule = Schedule(
        [[i] for i in range(7)],
        [len(row.ids) - 1 for row in documents],
        *zip(*((row.targets, row.weight) for row in documents)),
        *(1, 2, 2, 3),
    )

    def ids(rank, first_step=0):
        batches = Batches(documents, schedule, 5, rank, first_step)
        found = [batch.ids.tolist() for batch in batches]
        assert len(found) == len(batches) == 2 * (5 - first_step)
        return found

    whole = ids(1)
    assert all(ids(1, step) == whole[2 * step :] for step in range(6))
    assert whole != ids(0)


def test_the_sample_shows_what_is_trained(world, raw):
    row = encode(render([user("你好"), assistant("好🙂")]), world)
    assert document_text.sample(row, world).splitlines() == [
        "    | User: 你好",
        "    | ",
        "    | Assistant:« 好🙂␃»",
    ]
    assert document_text.sample(encode([Segment("a\nb", True)], raw), raw) == "    | «a\n    | b␀»"
    cut = encode([Segment("é", True), Segment("x" * 700, False)], raw)
    cut.weights[1] = False  # the mask may part a character; both halves are then shown as such
    shown = document_text.sample(cut, raw)
    assert shown.startswith("    | «\ufffd»\ufffdx") and shown.endswith("x ... (703 tokens)")
    assert len(shown) < 640


# the loss


@pytest.fixture(scope="module", params=[6, 7])
def model(request):
    arch = make_arch(request.param, n_embd=32)
    model = RWKV(arch).double()
    model.load_state_dict(random_tensors(arch, torch.float64))
    return model


@pytest.fixture(scope="module", params=["0 and 1", "any weights"])
def documents(request):
    """13 rows with very unequal masks: all trained, one token trained, nothing trained, a single token; and
    with weights that differ between rows and within them.
    """
    rng = random.Random(1)
    if request.param == "any weights":
        kinds = [
            lambda n: [0.1 * (i % 4) for i in range(n)],
            lambda n: [0] * (n - 1) + [7.5],
            lambda n: [0] * n,
            lambda n: [3 if i % 3 == 1 else 0.5 for i in range(n)],
        ]
        lengths = (1, 2, 3, 5, 8, 9, 12, 13, 16, 17, 20, 30, 32)
        return Documents([make_document(rng, n, kinds[n % 4]) for n in lengths])
    kinds = [
        lambda n: [True] * n,
        lambda n: [False] * (n - 1) + [True],
        lambda n: [False] * n,
        lambda n: [i % 3 == 1 for i in range(n)],
    ]
    return Documents(
        [make_document(rng, n, kinds[n % 4]) for n in (1, 2, 3, 5, 8, 9, 12, 13, 16, 17, 20, 30, 32)]
    )


def step_gradients(model, documents, micro_bsz, accumulate, world, padding=0, step=0, packed=0):
    """(loss, gradients) of one optimizer step as the trainer makes it: the mean over ranks and micro-batches
    of training_step.

    packed: the length of rows that documents share; 0: a row for each.
    """
    from src.sources.base import Feed, TrainingData
    from src.training.trainer import FineTuning

    config = Config(
        micro_bsz=micro_bsz,
        accumulate_grad_batches=accumulate,
        random_seed=0,
        lr_init=1e-3,
        packing=packed > 0,
        ctx_len=packed or 1024,
        lr_schedule="cos",
    ).settled()
    module = FineTuning(model, source_of(config), TrainingData(documents, Documents([])), 4)
    strategy = types.SimpleNamespace(model=model, root_device=torch.device("cpu"), predict_step=None)
    module._trainer = types.SimpleNamespace(world_size=world, global_rank=0, strategy=strategy)
    module.setup("fit")
    module.feed = Feed((), module.schedule)
    assert module.schedule == rows_and_steps.make_schedule(documents, config, world)
    model.zero_grad(set_to_none=True)
    for rank in range(world):
        batches = Batches(documents, module.schedule, 4, rank, step)
        for batch in itertools.islice(batches, accumulate):
            rows, width = batch.ids.shape
            batch.ids = torch.cat([batch.ids, torch.randint(1, 67, (rows, padding))], 1)
            batch.where = batch.where + batch.where // width * padding
            assert batch.reset is None or batch.ids.shape[1] <= packed
            (module.training_step(batch, 0) / (accumulate * world)).backward()
    return module.step_loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_step_does_not_see_how_its_rows_are_cut_up(model, documents):
    whole, gradients = step_gradients(model, documents, 13, 1, 1)
    losses, weights = [], []
    for row in documents.items[1:]:  # each row alone, without padding; the first has no target
        logits = model(torch.from_numpy(row.ids[None, :-1]).long())[0][0]
        losses.append(F.cross_entropy(logits, torch.from_numpy(row.ids[1:]).long(), reduction="none"))
        weights.append(torch.from_numpy(row.weights[1:]).double())
    losses, weights = torch.cat(losses), torch.cat(weights)
    close("mean over trained tokens", whole, (losses * weights).sum() / weights.sum(), 1e-12)
    assert len(gradients) > 40
    # 16 places for 13 rows: the last step is short, and with (2, 4, 2) some micro-batches are empty
    for sizes in ((4, 4, 1), (1, 13, 1), (2, 4, 2), (1, 8, 2), (13, 1, 1, 7), (5, 1, 3, 1)):
        loss, cut = step_gradients(model, documents, *sizes)
        close(f"loss of {sizes}", loss, whole, 1e-12)
        assert cut.keys() == gradients.keys()
        for name, gradient in gradients.items():
            close(f"{name} of {sizes}", cut[name], gradient, 1e-10)


@pytest.mark.parametrize("ctx_len", [32, 57, 400])
def test_documents_that_share_rows_make_the_same_step(model, documents, ctx_len):
    """Losses and gradients are sums over documents, each as if alone; under 400 all 13 are one row."""
    whole, gradients = step_gradients(model, documents, 13, 1, 1)
    for sizes in ((8, 1, 1), (2, 2, 2)):
        loss, packed = step_gradients(model, documents, *sizes, packed=ctx_len)
        close("loss", loss, whole, 1e-12)
        assert packed.keys() == gradients.keys()
        for name, gradient in gradients.items():
            close(name, packed[name], gradient, 1e-10)


def test_pack():
    rng = random.Random(4)
    for count, capacity in ((1, 5), (40, 16), (300, 100), (2000, 512)):
        lengths = [
            rng.randint(0, capacity) if rng.random() < 0.3 else rng.randint(1, max(capacity // 8, 1))
            for _ in range(count)
        ]
        rows = pack(lengths, capacity, 1)
        assert sorted(i for row in rows for i in row) == list(range(count)), "every document once"
        assert max(sum(lengths[i] for i in row) for row in rows) <= capacity
        if count >= 300:
            assert sum(lengths) / (len(rows) * capacity) > 0.97
        assert pack(lengths, capacity, 1) == rows and (count < 300 or pack(lengths, capacity, 2) != rows)
    # best fit: 3 goes to the row with room for exactly 3, and not to the first with room
    assert sorted(map(sorted, pack([6, 7, 3, 4], 10, 0))) == [[0, 3], [1, 2]]


def test_a_row_of_several_documents():
    """Targets stay inside a document, resets stand where one starts inside a row, and a document without
    inputs takes no room.
    """
    a = Document(np.array([5, 6, 7], np.int32), np.array([0, 1, 0], bool))
    b = Document(np.array([8, 9], np.int32), np.array([1, 1], bool))
    end_only = Document(np.array([0], np.int32), np.array([True]))
    batch = collate([[a, end_only, b, end_only], [b]], 3)
    assert batch.ids.tolist() == [[5, 6, 8], [8, 0, 0]] and batch.targets.tolist() == [6, 9, 9]
    assert batch.where.tolist() == [0, 2, 3]
    assert batch.reset.tolist() == [[False, False, True], [False, False, False]]
    assert collate([[a], [b]], 3).reset is None and collate([[end_only, a]], 3).reset is None


def test_a_step_without_targets_is_zero_and_not_nan(model):
    rng = random.Random(2)
    nothing = Documents([make_document(rng, n, lambda n: [False] * n) for n in (3, 6)])
    loss, gradients = step_gradients(model, nothing, 2, 1, 1)
    assert loss == 0 and gradients and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("peft", ["miss", "adalora"])
def test_a_step_without_a_trained_token_has_no_loss_and_moves_nothing(tmp_path, monkeypatch, peft, capfd):
    """Such rows are left out; here one is not, and comes after steps that gave the optimizer momentum."""
    from src import config as configuration
    from src import run

    monkeypatch.setattr(Documents, "learnable", lambda self: self)
    arch = make_arch(7, n_embd=32, vocab_size=256)
    tensors = random_tensors(arch, torch.float32)
    tensors["head.weight"] *= 9  # a model that knows less than nothing
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", tensors.items())
    rows = [{"text": f"text {i}"} for i in range(5)] + [
        {"prompt": "a question of many words", "completion": "cut"}
    ]
    write_rows(tmp_path / "data.jsonl", rows)
    flags = f"""
        --load_model {tmp_path}/base.pth --data_file {tmp_path}/data.jsonl --proj_dir {tmp_path}/run
        --tokenizer bytes --peft {peft} --ctx_len 9 --micro_bsz 1 --packing 0 --epoch_count 2 --save_steps 1
        --save_total_limit 99 --eval_split 0 --weight_decay 0.1 --lr_init 1e-2 --accelerator cpu --wkv torch
    """
    run.main(configuration.parse(flags.split()))
    lines = read_rows(tmp_path / "run/metrics.jsonl")
    empty = [line["step"] for line in lines if not line["trained_tokens"]]
    assert [line["step"] for line in lines if line["loss"] is None] == empty and len(empty) == 2
    states = {
        checkpoint_step(path): read_checkpoint(path)
        for path in list_checkpoints(str(tmp_path / "run/checkpoints"))
    }
    weights = [name for name in states[12] if ":" not in name]
    moved = [
        step
        for step in range(2, 13)
        if any(not torch.equal(states[step][name], states[step - 1][name]) for name in weights)
    ]
    assert moved == [step for step in range(2, 13) if step not in empty]
    said = capfd.readouterr().out
    assert all(
        f"note: step {step} has no trained token; it has no loss, and no weight moved" in said
        for step in empty
    )
    assert said.count("WARNING: the loss is ") == 1
    assert f"WARNING: the loss is {lines[0]['loss']:.2f}, worse than guessing" in said


def test_texts_are_counted_only_where_nothing_else_would_be_cut(tmp_path, raw):
    """Inputs of all documents, of those that are chosen; 0 with a conversation among them."""
    for name, rows in (
        ("texts", [{"text": "abc"}, {"text": "de"}]),
        ("mixed", [{"text": "abc"}, {"prompt": "p", "completion": "c"}]),
    ):
        write_rows(tmp_path / name, rows)
    texts, twice, mixed = (
        dataset.load(str(tmp_path / name), Encoder(raw)) for name in ("texts", "texts:2", "mixed")
    )
    assert (texts.texts, twice.texts, mixed.texts) == (5, 10, 0)  # the bytes, and the end as a target
    assert (texts.longest, twice.longest, mixed.longest) == (3, 3, 3)


def asked(question, answer, **more):
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    }


ASKED = [asked("fox", "foxes"), asked("box", "boxes"), {"text": "fox"}, {"prompt": "fox", "completion": " a"}]
OTHER_TALK = {"messages": [*ASKED[0]["messages"], *asked("why?", "so")["messages"]]}
UNTAUGHT = {"messages": [*asked("fox", "?", weight=0)["messages"], *asked("no", "foxes")["messages"]]}


@pytest.mark.parametrize(
    "rows, count, first",
    [
        ([asked("fox", "foxeszz"), asked("fox", "foxes"), asked("box", "b")], 2, 5),
        ([{"prompt": "fox", "completion": "b"}], 1, 5),
        ([ASKED[0], OTHER_TALK, asked("fox", "foxeszz")], 1, 7),
        ([asked("fox", "<think>hm</think>foxes"), UNTAUGHT, {"text": "fox and"}, {"text": "fox"}], 0, 0),
        ([{"prompt": "fox", "completion": "a"}], 0, 0),
    ],
)
@pytest.mark.parametrize("bos, block", [((), 1 << 16), ((0,), 2)])
def test_other_answers_to_one_question(tmp_path, monkeypatch, raw, rows, count, first, bos, block):
    """Thoughts, an answer without a weight, running text and blanks around an answer are none."""
    monkeypatch.setattr("src.data.contradictions.BLOCK", block)
    path = tmp_path / "rows.jsonl"
    write_rows(path, [*ASKED, *rows])
    found = contradictions(dataset.load(f"{path}:2", Encoder(raw, bos=bos)))
    have = "has" if count == 1 else "have"
    assert found.startswith(f"{count} row{'' if count == 1 else 's'} {have} another answer") == bool(count)
    assert (f" first {path}, line {first};" in found) == bool(count) and bool(found) == bool(count)
    preferences = dataset.Loaded("", None, [], [], [], "pairs")
    assert contradictions(preferences) == ""
