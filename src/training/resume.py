"""Resuming of a run: its checkpoint, its settings, and its number of rows in a step."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import read_metadata
from rwkv_miss.files.hub_names import recorded
from rwkv_miss.files.identity import Identity

from ..common.first_process import is_first_process
from ..config import AUTO, FIELDS, Config
from ..config.launcher import launched, whole_number
from ..config.parse import Recorded, recorded_settings
from ..config.reward_rules import check_rewards
from ..data.examples import Examples
from ..model import RWKV
from ..planning.draft import Draft
from .run_folder import (
    CHECKPOINTS,
    CONFIG,
    SUMMARY,
    adapter_of_step,
    checkpoint_step,
    list_checkpoints,
    output_path,
)
from .validation_log import BEST

# Settings that a resumed run may change and still be the same run. They decide how a step is computed, how
# many steps there are, and what is kept.
MAY_CHANGE = {
    "proj_dir",
    "resume",
    "data_cache",
    "eval_steps",
    "eval_samples",
    "early_stop",
    "wandb",
    "save_steps",
    "save_total_limit",
    "rollback_steps",
    "spike_sigmas",
    "grad_cp",
    "chunk_ctx",
    "reward_file",  # code, which the command line names each time
    "reward_timeout",
    "state_cp",
    "wkv",
    "accelerator",
    "verbose",
    "strategy",
    "devices",
    "num_nodes",
    "micro_bsz",
    "accumulate_grad_batches",
    "global_bsz",
    "epoch_count",
    "epoch_steps",
}
SO_FAR = "as the run has it so far"  # begins the reason of what is not chosen anew
# settings that may change, and are not chosen again
LENGTH = ("epoch_count", "eval_steps", "early_stop")
# sizes of a step's parts; the results are equal to rounding
BATCH = ("micro_bsz", "accumulate_grad_batches", "grad_cp")


def earlier_settings(proj_dir: str, resume: str) -> Recorded | None:
    """Read the settings of the run that --resume auto goes on with; None without such a run."""
    if resume != "auto" or not list_checkpoints(os.path.join(proj_dir, CHECKPOINTS)):
        return None
    file = os.path.join(proj_dir, CONFIG)
    if not os.path.exists(file):
        raise UserError(
            f"--resume auto: {file}, with the settings of the run, is not there; put it back, or choose"
            " another --proj_dir"
        )
    return recorded_settings(file)


def settings_of_first_process(proj_dir: str) -> Config | None:
    """Read the first process's settings, in a process that Lightning started after that; else None."""
    file = os.path.join(proj_dir, CONFIG)
    by_lightning = launched() is None and whole_number("LOCAL_RANK") > 0
    return recorded_settings(file).settings if by_lightning and os.path.exists(file) else None


def inherit(draft: Draft, earlier: Recorded) -> None:
    """Fill in the choices for the run so far, with the reasons of then.

    Settings that may change are left out. The length is an exception if no other --epoch_steps was given. So
    is the batch if there are as many processes as before and no other batch was given.
    """
    config, before = draft.config, earlier.settings
    length = LENGTH if config.epoch_steps in (0, before.epoch_steps) else ()
    if before.lr_schedule == "plateau":  # which follows the evaluations
        length = (*length, "eval_steps")
    as_before = config.accumulate_grad_batches in (AUTO, before.accumulation)
    batch = BATCH if config.world == before.world and config.is_automatic("micro_bsz") and as_before else ()
    for name in FIELDS:
        # options of another method; find_checkpoint() says that it is another
        foreign = name == "peft_config" and config.peft != before.peft
        kept = name not in MAY_CHANGE or name in (*length, *batch)
        if kept and not before.is_automatic(name) and not foreign:
            draft.choose(name, getattr(before, name), _still(earlier.chosen.get(name, "")))
    if before.reward_file and not config.reward_file:
        raise UserError(
            f"--resume auto: rewards of the run in {config.proj_dir} are functions of {before.reward_file},"
            f" and only the command line may name code; add --reward_file {before.reward_file}"
        )
    check_rewards(draft.config)
    # which brings settings that would hide the cause
    _refuse_changes(config, before, ["init_adapter"])


def _still(reason: str) -> str:
    """Return the reason for a value that the run so far has for this reason."""
    return reason if reason.startswith(SO_FAR) else f"{SO_FAR}: {reason}" if reason else SO_FAR


def find_checkpoint(config: Config, before: Config | None) -> str | None:
    """Find the checkpoint to go on from, or None. `before` is from earlier_settings().

    Raises UserError if the run would overwrite another one, or resume with a changed plan.
    """
    paths = list_checkpoints(os.path.join(config.proj_dir, CHECKPOINTS))
    if not before:
        # an output without a summary comes from a run that was killed before its first checkpoint was
        # complete
        cut_off = config.resume == "auto" and not os.path.exists(os.path.join(config.proj_dir, SUMMARY))
        files = (os.path.join(config.proj_dir, BEST), output_path(config.proj_dir, config.peft))
        outputs = glob.glob(adapter_of_step("*"), root_dir=config.proj_dir)
        outputs += [path for path in files if os.path.exists(path)]
        if is_first_process() and not cut_off and (paths or outputs):
            raise UserError(
                f"{config.proj_dir} holds a run already ({os.path.basename((paths or outputs)[-1])}); "
                + ("go on with --resume auto, or " if paths else "it has no checkpoint to resume from; ")
                + "choose another --proj_dir"
            )
        return None
    _refuse_changes(config, before, [name for name in FIELDS if name not in MAY_CHANGE])
    # a share might have been chosen only after the command was checked
    if config.settled().eval_steps and not config.eval_file and config.eval_split == 0:
        raise UserError(
            f"--resume auto: the run in {config.proj_dir} holds no documents out, so that --eval_steps"
            f" {config.eval_steps} has none to evaluate; drop it, or choose another --proj_dir"
        )
    return paths[-1]


def _refuse_changes(config: Config, before: Config, names: Iterable[str]) -> None:
    """Raise UserError if one of these settings is another one than before."""
    changed = [
        f"{name} {_shown(before.written(name))}, now it is {_shown(recorded(config.written(name)))}"
        for name in names
        if not before.is_automatic(name) and getattr(before, name) != recorded(getattr(config, name))
    ]
    if changed:
        raise UserError(
            f"--resume auto: the run in {config.proj_dir} has {'; '.join(changed)}. Resume with --config"
            f" {os.path.join(config.proj_dir, CONFIG)} --resume auto, or choose another --proj_dir"
        )


def _shown(value: object) -> object:
    """Make an empty text visible in an error."""
    return "not given" if value == "" else value


def inputs(
    model: RWKV, documents: Examples, held_out: Examples, reference: Identity | None = None
) -> dict[str, str | None]:
    """Hash the inputs that must not change on resuming. `reference`: identity of --reference's model."""
    hashes = {"base file": model.base_fingerprint, "data file": documents.digest}
    if model.start_fingerprint:
        hashes["adapter of --init_adapter"] = model.start_fingerprint
    if held_out:
        hashes["held-out data"] = held_out.digest
    if reference:
        hashes["model of --reference"] = reference.fingerprint
    return hashes


def check_inputs(path: str, inputs: dict[str, str | None]) -> None:
    """Raise UserError unless base and data are those of the run whose checkpoint is at `path`."""
    recorded = read_metadata(path)["inputs"]
    for name, value in inputs.items():
        if value != recorded[name]:
            raise UserError(
                f"--resume auto: the {name} is not the one that the run began with; put it back, or choose "
                "another --proj_dir"
            )


def reward_note(path: str, digest: str | None) -> str | None:
    """Note that --reward_file, with this hash, changed since the checkpoint at `path`; None if not.

    It may change: the user may have mended a function.
    """
    before = read_metadata(path).get("reward_file")
    if before == digest:
        return None
    return (
        "--reward_file is not as it was when the checkpoint was written; rewards after step"
        f" {checkpoint_step(path)} may be other ones than those before"
    )


def keep_rows_per_step(draft: Draft, rows: int, passes: int) -> None:
    """Keep the rows of a step as before, by --global_bsz if need be. Raises UserError if that can't be.

    The run had `rows` in a step so far, and `passes` in one process.

    A number of passes as before is no wish, but comes from the same command, or the run's config.yaml: other
    devices need another number.
    """
    config = draft.config
    if not config.is_automatic("micro_bsz") and config.rows_per_step == rows:
        return
    if config.accumulate_grad_batches == passes:
        draft.put(accumulate_grad_batches=AUTO)
        config = draft.config
    what = f"--resume auto: a step of the run in {config.proj_dir} has {rows} rows"
    given = {name: getattr(config.settled(), name) for name in ("micro_bsz", "accumulate_grad_batches")}
    if config.global_bsz not in (0, rows) or all(given.values()):
        raise UserError(
            f"{what}, now it has {config.global_bsz or config.rows_per_step}; drop --global_bsz and"
            " --accumulate_grad_batches, which are then chosen to fit, or choose another --proj_dir"
        )
    given = {name: value for name, value in given.items() if value}
    each = math.prod(given.values()) * config.world
    if rows % each:
        raise UserError(
            f"{what}, which is not a multiple of {' x '.join([*given, 'devices', 'num_nodes'])} = {each}; "
            f"choose {' and '.join(f'a --{name}' for name in given) or '--devices'} that fits"
        )
    draft.change("global_bsz", rows, f"{SO_FAR}, on other devices or with another --micro_bsz")
