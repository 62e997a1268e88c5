"""Answers: how a token is chosen, where the text ends, and that the state afterwards is that of the text, no
more and no less.
"""

import functools
import io
import random
import string
import subprocess
import sys
import types

import pytest
import torch

import rwkv_miss
from demo import chat
from rwkv_miss.adapter import adapted_linears
from src.chat import program
from src.data.chat_template import before_stops
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.inference import conversation as conversation_module
from src.inference.conversation import Conversation
from src.inference.engine import Engine, Request
from src.inference.generate import stream
from src.inference.sampling import GREEDY, RowInputs, Sampling, choose
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV

from .answering import Scripted, engine_of, run, scripted
from .conftest import ROOT, close, make_arch, random_tensors
from .test_data import assistant, encode, render, user, whole_blank_line_tokenizer

STOP = DEFAULT.stops[0]


def write_vocabulary(path, pieces):
    path.write_text("".join(f"{i} {piece!r} {len(piece)}\n" for i, piece in enumerate(pieces, 1)))
    return str(path)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A file with one token a character, so that a random model writes text that has one encoding only."""
    pieces = [c.encode() for c in string.ascii_letters + " :\n.,?!012"]
    return write_vocabulary(tmp_path_factory.mktemp("letters") / "vocabulary.txt", pieces)


@pytest.fixture(scope="module")
def crossing(tmp_path_factory):
    """Tokens that run across characters and across the stop text's beginning, and all single bytes."""
    you, smile = "你".encode(), "🙂".encode()
    pieces = [
        b"\n\n",
        b".\n\n",
        b"\n\nUs",
        b"er:",
        "，\n".encode(),
        you[:2],
        you[2:] + b".\n",
        smile[1:] + you[:1],
    ]
    path = tmp_path_factory.mktemp("crossing") / "vocabulary.txt"
    return load_tokenizer(write_vocabulary(path, [bytes([i]) for i in range(256)] + pieces), 300)


@functools.cache
def named(kind):
    return load_tokenizer(kind, 65536)


def mixing_tensors(version):
    """random_tensors with louder layers, so that the next token depends on more than the last one."""
    loud = ("att.output.weight", "ffn.value.weight")
    return {
        name: t * (6 if name.endswith(loud) else 1) for name, t in random_tensors(make_arch(version)).items()
    }


def read_texts(monkeypatch):
    """A list that gets each text that a conversation's model reads before it answers."""
    texts = []

    def noted(engine, request):
        texts.append(engine.tokenizer.decode(request.tokens))
        return stream(engine, request)

    monkeypatch.setattr(conversation_module, "stream", noted)
    return texts


def without_adapters(model):
    """Stands in for adapters.Adapters."""
    return types.SimpleNamespace(model=model, use=lambda names, scale: None, scale=1.0)


def say(tokenizer, tokens, max_tokens=1000, stops=(STOP,)):
    """Return (pieces, bytes of the state after the prompt) of the stream of these tokens."""
    ids = tokenizer.encode("Q")
    request = Request(ids, max_tokens, stops=stops, keep_state=True)
    pieces, answer = run(stream(scripted(tokenizer, tokens), request))
    state = answer.state
    assert "".join(pieces) == answer.text and state[: len(ids)] == ids and "" not in pieces
    return pieces, tokenizer.decode(state[len(ids) :])


# choosing a token


PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])
LOGITS = PROBABILITIES.log() + 7


def sample(logits, sampling, generator=None):
    (drawn,) = choose(logits[None], [RowInputs(sampling, generator=generator)], native_code=False)
    if drawn.error:
        raise drawn.error
    return drawn.token


def frequencies(sampling, count=3000):
    generator = torch.Generator().manual_seed(0)
    tokens = [sample(LOGITS, sampling, generator) for _ in range(count)]
    return torch.tensor([tokens.count(i) / count for i in range(4)])


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (GREEDY, [0, 1, 0, 0]),
        (Sampling(temperature=0, top_p=0.9, top_k=3), [0, 1, 0, 0]),
        (Sampling(1, 1, top_k=1), [0, 1, 0, 0]),
        (Sampling(1, 1), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(1, 1, top_k=9), [0.05, 0.5, 0.15, 0.3]),
        (Sampling(1, 1, top_k=2), [0, 0.625, 0, 0.375]),
        # the smallest set that reaches top_p: never less than it, and at least one token
        (Sampling(1, 0.49), [0, 1, 0, 0]),
        (Sampling(1, 0.51), [0, 0.625, 0, 0.375]),
        (Sampling(1, 0.79), [0, 0.625, 0, 0.375]),
        (Sampling(1, 0.81), [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        (Sampling(1, 1e-9), [0, 1, 0, 0]),
        # the temperature acts on what top_p left
        (Sampling(0.5, 0.81), [0, 0.25 / 0.3625, 0.0225 / 0.3625, 0.09 / 0.3625]),
        (Sampling(2, 0.51), [0, 0.5635, 0, 0.4365]),
    ],
)
def test_tokens_come_with_the_promised_frequencies(sampling, expected):
    got, expected = frequencies(sampling), torch.tensor(expected)
    # 4 standard deviations; what has no probability never comes
    assert ((got - expected).abs() <= 4 * (expected * (1 - expected) / 3000).sqrt()).all(), got


@pytest.mark.parametrize("spread", [0.01, 1, 4])
def test_top_p_of_many_tokens_is_that_of_all_of_them_sorted(spread):
    """The smallest set that reaches top_p, where 256, 4096 or all 20000 tokens hold the probability."""
    logits = spread * torch.randn(20000, generator=torch.Generator().manual_seed(0))
    probabilities, order = logits.double().softmax(0).sort(descending=True)
    before = probabilities.cumsum(0) - probabilities
    for top_p in (0.02, 0.3, 0.9, 0.9999):
        least, most = (set(order[before < top_p + rounding].tolist()) for rounding in (-1e-6, 1e-6))
        generator = torch.Generator().manual_seed(1)
        # so hot that the kept ones are alike
        drawn = {sample(logits, Sampling(1e4, top_p), generator) for _ in range(250)}
        # one of 20 or fewer is missed with a probability below 20 * 0.95^250 = 5e-5; of 100, 91 are expected,
        # and more of more
        assert drawn <= most and (
            drawn >= least if len(least) <= 20 else len(drawn) > 0.75 * min(len(least), 100)
        ), (len(drawn), len(least))


def test_choosing_a_token_leaves_the_number_of_threads_alone(monkeypatch):
    """The number belongs to the whole process: two samplers at once would put back each other's."""
    monkeypatch.setattr(
        torch, "set_num_threads", lambda count: pytest.fail(f"the process was given {count} threads")
    )
    assert sample(LOGITS, Sampling(0.5, 0.8), torch.Generator().manual_seed(0)) in (1, 3)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(), Sampling(top_k=2)], ids=["greedy", "top_p", "top_k"]
)
def test_logits_of_a_model_that_overflows_are_an_error(sampling):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"{bad}.*overflows"):
            sample(torch.tensor([0.0, bad, 1.0]), sampling)
    assert sample(torch.tensor([0.0, -torch.inf]), sampling) == 0, "a token without a chance is none"


def test_a_seed_repeats_the_answer_and_another_does_not():
    draw = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        draw.append([sample(LOGITS, Sampling(1, 1), generator) for _ in range(40)])
    assert draw[0] == draw[1] != draw[2]


class Constant(Scripted):
    """Always the same logits."""

    def __init__(self, tokenizer, logits):
        super().__init__(tokenizer)
        self.constant = logits

    def logits(self):
        return self.constant[None]


@pytest.mark.parametrize(
    "presence, frequency, decay", [(0.4, 0, 0.5), (0, 0.3, 1), (0.2, 0.3, 0.9), (0.25, 1.1, 0.5)]
)
def test_penalties_are_the_plain_formula(letters, presence, frequency, decay):
    """logit - presence [i occurs] - frequency * sum over its occurrences of decay^(tokens since)."""
    tokenizer = load_tokenizer(letters, 67)
    generator = torch.Generator().manual_seed(3)
    logits = torch.rand(tokenizer.vocab_size, generator=generator)
    logits[0] = -9  # the end of document
    expected = []
    for n in range(60):
        penalised = logits.tolist()
        for i in set(expected):
            ages = [n - 1 - t for t, token in enumerate(expected) if token == i]
            penalised[i] -= presence + frequency * sum(decay**age for age in ages)
        expected.append(max(range(len(penalised)), key=penalised.__getitem__))
    assert len(set(expected)) > 5
    sampling = Sampling(0, presence_penalty=presence, frequency_penalty=frequency, penalty_decay=decay)
    (answer,) = next(Engine(Constant(tokenizer, logits), tokenizer).run([Request([1], 60, sampling)]))
    assert answer.tokens == expected


# where an answer ends


@pytest.mark.parametrize(
    "text, expected",
    [
        ("yes\n\nUser: no", "yes"),
        ("\n\nUser:", ""),
        ("yes\n\nUse", "yes\n\nUse"),
        ("a\n\n\nUser:b", "a\n"),
        ("a\n\nUs\n\nUser:", "a\n\nUs"),
        ("a\n\nuser:", "a\n\nuser:"),
        ("你好，\n\nUser:", "你好，"),
        ("🙂\n\n🙂", "🙂\n\n🙂"),
        ("", ""),
        ("User:", "User:"),
    ],
)
def test_the_answer_ends_before_the_next_turn_and_loses_nothing_else(text, expected, crossing, tmp_path):
    for tokenizer in (
        named("bytes"),
        named("utf16"),
        named("world"),
        crossing,
        whole_blank_line_tokenizer(tmp_path),
    ):
        pieces, state = say(tokenizer, [*tokenizer.encode(text), *tokenizer.eod, *tokenizer.encode("more")])
        assert "".join(pieces) == state == expected, tokenizer.name
    assert say(crossing, crossing.encode(text + "x"), stops=())[1].startswith(text + "x"), (
        "without a stop text nothing ends it"
    )


def test_text_is_shown_as_soon_as_it_cannot_be_the_next_turn():
    tokenizer = named("bytes")
    assert say(tokenizer, b"ab\n\nUsx\n\nU", 11)[0] == ["a", "b", "\n\nUsx", "\n\nU"]


def test_the_first_of_several_stops_ends_an_answer():
    tokenizer, stops = named("bytes"), ("\n\nUser:", "\n### Tool", "\n### User")
    for text, shown in (
        ("ab\n### Too\n\nUser:\n### Tool", ["a", "b", "\n### Too"]),
        ("ab\n### User\n\nUser:", ["a", "b"]),
        ("a\n\n### Topic", ["a", "\n", "\n### Top", "i", "c"]),
    ):
        pieces, state = say(tokenizer, text.encode(), len(text), stops)
        assert pieces == shown and state == "".join(shown)
    assert before_stops("a\n### User\n\nUser:", stops) == "a" and before_stops("a", ()) == "a"


def test_a_token_that_begins_before_the_stop_is_taken_back_from_the_state(crossing):
    ids = crossing.encode("Q")
    owners = {piece: token for token, piece in crossing.table.items()}
    tokens = [*crossing.encode("好"), owners[b".\n\n"], *crossing.encode("User:")]
    request = Request(ids, 99, stops=DEFAULT.stops, keep_state=True)
    pieces, answer = run(stream(scripted(crossing, tokens), request))
    assert "".join(pieces) == "好." and answer.state == [*ids, *crossing.encode("好.")]


PARTS = ["a", "é", "你", "🙂", "，", ".", " ", "\n", "\n\n", "\n\nU", "\n\nUser", STOP, "Us", "er:", "User:"]


def any_tokens(tokenizer, data, rng):
    """A random way to write these bytes in tokens of the table."""
    owners = {piece: token for token, piece in tokenizer.table.items() if piece}
    tokens = []
    while data:
        size = rng.choice([n for n in range(1, 9) if data[:n] in owners and n <= len(data)])
        tokens.append(owners[data[:size]])
        data = data[size:]
    return tokens


@pytest.mark.parametrize("kind", ["bytes", "utf16", "crossing"])
def test_any_tokens_of_any_text_end_as_they_should(kind, crossing):
    """Random texts, cut into tokens at random, with a random limit: whole characters, the right end, the
    state of just that text.
    """
    tokenizer = crossing if kind == "crossing" else named(kind)
    stopped = limited = 0
    for seed in range(300):
        rng = random.Random(seed)
        text = "".join(rng.choices(PARTS, k=rng.randrange(9)))
        tokens = any_tokens(tokenizer, text.encode(tokenizer.encoding), rng)
        limit = rng.randrange(1, len(tokens) + 3)
        said = b"".join(tokenizer.table[token] for token in tokens[:limit]).decode(
            tokenizer.encoding, "ignore"
        )
        expected = said.partition(STOP)[0]
        pieces, state = say(tokenizer, [*tokens, *tokenizer.eod], limit)
        assert "".join(pieces) == expected, (seed, text, limit)
        assert state == expected, (seed, text, limit)
        stopped += STOP in said
        limited += limit < len(tokens)
    assert stopped > 30 and limited > 100


def test_chinese_and_emoji_are_never_broken():
    text = "你好，世界！🙂👩‍👩‍👧 ñ 𝒳 한국어"
    for tokenizer in map(named, ("world", "bytes", "utf16")):
        tokens = tokenizer.encode(text)
        for limit in range(1, len(tokens) + 1):
            pieces, state = say(tokenizer, tokens, limit)
            assert text.startswith("".join(pieces)) and "".join(pieces) == state


def test_the_end_of_utf16_is_an_aligned_pair_of_zeros():
    tokenizer = named("utf16")
    # 'a' ends with a 0 and 'Ā' begins with one: no end of document
    pieces, state = say(tokenizer, [*tokenizer.encode("aĀb"), 0, 0, *tokenizer.encode("c")])
    assert "".join(pieces) == state == "aĀb"


# conversations


@pytest.mark.parametrize("kind", ["world", "bytes", "utf16", "whole blank line"])
def test_a_chat_feeds_the_tokens_that_training_saw(kind, tmp_path):
    turns = [user("1\n\n2"), assistant("x\n\ny"), user(" é🙂"), assistant("."), user("3"), assistant("z")]
    tokenizer = whole_blank_line_tokenizer(tmp_path) if kind.startswith("whole") else named(kind)
    conversation = Conversation(scripted(tokenizer), GREEDY, system="s\n\n\nt ")
    for question, answer in zip(turns[::2], turns[1::2]):
        conversation.engine = scripted(
            tokenizer, [*tokenizer.encode(" " + answer["content"]), *tokenizer.eod]
        )
        assert "".join(conversation.answer(question["content"])) == " " + answer["content"]
    trained = encode(render([{"role": "system", "content": "s\n\n\nt "}, *turns]), tokenizer)
    assert [*conversation.state, *tokenizer.eod] == trained.ids.tolist()


@pytest.fixture(scope="module", params=[6, 7])
def model(request):
    model = RWKV(make_arch(request.param)).double().eval()
    model.load_state_dict(mixing_tensors(request.param))
    return model


def close_states(got, want):
    for layer, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in a._fields:
            close(f"layer {layer}, {name}", getattr(a, name), getattr(b, name), 1e-9)


def test_turns_on_a_kept_state_are_the_whole_dialogue_at_once(model, letters):
    tokenizer = load_tokenizer(letters, 67)
    conversation = Conversation(engine_of(model, tokenizer), Sampling(1, 1), system="be brief")
    dialogue = "System: be brief\n\n"
    for i, question in enumerate(["hello", "why? 12", "a\n\n\nb"]):
        answer = "".join(conversation.answer(question, max_tokens=17 + i))
        assert len(answer) > 3
        dialogue += (
            "\n\n" if i else ""
        ) + f"User: {question.replace(chr(10) * 3, chr(10))}\n\nAssistant:{answer}"
    ids = torch.tensor([tokenizer.encode(dialogue)])
    with torch.no_grad():
        _, whole = model(ids)
        close_states(conversation.state, whole)
        following = torch.tensor([tokenizer.encode("\n\nUser:")])
        close("logits", model(following, conversation.state)[0], model(following, whole)[0], 1e-9)


def test_the_state_after_a_stop_is_that_of_the_shown_text(model, letters):
    """A real model is made to say the stop text by what it is fed: its own logits decide until then."""
    tokenizer = load_tokenizer(letters, 67)
    forced = iter(tokenizer.encode(" no." + STOP))

    class Forced(TorchDecoder):
        def _next(self, ids, state):
            logits, state = super()._next(ids, state)
            logits[:, next(forced, 0)] += 100
            return logits, state

    request = Request(tokenizer.encode("User: q"), 99, stops=DEFAULT.stops, keep_state=True)
    (answer,) = next(Engine(Forced(model, 1), tokenizer).run([request]))
    assert answer.text == " no." and answer.finish == "stop"
    with torch.no_grad():
        close_states(answer.state, model(torch.tensor([tokenizer.encode("User: q no.")]))[1])


# the program


@pytest.fixture(scope="module", params=[6, 7])
def files(request, tmp_path_factory):
    """(base, adapter, merged): a random model, a random adapter of it, and the two merged."""
    folder = tmp_path_factory.mktemp("chat")
    base, adapter, merged = (folder / f"{name}.pth" for name in ("base", "adapter", "merged"))
    rwkv_miss.write_checkpoint(base, mixing_tensors(request.param).items())
    model = RWKV.load(base)
    rwkv_miss.inject(model, "miss", rank=5)
    for layer in adapted_linears(model).values():
        torch.nn.init.normal_(layer.miss, std=0.05)
    rwkv_miss.save_adapter(model, adapter)
    rwkv_miss.merge_file(base, adapter, merged)
    return base, adapter, merged


def answer(capsys, *flags):
    chat.main([*map(str, flags)])
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_merged_and_unmerged_give_the_same_greedy_answer(files, letters, capsys):
    base, adapter, merged = files
    flags = ["--tokenizer", letters, "--prompt", "hello?", "--temperature", 0, "--max_tokens", 40]
    whole, live, before = (
        answer(capsys, "--model", *which, *flags)
        for which in ([merged], [base, "--adapter", adapter], [base])
    )
    assert whole == live != before and len(whole) > 10 and whole.count("\n") <= 41


def test_flags_reach_the_sampling(files, letters, capsys):
    def say(*more):
        words = f"--model {files[0]} --tokenizer {letters} --prompt hello? --max_tokens 30".split()
        return answer(capsys, *words, *more)

    greedy = say("--temperature", 0)
    assert greedy == say("--top_k", 1) == say("--top_p", 1e-6) == say("--temperature", 1e-6)
    assert say("--seed", 1) == say("--seed", 1) != say("--seed", 2)
    # a negative penalty asks for the same token again
    for more in "--presence_penalty -9|--frequency_penalty -9|--system no|--raw|--max_tokens 3".split("|"):
        assert say("--temperature", 0, *more.split()) != greedy, more


def test_the_chat_keeps_its_turns_and_ends_with_its_input(files, letters, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n \nagain\n"))
    chat.main(["--model", str(files[0]), "--tokenizer", letters, "--max_tokens", "12", "--temperature", "0"])
    out, err = capsys.readouterr()
    conversation = Conversation(engine_of(RWKV.load(files[0]), load_tokenizer(letters, 67)), GREEDY)
    said = (f"Assistant:{''.join(conversation.answer(text, 12))}\n" for text in ("hello", "again"))
    assert out == "".join(said) + "\n"
    assert "base.pth: RWKV-" in err and "/exit ends the chat" in err


@pytest.mark.parametrize("files", [7], indirect=True)
def test_one_answer_on_stdout_and_nothing_else(files, letters, capsys):
    flags = (
        f"--model {files[2]} --tokenizer {letters} --prompt hello? --temperature 0 --max_tokens 20".split()
    )
    done = subprocess.run(
        [sys.executable, "-m", "demo.chat", *flags], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == answer(capsys, *flags)
    text = done.stdout.removesuffix("\n")
    conversation = Conversation(engine_of(RWKV.load(files[2]), load_tokenizer(letters, 67)), GREEDY)
    assert text == "".join(conversation.answer("hello?", 20)).lstrip(" ")


def test_the_answer_is_printed_without_the_space_of_its_first_token(capsys, monkeypatch):
    tokenizer = named("bytes")
    flags = ["--model", __file__, *"--template rwkv --prompt q --temperature 0".split()]
    for said, shown in ((b" a  b", "a  b\n"), (b"a", "a\n"), (b" ", "\n")):
        loaded = without_adapters(Scripted(tokenizer, said)), tokenizer
        monkeypatch.setattr(program, "load_named", lambda *_, loaded=loaded: loaded)
        monkeypatch.setattr(program, "fastest", lambda model, *_, **options: (model, ""))
        assert answer(capsys, *flags) == shown


@pytest.mark.parametrize(
    "imported, absent",
    [
        (
            "demo.chat, demo.accuracy, rwkv_miss.__main__, scripts.evaluate, src.model;"
            " [src.model.RWKV.load(path) for path in sys.argv[1:]]",
            # torch's compiler, as for random numbers on meta, takes 2 s
            "lightning pytorch_lightning deepspeed matplotlib train src.run torch._dynamo",
        ),
        # declarations of options import nothing that computes
        ("src.config", "src.model src.ops rwkv_miss.convert rwkv_miss.merging.merge"),
    ],
    ids=["chat, merge and evaluation", "settings"],
)
def test_a_program_imports_only_what_it_needs(imported, absent, checkpoint):
    code = f"import sys, {imported}; print(set({absent.split()}) & sys.modules.keys())"
    command = [sys.executable, "-c", code, checkpoint(6), checkpoint(7)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr


def test_the_adapter_library_needs_torch_only(tmp_path):
    """Import, inject, save, load and merge without numpy, which torch can do without, and without src."""
    code = """
import sys
for name in ("numpy", "yaml", "lightning", "deepspeed", "src"):
    sys.modules[name] = None  # importing it now fails
import torch, rwkv_miss, rwkv_miss.__main__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))
rwkv_miss.write_checkpoint("base.pth", model.state_dict().items())
rwkv_miss.inject(model, rank=2, targets=["0", "1"])
torch.nn.init.ones_(model[1].miss)
rwkv_miss.save_adapter(model, "adapter.pth")
print(rwkv_miss.merge_file("base.pth", "adapter.pth", "merged.pth").linears)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.stdout == "2\n", done.stdout + done.stderr
