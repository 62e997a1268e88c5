"""Preview of questions for training on rewards, for scripts.preview: the prompts, and the rewards of
reference answers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rwkv_miss.errors import UserError
from scripts.preview_lint import Lint, for_machines, odd_question
from scripts.preview_samples import shown, spread_places
from src.common.formatting import counted
from src.config import Config
from src.config.reward_rules import check_rewards
from src.config.schema import CHOSEN
from src.data.bos import describe_bos
from src.data.chat_template import Template
from src.data.encode import Encoder
from src.data.file_documents import Document
from src.data.formats import Reading, Report, encodable
from src.data.questions import LoadedQuestions, Question, QuestionReader, Questions, ReadQuestion
from src.evaluation.rewards import RANGES, Failed, Rewards
from src.losses.grpo import REWARDS
from src.planning.defaults import choose_loss, row_length
from src.planning.draft import Draft
from src.sources import source_of

if TYPE_CHECKING:
    from scripts.preview import Own

PERCENTILES = (0, 50, 90, 99, 100)
# rewards that are computed in this process, for all reference answers; others score JUDGED of them elsewhere
HERE = ("exact", "number", "boxed", "partial", "length")
JUDGED = 64
SHOWN = 600  # characters of a reference answer


class RightAnswer(NamedTuple):
    """Reference answer, as if it had been drawn."""

    text: str
    tokens: Sequence[int]
    cut: bool


class ReadQuestions(NamedTuple):
    """Questions of the files, and findings about them."""

    loaded: LoadedQuestions
    questions: Questions  # the loaded questions that fit into ctx_len
    right: list[RightAnswer]  # reference answer of each loaded question
    lint: Lint
    report: Report


def preview_questions(config: Config, encoder: Encoder, ours: Own, plain: bool) -> bool:
    """Print the findings, and some questions; returns whether something is odd."""
    draft = Draft(config)
    choose_loss(draft)
    check_rewards(draft.config)
    found = look(draft, encoder)
    config = draft.config
    with Rewards.of(config, encoder.template) as rewards:
        worth = worth_of(rewards, config, encoder, found)
        if ours.json:
            findings, loaded = for_machines(found.lint.findings), found.loaded.questions
            samples = [
                [(loaded[i].prompt, 0.0), (str(loaded[i].answer), 0.0)]  # no reference answer is trained
                for i in spread_places(ours.samples, loaded)
            ]
            said = {**figures(config, found), "rewards": worth, "findings": findings, "samples": samples}
            print(json.dumps(said))
        else:
            print("\n".join(overview(config, encoder, found, worth)))
            for i in spread_places(ours.samples, found.loaded.questions):
                print("\n".join(sample_lines(found, i, rewards, encoder, plain)))
    return bool(found.lint.findings)


def look(draft: Draft, encoder: Encoder) -> ReadQuestions:
    """Read all questions, with the defaults that a run would choose; findings go to the Lint."""
    config = draft.config
    lint, report, reading = Lint(encoder, 0), Report("skip"), Reading.of(config)
    answers: dict[bytes, set[str]] = {}  # prompt -> its reference answers

    def note(asked: ReadQuestion, row: dict) -> None:
        known = answers.setdefault(asked.prompt.tobytes(), set())
        if known:
            lint.note("duplicate" if asked.question.answer in known else "other answer", asked.where)
        known.add(asked.question.answer)
        for name in odd_question(row, encoder):
            lint.note(name, asked.where)

    source = source_of(config)
    reader = QuestionReader(encoder, reading, report, source.needs_answers)
    loaded = reader.load(config.data_file, config.random_seed, note)
    for file in report.files.values():
        if file.bad:
            lint.note("bad row", file.reasons[0], file.bad)
        if file.joined:
            lint.note("rows in a cell", file.joined, file.rows_in_cells)
        for count, places in file.left_out.values():
            lint.note("nothing asked", places[0], count)
    if config.eval_file:

        def compare(asked: ReadQuestion, row: dict) -> None:
            if asked.prompt.tobytes() in answers:
                lint.note("known prompt", asked.where)

        QuestionReader(encoder, reading, Report("skip"), False).load(config.eval_file, look=compare)
    for choice in source.defaults_by_data(loaded, encoder.tokenizer):
        draft.choose(*choice)
    draft.choose("ctx_len", *row_length(loaded.longest + draft.config.max_tokens - 1, config.chunk_ctx))
    config = draft.config
    questions = loaded.examples(config.ctx_len, config.group_size, config.max_tokens)
    if questions.too_long:
        lint.note("too long", questions.too_long_places[0], questions.too_long)
    right = [as_drawn(question, config, encoder) for question in loaded.questions]
    if cut := [place for place, answer in zip(loaded.places, right) if answer.cut]:
        lint.note("long answer", cut[0], len(cut))
    return ReadQuestions(loaded, questions, right, lint, report)


def as_drawn(question: Question, config: Config, encoder: Encoder) -> RightAnswer:
    """Make the reference answer as if a model had drawn it."""
    text = _written(question, encoder.template)
    try:
        tokens = [*encoder.tokenizer.encode(text), *encoder.tokenizer.eod]
    except UserError:  # the answer has no tokens, so no drawn answer can equal it
        tokens = [0] * len(text.encode())
    return RightAnswer(text, tokens, len(tokens) > config.max_tokens)


def _written(question: Question, template: Template) -> str:
    """Write a right answer in the template, with empty thoughts if the prompt opens thoughts."""
    turns = [{"role": "user", "content": "?"}]
    asked = "".join(segment.text for segment in template.segments(turns, ask=True))
    answered = template.segments([*turns, {"role": "assistant", "content": question.answer}])
    whole = "".join(segment.text for segment in answered)
    if question.opening == template.opening and whole.startswith(asked):
        return whole.removeprefix(asked)
    if not question.opening:
        return f" {question.answer}"
    return f">{'' if '</think' in question.opening else '</think>'}\n{question.answer}"


def worth_of(rewards: Rewards, config: Config, encoder: Encoder, found: ReadQuestions) -> dict[str, dict]:
    """Score reference answers by each built-in reward: {name: {"judged", "mean", "least", "below"}}.

    `below`: number of answers with less than the full reward, or whose scoring fails; they are a finding.
    """
    worth: dict[str, dict] = {}
    unrewarded: dict[int, list[str]] = {}  # number of a question -> names of rewards
    questions = found.loaded.questions
    for name in (name for name in rewards.names if name in REWARDS):
        places = range(len(questions))
        if name not in HERE:
            places = np.unique(np.linspace(0, len(questions) - 1, JUDGED).astype(int)).tolist()
        with Rewards.of(dataclasses.replace(config, rewards={name: 1.0}), encoder.template) as alone:
            scored = [alone.score(questions[i], [found.right[i]]) for i in places]
        values = [math.nan if isinstance(score, Failed) else float(score.total[0]) for score in scored]
        finite = [value for value in values if not math.isnan(value)]
        below = [i for i, value in zip(places, values) if not value >= RANGES[name][1]]
        worth[name] = {
            "judged": len(values),
            "mean": math.fsum(finite) / len(finite) if finite else None,
            "least": min(finite, default=None),
            "below": len(below),
        }
        for i in below:
            unrewarded.setdefault(i, []).append(name)
    if unrewarded:
        first = min(unrewarded)
        where = f"{found.loaded.places[first]}, {' and '.join(unrewarded[first])}"
        found.lint.note("unrewarded", where, len(unrewarded))
    return worth


def figures(config: Config, found: ReadQuestions) -> dict:
    """Compute figures about the questions, name -> number; lengths are in tokens."""
    prompts = [len(prompt) for prompt in found.loaded.prompts]
    right = [len(answer.tokens) for answer in found.right]
    return {
        "rows": len(prompts),
        "tokens": sum(prompts),
        "lengths": _percentiles(prompts),
        "right_lengths": _percentiles(right),
        "questions": len(found.questions),
        "max_tokens": config.max_tokens,
        "ctx_len": config.ctx_len,
        "too_long": found.questions.too_long,
        "longer_than_max_tokens": sum(answer.cut for answer in found.right),
        "left_out": {
            reason: count
            for file in found.report.files.values()
            for reason, (count, _) in file.left_out.items()
        },
    }


def _percentiles(lengths: list[int]) -> dict[str, int]:
    return {f"{p}%": int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES}


def overview(config: Config, encoder: Encoder, found: ReadQuestions, worth: dict[str, dict]) -> list[str]:
    """Write the lines about the questions as a whole."""
    told = figures(config, found)
    longer = told["longer_than_max_tokens"]
    reason = config.origins.get("max_tokens", "").removeprefix(f"{CHOSEN}: ")
    lines = [
        *found.report.source_lines(),
        f"template   {encoder.template.name}; tokenizer {encoder.tokenizer.name};"
        f" {describe_bos(encoder.bos)}",
        f"questions  {told['rows']:,}; a prompt has {_spread(told['lengths'])}",
        f"right      answers have {_spread(told['right_lengths'])}, with their end",
        f"max_tokens {config.max_tokens}{f': {reason}' if reason else ''};"
        f" {counted(longer, 'reference answer') if longer else 'no reference answer'}"
        f" {'are' if longer > 1 else 'is'} longer",
        f"ctx_len    {config.ctx_len}, of which a prompt and one answer take at most"
        f" {int(found.questions.prompt_lengths.max()) - 1 + config.max_tokens}",
        f"loss       {source_of(config).description}",
        *(_worth_line(name, values) for name, values in worth.items()),
        *found.report.left_out_lines(),
    ]
    if too_long := found.questions.too_long_text(config.ctx_len):
        lines.append(f"left out   {too_long}")
    lines += [f"finding    {encodable(str(finding))}" for finding in found.lint.findings]
    return [encodable(line) for line in lines] + ([] if found.lint.findings else ["finding    none"])


def _spread(lengths: dict[str, int]) -> str:
    return f"{lengths['50%']:,} tokens in the median, {lengths['99%']:,} at 99 %, at most {lengths['100%']:,}"


def _worth_line(name: str, values: dict) -> str:
    of = counted(values["judged"], "reference answer")
    if values["mean"] is None:
        return f"reward     {name}: failed for all of {of}"
    least = f", at least {values['least']:.3g}" if values["below"] else ""
    return f"reward     {name}: {values['mean']:.3g} in the mean of {of}{least}"


def sample_lines(found: ReadQuestions, i: int, rewards: Rewards, encoder: Encoder, plain: bool) -> list[str]:
    """Show question i: its prompt, its reference answer, and that answer's rewards."""
    question, prompt, right = found.loaded.questions[i], found.loaded.prompts[i], found.right[i]
    asked = Document(prompt, np.zeros(len(prompt), np.float32))
    scored = rewards.score(question, [right])
    if isinstance(scored, Failed):
        worth = f"failed: {scored.reason}"
    else:
        values = zip(rewards.names, scored.values[0].tolist())
        worth = ", ".join(f"{name} {value:.3g}" for name, value in values)
        worth += f"; together {float(scored.total[0]):.3g}"
    answer = question.answer if len(question.answer) <= SHOWN else f"{question.answer[:SHOWN]} ..."
    return [
        f"question {i + 1} of {len(found.loaded.questions)}, {len(prompt)} tokens, as it is asked:",
        shown(asked, encoder.tokenizer, plain),
        f"  right, {len(right.tokens)} tokens with its end{f'; it gets {worth}' if rewards.names else ''}:",
        *(f"    | {line}" for line in answer.splitlines()),
    ]
