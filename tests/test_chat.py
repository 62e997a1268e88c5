"""The chat's commands through a scripted stdin, what happens to its state, saved conversations, and what is
stopped.
"""

import io
import os
import shutil
import sys
import types
import zipfile

import pytest
import torch

import rwkv_miss
from demo import chat
from rwkv_miss import UserError
from src.chat import commands
from src.chat.columns import cells, side_by_side
from src.chat.commands import named_mode
from src.chat.conversation_file import load_chat, save_chat
from src.data import rwkv_template
from src.data.rwkv_template import DEFAULT
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.evaluation import guessing
from src.inference.conversation import Conversation
from src.inference.engine import Engine
from src.inference.flags import named
from src.inference.load import load_with
from src.inference.sampling import GREEDY, Sampling
from src.ops import self_test

from .answering import Scripted, engine_of, greedy_text, scripted
from .test_generate import letters, mixing_tensors, read_texts  # noqa: F401  (a fixture)
from .test_live_adapters import train
from .test_templates import CHATML
from .test_tool_styles import WEATHER, call

TOKENS = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and adapters of it, by name."""
    self_test.status("cpu")  # built here, if it has to be, and not with words in the middle of a chat
    folder = tmp_path_factory.mktemp("chat")
    rwkv_miss.write_checkpoint(folder / "base.pth", mixing_tensors(7).items())
    a, b = (
        train(folder / "base.pth", folder / f"{name}.pth", method, seed)
        for name, method, seed in (("a", "miss", 1), ("b", "dora", 2))
    )
    return types.SimpleNamespace(base=folder / "base.pth", a=a, b=b)


@pytest.fixture
def typed(files, letters, capsys, monkeypatch):  # noqa: F811
    """typed(lines, *flags) -> (stdout lines, stderr lines after the first) of a chat with a and b that these
    lines are typed into.
    """

    def run(lines, *flags, adapters=True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["--adapter", f"a={files.a}", "--adapter", files.b] if adapters else []
        sound = f"--model {files.base} --tokenizer {letters} --max_tokens {TOKENS} --temperature 0".split()
        chat.main([*sound, *map(str, [*given, *flags])])
        out, err = capsys.readouterr()
        return out.removesuffix("\n").split("\n"), err.splitlines()[1:]

    return run


def answers(lines):
    """Split stdout into answers, not by lines: these models write line ends, too."""
    return "\n".join(lines).split("Assistant:")[1:]


def said(files, letters, questions, names=(), scale=1.0, sampling=GREEDY):  # noqa: F811
    """The answers of a fresh chat with one adapter from the beginning."""
    adapters, tokenizer = load_with(
        files.base, {name: getattr(files, name) for name in names}, letters, accelerator="cpu"
    )
    adapters.use(names, scale)
    conversation = Conversation(engine_of(adapters.model, tokenizer), sampling)
    return ["".join(conversation.answer(question, TOKENS)) + "\n" for question in questions]


def test_adapters_are_chosen_in_the_chat(typed, files, letters):  # noqa: F811
    """Each answer is that of a chat with these weights from the beginning; turns in common are empty."""
    script, expected = [], []
    for line, names, scale in (
        ("", ["a"], 1),
        ("/adapter b", ["b"], 1),
        ("/scale 0.5", ["b"], 0.5),
        ("/adapter a", ["a"], 0.5),
        ("/adapter none", [], 1),
        ("/adapter a+b", ["a", "b"], 0.5),
    ):
        script += [line, "hello?", "/reset"]
        expected += said(files, letters, ["hello?"], names, scale)
    out, err = typed(script)
    got = answers(out)
    assert [text.rstrip("\n") for text in got] == [text.rstrip("\n") for text in expected]
    assert len(set(expected)) == 6
    assert [line for line in err if line != "a new conversation"] == [
        "adapter b, scale 1",
        "adapter b, scale 0.5",
        "adapter a, scale 0.5",
        "no adapter: the base answers",
        "adapter a+b, scale 0.5",
    ]


def test_the_first_adapter_answers_at_the_scale_that_is_given(typed, files, letters):  # noqa: F811
    out, err = typed(["hello?", "/adapter", "/scale"], "--scale", 0.3)
    assert answers(out)[0].rstrip("\n") == said(files, letters, ["hello?"], ["a"], 0.3)[0].rstrip("\n")
    assert err == [
        f"* a: {files.a}, miss r=4",
        f"  b: {files.b}, dora r=4",
        "adapter a, scale 0.3",
        "scale 0.3",
    ]


@pytest.mark.parametrize(
    "line, names, scale, note",
    [
        ("/adapter b", ["b"], 1, "adapter b, scale 1"),
        ("/scale 0.5", ["a"], 0.5, "adapter a, scale 0.5"),
        ("/adapter none", [], 1, "no adapter"),
    ],
)
def test_after_a_switch_the_turns_are_read_again(line, names, scale, note, files, letters, typed):  # noqa: F811
    """The answer is that of the new weights to the whole conversation so far, as at once; a switch to the
    same weights reads nothing.
    """
    out, err = typed(["hello?", "why", "/adapter a", line, "and now?"])
    assert err[0] == "adapter a, scale 1" and err[1].startswith(note)
    assert err[1].endswith("; 2 turns so far: read again with these weights before the next answer")
    adapters, tokenizer = load_with(files.base, {"a": files.a, "b": files.b}, letters, accelerator="cpu")
    adapters.use(names, scale)
    first, second, third = answers(out)
    asked = (
        f"User: hello?\n\nAssistant:{first[:-1]}\n\nUser: why\n\nAssistant:{second[:-1]}\n\nUser: and"
        " now?\n\nAssistant:"
    )
    whole = greedy_text(engine_of(adapters.model, tokenizer), asked, TOKENS, stops=DEFAULT.stops)
    assert third.rstrip("\n") == whole.rstrip("\n") and third != second


def test_undo_and_reset(typed):
    """After an undo, and after two, of which one state is kept, the chat goes on as if no turn had been."""
    out, err = typed("hello? why /undo what /undo /undo hello? why /reset hello? /undo /undo".split())
    first, second, third, again, second_again, fresh = answers(out)
    assert (again, second_again, fresh.rstrip("\n")) == (first, second, first.rstrip("\n"))
    assert third != second
    assert err == [
        "taken back; 1 turn left",
        "taken back; 1 turn left",
        "taken back; 0 turns left",
        "a new conversation",
        "taken back; 0 turns left",
        "error: there is no turn to take back",
    ]


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", "exit  "])
def test_the_words_that_end_a_chat(word, typed):
    """And a space before one says it to the model."""
    out, err = typed([" exit", word, "hello?"])
    assert len(answers(out)) == 1 and not err


def test_another_answer_in_the_place_of_the_last_one(typed, files, letters):  # noqa: F811
    """Drawn anew, from the state before the first one; at temperature 0 it is the same, which is said."""
    out, err = typed(["hello?", "why", "/retry", "/temperature 2", "/retry", "/temperature 0", "what"])
    first, second, same, other, last = answers(out)
    assert same == second and other != second
    assert err == [
        "temperature 0 draws the same answer again; /temperature 1 draws others",
        "temperature 2",
        "temperature 0",
    ]
    adapters, tokenizer = load_with(files.base, {"a": files.a}, letters, accelerator="cpu")
    adapters.use(["a"])
    asked = (
        f"User: hello?\n\nAssistant:{first[:-1]}\n\nUser: why\n\nAssistant:{other[:-1]}\n\nUser:"
        " what\n\nAssistant:"
    )
    whole = greedy_text(engine_of(adapters.model, tokenizer), asked, TOKENS, stops=DEFAULT.stops)
    assert last.rstrip("\n") == whole.rstrip("\n")


def test_an_answer_stays_if_another_one_is_stopped_before_its_first_word(files, letters, monkeypatch):  # noqa: F811
    adapters, tokenizer = load_with(files.base, {}, letters, accelerator="cpu")
    conversation = Conversation(engine_of(adapters.model, tokenizer), GREEDY)
    talk = commands.Chat(conversation, adapters, None, TOKENS, 0, lambda paths: ())
    talk.take("hello?")
    kept = conversation.turns[:], conversation.state

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(talk, "answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        talk.take("/retry")
    assert conversation.turns == kept[0] and conversation.state is kept[1]


def test_how_answers_are_drawn_is_changed_in_the_chat(typed):
    asked = "/temperature|/temperature 0.5|/top_p 0.9|/top_p 2|/temperature -1|/top_p x|/retry"
    _, err = typed(asked.split("|"))
    assert err[:3] == ["temperature 0", "temperature 0.5", "top_p 0.9"]
    assert err[3] == "error: top_p 2.0: expected more than 0 and at most 1"
    assert err[4] == "error: temperature -1.0: expected 0 or more"
    assert err[5] == "error: top_p 'x': expected a number such as 0.7"
    assert err[6] == "error: there is no turn to take back"


def test_a_tokenizer_that_is_not_the_models_is_told_once(typed, monkeypatch):
    monkeypatch.setattr(guessing, "MARGIN", -99)
    long = "a question of more tokens than are needed to tell"
    _, err = typed(["short", long, f"{long}, again"])
    assert len(err) == 2 and err[0].startswith("WARNING: the loss is ")
    assert "Is it the right model?" in err[1]


def test_unknown_commands_and_words_that_look_like_commands(typed, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Conversation, "answer", lambda self, text, most: (said for said in [asked.append(text) or " ok"])
    )
    monkeypatch.setattr(commands.Chat, "judge_tokenizer", lambda self, text: None)
    wrong = "/adapt b|/hepl|/x|/adapter c|/adapter a+a|/scale much|/scale nan|/save|/think deep"
    _, err = typed(["//x", *wrong.split("|"), " /x", "//", "/help"])
    assert (
        "no command /adapt, did you mean /adapter? There are /adapter, /scale, /reset, /undo, /retry,"
        " /temperature, /top_p, /save, " in err[0]
    )
    assert "no command /x. There are" in err[2]
    assert all(line.endswith("or another slash before it.") for line in err[:3])
    assert "did you mean /help?" in err[1] and "did you mean" not in err[2]
    assert all("type a space or another slash" in line for line in err[:3])
    assert err[3] == "error: there is no adapter 'c'; there are: a, b" and "twice" in err[4]
    assert "'much'" in err[5] and "'nan'" in err[6]
    assert "/save needs FILE" in err[7] and "off, think, normal, short, long, chinese, fake" in err[8]
    assert [line.split()[0] for line in err[9:-1]] == [f"/{name}" for name in commands.COMMANDS]
    assert len(err) == 9 + len(commands.COMMANDS) + 1
    assert [messages[0]["content"] for messages in asked] == ["/x", "/x", "/"]


def test_what_overflows_is_an_error_and_the_chat_goes_on(typed, asked):
    """And neither it nor a name that does not exist costs the state."""
    out, err = typed(["hello?", "/scale 1e38", "why", "/scale 1", "/adapter c", "why", "/adapter c", "so"])
    assert "error: the largest logit is nan" in err[1] and "an adapter's scale too large" in err[1]
    assert len(answers(out)) == 4
    assert [text.count("User: ") for text in asked] == [1, 2, 2, 1]


def test_a_base_that_is_overwritten_ends_the_chat(typed, files, monkeypatch, capsys, all_mapped):
    overwrite = commands.Command(lambda chat, argument: os.utime(files.base, ns=(1, 1)), "", "")
    monkeypatch.setitem(commands.COMMANDS, "overwrite", overwrite)
    with pytest.raises(SystemExit, match="2"):
        typed(["hello?", "/overwrite", "why", "so"])
    out, err = capsys.readouterr()
    assert len(answers(out.split("\n"))) == 2
    assert err.count("base.pth was overwritten while it is in use") == 1


def test_without_adapters_there_is_the_base(typed, files, letters):  # noqa: F811
    out, err = typed(["hello?", "/adapter", "/adapter a", "/scale 2", "/compare x"], adapters=False)
    assert answers(out)[0].rstrip("\n") == said(files, letters, ["hello?"])[0].rstrip("\n")
    assert err[0] == "no --adapter was given" and "there are: none" in err[1]
    assert err[2] == "scale 2, once an adapter is in use"
    assert "start with --model BASE --adapter ADAPTER" in err[3]


@pytest.fixture
def asked(monkeypatch):
    """The texts that are read before the answers, one after another."""
    texts = read_texts(monkeypatch)
    # no < in this vocabulary: a mode with another opening stands for the others
    monkeypatch.setitem(rwkv_template.MODES, "think-long", rwkv_template.Mode(" think a lot", " "))
    return texts


def test_think_changes_how_the_next_turn_is_asked(typed, asked):
    assert (named_mode("think", "short"), named_mode("mode", "think-long"), named_mode("think", "off")) == (
        "think-short",
        "think-long",
        "rwkv",
    )
    out, err = typed(["hello", "/think long", "why", "/think", "/think off", "so"])
    assert [text.rpartition("User: ")[2] for text in asked] == [
        "hello\n\nAssistant:",
        "why think a lot\n\nAssistant: ",
        "so\n\nAssistant:",
    ]
    assert err == ["template think-long", "template think-long", "template rwkv"]


def test_each_adapter_is_asked_in_its_own_template(typed, asked, files, tmp_path):
    """Unless the user chose one, by the flag or in the chat."""
    tensors, metadata = rwkv_miss.read_checkpoint(files.a), rwkv_miss.read_metadata(files.a)
    rwkv_miss.write_checkpoint(
        tmp_path / "long.pth", tensors.items(), {**metadata, "template": "think-long:hermes"}
    )
    typed(
        ["a", "/adapter long", "b", "/adapter none", "c", "/think long", "/adapter a", "d"],
        "--adapter",
        tmp_path / "long.pth",
    )
    typed(["e", "/adapter long", "f"], "--adapter", tmp_path / "long.pth", "--template", "rwkv")
    plain, long = "{}\n\nAssistant:", "{} think a lot\n\nAssistant: "
    expected = [
        form.format(word)
        for word, form in zip("abcdef", (plain, long, plain, long, plain, plain), strict=True)
    ]
    assert [text.rpartition("User: ")[2] for text in asked] == expected


def test_another_form_of_turns_is_read_from_the_beginning():
    """After a change to flowers nothing of the plain form may be left, and back again."""
    tokenizer = load_tokenizer("bytes", 256)
    conversation = Conversation(scripted(tokenizer), GREEDY)
    read = []
    for name, said in (
        ("rwkv", " b"),
        ("flower-fake-think", ">\nd"),
        ("flower", ">\n</think>\nf"),
        ("rwkv", " h"),
    ):
        conversation.template = load_template(name)
        conversation.engine = scripted(tokenizer, [*tokenizer.encode(said), 0])
        list(conversation.answer("q"))
        read.append(bytes(conversation.state).decode())
    plain, flower = "User: q\n\nAssistant:", "User✿q✿\nBot✿<think"
    assert read[0] == f"{plain} b"
    assert read[1] == f"{flower}></think>\nb✿\n{flower}></think>\nd"
    assert read[2] == f"{read[1]}✿\n{flower}>\n</think>\nf"
    assert read[3] == "\n\n".join(f"{plain} {letter}" for letter in "bdfh")
    conversation.engine = scripted(tokenizer, [*tokenizer.encode(" <think> never"), 0])
    list(conversation.answer("q"))
    conversation.template = load_template("flower")
    with pytest.raises(UserError, match="can't be written in template flower: .* never closes it"):
        list(conversation.answer("q"))
    conversation.undo()
    conversation.engine = scripted(tokenizer, [*tokenizer.encode(">\n</think>\ni"), 0])
    list(conversation.answer("q"))
    assert bytes(conversation.state).decode().endswith(f"h✿\n{flower}>\n</think>\ni")
    conversation.reset()
    conversation.engine = scripted(tokenizer, [*tokenizer.encode(">\nhm</think>a✿\nUser"), 0])
    assert "".join(conversation.answer("q")) == ">\nhm</think>a"


def test_mode_sets_template_and_sampling(typed):
    """As the releases recommend; /think leaves the sampling alone."""
    _, err = typed(["/mode", "/mode think", "/temperature", "/mode compact", "/think short", "/top_k"])
    start, *rest = err
    assert start.startswith("template rwkv; temperature 0, top_p 0.7, top_k 0, presence_penalty 0,")
    assert rest[:4] == [
        "template think; temperature 0.96, top_p 0.76, top_k 32, presence_penalty 1, frequency_penalty 0.1,"
        " penalty_decay 0.988 (as recommended)",
        "temperature 0.96",
        "template fake-think-compact; temperature 1, top_p 0.28, top_k 32, presence_penalty 0,"
        " frequency_penalty 0, penalty_decay 0.996 (as recommended)",
        "template think-short",
    ]
    _, err = typed(["/mode think", "/mode off", "/mode deep"])
    assert "template rwkv; temperature 0.96," in err[1] and "as before: nothing is recommended" in err[1]
    assert "error: /mode deep: expected one of off, think," in err[2] and "think-short-2025" in err[2]


def test_a_released_model_is_told_with_its_modes(typed, files, tmp_path):
    """At the start, and for a mode that it was not trained with."""
    base = tmp_path / "rwkv7-g1d-0.1b-20260129-ctx8192.pth"
    shutil.copy(files.base, base)
    _, err = typed(["/mode short", "/mode flower"], "--model", base, adapters=False)
    # typed() leaves the first line out, which is the note
    assert "/help lists the commands" in err[0]
    assert err[1].startswith("template think-short; temperature 0.96")
    assert err[2].endswith("think-long, not with flower, which is chosen") and len(err) == 4
    _, err = typed(["/mode flower"], adapters=False)
    assert len(err) == 1, "nothing is known of other files"


def test_think_is_for_rwkvs_template(typed, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    _, err = typed(["/think short"], "--template", tmp_path / "chatml.jinja")
    assert len(err) == 1 and "error: /think is about RWKV's template" in err[0]


def test_compare_shows_both_answers_and_changes_nothing(typed, asked, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plain, _ = typed(["hello?", "why", "so"])
    out, err = typed(["hello?", "/compare why", "why", "so"])
    table = [line for line in out if " |" in line]
    rest = [line for line in out if line not in table]
    assert rest == plain and err == [] and "no adapter" not in table[0]
    titles = [part.strip() for part in table[0].split("|")]
    assert titles == ["base", "a, scale 1"]
    left, right = (
        "".join(line.split(" |", 1)[i].strip() for line in table[2:]).replace(" ", "") for i in (0, 1)
    )
    assert right == answers(plain)[1].replace("\n", "").replace(" ", "") != left
    assert asked[-2] == "\n\nUser: why\n\nAssistant:", "the state is that of before the comparison"
    shown, _ = typed([], "--compare", "--prompt", "hello?")
    assert [part.strip() for part in shown[0].split("|")] == ["base", "a, scale 1"]


def test_columns_hold_wide_characters_and_long_words():
    shown = side_by_side(
        ("base", "你好，世界！你好，世界！ ok"),
        ("a", "one two three four five\n\nsixsevenexightnineteneleven"),
        43,
    )
    lines = shown.splitlines()
    assert {cells(line.partition(" | ")[0]) for line in lines if " | " in line} == {20}
    assert [line.partition(" | ")[2] for line in lines] == [
        "a",
        "-" * 20,
        "one two three four",
        "five",
        "",
        "sixsevenexightninete",
        "neleven",
    ]
    assert max(map(cells, lines)) <= 43


# saved conversations


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1, 0.9)], ids=["greedy", "sampled"])
def test_a_saved_chat_goes_on_as_if_it_had_not_stopped(sampling, files, letters, tmp_path):  # noqa: F811
    adapters, tokenizer = load_with(files.base, {"a": files.a}, letters, accelerator="cpu")
    adapters.use(["a"], 0.7)
    conversation = Conversation(engine_of(adapters.model, tokenizer), sampling, system="be brief")
    conversation.generator.manual_seed(3)
    said = ["".join(conversation.answer(text, TOKENS)) for text in ("hello", "why")]
    save_chat(conversation, adapters, tmp_path / "chat.pth")
    state, messages = conversation.state, conversation.messages
    want = ["".join(conversation.answer(text, TOKENS)) for text in ("so?", "then")]
    other = Conversation(engine_of(adapters.model, tokenizer), sampling)
    assert load_chat(other, adapters, tmp_path / "chat.pth")
    assert all(torch.equal(a, b) for old, new in zip(state, other.state) for a, b in zip(old, new))
    assert other.messages == messages
    assert ["".join(other.answer(text, TOKENS)) for text in ("so?", "then")] == want
    assert len(set(want + said)) > 2
    save_chat(other, adapters, tmp_path / "chat.pth")  # a saved chat may be replaced
    assert not load_chat(other, with_scale(adapters, 0.6), tmp_path / "chat.pth") and other.state is None
    assert len(other.turns) == 4


def with_scale(adapters, scale):
    adapters.use(adapters.used, scale)
    return adapters


def test_save_and_load_in_the_chat(typed, tmp_path):
    """With the weights of the save the state is used, with others the turns are read again, and what is said
    is the same as without a break.
    """
    out, _ = typed(["hello?", "why", "/adapter b", "so"])
    other = answers(out)[2]
    out, err = typed(
        ["hello?", "why", f"/save {tmp_path}/chat.pth", "so", "/reset", f"/load {tmp_path}/chat.pth", "so"]
    )
    assert answers(out)[2].rstrip() == answers(out)[3].rstrip() != other.rstrip()
    assert err == [
        f"2 turns saved in {tmp_path}/chat.pth",
        "a new conversation",
        f"2 turns of {tmp_path}/chat.pth",
    ]
    again, err = typed(["so"], "--load_state", tmp_path / "chat.pth")
    assert answers(again)[0].rstrip() == answers(out)[2].rstrip()
    shown, err = typed(["/adapter b", f"/load {tmp_path}/chat.pth", "so"])
    assert answers(shown)[0].rstrip() == other.rstrip()
    assert err[1].endswith(
        "2 turns of "
        + f"{tmp_path}/chat.pth, saved with other adapters or another scale: read again before the next"
        " answer"
    )
    tensors, metadata = (
        rwkv_miss.read_checkpoint(tmp_path / "chat.pth"),
        rwkv_miss.read_metadata(tmp_path / "chat.pth"),
    )
    assert metadata["turns"][0]["messages"][0] == {"role": "user", "content": "hello?"} and len(tensors) == 7


def test_the_template_is_saved(typed, files, letters, tmp_path):  # noqa: F811
    adapters, tokenizer = load_with(files.base, {}, letters, accelerator="cpu")
    conversation = Conversation(engine_of(adapters.model, tokenizer), GREEDY, template=load_template(CHATML))
    save_chat(conversation, adapters, tmp_path / "chat.pth")
    other = Conversation(engine_of(adapters.model, tokenizer), GREEDY)
    load_chat(other, adapters, tmp_path / "chat.pth")
    assert other.template.record == CHATML and other.turns == []


def test_a_file_that_is_no_saved_chat_is_not_replaced(typed, files, tmp_path):
    before = files.base.read_bytes()
    wrong = {
        f"/save {files.base}": "is no saved chat",
        f"/save {tmp_path}": "is no saved chat",
        f"/save {tmp_path}/no/chat.pth": "can't be written",
        f"/load {files.base}": "is no saved chat",
        f"/load {tmp_path}/absent.pth": "does not exist",
    }
    _, err = typed(wrong)
    assert files.base.read_bytes() == before
    for line, why in zip(err, wrong.values(), strict=True):
        assert line.startswith("error: ") and why in line


@pytest.fixture(scope="module")
def saved(files, letters, tmp_path_factory):  # noqa: F811
    """(path, conversation, adapters) of a chat with one turn, on a file of its own."""
    adapters, tokenizer = load_with(files.base, {}, letters, accelerator="cpu")
    conversation = Conversation(engine_of(adapters.model, tokenizer), GREEDY)
    "".join(conversation.answer("hello", 3))
    path = tmp_path_factory.mktemp("saved") / "chat.pth"
    save_chat(conversation, adapters, path)
    return path, conversation, adapters


def changed(path, out, tensors=None, **metadata):
    """A saved chat with other tensors (None: none of that name) and metadata."""
    new = {**rwkv_miss.read_checkpoint(path), **(tensors or {})}
    rwkv_miss.write_checkpoint(
        out, ((k, t) for k, t in new.items() if t is not None), {**rwkv_miss.read_metadata(path), **metadata}
    )


TURN = {"messages": [{"role": "user", "content": "x"}], "pieces": ["x"], "whole": True}
WRONG = [
    (dict(base_fingerprint="0"), "another base"),
    (dict(tokenizer="world"), "--tokenizer world"),
    (dict(format_version=2), "version 2"),
    (dict(format="rwkv-miss adapter"), "no saved chat"),
    (dict(read=2), "damaged"),
    (dict(read=-1), "damaged"),
    (dict(read=0), "damaged"),
    (dict(read=True), "read is .True"),
    (dict(template="/etc/hostname"), "its template is"),
    (dict(system=None), "system is"),
    (dict(turns=[]), "damaged"),
    (dict(turns=[{**TURN, "whole": False}]), "damaged"),
    *(
        (dict(turns=[{**TURN, **wrong}]), "a turn is")
        for wrong in ({"pieces": [1]}, {"whole": 1}, {"messages": ["x"]}, {"x": 1})
    ),
    *(
        (dict(tensors=tensors), why)
        for tensors, why in (
            ({"blocks.0.wkv": None}, "blocks.0.wkv is None"),
            ({"blocks.0.att_x": torch.zeros(1, 47)}, "att_x is .1, 47., expected .1, 48."),
            ({"blocks.1.ffn_x": torch.zeros(1, 48, dtype=torch.int64)}, "damaged"),
            ({"blocks.9.ffn_x": torch.zeros(1)}, "blocks.9.ffn_x"),
            ({"blocks.1.ffn_x": torch.full((1, 48), torch.nan)}, "NaN"),
            ({"generator": torch.zeros(3)}, "random numbers"),
            ({"generator": None}, "random numbers"),
            ({"generator": torch.zeros(5056, dtype=torch.uint8)}, "random numbers"),
        )
    ),
]


@pytest.mark.parametrize("changes, why", WRONG, ids=[why for _, why in WRONG])
def test_what_does_not_fit_is_refused_and_changes_nothing(changes, why, saved, tmp_path):
    path, conversation, adapters = saved
    before = vars(conversation).copy()
    changed(path, tmp_path / "chat.pth", **changes)
    with pytest.raises(UserError, match=why):
        load_chat(conversation, adapters, tmp_path / "chat.pth")
    assert vars(conversation) == before


ANSWER = {"role": "assistant", "content": "x", "tool_calls": [call("f", {})]}


def test_tools_and_calls_are_in_a_saved_chat(saved, tmp_path):
    path, conversation, adapters = saved
    turn = {"messages": [{"role": "user", "content": "x"}, ANSWER], "pieces": ["x"], "whole": True}
    changed(path, tmp_path / "chat.pth", tools=[WEATHER], turns=[turn])
    other = Conversation(conversation.engine, GREEDY)
    load_chat(other, adapters, tmp_path / "chat.pth")
    assert other.tools == [WEATHER] and other.calls == ANSWER["tool_calls"]
    save_chat(other, adapters, tmp_path / "again.pth")
    load_chat(conversation, adapters, tmp_path / "again.pth")
    assert conversation.tools == [WEATHER] and conversation.calls == ANSWER["tool_calls"]
    for calls in ("x", ["x"], [{"function": {"name": "f"}}], [{"function": {"name": "f", "arguments": {}}}]):
        wrong = {**turn, "messages": [{**ANSWER, "tool_calls": calls}]}
        changed(path, tmp_path / "wrong.pth", turns=[wrong])
        with pytest.raises(UserError, match="damaged: a turn is"):
            load_chat(other, adapters, tmp_path / "wrong.pth")
    changed(path, tmp_path / "wrong.pth", tools=[{}])
    with pytest.raises(UserError, match="damaged: a tool must be"):
        load_chat(other, adapters, tmp_path / "wrong.pth")


def test_damaged_files_are_refused(saved, tmp_path):
    """Cut off anywhere, and with any byte of tensors or metadata flipped, which the checksums know."""
    path, conversation, adapters = saved
    content, before, bad = path.read_bytes(), vars(conversation).copy(), tmp_path / "chat.pth"
    with zipfile.ZipFile(path) as archive:
        places = [info.header_offset + 200 for info in archive.infolist() if info.file_size > 200]
    for damaged in [content[:length] for length in range(0, len(content), len(content) // 40)] + [
        content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :] for place in places
    ]:
        bad.write_bytes(damaged)
        with pytest.raises(UserError):
            load_chat(conversation, adapters, bad)
    assert vars(conversation) == before and len(places) == 5
    assert load_chat(conversation, adapters, path)


# chats that are stopped


class Stopped(Scripted):
    """Ctrl-C comes while the model makes a token."""

    def __init__(self, tokenizer, tokens, at):
        super().__init__(tokenizer, tokens)
        self.at = at

    def logits(self):
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt
        return super().logits()


@pytest.mark.parametrize("at, kept", [(0, ""), (4, " yes")])
def test_a_stopped_answer_is_what_was_said_of_it(at, kept):
    """Nothing said: no turn. The next answer reads what the state does not hold."""
    tokenizer = load_tokenizer("bytes", 256)
    conversation = Conversation(scripted(tokenizer, b" first\0"), GREEDY)
    "".join(conversation.answer("1"))
    conversation.engine = Engine(Stopped(tokenizer, b" yes, and", at), tokenizer)
    with pytest.raises(KeyboardInterrupt):
        list(conversation.answer("2"))
    assert [m["content"] for m in conversation.messages[2:]] == (["2", kept.strip()] if kept else [])
    conversation.engine = scripted(tokenizer, b" third\0")
    "".join(conversation.answer("3"))
    stopped = f"\n\nUser: 2\n\nAssistant:{kept}" if kept else ""
    assert (
        tokenizer.decode(conversation.state)
        == f"User: 1\n\nAssistant: first{stopped}\n\nUser: 3\n\nAssistant: third"
    )
    conversation.undo()
    assert tokenizer.decode(conversation.unread()[0]) == "User: 1\n\nAssistant: first"
    conversation.undo()
    conversation.engine = scripted(tokenizer, b" x\0")
    "".join(conversation.answer("4"))
    first = "User: 1\n\nAssistant: first\n\n" if kept else ""
    assert tokenizer.decode(conversation.state) == f"{first}User: 4\n\nAssistant: x"


def test_ctrl_c_stops_the_answer_and_not_the_chat(typed, monkeypatch, capsys):
    """Wherever it comes: here while a piece is printed. At the prompt it ends the chat."""
    pieces = []

    def interrupted(*words, **options):
        print(*words, **options)
        pieces.append(words)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    plain, _ = typed(["hello?", "why"])
    monkeypatch.setattr(commands, "print", interrupted, raising=False)
    out, err = typed(["hello?", "/undo", "hello?", "why"])
    first, second, third = answers(out)
    assert answers(plain)[0].startswith(first[:-1]) and 0 < len(first) < len(answers(plain)[0])
    assert (second, third.rstrip("\n")) == (answers(plain)[0], answers(plain)[1].rstrip("\n"))
    assert err == [
        "stopped; what was said stays in the conversation, until /undo",
        "taken back; 0 turns left",
    ]


# the last question is in brackets, and no longer once another one follows
ANEW = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}.{%"
    " endgeneration %}{% else %}{{ '[' if loop.last or loop.index0 == messages|length - 2 else '<' }}{{"
    " m['content'] }}{{ ']' if loop.last or loop.index0 == messages|length - 2 else '>' }}{% endif %}{%"
    " endfor %}"
)


def test_a_template_that_writes_the_conversation_anew_is_read_whole():
    """Also after an undo and with a state forgotten: the pieces of earlier turns are then not read twice."""
    tokenizer = load_tokenizer("bytes", 256)
    template = load_template(ANEW)
    conversation = Conversation(scripted(tokenizer), GREEDY, template=template)

    def ask(text, said):
        conversation.engine = scripted(tokenizer, said + b"\0")
        "".join(conversation.answer(text))
        return tokenizer.decode(conversation.state)

    assert ask("a", b"x") == "[a]x"
    assert ask("b", b"y") == "<a>x.[b]y"
    conversation.undo()
    conversation.read_again()
    assert ask("c", b"z") == "<a>x.[c]z"
    assert conversation.unread()[1] == [] and tokenizer.decode(conversation.unread()[0]) == "<a>x.[c]z"
    conversation.read_again()
    assert "".join(conversation.unread()[1]) == "<a>x.[c]z"


# flags


def test_adapters_are_named_by_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.pth").touch()
    adapters = ["x=run/adapter.pth", "run/other.pth", "a=b.pth", "runs/lr=1/third.pth"]
    assert named(adapters) == {
        "x": "run/adapter.pth",
        "other": "run/other.pth",
        "a=b": "a=b.pth",
        "third": "runs/lr=1/third.pth",
    }


def test_adapters_of_different_tokenizers_are_not_switched(files, tmp_path):
    paths = {}
    for name, tokenizer in (("a", "bytes"), ("b", "utf16"), ("c", None)):
        tensors, metadata = rwkv_miss.read_checkpoint(files.a), rwkv_miss.read_metadata(files.a)
        rwkv_miss.write_checkpoint(tmp_path / name, tensors.items(), {**metadata, "tokenizer": tokenizer})
        paths[name] = tmp_path / name
    with pytest.raises(
        UserError, match="different tokenizers .a: bytes, b: utf16, c: None.; give --tokenizer"
    ):
        load_with(files.base, paths)


def test_every_adapter_is_checked_before_the_chat_begins(files, tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(b"\0")
    with pytest.raises(SystemExit):
        chat.main(
            f"""
                --model {files.base} --adapter {files.a} --adapter {tmp_path}/bad.pth --tokenizer bytes
            """.split()
        )
    out, err = capsys.readouterr()
    assert out == "" and "bad.pth is truncated" in err


def test_an_adapter_that_is_a_folder_is_converted_first(files, tmp_path):
    with pytest.raises(
        UserError, match=f"{tmp_path} is a folder, .* rwkv_miss convert {tmp_path} adapter.pth --to native"
    ):
        load_with(files.base, {"a": files.a, "b": tmp_path})
