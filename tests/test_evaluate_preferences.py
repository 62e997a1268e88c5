"""scripts.evaluate --preferences: its figures are those of log-likelihoods taken one by one, in float64."""

import json
import random
import re

import numpy as np
import pytest

import rwkv_miss
from scripts import evaluate
from src.evaluation import preferences
from src.evaluation.likelihood import log_likelihoods
from src.inference.load import load
from src.model import RWKV

from .conftest import make_arch, random_tensors, read_rows, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, two adapters, another model, and pairs of texts of many lengths."""
    folder = tmp_path_factory.mktemp("preferences")
    base = folder / "base.pth"
    for layers, path in ((2, base), (3, folder / "other.pth")):
        arch = make_arch(7, layers, vocab_size=256)
        rwkv_miss.write_checkpoint(path, random_tensors(arch, seed=layers).items())
    for seed in (1, 2):
        model = RWKV.load(base)
        rwkv_miss.inject(model, "miss", rank=4)
        noise = np.random.default_rng(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.05 * p.new_tensor(noise.standard_normal(p.shape))
        rwkv_miss.save_adapter(model, folder / f"adapter{seed}.pth", tokenizer="bytes")
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdef", k=draw.randint(1, 30))) for _ in range(3 * 13)]
    pairs = list(zip(texts[0::3], texts[1::3], texts[2::3]))
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs]
    write_rows(folder / "pairs.jsonl", rows)
    rows = [{"prompt": p, "completion": c, "label": bool(i % 3)} for i, (p, c, _) in enumerate(pairs)]
    write_rows(folder / "labels.jsonl", rows)
    return folder, pairs


def evaluated(capsys, folder, *flags):
    """(the JSON lines of stdout, stderr)"""
    flags = ["--tokenizer", "bytes", *(str(flag).replace("@", f"{folder}/") for flag in flags)]
    try:
        evaluate.main(flags)
    except SystemExit as end:
        assert end.code == 2
    out, error = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], error


def by_hand(folder, pairs, name, adapter=None):
    """(ln p of each answer (n, 2), its tokens (n, 2)), one sequence at a time."""
    model, tokenizer = load(folder / name, adapter and folder / adapter, "bytes", precision="fp32")
    asked = [
        (tokenizer.encode(prompt), [*tokenizer.encode(answer), *tokenizer.eod])
        for prompt, *answers in pairs
        for answer in answers
    ]
    log_p = [log_likelihoods(model, [one])[0][0] for one in asked]
    return np.array(log_p).reshape(-1, 2), np.array([len(ids) for _, ids in asked]).reshape(-1, 2)


def test_pairs_against_the_base_without_its_adapters(files, capsys):
    folder, pairs = files
    flags = ["--preferences", "@pairs.jsonl", "--model", "@base.pth", "--beta", 0.3]
    flags += ["--adapter", "@adapter1.pth", "--adapter", "@adapter2.pth", "--save", "@kept.jsonl"]
    found, _ = evaluated(capsys, folder, *flags)
    reference, tokens = by_hand(folder, pairs, "base.pth")
    rows = read_rows(folder / "kept.jsonl")
    assert len(found) == 2 and len(rows) == 2 * len(pairs)
    for place, line in enumerate(found):
        log_p, _ = by_hand(folder, pairs, "base.pth", f"adapter{place + 1}.pth")
        ratio = log_p - reference
        wanted = {
            "logp_chosen": log_p[:, 0].mean(),
            "logp_rejected": log_p[:, 1].mean(),
            "nll": -(log_p / tokens)[:, 0].mean(),
            "raw_accuracy": np.mean(log_p[:, 0] > log_p[:, 1]),
            "raw_accuracy_per_token": np.mean((log_p / tokens)[:, 0] > (log_p / tokens)[:, 1]),
            "reward_chosen": 0.3 * ratio[:, 0].mean(),
            "margin": 0.3 * (ratio[:, 0] - ratio[:, 1]).mean(),
            "reward_accuracy": np.mean(ratio[:, 0] > ratio[:, 1]),
            "reward_accuracy_per_token": np.mean((ratio / tokens)[:, 0] > (ratio / tokens)[:, 1]),
            "reference_logp_rejected": reference[:, 1].mean(),
            "reference_raw_accuracy": np.mean(reference[:, 0] > reference[:, 1]),
        }
        assert {name: line[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-5)
        assert line["pairs"] == len(pairs) and line["reference"].endswith("base.pth")
        mine = rows[place * len(pairs) : (place + 1) * len(pairs)]
        assert [(row["prompt"], row["chosen"], row["rejected"]) for row in mine] == [
            (prompt, f"{chosen}\0", f"{rejected}\0") for prompt, chosen, rejected in pairs
        ]
        assert [[row["logp_chosen"], row["logp_rejected"]] for row in mine] == pytest.approx(log_p, rel=1e-5)
        assert mine[4]["adapter"] == line["adapter"] and line["adapter"].endswith(f"{place + 1}.pth")
    _, error = evaluated(capsys, folder, *flags)
    assert "kept.jsonl is there already" in error


def test_labelled_answers_against_another_model(files, capsys):
    """KTO's baseline is the mean ratio of the answers that mismatched() makes, at least 0."""
    folder, pairs = files
    flags = ["--preferences", "@labels.jsonl", "--model", "@base.pth", "--reference", "@other.pth"]
    ((found,), _) = evaluated(capsys, folder, *flags)
    log_p, reference = (by_hand(folder, pairs, name)[0][:, 0] for name in ("base.pth", "other.pth"))
    good = np.arange(len(pairs)) % 3 > 0
    assert (found["chosen"], found["rejected"]) == (good.sum(), (~good).sum())
    ratio = log_p - reference
    wanted = {
        "logp_chosen": log_p[good].mean(),
        "reference_logp_rejected": reference[~good].mean(),
        "reward_rejected": 0.1 * ratio[~good].mean(),
    }
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    above = np.where(good, ratio > found["baseline"], ratio < found["baseline"])
    assert found["reward_accuracy"] == pytest.approx(above.mean())
    assert found["baseline"] >= 0 and "raw_accuracy" not in found


def test_without_a_reference_there_are_no_rewards(files, capsys, monkeypatch):
    """And long rows, which are read in chunks, have the same log p; so have prompts that are read once."""
    folder, pairs = files
    flags = ["--preferences", "@pairs.jsonl", "--model", "@base.pth"]
    ((whole,), _) = evaluated(capsys, folder, *flags)
    assert whole["reference"] is None
    assert not {"beta", "margin", "reward_accuracy", "reference_logp_chosen"} & whole.keys()
    monkeypatch.setattr(preferences, "GAIN", 0)
    ((once,), _) = evaluated(capsys, folder, *flags)
    assert once["logp_chosen"] == pytest.approx(whole["logp_chosen"], rel=1e-6)
    assert once["logp_rejected"] == pytest.approx(whole["logp_rejected"], rel=1e-6)
    monkeypatch.setattr(preferences, "TOKENS", 40)
    monkeypatch.setattr(preferences, "CHUNK", 7)
    ((chunks,), _) = evaluated(capsys, folder, *flags)
    assert chunks["logp_chosen"] == pytest.approx(whole["logp_chosen"], rel=1e-6)
    assert chunks["logp_rejected"] == pytest.approx(whole["logp_rejected"], rel=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preferences", "@pairs.jsonl", "--model", "@base.pth", "--reference", "@no.pth"], "no.pth"),
        (["--preferences", "@bad.jsonl", "--model", "@base.pth"], "bad.jsonl, line 2: .*no rejected"),
        (["--preferences", "@sft.jsonl", "--model", "@base.pth"], "sft.jsonl, line 1: .*--loss sft"),
    ],
)
def test_mistakes_are_told_in_a_line(files, capsys, flags, message):
    folder, _ = files
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (folder / "bad.jsonl").write_text(f'{json.dumps(row)}\n{{"prompt": "a", "chosen": "b"}}\n')
    (folder / "sft.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    found, error = evaluated(capsys, folder, *flags)
    assert not found and error.count("\n") == 1 and re.search(message, error), error
