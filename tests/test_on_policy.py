"""On-policy distillation: the reverse KL and its gradient, a teacher during the steps, and whole runs."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from rwkv_miss.files.checkpoint import Arch
from src.config import parse
from src.data.tokenizer import load_tokenizer
from src.losses.distill_on_policy import WholeTeacher
from src.model import RWKV, rwkv
from src.model import loss as losses
from src.model.loss import head_loss
from src.planning.memory import memory_parts
from src.planning.step_memory import Live
from src.sources import source_of

from . import program
from .conftest import ROOT, read_rows, save_base, write_rows
from .loss_cases import VOCAB, adapted_head, head_inputs
from .program import lines, succeed

# as in test_distillation.py
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
TRL = json.loads((ROOT / "tests/fixtures/distillation_losses.json").read_text(encoding="utf-8"))


def reverse_kl(logits, teacher_logits, temperature):
    """KL(q || p) of each token in words of probabilities: logits (tokens, V) float64."""
    q, p = (logits / temperature).softmax(1), (teacher_logits / temperature).softmax(1)
    return (q * (q / p).log()).sum(1)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("trained, exact", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient(monkeypatch, dtype, trained, exact, temperature):
    """In blocks of 5 tokens, with weights, against all probabilities in float64."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 5 * VOCAB)
    x, weight, targets = head_inputs(13, dtype, trained)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(13, 7, generator=generator).to(dtype)
    head = torch.randn(VOCAB, 7, generator=generator).to(dtype)
    weights = 0.1 + torch.rand(13, generator=generator)
    leaves = [x, weight] if trained else [x]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    logits = doubles[0] @ (doubles[1] if trained else weight.double()).t()
    kl = reverse_kl(logits, inputs.double() @ head.double().t(), temperature)
    expected = temperature**2 * (kl * weights).sum()
    want = torch.autograd.grad(2.5 * expected, doubles)
    teacher = WholeTeacher(inputs, head, temperature)
    of = weights.to(torch.promote_types(dtype, torch.float32))
    got = head_loss(x, weight, targets, False, of, exact, teacher)
    assert got.item() == pytest.approx(expected.item(), rel=ROUNDING[dtype])
    for mine, theirs in zip(torch.autograd.grad(2.5 * got, leaves), want, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm()


def test_the_logits_of_all_tokens_are_never_there(monkeypatch):
    """Neither the model's nor the teacher's: there are the gradient of x and a few blocks of 4 tokens."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * VOCAB)
    x, weight, targets = head_inputs(512, torch.float32, False)
    teacher = WholeTeacher(torch.randn(512, 7), torch.randn(VOCAB, 7), 2.0)
    with Live([x, weight, targets, *teacher[:2]]) as live:
        head_loss(x, weight, targets, logit_loss=teacher).backward()
    assert 2 * x.nbytes <= live.peak < 2 * x.nbytes + 8 * 4 * VOCAB * 4, "with x.grad"


@pytest.mark.parametrize("case", TRL["reverse"], ids=lambda case: f"T {case['temperature']}")
def test_the_kl_is_that_of_trl(case):
    """GKD's loss at beta 1."""
    logits, teacher = (torch.tensor(TRL[name], dtype=torch.float64) for name in ("student", "teacher"))
    logits.requires_grad_()
    temperature = case["temperature"]
    one = torch.eye(teacher.shape[1], dtype=torch.float64)  # a head whose inputs are logits
    loss = WholeTeacher(teacher, one, temperature).sums(logits, None, None)
    assert loss.item() == pytest.approx(temperature**2 * case["kl"], rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    want = temperature**2 * torch.tensor(case["gradient"], dtype=torch.float64)
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


def test_an_adapted_head_has_the_loss_of_its_logits(monkeypatch):
    monkeypatch.setattr(rwkv, "LOGITS_AT_ONCE", 5 * 67)
    adapted, x, targets, leaves = adapted_head("lora", 13)
    teacher = WholeTeacher(torch.randn(13, 5), torch.randn(67, 5), 2.0)
    got = adapted.logit_sums(x, targets, None, teacher)
    logits, others = adapted.head(x), F.linear(teacher.numbers, teacher.head)
    want = 4.0 * reverse_kl(logits.double(), others.double(), 2.0).sum().float()
    torch.testing.assert_close(got, want)
    for pair in zip(*(torch.autograd.grad(loss, leaves) for loss in (got, want)), strict=True):
        torch.testing.assert_close(*pair, rtol=2e-5, atol=1e-6)


# whole runs; those that are resumed are in test_equal_runs.py


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, a teacher of another size, and questions; the held-out ones have no reference answers."""
    folder = tmp_path_factory.mktemp("on_policy")
    save_base(folder / "base.pth", n_embd=40, head_size=8)
    save_base(folder / "teacher.pth", seed=1, n_embd=64, n_layer=3, head_size=8)
    rng = random.Random(0)
    for name, count in (("rows", 12), ("held", 3)):
        prompts = [name[0] + "".join(rng.choices("abc ", k=rng.choice([1, 2, 9]))) for _ in range(count)]
        rows = [{"prompt": f"{prompt}{i}:", "completion": "-"} for i, prompt in enumerate(prompts)]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def flags_of(files, proj_dir, *flags):
    common = f"""
        --loss distill_on_policy --reference {files}/teacher.pth --eval_file {files}/held.jsonl --group_size 3
        --max_tokens 5 --adam_eps 1e-3 --peft_config r=7 --epoch_count 1 --eval_docs 3 --eval_samples 0
        --data_cache none
    """.split()
    return program.flags_of(files, proj_dir, *common, *flags)


def test_a_run_begins_at_the_kl_of_the_two_models_and_brings_it_down(files, tmp_path):
    """The first held-out loss is the KL on greedy answers, from the models' logits in float64."""
    models = [RWKV.load(files / f"{name}.pth", torch.float64) for name in ("base", "teacher")]
    tokenizer = load_tokenizer("bytes", 256)
    found = []
    for row in read_rows(files / "held.jsonl"):
        ids = tokenizer.encode(row["prompt"])
        begin = len(ids)
        while len(ids) < begin + 5 and (len(ids) == begin or ids[-1] != 0):
            with torch.no_grad():
                own, other = (model(torch.tensor([ids]))[0][0, -1:] for model in models)
            found.append(reverse_kl(own, other, 2.0))
            ids.append(own.argmax().item())
    succeed(program.run(flags_of(files, tmp_path, "--inner_steps", "2")))
    steps, evaluations = lines(tmp_path), lines(tmp_path, "validation.jsonl")
    assert evaluations[0]["loss"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)
    assert evaluations[-1]["loss"] < 0.9 * evaluations[0]["loss"]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
    assert "right_answers" not in evaluations[0], "there is no reference answer"
    assert not {"reward", "dead_groups", "engine_gap"} & steps[0].keys()


def test_the_plan_has_a_teacher_that_stays(files, tmp_path):
    """The teacher takes memory, and its pass over each draw is work."""
    flags = "--precision fp32 --grad_cp 0 --accumulate_grad_batches 1 --ctx_len 256 --wkv torch".split()
    config = parse(flags_of(files, tmp_path / "run", *flags))
    base, other = (Arch.detect(torch.load(files / f"{name}.pth")) for name in ("base", "teacher"))
    assert source_of(config).cost.reading == pytest.approx(1 / 3 * 3 * 64**2 / (2 * 40**2))
    weights = 4 * sum(p.numel() for p in RWKV(other).parameters())
    parts = memory_parts(base, config, "cpu", "torch", "fp32", 30, 60)
    assert weights <= parts["reference"] < weights + parts["activations"] + parts["working"]
