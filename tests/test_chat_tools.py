"""Tools in a chat: their files, the calls that are read out of answers, and the results that are given."""

import itertools
import json

import pytest

from demo import chat
from rwkv_miss import UserError
from src.chat import program
from src.chat.commands import Chat
from src.data.rwkv_template import RwkvTemplate
from src.data.templates import load_template
from src.data.tool_styles import STYLES, read_tools
from src.inference import conversation as conversation_module
from src.inference.conversation import Conversation
from src.inference.sampling import GREEDY

from .answering import Scripted, scripted
from .test_generate import named, read_texts, without_adapters
from .test_templates import CHATML
from .test_tool_styles import WEATHER, call


@pytest.fixture
def talk(monkeypatch):
    """talk(template) -> (a chat, a function that makes it say a text next, the texts that are read)."""

    def make(template):
        texts = read_texts(monkeypatch)
        tokenizer = named("bytes")
        conversation = Conversation(scripted(tokenizer), GREEDY, template=template)
        made = Chat(conversation, without_adapters(None), lambda *_: template, 500, 0, lambda *_: ())
        made.tokenizer_judged = True

        def then_say(text):
            conversation.engine = scripted(tokenizer, [*tokenizer.encode(text), *tokenizer.eod])

        return made, then_say, texts

    return make


@pytest.fixture
def weather(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([WEATHER]))
    return tmp_path / "tools.json"


def test_calls_are_shown_and_answered_in_the_chat(talk, weather, capsys):
    template = RwkvTemplate("rwkv")
    style = STYLES["hermes"]
    made, then_say, read = talk(template)
    made.take(f"/tools {weather}")
    calls = [call("get_weather", {"location": town}) for town in ("Rome", "Oslo")]
    then_say(" Let me look.\n" + style.calls(calls))
    made.take("Where is it hot?")
    assert made.conversation.turns[-1].messages[1:] == [
        {"role": "assistant", "content": "Let me look.", "tool_calls": calls}
    ]
    for line in ("/result 31\n\nC", "/result -3"):
        then_say(" In Rome.")
        made.take(line)
    turn = {"role": "tool", "content": "31\n\nC"}
    assert made.conversation.turns[-1].messages == [
        turn,
        {"role": "tool", "content": "-3"},
        {"role": "assistant", "content": "In Rome."},
    ]
    assert read == [
        f"System: {style.describe([WEATHER])}\n\nUser: Where is it hot?\n\nAssistant:",
        "\n\n" + template._turns([turn, {"role": "tool", "content": "-3"}], ask=True),
    ]
    made.take("/tools")
    assert capsys.readouterr().err.splitlines() == [
        '  get_weather: Says "hot"',
        "",
        "or cold.",
        "1 tool, a new conversation",
        'call 1 of 2: get_weather {"location": "Rome"}',
        'call 2 of 2: get_weather {"location": "Oslo"}',
        "/result TEXT is what call 1 gave",
        'call 2 of 2: get_weather {"location": "Oslo"}',
        "/result TEXT is what call 2 gave",
        '  get_weather: Says "hot"',
        "",
        "or cold.",
        "1 tool",
    ]
    then_say(" In Rome!")
    made.take("/retry")
    assert [m["content"] for m in made.conversation.turns[-1].messages] == ["31\n\nC", "-3", "In Rome!"]
    made.take("/tools none")
    assert not made.conversation.tools and not made.conversation.turns


def test_words_may_come_before_the_results_are_complete(talk, weather):
    made, then_say, read = talk(RwkvTemplate("rwkv"))
    made.take(f"/tools {weather}")
    then_say(" " + STYLES["hermes"].calls([call("f", {}), call("g", {})]))
    made.take("Do both.")
    made.take("/result 1")
    then_say(" ok")
    made.take("Stop.")
    assert [m["role"] for m in made.conversation.turns[-1].messages] == ["tool", "user", "assistant"]
    assert made.results == []
    with pytest.raises(UserError, match="the last answer has no call at its end"):
        made.take("/result 2")


@pytest.mark.parametrize("pieces", [0, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_a_result_is_asked_once_where_its_answer_was_stopped(pieces, error, talk, weather, monkeypatch):
    """A stopped answer stays with its results; where nothing was said, the last one is to be given again."""
    made, then_say, _ = talk(RwkvTemplate("rwkv"))
    made.take(f"/tools {weather}")
    then_say(" " + STYLES["hermes"].calls([call("f", {}), call("g", {})]))
    made.take("Do both.")
    made.take("/result 1")
    whole = conversation_module.stream

    def stopped(*arguments):
        yield from itertools.islice(whole(*arguments), pieces)
        raise error("stopped")

    monkeypatch.setattr(conversation_module, "stream", stopped)
    then_say(" well then")
    with pytest.raises(error):
        made.take("/result 2")
    monkeypatch.setattr(conversation_module, "stream", whole)
    kept = pieces > 0 and error is KeyboardInterrupt
    assert [result["content"] for result in made.results] == ([] if kept else ["1"])
    then_say(" ok")
    made.take("Go on." if kept else "/result 2")
    said = [message["content"] for turn in made.conversation.turns[1:] for message in turn.messages]
    assert said == (["1", "2", said[2], "Go on.", "ok"] if kept else ["1", "2", "ok"])
    assert made.results == []


def test_without_tools_nothing_is_a_call_and_a_broken_call_is_text(talk, weather):
    made, then_say, _ = talk(RwkvTemplate("rwkv"))
    style = STYLES["hermes"]
    text = style.calls([call("f", {})])
    then_say(" " + text)
    made.take("hi")
    assert made.conversation.turns[-1].messages[1] == {"role": "assistant", "content": text}
    made.take(f"/tools {weather}")
    broken = text.replace("}", "")
    then_say(" " + broken)
    made.take("hi")
    assert made.conversation.turns[-1].messages[1] == {"role": "assistant", "content": broken}


def test_a_jinja_template_is_asked_with_the_calls_and_the_tools(talk, weather):
    written = "(message.tool_calls | tojson if message.tool_calls else '') + message.content +"
    source = CHATML.replace("message.content +", written)
    made, then_say, read = talk(load_template(source))
    made.take(f"/tools {weather}")
    calls = [call("f", {"a": 1})]
    then_say(STYLES["hermes"].calls(calls) + "<|im_end|>")
    made.take("hi")
    then_say("ok<|im_end|>")
    made.take("/result 3")
    assert made.conversation.turns[0].messages[1]["tool_calls"] == calls
    assert (
        read[0] == f"tools={json.dumps([WEATHER])}\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    # this one writes the call in its own words, so it is read from the beginning
    assert read[1] == read[0] + (
        f"{json.dumps(calls)}<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(UserError, match="does not write tools; choose another --template"):
        talk(load_template(CHATML.replace("if tools", "if false")))[0].conversation.use_tools([WEATHER])


def test_files_of_tools(tmp_path):
    path = tmp_path / "tools.json"
    for value in ([WEATHER], {"tools": [WEATHER]}, WEATHER):
        path.write_text(json.dumps(value))
        assert read_tools(path) == [WEATHER]
    for text, words in (
        ("[", "is no JSON: .*; tools are a JSON file with a list of"),
        ("[]", "got ..; tools are a JSON file"),
        ("3", "got 3; tools are a JSON file"),
        ('[{"name": 3}]', "tools.json: a tool must be"),
        ("[" * 10**5, "is no JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_tools(path)
    with pytest.raises(UserError, match="cannot read absent.json as tools"):
        read_tools("absent.json")


def test_one_prompt_with_tools(weather, monkeypatch, capsys):
    tokenizer = named("bytes")
    text = STYLES["hermes"].calls([call("f", {"é": 1})])
    monkeypatch.setattr(
        program,
        "load_named",
        lambda args: (without_adapters(Scripted(tokenizer, tokenizer.encode(f" {text}"))), tokenizer),
    )
    monkeypatch.setattr(program, "fastest", lambda model, *_, **options: (model, "as the script says"))
    # any file does for a model that is a stand-in
    flags = ["--model", str(weather), "--tokenizer", "bytes", "--prompt", "q", "--tools", str(weather)]
    chat.main([*flags, "--temperature", "0", "--template", "rwkv"])
    out, err = capsys.readouterr()
    assert out == f"{text}\n" and err.splitlines()[0] == 'call 1 of 1: f {"é": 1}'
