"""Rows in chunks: the gradients of the whole row, whatever the chunks, in the memory of one chunk."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion

from rwkv_miss.errors import UserError
from src.common.batch import Batch
from src.common.token_loss import loss_sum
from src.config import Config
from src.data.collate import trained_tokens
from src.model.batch_loss import Chunks
from src.planning.plan import device_here

from . import program
from .conftest import close, read_rows, save_base, write_rows
from .loss_cases import ROWS, make_batch, make_model, same, tuned_model
from .tables import talk


def loss_of(model, rows, chunks, **options):
    trained = trained_tokens(rows["targets"].numpy(), rows["weights"].numpy(), chunks.size)
    return chunks.loss(model, Batch(ids=rows["ids"], reset=rows["reset"], **trained, **options))


def results(model, rows, chunks, **options):
    """(loss, gradient of every trained parameter) at a scale that is not 1."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = loss_of(model, rows, chunks, **options)
    gradients = torch.autograd.grad(loss * 0.37, parameters.values(), allow_unused=True)
    return loss, dict(zip(parameters, gradients, strict=True))


@pytest.mark.product
@pytest.mark.parametrize("version", [7, 6])
@pytest.mark.parametrize("size", [1, 3, 8, 34, 35])
def test_chunks_of_any_size_have_the_gradients_of_the_whole_row(version, size):
    model, batch = make_model(version), make_batch(ROWS, weighted=size % 2 == 1)
    want = results(model, batch, Chunks())
    for sparse in (False, True):
        same(results(model, batch, Chunks(size, sparse=sparse)), want, 1e-12)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("peft", [True, False])
def test_single_precision(version, peft):
    """Within 1e-5 of the whole row, with the native kernel and grad_cp; both are 1.7e-5 at most from
    float64.
    """
    batch = make_batch([[200, 57], [257], [1, 63, 64, 65]])
    exact = results(make_model(version, peft=peft), batch, Chunks())
    model = make_model(version, torch.float32, "cpu", peft)
    want = results(model, batch, Chunks())
    for model.grad_cp in (False, True):
        got = results(model, batch, Chunks(64))
        same(got, want, 1e-5)
        same(got, exact, 2e-5)


def test_a_truncated_gradient_stops_at_every_so_many_tokens():
    """The reference runs the row with plain autograd and detaches the state where the gradient stops."""
    model, batch = make_model(7), make_batch(ROWS)
    parameters = [p for p in model.parameters() if p.requires_grad]
    state, loss = None, 0
    for part in (slice(0, 16), slice(16, 32), slice(32, 35)):
        x, state = model.features(batch["ids"][:, part], state, batch["reset"][:, part])
        mask = batch["weights"][:, part]
        loss = loss + loss_sum(model.head(x[mask]), batch["targets"][:, part][mask])
        state = [type(layer)(*(t.detach() for t in layer)) for layer in state]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    want = loss, dict(zip(names, torch.autograd.grad(loss * 0.37, parameters), strict=True))
    for size, sparse in ((16, False), (8, True), (4, False)):
        same(results(model, batch, Chunks(size, 16, sparse)), want, 1e-12)
    exact = results(model, batch, Chunks())
    assert any(
        (exact[1][name] - gradient).norm() > 1e-3 * gradient.norm() for name, gradient in want[1].items()
    ), "nothing was cut off"


@pytest.mark.parametrize("sparse, states", [(False, 11), (True, 2)])
def test_a_chunk_keeps_one_state_and_nothing_else(sparse, states):
    """12 chunks: the first needs no state; of the others each keeps one, or with sqrt(12) -> 4 chunks in a
    segment the 5th and the 9th.
    """
    model, batch = make_model(7, torch.float32), make_batch([[35], [20, 14]])
    one = sum(t.nbytes for layer in model(batch["ids"][:, :1])[1] for t in layer)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: held.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        loss = loss_of(model, batch, Chunks(3, sparse=sparse))
    assert sum(held) == states * one
    assert Chunks(3, sparse=sparse).states(35) == {False: 11, True: 2 + 3}[sparse], (
        "in the backward a segment has those between too"
    )
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        assert torch.equal(loss_of(model, batch, Chunks(3)), loss)


def test_every_parameter_gets_its_gradient_once():
    model, batch = make_model(7, peft=False), make_batch(ROWS)
    model.spare = torch.nn.Parameter(torch.ones(3))
    times = {name: 0 for name, p in model.named_parameters() if p.requires_grad}
    for name in times:
        model.get_parameter(name).register_post_accumulate_grad_hook(
            lambda _, name=name: times.__setitem__(name, times[name] + 1)
        )
    loss_of(model, batch, Chunks(3)).backward()
    assert set(times.values()) == {1} and model.spare.grad is None


def test_a_rank_with_shorter_rows_runs_as_many_chunks():
    """ZeRO-3 gathers by the calls of modules: their number depends on the longest row of all ranks alone."""
    model, batch = make_model(7), make_batch(ROWS)
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    want = results(model, batch, Chunks(8))
    alone, calls[:] = len(calls), []
    same(results(model, batch, Chunks(8), width=60), want, 1e-12)
    assert alone == 2 * 5 and calls == [False] * 8 + [True] * 8


def test_random_numbers_are_drawn_again_as_they_were():
    """With dropout between the layers the gradient is that of the loss as it was drawn: its directional
    derivative in float64.
    """
    model, batch = make_model(6), make_batch(ROWS)
    model.blocks[0].register_forward_hook(lambda _, inputs, out: (F.dropout(out[0], 0.2), *out[1:]))
    parameters = [p for p in model.parameters() if p.requires_grad]
    step = [torch.randn_like(p) * 1e-5 for p in parameters]

    def loss_at(factor, seed=3):
        with torch.no_grad():
            for p, d in zip(parameters, step, strict=True):
                p.add_(d, alpha=factor)
        torch.manual_seed(seed)
        loss = loss_of(model, batch, Chunks(8, sparse=True))
        place = torch.get_rng_state()
        with torch.no_grad():
            for p, d in zip(parameters, step, strict=True):
                p.sub_(d, alpha=factor)
        torch.manual_seed(seed)
        assert torch.equal(place, torch.get_rng_state()), (
            "what is drawn after the rows does not depend on them"
        )
        return loss

    loss = loss_at(0)
    gradients = torch.autograd.grad(loss, parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, step, strict=True))
    assert loss_at(0) == loss != loss_at(0, seed=4)
    # L2Wrap adds to the gradient what is not in the loss: 1e-4 of the largest logit
    close("slope", slope, (loss_at(1) - loss_at(-1)) / 2, 1e-2)


def test_every_chunk_draws_numbers_of_its_own():
    model, batch, drawn = make_model(6), make_batch(ROWS), []
    model.head.register_forward_hook(lambda *_: drawn.append(torch.rand(()).item()))
    loss_of(model, batch, Chunks(8)).backward()
    forward, backward = drawn[:5], drawn[5:]
    assert len(set(forward)) == 5 and backward == forward[::-1]


def test_a_trained_initial_state_gets_its_gradient_through_all_chunks():
    model, batch = tuned_model(), make_batch([[35], [3, 30]])
    want = results(model, batch, Chunks())
    assert want[1]["start"].abs().max() > 1e-3
    for sparse in (False, True):
        same(results(model, batch, Chunks(4, sparse=sparse)), want, 1e-12)


def test_full_training_in_bf16():
    """As near to the whole row as bf16 is to itself in another order; the gradients are fp32."""
    model, batch = make_model(7, torch.float32, peft=False), make_batch([[40, 24], [64]])
    model.computes_in = torch.bfloat16
    want, got = (results(model, batch, chunks) for chunks in (Chunks(), Chunks(16)))
    close("loss", got[0], want[0], 1e-2)
    for name in ("blocks.0.att.key.weight", "blocks.1.ffn.value.weight", "head.weight"):
        assert got[1][name].dtype == torch.float32
        close(name, got[1][name], want[1][name], 5e-2)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """train(name, *flags) -> (what was printed, losses): 3 steps of 8 rows of 5 to 170 bytes."""
    folder = tmp_path_factory.mktemp("infctx")
    save_base(folder / "base.pth")
    rng = random.Random(0)
    rows = [talk("q" * rng.randint(1, 30), "ab c" * rng.choice([1, 10, 35])) for _ in range(21)]
    write_rows(folder / "data.jsonl", rows)

    def run(name, *flags):
        settings = {
            "load_model": folder / "base.pth",
            "data_file": folder / "data.jsonl",
            "proj_dir": folder / name,
            "tokenizer": "bytes",
            "peft_config": "r=8",
            "lr_init": "1e-2",
            "lr_schedule": "constant",
            "micro_bsz": 8,
            "packing": 0,
            "accelerator": "cpu",
            "eval_split": 0,
        }
        program.succeed(
            program.run([*(f"--{key}={value}" for key, value in settings.items()), "--epoch_count=1", *flags])
        )
        card = (folder / name / "run_card.md").read_text()
        return card, [line["loss"] for line in read_rows(folder / name / "metrics.jsonl")]

    return run


@pytest.fixture(scope="module")
def whole(train):
    _, losses = train("whole", "--epoch_count=2")
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
    return losses


def test_an_old_torch_is_named_before_chunks_run_under_stage_3(monkeypatch):
    for version, strategy, chunk_ctx in [
        ("2.7.1", "deepspeed_stage_2", 64),
        ("2.7.1", "deepspeed_stage_3", 0),
        ("2.8.0", "deepspeed_stage_3", 64),
        ("2.10.0+cpu", "deepspeed_stage_3_offload", 64),
    ]:
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        device_here(Config(strategy=strategy, chunk_ctx=chunk_ctx, accelerator="cpu"), 64)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.1+cu126"))
    words = (
        r"--chunk_ctx with --strategy deepspeed_stage_3_offload needs torch 2.8 or newer, here it is"
        r' 2.7.1\+cu126; pip install "torch>=2.8", or'
    )
    with pytest.raises(UserError, match=words):
        device_here(Config(strategy="deepspeed_stage_3_offload", chunk_ctx=64, accelerator="cpu"), 64)


def test_a_run_resumes_with_other_chunks(train, whole):
    card, losses = train("resumed", "--chunk_ctx", "40")
    assert losses == pytest.approx(whole[:3], rel=1e-5)
    assert "chunks     of 40 tokens, at most" in card and "the gradient is exact" in card
    _, losses = train(
        "resumed", "--chunk_ctx", "64", "--state_cp", "1", "--epoch_count", "2", "--resume", "auto"
    )
    assert losses == pytest.approx(whole, rel=1e-5)
    card, losses = train("cut", "--chunk_ctx", "40", "--truncate_ctx", "80")
    assert "the gradient stops at every 80 tokens" in card
    assert losses[0] == pytest.approx(whole[0], rel=1e-6) and losses[1] != pytest.approx(whole[1], rel=1e-4)
