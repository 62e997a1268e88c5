"""Folders of Hugging Face peft: what peft itself writes is read, what is written peft loads, with the same
outputs; peft is the oracle throughout.
"""

import json
import os
import pathlib
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rwkv_miss
from rwkv_miss.__main__ import main
from rwkv_miss.adapter import METHODS, adapted_linears, has_factors
from rwkv_miss.convert import NO_HINTS, Hints, convert
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from src.model import RWKV

from .conftest import close, make_arch, random_tensors
from .test_adapters import CASES, filled, fitting

pytestmark = pytest.mark.usefixtures("in_its_folder")

warnings.filterwarnings("ignore", module="peft")
IDS = torch.arange(13)[None]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
KEYS = ["key", "value"]
LORA = dict(r=5, lora_alpha=9)
PATTERNS = dict(
    rank_pattern={"ffn.key": 3, r"^blocks\.0\.att\.key": 2}, alpha_pattern={"ffn.value": 7, "1.ffn.key": 11.5}
)
# peft's class, its options without those of the linears, and the name of the method here
READ = {
    "miss": (peft.MissConfig, dict(r=7, miss_dropout=0.1), "miss"),
    "miss-random": (
        peft.MissConfig,
        dict(r=5, target_modules=r".*\.(key|output)", init_weights=False),
        "miss",
    ),
    "bat": (peft.MissConfig, dict(r=8, init_weights="bat"), "bat"),
    "mini": (peft.MissConfig, dict(r=7, init_weights="mini", mini_r=4), "miss"),
    "lora": (peft.LoraConfig, dict(LORA, lora_dropout=0.1), "lora"),
    "rslora": (peft.LoraConfig, dict(LORA, use_rslora=True), "lora"),
    "patterns": (peft.LoraConfig, dict(LORA, **PATTERNS), "lora"),
    "dora": (peft.LoraConfig, dict(LORA, use_dora=True, rank_pattern={"att.key": 3}), "dora"),
    "modules": (peft.LoraConfig, dict(r=5, modules_to_save=["emb", "head", "ln1"], task_type=None), "lora"),
    "adalora": (peft.AdaLoraConfig, dict(init_r=5, target_r=2, total_step=10, lora_alpha=9), "lora"),
    "vera": (peft.VeraConfig, dict(r=9), "vera"),
}


def configured(kind, options, method=""):
    """A configuration of peft, which peft changes where it is used."""
    return kind(**{"target_modules": KEYS} | options)


def theirs_of(name):
    """Save a trained adapter of peft in the folder theirs, and return the model."""
    live = trained(rwkv(7), configured(*READ[name]))
    live.save_pretrained("theirs")
    return live


def refused(words, path="theirs", out="a.pth", to="native", hints=NO_HINTS):
    with pytest.raises(rwkv_miss.UserError, match=words):
        convert(path, out, to, hints)


def rwkv(version):
    model = RWKV(make_arch(version))
    model.load_state_dict(random_tensors(model.arch))
    return model


class Official(nn.Module):
    """A stand-in with the module names of transformers' Rwkv7ForCausalLM, which no test extra has.

    The model's own modules compute, so that this shows where peft puts an adapter.
    """

    def __init__(self, model):
        super().__init__()
        self.rwkv7, self.head = model, model.head
        del model.head

    def forward(self, ids):
        x, state = self.rwkv7.features(ids)
        return self.head(x), state


def trained(model, config, seed=3):
    """The model under peft, with values in all that is trained."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator)
    return wrapped.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


def merged(version, adapter):
    """Logits of the base of rwkv(version), merged with an adapter file."""
    write_checkpoint("base.pth", rwkv(version).state_dict().items())
    rwkv_miss.merge_file("base.pth", adapter, "merged.pth")
    return logits(RWKV.load("merged.pth"))


def load(path, model):
    """A folder in peft; a tensor that it does not know, or misses, is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, path).eval()


def same_folder(first, second):
    a, b = (load_file(f"{path}/{TENSORS}") for path in (first, second))
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def config_of(path, **changes):
    """A folder's configuration; with changes, written back."""
    path = pathlib.Path(path, CONFIG)
    config = json.loads(path.read_text())
    if changes:
        path.write_text(json.dumps({**config, **changes}))
    return config


@pytest.mark.product
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("name", READ)
def test_a_folder_of_peft_is_read_merged_and_written_again(name, version, tmp_path):
    live, method = trained(rwkv(version), configured(*READ[name])), READ[name][-1]
    live.save_pretrained("theirs")
    done = convert("theirs", "ours.pth", "native")
    assert done.source == "peft" and done.method == method
    want = logits(live)
    # 2 fp32 orders of summation: 7e-7 seen
    close("merged", merged(version, "ours.pth"), want, 3e-6)
    ours = rwkv(version)
    rwkv_miss.load_adapter(ours, "ours.pth")
    close("unmerged", logits(ours.eval()), want, 3e-6)

    convert("ours.pth", "back", "peft")
    again = logits(load("back", rwkv(version)))
    close("in peft again", again, want, 3e-6)
    first = tmp_path / "theirs"
    if name == "adalora":  # AdaLoRA has become a LoRA, which comes back as it was
        assert config_of("back")["peft_type"] == "LORA"
        first, want = tmp_path / "as-lora", again
        convert("back", "lora.pth", "native")
        convert("lora.pth", first, "peft")
    assert torch.equal(again, want) and torch.equal(logits(load(first, rwkv(version))), want)
    assert config_of(first) == config_of("back")
    same_folder(first, "back")


class Net(nn.Module):
    """Linears of odd widths with biases; the name of one is the end of the other's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.key = nn.Linear(13, 10)
        self.inner = nn.ModuleDict({"key": nn.Linear(10, 15), "out": nn.Linear(15, 6)})
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(self.inner["out"](self.inner["key"](self.key(x).relu()).relu()))


NET = [
    (peft.MissConfig, dict(target_modules=["key"])),
    (peft.MissConfig, dict(r=5, target_modules=["inner.key"], init_weights="bat")),
    (peft.MissConfig, dict(target_modules=["key"], init_weights="mini", mini_r=5)),
    (peft.LoraConfig, dict(lora_alpha=7, rank_pattern={"inner.key": 3}, alpha_pattern={"key": 5.5})),
    (peft.LoraConfig, dict(lora_alpha=7, rank_pattern={"key": 3}, use_rslora=True)),
    (peft.LoraConfig, dict(lora_alpha=7, target_modules=["key", "out"], use_dora=True)),
    (peft.VeraConfig, dict(target_modules=["key", "out"])),
]


def for_net(options):
    return dict(r=4, target_modules=["key"]) | options


@pytest.mark.parametrize("kind, options", NET)
def test_in_float64_the_weights_of_peft_and_these_are_one(kind, options):
    """HF's Bat has the order "col", its MiSS the layout "stride"; norms, factors and patterns are ours."""
    live = trained(Net(), kind(**for_net(options)))
    live.save_pretrained("theirs")
    convert("theirs", "ours.pth", "native")
    ours = Net()
    rwkv_miss.load_adapter(ours, "ours.pth")
    layers = adapted_linears(ours.double())
    for layer in layers.values():
        layer.prepare()
    want = dict(live.double().merge_and_unload().named_modules())
    assert layers
    for name, layer in layers.items():
        error = layer.base_weight() + layer.delta() - want[name].weight
        assert error.abs().max() < 1e-13, name


def test_after_training_in_peft_the_merged_file_has_its_logits():
    live = peft.get_peft_model(rwkv(7), peft.MissConfig(r=7, target_modules=KEYS, modules_to_save=["head"]))
    optimizer = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(live(IDS)[0][0, :-1], IDS[0, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live.save_pretrained("theirs")
    convert("theirs", "ours.pth", "native")
    moved = (logits(live) - logits(rwkv(7))).abs().max()
    assert moved > 0.1, "nothing was trained"
    close("merged", merged(7, "ours.pth"), logits(live), 3e-6)


def test_pissa_is_read_with_its_start_or_refused(tmp_path):
    """By peft's own account: what it makes of the pair (path_initial_model_for_weight_conversion), and what
    its live model computes.
    """
    live = peft.get_peft_model(
        rwkv(7), peft.LoraConfig(r=5, lora_alpha=8, target_modules=KEYS, init_lora_weights="pissa")
    )
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained("start")
    live.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for p in live.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    live.eval().save_pretrained("trained")
    live.save_pretrained("converted", path_initial_model_for_weight_conversion="start")
    refused("init_lora_weights = 'pissa' took .* --init FOLDER", "trained", "a.pth", "native")
    assert not (tmp_path / "a.pth").exists()

    convert("trained", "a.pth", "native", Hints(init="start"))
    assert read_metadata("a.pth")["method"] == "pissa"
    convert("converted", "b.pth", "native")
    convert("a.pth", "ours", "peft")
    for path in ("a.pth", "b.pth"):
        # W - B0 A0 is rounded in the live model, and the merge starts from W: 2e-6 seen
        close(path, merged(7, path), logits(live), 1e-5)
    close("of twice the rank", logits(load("ours", rwkv(7))), logits(live), 1e-5)
    assert config_of("ours")["r"] == 10

    convert("b.pth", "other", "peft")  # an adapter of another rank
    peft.get_peft_model(rwkv(7), peft.LoraConfig(r=5, target_modules=[*KEYS, "output"])).save_pretrained(
        "more"
    )
    for path, message in (
        ("other", r"blocks\.0\.att\.key has .* there"),
        ("more", r"blocks\.0\.att\.output is not adapted"),
    ):
        refused(f"is of another training: {message}", "trained", "c.pth", "native", Hints(init=path))


def saved(version, method, options, seed=1, **more):
    """An adapter file of a filled adapter, and the model that carries it."""
    model = rwkv(version)
    rwkv_miss.inject(model, method, **{"rank": fitting(method, options, 7), **options, **more})
    rwkv_miss.save_adapter(filled(model, seed), "a.pth", step=5)
    return model.eval()


HAS = {"miss", "bat", "lora", "lora_fa", "dora", "pissa", "vera"}


@pytest.mark.product
@pytest.mark.parametrize("method,options", CASES)
@pytest.mark.parametrize("to", ["peft", "lora"])
def test_what_is_written_computes_the_same_in_peft_or_is_refused(method, options, to, tmp_path):
    magnitude = options.get("magnitude") or method == "dora"
    if to == "lora":
        has_form = has_factors(METHODS[method]) and not magnitude
    else:
        unknown = options.keys() & {"layout", "shards", "scale", "magnitude", "expand"}
        has_form = method in HAS and not unknown and options.get("order") != "row"
    model = saved(7, method, options)
    if not has_form:
        way = "--to lora" if to == "peft" and not magnitude and has_factors(METHODS[method]) else "merge"
        refused(way, "a.pth", "out", to)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth"]
        return
    convert("a.pth", "out", to)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, TENSORS]
    # two orders of the same sums, and PiSSA's residual: 3e-6 seen
    close(to, logits(load("out", Official(rwkv(7)))), logits(model), 1e-5)
    assert (config_of("out")["peft_type"] == "LORA") == (
        to == "lora" or "lora" in method or method in ("pissa", "dora")
    )


@pytest.mark.parametrize(
    "method,options",
    [
        ("miss", {}),
        ("miss", {"mini_r": 4}),
        ("bat", {}),
        ("lora", {"alpha": 5.5, "rank_map": {"ffn": 3, "blocks.0": 5}, "alpha_map": {"att.key": 7.0}}),
        ("lora", {"rslora": True, "rank_map": {"ffn": 3}}),
        ("dora", {"dropout": 0.25}),
        ("vera", {}),
    ],
)
def test_native_to_peft_and_back_keeps_every_bit(method, options):
    saved(6, method, options)
    convert("a.pth", "folder", "peft")
    convert("folder", "b.pth", "native")
    before, after = read_checkpoint("a.pth"), read_checkpoint("b.pth")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
    )
    said, says = read_metadata("a.pth"), read_metadata("b.pth")
    for name in ("method", "arch", "base", "base_fingerprint", "step", "versions"):
        assert said[name] == says[name], name
    parse = rwkv_miss.adapter.METHODS[method].Options.parse
    of = [{name: parse(facts["options"]).at(name) for name in facts["linears"]} for facts in (said, says)]
    assert of[0] == of[1]


def test_miss_as_a_lora_merges_into_the_same_bits():
    """A = P and B = D^T: every sum of the product has one term that is not 0."""
    saved(7, "miss", {})
    write_checkpoint("base.pth", rwkv(7).state_dict().items())
    convert("a.pth", "folder", "lora")
    convert("folder", "lora.pth", "native")
    assert read_metadata("lora.pth")["method"] == "lora"
    for name in ("a", "lora"):
        rwkv_miss.merge_file("base.pth", f"{name}.pth", f"{name}-merged.pth")
    first, second = (read_checkpoint(f"{name}-merged.pth") for name in ("a", "lora"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    A = load_file(f"folder/{TENSORS}")["base_model.model.rwkv7.blocks.0.att.key.lora_A.weight"]
    assert A.sum() == A.count_nonzero() == A.shape[1], "one 1 in every column"


def test_whole_tensors_are_modules_or_refused(tmp_path):
    model = saved(7, "miss", {}, train_parts="emb,head,ln")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * p.requires_grad
    rwkv_miss.save_adapter(model, "a.pth")
    convert("a.pth", "folder", "peft")
    close("modules_to_save", logits(load("folder", Official(rwkv(7)))), logits(model), 1e-5)
    convert("folder", "b.pth", "native")
    assert read_checkpoint("a.pth").keys() == read_checkpoint("b.pth").keys()
    assert read_metadata("b.pth")["train_parts"] == ["emb", "head"]
    saved(7, "miss", {}, train_parts="time")
    refused(
        r"blocks\.\d\.\w+\.\w+ is trained as a whole, and peft keeps whole modules only.*merge",
        "a.pth",
        "time",
        "peft",
    )
    assert not (tmp_path / "time").exists()
    saved(7, "miss", {}, train_parts="emb,head", tokens=[3, 9])
    refused(
        "rows of emb and head are trained .2., which --to peft has no form for.*merge",
        "a.pth",
        "t",
        "peft",
    )


def test_ranks_that_differ_are_no_miss_of_peft_but_a_lora():
    model = saved(7, "miss", {"rank_map": {"ffn": 3}})
    refused("one rank for all linears, and this adapter has 3, 7; --to lora", "a.pth", "out", "peft")
    convert("a.pth", "out", "lora")
    close("lora", logits(load("out", Official(rwkv(7)))), logits(model), 1e-5)


@pytest.mark.parametrize("names", [("key", "inner.key"), ("0", "1.0")])
@pytest.mark.parametrize("ranks", [(4, 3), (3, 4)])
def test_a_name_that_is_the_end_of_another(names, ranks):
    """peft compares the ends of names; ranks and factors are right for both all the same."""

    def fresh():
        torch.manual_seed(0)
        if "key" in names:
            return Net()
        return nn.Sequential(nn.Linear(13, 10), nn.Sequential(nn.Linear(10, 15)), nn.ReLU(), nn.Linear(15, 6))

    model = fresh()
    targets, maps = (
        [*names, "3" if "0" in names else "out"],
        (dict(zip(names, ranks)), dict(zip(names, (6.0, 5.0)))),
    )
    rwkv_miss.inject(model, "lora", targets, rank=4, alpha=6.0, rank_map=maps[0], alpha_map=maps[1])
    rwkv_miss.save_adapter(filled(model), "a.pth")
    convert("a.pth", "folder", "peft")
    x = torch.randn(3, 13)
    close("outputs", load("folder", fresh())(x), model(x), 1e-5)
    convert("folder", "b.pth", "native")
    options = rwkv_miss.adapter.METHODS["lora"].Options.parse(read_metadata("b.pth")["options"])
    for name, layer in adapted_linears(model).items():
        assert (options.at(name).rank, options.at(name).scale) == (len(layer.lora_A), layer.scale)


def test_linears_with_the_most_frequent_rank_and_factor_are_not_named():
    saved(7, "lora", {"alpha": 5.5, "rank_map": {"1.ffn.key": 3}, "alpha_map": {"0.att.key": 7.0}})
    convert("a.pth", "folder", "peft")
    config = config_of("folder")
    assert (config["r"], config["lora_alpha"]) == (7, 5.5)
    assert config["rank_pattern"] == {"rwkv7.blocks.1.ffn.key": 3}
    assert config["alpha_pattern"].keys() == {"rwkv7.blocks.0.att.key", "rwkv7.blocks.1.ffn.key"}
    convert("folder", "b.pth", "native")
    options = read_metadata("b.pth")["options"]
    assert options["rank_map"].keys() == {"blocks.1.ffn.key"}
    assert options["alpha_map"] == {"blocks.0.att.key": 7}


def test_a_lora_keeps_its_own_factors_as_a_lora():
    saved(7, "lora", {"alpha": 5.5})
    for to in ("peft", "lora"):
        convert("a.pth", to, to)
    assert config_of("peft") == config_of("lora")
    same_folder("peft", "lora")


def test_the_older_names_of_bone_are_read(tmp_path):
    """peft before 0.19 called MiSS Bone; it is written as MiSS, which is what peft loads today."""
    live = theirs_of("miss")
    tensors = load_file(f"theirs/{TENSORS}")
    (tmp_path / "theirs" / TENSORS).unlink()
    torch.save(
        {name.replace("miss_block", "bone_block"): t for name, t in tensors.items()},
        "theirs/adapter_model.bin",
    )
    config = config_of("theirs")
    older = {name: value for name, value in config.items() if name not in ("miss_dropout", "mini_r")}
    pathlib.Path("theirs", CONFIG).write_text(json.dumps(older | {"peft_type": "BONE"}))
    convert("theirs", "a.pth", "native")
    close("merged", merged(7, "a.pth"), logits(live), 3e-6)
    convert("a.pth", "back", "peft")
    assert torch.equal(logits(load("back", rwkv(7))), logits(live))


@pytest.mark.parametrize(
    "case,changes,message",
    [
        ("lora", {"peft_type": "IA3"}, "peft_type 'IA3'; read are: MISS, BONE, LORA"),
        ("lora", {"use_qalora": True}, "use_qalora = True changes what the adapter does.*merge_and_unload"),
        ("lora", {"layer_replication": [[0, 1]]}, "layer_replication"),
        ("lora", {"init_lora_weights": "loftq"}, "'loftq' did to the base is not known here"),
        ("lora", {"init_lora_weights": "olora"}, "'olora' took the adapter's first product"),
        ("lora", {"r": 4}, r"the configuration says rank 4"),
        ("lora", {"r": "5"}, "r is '5', expected a number"),
        ("lora", {"lora_alpha": 0}, "lora_alpha of blocks.0.att.key is 0"),
        ("lora", {"alpha_pattern": {"(a+)+": 3}}, "more than a name with a wildcard"),
        ("lora", {"alpha_pattern": {"*": 3}}, "an expression in alpha_pattern is none"),
        ("lora", {"alpha_pattern": {".*.*.*x": 3}}, "a wildcard"),
        ("lora", {"alpha_pattern": {"key": "x"}}, "lora_alpha of blocks.0.att.key is 'x'"),
        ("adalora", {"init_r": -9}, "init_r is -9"),
        ("lora", {"alpha_pattern": [3]}, "alpha_pattern is .3., expected names with numbers"),
        (
            "lora",
            {"use_dora": True},
            "has lora_A, lora_B; LORA as it is configured needs lora_A, lora_B, magnitude",
        ),
        ("miss", {"init_weights": "bat"}, r"r = 7 and init_weights = 'bat' need \(out / 7, 7, 7\)"),
        ("miss", {"init_weights": "mini"}, r"need \(7, 1\)"),
        ("miss", {"init_weights": "spiral"}, "'spiral' is unknown"),
        ("bat", {"init_weights": True}, r"need \(8, out\)"),
        ("vera", {"r": 8}, r"r = 8 needs \(8,\)"),
    ],
)
def test_what_a_configuration_says_is_done_or_refused(case, changes, message, tmp_path):
    theirs_of(case)
    config_of("theirs", **changes)
    refused(message)
    assert not (tmp_path / "a.pth").exists()


def test_a_folder_of_peft_is_loaded_and_another_folder_refused():
    live, model = theirs_of("lora").eval(), rwkv(7).eval()
    rwkv_miss.load_adapter(model, "theirs")
    close("loaded", model(IDS)[0], live(IDS)[0], 1e-5)
    os.mkdir("model")
    with pytest.raises(rwkv_miss.UserError, match="model is a folder without adapter_config.json or"):
        rwkv_miss.load_adapter(rwkv(7), "model")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (
            peft.LoraConfig,
            {"bias": "lora_only"},
            r"trains (inner\.)?key\.bias, of an adapted linear, as well \(bias: 'lora_only'\)",
        ),
        (peft.LoraConfig, {"bias": "all"}, "of an adapted linear"),
        (
            peft.LoraConfig,
            {"lora_bias": True},
            r"the bias of (inner\.)?key's lora_B needs the base: ",
        ),
        (peft.VeraConfig, {"save_projection": False}, "no vera_A and vera_B"),
    ],
)
def test_tensors_without_a_form_here_are_refused_by_name(kind, options, message):
    trained(Net(), kind(**for_net(options))).save_pretrained("theirs")
    refused(message)


def test_trained_biases_of_other_layers_are_whole_tensors():
    live = trained(rwkv(7), peft.LoraConfig(r=4, target_modules=KEYS, bias="all"))
    live.save_pretrained("theirs")
    convert("theirs", "a.pth", "native")
    assert "blocks.0.ln1.bias" in read_checkpoint("a.pth")
    close("merged", merged(7, "a.pth"), logits(live), 3e-6)
    convert("a.pth", "back", "peft")
    same_folder("theirs", "back")


def test_adalora_that_has_pruned_some_of_its_singular_values():
    """peft saves what is left, with the factor of the rank at the start; a linear may have lost all."""
    live = trained(rwkv(7), configured(*READ["adalora"]))
    left = {
        name: layer.lora_E["default"]
        for name, layer in live.get_base_model().named_modules()
        if hasattr(layer, "lora_E")
    }
    kept = {
        name: [(row + number) % 3 == 0 and number != 1 for row in range(5)]
        for number, name in enumerate(left)
    }
    with torch.no_grad():
        for name, E in left.items():
            E[~torch.tensor(kept[name])] = 0
    live.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": rows for name, rows in kept.items()}
    live.save_pretrained("theirs")
    assert {len(t) for name, t in load_file(f"theirs/{TENSORS}").items() if "lora_A" in name} == {0, 1, 2}
    assert convert("theirs", "a.pth", "native").linears == 7
    close("merged", merged(7, "a.pth"), logits(live), 3e-6)
    facts = read_metadata("a.pth")
    options = rwkv_miss.METHODS["lora"].Options.parse(facts["options"])
    # peft divides by the rank + 1e-5, which logits in fp32 hardly show
    scales = [options.at(name).scale for name in facts["linears"]]
    assert scales == [pytest.approx(9 / (5 + 1e-5), rel=1e-9)] * 7


def test_hints_that_say_nothing_are_refused():
    theirs_of("bat")
    convert("theirs", "a.pth", "native", Hints(origin="peft"))
    for path, hints, message in (
        ("theirs", Hints(alpha=8.0), "leaves nothing open that --alpha"),
        ("theirs", Hints(origin="rwkv-peft"), "a folder of peft"),
        ("a.pth", Hints(origin="peft"), "a.pth is native.*--origin"),
        ("a.pth", Hints(init="x"), "--init"),
    ):
        refused(message, path, "b.pth", "native", hints)


def test_a_transformers_model_is_none_of_rwkv_and_converts_all_the_same():
    """Names are the model's, and its task stays in the configuration."""
    transformers = pytest.importorskip("transformers")

    def llama():
        torch.manual_seed(0)
        sizes = dict(vocab_size=67, hidden_size=48, intermediate_size=80, num_hidden_layers=2)
        heads = dict(num_attention_heads=3, num_key_value_heads=3)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()

    live = trained(
        llama(), peft.MissConfig(r=7, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    live.save_pretrained("theirs")
    convert("theirs", "a.pth", "native")
    ours = llama()
    rwkv_miss.load_adapter(ours, "a.pth")
    with torch.no_grad():
        want = live(IDS).logits
        close("here", ours(IDS).logits, want, 3e-6)
        write_checkpoint("base.pth", llama().state_dict().items())
        for to in ("peft", "lora"):
            convert("a.pth", to, to, Hints(base="base.pth"))
            again = load(to, llama())
            assert type(again).__name__ == "PeftModelForCausalLM"
            close(to, again(IDS).logits, want, 3e-6)


def test_the_command_line_knows_the_base(tmp_path, capsys):
    saved(7, "miss", {})
    write_checkpoint("base.pth", rwkv(7).state_dict().items())
    write_checkpoint("other.pth", random_tensors(make_arch(7, n_embd=64)).items())
    main("convert a.pth b.pth --to native --base base.pth".split())
    assert "miss of 12 linears" in capsys.readouterr().out
    facts = read_metadata("b.pth")
    assert facts["base"] == "base.pth" and facts["arch"]["n_embd"] == 48
    for command in (["--to", "native"], ["--to", "lora"]):
        with pytest.raises(SystemExit):
            main(["convert", "b.pth", "c", *command, "--base", "other.pth"])
        assert "the adapter was trained on another base (base.pth), not on" in capsys.readouterr().err
        assert not (tmp_path / "c").exists()


def test_an_unknown_tensor_is_never_dropped():
    theirs_of("lora")
    tensors = load_file(f"theirs/{TENSORS}")
    save_file({**tensors, "base_model.model.emb.lora_embedding_C": torch.zeros(2, 3)}, f"theirs/{TENSORS}")
    refused("emb.lora_embedding_C, neither a tensor of an adapted linear")


def test_two_names_of_one_tensor():
    theirs_of("dora")
    tensors = load_file(f"theirs/{TENSORS}")
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    save_file({**tensors, f"{name}.weight": tensors[name].clone()}, f"theirs/{TENSORS}")
    refused("names a tensor twice")


def test_options_of_training_are_no_part_of_a_folder_and_said_so():
    for method, options in (("lora", {"lora_plus": 4.0}), ("pissa", {"lora_plus": 4.0})):
        saved(7, method, options)
        assert (
            convert("a.pth", "out", "peft").notes[-1]
            == "lora_plus 4, a ratio of learning rates, is no part of the folder"
        )
    assert "PiSSA is a LoRA of twice the rank" in convert("a.pth", "out", "peft").notes[0]
    saved(7, "lora_fa", {})
    assert "LoRA-FA is a LoRA" in convert("a.pth", "out", "peft").notes[0]


def test_dtypes_and_other_prefixes_stay():
    theirs_of("lora")
    tensors = load_file(f"theirs/{TENSORS}")
    save_file(
        {name.removeprefix("base_model.model."): t.bfloat16() for name, t in tensors.items()},
        f"theirs/{TENSORS}",
    )
    convert("theirs", "a.pth", "native")
    assert "blocks.0.att.key.lora_A" in read_checkpoint("a.pth")
    convert("a.pth", "back", "peft")
    same_folder("theirs", "back")


@pytest.mark.parametrize("method", ["miss", "lora", "vera"])
def test_an_adapter_that_is_not_whole_is_not_written(method, tmp_path):
    saved(7, method, {})
    tensors, metadata = read_checkpoint("a.pth"), read_metadata("a.pth")
    for name in (list(tensors)[0], list(tensors)[-1]):
        without = {other: t for other, t in tensors.items() if other != name}
        for changed in (without, {**tensors, name: torch.zeros(5, 6)}):
            for facts in (metadata, {**metadata, "arch": None}):
                write_checkpoint("b.pth", changed.items(), facts)
                if changed is without or facts is metadata:
                    with pytest.raises(rwkv_miss.UserError):
                        convert("b.pth", "out", "peft")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    saved(7, "miss", {})
    for out, message in (("file", "is a file"), ("full", "holds notes.txt, and only")):
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "notes.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        refused(message, "a.pth", out, "peft")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "out").mkdir()  # empty, and then one of its own
    for _ in range(2):
        convert("a.pth", "out", "peft")
    before = (tmp_path / "out" / TENSORS).read_bytes()
    saved(7, "miss", {}, seed=2)

    def fails(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    refused("was not written: No space left on device", "a.pth", "out", "peft")
    assert (tmp_path / "out" / TENSORS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "file", "full", "out"]


def test_a_folder_that_can_not_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    saved(7, "miss", {})
    convert("a.pth", "out", "peft")
    before = (tmp_path / "out" / TENSORS).read_bytes()
    rename = os.rename

    def fails(source, target):
        if source.endswith(".tmp"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError):
        convert("a.pth", "out", "peft")
    assert (tmp_path / "out" / TENSORS).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "out"]


def test_without_safetensors_the_way_to_it_is_named(tmp_path, monkeypatch):
    saved(7, "miss", {})
    convert("a.pth", "out", "peft")
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    convert("a.pth", "new", "peft")  # only to read it takes the package
    assert (tmp_path / "new" / TENSORS).read_bytes() == (tmp_path / "out" / TENSORS).read_bytes()
    refused(rf"out/{TENSORS} .*absent: pip install safetensors", "out", "new.pth", "native")
    assert not (tmp_path / "new.pth").exists()
