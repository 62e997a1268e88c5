"""Checkpoints that others trained (../shared/data/real), taught something new: from a data file to answers in
another runtime.
"""

import json
import random

import pytest
import torch

from rwkv_miss import load_adapter, merge_file, read_checkpoint, read_metadata
from src.data.questions import Question
from src.data.tokenizer import load_tokenizer
from src.evaluation.answering import Asking, answers_to, engine_for
from src.model import RWKV
from src.model.loss import loss_sum

from . import program
from .conftest import close, pypi_rwkv
from .test_tokenizer import characters

pytestmark = pytest.mark.slow


def train(base, folder, texts, tokenizer, **settings):
    """The adapter that `train.py` makes in `folder` from rows {"text": ...}, on one thread."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings |= {
        "packing": 0,
        "eval_split": 0,
        "load_model": base,
        "data_file": folder / "data.jsonl",
        "proj_dir": folder / "run",
        "tokenizer": tokenizer,
    }
    program.succeed(program.run([f"--{name}={value}" for name, value in settings.items()]))
    return folder / "run" / "adapter.pth"


def adapted(base, adapter):
    model = RWKV.load(base, torch.float32)
    load_adapter(model, adapter)
    return model


@torch.no_grad()
def same_logits(merged, live, ids):
    """The file under the rwkv package, which has given the logits of our model with its adapter unmerged."""
    run = pypi_rwkv(merged)
    # of the largest logit, which is 30 in rwkv7-reverse: there both sides are as far from float64 as from
    # each other
    close(
        "merged file in the rwkv package, and unmerged adapter",
        run(ids)[0],
        live(torch.tensor([ids]))[0][0],
        1e-4,
    )
    return run


# rwkv7-reverse answers `123,` with `321#`. The changed task adds 1 to each digit: `432#`.


def changed(digits):
    return "".join(str((int(digit) + 1) % 10) for digit in reversed(digits))


def strings(lengths, count, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices("0123456789", k=rng.choice(lengths))) for _ in range(count)]


STEPS = 300
QUESTIONS = [question for length in (3, 8, 13) for question in strings([length], 100, length)]


def digit_accuracy(answers):
    """The share of digits that stand where they should, over answers that the model made by itself; a missing
    digit is a wrong one.
    """
    right = sum(
        a == b
        for answer, question in zip(answers, QUESTIONS, strict=True)
        for a, b in zip(answer, changed(question))
    )
    return right / sum(map(len, QUESTIONS))


def test_miss_teaches_the_reverse_model_another_task(data_dir, tmp_path):
    base, tokenizer_file = data_dir / "real/rwkv7-reverse.pth", characters(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_file, 12)

    def answers(model):
        asked = [Question([f"{question},"], "") for question in QUESTIONS]
        answers = answers_to(engine_for(model, tokenizer, len(asked)), asked, Asking(14))
        return [answer.text for (answer,) in answers]

    texts = [f"{digits},{changed(digits)}" for digits in strings(range(3, 16), STEPS * 16, 100)]
    adapter = train(
        base,
        tmp_path / "digits",
        texts,
        tokenizer_file,
        peft_config="r=8",
        micro_bsz=16,
        ctx_len=32,
        lr_init=1e-2,
        warmup_steps=100,
        beta2=0.95,
        random_seed=0,
    )
    metadata, live = read_metadata(adapter), adapted(base, adapter)
    assert (metadata["trainable"], metadata["step"]) == (9216, STEPS)
    said = answers(live)
    before, after = digit_accuracy(answers(RWKV.load(base))), digit_accuracy(said)
    print(f"digit accuracy {before:.1%} untouched, {after:.1%} after MiSS")
    # 41 % were seen, and 67 % after 500 steps
    assert before < 0.15 and after >= 0.3

    merge_file(base, adapter, tmp_path / "merged.pth", "fp32")
    package = same_logits(
        tmp_path / "merged.pth",
        live,
        tokenizer.encode("".join(f"{q},{changed(q)}#" for q in QUESTIONS[::30])),
    )
    for question, answer in list(zip(QUESTIONS, said, strict=True))[::10]:
        logits, state = package(tokenizer.encode(f"{question},"))
        theirs = ""
        while not theirs.endswith("#") and len(theirs) < 14:
            token = int(logits[-1].argmax())
            theirs += tokenizer.decode([token])
            logits, state = package([token], state)
        assert theirs.removesuffix("#") == answer


@torch.no_grad()
def nats_per_character(model, pieces):
    """utf16 has two ids a character; the first id of a piece has nothing before it and is not counted."""
    ids = torch.tensor([list(piece.encode("utf-16-le")) for piece in pieces])
    loss = loss_sum(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    return float(loss) / sum(map(len, pieces))


def test_miss_teaches_an_english_rwkv6_shakespeare(data_dir, tmp_path):
    base = data_dir / "real/rwkv6-3m-utf16.pth"
    text = (data_dir / "tinyshakespeare.txt").read_text()
    pieces = [text[i : i + 200] for i in range(0, len(text) - 200, 200)]
    seen, heldout = pieces[:4800:60], pieces[-20:]
    adapter = train(
        base,
        tmp_path / "shakespeare",
        seen,
        "utf16",
        peft_config="r=16",
        micro_bsz=4,
        ctx_len=512,
        lr_init=3e-3,
        warmup_steps=5,
    )
    merge_file(base, adapter, tmp_path / "merged.pth", "fp32")

    live = adapted(base, adapter)
    before, after = (nats_per_character(model, heldout) for model in (RWKV.load(base, torch.float32), live))
    print(
        f"nats per character of held-out Shakespeare: {before:.3f} before, {after:.3f} after"
        f" {read_metadata(adapter)['step']} steps"
    )
    assert after < before - 0.5

    old, new = read_checkpoint(base), read_checkpoint(tmp_path / "merged.pth")
    assert [(name, t.shape) for name, t in new.items()] == [(name, t.shape) for name, t in old.items()]
    # an fp32 file, because the package normalises the embedding of v6 in the file's dtype
    same_logits(tmp_path / "merged.pth", live, list(heldout[0].encode("utf-16-le")))
