"""Question files for training on own answers: what is asked, what is left out, and what is held out, against
what scripts.evaluate reads of the same files.
"""

import numpy as np
import pytest

from rwkv_miss import UserError
from src.config import Config
from src.data import parallel
from src.data.batches import make_schedule
from src.data.encode import Encoder
from src.data.formats import Reading, Report
from src.data.held_out import hold_out, in_hash_order
from src.data.questions import NO_ANSWER, NO_QUESTION, QuestionReader, read_questions
from src.data.templates import load_template

from .conftest import write_rows
from .test_data import assistant, user
from .test_generate import named

BYTES = named("bytes")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
SHORT = {"role": "system", "content": "Short."}
ROWS = [
    {"question": "1 + 1?", "answer": "2"},
    {"instruction": "Add.", "input": "2 3", "output": 5},
    {"prompt": "Q: 4\nA:", "completion": " four"},
    {"messages": [SHORT, user("a"), assistant("b"), user("c"), assistant("<think>hm</think>d")]},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    {"messages": [user("1 and 1"), assistant("") | {"tool_calls": CALL}], "tools": TOOLS},
]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(rows, **options of QuestionReader) -> LoadedQuestions; the tokenizer is bytes."""
    monkeypatch.chdir(tmp_path)

    def run(rows, encoder=None, name="data.jsonl", **options):
        write_rows(tmp_path / name, rows)
        return QuestionReader(encoder or Encoder(BYTES), **options).load(name)

    return run


def asked(question, answer="1"):
    return {"question": question, "answer": answer}


@pytest.mark.parametrize("name", ["rwkv", "think", "flower"])
@pytest.mark.parametrize("tokenizer", [BYTES, named("world")], ids=["bytes", "world"])
def test_training_asks_what_an_evaluation_asks(read, name, tokenizer):
    """Every layout gives the same words, right answers and tokens, with the BOS once."""
    template = load_template(name)
    encoder = Encoder(tokenizer, template, bos=tuple(tokenizer.eod))
    loaded = read(ROWS, encoder)
    wanted = read_questions("data.jsonl", template)
    assert loaded.questions == wanted and len(wanted) == len(ROWS)
    for question, prompt in zip(wanted, loaded.prompts):
        assert prompt.tolist() == [*tokenizer.eod, *question.ids(tokenizer)] and prompt.dtype == np.int32
    assert [question.answer for question in wanted[:5]] == ["2", "5", "four", "d", "y"]
    assert '"add"' in wanted[5].answer and loaded.longest == max(map(len, loaded.prompts))
    if name == "think":
        assert wanted[0].prompt.endswith("<think") and wanted[0].opening == " <think"


def test_what_is_empty_is_left_out_and_counted(read):
    report = Report()
    rows = [
        asked(" \n"),
        asked("a", " "),
        {"prompt": "\n", "completion": "1"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "t"}]},
        asked("b", "2"),
    ]
    loaded = read(rows, report=report)
    assert [question.answer for question in loaded.questions] == ["2"]
    assert loaded.places == ["data.jsonl, line 5"]
    assert report.files["data.jsonl"].left_out == {
        NO_QUESTION: (3, ["data.jsonl, line 1", "data.jsonl, line 3", "data.jsonl, line 4"]),
        NO_ANSWER: (1, ["data.jsonl, line 2"]),
    }
    assert [question.answer for question in read(rows, needs_answer=False).questions] == ["", "2"]
    with pytest.raises(UserError, match="data.jsonl, line 2: the reference answer is empty"):
        read_questions("data.jsonl")
    with pytest.raises(
        UserError, match="no row can be used, left out 1 row, in which the reference answer is"
    ):
        read(rows[1:2])


def test_a_label_is_not_ignored(read):
    """A bad answer is no right one; leaving rows out would mend nothing, so that is not advised."""
    row = {**asked("a"), "label": False}
    with pytest.raises(
        UserError, match="label tells good .*; --loss kto .*--sft_field question,answer takes all$"
    ):
        read([row], report=Report(hint="; --on_bad_row skip leaves such rows out"))
    assert len(read([row], reading=Reading(("question", "answer"))).questions) == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "line 2: expected messages, a question and its answer, or a prompt .* got text"),
        ({"question": "a"}, "line 2: the answer is missing; expected one of"),
        ({"question": "a", "answer": None}, "line 2: answer must be a non-empty string, got None"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "line 2: the last message is from user; the assistant's answer is m",
        ),
    ],
)
def test_a_bad_row_ends_the_run_or_is_skipped(read, row, said):
    rows = [asked("1"), row, asked("3")]
    with pytest.raises(UserError, match=f"^data.jsonl, {said}.*; --on_bad_row skip leaves such rows out$"):
        read(rows, report=Report(hint="; --on_bad_row skip leaves such rows out"))
    report = Report("skip")
    assert len(read(rows, report=report).questions) == 2
    assert report.bad == 1 and "data.jsonl, line 2" in report.files["data.jsonl"].reasons[0]


def test_large_files_are_read_in_several_processes(read, monkeypatch):
    """And come back the same, in order, with what was bad and left out."""
    rows = [asked(str(i)) for i in range(700)] + [
        {"prompt": " ", "completion": "1"},
        {"question": 1},
        asked("last"),
    ]
    report = Report("skip")
    whole = read(rows, report=report)
    monkeypatch.setattr(parallel, "LARGE", 1)
    monkeypatch.setattr(parallel, "available_cores", lambda: 3)
    sizes, together = [], parallel.in_parallel

    def counted(work, chunks, processes):
        sizes.append(processes)
        return together(work, chunks, processes)

    monkeypatch.setattr(parallel, "in_parallel", counted)
    shared, looked = Report("skip"), []
    reader = QuestionReader(Encoder(BYTES), report=shared)
    loaded = reader.load("data.jsonl", look=lambda *seen: looked.append(seen))
    assert sizes == [3] and shared.files == report.files and shared.bad == 1
    assert shared.files["data.jsonl"].left_out == {NO_QUESTION: (1, ["data.jsonl, line 701"])}
    assert loaded.questions == whole.questions and loaded.places == whole.places and len(loaded.places) == 701
    assert all(map(np.array_equal, loaded.prompts, whole.prompts))
    assert [row["messages"][0]["content"] for _, row in looked[-2:]] == ["699", "last"]


def test_sft_field_and_weights(read):
    rows = [{"q": str(i), "a": i} for i in range(10)]
    reading = Reading(("q", "a"))
    assert [question.answer for question in read(rows, reading=reading).questions] == list("0123456789")
    read(rows[:4], name="more.jsonl", reading=reading)
    loaded = QuestionReader(Encoder(BYTES), reading).load("data.jsonl:0.5,more.jsonl:2")
    of_file = [place.partition(",")[0] for place in loaded.places]
    assert of_file == ["data.jsonl"] * 5 + ["more.jsonl"] * 8


def test_what_does_not_fit_with_its_answer_is_left_out_and_named(read):
    loaded = read([asked("x" * n) for n in (30, 3, 40, 5, 50, 60)])
    shortest = len(loaded.prompts[1])
    # an answer's first token is read after the last one of the prompt
    examples = loaded.examples(ctx_len=shortest + 2 + 7 - 1, group_size=3, max_tokens=7)
    assert [question.prompt.count("x") for question in examples.questions] == [3, 5]
    assert examples.too_long == 4
    assert examples.too_long_places == tuple(f"data.jsonl, line {n}" for n in (1, 3, 5))
    assert examples.lengths.tolist() == [shortest + 21, shortest + 2 + 21]
    assert examples.targets == 42 and examples.weight == 2 and examples.tokens == 2 * shortest + 2
    with pytest.raises(
        UserError, match=rf"line 1: all 6 questions .* the shortest takes {shortest + 6}; raise"
    ):
        loaded.examples(ctx_len=shortest + 5, group_size=3, max_tokens=7)


def test_equal_questions_are_held_out_together(read):
    """Whatever their right answers are; a question of --eval_file is not trained on."""
    rows = [asked(str(i % 20), str(i)) for i in range(60)]
    examples = read(rows).examples(256, 4, 8)
    config = Config(loss="sft", eval_split=0.1, data_file="data.jsonl")
    train, held = hold_out(config, examples, None)
    assert len(held) == 6 and len(train) == 54
    assert not {q.prompt for q in train.questions} & {q.prompt for q in held.questions}
    assert (train.group_size, train.max_tokens, train.word) == (4, 8, "question")
    order = in_hash_order(held, config.random_seed)
    other = read(rows[::-1]).examples(256, 4, 8)
    _, again = hold_out(config, other, None)
    chosen = in_hash_order(again, config.random_seed)
    assert [again.questions[i].answer for i in chosen] == [held.questions[i].answer for i in order]

    config = Config(loss="sft", eval_file="held.jsonl", data_file="data.jsonl")
    more = read([asked("7", "other"), asked("new")], name="held.jsonl").examples(256, 4, 8)
    train, held = hold_out(config, examples, lambda path: more)
    assert len(train) == 57 and len(held) == 2
    same = read([asked("a", str(i)) for i in range(200)]).examples(256, 4, 8)
    with pytest.raises(UserError, match="200 of 200 questions .* as all have one prompt"):
        hold_out(Config(eval_split=0.1, data_file="data.jsonl"), same, None)


def test_the_digest_is_of_prompts_and_right_answers(read):
    def digest(rows):
        return read(rows).examples(256, 4, 8).digest

    rows = [asked("a", "1"), asked("b", "2")]
    assert digest(rows) == digest(rows)
    others = [rows[::-1], rows[:1], [asked("a", "1"), asked("b", "3")], [asked("a", "1"), asked("c", "2")]]
    assert len({digest(rows), *map(digest, others)}) == 5


def test_a_question_has_a_row_of_its_own(read):
    """Also with --packing 1, and in every pass in another order."""
    examples = read([asked(str(i)) for i in range(7)]).examples(256, 4, 8)
    schedule = make_schedule(examples, Config(ctx_len=256, micro_bsz=2, accumulate_grad_batches=1), world=1)
    assert sorted(map(tuple, schedule.rows)) == [(i,) for i in range(7)]
    assert schedule.steps_per_pass == 4 and schedule.step_weight(0) == 2
    assert list(schedule.targets) == [32] * 7
