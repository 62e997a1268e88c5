"""Preferences: the tokens of pairs under every template, what is left out, which prompts are held out, and
batches in both layouts, against plain loops over the records.
"""

import itertools
import random
import tracemalloc

import numpy as np
import pytest
import torch

from rwkv_miss import UserError
from src.config import Config
from src.data import held_out, parallel, token_cache
from src.data.answer_batches import collate_answers
from src.data.batches import Batches, make_schedule
from src.data.dataset import load
from src.data.encode import Encoder, Tokens
from src.data.formats import LABELS, PAIRS, LeftOut, Reading, Report
from src.data.held_out import evaluation_batches, hold_out, in_hash_order, questions
from src.data.preferences import Preferences, fit_examples
from src.data.rwkv_template import MODES
from src.data.templates import load_template

from .conftest import write_rows
from .test_data import assistant, user
from .test_generate import named
from .test_rewritten_turns import COLON, FORGETFUL, LASTING, g1
from .test_templates import thinking

BYTES = named("bytes")


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(rows, rows_are=..., **options of load()) -> Loaded; the tokenizer is bytes."""
    monkeypatch.chdir(tmp_path)

    def run(rows, rows_are=PAIRS, encoder=None, name="data.jsonl", **options):
        write_rows(tmp_path / name, rows)
        return load(name, encoder or Encoder(BYTES), reading=Reading(rows=rows_are), **options)

    return run


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def labelled(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def text_of(ids):
    return bytes(ids.tolist()).decode()


# tokens


SOURCES = {**FORGETFUL, **LASTING, **{mode: mode for mode in MODES}}
EARLIER = [user("1"), assistant("x y"), user("🙂")]


@pytest.mark.parametrize("name", SOURCES)
def test_a_pair_is_what_a_conversation_with_each_answer_is(name):
    """A pair is two last documents with one prompt, each with a loss on the last answer alone."""
    template = load_template(SOURCES[name])
    for tokenizer in (BYTES, named("world")):
        encoder = Encoder(tokenizer, template, bos=tuple(tokenizer.eod))
        answers = [[assistant("z\n\nw")], [assistant("other")]]
        record = {"messages": EARLIER, "chosen": answers[0], "rejected": answers[1]}
        documents = encoder.encode(record)
        for (ids, weights), answer in zip(documents, answers, strict=True):
            alone = [EARLIER[0], {**EARLIER[1], "weight": 0}, EARLIER[2], *answer]
            [*_, (wanted, trained)] = encoder.encode({"messages": alone})
            assert ids.tolist() == wanted.tolist() and weights.tolist() == (trained != 0).tolist()
            assert weights.dtype == np.float32 and weights[-1] == 1
        (a, trained_a), (b, trained_b) = documents
        begin = int(trained_a.argmax())
        assert begin == trained_b.argmax() > 0 and a[:begin].tolist() == b[:begin].tolist()
        assert "🙂" in tokenizer.decode(a[:begin].tolist())
        # an answer with a label has the same tokens
        [(ids, weights)] = encoder.encode({"messages": EARLIER, "completion": answers[1], "label": False})
        assert ids.tolist() == b.tolist() and weights.tolist() == trained_b.tolist()


THOUGHTFUL = [name for name in SOURCES if "fake" not in name and name not in LASTING]


# asks with <think, which it does not write before an answer without thoughts
ASKS_OTHERWISE = g1(COLON, "<think", "")


@pytest.mark.parametrize("name", [*THOUGHTFUL, "asks otherwise"])
def test_thoughts_of_one_answer_alone_belong_to_the_answers(name):
    """A template may open <think> before one answer only, or cut the prompt at another place."""
    encoder = Encoder(BYTES, load_template(SOURCES.get(name, ASKS_OTHERWISE)))
    thoughts = "嗯，hm" if name == "think-chinese" else "hm"
    answers = {"chosen": [thinking(thoughts, "<a")], "rejected": [assistant("b")]}
    for record in (answers, dict(zip(answers, reversed(answers.values())))):
        documents = encoder.encode({"messages": EARLIER, **record})
        begins = {int(weights.argmax()) for _, weights in documents}
        assert len(begins) == 1 and len({ids[: max(begins)].tobytes() for ids, _ in documents}) == 1
        for (ids, weights), answer in zip(documents, record.values()):
            trained = text_of(ids[weights != 0])
            assert answer[0]["content"].removeprefix("<think>\nhm\n</think>\n") in trained
            assert weights[max(begins) :].all() and "🙂" not in trained


def test_an_answer_of_several_messages_is_compared_with_its_calls():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [call, {"role": "tool", "content": "result"}, assistant("4")]
    record = {"messages": EARLIER, "chosen": turns, "rejected": [assistant("5")]}
    (ids, weights), _ = Encoder(BYTES).encode(record)
    trained = text_of(ids[weights != 0])
    assert '"f"' in trained and "4" in trained and "result" not in trained and "result" in text_of(ids)
    with pytest.raises(UserError, match="writes the turns of this answer differently"):
        turns = [thinking("hm", "a"), user("more"), thinking("hm", "b")]
        record = {"messages": EARLIER, "chosen": turns, "rejected": [assistant("5")]}
        Encoder(BYTES, load_template(FORGETFUL["qwen"])).encode(record)


def test_a_template_that_rewrites_the_question_is_refused():
    source = (
        "{{ 'think!' if messages[-1].reasoning_content }}{% for m in messages %}{{ m.role }}:"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    answers = {"chosen": [{**assistant("a"), "reasoning_content": "hm"}], "rejected": [assistant("b")]}
    with pytest.raises(UserError, match="writes the messages before the answer differently for the chosen"):
        Encoder(BYTES, load_template(source)).encode({"messages": [user("q")], **answers})


def test_raw_texts_go_on_from_the_prompt():
    for tokenizer in (BYTES, named("world")):
        documents = Encoder(tokenizer).encode(pair("Sky is", " blue", " red é"))
        for (ids, weights), answer in zip(documents, (" blue", " red é")):
            prompt, said = tokenizer.encode("Sky is"), tokenizer.encode(answer)
            assert ids.tolist() == [*prompt, *said, *tokenizer.eod]
            assert weights.tolist() == [0] * len(prompt) + [1] * (len(said) + 1)


def test_equal_answers_are_left_out():
    # a chat strips its answers, so that these two become the same tokens
    record = {"messages": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("a\n")]}
    with pytest.raises(LeftOut, match="both answers are the same"):
        Encoder(BYTES).encode(record)


ROWS = [
    pair("a\n", "bb", "c"),
    pair("a\n", "d", "eee"),
    pair("a\n", "x", "x"),
    pair("long" * 9, "f", "gg"),
    pair("b\n", "", "h"),
    pair("b\n", "hh", "iiii"),
    pair("a\n", "x", "x"),
]
LONG = "data.jsonl, line 4"


def test_what_is_left_out_is_counted_and_named(read):
    report = Report()
    loaded = read(ROWS, report=report)
    assert loaded.longest == 2 * 36 + 3 + 0
    assert [example.content.tolist() for example in loaded.preferences(80)]
    preferences = loaded.preferences(12)
    assert (len(preferences), preferences.too_long, preferences.too_long_places) == (3, 1, (LONG,))
    assert report.lines()[-2:] == [
        "left out   2 rows, in which both answers are the same: data.jsonl, line 3, line 7",
        "left out   1 row, in which an answer is empty: data.jsonl, line 5",
    ]
    assert [text_of(example.prompt) for example in preferences] == ["a\n", "a\n", "b\n"]
    assert loaded.examples(12).digest == preferences.digest
    with pytest.raises(UserError, match="data.jsonl, line 1: all 4 pairs have more tokens than --ctx_len 5"):
        loaded.preferences(5)
    with pytest.raises(
        UserError, match="be used, left out 1 row, in which both answers are the same: data.jsonl, "
    ):
        read([ROWS[2]])


def test_answers_with_a_label(read):
    rows = [labelled("a\n", "b", True), pair("c\n", "d", "e"), labelled("f\n", "g", False), ROWS[2]]
    loaded = read(rows, LABELS)
    preferences = loaded.preferences(9)
    found = [(text_of(example.answers[0].ids), example.chosen) for example in preferences]
    assert found == [("a\nb\0", [True]), ("c\nd\0", [True]), ("c\ne\0", [False]), ("f\ng\0", [False])]
    assert not preferences.paired and preferences.weight == 4 and loaded.longest == 3


@pytest.mark.parametrize("processes", [1, 3])
def test_the_cache_gives_the_same(read, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(token_cache, "SMALL", 0)
    monkeypatch.setattr(parallel, "LARGE", 0)
    monkeypatch.setattr(parallel, "RECORDS_AT_ONCE", 2)
    monkeypatch.setattr(parallel, "available_cores", lambda: processes)
    plain, plain_report = read(ROWS, report=(first := Report())), first
    wanted = plain.preferences(12)
    cache = str(tmp_path / "cache")
    for _ in range(2):
        report = Report()
        loaded = read(ROWS, report=report, cache=cache)
        found = loaded.preferences(12)
        assert found.digest == wanted.digest and found.too_long_places == wanted.too_long_places
        assert report.lines() == plain_report.lines() and loaded.names == plain.names
        for tokens, other in zip(loaded.files, plain.files):
            for name in ("ids", "weights", "ends", "texts", "begins", "labels", "places"):
                assert np.array_equal(getattr(tokens, name), getattr(other, name)), name
        monkeypatch.setattr(parallel.Converter, "__call__", None)  # the second time nothing is tokenised
    assert plain.files[0].labels.tolist() == [1, -1] * 4
    assert plain.files[0].places.tolist() == [1, 1, 2, 2, 4, 4, 6, 6]


# examples


def random_rows(count, seed=0, kind=PAIRS):
    rng = random.Random(seed)

    def answer():
        return "".join(rng.choices("abcdefgh", k=rng.randint(1, 17)))

    prompts = ["p" * rng.randint(1, 9) + str(i) + "\n" for i in range(count // 2 + 1)]
    if kind == LABELS:
        return [labelled(rng.choice(prompts), answer(), rng.random() < 0.5) for _ in range(count)]
    return [pair(rng.choice(prompts), answer(), answer() + "!") for _ in range(count)]


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
def test_examples_are_what_the_rows_say(read, kind):
    rows = random_rows(23, kind=kind)
    preferences = read(rows, kind).preferences(64)
    assert len(preferences) == 23 and preferences.weight == 23.0
    for i, (row, example) in enumerate(zip(rows, preferences, strict=True)):
        answers = [row["chosen"], row["rejected"]] if kind == PAIRS else [row["completion"]]
        wanted = [f"{row['prompt']}{answer}\0" for answer in answers]
        assert [text_of(answer.ids) for answer in example.answers] == wanted
        assert example.chosen == ([True, False] if kind == PAIRS else [row["label"]])
        assert text_of(example.prompt) == row["prompt"] and example.weight == 1 and example.reference is None
        assert example.inputs == preferences.lengths[i] - 1 == sum(len(text) - 1 for text in wanted)
        assert example.targets == preferences.target_counts[i] == sum(len(answer) + 1 for answer in answers)
    assert preferences.tokens == sum(len(a.ids) for example in preferences for a in example.answers)
    assert preferences.targets == sum(example.targets for example in preferences)
    assert preferences.weight_sums.tolist() == [1.0] * 23
    chosen = np.array([22, 0, 7, 7])
    taken = preferences.take(chosen)
    assert [example.content.tolist() for example in taken] == [
        preferences[i].content.tolist() for i in chosen
    ]
    assert taken.lengths.tolist() == preferences.lengths[chosen].tolist()
    assert taken.digest != preferences.digest == read(rows, kind).preferences(64).digest
    assert len(preferences.take(np.zeros(0, np.int64))) == 0 == preferences.take(np.arange(0)).targets
    with pytest.raises(IndexError):
        preferences[23]


def test_the_digest_sees_labels_and_what_is_trained(read):
    rows = [labelled("ab", "cd", True)]
    whole = read(rows, LABELS).preferences(9).digest
    others = [labelled("ab", "cd", False), labelled("a", "bcd", True), labelled("ab", "ce", True)]
    assert len({whole, *(read([row], LABELS).preferences(9).digest for row in others)}) == 4


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
def test_reference_values_stay_with_their_tokens(read, kind):
    preferences = read(random_rows(11, kind=kind), kind).preferences(64)
    values = -np.arange(preferences.targets, dtype=np.float32)
    with_values = preferences.with_reference(values)
    flat = [part for example in with_values for part in example.reference]
    assert np.concatenate(flat).tolist() == values.tolist() and with_values.digest == preferences.digest
    assert all(len(p) == a.targets for u in with_values for p, a in zip(u.reference, u.answers, strict=True))
    order = np.array([4, 4, 0, 10])
    taken = with_values.take(order)
    for i, example in zip(order, taken):
        assert [part.tolist() for part in example.reference] == [
            part.tolist() for part in with_values[i].reference
        ]
    batch = collate_answers([[taken[0], taken[2]], [taken[3]]], 3.0)
    wanted = [*taken[0].reference, *taken[2].reference, *taken[3].reference]
    assert batch.reference.tolist() == np.concatenate(wanted).tolist()
    assert batch.reference.dtype == torch.float32
    with pytest.raises(ValueError, match="reference: expected"):
        preferences.with_reference(values[1:])


@pytest.mark.parametrize("ctx_len", [64, 21])
def test_mismatched_answers_are_those_of_other_prompts(read, ctx_len):
    rows = random_rows(31, kind=LABELS)
    preferences = read(rows, LABELS).preferences(ctx_len)
    mixed = preferences.mismatched()
    assert len(mixed) == len(preferences) and mixed.chosen.tolist() == preferences.chosen.tolist()
    prompts = {text_of(example.prompt) for example in preferences}
    by_answer: dict[str, set[str]] = {}
    for example in preferences:
        answer = text_of(example.answers[0].ids[len(example.prompt) :])
        by_answer.setdefault(answer, set()).add(text_of(example.prompt))
    used = []
    for i, (example, other) in enumerate(zip(preferences, mixed)):
        assert text_of(other.prompt) == text_of(example.prompt) in prompts
        said = text_of(other.answers[0].ids[len(other.prompt) :])
        used.append(said)
        assert other.inputs == mixed.lengths[i] - 1 <= ctx_len and other.targets == len(said)
        whole = {answer for answer in by_answer if answer.startswith(said)}
        assert any(by_answer[answer] - {text_of(example.prompt)} for answer in whole)
        assert said in by_answer or other.inputs == ctx_len
    if ctx_len == 64:
        assert sorted(used) == sorted(text_of(u.answers[0].ids[len(u.prompt) :]) for u in preferences)
    again = read(rows, LABELS).preferences(ctx_len).mismatched()
    assert again.digest == mixed.digest != preferences.digest
    taken = mixed.take(np.array([3, 0]))
    assert [example.content.tolist() for example in taken] == [mixed[i].content.tolist() for i in (3, 0)]
    with pytest.raises(ValueError, match="expected single answers"):
        read(random_rows(3)).preferences(64).mismatched()


def test_mismatched_pairs_of_answers_never_keep_their_prompt(read):
    """The two answers of a pair stand side by side, and have one prompt."""
    preferences = read([pair(f"{i}\n", f"yes{i}", f"no{i}") for i in range(7)], LABELS).preferences(64)
    for example in preferences.mismatched():
        prompt, answer = text_of(example.answers[0].ids[:-1]).split("\n")
        assert prompt not in answer
    # and where all have one prompt, there are no others
    alike = read([labelled("q\n", answer, True) for answer in "abc"], LABELS).preferences(64)
    assert sorted(text_of(example.answers[0].ids) for example in alike.mismatched()) == [
        "q\na\0",
        "q\nb\0",
        "q\nc\0",
    ]


# held out


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_the_examples_of_a_prompt_are_held_out_together(read, kind, share):
    preferences = read(random_rows(40, kind=kind), kind).preferences(64)
    config = Config(eval_split=share, data_file="d")
    train, held = hold_out(config, preferences, None)
    assert isinstance(train, Preferences) and isinstance(held, Preferences)
    sides = [{text_of(example.prompt) for example in side} for side in (train, held)]
    assert not sides[0] & sides[1] and len(train) + len(held) == 40
    assert max(1, round(share * 40)) <= len(held) <= round(share * 40) + 12
    # the choice is the prompts' own, not the rows'
    backwards = read(random_rows(40, kind=kind)[::-1], kind).preferences(64)
    _, other = hold_out(config, backwards, None)
    assert {text_of(example.prompt) for example in other} == sides[1]
    _, another = hold_out(Config(eval_split=share, data_file="d", random_seed=5), preferences, None)
    assert {text_of(example.prompt) for example in another} != sides[1]
    nothing = hold_out(Config(data_file="d"), preferences, None)
    assert nothing[0] is preferences and len(nothing[1]) == 0 and isinstance(nothing[1], Preferences)


def test_prompts_of_the_eval_file_are_not_trained(read):
    preferences = read(ROWS).preferences(80)
    held = read([pair("b\n", "other", "answers")], name="held.jsonl").preferences(80)
    train, found = hold_out(Config(eval_file="held.jsonl", data_file="d"), preferences, lambda path: held)
    assert [text_of(example.prompt) for example in train] == ["a\n", "a\n", "long" * 9] and found is held
    with pytest.raises(UserError, match="1 of 1 pair of d would be held out, as all have one prompt"):
        hold_out(Config(eval_file="held.jsonl", data_file="d"), held, lambda path: held)


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
def test_the_bar_counts_what_is_held_out(read, kind, monkeypatch):
    bars = []
    monkeypatch.setattr(held_out, "progress", lambda items, *bar, **kw: bars.append((*bar, kw)) or items)
    examples = read(random_rows(7, kind=kind), kind).preferences(64)
    hold_out(Config(eval_split=0.3, data_file="d"), examples, None)
    in_hash_order(examples.take(np.array([0, 1, 2])), 3)
    name = {PAIRS: "pairs", LABELS: "answers"}[kind]
    for found, count in zip(bars, (7, 3), strict=True):
        assert found == (f"choosing held-out {name}", count, {"unit": name, "shown": True})


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
def test_evaluation_and_samples(read, kind):
    held = read(random_rows(19, kind=kind), kind).preferences(64)
    order = in_hash_order(held, 3)
    assert sorted(order.tolist()) == [*range(19)]
    backwards = read(random_rows(19, kind=kind)[::-1], kind).preferences(64)
    other = in_hash_order(backwards, 3)
    assert [held[i].content.tolist() for i in order] == [backwards[i].content.tolist() for i in other]
    batches = evaluation_batches(held, ctx_len=64, micro_bsz=3, random_seed=42)
    rows = [row for batch in batches for row in batch]
    examples = list(itertools.chain(*rows))
    assert sorted(example.content.tolist() for example in examples) == sorted(
        example.content.tolist() for example in held
    )
    widths = [sum(example.inputs for example in row) for row in rows]
    assert widths == sorted(widths, reverse=True) and max(widths) <= 64 and len(rows) < 19

    asked = questions(held, 4, Encoder(BYTES))
    assert len(asked) == 4 and len({bytes(question.prompt) for question in asked}) == 4
    right = {}
    for example in held:
        if example.chosen[0]:
            right.setdefault(
                text_of(example.prompt), text_of(example.answers[0].ids[len(example.prompt) : -1])
            )
    for question in asked:
        assert bytes(question.answer).decode() == right[bytes(question.prompt).decode()]
    assert len(questions(held, 99, Encoder(BYTES))) == len(right)


# batches


def loop(rows):
    """(answer, all tokens before it, token) of every trained token, from a plain walk over the examples."""
    found = []
    answer = 0
    for example in itertools.chain(*rows):
        for document in example.answers:
            for i in range(1, len(document.ids)):
                if document.weights[i]:
                    found.append((answer, document.ids[:i].tolist(), int(document.ids[i])))
            answer += 1
    return found


def contexts(batch):
    """(answer, all tokens that were read, target) of each trained token, from a batch's tensors alone."""
    ids, reset = batch.ids, batch.reset
    width, chunk = ids.shape[1], batch.chunk or ids.shape[1]
    found = []
    starts = [0, *batch.ends]
    for part, (first, last) in enumerate(itertools.pairwise(starts)):
        size = min(chunk, width - part * chunk)
        for i in range(first, last):
            row, column = divmod(int(batch.where[i]), size)
            column += part * chunk
            begin = 0
            if reset is not None and reset[row, : column + 1].any():
                begin = int(torch.nonzero(reset[row, : column + 1])[-1])
            read = ids[row, begin : column + 1].tolist()
            if batch.prompts is not None and not (reset is not None and reset[row, 0]):
                prompt = int(batch.prompt_of[row])
                starts_at = 0
                if batch.prompt_reset is not None and batch.prompt_reset[prompt].any():
                    [starts_at] = torch.nonzero(batch.prompt_reset[prompt])[0].tolist()
                read = batch.prompts[prompt, starts_at:].tolist() + read
            found.append((int(batch.answer[i]), read, int(batch.targets[i])))
    return found


def some_rows(preferences):
    """Rows of several examples, of one, and of odd lengths."""
    return [
        [preferences[0], preferences[1], preferences[2]],
        [preferences[3]],
        [preferences[4], preferences[5]],
    ]


@pytest.mark.parametrize("kind", [PAIRS, LABELS])
@pytest.mark.parametrize("chunk", [0, 1, 7, 200])
def test_separate_rows_hold_every_answer_after_its_prompt(read, kind, chunk):
    rows = some_rows(read(random_rows(6, kind=kind), kind).preferences(64))
    batch = collate_answers(rows, 6.0, chunk)
    assert sorted(contexts(batch)) == sorted(loop(rows))
    assert batch.weights is None and batch.step_weight == 6.0 and batch.chunk == chunk
    assert batch.chosen.tolist() == [c for example in itertools.chain(*rows) for c in example.chosen]
    assert batch.ids.dtype == batch.answer.dtype == torch.int64 and batch.reference is None
    # packed = alone
    alone = [collate_answers([[example]], 1.0, chunk) for example in itertools.chain(*rows)]
    size = 2 if kind == PAIRS else 1
    shifted = [(a + size * i, read, t) for i, one in enumerate(alone) for a, read, t in contexts(one)]
    assert sorted(shifted) == sorted(contexts(batch))


def test_shared_rows_hold_the_same_tokens_with_each_prompt_once(read):
    rows = some_rows(read(random_rows(6)).preferences(64))
    batch = collate_answers(rows, 6.0, shared=True)
    separate = collate_answers(rows, 6.0)
    assert sorted(contexts(batch)) == sorted(contexts(separate)) == sorted(loop(rows))
    assert batch.chosen.tolist() == separate.chosen.tolist()
    examples = list(itertools.chain(*rows))
    assert batch.ids.shape[0] == 12 and batch.prompt_of.tolist() == sorted([*range(6)] * 2)
    assert batch.prompts.shape == (6, max(len(example.prompt) for example in examples) - 1)
    # the rows in which an answer is, one after another
    assert batch.answer.tolist() == sorted(batch.answer.tolist())
    alike = [[example] for example in examples if len(example.prompt) == len(examples[0].prompt)]
    assert collate_answers(alike, 6.0, shared=True).prompt_reset is None
    with pytest.raises(ValueError, match="whole rows"):
        collate_answers(rows, 6.0, 7, True)


def test_a_prompt_of_one_token_takes_nothing_from_the_padding(read):
    preferences = read([pair("a", "b", "cc"), pair("abc", "d", "e")]).preferences(64)
    rows = [[preferences[0]], [preferences[1]]]
    batch = collate_answers(rows, 2.0, shared=True)
    assert batch.reset.tolist() == [[True, False, False]] * 2 + [[False] * 3] * 2
    assert sorted(contexts(batch)) == sorted(loop(rows))
    only = collate_answers(rows[:1], 1.0, shared=True)
    assert only.prompts.shape == (1, 1) and sorted(contexts(only)) == sorted(loop(rows[:1]))


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_without_rows_has_no_answer(shared):
    batch = collate_answers([], 3.0, shared=shared)
    assert batch.ids.shape == (1, 1) and batch.chosen.shape == batch.answer.shape == (0,)
    assert batch.chosen.dtype == torch.bool and batch.ends == (0,) and batch.reference is None
    if shared:
        assert batch.prompts.shape == (1, 1) and batch.prompt_of.tolist() == [0]


@pytest.mark.parametrize(("kind", "shared"), [(PAIRS, False), (PAIRS, True), (LABELS, False)])
@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_has_every_example_once_and_counts_examples(read, kind, shared, packing):
    preferences = read(random_rows(13, kind=kind), kind).preferences(90)
    config = Config(ctx_len=90, packing=packing, micro_bsz=2, accumulate_grad_batches=2)
    schedule = make_schedule(preferences, config, 2)
    found, examples = [], 0.0
    for step in range(schedule.steps_per_pass):
        weight = schedule.step_weight(step)
        batches = [
            batch
            for rank in range(2)
            for batch in Batches(preferences, schedule, step + 1, rank, step, shared=shared)
        ]
        assert len(batches) == 4 and all(batch.step_weight == weight for batch in batches)
        chosen = sum(len(batch.chosen) for batch in batches)
        assert weight == chosen / (2 if kind == PAIRS else 1)
        examples += weight
        found += [(read, target) for batch in batches for _, read, target in contexts(batch)]
    assert examples == 13 == preferences.weight
    assert sorted(found) == sorted((read, target) for _, read, target in loop([preferences]))
    documents = load_texts(read).collator()([], 1.0)
    assert documents.answer is None


def load_texts(read):
    return read([{"text": "x"}], "sft", name="texts.jsonl").examples(9)


def test_a_million_pairs_are_no_million_objects():
    """Beside their tokens: 17 bytes for where an answer is, 1 for its label, and 12 for counts."""
    count = 4_000
    lengths = np.random.default_rng(0).integers(20, 40, 2 * count)
    ids = np.zeros(int(lengths.sum()), np.int32)
    weights = np.zeros(len(ids), np.float32)
    ends = np.cumsum(lengths)
    for back in range(1, 6):
        weights[ends - back] = 1
    rows = np.repeat(np.arange(count, dtype=np.int32), 2)
    labels = np.tile(np.array([1, -1], np.int8), count)
    texts, begins = np.zeros(2 * count, bool), np.tile(np.array([True, False]), count)
    tokens = Tokens(ids, weights, ends, texts, begins, labels, rows)
    tracemalloc.start()
    try:
        preferences = fit_examples([tokens], [np.arange(2 * count)], ["d, line"], 70, True)
        schedule = make_schedule(preferences, Config(ctx_len=70, packing=True, micro_bsz=1), 1)
        values = np.zeros(preferences.targets, np.float32)
        begin, _ = tracemalloc.get_traced_memory()
        with_values = preferences.with_reference(values)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(with_values) + with_values.too_long == count and schedule.step_weight(0) >= 1
    assert (
        with_values.too_long == int((lengths.reshape(-1, 2).sum(1) - 2 > 70).sum())
        and with_values.targets % 10 == 0
    )
    assert (kept - values.nbytes) / count < 160 and kept - begin < 9 * 2 * count
