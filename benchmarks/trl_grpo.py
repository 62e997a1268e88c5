"""TRL 1.16.0's losses of GRPO and its advantages on random numbers: a part of benchmarks.trl_fixtures.

The loss is asked of its trainer with stubs for what that has around it. Weights and advantages are computed
in the middle of a function that also draws answers; its own statements about them are run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

GRID = 2.0**8  # numbers are multiples of 1 / GRID, which fp32 holds exactly
LOW, HIGH, BETA, CAP = 0.2, 0.3, 0.04, 2.0
MAX_TOKENS = 19  # the longest answer that may be drawn
WITHOUT = -9.0  # what stands where an answer is over; the mask leaves it out
STUB = SimpleNamespace(
    device="cpu", num_processes=1, gather=lambda x: x, reduce=lambda x, reduction=None: x, sync_gradients=True
)


def statements(function: Any, beginning: str) -> Any:
    """Compile the one `if` in a function that begins with `beginning`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node).startswith(beginning)
    ]
    [node] = found
    return compile(ast.Module([node], []), "trl", "exec")


def run_statements(function: Any, beginning: str, **names: Any) -> dict[str, Any]:
    """Return all names after these statements have run in the function's module."""
    found = dict(function.__globals__) | names
    exec(statements(function, beginning), found)
    return found


def rows(answers: list[list[float]]) -> Tensor:
    """Pad answers to (answers, longest) float64."""
    longest = max(map(len, answers))
    padded = [[*answer, *[WITHOUT] * (longest - len(answer))] for answer in answers]
    return torch.tensor(padded, dtype=torch.float64)


def weights(old: Tensor, drawn: Tensor, mask: Tensor) -> Tensor:
    """Ask TRL for the importance weights of tokens, truncated."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_min=None,
        vllm_importance_sampling_clip_max=CAP,
    )
    return run_statements(
        GRPOTrainer._generate_and_score_completions,
        "if self.use_vllm and self.vllm_importance_sampling_correction:\n    mask =",
        self=trainer,
        tool_mask=None,
        completion_mask=mask,
        old_per_token_logps=old,
        sampling_per_token_logps=drawn,
    )["vllm_importance_sampling_ratio"]


def advantages(rewards: Tensor, reward_weights: Tensor, group_size: int, scale: str) -> Tensor:
    """Ask TRL for the advantages of rewards (answers, rewards)."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=reward_weights
    )
    return run_statements(
        GRPOTrainer._generate_and_score_completions,
        "if self.multi_objective_aggregation == 'sum",
        self=trainer,
        device="cpu",
        rewards_per_func=rewards,
        unscorable_mask=torch.isnan(rewards).all(dim=1),
        num_generations=group_size,
    )["advantages"]


def loss_of(kind: str, beta: float, batch: dict[str, Tensor], tokens: int, micro_batches: int) -> Tensor:
    """Ask TRL for its loss of a micro-batch, one of `micro_batches` in a step that has `tokens` tokens."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    new, weight = batch["new"], batch.get("weight")
    settings = SimpleNamespace(use_bias_correction_kl=True, delta=None, steps_per_generation=micro_batches)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=STUB,
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        args=settings,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        use_vllm=weight is not None,
        vllm_importance_sampling_correction=weight is not None,
        loss_type=kind,
        current_gradient_accumulation_steps=micro_batches,
        max_completion_length=MAX_TOKENS,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    trainer._get_per_token_logps_and_entropies = lambda *args, **_: (new, torch.zeros_like(new), None)
    ids = torch.ones_like(batch["mask"])
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": batch["mask"],
        "advantages": batch["advantage"],
        "old_per_token_logps": batch["old"],
        "ref_per_token_logps": batch["reference"],
        "importance_sampling_ratio": weight,
        "num_items_in_batch": torch.tensor(tokens),
    }
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def random_answers(counts: list[int], generator: torch.Generator) -> dict[str, list[list[float]]]:
    """Draw ln p of the tokens of answers by the four models, so far apart that every clip acts."""

    def on_grid(values: Tensor) -> Tensor:
        return (values * GRID).round() / GRID

    found: dict[str, list[list[float]]] = {"log_probs": [], "old": [], "drawn": [], "reference": []}
    for count in counts:
        new = on_grid(-3 * torch.rand(count, generator=generator, dtype=torch.float64))
        old = on_grid(new + 0.3 * torch.randn(count, generator=generator, dtype=torch.float64))
        drawn = on_grid(old + 0.6 * torch.randn(count, generator=generator, dtype=torch.float64))
        reference = on_grid(new + 0.5 * torch.randn(count, generator=generator, dtype=torch.float64))
        for name, values in zip(found, (new, old, drawn, reference), strict=True):
            found[name].append(values.tolist())
    return found


def loss_case(counts: list[int], micro_batches: int, generator: torch.Generator) -> dict[str, Any]:
    """Make one step of answers with these numbers of tokens, in micro-batches of equally many, with every
    loss.
    """
    case: dict[str, Any] = random_answers(counts, generator)
    signs = torch.where(torch.arange(len(counts)) % 2 == 0, 1.0, -1.0)
    advantage = (
        signs * (1 + 2 * GRID * torch.rand(len(counts), generator=generator)).round() / GRID
    ).double()
    each = len(counts) // micro_batches
    kinds = ["grpo", "dapo", "dr_grpo", *(["bnpo"] if micro_batches == 1 else [])]
    losses = {}
    for kind in kinds:
        for beta in (0.0, BETA):
            for corrected in (False, True):
                total, gradient = 0.0, []
                for begin in range(0, len(counts), each):
                    part = slice(begin, begin + each)
                    batch = {name: rows(case[name][part]) for name in ("old", "drawn", "reference")}
                    batch |= {"new": rows(case["log_probs"][part]).requires_grad_()}
                    batch |= {"mask": (batch["new"] != WITHOUT).long(), "advantage": advantage[part]}
                    if corrected:
                        batch["weight"] = weights(batch["old"], batch["drawn"], batch["mask"])
                    loss = loss_of(kind, beta, batch, sum(counts), micro_batches)
                    (of,) = torch.autograd.grad(loss, batch["new"])
                    total += loss.item()
                    for row, count in zip(of.tolist(), counts[part], strict=True):
                        gradient.append([float(f"{number:.10g}") for number in row[:count]])
                name = f"{kind}{', KL' if beta else ''}{', corrected' if corrected else ''}"
                ours = {"kind": "dapo" if kind == "bnpo" else kind, "beta": beta, "corrected": corrected}
                losses[name] = {"settings": ours, "loss": total, "gradient": gradient}
    return case | {"advantage": advantage.tolist(), "micro_batches": micro_batches, "losses": losses}


def advantage_case(groups: int, group_size: int, scale: str, generator: torch.Generator) -> dict[str, Any]:
    """Make two rewards with weights; the answers of the first group have equal ones."""
    rewards = torch.rand(groups * group_size, 2, generator=generator, dtype=torch.float64).round(decimals=1)
    rewards[:, 0] = rewards[:, 0].round()
    rewards[:group_size] = rewards[0].clone()
    reward_weights = torch.tensor([1.0, 0.3], dtype=torch.float64)
    return {
        "group_size": group_size,
        "scale": scale,
        "weights": reward_weights.tolist(),
        "rewards": rewards.tolist(),
        "advantages": advantages(rewards, reward_weights, group_size, scale).tolist(),
    }


def cases() -> dict[str, Any]:
    """Make everything of tests/fixtures/grpo_losses.json but the versions."""
    generator = torch.Generator().manual_seed(22)
    return {
        "settings": {"clip_low": LOW, "clip_high": HIGH, "max_tokens": MAX_TOKENS},
        "cases": [
            loss_case([1, 3], 1, generator),
            loss_case([7, 2, 1, 9, 4, 13, 17], 1, generator),
            loss_case([3, 5, 1, 11, 2, 19, 6, 1, 8], 3, generator),
        ],
        "advantages": [
            advantage_case(groups, size, scale, generator)
            for groups, size in ((2, 2), (5, 3), (3, 8))
            for scale in ("group", "none")
        ],
    }
