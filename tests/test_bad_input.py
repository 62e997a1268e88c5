"""Bad input: one line that says what was seen and what to do, exit code 2, no traceback, and no file
changed.
"""

import functools
import os
import re
import resource
import subprocess
import sys

import pytest
import torch

import rwkv_miss
import train
from demo import chat
from rwkv_miss.__main__ import main as rwkv_miss_main
from rwkv_miss.adapter import METHODS, adapted_linears
from rwkv_miss.errors import similar_path
from scripts import evaluate
from src.model import RWKV
from src.training import callbacks

from .conftest import ROOT, make_arch, random_tensors, slow, write_rows
from .program import CONTEXT, logged, run

PROGRAMS = {"train": train.main, "merge": rwkv_miss_main, "chat": chat.main, "evaluate": evaluate.main}
COMMANDS = {"train": ["train.py"], "merge": ["-m", "rwkv_miss"], "chat": ["-m", "demo.chat"]}
ROWS = [
    {"messages": [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "a"}]}
    for n in range(1, 6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base.pth, an adapter of it, another base of the same sizes, a narrower one, rows."""
    folder = tmp_path_factory.mktemp("input")
    for name, sizes in dict(base={}, other={}, narrow={"n_embd": 32}, letters={"vocab_size": 67}).items():
        tensors = random_tensors(make_arch(7, **{"vocab_size": 256, **sizes}), seed=len(name))
        rwkv_miss.write_checkpoint(folder / f"{name}.pth", tensors.items())
    model = RWKV.load(folder / "base.pth")
    rwkv_miss.inject(model, "miss", rank=5)
    rwkv_miss.save_adapter(model, folder / "adapter.pth")
    next(iter(adapted_linears(model).values())).miss.data[0, 0] = torch.nan
    rwkv_miss.save_adapter(model, folder / "nan-adapter.pth")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "empty").touch()
    return folder


def flags_of(program, folder, values):
    """The flags of a sound call, with `values` put over them; None takes a flag away."""
    base, rows = folder / "base.pth", folder / "rows.jsonl"
    run = dict(proj_dir=folder / "run", tokenizer="bytes", peft_config="r=5")
    sound = {
        "train": dict(load_model=base, data_file=rows, **run),
        "merge": dict(base=base, adapter=folder / "adapter.pth", out=folder / "merged.pth"),
        "chat": dict(model=base, tokenizer="bytes", prompt="hi", max_tokens=3),
        "evaluate": dict(model=base, tokenizer="bytes", questions=rows),
    }[program]
    flags = [f"--{name}={value}" for name, value in (sound | values).items() if value is not None]
    return ["merge", *flags] if program == "merge" else flags


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(folder, capsys, monkeypatch):
    """refused(program, name=value, ...) -> the message, after the checks that hold for every mistake."""

    def call(program, **values):
        before = contents(folder)
        monkeypatch.setattr(sys, "argv", [program, *flags_of(program, folder, values)])
        with pytest.raises(SystemExit) as stop:
            PROGRAMS[program]()
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and re.fullmatch(r"error: .+\n", err), err
        assert program == "train" or not out
        assert contents(folder) == before, "something was written"
        return err

    return call


def test_sound_calls_are_not_refused(folder, tmp_path, capsys):
    """The merge and chat calls that the mistakes below are made in; the last test has a whole training."""
    rwkv_miss_main(flags_of("merge", folder, {"out": tmp_path / "merged.pth"}))
    chat.main(flags_of("chat", folder, {"adapter": folder / "adapter.pth"}))
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("merged 12 linears") and (tmp_path / "merged.pth").exists()


@pytest.mark.parametrize("program", ["train", slow("merge"), slow("chat")])
def test_the_programs_themselves(program, folder):
    flags = flags_of(
        program,
        folder,
        {{"train": "load_model", "merge": "base", "chat": "model"}[program]: folder / "absent.pth"},
    )
    done = subprocess.run(
        [sys.executable, *COMMANDS[program], *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: {folder / 'absent.pth'} does not exist\n",
    )
    assert not (folder / "run").exists()


def test_a_mistyped_path_is_answered_with_the_nearest_one(tmp_path, in_its_folder, refused):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    assert similar_path("data/train.json") == "; did you mean data/train.jsonl?"
    assert similar_path(f"{tmp_path}/datas/train.jsonl") == f"; did you mean {tmp_path}/data?"
    # no hint: a path that exists, one that is like nothing else, and one that shares only a suffix
    assert not any(map(similar_path, ("data/train.jsonl", "data/test.jsonl", "data/b.jsonl", "/no/such")))
    for flag in ("load_model", "data_file", "config", "template"):
        assert "; did you mean data/train.jsonl?" in refused("train", **{flag: "data/trian.jsonl"})


# checkpoints


class Evil:
    """Runs code when it is unpickled the way anyone's torch.load(weights_only=False) would do it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_tensor(name, tensor):
    return lambda tensors: tensors | {name: tensor}


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


NAN = torch.ones(48, 48).index_fill(0, torch.tensor([7]), torch.nan)

CHECKPOINTS = {
    "RWKV-4": (
        lambda _: {"emb.weight": torch.ones(9, 8), "blocks.0.att.time_mix_k": torch.ones(8)},
        "blocks.0.att.time_mix_k belongs to RWKV-4 or RWKV-5; RWKV-6 and RWKV-7 are supported",
    ),
    "RWKV-5": (
        lambda _: {
            "blocks.0.att.time_faaaa": torch.ones(2, 4),
            "blocks.0.att.gate.weight": torch.ones(8, 8),
            "blocks.0.att.time_mix_g": torch.ones(1, 1, 8),
        },
        "blocks.0.att.time_mix_g belongs to RWKV-4 or RWKV-5",
    ),
    "RWKV-7a": (
        with_tensor("blocks.0.ffn.s_emb.weight", torch.ones(9, 8)),
        "blocks.0.ffn.s_emb.weight belongs to RWKV-7a (DeepEmbed",
    ),
    "llama": (
        lambda _: {"model.layers.0.mlp.up_proj.weight": torch.ones(3, 3)},
        "the first key is 'model.layers.0.mlp.up_proj.weight'",
    ),
    "nested": (
        lambda tensors: {"weights": tensors},
        "holds a dict under 'weights', expected a flat dict of tensors",
    ),
    "prefixed": (renamed("blocks.", "net.blocks."), "blocks."),
    "no tensors": (lambda _: {}, "the first key is None"),
    "deciding tensor missing": (without("blocks.0.ffn.key.weight"), "blocks.0.ffn.key.weight is missing"),
    "missing": (
        without("blocks.1.ffn.value.weight"),
        "lacks blocks.1.ffn.value.weight; expected exactly the tensors of RWKV-7, 2 layers",
    ),
    "extra": (
        with_tensor("blocks.1.att.more", torch.ones(1)),
        "has the unknown blocks.1.att.more; expected exactly",
    ),
    "extra layer": (with_tensor("blocks.2.att.key.weight", torch.ones(48, 48)), "lacks blocks.2.att.a0"),
    "wrong shape": (
        with_tensor("blocks.1.att.value.weight", torch.ones(48, 47)),
        "blocks.1.att.value.weight is (48, 47), expected (48, 48) in RWKV-7, 2 layers",
    ),
    "NaN": (
        with_tensor("blocks.1.att.value.weight", NAN),
        "blocks.1.att.value.weight holds NaN or infinite values",
    ),
    "infinite": (
        with_tensor("head.weight", torch.full((256, 48), torch.inf)),
        "head.weight holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("program, flag", [("train", "load_model"), ("chat", "model")])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_another_kind(refused, folder, tmp_path, program, flag, kind):
    change, words = CHECKPOINTS[kind]
    path = tmp_path / "odd.pth"
    torch.save(change(torch.load(folder / "base.pth", weights_only=True)), path)
    assert words in refused(program, **{flag: path})


@pytest.mark.parametrize(
    "program, flag",
    [
        ("train", "load_model"),
        ("chat", "model"),
        ("chat", "adapter"),
        ("merge", "base"),
        ("merge", "adapter"),
    ],
)
def test_damaged_files(refused, folder, tmp_path, program, flag):
    whole = (folder / ("adapter.pth" if flag == "adapter" else "base.pth")).read_bytes()
    path = tmp_path / "damaged.pth"
    for content, words in (
        (whole[: len(whole) // 2], "damaged.pth is truncated"),
        (whole[:-1], "damaged.pth is truncated"),
        (b"\x00" * 99, "damaged.pth is truncated or not a torch checkpoint"),
        (b"", "damaged.pth is empty"),
        (b"\n<!DOCTYPE html><html>404 Not Found", "damaged.pth is a web page, not a model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "damaged.pth is a Git LFS pointer"),
    ):
        path.write_bytes(content)
        assert words in refused(program, **{flag: path})
    torch.save({"emb.weight": torch.ones(2, 2), "x": Evil(str(tmp_path / "ran"))}, path)
    assert re.search(
        r"damaged\.pth is refused: its pickle asks for \S+\.mkdir, which could run code",
        refused(program, **{flag: path}),
    )
    assert not (tmp_path / "ran").exists()
    assert "absent.pth does not exist" in refused(program, **{flag: tmp_path / "absent.pth"})
    folder_words = {
        ("merge", "adapter"): "is a folder without adapter_config.json",
        ("chat", "adapter"): "is a folder, and an adapter here is",
    }
    assert folder_words.get(
        (program, flag), "is a folder without config.json; give a model's file"
    ) in refused(program, **{flag: tmp_path})
    assert "https://h/a.pth does not exist; nothing is downloaded but" in refused(
        program, **{flag: "https://h/a.pth"}
    )
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is no regular file" in refused(program, **{flag: tmp_path / "pipe"})


def test_the_trap_works(tmp_path):
    torch.save(Evil(str(tmp_path / "ran")), tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()


# adapters


@pytest.mark.parametrize("program, flag", [("merge", "base"), ("chat", "model")])
def test_an_adapter_of_another_base(refused, folder, program, flag):
    adapter = folder / "adapter.pth"
    message = refused(program, **{flag: folder / "other.pth", "adapter": adapter})
    assert f"{adapter} was trained on another base (base.pth), not on" in message and "other.pth" in message
    assert "was trained on another base (base.pth)" in refused(
        program, **{flag: folder / "narrow.pth", "adapter": adapter}
    )
    assert "base.pth is not an adapter file" in refused(program, adapter=folder / "base.pth")
    assert "att.receptance.miss holds NaN" in refused(program, adapter=folder / "nan-adapter.pth")


@pytest.mark.parametrize(
    "options, words",
    [
        (
            "r=49",
            "blocks.0.att.receptance: rank 49 does not fit MiSS: it must be from 1 to the input width, 48",
        ),
        ("r=0", "rank 0 must be at least 1"),
        (
            '{"targets": ["recptance"]}',
            "'recptance' matches no linear layer; this model has: head, key, output, receptance, value",
        ),
        ('{"targets": "key"}', 'targets must be a list of names, such as ["key", "value"]; got \'key\''),
        ('{"targets": []}', "targets is empty"),
        ("rnk=4", "adapter option 'rnk' is unknown; this method has: "),
        ("r=4.5", "adapter option r must be a whole number, got 4.5"),
        ("r=4,r=5", "r is given twice"),
        ("layout=diagonal", "layout 'diagonal' is unknown; choose one of: stride, contiguous"),
    ],
)
def test_adapter_options_that_do_not_fit(refused, options, words):
    assert words in refused("train", peft_config=options)
    if options == "r=49":
        assert "from 1 to the smaller width, 48" in refused("train", peft_config=options, peft="pissa")


# settings and data


@pytest.mark.parametrize(
    "values, words",
    [
        ({"peft_confg": "r=4"}, "unknown flag --peft_confg; did you mean --peft_config?"),
        ({"lr_map": "fnn=2"}, "--lr_map 'fnn' is in no name; the names are such as blocks.0.att."),
        ({"n_layer": 24}, "n_layer 2, but --n_layer 24 was given"),
        ({"my_testing": "x060"}, "has version x070, but --version x060 was given; drop the flag"),
        ({"micro_bsz": "many"}, "expected a whole number"),
        ({"config": "absent.yaml"}, "absent.yaml does not exist"),
        ({"load_model": None}, "needs a base"),
        ({"data_file": None}, "--data_file is missing"),
        ({"wkv": "cuda9"}, "--wkv cuda9: expected one of auto"),
        ({"peft": "veera"}, f"expected one of {', '.join(sorted(METHODS))}, none"),
        ({"tokenizer": "auto"}, "vocabulary of 256 is not the World one (65536); give --tokenizer"),
        ({"tokenizer": "absent.json"}, "absent.json"),
        ({"tokenizer": "world"}, "tokenizer world has a vocabulary of 65530, more than the model's 256"),
        ({"tokenizer": "world"}, "trained with: --tokenizer bytes, utf16 or a FILE"),
        ({"eod": "x"}, "has its own end of document"),
    ],
)
def test_settings(refused, values, words):
    assert words in refused("train", **values)


def test_a_package_that_only_some_settings_need(refused, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    for program in ("train", "chat", "evaluate"):
        assert "the package tokenizers is not installed for " in refused(
            program, tokenizer=tmp_path / "tokenizer.json"
        )


def test_a_model_with_too_few_ids(refused, folder):
    for program, flag in (("train", "load_model"), ("chat", "model")):
        message = refused(program, **{flag: folder / "letters.pth"})
        assert "tokenizer bytes has a vocabulary of 256, more than the model's 67" in message


@pytest.mark.parametrize(
    "values, words",
    [
        ({"modle": "x"}, "unknown flag --modle; did you mean --model?"),
        ({"model": None}, "required: --model"),
        ({"temperature": "nan"}, "--temperature nan: must be a finite number"),
        ({"presence_penalty": "nan"}, "--presence_penalty nan: must be a finite number"),
        ({"frequency_penalty": "-inf"}, "--frequency_penalty -inf: must be a finite number"),
        ({"seed": 2**63}, "--seed 9223372036854775808: must be at least -2^63 and below 2^63"),
        ({"system": "\udcff"}, "text; if it is UTF-8, set PYTHONUTF8=1"),
        ({"top_p": 0}, "expected more than 0 and at most 1"),
        ({"top_k": -1}, "top_k -1: expected 0 or more"),
        ({"max_tokens": 0}, "--max_tokens 0: must be at least 1"),
        ({"max_tokens": "x"}, "--max_tokens 'x': expected a whole number"),
        ({"prompt": ""}, "--prompt is empty"),
        ({"tokenizer": "auto"}, "give --tokenizer"),
        ({"wkv": "x"}, "--wkv x: expected one of auto"),
        ({"precision": "int4"}, "invalid choice: 'int4'"),
    ],
)
def test_chat_settings(refused, values, words):
    assert words in refused("chat", **values)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"bse": "x"}, "unknown flag --bse; did you mean --base?"),
        ({"out": None}, "required: --out"),
        ({"dtype": "int4"}, "invalid choice: 'int4'"),
    ],
)
def test_merge_settings(refused, values, words):
    assert words in refused("merge", **values)


def test_data(refused, folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert "absent.jsonl can't be read: No such file" in refused("train", data_file=tmp_path / "absent.jsonl")
    for content, words in (
        ("", "holds no rows"),
        ("\n{]\n", "line 2: not valid JSON ("),
        ('{"text": "a"}\n{"text": 5}\n', "line 2: text must be"),
    ):
        path.write_text(content)
        assert f"{path}" in (message := refused("train", data_file=path)) and words in message
    assert "every answer is cut off at --ctx_len 5, raise it" in refused("train", ctx_len=5)


def test_questions(refused, folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    assert "questions.jsonl can't be read: No such file" in refused("evaluate", questions=path)
    for content, words in (
        ("", "holds no rows"),
        ("{\n", "line 1: not valid JSON"),
        ('{"text": "a"}\n', "line 1: expected messages"),
    ):
        path.write_text(content)
        assert words in refused("evaluate", questions=path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refused):
    assert f"--devices 1000000: this machine has no GPU and {os.cpu_count()} cores; at most" in refused(
        "train", devices=1000000
    )
    for program in ("train", "chat"):
        assert (
            "torch sees 0 CUDA GPUs on this machine, 1 asked for; use fewer, or --accelerator cpu"
            in refused(program, accelerator="gpu")
        )


@pytest.mark.parametrize(
    "values, words",
    [
        ({"head_size": 7}, "the width of the time mix, 48, is not a multiple of --head_size 7"),
        ({"dim_att": 32}, "--dim_att 32 differs from --n_embd 48; RWKV-7 has them equal"),
        ({"vocab_size": 100}, "tokenizer bytes has a vocabulary of 256, more than the model's 100"),
        ({"n_layer": None}, "a new model needs --version, --n_layer and --n_embd"),
    ],
)
def test_new_models(refused, values, words):
    sizes = dict(
        load_model=None, peft_config=None, peft="none", version="x070", n_layer=1, n_embd=48, head_size=16
    )
    assert words in refused("train", **(sizes | values))


# output


def test_an_output_folder_that_cannot_be_written(refused, folder):
    file = folder / "empty"  # root may write into any folder, but nobody below a file
    for place in (file, file / "run", file / "deep" / "run"):
        assert f"--proj_dir {place}: no file can be made in {file} (Not a directory)" in refused(
            "train", proj_dir=place
        )
    assert "--proj_dir is empty" in refused("train", proj_dir="")
    for place, words in (
        (file / "merged.pth", "Not a directory"),
        (folder / "absent" / "m.pth", "No such file"),
        (folder, "is a folder"),
    ):
        assert words in refused("merge", out=place)
    assert "is an input" in refused("merge", out=folder / "base.pth")


def limit(size):
    """Keep the files of this process below `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def limited_merge(size, flags):
    limit(size)
    rwkv_miss_main(flags)


def test_a_disk_that_fills_up_during_a_merge(folder, tmp_path):
    out, log = tmp_path / "merged.pth", tmp_path / "log"
    out.write_bytes(b"previous")
    flags = flags_of("merge", folder, {"out": out})
    process = CONTEXT.Process(target=logged, args=(log, limited_merge, 50_000, flags))
    process.start()
    process.join(300)
    said = log.read_text()
    assert process.exitcode == 2, said
    assert re.fullmatch(r"error: .*merged\.pth was not written: File too large; .*\n", said), said
    assert sorted(os.listdir(tmp_path)) == ["log", "merged.pth"] and out.read_bytes() == b"previous"


def limit_from_second_step(size, rank):
    """In a run, before the saving of each step of the whole run but the first."""
    save = callbacks.Saver.save

    def save_until_full(self, trainer):
        if trainer.global_step > 1:
            limit(size)
        save(self, trainer)

    callbacks.Saver.save = save_until_full


def test_a_disk_that_fills_up_during_training(folder, tmp_path):
    """First the adapter of the second step finds no room, then, after a resume, its checkpoint; what was
    there stays, whole.
    """
    flags = flags_of(
        "train",
        folder,
        {"proj_dir": tmp_path / "run", "micro_bsz": 2, "save_steps": 1, "ctx_len": 24, "peft_config": "r=48"},
    )

    def limited(size, *more):
        return run([*flags, *more], functools.partial(limit_from_second_step, size))

    code, output = limited(20_000)
    assert code == 2 and "Traceback" not in output, output
    assert output.count("error: ") == 1 and "adapter.pth was not written: File too large" in output
    # rows longer than ctx_len are no mistake, but their number is told
    assert re.search(r"warning +1 of 5 documents cut at --ctx_len 24: 1 token lost", output)
    adapter, checkpoints = tmp_path / "run" / "adapter.pth", tmp_path / "run" / "checkpoints"
    assert rwkv_miss.read_metadata(adapter)["step"] == 1 and os.listdir(checkpoints) == ["step-00000001.pth"]
    before = contents(checkpoints)
    code, output = limited(adapter.stat().st_size + 20_000, "--resume=auto")
    assert code == 2 and "Traceback" not in output and output.count("error: ") == 1, output
    assert "checkpoint" in output and "resume" in output
    assert contents(checkpoints) == before
