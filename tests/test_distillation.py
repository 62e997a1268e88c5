"""Distillation: the loss and its gradient, a teacher's values from the pass to the batch, and whole runs."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from rwkv_miss.errors import UserError
from src.common.late_reading import LateNumbers
from src.config import Config, parse
from src.data.collate import collate
from src.data.dataset import Documents, load_documents
from src.data.file_documents import Document
from src.data.reference_values import LOG_PROB, are_finite, packed, top_tokens, unknown, unpacked
from src.data.tokenizer import load_tokenizer
from src.losses.distill import Teacher, distillation_sums
from src.model import RWKV, rwkv
from src.model import loss as losses
from src.model.loss import head_loss, top_of
from src.planning.base_model import read_base
from src.planning.draft import Draft
from src.planning.memory import memory_parts
from src.sources import source_of
from src.sources.reference_blocks import ValueBlocks
from src.sources.reference_model import build_reference
from src.sources.reference_pass import LOG_PROBS, ReferencePass, TokenValues, _Values, longest_row
from src.training.short_runs import held_out_loss, put_back, train

from . import program
from .conftest import ROOT, make_arch, save_base
from .loss_cases import VOCAB, adapted_head, head_inputs, make_model
from .program import lines, same_adapters, same_lines, succeed, write_data

# as in test_loss.py; bf16 rounds the gradient of the cross entropy before that of the KL is added
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
TRL = json.loads((ROOT / "tests/fixtures/distillation_losses.json").read_text(encoding="utf-8"))


def kl_of_classes(logits, teacher_logits, count, temperature):
    """KL of each token over the teacher's `count` likeliest tokens and one class for all others, in words of
    probabilities: logits (tokens, V) float64."""
    found = []
    for own, other in zip(logits / temperature, teacher_logits / temperature):
        q, p = own.softmax(0), other.softmax(0)
        top = set(other.argsort(descending=True)[:count].tolist())
        pairs = [(p[i], q[i]) for i in top]
        rest = [i for i in range(len(p)) if i not in top]
        if rest:
            pairs.append((p[rest].sum(), q[rest].sum()))
        found.append(sum(a * (a / b).log() for a, b in pairs))
    return torch.stack(found)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "trained, native, exact", [(True, False, False), (False, True, False), (True, False, True)]
)
@pytest.mark.parametrize("count, temperature, mix", [(1, 2.0, 0.75), (5, 1.0, 0.5), (VOCAB, 0.7, 1.0)])
def test_value_and_gradient(monkeypatch, dtype, trained, native, exact, count, temperature, mix):
    """In blocks of 5 tokens, with weights, against all probabilities in float64."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCAB)
    x, weight, targets = head_inputs(13, dtype, trained)
    generator = torch.Generator().manual_seed(1)
    of_teacher = 3 * torch.randn(13, VOCAB, dtype=torch.float64, generator=generator)
    weights = 0.1 + torch.rand(13, generator=generator)
    leaves = [x, weight] if trained else [x]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    logits = doubles[0] @ (doubles[1] if trained else weight.double()).t()
    nll = -(logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1) * weights).sum()
    kl = (kl_of_classes(logits, of_teacher, count, temperature) * weights).sum()
    wrap = 1e-4 / 2 * (logits.amax(1).square() * weights).sum()  # whose gradient is that of L2Wrap
    trained_on = (1 - mix) * (nll + wrap) + mix * temperature**2 * kl
    want = torch.autograd.grad(2.5 * trained_on, doubles)
    numbers = top_of(of_teacher, count, temperature).to(torch.promote_types(dtype, torch.float32))
    teacher = Teacher(numbers, mix, temperature)
    sums = head_loss(x, weight, targets, native, weights.to(numbers), exact, teacher)
    expected = torch.stack([(1 - mix) * nll + mix * temperature**2 * kl, nll, kl]).detach()
    assert (sums.detach().double() - expected).abs().max() <= ROUNDING[dtype] * expected.abs().max()
    got = torch.autograd.grad((sums * torch.tensor([2.5, 7.0, 9.0])).sum(), leaves)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm()


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: f"top {case['top']} at {case['temperature']}")
def test_the_kl_is_that_of_trl(case):
    """GKD's loss over the vocabulary, and that of a teacher's server with the class of all others."""
    logits, teacher = (torch.tensor(TRL[name], dtype=torch.float64) for name in ("student", "teacher"))
    logits.requires_grad_()
    numbers = top_of(teacher, case["top"], case["temperature"])
    targets = torch.zeros(len(logits), dtype=torch.int64)
    sums = distillation_sums(logits, targets, None, Teacher(numbers, 1.0, case["temperature"]))
    assert sums[2].item() == pytest.approx(case["kl"], rel=1e-12)
    (gradient,) = torch.autograd.grad(sums[0], logits)
    want = case["temperature"] ** 2 * torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


def test_without_the_kl_the_gradient_is_that_of_the_cross_entropy_in_every_bit():
    x, weight, targets = head_inputs(13, torch.float32, True)
    teacher = Teacher(top_of(torch.randn(13, VOCAB), 3, 1.0), 0.0, 1.0)
    (ours, *_), theirs = (head_loss(x, weight, targets, logit_loss=one) for one in (teacher, None))
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6), "a sum in another order"
    for a, b in zip(*(torch.autograd.grad(loss, [x, weight]) for loss in (ours, theirs)), strict=True):
        assert torch.equal(a, b)


def test_a_student_with_no_mass_elsewhere_has_a_finite_gradient():
    """exp() of the others' logits is 0 in fp32."""
    x = torch.full((2, 1), 200.0, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [0.0]])
    teacher = Teacher(top_of(torch.zeros(2, 3), 1, 1.0), 1.0, 1.0)
    teacher.numbers[:, 0] = 0
    loss = head_loss(x, weight, torch.zeros(2, dtype=torch.int64), logit_loss=teacher)[0]
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_an_adapted_head_has_the_loss_of_its_logits(monkeypatch):
    monkeypatch.setattr(rwkv, "LOGITS_AT_ONCE", 5 * 67)
    adapted, x, targets, leaves = adapted_head("lora", 13)
    teacher, weights = Teacher(top_of(torch.randn(13, 67), 4, 2.0), 0.25, 2.0), torch.rand(13)
    for of in (None, weights):
        got, want = (
            adapted.logit_sums(x, targets, of, teacher),
            distillation_sums(adapted.head(x), targets, of, teacher),
        )
        torch.testing.assert_close(got, want)
        for pair in zip(*(torch.autograd.grad(sums[0], leaves) for sums in (got, want)), strict=True):
            torch.testing.assert_close(*pair, rtol=2e-5, atol=1e-6)


def documents_with_values(lengths, vocab, count, seed=0):
    """Documents with weights, some of them 0, and random values of a teacher."""
    rng = np.random.default_rng(seed)
    items = []
    for length in lengths:
        weights = rng.choice([0, 0.5, 1, 2], length).astype(np.float32)
        items.append(Document(rng.integers(vocab, size=length).astype(np.int32), weights))
    documents, generator = Documents(items), torch.Generator().manual_seed(seed)
    numbers = top_of(3 * torch.randn(documents.targets, vocab, generator=generator), count, 1.5)
    return documents.with_reference(packed(numbers.numpy(), top_tokens(count, vocab)))


def test_a_sweep_of_rates_judges_by_the_cross_entropy():
    """With values of the teacher in the batches, as where nothing is held out, and without."""
    documents, model = documents_with_values([6, 4, 9, 12, 3], 67, 3), make_model(7, torch.float32)
    taught = Config(
        loss="distill", distill_mix=1.0, distill_temperature=1.5, micro_bsz=5, accumulate_grad_batches=1,
        ctx_len=64, lr_init=1e-3, warmup_steps=0, lr_schedule="cos", precision="fp32",
    ).settled()  # fmt: skip
    alone, found = dataclasses.replace(taught, loss="sft"), {}
    for config, data in ((taught, documents), (alone, Documents(documents.items))):
        with put_back(model):
            first = next(train(model, source_of(config), data, 1))
        found[config.loss] = [first]
        for judged in (data, Documents(documents.items)):
            found[config.loss].append(held_out_loss(model, source_of(config), judged))
    assert found["distill"] == pytest.approx(found["sft"], rel=1e-6)


def test_documents_that_are_taken_keep_their_values():
    documents = documents_with_values([6, 4, 9, 12, 3], 67, 3)
    taken = documents.take(np.array([3, 0]))
    for i, place in enumerate((3, 0)):
        assert (taken[i].reference == documents[place].reference).all()
        assert len(taken[i].reference) == documents[place].targets
    assert documents.digest == Documents(documents.items).digest, "a checkpoint knows the data by them"
    empty = collate([], 1.0, reference=documents.reference.dtype)
    assert empty.teacher.shape == (0, 7)


@pytest.mark.parametrize("vocab", [1 << 16, (1 << 16) + 1])
def test_values_are_packed_in_few_bytes(vocab):
    dtype = top_tokens(2, vocab)
    assert dtype.itemsize == (2 if vocab == 1 << 16 else 4) * 2 + 2 * 3
    numbers = np.array([[vocab - 1, 0, -0.5, -1, -1.5], [3, 7, 0, -65504, -65504]], np.float32)
    assert (unpacked(packed(numbers, dtype)) == numbers).all()
    assert not are_finite(unknown(1, dtype)) and are_finite(packed(numbers, dtype))


def test_a_pass_that_ended_within_a_round_is_gone_on_with():
    """As after a kill, where the next run has a larger batch: the files have some values of its second round,
    as many as a third one has."""
    documents = documents_with_values([6, 4, 9, 12, 3], 67, 3)
    dtype, sizes = documents.reference.dtype, documents.target_counts
    places = np.cumsum(sizes) - sizes
    rounds = [[[[4]]], [[[3, 1]], [[2]]], [[[0]]]]  # the rows of each process
    order = [[4], [3, 1, 2], [0]]
    values = [
        np.concatenate([documents.reference[places[i] : places[i] + sizes[i]] for i in chosen])
        for chosen in order
    ]
    more = len(values[2])
    blocks, known = ValueBlocks(None, dtype), len(values[0]) + more
    found = _Values(documents, known, blocks)
    assert found.known_place(rounds[0]) == slice(0, len(values[0]))
    found.put(rounds[0], values[0])
    for number in (1, 2):
        assert found.known_place(rounds[number]) is None
        found.add(rounds[number], LateNumbers(torch.from_numpy(unpacked(values[number]))))
    assert (found.all() == documents.reference).all()
    lacking = np.concatenate([values[1][more:], values[2]])
    assert (np.concatenate(blocks.waiting) == lacking).all(), "what the files lack"


# whole runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a teacher of another size, and rows."""
    folder = tmp_path_factory.mktemp("distillation")
    save_base(folder / "base.pth", n_embd=40, head_size=8)
    save_base(folder / "teacher.pth", seed=1, n_embd=64, n_layer=3, head_size=8)
    write_data(folder)
    return folder


def start(files, proj_dir, *flags, sabotage=None):
    common = ["--peft_config", "r=7", "--epoch_steps", "3", "--data_cache", files / "cache"]
    common += ["--loss", "distill", "--reference", files / "teacher.pth"]
    flags = program.flags_of(files, proj_dir, *common, *flags)
    if "sft" in flags:
        place = flags.index("--reference")
        flags = flags[:place] + flags[place + 2 :]
    return succeed(program.run(flags, sabotage))


def no_pass(rank):
    def read(*_):
        raise AssertionError("the teacher is read again")

    ReferencePass._read = read


def mean_kl(files, count, temperature):
    """KL of the base from the teacher over all trained tokens, from the models' logits in float64."""
    documents = load_documents(files / "rows.jsonl", load_tokenizer("bytes", 256), 256)
    models = [RWKV.load(files / f"{name}.pth", torch.float64) for name in ("base", "teacher")]
    found = []
    for document in documents:
        ids = torch.from_numpy(document.ids.astype(np.int64))
        trained = torch.from_numpy(document.weights[1:] != 0)
        with torch.no_grad():
            logits = [model(ids[None, :-1])[0][0][trained] for model in models]
        found.append(kl_of_classes(*logits, count, temperature))
    return torch.cat(found).mean().item()


def test_a_run_begins_at_the_kl_of_the_two_models_and_brings_it_down(files, tmp_path):
    """All documents in each step, packed and in chunks. ln p in fp16 is exact to 1e-3 of the KL."""
    flags = ["--packing", "1", "--ctx_len", "256", "--chunk_ctx", "32", "--micro_bsz", "16"]
    flags += ["--distill_top", "5", "--distill_temperature", "2", "--distill_mix", "1"]
    output = start(files, tmp_path / "run", *flags)
    assert "its 5 likeliest tokens of 256 at each trained token take 22 bytes" in output
    assert "distill, 0 x the cross entropy + 1 x T^2 x the KL from teacher.pth, T 2" in output
    found = [line["kl"] for line in lines(tmp_path / "run")]
    assert found[0] == pytest.approx(mean_kl(files, 5, 2.0), rel=1e-3)
    assert found[2] < found[1] < found[0]


@pytest.fixture(scope="module")
def whole(files):
    """The folder of a run of three steps on four documents each."""
    start(files, files / "whole")
    return files / "whole"


def test_a_later_run_begins_without_a_pass(files, tmp_path, whole):
    """With another batch: the teacher's values do not depend on it."""
    batch = ["--micro_bsz", "1", "--accumulate_grad_batches", "4"]
    assert "in all; they are kept in --data_cache" in start(
        files, tmp_path / "parts", *batch, sabotage=no_pass
    )
    same_lines(lines(tmp_path / "parts"), lines(whole))


def test_with_a_mix_of_0_a_run_is_the_supervised_one_in_every_bit(files, tmp_path, whole):
    start(files, tmp_path / "distill", "--distill_mix", "0", sabotage=no_pass)
    start(files, tmp_path / "sft", "--loss", "sft")
    same_adapters(tmp_path / "distill", tmp_path / "sft", ratio=0)
    found = lines(tmp_path / "distill")
    assert [line["loss"] for line in found] == pytest.approx(program.losses(tmp_path / "sft"), rel=1e-6)
    assert all(line["kl"] > 0 for line in found)


def test_where_documents_share_no_rows_the_teacher_reads_none_that_are_longer(files):
    """And as a frozen base is read, also where all of the student is trained."""
    flags = ["--load_model", str(files / "base.pth"), "--data_file", "rows.jsonl", "--loss", "distill"]
    flags += ["--reference", str(files / "teacher.pth"), "--peft", "none", "--precision", "bf16"]
    flags += ["--ctx_len", "4096", "--packing"]
    apart, together = (parse([*flags, packing]) for packing in "01")
    documents = documents_with_values([6, 4, 9], 67, 3)
    values = TokenValues(LOG_PROB, None, as_in_steps=False)
    assert [longest_row(config, values, documents) for config in (apart, together)] == [8, 4096]
    assert longest_row(apart, LOG_PROBS, documents) == 4096, "those of the run's own evaluations"
    assert {p.dtype for p in build_reference(apart).parameters()} == {torch.bfloat16}


def test_the_plan_has_the_values_of_a_teacher_in_memory_and_in_the_pass_twice(files):
    flags = ["--load_model", "x.pth", "--data_file", "x.jsonl", "--loss", "distill", "--micro_bsz", "1"]
    config = parse(
        [*flags, "--grad_cp", "0", "--peft_config", "r=4", "--reference", str(files / "teacher.pth")]
    )
    arch, kind = make_arch(7, vocab_size=256), ("cpu", "cpu", "fp32", 32, 32)
    none, many = (memory_parts(arch, config, *kind, values=size) for size in (0, 10**9))
    rest = {"values", "reference"}
    assert {**many, **dict.fromkeys(rest)} == {**none, **dict.fromkeys(rest)} and "values" not in none
    assert many["values"] == 10**9 and many["reference"] > 0.9e9
    assert "values" not in memory_parts(arch, config, "gpu", "cuda", "fp32", 32, 32, values=10**9)


def test_a_teacher_that_is_missing_or_has_other_tokens_is_refused(files, tmp_path):
    needed = ["--load_model", str(files / "base.pth"), "--data_file", "rows.jsonl", "--loss", "distill"]
    save_base(tmp_path / "other.pth", vocab_size=300)
    needed += ["--reference", str(tmp_path / "other.pth"), "--tokenizer", "bytes"]
    new = "--peft none --version x070 --n_layer 2 --n_embd 64 --vocab_size 256".split()
    for flags in (needed, [*needed[2:], *new]):
        with pytest.raises(UserError, match="has a vocabulary of 300 tokens, .* one of 256"):
            read_base(Draft(parse(flags)))
