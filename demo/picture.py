"""Make the README's picture, docs/demo.png: answers before and after the demo's training, and its loss.

python -m demo.picture [--run out/demo] [--base FILE] [--out docs/demo.png]

The program reads the files of demo/demo-training-miss.sh, and answers the held-out questions with the base
and with the merged file. The picture shows the first questions that the base gets wrong.
"""

from __future__ import annotations

import io
import json
import os

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.picture")

from src.common.startup import importing

with importing():
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    from demo.accuracy import short
    from rwkv_miss import UserError, read_checkpoint
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.files import write_bytes
    from src.data.bos import bos_ids
    from src.data.questions import Question, read_questions
    from src.data.templates import recorded_template
    from src.evaluation.answering import Asking, exact_accuracy
    from src.inference.load import load

DEMO = "bash demo/demo-training-miss.sh"
BASE, RUN, OUT = "demo/rwkv7-reverse.pth", "out/demo", "docs/demo.png"
METRICS, ADAPTER, MERGED, QUESTIONS = "metrics.jsonl", "adapter.pth", "merged.pth", "sort-heldout.jsonl"
TITLE = "A model that reverses letters learns to sort them"
EXAMPLES = 6
# vermilion and a bluish green, which colour-blind readers can tell apart
INK, GREY, LINE, WRONG, RIGHT = "#1f2328", "#6e7781", "#d0d7de", "#c2410c", "#0f766e"
MARGIN = 0.035


def answers_of(model: str, questions_file: str) -> tuple[list[Question], float, list[str]]:
    """Return (questions, share that is right, answers) of a model file, as demo.accuracy counts them."""
    network, tokenizer = load(model, precision="fp32")
    template = recorded_template("auto", tokenizer, model)
    bos = bos_ids("recorded", tokenizer, model)
    questions = read_questions(questions_file, template)
    return questions, *exact_accuracy(network, tokenizer, questions, Asking(64, template, bos))


def examples(
    questions: list[Question], before: list[str], after: list[str]
) -> list[tuple[Question, str, str]]:
    """Return the first questions of one turn that the base gets wrong, with the answers before and after."""
    rows = zip(questions, before, after, strict=True)
    return [row for row in rows if row[1] != row[0].answer and row[0].prompt.count("User:") == 1][:EXAMPLES]


def numbers(path: str) -> int:
    """Count the numbers in a checkpoint."""
    return sum(tensor.numel() for tensor in read_checkpoint(path).values())


def draw(
    rows: list[tuple[Question, str, str]],
    accuracies: tuple[float, float],
    losses: list[float],
    questions: int,
    trained: str,
) -> bytes:
    """Draw the picture as a PNG of 1600 x 800 pixels, the same bytes for the same figures."""
    figure = Figure(figsize=(16, 8), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(MARGIN, 0.945, TITLE, size=30, color=INK, weight="bold", va="top")
    draw_answers(figure.add_axes((MARGIN, 0.04, 0.525, 0.79)), rows, accuracies, questions)
    draw_losses(figure.add_axes((0.665, 0.145, 1 - MARGIN - 0.665, 0.535)), losses, trained)
    canvas.draw()
    image = io.BytesIO()
    # quantised, because text and lines need few colours, and a palette makes the file a third as large
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64).save(image, "png", optimize=True)
    return image.getvalue()


def draw_answers(
    axes, rows: list[tuple[Question, str, str]], accuracies: tuple[float, float], questions: int
):
    """Draw a row for each question, and above the rows the shares of all questions answered right."""
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    columns = (0.0, 0.455, 0.76)
    top = 0.74  # height at which the rows begin
    axes.text(0, 0.845, f"right answers to\n{questions} held-out questions", size=20, color=GREY, va="center")
    for x, title, share, colour in zip(columns[1:], ("before", "after"), accuracies, (WRONG, RIGHT)):
        axes.text(x, 1, title, size=24, color=GREY, va="top")
        axes.text(x, 0.845, f"{share:.1%}", size=40, color=colour, weight="bold", va="center")
    axes.plot((0, 1), (top, top), color=LINE, linewidth=1.5)
    height = top / len(rows)
    for i, (question, *answers) in enumerate(rows):
        y = top - (i + 0.6) * height
        axes.text(0, y, short(question.prompt), size=25, color=INK, family="monospace", va="center")
        for x, answer in zip(columns[1:], answers):
            colour, mark = (RIGHT, "✓") if answer == question.answer else (WRONG, "✗")
            axes.text(x, y, mark, size=25, color=colour, va="center")
            axes.text(x + 0.05, y, answer, size=25, color=colour, family="monospace", va="center")


def draw_losses(axes, losses: list[float], trained: str):
    """Draw the loss of each step, on a logarithmic axis."""
    axes.semilogy(range(1, len(losses) + 1), losses, color=RIGHT, linewidth=2.5, solid_joinstyle="round")
    left = axes.get_position().x0 - 0.045
    axes.figure.text(left, 0.83, "training loss", size=24, color=GREY, va="top")
    axes.figure.text(left, 0.77, trained, size=20, color=GREY, va="top")
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10) if min(losses) / 2 < tick < max(losses) * 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_xlim(0, len(losses))
    axes.set_xticks([0, len(losses)], ["0", f"{len(losses)} steps"])
    for label, side in zip(axes.get_xticklabels(), ("left", "right")):
        label.set_horizontalalignment(side)
    axes.tick_params(labelsize=20, labelcolor=GREY, length=0, pad=10)
    axes.grid(axis="y", color=LINE, linewidth=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m demo.picture", description=__doc__.partition("\n\n")[0])
        parser.add_argument("--run", default=RUN, help="folder of the demo's run [%(default)s]")
        parser.add_argument("--base", default=BASE, help="the base model of the run [%(default)s]")
        parser.add_argument("--out", default=OUT, help="file of the picture [%(default)s]")
        args = parser.parse_args()
        metrics, adapter, merged, held_out = (
            os.path.join(args.run, name) for name in (METRICS, ADAPTER, MERGED, QUESTIONS)
        )
        for path in (args.base, metrics, adapter, merged, held_out):
            if not os.path.exists(path):
                raise UserError(f"{path} is not there; the demo makes it, so run this first: {DEMO}")
        questions, share_before, before = answers_of(args.base, held_out)
        _, share_after, after = answers_of(merged, held_out)
        with open(metrics, encoding="utf-8") as file:
            losses = [json.loads(line)["loss"] for line in file]
        trained = f"MiSS adapter: {numbers(adapter) / numbers(args.base):.1%} of the parameters"
        rows = examples(questions, before, after)
        write_bytes(args.out, draw(rows, (share_before, share_after), losses, len(questions), trained))
        print(
            f"{args.out}: {share_before:.1%} before, {share_after:.1%} after, loss {losses[0]:.2f} to"
            f" {losses[-1]:.2f} in {len(losses)} steps"
        )


if __name__ == "__main__":
    main()
