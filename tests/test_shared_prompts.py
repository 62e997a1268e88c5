"""A prompt that is read once for both answers: ln p and gradients are those of separate rows."""

import dataclasses

import numpy as np
import pytest
import torch

import rwkv_miss
from rwkv_miss import METHODS
from src.config import Config
from src.data.answer_batches import collate_answers
from src.data.batches import make_schedule
from src.data.encode import tokens_of
from src.data.file_documents import Document
from src.data.preferences import Preference, fit_examples
from src.model import RWKV, batch_loss
from src.model.batch_loss import Chunks
from src.model.rwkv import LayerState
from src.sources import source_of
from src.sources.pairs.prompt_reading import tokens_of_layouts

from .conftest import close, make_arch, random_tensors
from .loss_cases import make_model

# (prompt, chosen, rejected): tokens; of a prompt of one token nothing is left to read
SIZES = [[(19, 11, 17), (1, 4, 9)], [(33, 1, 2), (2, 3, 1)], [(7, 5, 3)]]


def make_rows(sizes=SIZES, vocab=67, seed=0):
    """Rows of pairs of random tokens."""
    rng = np.random.default_rng(seed)

    def pair(prompt, *answers):
        begin = rng.integers(vocab, size=prompt)
        weights = [np.repeat([0, 1], [prompt, answer]).astype(np.float32) for answer in answers]
        ids = [np.concatenate([begin, rng.integers(vocab, size=answer)]) for answer in answers]
        return Preference([Document(*both) for both in zip(ids, weights, strict=True)], [True, False])

    return [[pair(*example) for example in row] for row in sizes]


def scales_of(found):
    """A gradient for each token, of both signs."""
    return torch.randn(len(found), generator=torch.Generator().manual_seed(5)).to(found.dtype)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def results(model, rows, shared):
    """(ln p of the trained tokens, gradient of every trained parameter)."""
    found = Chunks().log_probs(model, collate_answers(rows, 1.0, shared=shared))
    return found.detach(), gradients(model, found)


def gradients(model, found):
    parameters = trained(model)
    found = torch.autograd.grad(found, parameters.values(), scales_of(found), allow_unused=True)
    return {name: x for name, x in zip(parameters, found, strict=True) if x is not None}


def one_by_one(model, rows):
    """The specification: torch's log_softmax of the logits of every answer alone, after its prompt."""
    parts = []
    for answer in (answer for row in rows for example in row for answer in example.answers):
        ids = torch.from_numpy(answer.ids.astype(np.int64))
        logits, _ = model(ids[None, :-1])
        every = logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        parts.append(every[torch.from_numpy(answer.weights[1:] != 0)])
    found = torch.cat(parts)
    return found.detach(), gradients(model, found)


def same(got, want, ratio, of_gradients=None):
    close("ln p", got[0], want[0], ratio)
    assert got[1].keys() == want[1].keys() and want[1]
    for name, gradient in want[1].items():
        close(name, got[1][name], gradient, of_gradients or ratio)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("peft", [True, False])
def test_both_layouts_have_what_the_answers_have_alone(version, peft):
    model, rows = make_model(version, peft=peft), make_rows()
    want = one_by_one(model, rows)
    assert len(want[0]) == sum(sum(example[1:]) for row in SIZES for example in row)
    for shared in (False, True):
        same(results(model, rows, shared), want, 1e-11)
    with torch.no_grad():
        found = Chunks().log_probs(model, collate_answers(rows, 1.0, shared=True))
    assert torch.equal(found, results(model, rows, True)[0])


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kernel, allowed", [("cpu", 1e-6), ("torch", 5e-6)])
def test_single_precision_and_what_is_recomputed(version, kernel, allowed):
    model, rows = make_model(version, torch.float32, kernel), make_rows([[(150, 70, 61)], [(37, 9, 90)]])
    want = results(model, rows, False)
    for model.grad_cp in (0, 1, 2):
        same(results(model, rows, True), want, 1e-6, allowed)


def test_a_state_without_its_gradient_is_seen(monkeypatch):
    """A large part of the gradient goes through the prompt."""
    model, rows = make_model(7), make_rows()
    want = results(model, rows, False)
    begins = batch_loss.after_prompts

    def detached(*given):
        return [LayerState(*(t.detach() for t in layer)) for layer in begins(*given)]

    monkeypatch.setattr(batch_loss, "after_prompts", detached)
    found = results(model, rows, True)
    close("ln p", found[0], want[0], 1e-12)
    name = "blocks.0.att.value.miss"
    assert (found[1][name] - want[1][name]).norm() > 0.1 * want[1][name].norm()


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("native", [False, True])
def test_prompts_begin_with_a_tuned_state_whatever_stands_before_them(version, native):
    """The shorter prompts are padded on the left: the state at their first token is the tuned one."""
    model, rows = RWKV(make_arch(version), "cpu" if native else "torch"), make_rows()
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "state")
    with torch.no_grad():
        for p in trained(model).values():
            p.normal_(std=0.5)
    if native:
        same(results(model, rows, True), results(model, rows, False), 1e-6)
        return
    model.double()
    want = one_by_one(model, rows)
    assert all("time_state" in name and dp.abs().max() > 1e-3 for name, dp in want[1].items())
    for model.grad_cp in (0, 1):
        same(results(model, rows, True), want, 1e-11)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"miss", "state"}))
def test_every_method(method):
    model, rows = RWKV(make_arch(7), "cpu"), make_rows()
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, method, **({"rank": 4} if METHODS[method].adapts_linears else {}))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.05 * torch.randn_like(p))
    same(results(model, rows, True), results(model, rows, False), 1e-6, 2e-6)


def test_an_adapted_head_and_trained_parts():
    model, rows = RWKV(make_arch(6)), make_rows()
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "lora", ["head", "att.key"], "ln,emb", rank=4)
    model.double()
    same(results(model, rows, True), one_by_one(model, rows), 1e-11)


@pytest.mark.parametrize("quant", ["", "int8", "nf4"])
def test_half_precision_and_quantised_bases(quant):
    """As near to separate rows as bf16 is to itself in another order."""
    model, rows = make_model(7, torch.float32, "cpu", n_embd=64), make_rows()
    if quant:
        model.quantise(quant, torch.bfloat16)
    else:
        model.computes_in = torch.bfloat16
    found = results(model, rows, True)
    assert found[0].dtype == torch.float32
    same(found, results(model, rows, False), 6e-2)


def test_with_dropout_the_gradient_is_that_of_what_was_drawn():
    """Dropout of a prompt is the same for both answers: the directional derivative in float64."""
    model, rows = RWKV(make_arch(7)), make_rows()
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "lora", rank=4, dropout=0.3)
    model.double().train()
    parameters = trained(model)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05 * torch.randn_like(p))
    step = [torch.randn_like(p) * 1e-5 for p in parameters.values()]

    def drawn(factor=0.0, seed=3):
        with torch.no_grad():
            for p, d in zip(parameters.values(), step, strict=True):
                p.add_(d, alpha=factor)
        torch.manual_seed(seed)
        found = results(model, rows, True)
        with torch.no_grad():
            for p, d in zip(parameters.values(), step, strict=True):
                p.sub_(d, alpha=factor)
        return found

    for model.grad_cp in (0, 2):
        values, found = drawn()
        slope = sum((g * d).sum() for g, d in zip(found.values(), step, strict=True))
        ahead, behind = (drawn(factor)[0] for factor in (1, -1))
        close("slope", slope, ((ahead - behind) * scales_of(values)).sum() / 2, 1e-6)
    assert not torch.equal(drawn(seed=4)[0], values)


@pytest.mark.parametrize("shared", [False, True])
def test_without_an_example_there_is_nothing_but_a_gradient_of_zero(shared):
    """A rank of a short step: it takes part in the reductions."""
    model = make_model(7)
    found = Chunks().log_probs(model, collate_answers([], 1.0, shared=shared))
    assert found.shape == (0,) and found.requires_grad
    assert all(not dp.any() for dp in gradients(model, found).values())


def test_chunks_and_shared_prompts_are_refused_together():
    batch = collate_answers(make_rows(), 1.0, shared=True)
    with pytest.raises(ValueError, match="shared by whole rows, not by chunks of 8"):
        Chunks(8).log_probs(make_model(7), batch)


def data_of(*sizes):
    """Preferences of these pairs, and their schedule of micro-batches of 3 rows."""
    answers = [answer for row in make_rows([sizes]) for example in row for answer in example.answers]
    count = len(answers)
    tokens = tokens_of(
        [(answer.ids, answer.weights) for answer in answers],
        texts=[False] * count,
        begins=[True] * count,
        labels=[1, -1] * (count // 2),
        places=list(range(count)),
    )
    preferences = fit_examples([tokens], [np.arange(count)], ["data.jsonl"], 2048, paired=True)
    config = Config(loss="dpo", ctx_len=2048, micro_bsz=3, accumulate_grad_batches=2, accelerator="cpu")
    return preferences, config, make_schedule(preferences, config, 2)


def test_the_plan_counts_what_the_batches_hold():
    rng = np.random.default_rng(2)
    preferences, _, schedule = data_of(*(rng.integers(1, 150, 3).tolist() for _ in range(41)))
    tokens = {False: [], True: []}
    for group in range(schedule.steps_per_pass * 4):
        step, (micro, rank) = group // 4, divmod(group % 4, 2)
        rows = schedule.micro_rows(step, micro, rank)
        examples = [[preferences[i] for i in schedule.rows[row]] for row in rows]
        for shared in tokens:
            batch = collate_answers(examples, 1.0, shared=shared)
            if rows:
                read = batch.prompts.numel() if shared else 0
                tokens[shared].append(batch.ids.numel() + read)
    assert tokens_of_layouts(preferences, schedule) == (np.mean(tokens[False]), np.mean(tokens[True]))


@pytest.mark.parametrize(
    "sizes, width, shared",
    [
        ([(128, 64, 64)] * 40, 96, True),
        ([(512, 256, 256)] * 8, 768, True),
        ([(32, 16, 16)] * 3, 96, False),  # the second pass is dearer
        ([(8, 200, 200)] * 20, 768, False),  # answers are all there is
        ([(300, 9, 9)] + [(20, 30, 30)] * 20, 768, False),  # one long prompt pads the others
    ],
)
def test_prompts_are_shared_where_that_is_faster(sizes, width, shared):
    preferences, config, schedule = data_of(*sizes)
    arch = make_arch(7, n_embd=width, head_size=32)
    found = source_of(config).prompt_reading(preferences, schedule, arch)
    assert found.shared == shared
    words = "read once for both answers: " if shared else "after its own prompt: a prompt read once would"
    assert words in found.explanation
    chunks = source_of(dataclasses.replace(config, chunk_ctx=64)).prompt_reading(preferences, schedule, arch)
    assert not chunks.shared and chunks.explanation.endswith("rows run in chunks")


def test_single_answers_and_documents_share_no_prompts():
    preferences, config, schedule = data_of((512, 256, 256))
    for loss, paired in (("kto", False), ("sft", True)):
        kind, given = dataclasses.replace(config, loss=loss), dataclasses.replace(preferences, paired=paired)
        found = source_of(kind).prompt_reading(given, schedule, make_arch(7))
        assert not found.shared and not found.explanation
