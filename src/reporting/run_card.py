"""Run card for people: run_card.md."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from ..common.formatting import markdown_table
from ..config import Settled, command
from ..losses import loss_of
from ..losses.metrics import LossMetrics, loss_text, percent
from ..training.validation_log import base_wins, best_trained, evaluation_at
from .curves import pictures
from .diagnosis import Verdict
from .facts import VERY_LARGE, bounds, kl_in_words, questions_of, right_share
from .run_log import RunLog

CARD = "run_card.md"
KEEPS_MORE = (
    'to keep more, mix rows of that into the data (docs/first-data.md, "My model forgot what it could do")'
)
NOT_MEASURED = "not measured: the run was killed after its last step"
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}


def card(
    config: Settled,
    plan: list[str],
    summary: dict,
    log: RunLog,
    judged: Verdict,
) -> str:
    """Write the text of run_card.md: what was run, its results, and what it changed."""
    described, metrics = loss_of(config).metrics, log.metrics
    seconds = sum(line["seconds"] for line in metrics)
    tokens = sum(line["tokens"] for line in metrics) / seconds
    trained = sum(line["trained_tokens"] for line in metrics) / seconds
    step = summary.get("best_step", summary["steps"])
    figures = {
        "verdict": judged.sentence,
        "steps": f"{summary['steps']} of {summary['planned_steps']}",
        f"training {described.score}": training_score(described, summary),
        "greedy answers": held_out_words(config.rewards, step, log.history),
        "speed": (
            f"{tokens:,.0f} tokens/s ({trained:,.0f} of them trained), {seconds:,.1f} s in {len(metrics)}"
            " steps"
        ),
        "peak memory": _memory(summary),
        "output": f"`{summary['output']}`",
    }
    parts = [
        f"# Run card: {os.path.basename(os.path.abspath(config.proj_dir))}",
        markdown_table(["", ""], [[name, value] for name, value in figures.items() if value]),
        "## Command",
        _as_it_is(command(config)),
        "## Plan",
        _as_it_is("\n".join(plan)),
        "## Curves",
        *pictures(described),
        *_training_metrics(described, metrics),
        *_drawn(log.drawn),
        f"## Held-out {loss_of(config).words.example}s",
        *_validation(described, summary, log.history),
        "## Forgetting",
        *_forgetting(config.load_model, summary),
    ]
    return "\n\n".join(parts) + "\n"


def _memory(summary: dict) -> str:
    """Tell the peak of memory, and the mapped files, which an older run.json does not have."""
    if not (peak := summary.get("peak_memory_bytes")):
        return NOT_MEASURED
    mapped = summary.get("mapped_file_bytes")
    files = f", plus {mapped / 2**20:,.0f} MiB of mapped files" if mapped else ""
    return f"{peak / 2**20:,.0f} MiB{files},  of the process that had most"


def held_out_words(rewards: Mapping[str, float], step: int, history: list[dict]) -> str:
    """Tell how held-out questions were answered before the run and at a step; "" if that is not known.

    "right 38.5 % to 98.5 %; reward 1.19 to 1.98 of at most 2, on 200 held-out questions"
    """
    before, after = evaluation_at(history, 0), evaluation_at(history, step)
    if not (before and after):
        return ""
    shares = [right_share(line, rewards) for line in (before, after)]
    words = [] if None in shares else [f"right {' to '.join(map(percent, shares))}"]
    if None not in (before.get("reward"), after.get("reward")):
        ends = bounds(rewards)
        most = f" of at most {ends[1]:g}" if ends else ""
        words.append(f"reward {before['reward']:.4g} to {after['reward']:.4g}{most}")
    return f"{'; '.join(words)}, on {questions_of(after):,} held-out questions" if words else ""


def _drawn(drawn: list[dict]) -> list[str]:
    """Show the first and the last logged group of answers."""
    parts = []
    for line in drawn[:1] + drawn[1:][-1:]:
        parts += [
            f"### Answers drawn in step {line['step']}",
            *as_it_is("prompt", line["prompt"]),
            *as_it_is("right", line["right"]),
            *as_it_is("answers", "\n".join(map(_answer_text, line["answers"]))),
        ]
        if "failed" in line:
            parts.append(f"Their rewards failed: {line['failed']}")
    return parts


def _answer_text(answer: dict) -> str:
    """Write an answer of a line, in one line: "reward 1, advantage 0.935, 4 tokens: 'abc'"."""
    parts = [f"{name} {answer[name]:.3g}" for name in ("reward", "advantage") if name in answer]
    parts.append(f"{answer['tokens']} tokens{', cut' if answer['cut'] else ''}")
    return f"{', '.join(parts)}: {answer['answer']!r}"


def training_score(described: LossMetrics, summary: dict) -> str:
    """Write the training's score at the beginning of a run and at its end."""
    if described.by_loss:
        return f"{summary['loss_first']:.4f} to {summary['loss_last']:.4f}"
    ends = [summary[f"metrics_{part}"].get(described.score) for part in ("first", "last")]
    return " to ".join(described.value_text(described.score, value) for value in ends)


def _training_metrics(described: LossMetrics, metrics: list[dict]) -> list[str]:
    """Write the section on metrics other than the loss; [] for supervised training."""
    if not described.heading:
        return []
    first, last = described.first_and_last(metrics)
    rows = [[title, *values] for _, title, values in described.rows([first, last])]
    return [
        f"## {described.heading}",
        markdown_table(["", "mean of the first tenth of the steps", "of the last tenth"], rows),
        described.explanation,
    ]


def _validation(described: LossMetrics, summary: dict, history: list[dict]) -> list[str]:
    if not history:
        return [
            "None: `--eval_file`, or `--eval_split 0.05`, would tell what the run is worth on documents that"
            " it was not trained on."
        ]
    first, last = history[0], history[-1]
    parts = [evaluations_table(described, history)]
    if "best" in summary:
        parts.append(
            f"`{summary['best']}` is the state of step {summary['best_step']}, {described.score}"
            f" {summary[f'{described.in_summary}_best']:.4f}."
        )
    elif base_wins(history):
        parts.append("No evaluated state is better than the model before the training.")
    before = {sample["prompt"]: sample for sample in first["samples"]}
    for number, sample in enumerate(last["samples"], 1):
        earlier = before.get(sample["prompt"], {})
        parts += [
            f"### Sample {number}",
            *as_it_is("prompt", sample["prompt"]),
            *as_it_is("right", sample["right"]),
            *as_it_is(f"before{reward_text(earlier)}", earlier.get("answer", "")),
            *as_it_is(f"after{reward_text(sample)}", sample["answer"]),
        ]
    return parts


def evaluations_table(described: LossMetrics, history: list[dict]) -> str:
    """Make the table of scores and metrics: of the first evaluation, of the last and of the best one."""
    first, last, top = history[0], history[-1], best_trained(history)
    states = {f"before, step {first['step']}": first, f"after, step {last['step']}": last}
    if top:
        states[f"best, step {top['step']}"] = top
    rows = [[title, *values] for _, title, values in described.rows([*states.values()])]
    if described.by_loss:
        rows.insert(0, [f"loss, per {described.loss_of}", *map(loss_text, states.values())])
    return markdown_table(["", *states], rows)


def reward_text(answer: dict) -> str:
    """Write ", reward 0.5" of an answer that was scored."""
    if "reward" not in answer:
        return ""
    return ", reward not known" if answer["reward"] is None else f", reward {answer['reward']:.4g}"


def _forgetting(load_model: str, summary: dict) -> list[str]:
    if not load_model:
        return ["A new model has nothing to forget."]
    if "forgetting" not in summary:
        return [NOT_MEASURED]
    if not summary["forgetting"]:
        return ["The tokenizer has no tokens for the fixed text, `src/evaluation/forgetting.txt`."]
    measured = summary["forgetting"].items()
    rows = [[name, f"{kl:.4f}", perplexity(kl), kl_in_words(kl)] for name, kl in measured]
    is_far = kl_in_words(summary["forgetting"].get("all", 0.0)) == VERY_LARGE
    return [
        (
            "How far the model of the last step has moved from its base on a fixed text,"
            " `src/evaluation/forgetting.txt`, that the training has nothing to do with:"
            " KL(base, tuned) per token, 0 for the base itself."
        ),
        markdown_table(["text", "KL", "perplexity", "in words"], rows),
        (
            "A KL of x makes the perplexity of the tuned model on what its base would write e^x times that of"
            " the base: 1 % more at 0.01, below which it is called small, 11 % at 0.1, 2.7 times at 1, from"
            " which it is very large."
        ),
        *([f"What the base could do besides may be lost; {KEEPS_MORE}."] if is_far else []),
    ]


def perplexity(kl: float) -> str:
    """Write a KL's effect on the perplexity: "+1.0 %", "2.7 times"."""
    return f"+{100 * math.expm1(kl):.1f} %" if kl < 0.5 else f"{math.exp(min(kl, 99)):,.3g} times"


def as_it_is(title: str, text: str) -> list[str]:
    """Put a model's text under its title."""
    return [f"{title}:", _as_it_is(text or "(nothing)")]


def _as_it_is(text: str) -> str:
    """Write a block of code by indentation, which no text can end; control characters are pictures."""
    return "\n".join(f"    {line}" for line in text.translate(PICTURES).split("\n"))
