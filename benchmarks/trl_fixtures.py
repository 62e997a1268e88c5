"""Losses and gradients of TRL 1.16.0 on random numbers: preference_losses.json and grpo_losses.json.

    python -m venv trl && trl/bin/pip install trl==1.16.0 torch
    trl/bin/python -m benchmarks.trl_fixtures

TRL's trainers are asked for the losses, with stubs for what they have around them. What is asked is private,
and the version therefore pinned. Two notes on TRL 1.16.0: DPO's "sigmoid" reads no label_smoothing, so that
the smoothed loss is that of its CPO, of the log ratios. ORPO's cross entropy is over prompt and answer, ours
over the answer, so that only the odds ratio is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import types
from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor

from . import trl_grpo

VERSION = "1.16.0"
OUT = "tests/fixtures"
PROMPT = 3  # tokens before each answer
GRID = 2.0**8  # numbers are multiples of 1 / GRID, which fp32 holds exactly
STUB = SimpleNamespace(
    device="cpu",
    num_processes=1,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    unwrap_model=lambda model: model,
    autocast=contextlib.nullcontext,
)


class Rows:
    """Answers of different lengths as TRL has them: rows with a mask, the numbers elsewhere 0."""

    def __init__(self, answers: list[list[float]]):
        longest = max(map(len, answers))
        self.mask = torch.zeros(len(answers), PROMPT + longest, dtype=torch.int64)
        self.log_probs = torch.zeros(len(answers), PROMPT + longest - 1, dtype=torch.float64)
        for row, answer in enumerate(answers):
            self.mask[row, PROMPT : PROMPT + len(answer)] = 1
            self.log_probs[row, PROMPT - 1 : PROMPT - 1 + len(answer)] = torch.tensor(answer)
        self.counts = self.mask.sum(1)

    def of_answers(self, rows: Tensor) -> list[list[float]]:
        """Split rows like log_probs into the numbers of each answer."""
        return [
            [float(f"{x:.10g}") for x in row[PROMPT - 1 : PROMPT - 1 + count].tolist()]
            for row, count in zip(rows, self.counts.tolist(), strict=True)
        ]


class Model(torch.nn.Module):
    """A model that has these log-probabilities, and others for ids that are 2."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, others: Tensor | None = None):
        super().__init__()
        self.log_probs, self.others = log_probs, others

    def forward(self, input_ids: Tensor, **_) -> SimpleNamespace:
        log_probs = self.log_probs if input_ids[0, 0] == 1 else self.others
        names = ("entropy", "mean_logits", "log_sum_sq_probs", "num_top1", "num_correct_tokens")
        zeros = {name: torch.zeros_like(log_probs) for name in names}
        zeros["is_top1"] = torch.zeros_like(log_probs, dtype=torch.bool)
        return SimpleNamespace(log_probs=log_probs, logits=None, aux_loss=None, **zeros)


def answers(counts: list[int], generator: torch.Generator) -> list[list[float]]:
    """Draw log-probabilities of answers with these numbers of tokens."""
    return [
        (-(torch.rand(count, generator=generator) * 3 * GRID).round() / GRID).tolist() for count in counts
    ]


def trainer_stub(model: Model, reference: Model, **settings) -> SimpleNamespace:
    """Make what the losses of DPO and KTO read of their trainer."""
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=STUB,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def ids(mask: Tensor, value: int) -> dict[str, Tensor]:
    return {"input_ids": torch.full_like(mask, value), "attention_mask": torch.ones_like(mask)}


def pair_losses(policy: Rows, reference: Rows) -> dict[str, tuple[dict, Tensor, Tensor]]:
    """Map names to (settings of ours, TRL's loss, log-probabilities) for pairs: first the chosen answers."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    log_probs = policy.log_probs.requires_grad_()
    settings = {"f_divergence_type": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    inputs = ids(policy.mask, 1) | {"completion_mask": policy.mask}

    def dpo(beta: float, **weights: float) -> Tensor:
        stub = trainer_stub(
            Model(log_probs),
            Model(reference.log_probs),
            beta=beta,
            label_smoothing=0.0,
            loss_types=list(weights),
            loss_weights=list(weights.values()),
            **settings,
        )
        return DPOTrainer._compute_loss(stub, stub.model, inputs, False)

    def cpo(of: Tensor, **settings) -> Tensor:
        stub = SimpleNamespace(alpha=0.0, accelerator=STUB, **settings)
        return CPOTrainer.cpo_loss(stub, *of.chunk(2))[0].mean()

    sums = log_probs.sum(1)
    ratios, means = sums - reference.log_probs.sum(1), sums / policy.counts
    odds = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=0.25, accelerator=STUB), *means.chunk(2))[0]
    smoothed = {"loss_type": "sigmoid", "beta": 0.3, "label_smoothing": 0.1}
    simpo = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}
    found = {
        "dpo": ({"kind": "dpo", "beta": 0.1}, dpo(0.1, sigmoid=1.0)),
        "dpo of means": ({"kind": "dpo", "beta": 0.3, "average": True}, dpo(0.3, sigmoid_norm=1.0)),
        "cdpo": ({"kind": "dpo", "beta": 0.3, "label_smoothing": 0.1}, cpo(ratios, **smoothed)),
        "ipo": ({"kind": "ipo", "beta": 0.2}, dpo(0.2, ipo=1.0)),
        "orpo": ({"kind": "orpo", "orpo_lambda": 0.25}, -odds.mean()),
        "simpo": ({"kind": "simpo", "beta": 2.0, "gamma": 0.5}, cpo(means, label_smoothing=0.0, **simpo)),
        "smoothed simpo": (
            {"kind": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2},
            cpo(means, label_smoothing=0.2, **simpo),
        ),
    }
    if len(set(policy.counts.chunk(2)[0].tolist())) == 1:  # theirs is a mean over the tokens of a batch
        found["dpo + sft"] = ({"kind": "dpo", "beta": 0.1, "sft_weight": 0.7}, dpo(0.1, sigmoid=1.0, sft=0.7))
    return {name: (ours, loss, log_probs) for name, (ours, loss) in found.items()}


def pair_case(counts: list[int], generator: torch.Generator) -> dict:
    """Make one batch of pairs with every loss. The counts are of chosen, rejected, chosen, ..."""
    in_order = sorted(range(len(counts)), key=lambda i: i % 2)  # TRL has the chosen answers first
    policy, reference = (answers(counts, generator) for _ in range(2))
    rows = [Rows([values[i] for i in in_order]) for values in (policy, reference)]
    losses = {}
    for name, (ours, loss, log_probs) in pair_losses(*rows).items():
        (gradient,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
        by_answer = dict(zip(in_order, rows[0].of_answers(gradient), strict=True))
        losses[name] = {
            "settings": ours,
            "loss": loss.item(),
            "gradient": [by_answer[i] for i in range(len(counts))],
        }
    chosen = [i % 2 == 0 for i in range(len(counts))]
    return {"log_probs": policy, "reference": reference, "chosen": chosen, "losses": losses}


def kto_case(counts: list[int], chosen: list[bool], shift: float, generator: torch.Generator) -> dict:
    """Make one batch of single answers. `shift` moves ln p of the mismatched ones, whose mean ratio is the
    KL.
    """
    from trl.trainer.kto_trainer import KTOTrainer

    policy, reference, others, others_reference = (Rows(answers(counts, generator)) for _ in range(4))
    others.log_probs += shift * others.mask[:, 1:]
    log_probs, weights = (
        policy.log_probs.requires_grad_(),
        {"desirable_weight": 1.5, "undesirable_weight": 0.75},
    )
    stub = trainer_stub(
        Model(log_probs, others.log_probs),
        Model(reference.log_probs, others_reference.log_probs),
        calculate_KL=True,
        loss_type="kto",
        beta=0.1,
        **weights,
    )
    stub._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, stub)
    inputs = ids(policy.mask, 1) | {"completion_mask": policy.mask, "label": torch.tensor(chosen)}
    inputs |= {f"KL_{name}": value for name, value in ids(others.mask, 2).items()}
    inputs["KL_completion_mask"] = others.mask
    loss = KTOTrainer._compute_loss(stub, stub.model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    [baseline] = stub._metrics["train"]["kl"]
    found = {"settings": {"kind": "kto", "beta": 0.1, **weights}, "loss": loss.item()}
    return {
        "log_probs": policy.of_answers(log_probs),
        "reference": reference.of_answers(reference.log_probs),
        "mismatched": others.of_answers(others.log_probs),
        "mismatched_reference": others.of_answers(others_reference.log_probs),
        "chosen": chosen,
        "baseline": baseline,
        "losses": {"kto": found | {"gradient": policy.of_answers(gradient)}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trl_fixtures", description=__doc__)
    parser.add_argument("--out", default=OUT, help=f"the folder [{OUT}]")
    out = parser.parse_args().out
    import trl

    if trl.__version__ != VERSION:
        parser.error(
            f"TRL is {trl.__version__}, what is asked here is private to {VERSION}: install that one"
        )
    generator = torch.Generator().manual_seed(21)
    cases = [
        pair_case([1, 1], generator),
        pair_case([3, 5, 3, 1, 3, 13], generator),
        pair_case([7, 2, 1, 9, 4, 4, 17, 3, 2, 11], generator),
        kto_case([5], [True], 0.5, generator),
        kto_case([3, 1, 8, 13, 2, 6, 7], [True, False, False, True, True, False, True], 0.5, generator),
        kto_case([4, 9, 1, 5, 3], [False] * 5, -0.5, generator),
    ]
    facts = {"by": "python -m benchmarks.trl_fixtures", "trl": VERSION, "torch": torch.__version__}
    found = {"preference_losses.json": {"cases": cases}, "grpo_losses.json": trl_grpo.cases()}
    for name, content in found.items():
        with open(pathlib.Path(out, name), "w", encoding="utf-8") as file:
            json.dump(facts | content, file)
            file.write("\n")
    counts = {name: sum(len(case["losses"]) for case in of["cases"]) for name, of in found.items()}
    print(json.dumps(facts | {"out": out, "losses": counts}))


if __name__ == "__main__":
    main()
