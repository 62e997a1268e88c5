"""A run that begins with an adapter: the one of an earlier run goes on as if it had not stopped. What does
not fit is refused with the way out.
"""

import json
import shutil

import pytest
import torch

import rwkv_miss
from rwkv_miss.convert import convert
from rwkv_miss.files.checkpoint import RUN_FORMAT, write_checkpoint
from src.config import parse
from src.model import RWKV
from src.planning import start_adapter
from src.planning.base_model import build_model, check_reference, choose_train_parts, read_base
from src.planning.draft import Draft
from src.training.run_folder import adapter_of_step

from . import program
from .conftest import close, make_arch, random_tensors
from .program import flags_of, losses, succeed

SIZES = {"vocab_size": 256}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two bases, and four equal rows, so that every step of every run sees the same."""
    folder = tmp_path_factory.mktemp("start")
    for name, seed in (("base", 0), ("other", 1)):
        tensors = random_tensors(make_arch(7, **SIZES), seed=seed)
        write_checkpoint(folder / f"{name}.pth", tensors.items())
    write_checkpoint(folder / "wide.pth", random_tensors(make_arch(7, n_embd=64, **SIZES)).items())
    (folder / "rows.jsonl").write_text((json.dumps({"text": "the same words"}) + "\n") * 4)
    return folder


@pytest.fixture(scope="module")
def adapters(files):
    """adapters(method, ...) -> the file of an adapter of base.pth that is not zero."""

    def make(method="lora", train_parts="", layers=None, **options):
        model = RWKV.load(files / "base.pth")
        rwkv_miss.inject(model, method, train_parts=train_parts, layers=layers, **options)
        torch.manual_seed(2)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        path = files / f"{method}-{len(list(files.glob('*.pth')))}.pth"
        rwkv_miss.save_adapter(model, path)
        return path, model

    return make


# without moments of Adam a run that begins anew differs in nothing from a resumed one
MEMORYLESS = "--beta1 0 --beta2 0 --lr_schedule constant --warmup_steps 0 --lr_init 1e-3"


def test_20_steps_are_10_and_10_that_begin_with_their_adapter(files, tmp_path):
    common = MEMORYLESS.split()
    adapter_flags = "--train_parts ln,state --layers last:1 --peft_config r=5 --save_steps 10".split()
    whole = flags_of(files, tmp_path / "whole", *common, *adapter_flags)
    said = succeed(program.run([*whole, "--epoch_steps", "20"]))
    assert "2 adapter-step-N.pth of" in said
    ten = tmp_path / "whole" / adapter_of_step(10)
    assert rwkv_miss.read_metadata(ten)["step"] == 10
    last = tmp_path / "whole" / adapter_of_step(20)
    assert last.read_bytes() == (tmp_path / "whole/adapter.pth").read_bytes()

    again = flags_of(files, tmp_path / "again", *common, "--init_adapter", ten, "--epoch_steps", "10")
    assert f"begins with {ten}" in succeed(program.run(again))
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[10:], "to the last bit"
    want, got = (rwkv_miss.read_checkpoint(path) for path in (last, tmp_path / "again/adapter.pth"))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    card, details = ((tmp_path / "again" / name).read_text() for name in ("README.md", "run_card.md"))
    assert (
        "| layers with adapters | 1 |" in card and "train_parts ln,state, layers 1: in --init_ad" in details
    )
    described, other = (rwkv_miss.read_metadata(path) for path in (last, tmp_path / "again/adapter.pth"))
    for name in ("method", "options", "linears", "targets", "train_parts", "layers", "trainable"):
        assert described[name] == other[name], name


def settings(files, path, *flags, base="base"):
    command = f"--load_model {files}/{base}.pth --data_file {files}/rows.jsonl --tokenizer bytes --grad_cp 0"
    draft = Draft(parse([*command.split(), "--init_adapter", str(path), *flags]))
    read_base(draft)
    return draft.config


def test_settings_come_from_the_file_of_any_project(files, adapters, tmp_path):
    path, live = adapters("lora", layers="last:1", rank=6, alpha=9.0, targets=["att.key", "ffn.value"])
    convert(path, tmp_path / "peft", "peft")
    for adapter in (path, tmp_path / "peft"):
        config = settings(files, adapter, "--peft_config", "alpha=9")
        assert (config.peft, config.layers, config.train_parts) == ("lora", "1", "")
        assert config.adapter.targets == ["att.key", "ffn.value"]
        model = build_model(config, live.arch, "torch", torch.float32)
        ids = torch.arange(12)[None]
        close("logits", model(ids)[0], live(ids)[0], 1e-6)
        trained = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, live)]
        assert trained[0] == trained[1]
    path, live = adapters("pissa", rank=5)
    theirs = tmp_path / "rwkv-4.pth"
    convert(path, theirs, "rwkv-peft")
    (tmp_path / "rwkv-4.init_pissa.pth").rename(tmp_path / "init_pissa.pth")
    config = settings(files, theirs, "--peft", "pissa", "--peft_config", "r=5")
    assert torch.equal(build_model(config, live.arch, "torch", torch.float32)(ids)[0], live(ids)[0])
    (tmp_path / "init_pissa.pth").write_bytes(b"damaged")
    with pytest.raises(rwkv_miss.UserError, match="--init_adapter: .*init_pissa.pth is "):
        settings(files, theirs, "--peft", "pissa", "--peft_config", "r=5")
    for method, options in (("state", {}), ("pissa", {"rank": 5})):  # the second changes frozen weights
        path, live = adapters(method, **options)
        config = settings(files, path)
        again = build_model(config, live.arch, "torch", torch.float32)
        assert config.peft == method and torch.equal(again(ids)[0], live(ids)[0])


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--peft miss", "has --peft lora, and miss was given"),
        ("--peft_config r=7", "has rank 6, and 7 was given"),
        ("--peft_config targets=att.key", "has linears .*, the model carries an adapter with .*att.key"),
        ("--layers last:1", "has --layers empty, and last:1 was given"),
        ("--train_parts ln", "has --train_parts empty, and ln was given"),
    ],
)
def test_another_adapter_is_refused_with_the_merge_that_helps(files, adapters, flags, words):
    path, _ = adapters("lora", rank=6)
    with pytest.raises(rwkv_miss.UserError, match=words) as caught:
        settings(files, path, *flags.split())
    merge = f"python -m rwkv_miss merge --base {files}/base.pth --adapter {path} --out merged.pth"
    assert merge in str(caught.value)
    agrees = settings(files, path, "--peft", "lora", "--peft_config", "r=6", "--layers", "first:2")
    assert agrees.adapter.options == {"rank": 6, "alpha": 12.0}


def test_another_base_is_refused(files, adapters):
    path, _ = adapters("lora", rank=6)
    with pytest.raises(
        rwkv_miss.UserError, match="another base .base.pth., .* layers, width 48, .* width 64"
    ):
        settings(files, path, base="wide")
    with pytest.raises(rwkv_miss.UserError, match="was trained on another base .base.pth., not on") as caught:
        settings(files, path, base="other")
    assert "merge --base base.pth" in str(caught.value)
    with pytest.raises(rwkv_miss.UserError, match="absent.pth does not exist"):
        settings(files, files / "absent.pth")


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "run/checkpoints/step-00000008.pth",
            "is the checkpoint from which .* step 8; .* in .*run/adapter.pth$",
        ),
        ("base.pth", "base.pth is a whole model, and an adapter is expected; .* give it as --load_model$"),
        ("run", "is a folder without adapter_config.json .*; give .*run/adapter.pth$"),
        ("cut.pth", "cut.pth is truncated or not a torch checkpoint .*; download or copy it again$"),
        (
            "theirs.pth",
            "theirs.pth does not hold LoRA's alpha: .* such as --peft_config alpha=16. A PiSSA file",
        ),
        (
            "bone.pth",
            "of two origins, .* Say it to python -m rwkv_miss convert .*bone.pth OUT.pth --to native",
        ),
        ("absent.pth", "absent.pth does not exist; give an adapter's file, such as the adapter.pth of a run"),
    ],
)
def test_what_is_no_adapter_is_named_with_the_way_out(files, adapters, tmp_path, name, words):
    own, _ = adapters("lora", rank=6)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(own, tmp_path / "run/adapter.pth")
    shutil.copy(files / "base.pth", tmp_path)
    (tmp_path / "cut.pth").write_bytes(own.read_bytes()[:5000])
    convert(own, tmp_path / "theirs.pth", "rwkv-peft")
    trained = {"blocks.0.att.key.miss:exp_avg": torch.ones(2)}
    of_run = {"format": RUN_FORMAT, "step": 8, "output": "adapter.pth"}
    write_checkpoint(tmp_path / "run/checkpoints/step-00000008.pth", trained.items(), of_run)
    torch.save({"blocks.0.att.key.bone": torch.ones(6, 6, 6)}, tmp_path / "bone.pth")
    with pytest.raises(rwkv_miss.UserError, match=f"^--init_adapter:? .*{words}"):
        settings(files, tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "empty"])
def test_what_is_no_reference_names_the_flag(files, tmp_path, name):
    shutil.copy(files / "rows.jsonl", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(rwkv_miss.UserError, match=f"^--reference: .*{name} is (text|a folder)"):
        check_reference(str(tmp_path / name), "base.pth", 256)


@pytest.mark.parametrize("flags", ["--loss dpo", "--loss grpo --beta 0.1"])
def test_a_reference_is_asked_for(files, flags):
    with pytest.raises(rwkv_miss.UserError, match="leaves open which one. Merge it"):
        settings(files, "a.pth", *flags.split())


def test_full_training_begins_with_no_adapter(files):
    with pytest.raises(rwkv_miss.UserError, match="has no meaning with --peft none; merge it first"):
        settings(files, "a.pth", "--peft", "none")


@pytest.mark.parametrize(
    "given, factors", [((), {"emb": 0.2, "head": 0.2}), (["--train_parts", "emb,head"], {})]
)
def test_embedding_and_head_of_the_file_have_rates_of_their_own(files, adapters, given, factors):
    """Unless they were asked for, as in the run that chose to train them."""
    path, live = adapters("lora", rank=6, train_parts="emb,head")
    flags = f"--load_model {files}/base.pth --data_file {files}/rows.jsonl --tokenizer bytes".split()
    draft = Draft(parse([*flags, "--init_adapter", str(path), *given]))
    _, tokenizer = read_base(draft)
    choose_train_parts(draft, live.arch, None, tokenizer)
    assert draft.config.train_parts == "emb,head" and draft.config.settled().lr_map == factors


def test_rows_of_tokens_go_on_with_those_of_the_file(files, adapters):
    path, live = adapters("lora", rank=6, train_parts="emb,head", tokens=[3, 9])
    config = settings(files, path)
    assert (config.train_parts, config.train_tokens) == ("emb,head", "3,9")
    model = build_model(config, live.arch, "torch", torch.float32)
    assert torch.equal(model.emb.token_rows, live.emb.token_rows) and model.head.token_rows.any()
    with pytest.raises(rwkv_miss.UserError, match="has --train_tokens 3,9, and 3 was given"):
        settings(files, path, "--train_parts", "emb,head", "--train_tokens", "3")


def test_an_adapter_that_changed_is_noticed(files, adapters):
    path, live = adapters("lora", rank=6)
    config = settings(files, path)
    first = build_model(config, live.arch, "torch", torch.float32).start_fingerprint
    tensors, metadata = rwkv_miss.read_checkpoint(path), rwkv_miss.read_metadata(path)
    write_checkpoint(path, ((name, 2 * tensor) for name, tensor in tensors.items()), metadata)
    start_adapter.put(other := RWKV.load(files / "base.pth"), config)
    assert first and other.start_fingerprint not in (None, first)
