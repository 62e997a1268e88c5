"""Table 2: RoBERTa-base on GLUE (MNLI, SST-2, CoLA, QNLI, MRPC), adapters of equal size, three seeds.

The paper's 0.236 % of RoBERTa-base are the 294,912 parameters of LoRA with rank 8 on query and value, or of
MiSS with rank 16; the classifier is trained as well. The paper does not give the length and rates of its
trainings, so every method is trained at every rate of --lr. The reported score is that on the development set
after the last step: nothing but the rate is chosen by it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
import random
import tempfile
from typing import Any

from rwkv_miss import UserError

from .classify import Training, adapt, load_model, load_tokenizer, predict, quiet, tokenised, train
from .glue import TASKS, Example, Task, read_task
from .methods import systems
from .metrics import mean_and_deviation
from .results import Claim, PaperResult, Table, require_package
from .settings import option

# the task of --tiny: made-up sentences, in a file of SST-2's form
SENTENCES = dataclasses.replace(TASKS["sst-2"], name="sentences", labels=("kitchen", "journey"), paper={})
ADJECTIVES = ("old", "small", "warm", "heavy", "plain", "quiet", "second", "good")
WORDS = (  # for each class, the possible words at each place of a sentence
    (
        ("stir", "boil", "bake", "cool", "slice", "taste", "pour", "fry"),
        ("the",),
        ADJECTIVES,
        ("soup", "bread", "cabbage", "sauce", "rice", "pear", "dough", "fish"),
    ),
    (
        ("cross", "leave", "reach", "follow", "see", "pass", "climb", "draw"),
        ("the",),
        ADJECTIVES,
        ("river", "road", "hill", "harbour", "forest", "border", "bridge", "town"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = option(
        "roberta-base",
        "folder of the model and its tokenizer, or a name that is in Hugging Face's cache; empty: a small"
        " random one",
    )
    data: str = option(
        "glue",
        "folder with GLUE's folders CoLA, MRPC, ... of TSV, JSONL or parquet files; empty: made-up sentences",
    )
    tasks: tuple[str, ...] = option(tuple(TASKS), "tasks; sentences, if --data is empty")
    methods: tuple[str, ...] = option(("lora", "pissa", "miss"), "adapter methods")
    lr: tuple[float, ...] = option((1e-4, 5e-4), "learning rates, each tried with each method")
    rank: int = option(8, "rank of LoRA; the other methods get the rank of as many parameters")
    targets: tuple[str, ...] = option(("query", "value"), "linears that are adapted")
    seeds: int = option(
        3,
        "runs of each, which differ in the first values of classifier and adapter and in the order of the"
        " rows",
    )
    epochs: int = option(10, "passes over the training rows")
    batch: int = option(32, "rows in a step")
    length: int = option(128, "longest row in tokens; longer ones are cut")


FULL = Settings()
TINY = Settings(
    model="",
    data="",
    tasks=("sentences",),
    methods=("lora", "miss"),
    lr=(5e-3,),
    rank=2,
    seeds=2,
    epochs=10,
    batch=16,
    length=24,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Scores, 0 to 1, of one method at one rate on one task: score -> a value for each seed."""

    task: str
    method: str
    lr: float
    trainable: int
    scores: dict[str, list[float]]


def run(settings: Settings) -> PaperResult:
    """Train every method at every rate on every task. Raises UserError for a name that does not exist, before
    the first run.
    """
    methods, tasks = check(settings)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        read = {task.name: read_task(settings.data or write_sentences(folder), task) for task in tasks}
        source = settings.model or write_random_model(folder, read[tasks[0].name][0])
        tokenizer = load_tokenizer(source)
        for task in tasks:
            rows = [tokenised(examples, tokenizer, settings.length) for examples in read[task.name]]
            for label, (method, options) in methods.items():
                for lr in settings.lr:
                    outcomes.append(
                        measure(task, label, lr, source, tokenizer, rows, (method, options), settings)
                    )
                    print(describe(outcomes[-1], task), flush=True)
    return PaperResult(
        (
            f"GLUE with {settings.model} (Table 2)"
            if settings.model
            else "Classification by a small random model: the path of Table 2, not its figures"
        ),
        (__doc__ or "").partition("\n\n")[2].strip(),
        [claim(task, outcomes) for task in tasks],
        [table(task, outcomes, read[task.name]) for task in tasks],
        lambda figure: draw(outcomes, tasks, figure),
        {"outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]},
    )


def check(settings: Settings) -> tuple[dict[str, tuple[str, dict[str, Any]]], list[Task]]:
    """Return label -> (method, options), and the tasks. Raises UserError for a method or task that does not
    exist, and for a wrong number.
    """
    require_package("transformers", "nlu")
    methods, tasks = systems(settings.rank), TASKS if settings.data else {SENTENCES.name: SENTENCES}
    for what, given, exist in (("method", settings.methods, methods), ("task", settings.tasks, tasks)):
        for name in given:
            if name not in exist:
                raise UserError(f"{what} {name!r} is unknown; there are: {', '.join(exist)}")
    for name in ("rank", "seeds", "epochs", "batch", "length"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} {getattr(settings, name)}: must be at least 1")
    if not all(lr > 0 for lr in settings.lr):
        raise UserError(f"--lr {' '.join(map(str, settings.lr))}: must be above 0")
    return {name: methods[name] for name in settings.methods}, [tasks[name] for name in settings.tasks]


def measure(
    task: Task,
    label: str,
    lr: float,
    source: str,
    tokenizer: Any,
    rows: list,
    adapter: tuple[str, dict],
    settings: Settings,
) -> Outcome:
    """Train and score one method at one rate, with each seed."""
    scores: dict[str, list[float]] = collections.defaultdict(list)
    training, development = rows
    right = [c for _, c in development]
    for seed in range(settings.seeds):
        model = load_model(source, len(task.labels), seed)
        injection = adapt(model, adapter[0], settings.targets, adapter[1])
        train(model, tokenizer, training, Training(lr, settings.epochs, settings.batch, seed))
        predicted = predict(model, tokenizer, development, settings.batch)
        for name, score in task.scores.items():
            scores[name].append(score(predicted, right))
    return Outcome(task.name, label, lr, injection.trainable, dict(scores))


def describe(outcome: Outcome, task: Task) -> str:
    return f"{outcome.task} {outcome.method} lr {outcome.lr:g}: " + ", ".join(
        f"{name} {percent(values)}" for name, values in outcome.scores.items()
    )


def percent(scores: list[float]) -> str:
    """Write mean and standard deviation over the seeds, times 100."""
    mean, deviation = mean_and_deviation([100 * score for score in scores])
    return f"{mean:.2f}" if len(scores) == 1 else f"{mean:.2f} ± {deviation:.2f}"


def best(task: Task, method: str, outcomes: list[Outcome]) -> Outcome | None:
    """Return the outcome of a method at its best rate, by the task's first score."""
    own = [outcome for outcome in outcomes if (outcome.task, outcome.method) == (task.name, method)]
    return max(own, key=lambda outcome: sum(outcome.scores[next(iter(task.scores))]), default=None)


def claim(task: Task, outcomes: list[Outcome]) -> Claim:
    """Compare the paper's figures with ours at each method's best rate. They agree if MiSS and LoRA differ in
    the same direction by two standard errors.
    """
    score = next(iter(task.scores))
    found = {
        method: outcome
        for method in dict.fromkeys(o.method for o in outcomes)
        if (outcome := best(task, method, outcomes))
    }
    ours = ", ".join(
        f"{method} {percent(outcome.scores[score])} (lr {outcome.lr:g})" for method, outcome in found.items()
    )
    paper = ", ".join(f"{method} {value:.2f}" for method, value in task.paper.items()) or "-"
    agrees = None
    if task.paper and {"miss", "lora"} <= found.keys() and len(found["miss"].scores[score]) > 1:
        (miss, miss_sd), (lora, lora_sd) = (
            mean_and_deviation(found[method].scores[score]) for method in ("miss", "lora")
        )
        certain = abs(miss - lora) > 2 * ((miss_sd**2 + lora_sd**2) / len(found["miss"].scores[score])) ** 0.5
        agrees = (miss > lora) == (task.paper["miss"] > task.paper["lora"]) if certain else None
    return Claim(f"{task.name}, {score}: {paper}", ours, agrees)


def table(task: Task, outcomes: list[Outcome], read: list[list[Example]]) -> Table:
    """Make a row for each method and rate."""
    train_rows, dev_rows = map(len, read)
    rows = [
        (
            o.method,
            f"{o.lr:g}",
            o.trainable,
            *(percent(values) for values in o.scores.values()),
            task.paper.get(o.method),
        )
        for o in outcomes
        if o.task == task.name
    ]
    caption = (
        f"{task.name}: {train_rows:,} training rows, {dev_rows:,} development rows; 100 x mean ± sd over the"
        " seeds"
    )
    return Table(
        caption, ("method", "lr", "parameters", *task.scores, f"{next(iter(task.scores))} in the paper"), rows
    )


def draw(outcomes: list[Outcome], tasks: list[Task], figure: Any) -> None:
    """Draw for each task the first score of each method over the rate, and the paper's."""
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        score = next(iter(task.scores))
        for i, method in enumerate(dict.fromkeys(o.method for o in outcomes)):
            own = sorted(
                (o for o in outcomes if (o.task, o.method) == (task.name, method)), key=lambda o: o.lr
            )
            means = [mean_and_deviation(o.scores[score]) for o in own]
            axis.errorbar(
                [o.lr for o in own],
                [100 * m for m, _ in means],
                [100 * sd for _, sd in means],
                marker="o",
                color=f"C{i}",
                label=method,
            )
            if method in task.paper:
                axis.axhline(task.paper[method], color=f"C{i}", linestyle=":", label=f"{method}, paper")
        axis.set(title=f"{task.name}, {score}", xscale="log", xlabel="learning rate")
        axis.legend()


# data and model of --tiny


def write_sentences(folder: str) -> str:
    """Write 300 sentences to train on and 100 others, no two alike, as FOLDER/sentences/train.tsv and
    dev.tsv; return the folder.
    """
    draw = random.Random(0)
    rows = []
    for label, grammar in enumerate(WORDS):
        sentences = draw.sample([*itertools.product(*grammar)], 200)
        rows += [f"{' '.join(words)}\t{label}\n" for words in sentences]
    draw.shuffle(rows)
    task = pathlib.Path(folder, SENTENCES.name)
    task.mkdir()
    for name, part in (("train", rows[:300]), ("dev", rows[300:])):
        (task / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(part), encoding="utf-8")
    return folder


def write_random_model(folder: str, examples: list[Example]) -> str:
    """Write a RoBERTa of two layers with random weights, and a tokenizer of the words of these examples, as a
    folder; return it.
    """
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForSequenceClassification

    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        (text for example in examples for text in example.texts),
        tokenizers.trainers.WordLevelTrainer(
            vocab_size=2000, special_tokens=list(special.values()), show_progress=False
        ),
    )
    words.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    # matrices of size 0.1 rather than 0.02, so that the untrained layers pass their input on
    config = RobertaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=130,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        RobertaForSequenceClassification(config).save_pretrained(folder)
    return folder
