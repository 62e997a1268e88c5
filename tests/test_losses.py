"""The contract of a loss, for every loss of src/losses: what the trainer, the plan and the reports rely on.

The formulas themselves are in test_preference_loss, test_grpo_loss, test_distillation, test_on_policy and
test_loss; a resumed run in test_equal_runs.
"""

import contextlib
import dataclasses
import types

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_miss.errors import UserError
from src.common.batch import Batch, Reads
from src.config import AUTO, FIELDS, Config, parse
from src.config.schema import type_of
from src.data.answer_batches import GROUP, PREFERENCE, collate_answers
from src.data.answer_example import AnswerGroup
from src.data.collate import collate, row_by_row
from src.data.file_documents import Document
from src.data.preferences import Preference
from src.losses import LOSSES, Loss, loss_of, options_of
from src.model.batch_loss import Chunks
from src.model.loss import top_of
from src.planning.defaults import choose_loss
from src.planning.draft import Draft
from src.planning.step_memory import step_bytes, without_values
from src.sources import source_of
from src.sources.base import Source

from .conftest import ROOT, make_arch
from .loss_cases import make_model

VOCAB, TEACHER_WIDTH, TOP = 67, 24, 3
SIZES = [(3, (5, 2)), (1, (4, 4)), (9, (7, 1)), (4, (3, 6))]  # tokens of a prompt and its answers, by example
PACKED, ALONE = ((0, 1), (2,), (3,)), ((3,), (0,), (2,), (1,))  # the examples of each row
# options without which a part of the loss would not be there
GIVEN = {
    "distill": {"distill_top": TOP},
    "grpo": {"beta": 0.04, "inner_steps": 2, "max_tokens": 9},
    "distill_on_policy": {"max_tokens": 9},
}
METHODS = (types.FunctionType, property, classmethod)
each_loss = pytest.mark.parametrize("name", LOSSES)


def settled(name):
    """The loss with the options that a run of it has."""
    draft = Draft(Config(loss=name, **GIVEN.get(name, {})))
    choose_loss(draft)
    return loss_of(draft.config)


def example(source, seed, prompt, answers):
    """Random tokens: documents, or answers to a prompt."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(VOCAB, size=count).tolist() for count in answers]
    advantage, drawn = rng.normal(size=2).tolist(), [-3 * rng.random(count) for count in answers]
    group = AnswerGroup.of(rng.integers(VOCAB, size=prompt), tokens, advantage, drawn)
    if source == "questions":
        return group
    if source == "documents":
        return [Document(one.ids, rng.choice([0, 0.5, 2], len(one.ids))) for one in group.answers]
    chosen = [True, False] if source == "pairs" else [advantage[0] > 0]
    return Preference(group.answers[: len(chosen)], chosen)


def collated(loss, rows, chunk=0, shared=False):
    """The batch of these rows, before a reference or a teacher has read it."""
    found = [[example(loss.data, i, *SIZES[i]) for i in row] for row in rows]
    if loss.data == "documents":
        return collate([[one for documents in row for one in documents] for row in found], 1.0, chunk)
    return collate_answers(found, 1.0, chunk, shared, GROUP if loss.data == "questions" else PREFERENCE)


def batch_of(loss, rows=PACKED, chunk=0, shared=False):
    """Collate the rows in float64, with what other models have said of each token."""
    batch = collated(loss, rows, chunk, shared)
    order = np.argsort(row_by_row(batch))

    def said(width):
        parts = [
            np.random.default_rng([width, i]).normal(size=(len(collated(loss, [[i]]).targets), width))
            for row in rows
            for i in row
        ]
        return torch.from_numpy(np.concatenate([np.empty((0, width)), *parts])[order])

    names, models = loss.reads().names, {"reference": 1, "old": 2}
    found = {name: -said(size)[:, 0].abs() for name, size in models.items() if name in names}
    if "teacher" in names:
        found["teacher"] = top_of(3 * said(VOCAB), TOP, 2.0)
    if loss.name == "distill_on_policy":
        head = np.random.default_rng(0).normal(size=(VOCAB, TEACHER_WIDTH))
        found |= {"teacher": said(TEACHER_WIDTH), "teacher_head": torch.from_numpy(head)}
    batch = batch.having(baseline=0.25, **found)
    return batch.having(**{k: v.double() for k, v in batch.tensors().items() if v.is_floating_point()})


def results(loss, model, batch, chunk=0):
    """(the loss, its sums, the gradient of all that is trained)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    value, sums = loss(model, batch, Chunks(chunk))
    gradients = torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
    return value.detach(), sums, torch.cat([gradient.flatten() for gradient in gradients])


def test_a_source_without_a_file_is_named(monkeypatch):
    monkeypatch.setattr(LOSSES["sft"], "source", "no_such_file")
    with pytest.raises(UserError, match="--loss sft names a source without a file: src.sources.no_such_file"):
        source_of(Config())


@each_loss
def test_the_gradient_is_that_of_the_loss(name):
    """Along a random direction, by central differences in float64. L2Wrap's gradient, at most 1e-4 of a
    logit, is in no loss: documents have it.
    """
    loss, model = settled(name), make_model(7)
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(loss)
    _, _, gradient = results(loss, model, batch)
    direction = torch.randn(len(gradient), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = (direction + 30 * gradient / gradient.norm()) / 30  # not across it
    start, values = torch.nn.utils.parameters_to_vector(trained).detach(), []
    for step in (1e-5, -1e-5):
        torch.nn.utils.vector_to_parameters(start + step * direction, trained)
        with torch.no_grad():
            values.append(loss(model, batch, Chunks())[0].item())
    slope = (values[0] - values[1]) / 2e-5
    allowed = 1e-3 if loss.data == "documents" else 1e-6
    assert slope == pytest.approx((direction @ gradient).item(), rel=allowed) and gradient.norm() > 0.01


@each_loss
@pytest.mark.parametrize(
    "rows, chunk, shared",
    [(PACKED, 5, False), (PACKED, 8, False), (ALONE, 0, False), (ALONE, 0, True)],
    ids=["chunks of 5", "chunks of 8", "a row each", "shared prompts"],
)
def test_chunks_rows_and_shared_prompts_change_nothing(name, rows, chunk, shared):
    loss, model = settled(name), make_model(7)
    if shared and loss.data in ("documents", "labels"):
        return
    want = results(loss, model, batch_of(loss))
    got = results(loss, model, batch_of(loss, rows, chunk, shared), chunk)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@each_loss
def test_micro_batches_add_up_to_the_step(name):
    loss, model = settled(name), make_model(7)
    value, sums, gradient = results(loss, model, batch_of(loss))
    parts = [results(loss, model, batch_of(loss, rows)) for rows in (PACKED[:1], (), PACKED[1:])]
    torch.testing.assert_close(sum(part[0] for part in parts), value, rtol=1e-10, atol=0)
    torch.testing.assert_close(sum(part[2] for part in parts), gradient, rtol=1e-9, atol=1e-11)
    if len(sums):
        joined = loss.joined(loss.joined(parts[0][1], parts[1][1]), parts[2][1])
        torch.testing.assert_close(joined, sums, rtol=1e-10, atol=1e-11)
        assert sums.dtype == torch.float64 and not sums.requires_grad and loss.means(sums.tolist())
    with torch.no_grad():
        reported = loss.reported(value, sums)
        held_out, _ = loss.held_out(model, batch_of(loss), Chunks())
    assert reported.isfinite() and held_out.isfinite() and not reported.requires_grad


@each_loss
@pytest.mark.parametrize("chunk, shared", [(0, False), (5, False), (0, True)])
def test_the_plans_batch_of_zeros_is_a_collated_batch(name, chunk, shared):
    """In dtype and in bytes: of each entry that the loss reads."""
    loss = settled(name)
    if shared and loss.data in ("documents", "labels"):
        return
    batch, reads = batch_of(loss, chunk=chunk, shared=shared), loss.reads()
    if name == "distill_on_policy":  # the source of this loss knows the teacher's sizes
        reads = Reads(("teacher", "teacher_head"), 0, TEACHER_WIDTH, VOCAB)
    names = ["ids", "where", "targets", *(["prompts", "prompt_of", "prompt_reset"] if shared else ["reset"])]
    sizes = {"trained": len(batch.targets), "rows": len(batch.ids), "width": batch.ids.shape[1]}
    answers = batch.chosen if batch.advantage is None else batch.advantage
    sizes["answers"] = 0 if answers is None else len(answers)
    if shared:
        sizes |= {"prompts": len(batch.prompts), "prompt": batch.prompts.shape[1]}
    zeros = Batch.zeros(names, sizes, reads, chunk=chunk).tensors()
    found = {key: value for key, value in batch.tensors().items() if key in zeros}
    assert found.keys() == zeros.keys() and {*reads.names} <= zeros.keys()
    for key, value in found.items():
        dtype = torch.float32 if value.is_floating_point() else value.dtype  # batch_of() has made it wider
        assert (zeros[key].shape, zeros[key].dtype) == (value.shape, dtype), key


@each_loss
def test_the_plan_counts_a_step(name):
    """On tensors without values; a size that depends on one is an error with the loss's name."""
    given = {**GIVEN.get(name, {}), "reference": str(ROOT / "demo/rwkv7-reverse.pth")}
    options = {field.name for field in dataclasses.fields(LOSSES[name].Options)}
    config = Config(loss=name, **{key: value for key, value in given.items() if key in options}, micro_bsz=2)
    draft = Draft(config)
    choose_loss(draft)
    config = dataclasses.replace(
        draft.config, precision="fp32", accelerator="cpu", grad_cp=0, peft_config={"r": 4}
    )
    found = step_bytes(make_arch(7, vocab_size=256), config, "torch", "fp32", 32, 20)
    assert found.peak > found.activations > 0


def test_a_loss_whose_sizes_depend_on_values_is_named():
    with FakeTensorMode(), pytest.raises(TypeError, match="^--loss own: a size depends on a tensor's value"):
        with without_values("own"):
            torch.ones(3).nonzero()


def other_value(option):
    """A value of an option that is not its default, as the command line has it."""
    meta, kind = FIELDS[option].metadata, type_of(option)
    if meta["choices"]:
        return next(choice for choice in meta["choices"] if choice not in (meta["written"], "auto"))
    if kind is dict:
        return "number=1"
    if kind is str:
        return "other.pth"
    bounds = meta["bounds"]
    usual = 0 if meta["written"] in (-1, -1.0) else meta["written"]
    high = min(usual + 3, (bounds.high or 1e30) / 2, (bounds.below or 1e30) / 2)
    return f"{kind(high):g}"


@pytest.mark.parametrize("option", options_of())
@each_loss
def test_an_option_belongs_to_its_losses_and_is_refused_elsewhere(name, option):
    value = other_value(option)
    flags = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--loss", name, f"--{option}", value]
    if LOSSES[name].needs_teacher and option != "reference":
        flags += ["--reference", "big.pth"]
    if name in options_of()[option][1]:
        with contextlib.suppress(UserError):  # an option that needs others, see test_reward_settings.py
            assert str(parse(flags).written(option)).removesuffix(".0") in (value, "{'number': 1}")
        return
    with pytest.raises(UserError) as caught:
        parse(flags)
    said = str(caught.value)
    assert said.startswith(f"--{option} {value}") and said.endswith("drop it, or choose another --loss")
    assert f"has no meaning with --loss {name}: it is for {', '.join(options_of()[option][1])}" in said


@each_loss
def test_a_loss_explains_itself(name):
    loss = settled(name)
    described = dataclasses.replace(loss.options, **({"reference": "big.pth"} if loss.needs_teacher else {}))
    assert LOSSES[name](described).description.startswith("" if name == "sft" else name)
    assert loss.about[0].islower() and not loss.about.startswith("the same") and loss.about[-1] != "."
    assert AUTO not in dataclasses.astuple(loss.options), "all that is left to the program is chosen"
    assert loss.metrics.titles and loss.facts.usual_rows > 0 and loss.words.example


@pytest.mark.parametrize("of, most", [(Loss, 12), (Source, 20)])
def test_interfaces_stay_small(of, most):
    """A method more is a question to every loss or source: one that is there goes first."""
    assert sum(isinstance(value, METHODS) for value in vars(of).values()) <= most
