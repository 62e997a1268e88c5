"""State tuning: what every document starts from, in packed rows, in chunks and one token at a time, here and
in the package rwkv.
"""

import re
import string

import numpy as np
import pytest
import torch

import rwkv_miss
from demo import chat
from rwkv_miss.__main__ import describe
from src.common.batch import Batch
from src.common.token_loss import loss_sum
from src.data.collate import trained_tokens
from src.inference.conversation import Conversation
from src.inference.load import load
from src.inference.sampling import GREEDY
from src.model import RWKV
from src.model.batch_loss import Chunks
from src.ops import wkv6, wkv7
from src.ops.per_document import layout
from src.training.optimizer import parameter_groups

from . import program
from .answering import engine_of
from .conftest import close, make_arch, pypi_rwkv, random_tensors, save_base, slow, write_rows
from .tables import talk

# documents of 1 to 41 tokens; the second row goes on from before and is one document
RESETS = torch.zeros(3, 41, dtype=torch.bool)
RESETS[0, [0, 1, 2, 19, 38]] = True
RESETS[2, [17, 40]] = True


def tuned(version, train_parts=None, path=None, **sizes):
    """A float64 or file's model with a state of values as large as those that a document leaves."""
    if path is None:
        model = RWKV(make_arch(version, **sizes))
        model.load_state_dict(random_tensors(model.arch))
    else:
        model = RWKV.load(path)
    rwkv_miss.inject(
        model,
        *(["state"] if train_parts is None else ["miss", None, train_parts]),
        **({} if train_parts is None else {"rank": 5}),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * (
                    1.0 if name.endswith("time_state") else 0.05
                )
    return model if path else model.double()


# the operators


def inputs(version, B, T, H=2, N=8, dtype=torch.float64):
    torch.manual_seed(version)
    x = {name: torch.randn(B, T, H, N, dtype=dtype) for name in ("r", "k", "v", "w")}
    if version == 6:
        return {**x, "u": torch.randn(H, N, dtype=dtype)}
    kappa = torch.nn.functional.normalize(torch.randn(B, T, H, N, dtype=dtype), dim=-1)
    return {name: x[name] for name in "rwkv"} | {
        "a": -kappa,
        "b": kappa * torch.rand(B, T, H, N, dtype=dtype),
    }


def one_by_one(op, x, s0, reset, initial_state):
    """Every document in a call of its own, with the reference: what `initial_state` means."""
    ys, states = [], []
    for row, resets in enumerate(reset):
        places = [0, *(t for t in range(1, len(resets)) if resets[t]), len(resets)]
        parts = []
        for begin, end in zip(places, places[1:]):
            goes_on = s0 is not None and begin == 0 and not resets[0]
            cut = {name: t if name == "u" else t[row : row + 1, begin:end] for name, t in x.items()}
            before = s0[row : row + 1] if goes_on else initial_state[None]
            y, state = op(*cut.values(), before, kernel="reference")
            parts.append(y)
        ys.append(torch.cat(parts, 1))
        states.append(state)
    return torch.cat(ys), torch.cat(states)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize(
    "kernel, dtype, ratio",
    [
        ("torch", torch.float64, 1e-12),
        ("reference", torch.float64, 1e-12),
        ("cpu", torch.float32, 2e-5),
        ("cpu", torch.bfloat16, 2e-2),
    ],
)
@pytest.mark.parametrize("carried", [False, True])
def test_every_document_starts_from_the_state_and_gives_it_a_gradient(version, kernel, dtype, ratio, carried):
    op = {6: wkv6, 7: wkv7}[version]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = {name: t.to(dtype) for name, t in inputs(version, *RESETS.shape).items()}
    torch.manual_seed(1)
    start, s0 = torch.randn(2, 8, 8, dtype=torch.float64), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    dy, dstate = torch.randn_like(x["r"]), torch.randn_like(s0)

    def results(function, to, **kernel):
        leaves = {name: to(t).requires_grad_() for name, t in x.items()}
        states = [
            t.to(exact if kernel else torch.float64).requires_grad_()
            for t in (start, *([s0] if carried else []))
        ]
        y, state = function(
            *leaves.values(), states[1] if carried else None, RESETS, initial_state=states[0], **kernel
        )
        grads = torch.autograd.grad([y, state], [*leaves.values(), *states], [to(dy), dstate.to(state.dtype)])
        return dict(zip(("y", "state", *leaves, "start", "s0"), (y, state, *grads)))

    want = results(
        lambda *args, initial_state: one_by_one(op, dict(zip(x, args)), *args[len(x) :], initial_state),
        lambda t: t.detach().double(),
    )
    got = results(op, lambda t: t.detach().clone(), kernel=kernel)
    assert got.keys() == want.keys()
    for name in want:
        close(name, got[name], want[name], ratio)


def test_documents_are_padded_to_less_than_twice_their_tokens_and_none_is_lost():
    torch.manual_seed(0)
    reset = torch.rand(5, 700) < 0.01
    reset[3, 1:] = False
    plan = layout(reset)
    used = torch.cat([group.tokens.flatten() for group in plan.groups])
    assert torch.equal(used[plan.places], torch.arange(reset.numel())), (
        "a token's output is where places says"
    )
    lengths = torch.cat([(group.tokens < reset.numel()).sum(1) for group in plan.groups])
    assert lengths.sum() == reset.numel() and len(lengths) == (reset | (torch.arange(700) == 0)).sum()
    long = [group for group in plan.groups if group.tokens.shape[1] > 16]
    assert len(long) > 3
    assert sum(g.tokens.numel() for g in long) < 2 * sum((g.tokens < reset.numel()).sum() for g in long)
    assert layout(reset) is plan, "the layers of a model share one"
    elsewhere = torch.zeros_like(reset)
    elsewhere.on_cpu = reset  # a GPU's own are not read: it would have to be waited for
    assert all(torch.equal(a, b) for a, b in zip(layout(elsewhere)[1:], plan[1:], strict=True))


def test_a_state_of_another_shape_is_refused():
    x = inputs(7, 1, 3)
    with pytest.raises(ValueError, match=re.escape("initial_state is torch.float64 (2, 8, 4)")):
        wkv7(*x.values(), initial_state=torch.zeros(2, 8, 4, dtype=torch.float64))


# the model


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_state_changes_nothing_and_only_it_is_trained(version, dtype, checkpoint):
    model, plain = (RWKV.load(checkpoint(version, dtype)) for _ in range(2))
    report = rwkv_miss.inject(model, "state")
    ids, reset = torch.arange(2 * 19).view(2, 19), torch.arange(19).expand(2, 19) % 7 == 0
    assert torch.equal(model(ids)[0], plain(ids)[0])
    close(
        "logits of packed rows",
        model(ids, reset=reset)[0],
        plain(ids, reset=reset)[0],
        1e-5 if dtype == torch.float32 else 2e-2,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == [f"blocks.{i}.att.time_state" for i in range(2)]
    assert set(trained) == set(model.state_dict()) - set(plain.state_dict())
    assert {(p.dtype, tuple(p.shape)) for p in trained.values()} == {(torch.float32, (3, 16, 16))}
    assert report.line().startswith("1,536 trainable") and report.trainable == 2 * 3 * 16 * 16


@pytest.mark.product
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("train_parts", [None, "state,ln"])
@pytest.mark.parametrize("grad_cp", [0, 1, 2])
def test_packed_rows_equal_rows_of_their_own(version, train_parts, grad_cp):
    """Loss and gradients of documents in shared rows are those of each document alone, to 1e-6 in fp32."""
    model = tuned(version, train_parts)
    model.grad_cp = grad_cp
    torch.manual_seed(5)
    ids, targets = torch.randint(67, (2, *RESETS.shape))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(logits, targets):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    packed = loss(model(ids, reset=RESETS)[0], targets)
    got = torch.autograd.grad(packed, list(trained.values()))
    alone = 0.0
    for row, resets in enumerate(RESETS):
        places = [0, *(t for t in range(1, 41) if resets[t]), 41]
        for begin, end in zip(places, places[1:]):
            alone = alone + loss(model(ids[row : row + 1, begin:end])[0], targets[row : row + 1, begin:end])
    close("loss", packed, alone, 1e-10)
    for name, mine, theirs in zip(
        trained, got, torch.autograd.grad(alone, list(trained.values())), strict=True
    ):
        assert theirs.abs().max() > 0, name
        close(name, mine, theirs, 1e-9)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kernel", ["torch", "reference"])
def test_whole_chunked_and_step_by_step_agree(version, kernel):
    model = tuned(version)
    model.set_kernel(kernel)
    ids = torch.randint(67, (2, 23), generator=torch.Generator().manual_seed(2))
    reset = torch.zeros(2, 23, dtype=torch.bool)
    reset[1, 9] = True
    with torch.no_grad():
        whole, after = model(ids, reset=reset)
        for sizes in ([1] * 23, [9, 14], [5, 4, 7, 7]):
            state, parts = None, []
            for part, marks in zip(ids.split(sizes, 1), reset.split(sizes, 1)):
                logits, state = model(part, state, marks if marks.any() else None)
                parts.append(logits)
            close("logits", torch.cat(parts, 1), whole, 1e-9)
            for got, want in zip(state, after, strict=True):
                close("state", got.wkv, want.wkv, 1e-9)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("sparse", [False, True])
def test_long_rows_in_chunks_give_the_state_its_whole_gradient(version, sparse):
    model = tuned(version, "state")
    ids, targets = torch.randint(67, (2, *RESETS.shape), generator=torch.Generator().manual_seed(4))
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(chunks):
        tokens = trained_tokens(targets.numpy(), np.ones(RESETS.shape), chunks.size)
        batch = Batch(ids=ids, reset=RESETS, **tokens)
        loss = chunks.loss(model, batch)
        return [loss, *torch.autograd.grad(loss, trained)]

    for got, want in zip(gradients(Chunks(6, 0, sparse)), gradients(Chunks()), strict=True):
        close("loss and gradients", got, want, 1e-9)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("resets", [[], [17, 40]])
def test_a_state_alone_is_trained_also_where_chunks_hold_nothing_of_it(version, resets):
    """Behind the place where the gradient stops only documents that start there depend on the state."""
    model = tuned(version)
    ids, targets = torch.randint(67, (2, 1, 41), generator=torch.Generator().manual_seed(4))
    reset = torch.zeros(1, 41, dtype=torch.bool)
    reset[0, resets] = True
    tokens = trained_tokens(targets.numpy(), np.ones(reset.shape), 6)
    batch = Batch(ids=ids, reset=reset if resets else None, **tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    state, want = None, 0.0
    for start in range(0, 41, 12):
        part = slice(start, start + 12)
        x, state = model.features(ids[:, part], state, reset[:, part] if resets else None)
        want = want + loss_sum(model.head(x[0]), targets[0, part])
        state = [type(layer)(*(t.detach() for t in layer)) for layer in state]
    for sparse in (False, True):
        loss = Chunks(6, 12, sparse).loss(model, batch)
        for got, expected in zip(
            [loss, *torch.autograd.grad(loss, trained)],
            [want, *torch.autograd.grad(want, trained, retain_graph=True)],
        ):
            close("loss and gradients", got, expected, 1e-9)


@pytest.mark.parametrize("version", [6, 7])
def test_the_gradient_is_that_of_finite_differences(version):
    model = tuned(version, n_layer=1, n_embd=16, head_size=8)
    ids = torch.arange(7)[None]
    reset = torch.tensor([[False, False, True, False, False, True, False]])
    state = model.blocks[0].att.time_state.detach().requires_grad_()

    def logits(state):
        return torch.func.functional_call(
            model, {"blocks.0.att.time_state": state}, (ids,), {"reset": reset}
        )[0]

    assert torch.autograd.gradcheck(logits, state)


# files


def runtime_state(path):
    """The package rwkv's state list for RWKV-7, with a file's initial states as the merge's note says."""
    tensors = torch.load(path, weights_only=True)
    width, states = (
        tensors["emb.weight"].shape[1],
        [t for name, t in tensors.items() if name.endswith("time_state")],
    )
    return [t for state in states for t in (torch.zeros(width), state.float(), torch.zeros(width))]


@pytest.mark.parametrize("version", [slow(6), 7])
@pytest.mark.parametrize("train_parts", [None, "state"])
def test_saved_loaded_and_merged_are_the_live_model_here_and_in_rwkv(
    version, train_parts, checkpoint, tmp_path
):
    base = checkpoint(version)
    model = tuned(version, train_parts, base)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    ids = torch.arange(21)
    live = model(ids[None])[0]
    fresh = RWKV.load(base)
    assert not torch.allclose(fresh(ids[None])[0], live)
    rwkv_miss.load_adapter(fresh, tmp_path / "a.pth")
    assert torch.equal(fresh(ids[None])[0], live)
    targets = describe(tmp_path / "a.pth")["metadata"]["targets"]
    assert bool(targets) == bool(train_parts)  # targets are linears, which state tuning alone does not adapt
    report = rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    assert report.states == 2 and "note: the file carries the initial state" in report.lines()[1]
    kept, merged = (rwkv_miss.read_checkpoint(path) for path in (base, tmp_path / "m.pth"))
    assert list(merged) == [*kept, "blocks.0.att.time_state", "blocks.1.att.time_state"]
    again = RWKV.load(tmp_path / "m.pth")
    close("merged", again(ids[None])[0], live, 1e-5)
    assert RWKV.load(tmp_path / "m.pth", torch.bfloat16).blocks[1].att.time_state.dtype == torch.float32
    run = pypi_rwkv(tmp_path / "m.pth")
    close(
        "rwkv",
        run(ids.tolist(), runtime_state(tmp_path / "m.pth") if version == 7 else None)[0],
        live[0],
        2e-5,
    )
    # and one token at a time
    state, rows = runtime_state(tmp_path / "m.pth") if version == 7 else None, []
    for token in ids.tolist():
        logits, state = run([token], state)
        rows.append(logits)
    close("rwkv, token by token", torch.cat(rows), live[0], 2e-5)


@pytest.mark.parametrize("version", [6, 7])
def test_a_state_file_of_another_project_is_an_adapter(version, checkpoint, tmp_path):
    base = checkpoint(version)
    model = tuned(version, path=base)
    states = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({name: t.bfloat16() for name, t in states.items()}, tmp_path / "state.pth")
    loaded, _ = load(base, tmp_path / "state.pth", tokenizer=letters(tmp_path), precision="fp32", wkv="torch")
    found = {name: p for name, p in loaded.named_parameters() if name in states}
    assert len(found) == 2
    assert all(torch.equal(p, states[name].bfloat16().float()) for name, p in found.items())
    assert describe(tmp_path / "state.pth")["kind"] == "adapter"
    rwkv_miss.merge_file(base, tmp_path / "state.pth", tmp_path / "m.pth")
    assert torch.equal(
        RWKV.load(tmp_path / "m.pth")(torch.arange(9)[None])[0], loaded(torch.arange(9)[None])[0]
    )
    torch.save(dict(list(states.items())[:1]), tmp_path / "part.pth")
    with pytest.raises(rwkv_miss.UserError, match="part.pth lacks blocks.1.att.time_state"):
        rwkv_miss.load_adapter(RWKV.load(base), tmp_path / "part.pth")
    with pytest.raises(rwkv_miss.UserError, match="the initial state of .*part.pth is of 1 layers"):
        rwkv_miss.merge_file(base, tmp_path / "part.pth", tmp_path / "m.pth")


def test_a_base_with_a_state_is_tuned_on_from_there(checkpoint, tmp_path):
    base = checkpoint(7)
    first = tuned(7, path=base)
    rwkv_miss.save_adapter(first, tmp_path / "a.pth")
    rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    model = RWKV.load(tmp_path / "m.pth")
    ids = torch.arange(9)[None]
    before = model(ids)[0]
    report = rwkv_miss.inject(model, "state")
    assert torch.equal(model(ids)[0], before) and report.trainable == 2 * 3 * 16 * 16
    with torch.no_grad():
        model.blocks[1].att.time_state += 1
    rwkv_miss.save_adapter(model, tmp_path / "b.pth")
    rwkv_miss.merge_file(tmp_path / "m.pth", tmp_path / "b.pth", tmp_path / "n.pth")
    assert torch.equal(RWKV.load(tmp_path / "n.pth")(ids)[0], model(ids)[0])


def test_mistakes_are_explained(checkpoint):
    for arguments, words in (
        (("state", None, "state"), "method state trains part state already"),
        (
            ("state", ["key", "value"]),
            "method state adapts no linear layers; drop the targets \\(key, value\\)",
        ),
    ):
        with pytest.raises(rwkv_miss.UserError, match=words):
            rwkv_miss.inject(RWKV.load(checkpoint(7)), *arguments)
    with pytest.raises(rwkv_miss.UserError, match="state tuning is for RWKV-6 and RWKV-7"):
        rwkv_miss.inject(torch.nn.Sequential(torch.nn.Linear(3, 3)), "state")
    with pytest.raises(rwkv_miss.UserError, match="option 'rank' is unknown; this method has: no options"):
        rwkv_miss.inject(RWKV.load(checkpoint(7)), "state", rank=8)


def test_the_state_learns_at_its_own_rate_without_decay():
    model = tuned(7, "state,time")
    groups = parameter_groups(model, 1e-5, 0.1, 1e-2)
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates[id(model.blocks[0].att.time_state)] == (1e-2, 0.0)
    assert rates[id(model.blocks[0].att.key.miss)] == (1e-5, 0.1)


# chat and runs


def letters(tmp_path):
    """A tokenizer file with one token a character."""
    path = tmp_path / "letters.txt"
    path.write_text("".join(f"{i} {c!r} 1\n" for i, c in enumerate(string.ascii_letters + " :\n.,?!012", 1)))
    return str(path)


@pytest.mark.parametrize("version", [6, 7])
def test_a_new_conversation_starts_from_the_state(version, tmp_path, capsys):
    # louder layers, so that the next token depends on more than the last one
    loud = {
        n: 6 * t if n.endswith(("att.output.weight", "ffn.value.weight")) else t
        for n, t in random_tensors(make_arch(version)).items()
    }
    base = tmp_path / "loud.pth"
    rwkv_miss.write_checkpoint(base, loud.items())
    rwkv_miss.save_adapter(tuned(version, path=base), tmp_path / "a.pth")
    rwkv_miss.merge_file(base, tmp_path / "a.pth", tmp_path / "m.pth")
    flags = [
        "--tokenizer",
        letters(tmp_path),
        *"--prompt hello? --temperature 0 --max_tokens 30 --wkv torch".split(),
    ]
    said = []
    for model in (
        ["--model", base, "--adapter", tmp_path / "a.pth"],
        ["--model", tmp_path / "m.pth"],
        ["--model", base],
    ):
        chat.main([*map(str, model), *flags])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]
    model, tokenizer = load(base, tmp_path / "a.pth", letters(tmp_path), wkv="torch")
    answers = [
        "".join(Conversation(engine_of(model, tokenizer), GREEDY).answer("hello?", 30)) for _ in range(2)
    ]
    assert answers[0] == answers[1] and answers[0].lstrip(" ") == said[0].removesuffix("\n")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    for version in (6, 7):
        save_base(folder / f"v{version}.pth", version)
    rows = [talk("q" * i, "ab c" * (1 + i % 3)) for i in range(1, 22)]
    write_rows(folder / "data.jsonl", rows)
    return folder


def train(files, proj_dir, *flags, version=7):
    sound = f"""
        --load_model {files}/v{version}.pth --data_file {files}/data.jsonl --proj_dir {proj_dir}
        --tokenizer bytes --accelerator cpu --lr_init paper --lr_schedule constant --micro_bsz 21
        --eval_split 0
    """
    return program.succeed(program.run([*sound.split(), *flags]))


@pytest.mark.slow
def test_miss_and_the_state_together_in_one_run_and_one_file(files, tmp_path):
    output = train(
        files, tmp_path / "run", "--peft_config", "r=7", "--train_parts", "state", "--epoch_steps", "3"
    )
    assert "in 12 matrices, and state of the base" in output and "initial state 0.01" in output
    tensors = rwkv_miss.read_checkpoint(tmp_path / "run/adapter.pth")
    assert len(tensors) == 14 and 5e-3 < tensors["blocks.1.att.time_state"].abs().max() < 0.1
    assert tensors["blocks.1.att.key.miss"].abs().max() < 1e-3


@pytest.mark.parametrize(
    "flags", [[], slow(["--grad_cp", "1"]), slow(["--chunk_ctx", "7"])], ids=["plain", "grad_cp", "chunks"]
)
def test_a_state_that_diverges_rolls_the_run_back_and_then_ends_it(files, tmp_path, flags):
    """The NaN is one of the forward itself, which the kernels of a CPU would answer with an error outside of
    a training.
    """
    sound = f"""
        --load_model {files}/v7.pth --data_file {files}/data.jsonl --proj_dir {tmp_path}/run --tokenizer bytes
        --accelerator cpu --micro_bsz 2 --packing 0 --epoch_steps 9 --peft state --lr_init 1e30
    """
    code, output = program.run([*sound.split(), *flags])
    assert code == 2 and output.count("back to the state of step 0") == 3, output
    assert "Traceback" not in output, output
    assert "the run diverged; lower --lr_init" in output
