"""Files of RWKV-PEFT and RWKV-LM-RLHF: the forwards of their trainers, written out in float64, are what our
merge and our live adapter compute.
"""

import os
import pathlib
import re

import pytest
import torch

import rwkv_miss
from rwkv_miss.__main__ import describe, main
from rwkv_miss.convert import NO_HINTS, Hints, convert
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.methods.whole_tensors import PARTS, in_parts
from src.model import RWKV

from .conftest import close, make_arch, random_tensors
from .test_adapters import filled
from .test_convert import same_tensors

pytestmark = pytest.mark.usefixtures("in_its_folder")

FFN = ["ffn.key", "ffn.value"]
LINEARS = {
    6: [*(f"att.{name}" for name in "receptance key value output gate".split()), *FFN, "ffn.receptance"],
    7: [*(f"att.{name}" for name in "receptance key value output".split()), *FFN],
}
SQUARE = tuple(name for name in LINEARS[7] if name.startswith("att"))


# RWKV-PEFT's layers of x (..., inputs), by their equations


def miss_forward(x, W, bone):
    """y = x W^T + S bone, where S sums x, zero-padded, over its blocks of r."""
    r = bone.shape[0]
    padded = torch.cat((x, x.new_zeros(*x.shape[:-1], -x.shape[-1] % r)), -1)
    S = sum(padded[..., start : start + r] for start in range(0, padded.shape[-1], r))
    return x @ W.T + S @ bone


def by_blocks(x, W, r, block):
    """y = x (W + dW)^T, where the r x r blocks of dW are W_ab D + D with D = block(a, b)."""
    changed = W.clone()
    for a in range(W.shape[0] // r):
        for b in range(W.shape[1] // r):
            at = slice(a * r, a * r + r), slice(b * r, b * r + r)
            changed[at] += W[at] @ block(a, b) + block(a, b)
    return x @ changed.T


def row_forward(x, W, bone):
    return by_blocks(x, W, bone.shape[1], lambda a, b: bone[b])


def col_forward(x, W, bone):
    return by_blocks(x, W, bone.shape[1], lambda a, b: bone[a])


def flat_forward(x, W, bone):
    r = bone.shape[1]
    return by_blocks(x, W, r, lambda a, b: bone[a * r : a * r + r])


def lora_forward(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


def pissa_forward(x, W, A, B, A0, B0):
    return x @ (W - B0 @ A0).T + x @ A.T @ B.T


# generation -> (tensor, forward, its shape for a linear (out, inputs) and a rank, our method and its options)
GENERATIONS = {
    "v0 flat": ("bone", flat_forward, lambda out, inputs, r: (out, r), ("bat", "col")),
    "v0 col": ("bone", col_forward, lambda out, inputs, r: (out // r, r, r), ("bat", "col")),
    "v1": ("bone", row_forward, lambda out, inputs, r: (inputs // r, r, r), ("bat", "row")),
    "v2": ("bone", miss_forward, lambda out, inputs, r: (r, out), ("miss", None)),
    "disha": ("disha", miss_forward, lambda out, inputs, r: (r, out), ("miss", None)),
    "disha bat": ("disha", row_forward, lambda out, inputs, r: (inputs // r, r, r), ("bat", "row")),
}


def draw(*shape, dtype=torch.float32, std=0.1):
    return (std * torch.randn(shape)).to(dtype)


def base_file(version, dtype=torch.float32, **sizes):
    tensors = random_tensors(make_arch(version, **sizes), dtype)
    write_checkpoint("base.pth", tensors.items())
    return tensors


def whole_tensors(base, dtype, wanted=r".*(time|ln).*"):
    """Make what their --train_parts "time ln" saves: every tensor with such a name, at other values."""
    return {
        name: (1.1 * t.float() + 0.01).to(dtype)
        for name, t in base.items()
        if re.fullmatch(wanted, name) and "ffn.value" not in name
    }


def linears_of(version, names=None, layers=2):
    return [f"blocks.{layer}.{name}" for layer in range(layers) for name in names or LINEARS[version]]


def theirs(
    base, generation, version, rank, dtype=torch.float32, names=None, parts=True, prefix="", file="theirs.pth"
):
    """A file as their trainer saves it; returns its tensors under the names of the base."""
    torch.manual_seed(3)
    leaf, _, shape, _ = GENERATIONS[generation]
    tensors = whole_tensors(base, dtype) if parts else {}
    tensors |= {
        f"{name}.{leaf}": draw(*shape(*base[f"{name}.weight"].shape, rank), dtype=dtype)
        for name in linears_of(version, names)
    }
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, file)
    return tensors


def ours(hints=NO_HINTS, file="theirs.pth"):
    return convert(file, "ours.pth", "native", hints)


def refused(words, hints=NO_HINTS, file="theirs.pth", to="native"):
    with pytest.raises(rwkv_miss.UserError, match=words):
        convert(file, "out.pth", to, hints)
    assert not list(pathlib.Path().glob("out*"))


def same_layer(name, merged, x, want):
    """Our merged weight on x against their forward. fp32 additions and one rounding: 2^-24 of the largest
    term, a few times over in a product.
    """
    close(name, x @ merged.double().T, want, 2e-6)


def live(file="ours.pth", base="base.pth"):
    """Logits of base + adapter."""
    model = RWKV.load(base)
    rwkv_miss.load_adapter(model, file)
    return model(torch.arange(23)[None])[0]


def merge_ours():
    """The tensors of the base merged with our file."""
    rwkv_miss.merge_file("base.pth", "ours.pth", "merged.pth")
    return read_checkpoint("merged.pth")


def merged_logits():
    return RWKV.load("merged.pth")(torch.arange(23)[None])[0]


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    "generation, rank", [(name, 8 if form[0] == "bat" else 13) for name, (*_, form) in GENERATIONS.items()]
)
def test_every_generation_is_what_their_forward_computes(version, generation, rank):
    base = base_file(version)
    tensors = theirs(base, generation, version, rank, torch.bfloat16)
    leaf, forward, _, (method, order) = GENERATIONS[generation]
    report = ours()
    assert (report.method, report.linears) == (method, len(linears_of(version)))
    facts = describe("ours.pth")
    assert facts["kind"] == "adapter" and facts["metadata"]["options"]["rank"] == rank
    assert facts["metadata"]["options"].get("order") == order
    assert facts["metadata"]["origin"] == {"format": "rwkv-peft", "tensor": leaf}
    assert facts["metadata"]["train_parts"] == (["ln", "time"] if version == 6 else ["ln"])
    merged = merge_ours()
    assert list(merged) == list(base)
    for name, tensor in base.items():
        linear = name.removesuffix(".weight")
        if f"{linear}.{leaf}" in tensors:
            x = draw(5, tensor.shape[1], dtype=torch.float64)
            same_layer(
                linear, merged[name], x, forward(x, tensor.double(), tensors[f"{linear}.{leaf}"].double())
            )
            assert not torch.equal(merged[name], tensor)
        else:
            assert torch.equal(merged[name], tensors.get(name, tensor).float()), name
    close("logits", live(), merged_logits(), 1e-5)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", ["lora", "pissa", "pissa model."])
def test_lora_and_pissa_are_what_their_forwards_compute(version, kind):
    base, r, alpha = base_file(version), 5, 12.5
    torch.manual_seed(4)
    factors, initial = whole_tensors(base, torch.float32), {}
    for name in linears_of(version):
        out, inputs = base[f"{name}.weight"].shape
        factors |= {f"{name}.lora_A": draw(r, inputs), f"{name}.lora_B": draw(out, r)}
        initial |= {f"{name}.init_lora_A": draw(r, inputs), f"{name}.init_lora_B": draw(out, r)}
    torch.save(factors, "theirs.pth")
    torch.save({f"{kind.partition(' ')[2]}{name}": t for name, t in initial.items()}, "init_pissa.pth")
    hints = Hints(alpha=alpha) if kind == "lora" else Hints(init="init_pissa.pth")
    assert ours(hints).method == kind.partition(" ")[0]
    merged = merge_ours()
    for name in linears_of(version):
        W, (A, B) = (
            base[f"{name}.weight"].double(),
            (factors[f"{name}.lora_{side}"].double() for side in "AB"),
        )
        x = draw(5, W.shape[1], dtype=torch.float64)
        if kind == "lora":
            want = lora_forward(x, W, A, B, alpha)
        else:
            want = pissa_forward(x, W, A, B, *(initial[f"{name}.init_lora_{side}"].double() for side in "AB"))
        same_layer(name, merged[f"{name}.weight"], x, want)
    close("logits", live(), merged_logits(), 1e-5)


# both ways, bit for bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("generation, rank", [("v1", 16), ("v2", 13), ("disha", 7), ("disha bat", 8)])
def test_their_file_comes_back_bit_for_bit(generation, rank, dtype):
    base = base_file(6)
    theirs(base, generation, 6, rank, dtype)
    ours()
    convert("ours.pth", "again.pth", "rwkv-peft")
    same_tensors("theirs.pth", "again.pth")
    assert read_metadata("again.pth") is None


NATIVE = [
    ("miss", {"rank": 13, "rank_map": {"ffn": 5}}, ""),
    ("miss", {"rank": 8}, "ln,time,state"),
    ("bat", {"rank": 8, "order": "row"}, "head"),
    ("lora", {"rank": 3, "alpha": 7.25}, "emb"),
    ("pissa", {"rank": 3, "niter": 0}, "ln"),
    ("state", {}, ""),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method, options, parts", NATIVE)
def test_our_file_comes_back_bit_for_bit(method, options, parts, dtype):
    model = RWKV(make_arch(7))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, train_parts=parts, **options)
    rwkv_miss.save_adapter(filled(model), "full.pth")
    facts = read_metadata("full.pth")
    write_checkpoint("a.pth", ((name, t.to(dtype)) for name, t in read_checkpoint("full.pth").items()), facts)
    notes = convert("a.pth", "theirs.pth", "rwkv-peft").notes
    init = pathlib.Path("theirs.init_pissa.pth")
    assert init.exists() == (method == "pissa")
    assert notes == {
        "lora": ["the file does not hold alpha: merge/merge_lora.py 7.25 there, --alpha 7.25 here"],
        "pissa": [f"the factors that the training began with are in {init}: --lora_init there, --init here"],
    }.get(method, [])
    hints = {"lora": Hints(alpha=7.25), "pissa": Hints(init=str(init))}
    ours(hints.get(method, Hints(origin="rwkv-peft")))
    before, after = read_checkpoint("a.pth"), read_checkpoint("ours.pth")
    assert before.keys() == after.keys()
    assert all(t.dtype == after[name].dtype and torch.equal(t, after[name]) for name, t in before.items())
    again = read_metadata("ours.pth")
    parsed = [rwkv_miss.METHODS[method].Options.parse(found["options"]) for found in (facts, again)]
    linears = facts["linears"]
    assert method == again["method"] and sorted(linears) == sorted(again["linears"])
    assert again["train_parts"] == facts["train_parts"]
    first, second = (
        [(o.at(name).rank, getattr(o.at(name), "scale", None), getattr(o, "order", None)) for name in linears]
        for o in parsed
    )
    assert first == second


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("miss", {"layout": "contiguous"}, "no form for MiSS with layout=contiguous"),
        ("miss", {"shards": "balanced"}, "shards=balanced"),
        ("miss", {"scale": "sqrt"}, "scale=sqrt"),
        ("miss", {"mini_r": 16}, "mini_r=16"),
        ("miss", {"magnitude": True}, "magnitude=True"),
        ("miss", {"expand": True}, "expand=True"),
        ("bat", {"order": "col"}, "Bat with order row alone"),
        ("dora", {}, "no form for dora"),
        ("lora", {"rank_map": {"ffn": 4}}, "one alpha for all linears, and this LoRA has 8, 16"),
        ("pissa", {"alpha": 16.0}, "PiSSA with the factor 1 alone, this one has 2"),
    ],
)
def test_what_their_files_have_no_form_for_is_refused_and_nothing_written(method, options, words):
    model = RWKV(make_arch(7))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, rank=8, **options)
    rwkv_miss.save_adapter(filled(model), "a.pth")
    refused(words, file="a.pth", to="rwkv-peft")


def test_an_initial_file_is_never_written_over(tmp_path):
    model = RWKV(make_arch(7))
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "pissa", rank=3)
    rwkv_miss.save_adapter(model, "a.pth")
    (tmp_path / "b.init_pissa.pth").write_bytes(b"another")
    with pytest.raises(rwkv_miss.UserError, match="exists; move it away"):
        convert("a.pth", "b.pth", "rwkv-peft")
    assert (tmp_path / "b.init_pissa.pth").read_bytes() == b"another" and not (tmp_path / "b.pth").exists()


# facts that a file alone cannot tell


@pytest.mark.parametrize("generation", ["v0 col", "v1"])
def test_square_blocks_are_read_as_the_origin_has_them_and_never_without_one(generation):
    base = base_file(7)
    tensors = theirs(base, generation, 7, 8, names=SQUARE)
    refused(
        r"could be of two origins.*say which: --origin rwkv-peft \(.*\(heads, value, key\)\); --origin"
        r" openmose .*--origin bone-v0 "
    )
    for origin, order, forward in (
        ("rwkv-peft", "row", row_forward),
        ("openmose", "row", row_forward),
        ("bone-v0", "col", col_forward),
    ):
        ours(Hints(origin=origin))
        assert read_metadata("ours.pth")["options"]["order"] == order
        merged = merge_ours()
        name = "blocks.1.att.key"
        x = draw(5, 48, dtype=torch.float64)
        want = forward(x, base[f"{name}.weight"].double(), tensors[f"{name}.bone"].double())
        same_layer(name, merged[f"{name}.weight"], x, want)


def test_a_rank_as_large_as_the_width_can_be_of_two_origins():
    torch.save({f"{name}.bone": draw(48, 48) for name in linears_of(7, SQUARE)}, "theirs.pth")
    refused("could be of two origins")
    assert ours(Hints(origin="rwkv-peft")).method == "miss"
    assert ours(Hints(origin="bone-v0")).method == "bat"


@pytest.mark.parametrize(
    "generation, rank, right, wrong",
    [
        ("v1", 8, "rwkv-peft", "bone-v0"),
        ("v0 col", 16, "bone-v0", "openmose"),
        ("v0 flat", 8, "bone-v0", "rwkv-peft"),
        ("disha", 13, "openmose", "bone-v0"),
    ],
)
def test_an_origin_that_the_rectangular_linears_contradict_is_an_error(generation, rank, right, wrong):
    theirs(base_file(6), generation, 6, rank)
    refused(f"--origin {wrong}, but the tensors are no blocks", Hints(origin=wrong))
    refused("--origin peft: HF peft has no tensor of such a name", Hints(origin="peft"))
    ours()
    same = read_checkpoint("ours.pth")
    ours(Hints(origin=right))
    assert all(torch.equal(t, same[name]) for name, t in read_checkpoint("ours.pth").items())


@pytest.mark.parametrize(
    "shapes",
    [
        {"blocks.0.att.key": (6, 8, 8), "blocks.0.att.value": (5, 8, 8)},
        {"blocks.0.ffn.key": (8, 192), "blocks.1.ffn.key": (8, 191)},
        {
            "blocks.0.att.key": (6, 8, 8),
            "blocks.0.ffn.key": (23, 8, 8),
            "blocks.0.ffn.value": (5, 8, 8),
            "blocks.0.att.output": (6, 8, 8),
        },
    ],
)
def test_widths_of_no_model_are_a_contradiction(shapes):
    torch.save({f"{name}.bone": draw(*shape) for name, shape in shapes.items()}, "theirs.pth")
    refused("contradiction: the tensors are no blocks of one model's linears")


def key(leaf, *shape):
    """A tensor of att.key, by the end of its name."""
    return {f"blocks.0.att.key.{leaf}": draw(*shape)}


def ffn(name, *shape):
    return {f"blocks.0.ffn.{name}": draw(*shape)}


A, B, BONE = key("lora_A", 3, 48), key("lora_B", 48, 3), ffn("key.bone", 3, 192)
STATE = {"blocks.0.att.time_state": draw(3, 16, 16)}


@pytest.mark.parametrize(
    "content, hints, words",
    [
        (A | B, NO_HINTS, "does not hold LoRA's alpha: give the alpha of the training with --alpha"),
        (A | B, Hints(alpha=0), "--alpha 0 is no factor"),
        (A | B, Hints(alpha=float("inf")), "--alpha inf is no factor"),
        (A | B, Hints(alpha=float("nan")), "--alpha nan is no factor"),
        (A | B, Hints(alpha=4, init="x.pth"), "--alpha and --init contradict each other"),
        (A | B, Hints(alpha=4, profile="x.csv"), "--alpha and --profile contradict"),
        (BONE, Hints(profile="x.csv"), "--profile is for LoRA"),
        (A | B, Hints(profile="nowhere.csv"), "nowhere.csv can't be read: No such file"),
        (A | B, Hints(profile="/dev/zero"), "/dev/zero is no regular file"),
        (A | B, Hints(init="nowhere.pth"), "nowhere.pth does not exist"),
        (A, Hints(alpha=4), "has lora_A without lora_B"),
        (B, Hints(alpha=4), "has lora_B without lora_A"),
        (A | key("lora_B", 48, 4), Hints(alpha=4), "expected .r, inputs. and"),
        (
            A | B | {"head.lora_A": draw(4, 48), "head.lora_B": draw(67, 4)},
            Hints(alpha=4),
            r"the ranks differ \(3, 4\)",
        ),
        (A | B | BONE, Hints(alpha=4), "tensors of bone and lora; one method"),
        (BONE, Hints(alpha=4), "--alpha is for LoRA and PiSSA, and the file has .bone tensors"),
        (BONE, Hints(init="x.pth"), "--init is for LoRA"),
        (
            A | B,
            Hints(alpha=4, origin="rwkv-peft"),
            "--origin rwkv-peft decides nothing in a file of LoRA; drop the flag",
        ),
        (
            STATE,
            Hints(origin="bone-v0"),
            "decides nothing in a file of initial states; drop the flag, or choose",
        ),
        (BONE | key("disha", 3, 48), NO_HINTS, "of bone and disha"),
        (BONE | key("bone", 16, 3, 3), NO_HINTS, "two dimensions for some linears and three"),
        (key("bone", 16, 3, 4), NO_HINTS, "blocks.0.att.key.bone is .16, 3, 4., expected"),
        (key("bone", 16), NO_HINTS, "is .16., expected"),
        (key("bone", 0, 3), NO_HINTS, "expected numbers in fp32"),
        *(
            ({"blocks.0.att.key.bone": torch.ones(3, 48, dtype=dtype)}, NO_HINTS, f"is {dtype}")
            for dtype in (torch.int8, torch.float8_e4m3fn)
        ),
        (BONE | ffn("key.weight", 192, 48), NO_HINTS, "blocks.0.ffn.key has a weight of its own"),
        (
            BONE | {"blocks.0.att.time_offset": draw(48)},
            NO_HINTS,
            "time_offset is no adapter's tensor and none of RWKV-6 or RWKV-7",
        ),
        (
            BONE | ffn("expert_0.key.bone_expert_0", 3, 48),
            NO_HINTS,
            "bone_expert_0 is of a mixture of experts",
        ),
        (
            BONE | ffn("router.linear.weight", 3, 48),
            NO_HINTS,
            "router.linear.weight is of a mixture of experts",
        ),
        (A | B | key("lora_M", 1, 48), Hints(alpha=4), "lora_M is of DoRA with a norm for every input"),
        ({"emb.bone": draw(3, 48)}, NO_HINTS, "emb.bone adapts the embedding"),
        (
            BONE | {"model.blocks.0.ffn.key.bone": draw(3, 192)},
            NO_HINTS,
            "2 tensors have only 1 names without _forward_module. and model.",
        ),
        ({"blocks.0.att.time_state": draw(3, 16)}, NO_HINTS, "time_state is .3, 16., expected .heads, N, N."),
    ],
)
def test_what_has_no_form_or_no_meaning_here_is_refused_by_name(content, hints, words):
    torch.save(content, "theirs.pth")
    refused(words, hints)


@pytest.mark.parametrize(
    "changed, words",
    [
        (
            key("init_lora_A", 4, 48),
            r"init_lora_A should be \[3, 48\], found torch.float32 \[4, 48\]; it is of another training",
        ),
        ({"blocks.0.att.value.init_lora_A": draw(3, 48)}, "holds blocks.0.att.value.init_lora_A too"),
    ],
)
def test_initial_factors_of_another_training_are_refused(changed, words):
    torch.save(A | B, "theirs.pth")
    initial = {name.replace("lora_", "init_lora_"): tensor for name, tensor in (A | B).items()}
    torch.save(initial | changed, "init_pissa.pth")
    refused(words, Hints(init="init_pissa.pth"))


@pytest.mark.parametrize("prefix", ["model.", "_forward_module.", "_forward_module.model."])
def test_prefixes_of_the_trainer_are_taken_off_and_named(prefix, capsys):
    base = base_file(7)
    theirs(base, "disha", 7, 13)
    ours()
    plain = read_checkpoint("ours.pth")
    theirs(base, "disha", 7, 13, prefix=prefix)
    main(["convert", "theirs.pth", "ours.pth", "--to", "native"])
    named = " and ".join(part for part in ("_forward_module.", "model.") if part in prefix)
    assert f"note: {named} was taken off the names of the tensors" in capsys.readouterr().out
    assert plain.keys() == read_checkpoint("ours.pth").keys()


# states, the head, and layers that only some of are trained


@pytest.mark.parametrize("version", [6, 7])
def test_states_are_value_by_key_and_those_of_fla_are_transposed(version):
    base_file(version)
    torch.manual_seed(5)
    states = {f"blocks.{layer}.att.time_state": draw(3, 16, 16, std=1.0) for layer in range(2)}
    torch.save({f"model.{name}": tensor for name, tensor in states.items()}, "theirs.pth")
    assert ours(Hints(origin="rwkv-peft")).notes == ["model. was taken off the names of the tensors"]
    assert "taken as (heads, value, key)" in ours().notes[1]
    same = read_checkpoint("ours.pth")
    assert all(torch.equal(same[name], tensor) for name, tensor in states.items())
    logits = live()
    torch.save({name: tensor.mT.contiguous() for name, tensor in states.items()}, "fla.pth")
    assert "are transposed" in ours(Hints(origin="openmose"), "fla.pth").notes[0]
    assert torch.equal(live(), logits) and not torch.equal(live("fla.pth"), logits)
    convert("ours.pth", "again.pth", "rwkv-peft")
    same_tensors("again.pth", "ours.pth")
    convert("ours.pth", "ours.safetensors", "safetensors")
    assert convert("ours.safetensors", "native.pth", "native").source == "safetensors"
    merge_ours()
    assert torch.equal(merged_logits(), logits)


def test_an_adapted_head_and_other_ranks_by_layer():
    base = base_file(7, vocab_size=64)
    torch.manual_seed(6)
    ranks = {"blocks.0.": 8, "blocks.1.": 16, "head": 4}
    tensors = {}
    for name in [*linears_of(7), "head"]:
        r = next(rank for start, rank in ranks.items() if name.startswith(start))
        tensors[f"{name}.bone"] = draw(base[f"{name}.weight"].shape[1] // r, r, r)
    torch.save(tensors, "theirs.pth")
    assert ours().linears == 13
    merged = merge_ours()
    for name in ("blocks.0.ffn.value", "blocks.1.ffn.key", "head"):
        x = draw(5, base[f"{name}.weight"].shape[1], dtype=torch.float64)
        same_layer(
            name,
            merged[f"{name}.weight"],
            x,
            row_forward(x, base[f"{name}.weight"].double(), tensors[f"{name}.bone"].double()),
        )
    close("logits", live(), merged_logits(), 1e-5)
    convert("ours.pth", "again.pth", "rwkv-peft")
    same_tensors("theirs.pth", "again.pth")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_tensors_of_some_layers_and_of_no_part_are_honoured(dtype):
    """RWKV-LM-RLHF trains layer by layer: norms and mixes of one layer, its gate's g1 and g2, block 0's v0,
    which none of our parts has, and a layer's own weights where the profile says full.
    """
    base = base_file(7, dtype, n_layer=3)
    layer = r"blocks\.2\.(att\.(g1|g2|x_r|w0|r_k|key\.weight)|ffn\.key\.weight|ln1\.weight)"
    whole = whole_tensors(base, dtype, layer + r"|blocks\.0\.att\.v0|emb\.weight")
    whole |= {name: 1.1 * base[name] for name in ("blocks.2.ffn.value.weight",)}
    theirs(base, "v1", 7, 8, parts=False)
    torch.save({**read_checkpoint("theirs.pth"), **whole}, "both.pth")
    ours(file="both.pth")
    report = rwkv_miss.merge_file("base.pth", "ours.pth", "merged.pth")
    assert report.replaced == len(whole) == 11
    merged = read_checkpoint("merged.pth")
    assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
    model = RWKV.load("base.pth")
    rwkv_miss.load_adapter(model, "ours.pth")
    parameters = dict(model.named_parameters())
    assert all(
        torch.equal(parameters[name].to(dtype).view_as(tensor), tensor) for name, tensor in whole.items()
    )
    trained = {name for name, p in parameters.items() if p.requires_grad and not name.endswith(".bat")}
    assert trained == whole.keys(), "what the file holds is trained on, and of a part in some layers no more"
    close("logits", live(), merged_logits(), 1e-5 if dtype == torch.float32 else 3e-2)
    assert torch.equal(RWKV.load("base.pth").emb.weight.to(dtype), base["emb.weight"]), (
        "the base's file is as it was"
    )


def test_whole_tensors_do_not_write_into_what_two_models_share():
    base = base_file(7)
    torch.save(
        {"blocks.0.att.key.bone": draw(3, 48), "blocks.1.att.g1": 2 * base["blocks.1.att.g1"]}, "theirs.pth"
    )
    ours()
    with torch.device("meta"):
        models = [RWKV(make_arch(7)) for _ in range(2)]
    for model in models:
        model.load_state_dict(base, assign=True)
    before = base["blocks.1.att.g1"].clone()
    rwkv_miss.load_adapter(models[0], "ours.pth")
    assert torch.equal(models[1].blocks[1].att.g1, before)
    assert torch.equal(models[0].blocks[1].att.g1, 2 * before)


def test_every_name_of_both_versions_is_one_that_may_be_whole():
    for version in (6, 7):
        base = random_tensors(make_arch(version))
        torch.save(
            {"blocks.0.att.key.bone": draw(3, 48)}
            | {name: t for name, t in base.items() if name != "blocks.0.att.key.weight"},
            "theirs.pth",
        )
        ours()
        parts = read_metadata("ours.pth")["train_parts"]
        assert parts == [part for part in PARTS if part != "state"] and in_parts(base, parts)


PROFILE = """Layer,Mode,Rank,Alpha,Dropout,Weight_lr_init
emb,freeze,0,0,0.01,1e-4
0,lora,4,6,0.01,1e-4
1,lora,8,20,0.01,1e-4
head,lora,3,9,0.01,1e-4
"""


def test_a_layer_profile_has_the_alpha_of_each_layer(tmp_path):
    base = base_file(7)
    torch.manual_seed(8)
    wanted = {"blocks.0.": (4, 6), "blocks.1.": (8, 20), "head": (3, 9)}
    factors = {}
    for name in ["head", *linears_of(7)]:
        r = next(rank for start, (rank, _) in wanted.items() if name.startswith(start))
        out, inputs = base[f"{name}.weight"].shape
        factors |= {f"{name}.lora_A": draw(r, inputs), f"{name}.lora_B": draw(out, r)}
    torch.save(factors, "theirs.pth")
    (tmp_path / "profile.csv").write_text(PROFILE)
    refused(r"the ranks differ \(3, 4, 8\), and with them the factors alpha / r; one --alpha", Hints(alpha=6))
    ours(Hints(profile="profile.csv"))
    files = "--base base.pth --adapter theirs.pth --out merged.pth"
    line = ["merge", *files.split()]
    main([*line, "--profile", "profile.csv"])
    options = read_metadata("ours.pth")["options"]
    assert set(options["rank_map"]) == set(options["alpha_map"]) and len(options["rank_map"]) == 7
    merged = read_checkpoint("merged.pth")
    for name in [*linears_of(7), "head"]:
        alpha = next(alpha for start, (_, alpha) in wanted.items() if name.startswith(start))
        x = draw(5, base[f"{name}.weight"].shape[1], dtype=torch.float64)
        A, B = (factors[f"{name}.lora_{side}"].double() for side in "AB")
        same_layer(
            name, merged[f"{name}.weight"], x, lora_forward(x, base[f"{name}.weight"].double(), A, B, alpha)
        )
    close("logits", live(), merged_logits(), 1e-5)


@pytest.mark.parametrize(
    "old, new, words",
    [
        (
            "0,lora,4",
            "0,lora,5",
            "layer 0 has Mode lora, Rank 5 and Alpha 6, and blocks.0.att.key is a LoRA of rank 4; the profile"
            " is of another",
        ),
        ("0,lora", "0,bone", "has Mode bone"),
        ("4,6", "4,x", "has Rank '4' and Alpha 'x', expected numbers"),
        ("4,6", "4,0", "Alpha 0"),
        ("4,6", "4,inf", "Alpha inf"),
        ("0,lora,4,6,0.01,1e-4", "0,lora", "has Rank None"),
        ("0,lora", "7,lora", "has no row for layer 0"),
        ("Alpha", "alpha", "is no layer profile: it has no column Alpha"),
        (PROFILE, "", "has no column Layer"),
        ("emb", "\x00" * (1 << 20), "too many"),
    ],
)
def test_a_profile_of_another_training_is_refused(tmp_path, old, new, words):
    torch.save({"blocks.0.att.key.lora_A": draw(4, 48), "blocks.0.att.key.lora_B": draw(48, 4)}, "theirs.pth")
    (tmp_path / "profile.csv").write_text(PROFILE.replace(old, new))
    refused(words, Hints(profile="profile.csv"))


# without a conversion: the command lines of their merge scripts


@pytest.mark.parametrize(
    "flag, generation",
    [("--lora_checkpoint", "v2"), ("--lora_checkpoint", "v1"), ("--peft_checkpoint", "disha")],
)
def test_the_merge_scripts_command_lines_take_their_own_files(capsys, flag, generation):
    theirs(base_file(6), generation, 6, 8)
    ours()
    merge_ours()
    main(["merge", "--base_model", "base.pth", flag, "theirs.pth", "--output", "direct.pth"])
    same_tensors("direct.pth", "merged.pth")
    method = GENERATIONS[generation][3][0]
    assert f"note: theirs.pth is read as rwkv-peft: {method}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, hints",
    [(["--lora_alpha", "12"], {"alpha": 12}), (["--lora_init", "init.pth"], {"init": "init.pth"})],
)
def test_what_their_merge_of_lora_and_pissa_is_told_ours_is_told(tmp_path, flags, hints, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_file(7)
    torch.save(A | B, "theirs.pth")
    torch.save(
        {name.replace("lora_", "init_lora_"): 2 * tensor for name, tensor in (A | B).items()}, "init.pth"
    )
    ours(Hints(**hints))
    merge_ours()
    line = ["merge", "--base_model", "base.pth", "--lora_checkpoint", "theirs.pth", "--output", "direct.pth"]
    main([*line, *flags])
    same_tensors("direct.pth", "merged.pth")
    with pytest.raises(SystemExit):
        main(line)


def test_a_merge_asks_where_a_file_is_of_two_origins(tmp_path, capsys):
    theirs(base_file(7), "v1", 7, 8, names=SQUARE)
    line = "merge --base base.pth --adapter theirs.pth --out out.pth".split()
    with pytest.raises(SystemExit):
        main(line)
    assert "could be of two origins" in capsys.readouterr().err and not (tmp_path / "out.pth").exists()
    main([*line, "--origin", "bone-v0", "--json"])
    ours(Hints(origin="bone-v0"))
    merge_ours()
    same_tensors("out.pth", "merged.pth")
    undo = "unmerge out.pth --base base.pth --adapter theirs.pth".split()
    main([*undo, "--origin", "bone-v0"])
    with pytest.raises(SystemExit):
        main([*undo, "--origin", "rwkv-peft"])


def test_a_whole_tensor_that_the_base_lacks_is_of_another_base(tmp_path):
    base_file(7)
    torch.save(
        {"blocks.0.att.key.bone": draw(3, 48), "blocks.0.att.time_maa_x": draw(1, 1, 48)}, "theirs.pth"
    )
    ours()
    for file in ("theirs.pth", "ours.pth"):
        with pytest.raises(
            rwkv_miss.UserError, match="holds blocks.0.att.time_maa_x, which this model does not have"
        ):
            rwkv_miss.merge_file("base.pth", file, "merged.pth")
    with pytest.raises(
        rwkv_miss.UserError, match="holds blocks.0.att.time_maa_x, which this model does not have"
    ):
        live()
    assert not (tmp_path / "merged.pth").exists()


def test_inspect_says_what_a_file_of_theirs_is_and_what_it_leaves_open(capsys):
    theirs(base_file(7), "disha", 7, 13)
    facts = describe("theirs.pth")
    assert (facts["kind"], facts["arch"], facts["metadata"]["format"]) == ("adapter", None, "rwkv-peft")
    assert facts["metadata"]["method"] == "miss" and facts["metadata"]["options"]["rank"] == 13
    main(["inspect", "theirs.pth"])
    assert re.search(r"theirs.pth: adapter, .*format +rwkv-peft.*method +miss", capsys.readouterr().out, re.S)
    torch.save(A | B, "lora.pth")
    main(["inspect", "lora.pth"])
    assert re.search(r"open +.*does not hold LoRA's alpha", capsys.readouterr().out)
    for to in ("peft", "safetensors"):
        convert("theirs.pth", to, to)
        facts = describe(to)
        assert facts["kind"] == "adapter" and facts["metadata"]["method"] == "miss" and facts["bytes"] > 1000


@pytest.mark.parametrize(
    "command",
    ["inspect pipe", "convert pipe OUT --to native", "merge --base base.pth --out OUT --adapter pipe"],
)
def test_a_pipe_is_not_waited_for(tmp_path, command, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base_file(7)
    os.mkfifo("pipe")
    with pytest.raises(SystemExit):
        main(command.split())
    assert "pipe is no regular file" in capsys.readouterr().err
