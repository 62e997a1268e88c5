"""Adapters on models that are no RWKV: small random ones of `transformers`, against Hugging Face peft on the
same weights.
"""

import copy
import importlib.util

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import METHODS as REGISTERED
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.convert import Hints, convert

from .conftest import close

needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="the test extra is absent: pip install transformers"
)
pytestmark = needs_transformers


def new(kind, task, **sizes):
    """A model of transformers, which is imported here: that takes seconds, also where tests are collected."""
    import transformers

    return getattr(transformers, f"{kind}For{task}")(getattr(transformers, f"{kind}Config")(**sizes))


SIZES = dict(vocab_size=61, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=6)
SIZES |= dict(max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 10}  # heads that together are wider than the model
# name -> (model, targets). Leaf names, suffixes and whole names
MODELS = {
    "llama": (
        lambda: new("Llama", "CausalLM", **GROUPED, attention_bias=True),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "mistral": (
        lambda: new("Mistral", "CausalLM", **GROUPED, sliding_window=5),
        ["self_attn.q_proj", "self_attn.v_proj", "model.layers.1.mlp.down_proj"],
    ),
    "qwen3": (lambda: new("Qwen3", "CausalLM", **GROUPED), ["q_proj", "o_proj", "down_proj", "lm_head"]),
    "roberta": (
        lambda: new("Roberta", "SequenceClassification", **SIZES, num_labels=3, **NO_DROPOUT),
        ["query", "key", "value", "dense"],
    ),
}
# our tensors -> peft's
METHODS = {"miss": {"miss": "miss_block"}, "lora": {"lora_A": "lora_A", "lora_B": "lora_B"}}
RANK = 7  # divides none of the widths
LINEAR = [name for name, method in REGISTERED.items() if method.adapts_linears]


def make(name):
    """The model, its matrices large enough for every part to show in the logits, which HF's own (std 0.02)
    are not.
    """
    torch.manual_seed(0)
    model = MODELS[name][0]().train()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in key:
                p.normal_(std=p.shape[1] ** -0.5)
    return model


def batch(name):
    """Token ids and labels: the next tokens, or a class of each row."""
    ids = torch.randint(2, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": torch.tensor([0, 2, 1]) if name == "roberta" else ids}


def inject(name, model, method, **options):
    return rwkv_miss.inject(model, method, targets=MODELS[name][1], rank=RANK, **options)


def fill(model):
    with torch.no_grad():
        for p in adapter_tensors(model).values():
            p.normal_(std=0.1)


@pytest.mark.parametrize(
    "dtype,tolerance",
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),  # the order of the sums differs; 2e-6 was the largest difference seen
    ],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_hf_peft(name, method, dtype, tolerance):
    peft = pytest.importorskip("peft")
    ours = make(name).to(dtype)
    base = copy.deepcopy(ours)
    inject(name, ours, method, **({"alpha": 3.0 * RANK} if method == "lora" else {}))
    fill(ours)
    ours.to(dtype)
    kinds = {
        "miss": lambda **o: peft.MissConfig(**o),
        "lora": lambda **o: peft.LoraConfig(lora_alpha=3 * RANK, **o),
    }
    theirs = (
        peft.get_peft_model(base, kinds[method](r=RANK, target_modules=list(adapted_linears(ours))))
        .to(dtype)
        .train()
    )

    pairs = {}
    for linear, layer in adapted_linears(ours).items():
        for mine, other in METHODS[method].items():
            tensor = getattr(theirs.base_model.model.get_submodule(linear), other)["default"]
            pairs[f"{linear}.{mine}"] = (
                getattr(layer, mine),
                tensor.weight if isinstance(tensor, nn.Module) else tensor,
            )
    assert len(pairs) == len(METHODS[method]) * len(adapted_linears(ours)) == len(adapter_tensors(ours))
    with torch.no_grad():
        for mine, other in pairs.values():
            assert mine.shape == other.shape
            other.copy_(mine)

    # a gradient of the embedding goes through every layer
    for model in (ours, theirs):
        model.get_input_embeddings().weight.requires_grad_(True)
    got, want = ours(**batch(name)), theirs(**batch(name))
    close("logits", got.logits, want.logits, tolerance)
    got.loss.backward()
    want.loss.backward()
    pairs["embeddings"] = ours.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    for key, (mine, other) in pairs.items():
        close(f"gradient of {key}", mine.grad, other.grad, tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_trains_loads_and_merges(name, method, tmp_path):
    model = make(name)
    base = copy.deepcopy(model)
    report = inject(name, model, method)
    with torch.no_grad():
        assert torch.equal(model(**batch(name)).logits, base(**batch(name)).logits), (
            "a fresh adapter changes nothing"
        )
    assert report.trainable == sum(t.numel() for t in adapter_tensors(model).values())
    losses = train(model, batch(name), steps=12)
    assert losses[-1] < 0.8 * losses[0], losses
    frozen = {key: tensor for key, tensor in model.state_dict().items() if key not in adapter_tensors(model)}
    assert frozen.keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, frozen[key]) for key, tensor in base.state_dict().items())

    loaded, plain = loaded_and_merged(model, base, tmp_path)
    with torch.no_grad():
        trained = model(**batch(name)).logits
        assert torch.equal(loaded(**batch(name)).logits, trained)
        # W + dW is rounded once, to 24 bits
        close("merged logits", plain(**batch(name)).logits, trained, 1e-5)
    for linear, layer in adapted_linears(model).items():
        close(
            linear, plain.get_submodule(linear).weight.detach(), (layer.weight + layer.delta()).detach(), 1e-6
        )


@pytest.mark.parametrize("method", LINEAR)
def test_every_method_trains_loads_and_merges_on_linears_of_many_shapes(method, tmp_path):
    model = make("llama")
    base = copy.deepcopy(model)
    # which divides the widths, as Bat needs it
    rwkv_miss.inject(model, method, targets=MODELS["llama"][1], rank=2)
    with torch.no_grad():
        close(
            "a fresh adapter changes nothing",
            model(**batch("llama")).logits,
            base(**batch("llama")).logits,
            1e-5,
        )
    train(model, batch("llama"), steps=3)
    loaded, plain = loaded_and_merged(model, base, tmp_path)
    with torch.no_grad():
        trained = model(**batch("llama")).logits
        assert (trained - base(**batch("llama")).logits).abs().max() > 1e-4
        close("loaded", loaded(**batch("llama")).logits, trained, 1e-5)
        close("merged", plain(**batch("llama")).logits, trained, 1e-5)


def loaded_and_merged(model, base, folder):
    """Copies of the base: with the model's adapter out of its file, and with the tensors of the merged file,
    which are the base's by name.
    """
    adapter, unmerged, merged = (folder / f"{name}.pth" for name in ("adapter", "base", "merged"))
    rwkv_miss.save_adapter(model, adapter)
    rwkv_miss.write_checkpoint(unmerged, base.state_dict().items())
    rwkv_miss.merge_file(unmerged, adapter, merged)
    loaded, plain = copy.deepcopy(base), copy.deepcopy(base)
    rwkv_miss.load_adapter(loaded, adapter)
    tensors = torch.load(merged, weights_only=True)
    assert list(tensors) == list(base.state_dict())
    plain.load_state_dict(tensors, strict=True)
    return loaded, plain


def train(model, inputs, steps):
    """The loss before each step of Adam on one batch."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_classifier_is_trained_saved_and_merged_with_the_adapter(tmp_path):
    model = make("roberta")
    base = copy.deepcopy(model)
    rwkv_miss.inject(model, "miss", targets=["query", "value"], rank=RANK)
    model.classifier.requires_grad_(True)
    train(model, batch("roberta"), steps=3)
    assert not torch.equal(model.classifier.out_proj.bias, base.classifier.out_proj.bias)
    loaded, plain = loaded_and_merged(model, base, tmp_path)
    with torch.no_grad():
        want = model(**batch("roberta")).logits
        assert torch.equal(loaded(**batch("roberta")).logits, want)
        close("merged logits", plain(**batch("roberta")).logits, want, 1e-5)


@pytest.mark.parametrize("file", ["a.pth", "a.safetensors"])
def test_a_file_names_its_base_refuses_another_one_and_becomes_a_folder_that_peft_loads_alone(
    file, tmp_path, in_its_folder
):
    peft = pytest.importorskip("peft", reason="the test extra is absent: pip install peft")
    make("llama").save_pretrained("base")
    new("Llama", "CausalLM", **GROUPED, attention_bias=True).save_pretrained("other")
    read = MODELS["llama"][0]().from_pretrained
    model, inputs = read("base"), batch("llama")
    inject("llama", model, "miss")
    fill(model)
    rwkv_miss.save_adapter(model, file, step=3)
    loaded = read("base")
    assert rwkv_miss.load_adapter(loaded, file)["step"] == 3
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    rwkv_miss.load_adapter(read("base", dtype=torch.bfloat16), file)
    refused = pytest.raises(rwkv_miss.UserError, match=r"was trained on another base \(base\), not on other")
    with refused:
        rwkv_miss.load_adapter(read("other"), file)
    rwkv_miss.load_adapter(read("other"), file, force=True)
    with refused:
        rwkv_miss.merge_file("other", file, "merged")
    convert(file, "theirs", "peft")
    with refused:
        convert(file, "none", "peft", Hints(base="other"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained("theirs")
    close(file, theirs(**inputs).logits, model(**inputs).logits, 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["base", "other", file, "theirs"])


def message(model, **options):
    with pytest.raises(rwkv_miss.UserError) as error:
        rwkv_miss.inject(model, rank=RANK, **options)
    return str(error.value)


@pytest.mark.parametrize(
    "name,leaves",
    [
        ("llama", "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"),
        (
            "roberta",
            "dense, key, out_proj, query, value",
        ),  # which has a key and a value, half of its attention
    ],
)
def test_a_model_that_is_no_rwkv_needs_targets_and_the_error_lists_them(name, leaves):
    assert leaves in message(make(name)) and "no RWKV model" in message(make(name))
    assert leaves in message(make(name), targets=["att.key"])
    assert leaves in message(make(name), targets=[])


def test_a_tied_head_is_refused_and_the_model_left_as_it_was():
    model = new("Llama", "CausalLM", **GROUPED, tie_word_embeddings=True)
    error = message(model, targets=["q_proj", "lm_head"])
    assert "lm_head" in error and "model.embed_tokens.weight" in error and "untie" in error
    assert all(p.requires_grad for p in model.parameters()) and not adapted_linears(model)
    rwkv_miss.inject(model, targets=["q_proj"], rank=RANK)
