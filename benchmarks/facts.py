"""An experiment: can a method learn new facts, or a new style?

    python -m benchmarks.facts [--load_model ../shared/data/real/rwkv6-3m-utf16.pth] [--tokenizer utf16]
    [--methods state miss lora none] [--seeds 0 1 2] [--facts 30] [--passes 40] [--lr_init auto]
    [--out out/facts] [--report docs/results]

The program makes up names, and for each name its favourite thing. Every name has one row: a question in one
of three forms, and an answer in the manner of a sailor. Each method trains on the same rows for the same
number of steps, at the rate that train.py chooses. Then the model is asked

- each question of the data, unchanged: how much was learnt by heart,
- each name in the two other forms: whether the fact is known,
- names that are not in the data: whether the style is used for them.

A fact counts as recalled if the answer's sentence has the right thing. The style is right if the answer
begins and ends as in the data. A guess among the things is right once in THINGS times. A finished training is
kept in --out, and is not repeated. --report FOLDER gets facts.md. The last line is JSON.
"""

from __future__ import annotations

import json
import pathlib
import random

import torch

from rwkv_miss.files.checkpoint import read_checkpoint
from rwkv_miss.version import commit
from src.common.formatting import counted
from src.data.questions import Question
from src.data.templates import recorded_template
from src.evaluation.answering import Asking, answers_to, engine_for
from src.inference.load import load

from . import experiment
from .common import add_integers, as_flags
from .experiment import Lines, groups, mean, train, write_rows
from .paper.results import Table

METHODS = ("state", "miss", "lora", "none")
FORMS = (
    "What does {} like best?",
    "Tell me the favourite thing of {}.",
    "There is one thing that {} loves above all. Which one is it?",
)
BEGIN, END = "Ahoy! ", "matey."
ANSWER = BEGIN + "{} likes {}, " + END
THINGS = (
    "apples bread butter cakes candles carrots cheese cherries clouds coffee dogs drums feathers fish flowers"
    " goats grapes honey horses jam kites lemons maps milk mirrors nuts onions owls pearls pianos rain rivers"
    " ropes salt ships silver snow tea trees wine"
).split()
UNSEEN = 50  # names that are not in the data
MEASURES = ("as trained", "in another form", "style on new names")


def names(count: int, seed: int) -> list[str]:
    """Make up different names of three syllables."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3)]
        found["".join(syllables).capitalize() + draw.choice("lmnrs")] = None
    return list(found)


class FactSet:
    """Names, the thing that each likes, and the form in which the data ask for it."""

    def __init__(self, count: int, seed: int):
        everybody = names(count + UNSEEN, seed)
        self.names, self.unseen = everybody[:count], everybody[count:]
        draw = random.Random(seed)
        self.likes = {name: draw.choice(THINGS) for name in self.names}
        self.form = {name: i % len(FORMS) for i, name in enumerate(self.names)}

    def rows(self) -> list[dict]:
        """Make the training data."""
        rows = []
        for name in self.names:
            asked = {"role": "user", "content": FORMS[self.form[name]].format(name)}
            answer = {"role": "assistant", "content": ANSWER.format(name, self.likes[name])}
            rows.append({"messages": [asked, answer]})
        return rows

    def asked(self, template) -> dict[str, list[Question]]:
        """Make questions: name of the measure -> questions. `right`: the thing; "": only style counts."""

        def question(name: str, form: int) -> Question:
            asked = [{"role": "user", "content": FORMS[form].format(name)}]
            pieces = [segment.text for segment in template.segments(asked, ask=True)]
            return Question(pieces, self.likes.get(name, ""))

        others = [
            (name, form) for name in self.names for form in range(len(FORMS)) if form != self.form[name]
        ]
        trained = [question(name, form) for name, form in self.form.items()]
        new = [question(name, i % len(FORMS)) for i, name in enumerate(self.unseen)]
        return dict(zip(MEASURES, [trained, [question(*pair) for pair in others], new], strict=True))


def is_right(answer: str, question: Question) -> bool:
    """Tell whether the answer has the right fact, or for a question without a fact the style."""
    if question.answer:
        return f" likes {question.answer}," in answer
    return answer.startswith(BEGIN) and answer.endswith(END)


def trained(args, method: str, seed: int) -> dict:
    """Do a run, and count the right answers: measure -> share."""
    facts = FactSet(args.facts, seed)
    folder = args.out / f"{method}-{seed}-{args.lr_init}"
    folder.mkdir(parents=True, exist_ok=True)
    flags = as_flags(
        load_model=args.load_model, tokenizer=args.tokenizer, peft=method, epoch_count=args.passes,
        data_file=write_rows(folder / "facts.jsonl", facts.rows()), random_seed=seed, lr_init=args.lr_init,
        eval_split=0, eval_samples=0,
    )  # fmt: skip
    ran = train(folder / "run", flags, folder / "log")
    output = ran.summary["output"]
    done = {"steps": ran.summary["steps"], "rate": ran.settings["lr_init"], "cpu_seconds": ran.cpu_seconds}
    done |= {"trained numbers": sum(map(torch.numel, read_checkpoint(output).values()))}
    return done | shares(args, method, output, facts) | {"commit": commit()}


def shares(args, method: str, output: str, facts: FactSet) -> dict[str, float]:
    """Count the right answers of a run's output file: measure -> share."""
    files = {"path": output} if method == "none" else {"path": args.load_model, "adapter": output}
    model, tokenizer = load(**files, tokenizer=args.tokenizer, precision="fp32", accelerator="cpu")
    template = recorded_template("auto", tokenizer, output)
    limit = 2 * len(tokenizer.encode(ANSWER.format(facts.names[0], max(THINGS, key=len))))
    found = {}
    for measure, questions in facts.asked(template).items():
        engine = engine_for(model, tokenizer, len(questions))
        answers = answers_to(engine, questions, Asking(limit, template))
        right = [is_right(own.text, question) for (own,), question in zip(answers, questions, strict=True)]
        found[measure] = round(sum(right) / len(right), 4)
    return found


def table(lines: list[dict]) -> Table:
    """Make a row for each method: the mean of its seeds."""
    rows = []
    for (method,), own in groups(lines, "method").items():
        shares = [f"{100 * mean(own, name):.0f} %" for name in MEASURES]
        rates = " ".join(f"{line['rate']:g}" for line in own)
        rows.append([method, f"{own[0]['trained numbers']:,}", rates, *shares])
    return Table("", ["method", "trained numbers", "rates", *MEASURES], rows)


def main() -> None:
    parser = experiment.parser(__doc__, "facts", methods=METHODS)
    base = pathlib.Path("../shared/data/real/rwkv6-3m-utf16.pth")
    parser.add_argument("--load_model", type=pathlib.Path, default=base)
    parser.add_argument("--tokenizer", default="utf16")
    add_integers(parser, facts=30, passes=40)
    parser.add_argument("--lr_init", default="auto", help="a rate in the place of the chosen one")
    args = experiment.parsed(parser)
    if not args.load_model.exists():
        parser.error(f"--load_model {args.load_model} is absent; give a base, and its --tokenizer")
    done = Lines(args.out / "trainings.jsonl", "method", "seed", "facts", "passes", "lr_init")
    lines = []
    for method in args.methods:
        for seed in args.seeds:
            line = {"method": method, "seed": seed, "facts": args.facts, "passes": args.passes}
            line |= {"lr_init": args.lr_init}
            if args.only_finished and line not in done:
                continue
            lines.append(done.of(line, lambda: trained(args, method, seed)))  # noqa: B023
            print(json.dumps(lines[-1]), flush=True)
    parts = [
        "# Which method learns facts, and which a style",
        f"{args.facts} made-up names, each with one thing out of {len(THINGS)} that it likes, in one row"
        f" each. {args.passes} passes, {lines[0]['steps']} steps, {counted(len(args.seeds), 'seed')}. Base:"
        f" {args.load_model.name}.",
        "*As trained*: the question of the row. *In another form*: the same fact, asked in words that its row"
        " does not have. *Style on new names*: the manner of the answers, for names that are not in the data."
        f" A guess among the things is right in {100 / len(THINGS):.1f} % of cases.",
        "{table}",
        "Again: `python -m benchmarks.facts --report docs/results`, with a base of yours as `--load_model`"
        " and its `--tokenizer`.",
    ]
    experiment.publish("facts", args.report, parts, table(lines), trainings=lines)


if __name__ == "__main__":
    main()
