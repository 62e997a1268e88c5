"""Run EleutherAI's lm-evaluation-harness on a model of this project.

    python -m scripts.lm_eval --model m.pth --tasks lambada_openai,piqa

Install the extra lm-eval first. The harness reads its data sets from the Hugging Face hub or its cache. The
task lambada_local reads --data_file instead.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.lm_eval")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import UserError, first_line, one_line_errors
    from rwkv_miss.files.hub import with_local_files
    from rwkv_miss.files.hub_names import recorded
    from rwkv_miss.files.output import require_writable
    from rwkv_miss.flags import flag, options, parse_flags
    from src.common.device import PRECISION_FLAG, choose_accelerator, choose_precision
    from src.common.files import write_text
    from src.config.validate import check_bos
    from src.data.bos import bos_ids
    from src.data.fetch import fetch_data
    from src.data.templates import TEMPLATE_FLAG, TOOL_STYLE_FLAG, recorded_template
    from src.inference.load import load

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def main(argv: list[str]) -> None:
    """Evaluate and print the table; the last line is JSON."""
    args = arguments(argv)
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness can't be imported ({error}): pip install 'lm_eval>=0.4.12'"
        ) from None
    from src.evaluation.lm_eval_model import HarnessModel

    manager, tasks = load_tasks(args)
    args = with_local_files(args)
    precision, _ = choose_precision(args.precision, choose_accelerator("auto"))
    model, tokenizer = load(args.model, args.adapter, args.tokenizer, args.eod, precision=precision)
    template = recorded_template(
        args.template, tokenizer, args.adapter, args.model, tool_style=args.tool_style
    )
    bos = bos_ids(args.bos, tokenizer, args.adapter, args.model)
    print(f"BOS: {protocol(bos)}")
    results = lm_eval.simple_evaluate(
        HarnessModel(model, tokenizer, template, bos),
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
        apply_chat_template=args.chat,
    )
    print(lm_eval.utils.make_table(results))
    figures = {task: numbers_of(scores) for task, scores in results["results"].items()}
    if args.out:
        details = {"bos": list(bos), "results": figures, "samples": results["samples"]}
        write_text(args.out, json.dumps(details, default=str, indent=1) + "\n")
    summary = {
        "model": recorded(args.model),
        "adapter": recorded(args.adapter),
        "precision": precision,
        "bos": list(bos),
        "lm_eval": lm_eval.__version__,
        "results": figures,
    }
    print(json.dumps(summary))


def numbers_of(scores: dict[str, Any]) -> dict[str, float]:
    """Return a task's figures, without its name and other texts."""
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def protocol(bos: tuple[int, ...]) -> str:
    """Describe the tokens at the beginning of every text."""
    if not bos:
        return "none; a text with nothing before it is scored after the end of a document"
    return f"{list(bos)} + text" + (", BlinkDL's protocol" if bos == (0,) else "")


@options
class Flags:
    """Flags of this program."""

    model: str = flag(help="base or merged .pth, or hf://OWNER/NAME[/FILE]", file=True)
    adapter: str | None = flag(None, "an adapter .pth of this base model", file=True)
    tasks: str = flag(help="tasks or groups of the harness, separated by commas, or lambada_local")
    data_file: str | None = flag(None, 'rows {"text"} of LAMBADA, for lambada_local')
    include_path: str | None = flag(None, "folder with tasks of your own (YAML)")
    num_fewshot: int | None = flag(None, "solved examples before each question (default: the task's)", low=0)
    limit: int | None = flag(None, "ask the first N questions of each task (default: all)", low=1)
    chat: bool = flag(False, "ask in the model's chat template")
    tokenizer: str = flag("auto")
    eod: str = flag("")
    template: str = flag(**TEMPLATE_FLAG)
    tool_style: str = flag(**TOOL_STYLE_FLAG)
    bos: str = flag(
        "auto",
        "the token before every text: auto (the end-of-document token, 0 in World, as in BlinkDL's"
        " evaluations), none, recorded (as the adapter or the model was trained), or an id; default"
        " %(default)s",
    )
    precision: str = flag(**PRECISION_FLAG)
    out: str | None = flag(None, "JSON file for results and every sample")


def arguments(argv: list[str]) -> Flags:
    about = __doc__.partition("\n\n")[0]
    args = parse_flags(Flags, argv, prog="python -m scripts.lm_eval", description=about)
    check_bos(args.bos)
    if args.data_file and "lambada_local" not in args.tasks.split(","):
        raise UserError(f"--data_file is for the task lambada_local; --tasks {args.tasks} reads its own")
    if args.out:
        require_writable(args.out)
    return args


def needed(data_file: str | None) -> str:
    """Return the file. Raises UserError if none was given."""
    if data_file is None:
        raise UserError('task lambada_local needs --data_file, LAMBADA\'s rows as {"text": ...}')
    return data_file


def known(name: str, manager: TaskManager) -> str:
    """Return the name. Raises UserError for one that the harness does not know."""
    if name not in manager.all_tasks:
        near = [task for task in manager.all_tasks if name.split("_")[0] in task][:10]
        hint = f"near: {', '.join(near)}" if near else "python -m lm_eval ls tasks lists them"
        raise UserError(f"task {name!r} is unknown to the harness; {hint}")
    return name


def load_tasks(args: Flags) -> tuple[TaskManager, list]:
    """Load the harness's manager, and the tasks of the flags with their data, before the model.

    Raises UserError for a task that is unknown, that lacks its data, or that runs the model's text as code.
    """
    from lm_eval.tasks import TaskManager

    from src.evaluation.lm_eval_model import Lambada

    names = args.tasks.split(",")
    local = {name: Lambada(fetch_data(needed(args.data_file))) for name in names if name == Lambada.NAME}
    manager = TaskManager(include_path=args.include_path, include_defaults=False)
    if not {*names} <= {*local, *manager.all_tasks}:
        # the harness searches its own tasks, which takes seconds
        manager = TaskManager(include_path=args.include_path)
    tasks = [local.get(name) or known(name, manager) for name in names]
    try:
        loaded = manager.load(tasks)["tasks"]
    except Exception as error:  # no network, no such data set: datasets raises many types
        raise UserError(f"the harness can't load the tasks: {first_line(error)}") from None
    for name, task in loaded.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"task {name} runs what the model writes, which this program does not do; HumanEval and MBPP"
                " from a file: python -m scripts.evaluate --score code"
            )
    return manager, tasks


if __name__ == "__main__":
    with one_line_errors(), naming_missing_packages():
        main(sys.argv[1:])
