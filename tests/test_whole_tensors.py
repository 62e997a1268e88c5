"""Parts of the base trained as whole tensors with an adapter: which they are, their dtypes, and their way
into every file.
"""

import contextlib
import re

import numpy as np
import pytest
import torch

import rwkv_miss
from rwkv_miss.__main__ import describe
from rwkv_miss.adapter import METHODS, adapted_linears
from rwkv_miss.files.checkpoint import write_checkpoint
from rwkv_miss.methods.token_rows import token_ids, tokens_text
from rwkv_miss.methods.whole_tensors import PARTS, in_parts, split_parts
from src.config import Config, parse
from src.data.dataset import Document, Documents
from src.data.tokenizer import load_tokenizer
from src.inference.load import load
from src.model import RWKV
from src.planning.base_model import choose_train_parts, token_text
from src.planning.defaults import chosen_rate
from src.planning.draft import Draft
from src.training.optimizer import parameter_groups
from src.training.outputs import whole_model

from .conftest import close, make_arch, pypi_rwkv, random_tensors

WHOLE = [part for part in PARTS if part != "state"]  # which has tests of its own


def names(version):
    return [name for name, _ in RWKV(make_arch(version)).named_parameters()]


def test_time_of_rwkv_6_is_what_is_called_time_and_that_of_rwkv_7_all_but_linears_norms_and_gate():
    assert in_parts(names(6), ["time"]) == [name for name in names(6) if "time_" in name]
    no_part = {
        name for name in names(7) if not any(re.fullmatch(pattern, name) for pattern in PARTS.values())
    }
    linears = {
        f"blocks.{i}.{linear}.weight"
        for i in range(2)
        for linear in ("att.receptance", "att.key", "att.value", "att.output", "ffn.key", "ffn.value")
    }
    assert no_part == linears | {f"blocks.{i}.att.g{n}" for i in range(2) for n in (1, 2)} | {
        f"blocks.0.att.v{n}" for n in range(3)
    }


@pytest.mark.parametrize("version", [6, 7])
def test_ln_is_every_norm_and_the_parts_do_not_overlap(version):
    chosen = [set(in_parts(names(version), [part])) for part in WHOLE]
    assert chosen[0] == {"emb.weight"} and chosen[1] == {"head.weight"}
    norms = set()
    for name, module in RWKV(make_arch(version)).named_modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            norms |= {f"{name}.weight", f"{name}.bias"}
    assert chosen[2] == norms and sum(map(len, chosen)) == len(set().union(*chosen))
    assert in_parts(names(version), ["ln", "time"]) == [
        name for name in names(version) if name in chosen[2] | chosen[3]
    ]


def test_the_spellings_of_a_list_of_parts():
    for text in ("time ln", "ln,time", " time, ln ", "ln ln time"):
        assert split_parts(text) == ["ln", "time"]
    assert split_parts("") == split_parts(" ") == []


def test_mistakes_are_explained_before_the_model_is_touched():
    model = RWKV(make_arch(7))
    for flags, words in (
        ({"train_parts": "ln,tim"}, "part 'tim' is unknown; choose from: emb, head, ln, time, state"),
        (
            {"train_parts": "head", "targets": ["head", "key"]},
            "head.weight can't be trained as a whole and be adapted as well",
        ),
    ):
        with pytest.raises(rwkv_miss.UserError, match=re.escape(words)):
            rwkv_miss.inject(model, rank=4, **flags)
    assert not adapted_linears(model) and model.head.weight.requires_grad
    with pytest.raises(rwkv_miss.UserError, match="parts belong to RWKV"):
        rwkv_miss.inject(
            torch.nn.Sequential(torch.nn.Linear(3, 3)), rank=2, targets=["0"], train_parts="time"
        )
    with pytest.raises(rwkv_miss.UserError, match="--train_parts ln has no meaning with --peft none"):
        parse(["--load_model", "a", "--data_file", "b", "--peft", "none", "--train_parts", "ln"])


def trained(path, method="miss", parts="emb,head,ln,time", dtype=torch.bfloat16):
    """A model of the file with an adapter and parts that have taken one large step."""
    torch.manual_seed(0)
    model = RWKV.load(path, dtype)
    rwkv_miss.inject(model, method, train_parts=parts, rank=5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-2, 0.0))
    for _ in range(3):
        logits, _ = model(torch.randint(67, (2, 11)))
        torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), torch.randint(67, (20,))
        ).backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32
            for p in model.parameters()
            if p.requires_grad
        )
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_with_parts_computes_what_it_did_and_they_are_fp32(version, dtype, checkpoint):
    model, plain = (RWKV.load(checkpoint(version, dtype)) for _ in range(2))
    report = rwkv_miss.inject(model, train_parts="emb head ln time", rank=5)
    ids = torch.arange(13)[None]
    assert torch.equal(model(ids)[0], plain(ids)[0])
    wanted = in_parts(names(version), WHOLE)
    dtypes = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert all(dtypes[name] == (torch.float32, True) for name in wanted)
    assert {dtypes[f"{name}.weight"] for name in report.linears} == {(dtype, False)}
    assert report.whole == len(wanted)
    assert (
        f"and {len(wanted)} whole tensors (emb, head, ln, time), {report.trainable:,} trainable"
        in report.line()
    )
    assert model.initial_state(1)[0].att_x.dtype == dtype


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_loaded_and_merged_are_the_live_model(version, dtype, checkpoint, tmp_path, capsys):
    base = checkpoint(version, dtype, vocab_size=256)
    model = trained(base, dtype=dtype)
    before = RWKV.load(base, dtype)
    changed = [
        name
        for name in in_parts(names(version), WHOLE)
        if not torch.equal(model.get_parameter(name), before.get_parameter(name).float())
    ]
    assert changed == in_parts(names(version), WHOLE), "every tensor of every part is trained"
    rwkv_miss.save_adapter(model, tmp_path / "a.pth", tokenizer="bytes")
    facts = describe(tmp_path / "a.pth")
    assert facts["metadata"]["train_parts"] == ["emb", "head", "ln", "time"]
    assert facts["dtypes"] == {"float32": len(changed) + len(model.injection.linears)}
    ids = torch.arange(17)[None]
    fresh = RWKV.load(base, dtype)
    rwkv_miss.load_adapter(fresh, tmp_path / "a.pth")
    assert torch.equal(fresh(ids)[0], model(ids)[0])
    report = rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    assert (report.replaced, report.parts) == (len(changed), ["emb", "head", "ln", "time"])
    assert f"{len(changed)} whole tensors (emb, head, ln, time) into" in report.lines()[0]
    merged, kept = (torch.load(path, weights_only=True) for path in (tmp_path / "m.pth", base))
    assert [(n, t.shape, t.dtype) for n, t in merged.items()] == [
        (n, t.shape, t.dtype) for n, t in kept.items()
    ]
    for name in changed:
        assert torch.equal(merged[name], model.get_parameter(name).to(dtype).view_as(merged[name])), (
            f"{name}: overwritten with one rounding"
        )
    # the linears round their sum to bf16; all that is whole is the same number on both sides
    close(
        "logits",
        RWKV.load(tmp_path / "m.pth")(ids)[0],
        model(ids)[0],
        1e-5 if dtype == torch.float32 else 3e-2,
    )
    if dtype == torch.float32:
        close("logits of rwkv", pypi_rwkv(tmp_path / "m.pth")(range(17))[0], model(ids)[0][0], 2e-5)
        close(
            "unmerged",
            load(base, tmp_path / "a.pth", precision="fp32", wkv="torch")[0](ids)[0],
            model(ids)[0],
            1e-5,
        )


@pytest.mark.parametrize("version", [6, 7])
def test_without_a_change_of_the_linears_a_bf16_merge_is_the_live_model_to_the_bit(
    version, checkpoint, tmp_path
):
    base = checkpoint(version, torch.bfloat16)
    model = trained(base)
    with torch.no_grad():
        for layer in adapted_linears(model).values():
            layer.miss.zero_()
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    ids = torch.arange(17)[None]
    assert torch.equal(RWKV.load(tmp_path / "m.pth")(ids)[0], model(ids)[0])


def test_each_tensor_of_a_base_of_two_dtypes_keeps_its_own_and_the_loss_of_rounding_is_told(
    checkpoint, tmp_path
):
    tensors = {n: t.bfloat16() for n, t in random_tensors(make_arch(7)).items()}
    tensors |= {n: t.float() for n, t in tensors.items() if ".ln" in n or "w0" in n}
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", tensors.items())
    model = RWKV.load(tmp_path / "base.pth", torch.bfloat16)
    rwkv_miss.inject(model, train_parts="ln,time", rank=5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and p.dim() != 2:
                p += 1e-5 * torch.randn(p.shape)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    report = rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "m.pth")
    merged = torch.load(tmp_path / "m.pth", weights_only=True)
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in tensors.items()}
    assert torch.equal(merged["blocks.0.ln1.weight"], model.blocks[0].ln1.weight), (
        "fp32 in the base, so nothing is rounded"
    )
    # 1e-5 is far below bf16's step: most of it is gone in the bf16 vectors
    assert report.rounding.lost > 0.05 and "warning: more than 5 %" in report.lines()[-1]
    assert (
        rwkv_miss.merge_file(
            tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "m.pth", "auto", force=True
        ).rounding.lost
        < 0.05
    )


def test_parts_learn_with_the_methods_rate_and_decays_with_twice_that():
    model = RWKV(make_arch(7))
    rwkv_miss.inject(model, train_parts="time,emb", rank=5)
    groups = parameter_groups(model, 1e-3, 0.1)
    places = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert places[id(model.blocks[1].att.w0)] == (2e-3, 0.0)
    assert places[id(model.blocks[1].att.x_r)] == (1e-3, 0.0)
    assert places[id(model.emb.weight)] == (1e-3, 0.1)


@pytest.mark.parametrize("method", ["miss", "lora", "bat", "pissa"])
def test_weight_decay_pulls_the_adapters_matrices_towards_the_base_at_rank_1_as_well(method):
    model = RWKV(make_arch(7))
    rwkv_miss.inject(model, method, rank=1)
    decay = {
        id(p): group["weight_decay"] for group in parameter_groups(model, 1e-3, 0.1) for p in group["params"]
    }
    decays = {0.1 * METHODS[method].decays}  # PiSSA's matrices are not the base at zero
    assert {decay[id(p)] for p in model.parameters() if p.requires_grad} == decays


def test_weight_decay_with_pissa_is_refused():
    flags = ["--load_model", "a", "--data_file", "b", "--peft", "pissa", "--weight_decay", "0.1"]
    with pytest.raises(rwkv_miss.UserError, match="--weight_decay 0.1 has no meaning with --peft pissa"):
        parse(flags)
    assert parse([*flags, "--train_parts", "emb"]).weight_decay == 0.1


# chosen by the data


def choice(path, texts, of="train_parts", **settings):
    """Choose for a base and a list of texts, as bytes."""
    tokenizer = load_tokenizer("bytes", 256)
    documents = [
        Document(np.frombuffer(text, np.uint8).astype(np.int32), np.ones(len(text))) for text in texts
    ]
    draft = Draft(Config(load_model=str(path), **settings))
    arch = make_arch(7, vocab_size=256)
    choose_train_parts(draft, arch, Documents(documents), tokenizer)
    parts = draft.config.settled().train_parts
    if draft.config.origins.get("train_parts") and parts:
        share = chosen_rate(Config(load_model="a", peft="none"), arch) / chosen_rate(draft.config, arch) / 2
        share = min(share, 1.0)
        assert draft.config.lr_map == dict.fromkeys(parts.split(","), pytest.approx(share, rel=0.2))
    return getattr(draft.config.settled(), of), draft.config.origins.get(of)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def half_seen(request, tmp_path):
    """The path of a base that has seen the bytes below 128, of any dtype."""
    tensors = random_tensors(make_arch(7, vocab_size=256), request.param)
    tensors["emb.weight"][128:].uniform_(-1e-4, 1e-4)
    tensors["emb.weight"][128:, 0] = 1e-4
    path = tmp_path / "half.pth"
    write_checkpoint(path, tensors.items())
    return path


def test_embedding_and_head_are_trained_for_tokens_that_the_base_never_saw(half_seen):
    rare = [b"a" * 150] * 3 + ["\xe9!".encode()]  # 2 of 449 inputs
    none = "", "chosen: the base has seen the data's tokens, or none at all"
    assert choice(half_seen, rare) == none
    often = [b"a" * 24, *rare[3:] * 3, b"\x81!!"]
    assert choice(half_seen, often) == (
        "emb,head",
        "chosen: the base never saw 23 % of the data's tokens: 3 tokens such as 169, 195, 129",
    )
    assert choice(half_seen, often, of="train_tokens") == (
        "129,169,195",
        "chosen: the tokens that the base never saw",
    )
    assert choice(half_seen, rare, of="train_tokens")[0] == ""
    assert choice(half_seen, [b"aaaa\xff"] * 5) == none, "the end of a text is not read"
    seen = choice(half_seen, often, peft_config={"targets": ["head", "key"]})
    assert seen[0] == "emb", "head has an adapter"


@pytest.mark.parametrize(
    "settings",
    [
        {"train_parts": ""},
        {"train_parts": "ln"},
        {"peft": "none"},
        {"peft": "state"},
        {"loss": "grpo", "beta": 0.04},  # for which the base has to stay
    ],
)
def test_parts_that_are_given_or_can_not_be_trained_are_left_alone(half_seen, settings):
    assert choice(half_seen, ["é".encode() * 9], **settings)[0] == settings.get("train_parts", "")


def test_a_new_base_says_nothing_about_its_tokens(tmp_path):
    tensors = random_tensors(make_arch(7, vocab_size=256))
    tensors["emb.weight"].uniform_(-1e-4, 1e-4)
    write_checkpoint(tmp_path / "new.pth", tensors.items())
    assert choice(tmp_path / "new.pth", [b"abc"])[0] == ""
    tensors["emb.weight"][65] = 1
    write_checkpoint(tmp_path / "begun.pth", tensors.items())
    assert choice(tmp_path / "begun.pth", [b"abc"])[0] == "emb,head"


def test_a_text_is_a_token_s_name_where_it_is_one():
    tokenizer = load_tokenizer("bytes", 256)
    assert [token_text(tokenizer, token) for token in (65, 10, 233, 255)] == ["'A'", "10", "233", "255"]


# runs


def test_a_fully_trained_model_is_gathered_one_tensor_at_a_time(checkpoint):
    base = checkpoint(7, torch.bfloat16)
    model, gathered, most = RWKV.load(base, torch.float32), set(), 0

    @contextlib.contextmanager
    def gather(p):
        nonlocal most
        gathered.add(p)
        most = max(most, len(gathered))
        yield
        gathered.remove(p)

    written = dict(whole_model(str(base), model, gather))
    assert most == 1 and list(written) == list(rwkv_miss.read_checkpoint(base))
    assert {t.dtype for t in written.values()} == {torch.bfloat16}


# rows of tokens

TOKENS = [3, 40, 66]


def with_rows(path, method="miss", parts="emb,head", dtype=torch.float32, **options):
    """A model of the file with an adapter, and rows of some tokens, all with random numbers."""
    torch.manual_seed(1)
    model = RWKV.load(path, dtype)
    rwkv_miss.inject(model, method, train_parts=parts, tokens=TOKENS, **{"rank": 5, **options})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
    return model


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("parts", ["emb,head", "head,ln"])
def test_rows_of_tokens_are_saved_alone_and_merge_to_the_live_model(version, parts, checkpoint, tmp_path):
    base = checkpoint(version, vocab_size=67)
    model, before = with_rows(base, parts=parts), RWKV.load(base)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    tensors, metadata = (
        rwkv_miss.read_checkpoint(tmp_path / "a.pth"),
        rwkv_miss.read_metadata(tmp_path / "a.pth"),
    )
    names = [f"{part}.token_rows" for part in ("emb", "head") if part in parts]
    assert {name: tuple(tensors[name].shape) for name in names} == dict.fromkeys(
        names, (3, model.arch.n_embd)
    )
    assert not {"emb.weight", "head.weight"} & tensors.keys() and metadata["tokens"] == TOKENS
    report = rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    assert report.replaced == (
        0 if parts == "emb,head" else len(in_parts(dict(before.named_parameters()), ["ln"]))
    )
    merged = RWKV.load(tmp_path / "m.pth")
    for name in ("emb", "head"):
        weight, old = merged.get_submodule(name).weight, before.get_submodule(name).weight
        moved = [i for i in range(67) if not torch.equal(weight[i], old[i])]
        assert moved == (TOKENS if name in parts else [])
        if name in parts:
            assert torch.equal(weight[TOKENS], old[TOKENS] + tensors[f"{name}.token_rows"])
    ids = torch.arange(67)[None]
    exact = RWKV.load(tmp_path / "m.pth", torch.float64)(ids)[0]
    close("live", model(ids)[0], exact, 1e-5)
    again = RWKV.load(base)
    rwkv_miss.load_adapter(again, tmp_path / "a.pth")
    assert torch.equal(again(ids)[0], model(ids)[0])
    with rwkv_miss.disabled(model) if parts == "emb,head" else contextlib.nullcontext():
        assert torch.equal(model(ids)[0], before(ids)[0]) == (parts == "emb,head")


def test_rows_of_tokens_learn_as_the_same_rows_of_whole_tensors(checkpoint):
    """Adam's steps are the same numbers; others than these rows are held by their gradients."""
    base, ids = checkpoint(7), torch.tensor([[3, 9, 40, 3, 66, 5]])
    losses = []
    for tokens in (TOKENS, ()):
        torch.manual_seed(0)
        model = RWKV.load(base)
        rwkv_miss.inject(model, train_parts="emb,head", tokens=tokens, rank=5)
        mask = torch.zeros(67, 1).index_fill(0, torch.tensor(TOKENS), 1)
        for part in () if tokens else (model.emb, model.head):
            part.weight.register_hook(mask.mul)
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, 0.0))
        for _ in range(4):
            x, _ = model.features(ids[:, :-1])
            loss = model.loss(x.flatten(0, 1), ids[0, 1:], None)
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    close("losses", torch.tensor(losses[4:]), torch.tensor(losses[:4]), 1e-5)
    assert losses[3] < losses[0]


def test_many_tokens_are_trained_as_whole_tensors(half_seen, monkeypatch):
    monkeypatch.setattr("src.planning.base_model.MOST_ROWS", 2)
    assert [choice(half_seen, [b"\x81\x82\x83a"], of) for of in ("train_parts", "train_tokens")][0][
        0
    ] == "emb,head"
    assert choice(half_seen, [b"\x81\x82\x83a"], "train_tokens")[0] == ""


def test_rows_that_are_not_there_are_refused(checkpoint):
    base = checkpoint(7)
    for parts, tokens, words in (
        ("emb,head", [67], "no row for token 67; the vocabulary has 67 tokens"),
        ("ln", [3], "neither emb nor head"),
    ):
        with pytest.raises(rwkv_miss.UserError, match=words):
            rwkv_miss.inject(model := RWKV.load(base), train_parts=parts, tokens=tokens, rank=5)
        assert not adapted_linears(model)
    assert token_ids("10, 97-99") == [10, 97, 98, 99] and tokens_text([10, 97, 98, 99]) == "10,97-99"
    with pytest.raises(rwkv_miss.UserError, match="expected ids and ranges"):
        token_ids("a")
