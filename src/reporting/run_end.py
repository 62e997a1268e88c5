"""End of a run: pictures, run.json, the cards, and its last lines."""

from __future__ import annotations

import json
import os
import shlex

import rwkv_miss
from rwkv_miss.errors import UserError
from rwkv_miss.files.hub_names import recorded
from rwkv_miss.progress import say
from rwkv_miss.version import VERSION, commit

from ..common.files import write_text
from ..config import Settled
from ..losses import loss_of
from ..losses.metrics import LossMetrics
from ..training.run_folder import MERGED, METRICS, SUMMARY, output_path
from ..training.validation_log import BEST, base_wins, best_trained, is_known_by_heart, is_over
from .curves import draw_pictures
from .diagnosis import Verdict, verdict
from .facts import VERY_LARGE, kl_in_words
from .model_card import write_model_card
from .run_card import CARD, KEEPS_MORE, card, held_out_words, training_score
from .run_log import RunLog

STOPPED = "stopped, go on with --resume auto"


def is_summed_up(proj_dir: str, step: int) -> bool:
    """Tell whether the end of the run at this step has been written down.

    A run that was stopped there has no card. With other settings it may still end there.
    """
    path = os.path.join(proj_dir, SUMMARY)
    if not (os.path.exists(path) and os.path.exists(os.path.join(proj_dir, CARD))):
        return False
    with open(path, encoding="utf-8") as file:
        return json.load(file)["steps"] == step


def finish(
    config: Settled,
    plan: list[str],
    step: int,
    total_steps: int,
    measured: dict | None = None,
) -> None:
    """Write the loss curve, run.json, at the end of the training run_card.md, and print the next command.

    `measured` is known only to the process that trained: it is absent for a run that was killed after its
    last step.
    """
    log = RunLog.read(config.proj_dir, step)
    metrics, history = log.metrics, log.history
    if not metrics:
        raise UserError(
            "no step of the run had a finite loss: it diverged at once; lower --lr_init, or check the data"
            " and the base"
        )
    described = loss_of(config).metrics
    draw_pictures(described, metrics, history, config.proj_dir)
    summary = {
        "version": VERSION,
        "commit": commit() or None,
        "steps": step,
        "planned_steps": max(total_steps, step),  # a resumed run may be asked for less than is done
        "loss_first": metrics[0]["loss"],
        "loss_last": metrics[-1]["loss"],
        "train_seconds": sum(line["seconds"] for line in metrics),
        **(measured or {}),
        "output": output_path(config.proj_dir, config.peft),
        **_validation_summary(described, config.proj_dir, history),
        **_metrics_summary(described, metrics, history),
        "plan": plan,
    }
    state = _state(step, total_steps, history, config.early_stop, described.by_loss)
    if step < total_steps and is_known_by_heart(config, step, total_steps):
        state = "ended early, as the data are known by heart, which is all that could be judged"
    judged = None
    if state != STOPPED:
        file, step_of_file = _recommended(summary)
        judged = verdict(config, metrics, step_of_file, history)
        summary["verdict"] = {**judged.as_object(), "forgotten": _forgotten(summary)}
        text = card(config, plan, summary, log, judged)
        write_text(os.path.join(config.proj_dir, CARD), text)
        write_model_card(config, summary, metrics, history, file)
    # last, because is_summed_up() looks for it
    write_text(os.path.join(config.proj_dir, SUMMARY), json.dumps(summary, indent=1))
    say("\n".join(_last_words(config, state, summary, history, judged)))


def _validation_summary(described: LossMetrics, proj_dir: str, history: list[dict]) -> dict:
    """Summarise the held-out documents and best.pth for run.json."""
    name, summary = described.in_summary, {}
    if history:
        ends = {"first": history[0], "last": history[-1]}
        summary = {f"{name}_{end}": described.score_of(line["loss"]) for end, line in ends.items()}
    top = os.path.join(proj_dir, BEST)
    if os.path.exists(top):
        metadata = rwkv_miss.read_metadata(top)
        summary |= {"best": top, "best_step": metadata["step"]}
        summary[f"{name}_best"] = described.score_of(metadata["validation_loss"])
    return summary


def _metrics_summary(described: LossMetrics, metrics: list[dict], history: list[dict]) -> dict:
    """Summarise the metrics other than the loss for run.json: first and last steps, and the evaluations."""
    summary = {}
    if described.heading:
        summary["metrics_first"], summary["metrics_last"] = described.first_and_last(metrics)
    if history:
        evaluated = {"first": history[0], "last": history[-1], "best": best_trained(history)}
        summary |= {
            f"validation_metrics_{name}": described.known(line) for name, line in evaluated.items() if line
        }
    return summary


def _state(step: int, total_steps: int, history: list[dict], early_stop: int, by_loss: bool) -> str:
    """Say how the run ended."""
    if step >= total_steps:
        return "done"
    if is_over(history, early_stop):
        count = "" if early_stop == 1 else f" in {early_stop} evaluations"
        once, never = "loss fell by less than a thousandth of its start", "loss did not fall"
        if not by_loss:
            once, never = "reward rose no further", "reward did not rise"
        stopped = once if best_trained(history) else never
        has_answers = by_loss and "right_answers" in history[-1]
        righter = ", nor were more answers right" if has_answers else ""
        return f"ended early, as the held-out {stopped}{count}{righter}"
    return STOPPED


def _recommended(summary: dict) -> tuple[str, int]:
    """Choose (file, step) of the state to go on with: best.pth if later steps made it no better."""
    if summary.get("best_step", summary["steps"]) < summary["steps"]:
        return summary["best"], summary["best_step"]
    return summary["output"], summary["steps"]


def _last_words(
    config: Settled, state: str, summary: dict, history: list[dict], judged: Verdict | None
) -> list[str]:
    """Write the last lines of a run: its results, the verdict, and the next command."""
    first = summary.get("command_to_first_step_seconds")
    start = f"first step {first:.1f} s after the command; " if first else ""
    described = loss_of(config).metrics
    what = "loss" if described.by_loss else "reward of drawn answers"
    lines = [
        f"{state}: step {summary['steps']} of {summary['planned_steps']}, {what}"
        f" {training_score(described, summary)}; {start}wrote {summary['output']}"
    ]
    # a stopped run may have done steps after its last evaluation, or have only earlier runs' evaluations
    last = history[-1]["step"] if history else 0
    if last and not described.by_loss and (known := held_out_words(config.rewards, last, history)):
        when = "" if last == summary["steps"] else f", at step {last}"
        lines.append(f"held out:  {known}{when}; {described.evaluation_text(history[-1], with_score=False)}")
    elif last and (known := described.evaluation_text(history[-1])):
        when = "" if last == summary["steps"] else f"at step {last} "
        lines.append(f"held out:  {when}{known}; before training {described.evaluation_text(history[0])}")
    if state != STOPPED:
        lines.append(f"read it:   {os.path.join(config.proj_dir, CARD)}")
    else:
        lines.append(
            f"read it:   {os.path.join(config.proj_dir, METRICS)}; {CARD} comes at the end of the training"
        )
    base = "base" if config.load_model else "model before the training"
    lines += _best_line(described, summary, history, base)
    trained, _ = _recommended(summary)
    if judged is None:
        return lines if base_wins(history) else [*lines, _next_command(config, trained)]
    lines.append(f"verdict:   {judged.sentence}")
    if moved := _forgotten(summary):
        lines.append(
            "forgotten: what the base could do besides may be lost, as the two differ on other text"
            f" (KL {moved:.3g} per token); {KEEPS_MORE}"
        )
    if judged.offered:
        return [*lines, _next_command(config, trained)]
    return [*lines, f"keep:      the {base}; {trained} is not worth using"]


def _best_line(described: LossMetrics, summary: dict, history: list[dict], base: str) -> list[str]:
    """Write the line about the best state, which may be the `base`; [] without evaluations."""
    if not history:
        return []
    last = history[-1]["step"]
    when = "at the end" if last == summary["steps"] else f"at step {last}"
    before, after = described.score_text(history[0]), described.score_text(history[-1])
    if base_wins(history):
        return [f"best:      the {base}, validation {described.score} {before}; {when} {after}"]
    if "best" not in summary:
        return []
    return [
        f"best:      {summary['best']}, step {summary['best_step']}, validation {described.score}"
        f" {summary[f'{described.in_summary}_best']:.4f}; before training {before}, {when} {after}"
    ]


def _forgotten(summary: dict) -> float | None:
    """Return the KL to the base per token if it is very large."""
    moved = (summary.get("forgetting") or {}).get("all", 0.0)
    return moved if kl_in_words(moved) == VERY_LARGE else None


def _next_command(config: Settled, trained: str) -> str:
    """Write the next command for the file of trained tensors: chat with a model, merge an adapter."""
    if config.peft == "none":
        return f"try it:    {shlex.join(['python', '-m', 'demo.chat', '--model', trained])}"
    files = {
        "base": recorded(config.load_model),
        "adapter": trained,
        "out": os.path.join(config.proj_dir, MERGED),
    }
    flags = [word for name, path in files.items() for word in (f"--{name}", path)]
    return f"merge it:  {shlex.join(['python', '-m', 'rwkv_miss', 'merge', *flags])}"
