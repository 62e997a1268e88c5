"""Metrics of a training on rewards, which replace the loss."""

from __future__ import annotations

from collections.abc import Iterable

from ..loss_metrics import LossMetrics, Panel, Shown, percent

SAMPLES = "samples.jsonl"  # the file of some rollouts, beside the metrics


def reward_metrics(names: Iterable[str]) -> LossMetrics:
    """Describe the metrics of drawn answers that are scored by these rewards."""
    each = {f"reward_{name}": f"reward: {name}, without its weight" for name in names}
    return LossMetrics(
        {
            "reward": "reward of an answer",
            **(each if len(each) > 1 else {}),
            "reward_std": "its spread in a group",
            "dead_groups": "groups of equal rewards, which teach nothing",
            "failed_groups": "groups whose reward failed",
            "failed": "answers whose reward failed",
            "length": "length of an answer, tokens",
            "cut": "answers cut at --max_tokens",
            "entropy": "entropy per token",
            "kl": "KL to the reference per token, estimated",
            "clip": "tokens that are clipped",
            "engine_gap": "log p of training and engine, mean difference",
            "engine_gap_max": "the same, largest",
            "draw_seconds": "drawing, seconds",
            "draw_tokens_per_second": "drawing, tokens/s",
            "train_tokens_per_second": "training, tokens/s",
        },
        shares=("dead_groups", "cut", "clip"),
        faults=("failed_groups", "failed"),
        bar=(
            Shown(("reward",), lambda reward: f"reward {reward:.2f}"),
            Shown(("dead_groups",), lambda share: f"equal rewards {share:.0%}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.2f}"),
        ),
        line=(
            Shown(("reward",), lambda reward: f"reward {reward:.3f}"),
            Shown(("dead_groups",), lambda share: f"groups of equal rewards {percent(share)}"),
            Shown(("length",), lambda tokens: f"length {tokens:.4g} tokens"),
            Shown(("cut",), lambda share: f"cut at --max_tokens {percent(share)}"),
            Shown(("entropy",), lambda nats: f"entropy {nats:.3g} per token"),
            Shown(("kl",), lambda nats: f"KL {nats:.3g} per token"),
            Shown(
                ("failed", "failed_groups"),
                lambda count: f"rewards failed {count:.0f}" if count else "",
                of="units",
            ),
        ),
        score="reward",
        picture="rewards.png",
        panels=(
            Panel("reward", ("reward", *(each if len(each) > 1 else ()))),
            Panel("share", ("dead_groups", "cut", "clip")),
            Panel("length of an answer (tokens)", ("length",)),
            Panel("per token", ("entropy", "kl")),
        ),
        caption="reward, groups of equal rewards, length, entropy and KL over the steps",
        heading="Drawn answers, of the training data",
        explanation=(
            "A group is the answers to one question. Where all get the same reward it teaches nothing: they"
            " are all right, or all wrong. So a model that has learnt all and one that is lost look alike"
            " but for their reward. An entropy near 0 means that the model has stopped trying anything else."
        ),
    )
