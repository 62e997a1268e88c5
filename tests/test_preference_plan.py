"""The plan of a run on preferences: what it says of the data and the loss, its time, and its memory."""

import dataclasses
import json
import re

import pytest
import torch

from scripts import plan
from src.config import Config
from src.data.answer_batches import collate_answers
from src.data.dataset import load
from src.data.encode import Encoder
from src.data.formats import PAIRS, Reading, Report
from src.data.tokenizer import load_tokenizer
from src.model import RWKV
from src.planning import memory
from src.planning.base_model import build_model
from src.planning.step_memory import step_bytes
from src.reporting.document_text import example_sample, short_example
from src.sources import source_of
from src.sources.estimates import SharedPrompts
from src.sources.pairs import source

from .conftest import make_arch, settled_config, write_rows
from .test_plan import SIZES, bytes_of_a_step

BYTES = Encoder(load_tokenizer("bytes", 256))

ROWS = [
    {"prompt": f"q{i}:", "chosen": "yes" * (i % 3 + 1), "rejected": "no" * (i % 4 + 1)} for i in range(40)
]


@pytest.fixture
def flags(checkpoint, tmp_path):
    equal, empty, long = (
        ROWS[0] | {"rejected": "yes"},
        ROWS[0] | {"chosen": ""},
        ROWS[0] | {"prompt": "q" * 30},
    )
    data, base = tmp_path / "pairs.jsonl", checkpoint(7, n_layer=2, n_embd=32, head_size=16, vocab_size=256)
    write_rows(data, [*ROWS, equal, empty, long])
    options = {
        "load_model": base,
        "data_file": data,
        "proj_dir": tmp_path / "run",
        "tokenizer": "bytes",
        "ctx_len": 48,
        "micro_bsz": 2,
        "accumulate_grad_batches": 1,
        "epoch_count": 3,
        "eval_split": 0.1,
        "eval_samples": 0,
        "eval_steps": 0,
        "lr_init": 0.001,
        "tokens_per_second": 10,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def planned(flags, capsys):
    assert plan.plan(*plan.parse([*flags, "--json"])) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    return "\n".join(shown), json.loads(last)


def test_the_plan_names_the_loss_and_what_is_left_out(flags, capsys, tmp_path):
    shown, _ = planned([*flags, "--loss", "dpo"], capsys)
    data = tmp_path / "pairs.jsonl"
    for words in (
        f"data       {data} (JSONL, 42 rows, prompt -> chosen / rejected): 36 pairs, ",
        f"left out: 1 pair of more than --ctx_len 48 tokens, both answers counted: {data}, line 43; 1 row in"
        f" which both answers are the same: {data}, line 41; 1 row in which an answer is empty: {data}, line"
        " 42\n",
        "loss       dpo, beta 0.1, log p summed, with 1 x the NLL of the chosen answer; reference: the base,"
        " adapter off, read once before step 1 and kept in --data_cache; about ",
        "evaluation loss on 4 of 4 held-out pairs",
    ):
        assert words in shown, shown
    assert "--sft_weight 0: nothing" not in shown
    shown, _ = planned([*flags, "--loss", "simpo", "--sft_weight", "0", "--data_cache", "none"], capsys)
    assert "; no reference; about" in shown
    assert "warning    --sft_weight 0: nothing keeps the chosen answers likely, and --loss simpo may" in shown


def test_the_time_has_the_pass_of_the_reference(flags, capsys, checkpoint):
    of = {loss: planned([*flags, "--loss", loss], capsys)[1] for loss in ("dpo", "simpo", "kto")}
    tokens = of["simpo"]["tokens"]  # tokens of 3 passes
    held_out = of["simpo"]["evaluation_seconds"] * 10 * 3 / 2  # two evaluations of a third of the work
    assert of["simpo"]["reference_seconds"] is None
    assert of["simpo"]["seconds"] == pytest.approx(tokens / 10 + of["simpo"]["evaluation_seconds"])
    assert of["dpo"]["reference_seconds"] == pytest.approx((tokens / 3 + held_out) / 3 / 10)
    assert of["dpo"]["seconds"] == pytest.approx(of["simpo"]["seconds"] + of["dpo"]["reference_seconds"])
    # every example is read with another prompt, too: by the reference, and before each step
    kto = of["kto"]
    assert kto["seconds"] == pytest.approx(
        kto["tokens"] / 10 * 4 / 3 + kto["reference_seconds"] + kto["evaluation_seconds"]
    )
    larger = checkpoint(7, name="larger.pth", n_layer=4, n_embd=64, head_size=16, vocab_size=256)
    shown, other = planned([*flags, "--loss", "dpo", "--reference", str(larger)], capsys)
    assert other["reference_seconds"] == pytest.approx(8 * of["dpo"]["reference_seconds"])
    assert "; reference: larger.pth, read once" in shown and " of the reference (as given)" in shown
    # the reference takes its parameters, but for what the step needs and the pass does not
    size = 4 * sum(p.numel() for p in RWKV.load(larger).parameters())
    of_step = sum(other["memory"][name] for name in ("gradients", "Adam", "rollback", "activations"))
    assert size - of_step - other["memory"]["working"] < other["memory"]["reference"] + 1e6
    assert "reference" not in of["dpo"]["memory"]
    # --layers counts the layers of the model in training, and a reference may have fewer
    few = checkpoint(7, name="few.pth", n_layer=1, n_embd=32, head_size=16, vocab_size=256)
    for more in ([], ["--layers", "1"]):
        _, smaller = planned([*flags, "--loss", "dpo", "--reference", str(few), *more], capsys)
        assert smaller["memory"]["reference"] >= 0


def test_prompts_that_are_read_once_take_less_time_and_memory(flags, capsys, monkeypatch, tmp_path):
    rows = [row | {"prompt": "p" * (10 + i % 3)} for i, row in enumerate(ROWS)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    shown, alone = planned([*flags, "--loss", "simpo"], capsys)
    assert "prompts    each answer is read after its own prompt: a prompt read once would make " in shown
    monkeypatch.setattr(source, "PASS_COST", {"cpu": 0, "gpu": 0})
    shown, once = planned([*flags, "--loss", "simpo"], capsys)
    found = re.search(
        r"prompts    a prompt is read once for both answers: (\d+) tokens .* place of (\d+),", shown
    )
    shared, separate = map(int, found.groups())
    assert 0.4 < shared / separate < 0.95
    # both are rounded
    assert once["seconds"] == pytest.approx(alone["seconds"] * shared / separate, rel=0.03)
    assert once["memory"]["activations"] < 0.95 * alone["memory"]["activations"]


def examples_of(tmp_path, rows):
    file = tmp_path / "examples.jsonl"
    write_rows(file, rows)
    report = Report("stop")
    return load(str(file), BYTES, "none", Reading(rows=PAIRS), report, 1).preferences(999)


def test_a_pair_is_shown_with_what_is_compared(tmp_path):
    [example] = examples_of(
        tmp_path, [{"prompt": "ask\n" + "q" * 90, "chosen": " yes", "rejected": " no" * 40}]
    )
    shown = short_example(example, BYTES.tokenizer)
    assert shown == f"... {'q' * 80}« yes␀» rather than «{' no' * 26} n ...»"
    text = example_sample(example, BYTES.tokenizer)
    assert text.splitlines()[0] == "    chosen:" and "    rejected:" in text and "« yes␀»" in text
    single = dataclasses.replace(example, answers=example.answers[:1], chosen=[False])
    assert short_example(single, BYTES.tokenizer).endswith("« yes␀» (not to be preferred)")


@pytest.mark.parametrize(
    "loss, peft, grad_cp, chunk, kernel",
    [
        ("dpo", "miss", 0, 0, "torch"),
        ("dpo", "miss", 0, "shared", "cpu"),
        ("simpo", "none", 0, 0, "cpu"),
        ("dpo", "miss", 2, 16, "cpu"),
    ],
)
def test_the_count_is_that_of_a_real_step(checkpoint, tmp_path, loss, peft, grad_cp, chunk, kernel):
    shared, chunk = (SharedPrompts(2, 6, 13), 0) if chunk == "shared" else (None, chunk)
    config = Config(
        load_model=str(checkpoint(7, **SIZES)),
        loss=loss,
        beta=0.1,
        sft_weight=1.0,
        peft=peft,
        peft_config={} if peft == "none" else {"r": 5},
        grad_cp=grad_cp,
        chunk_ctx=chunk,
        micro_bsz=2,
        precision="fp32",
    )
    # two rows of 37 tokens
    texts = [{"prompt": "!" * 7, "chosen": "#" * (19 - 7), "rejected": "$" * (18 - 7)}] * 2
    if shared:
        texts[1] = texts[1] | {"prompt": "!" * 4}
    examples = examples_of(tmp_path, texts)
    assert shared or examples.lengths.tolist() == [38, 38]
    reference = torch.zeros(examples.targets).numpy()
    examples = examples.with_reference(reference) if source_of(config).loss.needs_reference else examples
    batch = collate_answers([[examples[0]], [examples[1]]], 2.0, chunk, shared is not None)
    model = build_model(config, make_arch(7, **SIZES), kernel, torch.float32)
    loss, chunks, batch = source_of(config).loss, source_of(config).chunks, batch.having(width=37)
    activations, peak = bytes_of_a_step(model, grad_cp, batch, lambda: loss(model, batch, chunks)[0])
    planned = step_bytes(make_arch(7, **SIZES), config, kernel, "fp32", 37, len(batch.targets), shared)
    # the chunks have unequal shares of the answers
    assert planned.activations == pytest.approx(activations, rel=0.01 if chunk else 0, abs=8)
    assert planned.peak == pytest.approx(peak, rel=0.01)


def test_the_pass_without_gradients_needs_less():
    config = settled_config(
        load_model="x", loss="dpo", beta=0.1, sft_weight=1.0, micro_bsz=2, peft_config={"r": 5}
    )
    arch = make_arch(7, **SIZES)
    whole, look = (
        step_bytes(arch, config, "cpu", "fp32", 37, 40, None, backward) for backward in (True, False)
    )
    assert look.peak < whole.peak / 2 and look.activations < whole.activations / 4
    assert memory.allocator_waste(look, "cpu") < memory.allocator_waste(whole, "cpu")
