"""Adapters in some layers: nothing else is trained, nothing below keeps anything, and every file knows it."""

from types import SimpleNamespace

import pytest
import torch

import rwkv_miss
from rwkv_miss.adapter import METHODS
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.files.checkpoint import write_checkpoint
from rwkv_miss.merging.merge import merge_file
from src.config import parse
from src.inference.load import load
from src.model import RWKV
from src.model.batch_loss import Chunks
from src.reporting.plan_text import advice

from .conftest import close, make_arch, random_tensors, settled_config
from .loss_cases import ROWS, make_batch, make_model
from .test_batch_loss import results

CASES = [(method, "") for method in sorted(METHODS)] + [("miss", "ln,time,head,state")]
SIZES = {"n_layer": 3, "vocab_size": 256}


def base_model(version=7):
    model = RWKV(make_arch(version, **SIZES))
    model.load_state_dict(random_tensors(model.arch))
    return model


def adapted(method, parts, layers, version=7):
    """A model whose adapter is not zero."""
    model = base_model(version)
    options = {} if method == "state" else {"rank": 6}
    rwkv_miss.inject(model, method, train_parts=parts, layers=layers, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape)
    return model


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method, parts", CASES)
def test_the_file_of_some_layers_loads_and_merges_to_the_same_logits(tmp_path, method, parts):
    model = adapted(method, parts, "last:1")
    write_checkpoint(tmp_path / "base.pth", random_tensors(model.arch).items())
    numbers = {name.split(".")[1] for name in trained(model) if name.startswith("blocks.")}
    outside = {name for name in trained(model) if not name.startswith("blocks.")}
    assert numbers == {"2"} and outside == (
        {"head.weight", "ln_out.weight", "ln_out.bias"} if parts else set()
    )
    assert model.first_trained() == 2

    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    assert rwkv_miss.read_metadata(tmp_path / "a.pth")["layers"] == [2]
    tensors = rwkv_miss.read_checkpoint(tmp_path / "a.pth")
    states = [f"blocks.{i}.att.time_state" for i in range(3) if method == "state" or "state" in parts]
    assert tensors.keys() >= {*states} and not any(tensors[name].any() for name in states[:2])
    others = tensors.keys() - {*states[:2]}
    assert {name.split(".")[1] for name in others if name.startswith("blocks.")} == {"2"}
    again = base_model()
    rwkv_miss.load_adapter(again, tmp_path / "a.pth")
    assert trained(again) == trained(model) and adapter_tensors(again).keys() == adapter_tensors(model).keys()
    merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        want = model(ids)[0]
        assert not torch.equal(want, base_model()(ids)[0])
        close("loaded", again(ids)[0], want, 1e-6)
        close("merged", RWKV.load(tmp_path / "merged.pth")(ids)[0], want, 1e-5)
        if not parts:
            chat, _ = load(tmp_path / "base.pth", tmp_path / "a.pth", tokenizer="bytes")
            close("in a chat", chat(ids)[0], want, 1e-5)


@pytest.mark.parametrize(
    "version, method, grad_cp", [(7, "miss", 0), (6, "lora", 1), (7, "miss", 2), (7, "state", 0)]
)
def test_no_layer_below_has_a_backward_and_the_gradients_are_the_same(version, method, grad_cp):
    model = adapted(method, "", "last:1", version).double()
    reached = []

    def look(block, given, out):
        if out[0].requires_grad:
            reached.append(list(model.blocks).index(block))

    for block in model.blocks:
        block.register_forward_hook(look)
    batch = make_batch(ROWS)
    want = results(model, batch, Chunks())
    everywhere = adapted(method, "", None, version).double()
    everywhere.load_state_dict(model.state_dict(), strict=False)
    for name, p in everywhere.named_parameters():
        if p.requires_grad and name not in want[1]:
            p.data.zero_()
    loss, gradients = results(everywhere, batch, Chunks())
    model.grad_cp = grad_cp
    for chunks in (Chunks(), Chunks(8), Chunks(8, sparse=True)):
        got = results(model, batch, chunks)
        close("loss", got[0], loss, 1e-12)
        for name, gradient in got[1].items():
            close(name, gradient, gradients[name], 1e-10)
    assert set(reached) == {2}, "no layer below is in a graph, not by the states between chunks either"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--layers last:0", r"layers 'last:0': expected last:1 to last:3, as there are 3 layers to adapt"),
        ("--layers first:4", r"layers 'first:4': expected first:1 to first:3, as there are 3"),
        ("--layers 1-3", r"layers '1-3': there is no layer 3 to adapt; there are 0-2, counted from 0"),
        ("--layers 1-99999999999", r"there is no layer 3 to adapt"),
        ("--layers 9-99999999999", r"there is no layer 9 to adapt"),
        ("--layers 2-1", r"layers '2-1': expected last:K or first:K with K from 1 to 3, numbers such as"),
        ("--layers top", r"layers 'top': expected last:K"),
        ("--layers last:2 --train_parts emb", r"part 'emb' lies below layer 1, the lowest of `layers`"),
        ("--layers last:4 --peft state", r"layers 'last:4': expected last:1 to last:3"),
    ],
)
def test_layers_that_are_not_there_are_named_with_the_bounds(tmp_path, flags, words):
    from src.planning.base_model import read_base
    from src.planning.draft import Draft

    write_checkpoint(tmp_path / "base.pth", random_tensors(make_arch(7, **SIZES)).items())
    command = f"--load_model {tmp_path}/base.pth --data_file x --tokenizer bytes {flags}"
    draft = Draft(parse(command.split()))
    with pytest.raises(rwkv_miss.UserError, match=words):
        read_base(draft)


def test_full_training_has_no_layers():
    with pytest.raises(rwkv_miss.UserError, match="--layers last:2 has no meaning with --peft none"):
        parse("--load_model x --data_file x --peft none --layers last:2".split())


def test_text_of_layers_is_read_back():
    from rwkv_miss.targets import layer_numbers, layers_text

    for numbers, text in (([0], "0"), ([0, 3, 4, 5, 11], "0,3-5,11"), ([6, 7], "6-7")):
        assert layers_text(numbers) == text and layer_numbers(text, range(12)) == set(numbers)


def test_a_cpu_that_takes_more_than_an_hour_gets_advice():
    """By the matrix products of 12 x 768 with World's vocabulary and all tokens trained."""
    run = SimpleNamespace(
        settings=settled_config(),
        arch=make_arch(7, n_layer=12, n_embd=768, vocab_size=65536),
        device=SimpleNamespace(accelerator="cpu"),
        schedule=SimpleNamespace(targets=[8], lengths=[8]),
    )
    (said,) = advice(run, SimpleNamespace(seconds=4000))
    assert "--layers last:6 takes about 0.84 of the time, with --layers last:3 takes about 0.76" in said
    assert not advice(run, SimpleNamespace(seconds=3000))
    for other in ({"layers": "last:6"}, {"peft": "none"}):
        run.settings = settled_config(**other)
        assert not advice(run, SimpleNamespace(seconds=4000))


def test_the_gate_of_the_value_residual_learns_alone():
    """The recurrence keeps what its backward reads, although nothing else is trained."""
    gradients = []
    for kernel in ("cpu", "torch"):
        model = make_model(7, torch.float32, peft=False).requires_grad_(False)
        model.set_kernel(kernel)
        gate = model.blocks[1].att.v0.requires_grad_()
        logits, _ = model(torch.arange(9).view(1, -1))
        gradients.append(torch.autograd.grad(logits.square().sum(), gate)[0])
    close("v0", *gradients, 1e-5)
