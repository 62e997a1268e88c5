"""Runs on preferences: the first loss, its reference, and rows that change nothing. Resumed runs are in
test_equal_runs.py.
"""

import functools
import itertools
import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rwkv_miss
from src.common.batch import Batch
from src.distributed.process_group import ALONE, Processes
from src.model import RWKV
from src.sources import reference_blocks
from src.sources.base import PromptReading
from src.sources.pairs.kto_baseline import baseline
from src.sources.pairs.source import PairSource
from src.sources.policy import Policy
from src.sources.reference_model import a_few
from src.sources.reference_pass import ReferencePass

from . import program
from .conftest import make_arch, random_tensors, read_rows, save_base, slow, write_rows
from .program import at_file, call, interrupt, kill, lines, same_adapters, same_lines, spoil, succeed

EXAMPLES = 12  # pairs or answers to train on, of which a step has 4
LN_2 = float(-F.logsigmoid(torch.zeros(())))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and another model, whose width the rank does not divide, and pairs and labelled answers."""
    folder = tmp_path_factory.mktemp("preferences")
    for seed, name in enumerate(("base", "other")):
        save_base(folder / f"{name}.pth", seed=seed, n_embd=40, head_size=8)
    rng = random.Random(0)

    def text():
        return "".join(rng.choices("abc d", k=rng.choice([1, 2, 3, 5, 17])))

    for name, count in (("rows", EXAMPLES), ("held", 5)):
        prompts = [name[0] + text() for _ in range(count)]
        pairs = [{"prompt": p, "chosen": text() + "!", "rejected": text() + "?"} for p in prompts]
        answers = [{"prompt": p, "completion": text(), "label": i % 3 > 0} for i, p in enumerate(prompts)]
        for kind, rows in (("pairs", pairs), ("answers", answers)):
            write_rows(folder / f"{kind}-{name}.jsonl", rows)
    return folder


def flags_of(files, proj_dir, *flags):
    given = dict(itertools.zip_longest(flags[::2], flags[1::2]))
    kind = "answers" if given.get("--loss") == "kto" else "pairs"
    common = {
        "--load_model": files / "base.pth",
        "--data_file": files / f"{kind}-rows.jsonl",
        "--proj_dir": proj_dir,
        "--tokenizer": "bytes",
        "--accelerator": "cpu",
        "--loss": "dpo",
        "--lr_init": "1e-2",
        "--adam_eps": "1e-3",  # keeps Adam from blowing up a gradient near zero
        "--peft_config": "r=7",
        "--packing": "0",
        "--ctx_len": "128",
        "--micro_bsz": "4",
        "--epoch_count": "1",
        "--data_cache": proj_dir.parent / "cache",
    }
    return [str(word) for pair in (common | given).items() for word in pair]


def start(files, proj_dir, *flags, sabotage=None):
    return succeed(program.run(flags_of(files, proj_dir, *flags), sabotage))


@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_the_first_loss_is_ln_2_in_every_bit(files, tmp_path, kernel):
    """In rows that several pairs share; held-out ones too."""
    held = ["--eval_file", files / "pairs-held.jsonl", "--eval_samples", "0"]
    start(files, tmp_path / "run", "--sft_weight", "0", "--wkv", kernel, "--packing", "1", "--ctx_len", "300",
          "--micro_bsz", "1", *held)  # fmt: skip
    first, before = lines(tmp_path / "run")[0], lines(tmp_path / "run", "validation.jsonl")[0]
    assert first["loss"] == LN_2 and before["loss"] == math.log(2)  # the steps' losses are fp32
    assert before["kl"] == 0.0
    for line in (first, before):
        assert line["margin"] == line["reward_chosen"] == line["reward_rejected"] == 0.0
        assert line["reward_accuracy"] == 0.5, "a tie counts as half"


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """loss -> the folder of a run of three steps on four examples each, in one process; each is made once."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def run(loss):
        apart = functools.partial(read_prompts, False)
        start(files, folder / loss, *evaluated(files, loss), sabotage=apart)
        return folder / loss

    return run


def evaluated(files, loss):
    """Flags of a loss, with all held-out data."""
    held = files / f"{'answers' if loss == 'kto' else 'pairs'}-held.jsonl"
    return ["--loss", loss, "--eval_file", held, "--eval_docs", "5", "--eval_samples", "0"]


def same_runs(proj_dir, want, rel=1e-5, ratio=1e-4):
    same_lines(lines(proj_dir), lines(want), rel)
    same_lines(lines(proj_dir, "validation.jsonl"), lines(want, "validation.jsonl"), rel)
    same_adapters(proj_dir, want, ratio)


@pytest.mark.parametrize("loss, rows", [("dpo", "pairs"), ("kto", "answers")])
def test_scripts_evaluate_says_the_same_of_the_held_out_data(files, whole, loss, rows):
    """The script makes its own batches, and has the adapter on or off where the training stored values."""
    run = whole(loss)
    wanted = lines(run, "validation.jsonl")[-1]
    assert wanted["units"] == 5, "all of them"
    flags = ["--model", files / "base.pth", "--adapter", run / "adapter.pth"]
    flags += ["--preferences", files / f"{rows}-held.jsonl"]
    found = json.loads(succeed(call(["-m", "scripts.evaluate", *map(str, flags)])).splitlines()[-1])
    names = wanted.keys() - {"step", "loss", "tokens", "units", "samples", "kl"}
    assert {"nll", "logp_chosen", "logp_rejected", "margin", "reward_accuracy"} <= names
    for name in names:
        assert found[name] == pytest.approx(wanted[name], rel=1e-6, abs=1e-6), name


def test_rows_that_several_pairs_share_make_the_same_steps(files, tmp_path):
    """All pairs in every step, alone in their rows, or packed."""
    for name, packing, ctx_len in (("alone", "0", "128"), ("packed", "1", "200")):
        start(files, tmp_path / name, "--packing", packing, "--ctx_len", ctx_len,
              "--micro_bsz", str(EXAMPLES), "--epoch_count", "3")  # fmt: skip
    rows = [len(set(line["tokens"] for line in lines(tmp_path / name))) for name in ("alone", "packed")]
    assert rows == [1, 1], "every step has all of them"
    same_lines(lines(tmp_path / "packed"), lines(tmp_path / "alone"))


def read_prompts(once, rank):
    PairSource.prompt_reading = lambda *_: PromptReading(once)


@pytest.mark.parametrize("strategy", ["auto", pytest.param("deepspeed_stage_3", marks=pytest.mark.rare)])
def test_prompts_that_are_read_once_make_the_same_steps(files, tmp_path, whole, strategy):
    """Two processes share the pairs, too. In the run that is compared each answer has its own prompt."""
    two = [] if strategy == "auto" else ["--devices", "2", "--micro_bsz", "2", "--strategy", strategy]
    once = functools.partial(read_prompts, True)
    start(files, tmp_path / "run", *evaluated(files, "dpo"), *two, sabotage=once)
    same_runs(tmp_path / "run", whole("dpo"))
    first = lines(tmp_path / "run")[0]
    assert first["margin"] == 0, "the reference read them in the same way"


def test_rows_in_chunks_make_the_same_steps(files, tmp_path, whole):
    start(files, tmp_path / "run", *evaluated(files, "dpo"), "--chunk_ctx", "16")
    same_runs(tmp_path / "run", whole("dpo"))


def counting(path, turn, end, rank):
    """Every block at once; a line for every turn that is read, and end() before turn `turn` is read."""
    reference_blocks.PAUSE = reference_blocks.PAUSE_SHARE = -1.0
    read = ReferencePass._read

    def counted(self, *args):
        with open(path, "a") as file:
            file.write("read\n")
        if len(path.read_text().splitlines()) == turn:
            end()
        return read(self, *args)

    ReferencePass._read = counted


@pytest.mark.parametrize("cache, end, code", [("none", kill, -9), slow("folder", interrupt, 130)])
def test_a_pass_of_the_reference_resumes_where_it_ended(files, tmp_path, whole, cache, end, code):
    """3 turns of the training data and one of the held-out ones; another run with the same takes them all.

    Ctrl-C and a kill are alike.
    """
    read, proj_dir = tmp_path / "read", tmp_path / "run"
    flags = [*evaluated(files, "dpo"), "--data_cache", cache if cache == "none" else tmp_path / cache]
    ended, _ = program.run(flags_of(files, proj_dir, *flags), functools.partial(counting, read, 3, end))
    assert ended == code and not (proj_dir / "metrics.jsonl").exists()
    start(files, proj_dir, *flags, sabotage=functools.partial(counting, read, 0, end))
    # the one that it died in, and the one before, whose values were on their way
    assert len(read.read_text().splitlines()) == 3 + 2 + 1
    same_runs(proj_dir, whole("dpo"), rel=0, ratio=0)
    if cache == "folder":
        start(files, tmp_path / "again", *flags, sabotage=functools.partial(counting, read, 1, end))
        assert len(read.read_text().splitlines()) == 6
        same_runs(tmp_path / "again", whole("dpo"), rel=0, ratio=0)


def write_every_block(rank):
    reference_blocks.PAUSE = reference_blocks.PAUSE_SHARE = -1.0


def test_values_that_are_not_finite_are_not_kept(files, tmp_path):
    """A reference that has no number for one byte, of one pair; then a cache that somebody else filled."""
    tensors = random_tensors(make_arch(7, vocab_size=256, n_embd=40, head_size=8))
    tensors["emb.weight"][ord("Z")] = 3e38  # a layer norm finds no variance here
    torch.save(tensors, tmp_path / "broken.pth")
    rows = (files / "pairs-rows.jsonl").read_text().splitlines()
    rows[6] = rows[6].replace("!", "Z!")
    (tmp_path / "rows.jsonl").write_text("\n".join(["", *rows]))  # an empty line counts, too
    flags = ["--reference", tmp_path / "broken.pth", "--data_file", tmp_path / "rows.jsonl"]
    flags = flags_of(files, tmp_path / "run", *flags)
    code, output = program.run(flags, write_every_block)
    assert code == 2 and "broken.pth, gives ln p that is not finite for the pair of line or row 8" in output
    (folder,) = (tmp_path / "cache").glob("*/lock")
    assert [path.name for path in folder.parent.iterdir()] == ["lock"]
    np.full(9_999, math.nan, np.float32).tofile(folder.parent / f"{0:012d}")
    code, output = program.run(flags)
    assert code == 2 and "not finite for the pair of line or row" in output and "Traceback" not in output
    assert [path.name for path in folder.parent.iterdir()] == ["lock"]


def test_values_of_training_data_are_not_taken_for_those_of_held_out_data(files, tmp_path):
    """A training reads its examples in another order than an evaluation. What is old leaves the cache."""
    old = tmp_path / "cache" / ("0" * 24)
    old.mkdir(parents=True)
    os.utime(old, (0, 0))
    for trained, held in (("rows", "held"), ("held", "rows")):
        data = ["--data_file", files / f"pairs-{trained}.jsonl", "--eval_file", files / f"pairs-{held}.jsonl"]
        start(files, tmp_path / trained, *data, "--eval_docs", str(EXAMPLES), "--eval_samples", "0")
        for name in ("metrics.jsonl", "validation.jsonl"):
            assert lines(tmp_path / trained, name)[0]["margin"] == 0, (trained, name)
    assert not old.exists()


def test_a_baseline_is_of_all_answers_and_not_below_0():
    """Micro-batches, one of them without an answer, and another process with 2 answers that moved by -1."""
    other = Processes(2, 0, lambda sums: sums + torch.tensor([-1.0, 2.0]))
    moved, cpu = torch.tensor([0.5, 1.0, -0.25]), torch.device("cpu")
    answers = Batch(reference=torch.full_like(moved, -2.0), chosen=torch.tensor([True, False]))
    batches = [answers, Batch(chosen=torch.zeros(0, dtype=torch.bool))]

    def log_probs(batch):
        return moved - 2 if len(batch.chosen) else torch.zeros(0)

    assert baseline(batches, Policy(log_probs, ALONE, None, None, cpu)) == 1.25 / 2
    assert baseline(batches, Policy(log_probs, other, None, None, cpu)) == 0.25 / 4
    moved.neg_()
    assert baseline(batches, Policy(log_probs, other, None, None, cpu)) == 0


def test_a_nan_undoes_the_steps_that_led_to_it(files, tmp_path):
    """A NaN in step 2: step 3 is as if these two had moved nothing."""
    start(files, tmp_path / "left-out", sabotage=spoil("update", [0, 1]))
    spoiled = spoil("loss", [1])
    output = start(files, tmp_path / "run", "--rollback_steps", "1", sabotage=spoiled)
    assert "the loss is nan at step 2; back to the state of step 0, and on with step 3" in output, output
    want, got = lines(tmp_path / "left-out"), lines(tmp_path / "run")
    assert got[1]["loss"] is None
    same_lines([got[0], got[2]], [want[0], want[2]])
    same_adapters(tmp_path / "run", tmp_path / "left-out")


def test_the_base_as_reference_file_is_the_base(files, tmp_path, whole):
    start(files, tmp_path / "run", *evaluated(files, "dpo"), "--reference", files / "base.pth")
    same_runs(tmp_path / "run", whole("dpo"), rel=0, ratio=0)


def table_of(model, prompt, answer):
    """ln p of all tokens at the places of an answer's, (t, V), and the answer's tokens, (t,)."""
    ids = torch.tensor([list(f"{prompt}{answer}".encode()) + [0]])
    with torch.no_grad():
        table = F.log_softmax(model(ids[:, :-1])[0][0], -1)
    return table[-len(answer) - 1 :], ids[0, -len(answer) - 1 :]


def log_p(path, prompt, answer):
    """ln p of an answer's tokens, by the whole logits in float64."""
    table, ids = table_of(RWKV.load(path, torch.float64), prompt, answer)
    return table.gather(-1, ids[:, None])[:, 0]


def kl_by_hand(files, model, reference):
    """Mean KL(model || reference) over the tokens of all held-out answers, in float64."""
    rows = read_rows(files / "pairs-held.jsonl")
    answers = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    moved = []
    for answer in answers:
        ours, theirs = (table_of(each, *answer)[0] for each in (model, reference))
        moved.append((ours.exp() * (ours - theirs)).sum(-1))
    return float(torch.cat(moved).mean())


def test_the_kl_of_an_evaluation_is_over_the_whole_vocabulary(files, whole):
    """All five held-out pairs are looked at."""
    tuned, base = (RWKV.load(files / "base.pth", torch.float64) for _ in range(2))
    rwkv_miss.load_adapter(tuned, whole("dpo") / "adapter.pth")
    before, after = (lines(whole("dpo"), "validation.jsonl")[i]["kl"] for i in (0, -1))
    assert before == 0 and 1e-4 < after == pytest.approx(kl_by_hand(files, tuned, base), rel=1e-4)
    assert not any("kl" in line for line in lines(whole("dpo")))


def test_a_head_that_zero_shares_out_is_the_bases_too(files, tmp_path):
    flags = ["--peft_config", '{"r": 7, "targets": ["head", "key"]}', "--strategy", "deepspeed_stage_3"]
    start(files, tmp_path / "run", *evaluated(files, "dpo"), *flags, "--epoch_steps", "1")
    tuned, base = (RWKV.load(files / "base.pth", torch.float64) for _ in range(2))
    rwkv_miss.load_adapter(tuned, tmp_path / "run" / "adapter.pth")
    before, after = lines(tmp_path / "run", "validation.jsonl")
    assert before["kl"] == 0 and after["kl"] == pytest.approx(kl_by_hand(files, tuned, base), rel=1e-3)


class Long(list):
    """Examples by their lengths."""

    def take(self, places):
        return [int(place) for place in places]

    @property
    def lengths(self):
        return np.array(self)


def test_a_kl_looks_at_a_few_examples_at_equal_distances():
    for lengths, places in (
        ([9] * 5, [0, 1, 2, 3, 4]),
        ([9] * 99, [0, 14, 28, 42, 56, 70, 84, 98]),
        ([1500] * 99, [0, 14]),
        ([9999] * 3, [0]),
    ):
        assert a_few(Long(lengths)) == places


def test_a_run_resumes_with_the_same_reference_only(files, tmp_path):
    reference, proj_dir = tmp_path / "reference.pth", tmp_path / "run"
    shutil.copy(files / "other.pth", reference)
    flags = flags_of(files, proj_dir, "--reference", reference, "--epoch_steps", "1")
    succeed(program.run(flags))
    shutil.copy(files / "base.pth", reference)
    code, output = program.run([*flags, "--resume", "auto", "--epoch_count", "2"])
    assert code == 2 and "the model of --reference is not the one that the run began with" in output


@pytest.mark.parametrize("strategy", ["auto", slow("deepspeed_stage_3")])
def test_the_first_loss_against_another_reference(files, tmp_path, strategy):
    """The first loss is the formula's, in float64, over all pairs."""
    flags = ["--micro_bsz", str(EXAMPLES), "--reference", files / "other.pth", "--strategy", strategy]
    start(files, tmp_path / "run", *flags, *evaluated(files, "dpo"))
    margins, nll = [], []
    for row in read_rows(files / "pairs-rows.jsonl"):
        base, other = (
            [log_p(files / f"{name}.pth", row["prompt"], row[side]) for side in ("chosen", "rejected")]
            for name in ("base", "other")
        )
        margins.append(sum((-1) ** i * float((b - o).sum()) for i, (b, o) in enumerate(zip(base, other))))
        nll.append(-float(base[0].mean()))
    want = sum(math.log1p(math.exp(-0.1 * m)) + n for m, n in zip(margins, nll)) / EXAMPLES
    first = lines(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(want, rel=1e-5)
    assert first["margin"] == pytest.approx(0.1 * sum(margins) / EXAMPLES, rel=1e-4)
    models = (RWKV.load(files / f"{name}.pth", torch.float64) for name in ("base", "other"))
    before = lines(tmp_path / "run", "validation.jsonl")[0]
    assert before["kl"] == pytest.approx(kl_by_hand(files, *models), rel=1e-4)


@pytest.mark.parametrize("method", [slow(["--peft", "none", "--lr_init", "1e-4"]), ["--peft", "state"]])
def test_whole_tensors_and_a_state_are_compared_with_their_beginning(files, tmp_path, method):
    """Also in a resumed run that has lost the values. A trained head rounds otherwise with a gradient."""
    flags = ["--peft_config", "{}", *method, "--save_steps", "1", "--sft_weight", "0", "--data_cache", "none"]
    flags += evaluated(files, "dpo")
    start(files, tmp_path / "run", *flags)
    assert lines(tmp_path / "run")[0]["loss"] == pytest.approx(LN_2, rel=1e-6)
    before, after = (lines(tmp_path / "run", "validation.jsonl")[i]["kl"] for i in (0, -1))
    assert before == 0 and after > 1e-5
    if method[1] == "none":
        models = (RWKV.load(path, torch.float64) for path in (tmp_path / "run/model.pth", files / "base.pth"))
        assert after == pytest.approx(kl_by_hand(files, *models), rel=1e-3)
    proj_dir = tmp_path / "killed"
    code, _ = program.run(
        flags_of(files, proj_dir, *flags), at_file("checkpoints/step-00000002", 2, proj_dir, kill)
    )
    assert code == -9
    for kept in (proj_dir / "reference").glob("*/0*"):
        kept.unlink()
    start(files, proj_dir, *flags, "--resume", "auto")
    for name in ("metrics.jsonl", "validation.jsonl"):
        same_lines(lines(proj_dir, name), lines(tmp_path / "run", name), rel=0)
