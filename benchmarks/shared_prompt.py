"""Measure how many pairs a second are trained with the prompt read once, beside both answers after their own.

The loss is DPO with MiSS; both forms take turns, forward and backward.

    python -m benchmarks.shared_prompt [--base demo/rwkv7-reverse.pth] [--pairs 8] [--rounds 15]
    [--n_layer 0 --n_embd 768 --vocab 65536] [--rank 12]

With --n_layer the model is a random one. Separate rows are packed: a row has both answers of a pair. The
limit is the quotient of the tokens that both forms read. The last figure is what a second pass through the
layers costs, in tokens, by a fit to all times: src/planning/step.py decides by it. The last line is JSON.
"""

import statistics

import numpy as np
import torch

import rwkv_miss
from src.data.answer_batches import collate_answers
from src.data.file_documents import Document
from src.data.preferences import Preference
from src.model import RWKV
from src.model.batch_loss import Chunks
from src.model.log_probs import token_log_probs
from src.model.preference_loss import PreferenceLoss

from .common import add_integers, argument_parser, keep_pages, report, settings_without, timed
from .step import random_model

CASES = ((32, 16), (128, 64), (512, 256), (512, 64))  # tokens of a prompt and of an answer
FORMS = {"separate": False, "shared": True}
DPO = PreferenceLoss(
    "dpo",
    beta=0.1,
    sft_weight=1.0,
    average=False,
    label_smoothing=0.0,
    gamma=1.0,
    orpo_lambda=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
)


def make_rows(pairs: int, prompt: int, answer: int, vocab: int) -> list[list[Preference]]:
    """Rows of one pair each, of random tokens."""
    rng = np.random.default_rng(0)
    weights = np.repeat([0, 1], [prompt, answer]).astype(np.float32)

    def pair() -> Preference:
        begin = rng.integers(vocab, size=prompt)
        ids = [np.concatenate([begin, rng.integers(vocab, size=answer)]) for _ in range(2)]
        values = [np.full(answer, -np.log(vocab), np.float32)] * 2
        return Preference([Document(x, weights) for x in ids], [True, False], values)

    return [[pair()] for _ in range(pairs)]


def tokens_of(batch: dict) -> int:
    """Tokens that are read, padding included."""
    return batch["ids"].numel() + (batch["prompts"].numel() if "prompts" in batch else 0)


def train(model: RWKV, batch: dict) -> None:
    loss, _ = DPO(token_log_probs(model, batch, Chunks()), batch)
    (loss / batch["step_weight"]).backward()


def measure(model: RWKV, pairs: int, rounds: int, prompt: int, answer: int) -> dict[str, float]:
    """Seconds of both forms, and how many times as fast the shared one is: the median of the rounds."""
    rows = make_rows(pairs, prompt, answer, model.arch.vocab_size)
    batches = {form: collate_answers(rows, pairs, shared=shared) for form, shared in FORMS.items()}
    seconds = {form: [] for form in FORMS}
    for round_ in range(rounds + 1):
        for form, batch in batches.items():
            spent = timed(lambda batch=batch: train(model, batch))
            if round_:  # the first one warms up
                seconds[form].append(spent)
    quotients = [a / b for a, b in zip(*seconds.values(), strict=True)]
    found = {f"{form}_s": statistics.median(times) for form, times in seconds.items()}
    found |= {f"{form}_tokens": tokens_of(batch) for form, batch in batches.items()}
    return {"prompt": prompt, "answer": answer, "times": statistics.median(quotients), **found}


def tokens_of_a_pass(cases: list[dict]) -> float:
    """What a pass through the layers costs beside its tokens, in tokens: seconds = pass * passes + token *
    tokens, fitted to the logarithms' scale.
    """
    lines = [
        [(1 + shared) / case[f"{form}_s"], case[f"{form}_tokens"] / case[f"{form}_s"]]
        for case in cases
        for form, shared in FORMS.items()
    ]
    (a_pass, token), *_ = np.linalg.lstsq(np.array(lines), np.ones(len(lines)), rcond=None)
    return a_pass / token


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--base", default="demo/rwkv7-reverse.pth", help="the model, without --n_layer")
    add_integers(parser, pairs=8, rounds=15, n_layer=0, n_embd=768, vocab=65536, rank=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_pages()
    if args.n_layer:
        model = random_model(7, args.n_layer, args.n_embd, args.vocab, args.rank)
    else:
        model = RWKV.load(args.base, torch.float32)
        model.set_kernel("cpu")
        rwkv_miss.inject(model, "miss", rank=args.rank)
    cases = []
    for prompt, answer in CASES:
        found = measure(model, args.pairs, args.rounds, prompt, answer)
        found["limit"] = found["separate_tokens"] / found["shared_tokens"]
        rates = {form: args.pairs / found[f"{form}_s"] for form in FORMS}
        print(
            f"prompt {prompt:4d}, answers {answer:4d}   {rates['separate']:7.1f} pairs/s separate,"
            f" {rates['shared']:7.1f} shared: {found['times']:.2f} times as fast, limit {found['limit']:.2f}",
            flush=True,
        )
        cases.append(found)
    second = tokens_of_a_pass(cases)
    print(f"a second pass costs as much as {second:.0f} tokens of {model.arch.describe()}")
    report(
        "shared_prompt",
        model=model.arch.describe(),
        cases=cases,
        tokens_of_a_pass=second,
        **settings_without(args),
    )


if __name__ == "__main__":
    main()
