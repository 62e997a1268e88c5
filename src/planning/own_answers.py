"""What is chosen and counted for a run that trains on answers of its own, --loss grpo."""

from __future__ import annotations

from rwkv_miss.errors import UserError

from ..config import Config
from ..config.loss_settings import REWARDS
from ..data.batches import Schedule
from ..data.chat_template import begins_thoughts
from ..data.held_out import FORWARD
from ..data.questions import LIMITS, THOUGHTS, LoadedQuestions, Questions, answer_limit
from ..data.tokenizer import Tokenizer
from .step_memory import SharedPrompts
from .throughput import Work

WITHOUT_RIGHT = ("regex", "length")  # built-in rewards that don't look at the right answer
FREE = 512  # tokens of an answer for rewards that say nothing of its length


def needs_right(config: Config) -> bool:
    """Whether a reward compares with the right answer. What functions of --reward_file do is not known."""
    return any(name in REWARDS and name not in WITHOUT_RIGHT for name in config.rewards)


def longest_answer(config: Config, loaded: LoadedQuestions, tokenizer: Tokenizer) -> tuple[int, str]:
    """(max_tokens, why): the most that a reward needs, within a given --ctx_len."""
    limit, reason = max(
        (_limit(name, config, loaded, tokenizer) for name in config.rewards), key=lambda choice: choice[0]
    )
    if not config.ctx_len:
        return limit, reason
    # half of the row at least: a few long prompts are left out and do not shorten all answers
    room = max(config.ctx_len + 1 - loaded.longest, config.ctx_len // 2, 1)
    if limit <= room:
        return limit, reason
    if config.reward_length >= room:
        raise UserError(
            f"--reward_length {config.reward_length}: --ctx_len {config.ctx_len} has room for answers of"
            f" {room} tokens, so that none would be too long; raise --ctx_len, or lower --reward_length"
        )
    return room, f"what --ctx_len {config.ctx_len} has room for"


def _limit(name: str, config: Config, loaded: LoadedQuestions, tokenizer: Tokenizer) -> tuple[int, str]:
    """The tokens that an answer may have for one reward, and why."""
    if any(begins_thoughts(question.opening) for question in loaded.questions):
        return THOUGHTS, "the template begins answers with thoughts"
    if name == "length":  # which falls over a fifth of the answer, as in DAPO
        length = config.reward_length
        return length + length // 4 + 16, "--reward_length, a quarter more, and 16"
    if name in LIMITS:
        return LIMITS[name], f"for the reward {name}"
    if name in REWARDS and name not in WITHOUT_RIGHT:
        limit = answer_limit(name, tokenizer, loaded.questions)
        return limit, f"the longest right answer, a quarter more, and 16, for the reward {name}"
    return FREE, f"for the reward {name}, which does not tell how long an answer is"


def largest_groups(questions: Questions, config: Config) -> tuple[int, int, SharedPrompts | None]:
    """(tokens of the longest row, most trained tokens of a micro-batch, its sizes with prompts that are read
    once).

    Answers are counted as long as they may be.
    """
    prompt = int(questions.prompt_lengths.max(initial=1))
    trained = config.micro_bsz * questions.answer_tokens
    # of all answers to a question, each after its prompt
    row = questions.group_size * (prompt - 1 + questions.max_tokens)
    if config.chunk_ctx:
        return row, trained, None
    shared = SharedPrompts(config.micro_bsz, max(1, prompt - 1), questions.max_tokens, questions.group_size)
    return row, trained, shared


def training_work(config: Config, schedule: Schedule, steps: int) -> Work:
    """What a run of so many steps does at most: answers as long as they may be, and none of equal reward."""
    draws = steps / schedule.steps_per_pass
    answers = draws * sum(schedule.targets)
    prompts = draws * sum(schedule.lengths) - answers
    prompts_of_training = prompts * (config.group_size if config.chunk_ctx else 1)
    batch = prompts_of_training + answers
    reference = FORWARD * batch if config.beta else 0.0
    return Work(schedule.repeats * batch + FORWARD * prompts + reference, answers)


def evaluation_work(evaluated: Questions) -> list[Work]:
    """What an evaluation does for each question, which gets one answer."""
    return [Work(FORWARD * prompt, evaluated.max_tokens) for prompt in evaluated.prompt_lengths.tolist()]
