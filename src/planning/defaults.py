"""Defaults for open settings: functions of the settings, the model, the data and the free memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from rwkv_miss.adapter import FIRST_MOVE, METHODS
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch

from ..common.formatting import counted, size_text
from ..config import Config
from ..losses import loss_of
from .draft import Draft

GUESSED = "from method, rank and widths"  # the reason of a chosen rate
SUGGESTED_CHUNK_CTX = 512  # tokens of a suggested chunk
SHORTEST, LONGEST = 256, 4096  # tokens of the rows that are chosen
LEAST_ROWS = 50  # rows of running text, if need be shorter ones
FEWEST_ROWS = 2  # rows of a step, where there are as many
RECOMPUTE = (0, 2, 1)  # --grad_cp, from the fastest to the smallest
RANK_SHARE = 8  # divisor of the width for the rank, in a model that is too narrow for 64
HELD_OUT_SHARE = 0.05  # share of many documents
SHARE_OF_FEW, MOST_OF_FEW = 0.1, 10  # the larger share of few documents, and the most that it may be
LEAST_HELD_OUT, MOST_HELD_OUT, LARGEST_SHARE = 5, 100, 0.25
UNDIVIDED = 20  # fewer documents are all trained on
BETWEEN = 100  # steps between evaluations, about
WARM_UP = 0.05  # share of a run's steps


def choose_loss(draft: Draft) -> None:
    """Fill in what the loss has of its own; the longest answer, max_tokens, is chosen with the data."""
    for choice in draft.source.loss.defaults(draft.config):
        draft.choose(*choice)


def own_rank(method: str, width: int) -> tuple[dict[str, int], str]:
    """Choose (peft_config, why): the method's own rank, less in a narrow model; {} without a rank."""
    own = getattr(METHODS[method].Options(), "rank", 0)
    if not own:
        return {}, "there is nothing to choose"
    rank = max(min(own, width // RANK_SHARE), 1)
    reason = f"the rank of --peft {method}" if rank == own else f"1/{RANK_SHARE} of the width, {width}"
    return {"rank": rank}, reason


def row_length(longest: int, chunk_ctx: int, texts: int = 0, word: str = "document") -> tuple[int, str]:
    """Choose (ctx_len, why) for examples of at most `longest` inputs: a power of two, unbounded with chunks.

    `texts` are the inputs of all documents if they are running text, which loses nothing when it is cut; else
    0.
    """
    length, reason = SHORTEST, f"the longest {word} has {counted(longest, 'token')}"
    while length < longest:
        length *= 2
    if length > LONGEST and not chunk_ctx:
        length, reason = LONGEST, f"{reason}, more than is chosen without --chunk_ctx"
    shorter = length
    while texts and not chunk_ctx and shorter > SHORTEST and texts < LEAST_ROWS * shorter:
        shorter //= 2
    if shorter < length:
        reason = f"longer rows of {counted(texts, 'token')} of running text would be fewer than {LEAST_ROWS}"
    return shorter, reason


def longest_uncut(ctx_len: int, chunk_ctx: int) -> float:
    """Return the inputs of the longest uncut conversation, with a ctx_len of 0 before it is chosen."""
    return ctx_len or (math.inf if chunk_ctx else LONGEST)


def held_out_share(documents: int, word: str, eval_file: str, eval_steps: int) -> tuple[float, str]:
    """Choose (eval_split, why). The share has two digits, so that it can be given as a flag.

    `word` is the name of a document.
    """
    if eval_file:
        return 0.0, "--eval_file is given"
    if documents < UNDIVIDED and not eval_steps:
        return 0.0, f"{counted(documents, word)}, too few to leave some out"
    wanted = max(HELD_OUT_SHARE * documents, min(SHARE_OF_FEW * documents, MOST_OF_FEW), LEAST_HELD_OUT)
    held = min(wanted, MOST_HELD_OUT, LARGEST_SHARE * documents)
    share = float(f"{held / max(documents, 1):.2g}")
    return share, f"{counted(max(1, round(share * documents)), word)} of {documents:,}"


def passes(steps: int, wanted: int, can_tell: bool) -> tuple[int, str]:
    """Choose (epoch_count, why): as many passes of `steps` steps as make about `wanted`, at least one."""
    reason = f"one pass makes {counted(steps, 'step')}"
    if not can_tell:
        return 1, f"{reason}; no evaluation would tell what more of them do"
    if steps >= wanted:
        return 1, reason
    return round(wanted / steps), f"{reason}, and few data are read for about {wanted:,}"


def choose_length(draft: Draft, steps_per_pass: int, documents: int, held_out: bool) -> None:
    """Fill in epoch_count, lr_schedule and warmup_steps, and eval_steps where passes are chosen.

    Those of a run on rewards follow from what they cost. Few documents, of which none is held out, are
    repeated, too.
    """
    config, by_loss = draft.config, draft.source.loss.metrics.by_loss
    if config.is_automatic("epoch_count"):
        evaluates = held_out and (config.is_automatic("eval_steps") or config.eval_steps > 0)
        can_tell = evaluates or by_loss and not held_out and documents < UNDIVIDED
        count, reason = 1, "--epoch_steps is given"
        if not config.epoch_steps:
            count, reason = passes(steps_per_pass, loss_of(config).facts.usual_steps, can_tell)
        draft.choose("epoch_count", count, reason)
        if count > 1 and held_out and by_loss:
            between = -(-BETWEEN // config.inner_steps) * config.inner_steps  # between two draws
            draft.choose("eval_steps", between, "several passes are chosen")
    draft.choose("lr_schedule", "cos", "the run's length is known")
    steps = draft.config.total_steps(steps_per_pass)
    draft.choose("warmup_steps", warm_up(steps), f"{WARM_UP:.0%} of the run")


def choose_eval_steps(draft: Draft, steps: int, affordable: float) -> None:
    """Fill in eval_steps of a run on rewards of `steps` steps, with time for `affordable` evaluations.

    Rewards may fall within a few steps, and best.pth is from an evaluation. Two are made anyway.
    """
    between = min(draft.source.loss.facts.evaluations_between, int(affordable) - 2)
    if between < 1:
        return
    inner_steps = draft.config.inner_steps
    draws = -(-steps // inner_steps)
    every = -(-draws // (between + 1)) * inner_steps  # they fall between two draws
    if every < steps:
        draft.choose("eval_steps", every, "drawn answers may get worse within a few steps")


def choose_no_evaluations(draft: Draft) -> None:
    """Fill in eval_steps and early_stop where nothing else was chosen for them."""
    draft.choose("eval_steps", 0, "nothing asks for evaluations in between")
    draft.choose("early_stop", 0, "the run's length is known")
    if draft.config.lr_schedule == "plateau" and not draft.config.eval_steps:
        raise UserError(
            "--lr_schedule plateau follows the evaluations, and there are none: give --eval_steps N"
        )


def warm_up(steps: int) -> int:
    """Choose the steps of the warm-up in a run of `steps` steps."""
    return int(WARM_UP * steps)


def choose_batch(draft: Draft, rows: int, needed: Callable[[Config], float], room: float) -> None:
    """Fill in micro_bsz, accumulate_grad_batches and grad_cp for data of `rows` rows.

    `needed` returns the bytes that settings need; `room`: the bytes that there are. If nothing fits, the
    smallest is taken, because an estimate may be wrong.
    """
    config = draft.config
    if config.is_automatic("micro_bsz"):
        for tried in _batches(config, rows):
            if (size := needed(tried)) <= room:
                break
        reason = f"needs {size_text(size)}, and {size_text(room)} may be used"
        is_given = config.global_bsz or not config.is_automatic("accumulate_grad_batches")
        facts = loss_of(config).facts
        small = facts.has_small_steps and _rows_of_a_step(config, rows) < facts.usual_rows
        if small and not is_given:
            reason += f"; with more rows in a step a pass would have fewer than {facts.usual_steps} steps"
    else:
        tried = dataclasses.replace(config, accumulate_grad_batches=config.accumulation, grad_cp=0)
        reason = "--micro_bsz is given"
    for name in ("micro_bsz", "accumulate_grad_batches", "grad_cp"):
        # with --global_bsz the accumulation follows from it, on any number of devices
        if not (name == "accumulate_grad_batches" and config.global_bsz):
            draft.choose(name, getattr(tried, name), reason)


def _batches(config: Config, rows: int) -> Iterator[Config]:
    """Yield the ways to run a step, the fastest first."""
    most, given = _rows_of_a_process(config, rows), config.settled().accumulate_grad_batches
    sizes = [n for n in range(min(most, loss_of(config).facts.usual_rows), 0, -1) if most % n == 0]
    if config.global_bsz and given:
        sizes = [most]
    for grad_cp in RECOMPUTE if config.is_automatic("grad_cp") else (config.grad_cp,):
        for size in sizes:
            passes = given or most // size
            yield dataclasses.replace(config, micro_bsz=size, accumulate_grad_batches=passes, grad_cp=grad_cp)


def _rows_of_a_process(config: Config, rows: int) -> int:
    """Count the rows of one process in a step, or in a pass if the number of passes is given."""
    passes = config.settled().accumulate_grad_batches
    if config.global_bsz:
        return config.global_bsz // (config.world * (passes or 1))
    if passes:
        return loss_of(config).facts.usual_rows
    return max(_rows_of_a_step(config, rows) // config.world, 1)


def _rows_of_a_step(config: Config, rows: int) -> int:
    """Choose a power of two from FEWEST_ROWS to usual_rows with which one pass has usual_steps, if it can."""
    facts = loss_of(config).facts
    enough = rows * (config.settled().epoch_count or 1) // facts.usual_steps
    if config.epoch_steps:
        enough = facts.usual_rows
    elif not facts.has_small_steps:
        enough = rows
    fewest = min(rows, FEWEST_ROWS)
    return 1 << max(min(enough, facts.usual_rows), fewest, 1).bit_length() - 1


def cheapest_fix(
    config: Config, precision: str, tokens: int, fits: Callable[[Config], bool]
) -> dict[str, object] | None:
    """Find the settings to change so that a run fits; {} if it fits as it is, None if nothing helps.

    The cheapest change is tried first. Fewer rows at once with more passes in a step cost nothing, so they
    are combined with every other remedy. `precision` is that of the base, `tokens` the longest row.
    """
    for changes in _remedies(config, precision, tokens):
        changed = dataclasses.replace(config, **changes)
        for rows, passes in _halvings(changed.micro_bsz, changed.accumulation):
            if not fits(dataclasses.replace(changed, micro_bsz=rows, accumulate_grad_batches=passes)):
                continue
            if rows == config.micro_bsz:
                return changes
            if config.global_bsz:  # the accumulation follows from --global_bsz
                return {"micro_bsz": rows} | changes
            return {"micro_bsz": rows, "accumulate_grad_batches": passes} | changes
    return None


def _halvings(rows: int, passes: int) -> Iterator[tuple[int, int]]:
    """Yield (micro_bsz, accumulate_grad_batches) with the same rows in a step; most rows at once first."""
    yield rows, passes
    while rows % 2 == 0:
        rows, passes = rows // 2, passes * 2
        yield rows, passes


def _remedies(config: Config, precision: str, tokens: int) -> Iterator[dict[str, object]]:
    """Yield changes of settings other than micro_bsz, the cheapest first, each with those before it.

    Recomputing costs up to a forward, and chunks another. Moments in 8 bits, bf16 and nf4 cost precision.
    ZeRO-3 costs speed.
    """
    changes: dict[str, object] = {}
    yield changes
    for recompute in RECOMPUTE[RECOMPUTE.index(config.grad_cp) + 1 :]:
        changes = changes | {"grad_cp": recompute}
        yield changes
    row = min(tokens, config.ctx_len)
    if config.chunk_ctx == 0 and row > SUGGESTED_CHUNK_CTX:
        changes = changes | {"chunk_ctx": SUGGESTED_CHUNK_CTX}
        yield changes
    if config.peft == "none" and config.optimizer == "adamw":  # an adapter's moments are small
        changes = changes | {"optimizer": "adamw8bit"}
        yield changes
    if precision == "fp32" and config.peft != "none":
        changes = changes | {"precision": "bf16"}
        yield changes
    shared = config.strategy.startswith("deepspeed_stage_3")
    if config.quant == "none" and config.peft != "none" and not shared:
        yield changes | {"quant": "nf4"}
    if config.world > 1 and not shared and config.quant == "none":  # stage 3 has no quantised base
        yield changes | {"strategy": "deepspeed_stage_3"}


def share_of_time(arch: Arch, layers: int, trained: float) -> float:
    """Estimate the time of a step with adapters in the last `layers` layers, as a share of the whole one's.

    Its matrix products are counted: each has a backward, but for those of the layers below. The head reads
    the share `trained` of the tokens.
    """
    layer = 4 * arch.n_embd * arch.dim_att + 2 * arch.n_embd * arch.dim_ffn
    products = 2 * (arch.n_layer * layer + trained * arch.n_embd * arch.vocab_size)
    return 1 - (arch.n_layer - layers) * layer / products


def chosen_rate(config: Config, arch: Arch) -> float:
    """Choose a learning rate of two digits from method, rank and widths. A new model gets the published one.

    A preference without the chosen answers' cross entropy gets a smaller one, and so do rewards.
    """
    return float(f"{first_rate(config, arch) * loss_of(config).facts.rate_share:.2g}")


def first_rate(config: Config, arch: Arch) -> float:
    """Choose a learning rate of supervised training from method, rank and widths."""
    if config.peft != "none":
        method = METHODS[config.peft]
        options = method.Options.parse(dict(config.adapter.options))
        return method.first_rate(len(config.adapted_layers(arch.n_layer)), arch.n_embd, options)
    return first_rate_of_all(arch) if config.load_model else config.published_rate


def first_rate_of_all(arch: Arch) -> float:
    """Choose a learning rate of full training: a step moves an output by the sum over its inputs. Half of
    them count, as measured (docs/worklog.md)."""
    return FIRST_MOVE / (arch.n_layer * arch.n_embd / 2)
