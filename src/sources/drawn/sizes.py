"""Sizes of rollouts: their length, the number sampled at once, and their work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch

from ...data.batches import Schedule
from ...data.chat_template import begins_thoughts
from ...data.held_out import FORWARD
from ...data.questions import (
    LIMITS,
    THOUGHTS,
    LoadedQuestions,
    Question,
    Questions,
    answer_limit,
    text_length,
)
from ...data.tokenizer import Tokenizer
from ...losses.grpo import REWARDS
from ...model.batch_loss import state_bytes
from ..estimates import BatchSizes, SharedPrompts, Work

WITHOUT_REFERENCE_ANSWER = ("regex", "length")  # built-in rewards that ignore the reference answer
FREE = 512  # tokens of an answer for rewards without a limit on its length
MEASURED = 1000  # reference answers whose lengths are the estimate of an answer's length
LONGER = 1.5  # assume answers 1.5 x as long as the reference answers: wrong answers are longer
# More rows make a token's operators larger and no more of them. At the end of a phase few rows are left.
ROWS = {"cpu": 128, "gpu": 512}
STATES = 3  # states of a row while a token is made: the old one, the new one, and a copy in between
TOGETHER = 4096  # tokens of prompts that are read as one batch, with padding
# numbers that a layer holds for each channel of a prompt's token while it reads the prompt
READ_NUMBERS = 22
# fp32 numbers of a row for each token of the vocabulary: the logits, and values made from them
LIKELIHOODS = 3
STATE_BYTES = {"cpu": 1 << 30, "gpu": 8 << 30}  # the most for these


def needs_answer(rewards: Iterable[str]) -> bool:
    """Tell whether a reward compares with the reference answer. Functions of --reward_file are not known."""
    return any(name in REWARDS and name not in WITHOUT_REFERENCE_ANSWER for name in rewards)


def have_answers(questions: Sequence[Question]) -> bool:
    """Tell whether questions have reference answers: they do not if all have the same, or none."""
    return len({str(question.answer).strip() for question in questions}) > 1


def longest_answer(
    loaded: LoadedQuestions,
    tokenizer: Tokenizer,
    rewards: Mapping[str, float],
    reward_length: int,
    ctx_len: int,
) -> tuple[int, str]:
    """Choose (max_tokens, why): the most that a reward needs, within --ctx_len, which is 0 if it is open.

    A reward without a limit on the length does not raise the limit of another reward with a weight.
    """
    telling = [name for name, weight in rewards.items() if weight and _tells_length(name)]
    limits = (_limit(name, loaded, tokenizer, reward_length) for name in telling or rewards)
    limit, reason = max(limits, key=lambda choice: choice[0])
    room = _room(loaded, ctx_len)
    if limit > room and reward_length >= room:
        raise UserError(
            f"--reward_length {reward_length}: --ctx_len {ctx_len} has room for answers of"
            f" {room} tokens, so that none would be too long; raise --ctx_len, or lower --reward_length"
        )
    return within_row(limit, reason, loaded, ctx_len)


def within_row(limit: int, reason: str, loaded: LoadedQuestions, ctx_len: int) -> tuple[int, str]:
    """Lower a choice of max_tokens to what --ctx_len has room for, if that is set."""
    room = _room(loaded, ctx_len)
    return (limit, reason) if limit <= room else (room, f"what --ctx_len {ctx_len} has room for")


def _room(loaded: LoadedQuestions, ctx_len: int) -> float:
    """Count the tokens of an answer that --ctx_len has room for."""
    # half of the row at least: a few long prompts are left out and do not shorten all answers
    return max(ctx_len + 1 - loaded.longest, ctx_len // 2, 1) if ctx_len else math.inf


def _tells_length(name: str) -> bool:
    return name in REWARDS and name != "regex"


def _limit(name: str, loaded: LoadedQuestions, tokenizer: Tokenizer, reward_length: int) -> tuple[int, str]:
    """Choose the most tokens of an answer for one reward, and say why."""
    if any(begins_thoughts(question.opening) for question in loaded.questions):
        return THOUGHTS, "the template begins answers with thoughts"
    if name == "length":  # which falls over a fifth of the answer, as in DAPO
        return reward_length + reward_length // 4 + 16, "--reward_length, a quarter more, and 16"
    if name in LIMITS:
        return LIMITS[name], f"for the reward {name}"
    if name in REWARDS and name not in WITHOUT_REFERENCE_ANSWER:
        limit = answer_limit(name, tokenizer, loaded.questions)
        return limit, f"1.25 times the longest reference answer, plus 16, for the reward {name}"
    return FREE, f"for the reward {name}, which does not tell how long an answer is"


def usual_length(loaded: LoadedQuestions, tokenizer: Tokenizer, rewards: Mapping[str, float]) -> float:
    """Estimate the mean tokens of an answer, for the time: half as many again as reference answers have.

    It is inf without an estimate: there are no reference answers, or they give only the result of a longer
    answer.
    """
    if any(weight and name in LIMITS for name, weight in rewards.items()):
        return math.inf
    if any(begins_thoughts(question.opening) for question in loaded.questions):
        return math.inf
    answers = [question.answer for question in loaded.questions if question.answer.strip()]
    lengths = [text_length(tokenizer, answer) for answer in answers[:: len(answers) // MEASURED + 1]]
    return LONGER * (1 + statistics.fmean(lengths)) if lengths else math.inf  # 1 for the end


def largest_groups(questions: Questions, micro_bsz: int, chunk_ctx: int) -> BatchSizes:
    """Return the sizes of the largest micro-batch, with answers as long as they may be."""
    prompt = int(questions.prompt_lengths.max(initial=1))
    trained = micro_bsz * questions.answer_tokens
    # the length of all answers to a question, each after its prompt
    row = questions.group_size * (prompt - 1 + questions.max_tokens)
    if chunk_ctx:
        return BatchSizes(row, trained)
    shared = SharedPrompts(micro_bsz, max(1, prompt - 1), questions.max_tokens, questions.group_size)
    return BatchSizes(row, trained, shared)


def rollout_tokens(schedule: Schedule, steps: int, asked: Questions) -> tuple[float, float]:
    """Count the tokens of all (prompts, answers) that a run of `steps` steps samples, at the likely length.

    `asked` are questions of the run, all of them or some.
    """
    passes = steps / schedule.steps_per_pass
    most = passes * sum(schedule.targets)
    return passes * sum(schedule.lengths) - most, most * asked.likely_tokens / asked.max_tokens


def evaluation_work(evaluated: Questions) -> list[Work]:
    """Estimate the work of an evaluation for each question, which gets one answer."""
    return [Work(FORWARD * prompt, evaluated.likely_tokens) for prompt in evaluated.prompt_lengths.tolist()]


def rows_at_once(arch: Arch, itemsize: int, accelerator: str, answers: int) -> int:
    """Choose the engine's rows for `answers` answers, with activations of `itemsize` bytes.

    It does not depend on the memory that is free: matrix products of other sizes may round otherwise, and a
    run that goes on samples what it would have sampled.
    """
    room = STATE_BYTES[accelerator] // (STATES * state_bytes(arch, 1, itemsize))
    return max(1, min(answers, ROWS[accelerator], room))
