"""Adapters of HF peft on the models of its own tests: converted and loaded, each answers as it does there.

Names and settings of CASES are those of peft's tests/test_custom_models.py (peft 0.21). Convolutions have no
form here.
"""

import copy
import json
import pathlib

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.convert import Hints, convert

from .conftest import close
from .test_adapters import filled
from .test_merge_folders import SIZES, outputs

peft = pytest.importorskip("peft", reason="the test extra is absent: pip install peft")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.lin1 = nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x.float()).relu()).log_softmax(-1)


class Affine(nn.Module):
    """A linear without the class: its weight is a parameter that it reads."""

    def __init__(self, width, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width) / 3)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class MlpUsingParameters(Mlp):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = Affine(10, 20), Affine(20, 2)


class EmbConv1D(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = Conv1D(1, 5)
        self.lin0 = nn.Linear(10, 2)
        nn.init.normal_(self.conv1d.weight)

    def forward(self, x):
        return self.lin0(self.conv1d(self.emb(x)).relu().flatten(1)).log_softmax(-1)


class Mha(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x):
        x = x.float()
        return self.lin0(self.mha(x, x, x)[0]).log_softmax(-1)


class Experts(nn.Module):
    """Two stacks of a weight for each expert, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 12, 10) / 3)
        self.down = nn.Parameter(torch.randn(3, 10, 12) / 3)

    def forward(self, x):
        up = torch.einsum("bi,eoi->ebo", x.float(), self.gate_up).relu()
        return torch.einsum("ebi,eoi->bo", up, self.down)


class Moe(nn.Module):
    """Experts and nothing else, which is not one of peft's cases."""

    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


ONE, TWO, CONV = {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}, ["conv1d"]
LAST, TEXT, SAVED = {"target_modules": ["lin1"]}, {"target_modules": "lin0"}, {"modules_to_save": ["lin1"]}
TRAINED_TOKENS = {"trainable_token_indices": {"emb": [0, 10]}}


def lora(name):
    """A setting that has a class of its own in peft."""
    return {
        "kasa": lambda: {"kasa_config": peft.KasaConfig(), "r": 4},
        "random": lambda: {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
        "average": lambda: {"velora_config": peft.VeloraConfig(num_groups=2, init_type="batch_average")},
        "once": lambda: {"velora_config": peft.VeloraConfig(num_groups=2, init_type="batch_average_once")},
        "monte": lambda: {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
        "a": lambda: blocks(target_modules_bd_a=["lin0"], match_strict=False),
        "b": lambda: blocks(target_modules_bd_b=["lin1"], nblocks=2, match_strict=False),
        "both": lambda: blocks(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
    }[name]()


def blocks(**settings):
    from peft.tuners.lora.config import BdLoraConfig

    return {"use_bdlora": BdLoraConfig(**settings)}


# (name, model, configuration, settings); a text among the settings is one of lora()
CASES = [
    ("Vanilla MLP 1 LoRA", Mlp, "Lora", TEXT),
    ("Vanilla MLP 2 LoRA", Mlp, "Lora", ONE),
    ("Vanilla MLP 3 LoRA", Mlp, "Lora", LAST),
    ("Vanilla MLP 4 LoRA", Mlp, "Lora", TWO),
    ("Vanilla MLP 5 LoRA", Mlp, "Lora", {**ONE, **SAVED}),
    ("Vanilla MLP 6 LoRA", Mlp, "Lora", {**ONE, "lora_alpha": 4, "lora_dropout": 0.1}),
    ("Vanilla MLP 7 LoRA with DoRA", Mlp, "Lora", {**ONE, "use_dora": True}),
    ("Vanilla MLP 8 LoRA with DoRA", Mlp, "Lora", {**TWO, "use_dora": True}),
    ("Vanilla MLP 1 LoRA with KaSA", Mlp, "Lora", {**ONE, "": "kasa"}),
    ("Vanilla MLP 1 LoRA with MiCA", Mlp, "Lora", {**ONE, "init_lora_weights": "mica", "r": 4}),
    ("Vanilla MLP 9 LoRA with DoRA", Mlp, "Lora", {**LAST, "use_dora": True, "lora_alpha": 32}),
    ("Vanilla MLP 10 LoRA with VeLoRA random", Mlp, "Lora", {**ONE, "": "random"}),
    ("Vanilla MLP 11 LoRA with VeLoRA batch_average", Mlp, "Lora", {**TWO, "": "average"}),
    ("Vanilla MLP 12 LoRA with VeLoRA batch_average_once", Mlp, "Lora", {**ONE, "": "once"}),
    ("Embedding + transformers Conv1D 1 LoRA", EmbConv1D, "Lora", {"target_modules": CONV}),
    ("Embedding + transformers Conv1D 2 LoRA", EmbConv1D, "Lora", {"target_modules": ["emb"]}),
    ("Embedding + transformers Conv1D 3 LoRA", EmbConv1D, "Lora", {"target_modules": ["emb", *CONV]}),
    ("Embedding + transformers Conv1D 1 DoRA", EmbConv1D, "Lora", {"target_modules": CONV, "use_dora": True}),
    (
        "Embedding + transformers Conv1D 2 DoRA",
        EmbConv1D,
        "Lora",
        {"target_modules": ["emb"], "use_dora": True},
    ),
    (
        "Embedding + transformers Conv1D 3 DoRA",
        EmbConv1D,
        "Lora",
        {"target_modules": ["emb", *CONV], "use_dora": True},
    ),
    (
        "Embedding + transformers Conv1D 1 LoRA trainable_tokens",
        EmbConv1D,
        "Lora",
        {"target_modules": CONV, **TRAINED_TOKENS},
    ),
    ("Vanilla MLP 1 LoRA with lora_b bias", Mlp, "Lora", {**TWO, "lora_bias": True, "lora_alpha": 32}),
    ("MHA 1 LoRA", Mha, "Lora", {"target_modules": ["mha"]}),
    ("MHA 2 LoRA", Mha, "Lora", {"target_modules": ["mha", "lin0"]}),
    (
        "MLP 1 using nn.Parameter LoRA",
        MlpUsingParameters,
        "Lora",
        {"target_modules": [], "target_parameters": ["lin0.weight"]},
    ),
    ("MLP 2 using nn.Parameter LoRA", Mlp, "Lora", {**ONE, "target_parameters": ["lin1.weight"]}),
    ("Vanilla MLP 1 LoRA with Monteclora", Mlp, "Lora", {**ONE, "": "monte"}),
    ("BD-LoRA A only", Mlp, "Lora", {**TWO, "": "a"}),
    ("BD-LoRA B only", Mlp, "Lora", {**TWO, "": "b"}),
    ("BD-LoRA both A and B", Mlp, "Lora", {**TWO, "": "both"}),
    ("experts", Moe, "Lora", {"target_modules": [], "target_parameters": ["down", "gate_up"], "r": 2}),
    ("Vanilla MLP 1 MiSS", Mlp, "Miss", {**TEXT, "r": 2}),
    ("Vanilla MLP 2 MiSS", Mlp, "Miss", {**ONE, "r": 2}),
    ("Vanilla MLP 3 MiSS", Mlp, "Miss", {**TWO, "r": 2}),
    ("Vanilla MLP 5 MiSS", Mlp, "Miss", {**ONE, **SAVED, "r": 2}),
    ("Vanilla MLP 1 MiSS with bat", Mlp, "Miss", {**TEXT, "r": 2, "init_weights": "bat"}),
    ("Vanilla MLP 2 MiSS with bat", Mlp, "Miss", {**ONE, "r": 2, "init_weights": "bat"}),
    ("Vanilla MLP 3 MiSS with bat", Mlp, "Miss", {**TWO, "r": 2, "init_weights": "bat"}),
    ("Vanilla MLP 5 MiSS with bat", Mlp, "Miss", {**ONE, **SAVED, "r": 2, "init_weights": "bat"}),
    ("Vanilla MLP 1 VeRA", Mlp, "Vera", TEXT),
    ("Vanilla MLP 2 VeRA", Mlp, "Vera", ONE),
    ("Vanilla MLP 3 VeRA", Mlp, "Vera", LAST),
    ("Vanilla MLP 4 VeRA", Mlp, "Vera", TWO),
    ("Vanilla MLP 5 VeRA", Mlp, "Vera", {**ONE, **SAVED}),
    ("Embedding + transformers Conv1D 1 VeRA", EmbConv1D, "Vera", {"target_modules": CONV}),
    (
        "Vanilla MLP 1 AdaLoRA",
        Mlp,
        "AdaLora",
        {**ONE, "init_lora_weights": False, "total_step": 1, "orth_reg_weight": 0},
    ),
    ("Vanilla MLP 2 AdaLoRA", Mlp, "AdaLora", {**TWO, "init_lora_weights": False, "total_step": 1}),
]


def answers(model, inputs):
    with torch.no_grad():
        return model.eval()(inputs)


@pytest.mark.parametrize("name,make,kind,settings", CASES, ids=[case[0] for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_case_of_peft_answers_alike(name, make, kind, settings, tmp_path):
    torch.manual_seed(0)
    base = make()
    inputs = torch.arange(90).view(9, 10)
    inputs = inputs if make is EmbConv1D else inputs / 90
    settings = {**settings, **lora(settings[""])} if "" in settings else dict(settings)
    settings.pop("", None)
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, f"{kind}Config")(**settings))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    want = answers(theirs, inputs)
    theirs.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "a.pth", "native", Hints(base=written(base, tmp_path)))
    model = copy.deepcopy(base)
    rwkv_miss.load_adapter(model, tmp_path / "a.pth")
    assert adapted_linears(model)
    assert (want - answers(base, inputs)).abs().max() > 1e-3
    close(name, answers(model, inputs), want, 1e-5)
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    plain = copy.deepcopy(base)
    plain.load_state_dict(rwkv_miss.read_checkpoint(tmp_path / "merged.pth"))
    close(f"{name}, merged", answers(plain, inputs), want, 1e-5)


@pytest.mark.parametrize("kind,options", [("lora", {}), ("dora", {}), ("miss", {}), ("vera", {})])
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_what_was_trained_here(kind, options, tmp_path):
    torch.manual_seed(0)
    base, ids = EmbConv1D(), torch.arange(90).view(9, 10)
    model = copy.deepcopy(base)
    targets = ["conv1d"] if kind == "vera" else ["emb", "conv1d"]
    rwkv_miss.inject(model, kind, targets=targets, rank=3, **options)
    filled(model)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    if kind == "miss":
        with pytest.raises(rwkv_miss.UserError, match="peft's MISS adapts linears alone, and emb is none"):
            convert(tmp_path / "a.pth", tmp_path / "peft", "peft")
    to = "lora" if kind == "miss" else "peft"
    convert(tmp_path / "a.pth", tmp_path / "peft", to, Hints(base=written(base, tmp_path)))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    close("peft", answers(theirs, ids), answers(model, ids), 1e-5)
    for to in ("rwkv-peft", "rwkv-lightning"):
        with pytest.raises(rwkv_miss.UserError, match=f"is no linear of RWKV, which --to {to} has no"):
            convert(tmp_path / "a.pth", tmp_path / "other", to)


@pytest.mark.parametrize("kind", ["lora", "miss"])
@pytest.mark.filterwarnings("ignore")
def test_peft_loads_experts_that_were_trained_here(kind, tmp_path):
    torch.manual_seed(0)
    base, x = Moe(), torch.randn(9, 10)
    model = copy.deepcopy(base)
    rwkv_miss.inject(model, kind, targets=["gate_up", "down"], rank=3)
    filled(model)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "peft", "lora", Hints(base=written(base, tmp_path)))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    close("peft", answers(theirs, x), answers(model, x), 1e-5)
    rwkv_miss.inject(few := copy.deepcopy(base), "lora", targets=["experts.adapted.down.1"], rank=3)
    rwkv_miss.save_adapter(few, tmp_path / "few.pth")
    with pytest.raises(rwkv_miss.UserError, match="without dropout, for all of experts.down; merge"):
        convert(tmp_path / "few.pth", tmp_path / "other", "lora")


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name -> (kind, settings of the model, settings of peft, why it needs the base)
FOLDERS = {
    "experts that the folder has one by one": (
        "Mixtral",
        {"num_local_experts": 3, "num_key_value_heads": 2},
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "the order of the parameters needs the base",
    ),
    "an embedding whose weight peft has saved": (
        "Llama",
        {"num_key_value_heads": 2},
        {"target_modules": ["embed_tokens", "q_proj"]},
        r"holds model.embed_tokens.weight, .* --base MODEL; or save .*save_embedding_layers=False",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_peft_next_to_its_models_folder(name, tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    kind, sizes, settings, why = FOLDERS[name]
    torch.manual_seed(0)
    load = getattr(transformers, f"{kind}ForCausalLM")
    load(getattr(transformers, f"{kind}Config")(**SIZES, **sizes)).save_pretrained("base")
    theirs = peft.get_peft_model(load.from_pretrained("base"), peft.LoraConfig(r=4, **settings))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        want = outputs(theirs)
        before = outputs(load.from_pretrained("base"))
    assert (want - before).abs().max() > 0.01
    theirs.save_pretrained("peft")
    with pytest.raises(rwkv_miss.UserError, match=why):
        convert("peft", "a.pth", "native")
    convert("peft", "a.pth", "native", Hints(base="base"))
    convert("a.pth", "back", "lora", Hints(base="base"))
    rwkv_miss.merge_file("base", "peft", "merged")
    rwkv_miss.load_adapter(model := load.from_pretrained("base"), "a.pth")
    back = peft.PeftModel.from_pretrained(load.from_pretrained("base"), "back")
    with torch.no_grad():
        for way in (model, back, load.from_pretrained("merged")):
            close(name, outputs(way), want, 1e-5)
    if kind == "Llama":
        load(getattr(transformers, f"{kind}Config")(**SIZES, **sizes)).save_pretrained("other")
        with pytest.raises(rwkv_miss.UserError, match="embed_tokens.weight, .* --base other has another one"):
            convert("peft", "b.pth", "native", Hints(base="other"))
        config = pathlib.Path("base/config.json")
        config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
        with pytest.raises(rwkv_miss.UserError, match="one weight for it and the head"):
            rwkv_miss.merge_file("base", "peft", "tied")


def test_a_miss_of_a_llama_becomes_a_lora_with_its_folder(tmp_path):
    import transformers

    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    rwkv_miss.inject(model := copy.deepcopy(base), "miss", targets=["q_proj"], rank=4)
    filled(model)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    with pytest.raises(rwkv_miss.UserError, match="the base's file or folder: --base MODEL"):
        convert(tmp_path / "a.pth", tmp_path / "lora", "lora")
    convert(tmp_path / "a.pth", tmp_path / "lora", "lora", Hints(base=str(tmp_path / "base")))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    with torch.no_grad():
        close("lora", outputs(theirs), outputs(model), 1e-5)


def written(base, folder):
    rwkv_miss.write_checkpoint(folder / "base.pth", base.state_dict().items())
    return str(folder / "base.pth")
