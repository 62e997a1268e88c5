"""--bos: training, chat, evaluation and the records agree on what a document begins with."""

import importlib.util
import json
import types

import numpy as np
import pytest

import rwkv_miss
from demo import chat
from rwkv_miss import UserError, merge_file, read_metadata
from rwkv_miss.adapter_file import read_adapter
from scripts.preview_lint import Lint
from src import config as configuration
from src.chat import program
from src.chat.commands import Chat
from src.chat.conversation_file import load_chat, save_chat
from src.config import Config
from src.config.validate import check_data
from src.data.batches import make_schedule
from src.data.bos import bos_ids
from src.data.dataset import Document, Documents, load
from src.data.encode import Encoder
from src.data.held_out import questions
from src.data.questions import Question, read_questions
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, export, gguf_reader
from src.inference.adapters import BASE
from src.inference.conversation import Conversation
from src.inference.engine import Engine
from src.inference.load import load_with
from src.inference.sampling import GREEDY
from src.model import RWKV
from src.planning.draft import Draft
from src.planning.plan import read_data
from src.reporting import data_text, document_text
from src.sources import source_of
from src.training.outputs import writer
from src.training.resume import earlier_settings, find_checkpoint, inherit

from .answering import Scripted, engine_of
from .conftest import make_arch, random_tensors, write_rows
from .test_generate import named

WORLD, BYTES = named("world"), load_tokenizer("bytes", 256)
UTF16 = load_tokenizer("utf16", 256)
FLOWER = 10060  # an id of World with a text
SETTINGS = {"none": (), "auto": (0,), str(FLOWER): (FLOWER,)}
ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]}


class Listener(Scripted):
    """Ends its answers at once, and keeps what it was fed in `fed`."""

    def __init__(self):
        super().__init__(WORLD)
        self.fed = []

    def read(self, ids, state, applied=BASE):
        self.fed += ids[0].tolist()
        return super().read(ids, state, applied)


@pytest.mark.parametrize("spec, bos", SETTINGS.items())
def test_training_chat_and_evaluation_begin_alike(spec, bos, tmp_path):
    assert bos_ids(spec, WORLD) == bos
    [(ids, _)] = Encoder(WORLD, bos=bos_ids(spec, WORLD)).encode(ROW)
    prompt = [*bos, *WORLD.encode("User: hi\n\nAssistant:")]
    assert ids.tolist() == [*prompt, *WORLD.encode(" you"), 0]
    conversation = Conversation(Engine(Listener(), WORLD), GREEDY, bos=bos)
    assert list(conversation.answer("hi")) == [] and conversation.state == prompt
    list(conversation.answer("more"))
    more = WORLD.encode("\n\n") + WORLD.encode("User: more\n\nAssistant:")
    assert conversation.state == prompt + more, "a later turn does not begin anew"
    conversation.read_again()
    list(conversation.answer("yet"))
    assert conversation.state[: len(prompt)] == prompt, "the whole conversation, read again, does"
    (tmp_path / "asked.jsonl").write_text(json.dumps(ROW) + "\n")
    [question] = read_questions(tmp_path / "asked.jsonl")
    assert question.ids(WORLD, bos) == prompt


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm_eval IS ABSENT")
@pytest.mark.parametrize("spec, bos", SETTINGS.items())
def test_the_harness_begins_alike(spec, bos):
    from scripts.lm_eval import arguments, protocol
    from src.evaluation.lm_eval_model import HarnessModel

    harness = HarnessModel(None, WORLD, DEFAULT, bos)
    assert harness._tokens("The cat", " sat") == ([*bos, *WORLD.encode("The cat")], WORLD.encode(" sat"))
    assert harness._tokens("", "cat") == (list(bos) or [0], WORLD.encode("cat"))
    asked = ["--model", "m", "--tasks", "piqa"]
    assert bos_ids(arguments(asked).bos, WORLD) == (0,), "BlinkDL's protocol where nothing is said"
    assert ("[0] + text" in protocol(bos)) == (bos == (0,))


@pytest.mark.parametrize("tokenizer", [WORLD, BYTES, UTF16], ids=lambda tokenizer: tokenizer.name)
def test_auto_is_the_end_of_document_and_no_target(tokenizer):
    bos = bos_ids("auto", tokenizer)
    assert bos == tokenizer.eod
    for loss_mask in ("assistant", "all", "m"):
        for record in ({"text": "some words"}, {"ids": tokenizer.encode("some words")}, ROW):
            if loss_mask == "m" and "ids" in record and tokenizer is UTF16:
                continue  # which has no such marker
            [(ids, trained)] = Encoder(tokenizer, DEFAULT, loss_mask).encode(record)
            [(with_it, mask)] = Encoder(tokenizer, DEFAULT, loss_mask, bos).encode(record)
            assert with_it.tolist() == [*bos, *ids] and mask.tolist() == [0] * len(bos) + trained.tolist()
            assert ids.dtype == with_it.dtype and trained.dtype == mask.dtype


def test_a_document_that_begins_with_it_does_not_get_it_twice():
    encoder = Encoder(WORLD, bos=(0,))
    [(ids, trained)] = encoder.encode({"ids": np.array([0, 5, 6, 0])})
    assert ids.tolist() == [0, 5, 6, 0] and trained.tolist() == [0, 1, 1, 1]
    assert encoder.encode({"ids": np.array([5, 0])})[0][0].tolist() == [0, 5, 0]
    # half of it is not it
    assert Encoder(UTF16, bos=(0, 0)).encode({"ids": [0, 1, 0, 0]})[0][0].tolist() == [0, 0, 0, 1, 0, 0]


def test_the_first_part_of_a_long_text_begins_with_it_and_every_packed_document(tmp_path):
    rows = [{"text": "abcdefghijklmnopqrstuvw"}, {"prompt": "x", "completion": "y"}, {"text": "z"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    path = str(tmp_path / "rows.jsonl")
    plain = load(path, Encoder(BYTES)).documents(10)
    documents = load(path, Encoder(BYTES, bos=(33,))).documents(10)
    texts = [bytes(document.ids.tolist()).decode() for document in documents]
    assert texts == ["!abcdefghij", "jklmnopqrst", "tuvw\0", "!xy\0", "!z\0"]
    # the first token of a text is a target, because something stands before it
    assert documents.targets == plain.targets + 2
    config = Config(ctx_len=20, micro_bsz=1, accumulate_grad_batches=1, packing=True)
    rows = make_schedule(documents, config, 1).rows
    packed = [[texts[i] for i in row] for row in rows]
    assert max(map(len, packed)) > 1 and sum(text[0] == "!" for row in packed for text in row) == 3
    assert load(path, Encoder(BYTES, bos=(33,))).longest == load(path, Encoder(BYTES)).longest + 1


@pytest.mark.parametrize(
    "spec, tokenizer, message",
    [
        ("end", WORLD, "--bos end: expected recorded, none, auto, or the id of a token, such as 0"),
        ("-1", WORLD, "expected recorded, none, auto"),
        ("0 0", WORLD, "expected recorded, none, auto"),
        (
            "65530",
            WORLD,
            "world has no such id; its ids go from 0 to 65529. auto is its end .* token 0; none",
        ),
        ("7", UTF16, "several ids for a character, .* auto is its end of document, tokens 0 0"),
    ],
)
def test_what_it_takes_is_said(spec, tokenizer, message):
    with pytest.raises(UserError, match=message):
        bos_ids(spec, tokenizer)
    if "expected" in message:
        with pytest.raises(UserError, match=message):
            check_data(Config(data_file="rows.jsonl", bos=spec))


@pytest.fixture
def adapted(tmp_path):
    """adapted(NAME, **metadata) -> (base, adapter)."""
    base = tmp_path / "base.pth"
    rwkv_miss.write_checkpoint(base, random_tensors(make_arch(7, vocab_size=256)).items())

    def make(name, **metadata):
        model = RWKV.load(base)
        rwkv_miss.inject(model, "miss", rank=4)
        for parameter in model.parameters():
            parameter.data += len(name) * 1e-3 * parameter.requires_grad
        rwkv_miss.save_adapter(model, tmp_path / name, **metadata)
        return base, tmp_path / name

    return make


def test_files_record_it_and_those_without_a_record_mean_none(adapted, tmp_path):
    base, adapter = adapted("a.pth", tokenizer="bytes", bos=[33])
    merged, twice = tmp_path / "merged.pth", tmp_path / "twice.pth"
    merge_file(base, adapter, merged)
    for paths in ((adapter,), (adapter, base), (merged,), ("", merged)):
        assert bos_ids("recorded", BYTES, *paths) == (33,)
        assert bos_ids("none", BYTES, *paths) == ()
    _, plain = adapted("plain.pth", tokenizer="bytes")
    for paths in ((), (base,), (plain, merged)):
        assert bos_ids("recorded", BYTES, *paths) == ()
    # an adapter that was trained without it, on what was trained with it
    model = RWKV.load(merged)
    rwkv_miss.inject(model, "miss", rank=4)
    rwkv_miss.save_adapter(model, tmp_path / "b.pth", tokenizer="bytes", bos=[])
    merge_file(merged, tmp_path / "b.pth", twice)
    assert read_metadata(twice)["bos"] == []


def test_adapters_that_differ_in_it_make_no_merged_model(adapted, tmp_path):
    base, one = adapted("one.pth", bos=[33])
    _, two = adapted("second.pth")
    for pair in ([one, two], [two, one]):
        with pytest.raises(UserError, match=r"different BOS tokens \(--bos\): .*none"):
            merge_file(base, pair, tmp_path / "merged.pth")
    _, third = adapted("the third.pth", bos=[33])
    merge_file(base, [one, third], tmp_path / "merged.pth")
    assert read_metadata(tmp_path / "merged.pth")["bos"] == [33]


@pytest.mark.parametrize("bos", ["0", [0.5], [True]])
def test_a_damaged_record_is_named(bos, adapted):
    _, path = adapted("a.pth", bos=bos)
    with pytest.raises(UserError, match="a.pth is damaged: its bos is .*, expected a list of numbers"):
        read_adapter(path)
    with pytest.raises(UserError, match="a.pth is damaged: its bos is .*expected a list of ids"):
        bos_ids("recorded", BYTES, path)
    rwkv_miss.write_checkpoint(path.with_name("m.pth"), {}.items(), {"bos": [300]})
    with pytest.raises(UserError, match="began with token 300, which tokenizer bytes lacks"):
        bos_ids("recorded", BYTES, path.with_name("m.pth"))


def test_a_saved_chat_goes_on_with_its_own(adapted, tmp_path):
    base, _ = adapted("a.pth")

    def conversation(bos):
        adapters, tokenizer = load_with(base, {}, "bytes", accelerator="cpu", wkv="torch")
        return Conversation(engine_of(adapters.model, tokenizer), GREEDY, bos=bos), adapters

    first, adapters = conversation((33,))
    list(first.answer("a", 2))
    save_chat(first, adapters, tmp_path / "chat.pth")
    second, adapters = conversation(())
    assert load_chat(second, adapters, tmp_path / "chat.pth") and second.bos == (33,)
    first.read_again()
    assert "".join(first.answer("b", 4)) == "".join(second.answer("b", 4))


def test_sample_questions_are_as_without_it():
    """A text that is trained as a whole is asked by its first half, not by the token before it alone."""
    record, encoders = {"text": "trained as one"}, [Encoder(BYTES, bos=bos) for bos in ((), (33,))]
    for row, prompt in ((record, "trained"), (ROW, "User: hi\n\nAssistant:")):
        plain, begun = (
            questions(Documents([Document(*encoder.encode(row)[0])]), 1, encoder)[0] for encoder in encoders
        )
        assert bytes(plain.prompt).decode() == prompt and begun.prompt == [33, *plain.prompt]
        assert begun.answer == plain.answer
    single = Documents([Document(*encoders[1].encode({"text": "x"})[0])])
    assert questions(single, 1, encoders[1]) == []


def test_texts_are_not_taken_for_known_prompts():
    lint = Lint(Encoder(BYTES, bos=(33,)), 99)
    lint.look("row 1", {"text": "one"})
    lint.compare("held out", {"text": "two"})
    assert lint.findings == []


@pytest.mark.parametrize("spec, bos", SETTINGS.items())
def test_the_plan_says_and_shows_it(spec, bos, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    config = Config(data_file=str(tmp_path / "rows.jsonl"), bos=spec, ctx_len=99)
    data = read_data(Draft(config), WORLD, DEFAULT)
    assert data.encoder.bos == bos
    line = data_text.documents_line(
        types.SimpleNamespace(settings=config, data=data, source=source_of(config))
    )
    assert line.endswith(f"(template rwkv{f', BOS token {bos[0]}' if bos else ''})")
    shown = document_text.short_sample(data.documents[0], WORLD)
    assert shown.startswith({"none": "User", "auto": "␂User"}.get(spec, "✿User"))


def test_the_plan_counts_the_documents_of_a_text_and_no_row(tmp_path):
    (tmp_path / "book.txt").write_text("word " * 2000)
    config = Config(data_file=str(tmp_path / "book.txt"), ctx_len=256)
    data = read_data(Draft(config), WORLD, DEFAULT)
    line = data_text.documents_line(
        types.SimpleNamespace(settings=config, data=data, source=source_of(config))
    )
    cut = "1 text of more than --ctx_len 256 tokens, cut into several documents"
    assert f"book.txt (plain text): {len(data.documents)} documents ({cut}), 2," in line


def test_a_run_does_not_resume_with_another(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-00000002.pth").touch()

    def resumed(bos):
        config = Config(data_file="rows.jsonl", proj_dir=str(tmp_path), resume="auto", bos=bos)
        before = earlier_settings(config.proj_dir, config.resume)
        draft = Draft(config)
        inherit(draft, before)
        return find_checkpoint(draft.config, before.settings)

    def write(**settings):
        config = Config(data_file="rows.jsonl", **settings)
        configuration.save(config, str(tmp_path / "config.yaml"))

    write(bos="auto")
    assert resumed("auto").endswith("step-00000002.pth")
    with pytest.raises(UserError, match="has bos auto, now it is none"):
        resumed("none")
    write()
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("bos")))
    with pytest.raises(UserError, match="has bos recorded, now it is 0"):
        resumed("0")
    assert resumed("recorded")


@pytest.fixture
def trained(tmp_path):
    """trained(TOKENIZER, BOS): a model that was trained so."""
    path = tmp_path / "trained.pth"

    def make(tokenizer, *bos):
        arch = make_arch(7, 1, 64, 64, 65536 if tokenizer == "world" else 256)
        described = {"tokenizer": tokenizer, "bos": list(bos)}
        rwkv_miss.write_checkpoint(path, random_tensors(arch).items(), described)
        return path

    return make


@pytest.mark.parametrize("spec, bos", [("recorded", (0,)), ("none", ()), (str(FLOWER), (FLOWER,))])
def test_gguf_says_it(spec, bos, trained, tmp_path):
    pytest.importorskip("gguf", reason="the extra convert is absent: pip install gguf")
    done = export(trained("world", 0), tmp_path / "m.gguf", "gguf", settings=TextSettings(bos=spec))
    keys, _ = gguf_reader.read(tmp_path / "m.gguf")
    assert keys["tokenizer.ggml.add_bos_token"] == bool(bos)
    assert keys["tokenizer.ggml.bos_token_id"] == (bos or (0,))[0]
    begin, _, _ = keys["tokenizer.chat_template"].partition("{")
    assert begin == (keys["tokenizer.ggml.tokens"][0] if bos == (0,) else "")
    notes = [note for note in done.notes if "add_bos_token" in note]
    assert [f"begins with token {token}" in note for note, token in zip(notes, bos, strict=True)] == [
        True
    ] * len(bos)


@pytest.mark.parametrize("spec, bos", [("recorded", (33,)), ("none", ()), ("auto", (0,))])
def test_the_tokenizer_of_a_hugging_face_folder_adds_it(spec, bos, trained, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors", reason="the extra convert is absent: pip install safetensors")
    model = trained("bytes", 33)
    done = export(model, tmp_path / "hf", "hf", settings=TextSettings(bos=spec))
    files = {
        name: json.loads((tmp_path / "hf" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    }
    assert files["tokenizer_config.json"].get("add_bos_token", False) == bool(bos) == bool(done.notes)
    for name in ("config.json", "generation_config.json"):
        assert files[name]["bos_token_id"] == (bos or (0,))[0]
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    assert theirs.encode("User: hi").ids == [*bos, *b"User: hi"]
    assert theirs.encode("User: hi", add_special_tokens=False).ids == [*b"User: hi"]
    if bos:
        assert theirs.token_to_id(files["tokenizer_config.json"]["bos_token"]) == bos[0]
    done = export(model, tmp_path / "fla", "hf", layout="fla", settings=TextSettings(bos=spec))
    assert ["adds no BOS" in note for note in done.notes] == [True] * len(bos)


def test_a_tokenizer_json_gets_it_too(trained, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("safetensors", reason="the extra convert is absent: pip install safetensors")
    names = {"a": 0, "b": 1, "</s>": 2, "?": 3}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="?"))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "t.json"))
    model, tokenizer = trained("bytes"), str(tmp_path / "t.json")
    for layout in ("official", "fla"):
        export(model, tmp_path / layout, "hf", layout=layout, settings=TextSettings(tokenizer, bos="auto"))
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / layout / "tokenizer.json"))
        assert theirs.encode("b").ids == [2, 1]
        settings = json.loads((tmp_path / layout / "tokenizer_config.json").read_text())
        assert settings["bos_token"] == "</s>" and settings["add_bos_token"]


def test_without_a_tokenizer_there_is_none_to_export(trained, tmp_path):
    with pytest.raises(UserError, match="--bos 0 needs a tokenizer"):
        export(trained("bytes"), tmp_path / "hf", "hf", settings=TextSettings("none", bos="0"))
    with pytest.raises(UserError, match="--bos .* are for gguf and hf"):
        export(trained("bytes"), tmp_path / "m.safetensors", "safetensors", settings=TextSettings(bos="0"))


@pytest.mark.parametrize("flags, bos", [((), (0,)), (("--bos", "none"), ()), (("--bos", "10060"), (FLOWER,))])
@pytest.mark.parametrize("raw", [False, True])
def test_the_chat_asks_after_what_the_file_records(flags, bos, raw, trained, monkeypatch):
    decoder = Listener()
    adapters = types.SimpleNamespace(model=None, use=lambda names, scale: None, scale=1.0)
    monkeypatch.setattr(program, "load_named", lambda args: (adapters, WORLD))
    monkeypatch.setattr(program, "fastest", lambda *_, **options: (decoder, "as it listens"))
    chat.main(
        [
            "--model",
            str(trained("world", 0)),
            *"--prompt hi --temperature 0".split(),
            *["--raw"] * raw,
            *flags,
        ]
    )
    assert decoder.fed == [*bos, *WORLD.encode("hi" if raw else "User: hi\n\nAssistant:")]
    with pytest.raises(SystemExit):
        chat.main(["--model", "m.pth", "--bos", "begin"])


def test_a_prompt_that_begins_with_it_does_not_get_it_twice():
    assert Question(["!hi"], "").ids(BYTES, (33,)) == [*b"!hi"]
    assert Question(["hi"], "").ids(BYTES, (33,)) == [*b"!hi"]


def test_another_adapter_has_another(adapted):
    """An adapter has its own BOS, or none, and a saved conversation keeps the one that it began with."""
    base, adapter = adapted("a.pth", tokenizer="bytes", bos=[33])
    adapters, tokenizer = load_with(base, {"a": adapter}, "bytes", accelerator="cpu", wkv="torch")
    conversation = Conversation(engine_of(adapters.model, tokenizer), GREEDY)

    def bos_of(paths):
        return bos_ids("recorded", tokenizer, *paths, base)

    talk = Chat(conversation, adapters, lambda paths: DEFAULT, 2, 0, bos_of)
    talk.take("/adapter a")
    assert conversation.bos == (33,)
    talk.take("/adapter none")
    assert conversation.bos == ()
    talk.take("/adapter a")
    talk.take(f"/save {base.with_name('chat.pth')}")
    talk.take("/adapter none")
    talk.take(f"/load {base.with_name('chat.pth')}")
    assert conversation.bos == (33,)
    talk.take("/adapter a")
    talk.take("/adapter none")
    assert conversation.bos == (33,)


@pytest.mark.parametrize("peft", ["miss", "none"])
def test_a_run_writes_it_into_its_files(peft, adapted, tmp_path):
    base, _ = adapted("a.pth")
    model = RWKV.load(base)
    if peft == "miss":
        rwkv_miss.inject(model, peft, rank=4)
    trainer = types.SimpleNamespace(is_global_zero=True, global_step=3, strategy=None)
    write = writer(Config(load_model=str(base), peft=peft), model, Encoder(BYTES, bos=(33,)))
    write(trainer, str(tmp_path / "out.pth"))
    assert bos_ids("recorded", BYTES, tmp_path / "out.pth") == (33,)
