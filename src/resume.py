"""Going on with a run: which checkpoint, whether the settings are still those of the run, and how many rows a step has."""

from __future__ import annotations

import os

from rwkv_miss.errors import UserError

from . import config as configuration
from .checkpoints import list_checkpoints
from .config import Config, accumulation
from .files import is_first_process
from .history import BEST
from .outputs import CHECKPOINTS, CONFIG, SUMMARY, output_path

# settings that a resumed run may change without becoming another run: how a step is computed, how many there are, what is kept
MAY_CHANGE = {
    "proj_dir", "resume", "data_cache", "eval_steps", "eval_samples", "early_stop", "wandb", "save_steps", "save_total_limit", "rollback_steps",
    "spike_sigmas", "grad_cp", "chunk_ctx", "state_cp", "wkv", "accelerator",
    "strategy", "devices", "num_nodes", "micro_bsz", "accumulate_grad_batches", "global_bsz", "epoch_count", "epoch_steps",
}


def find_checkpoint(config: Config) -> tuple[str | None, Config | None]:
    """The checkpoint to go on from and the settings that it was made with, or (None, None).

    A run that would overwrite another one, or resume with a changed plan, is a UserError.
    """
    paths = list_checkpoints(os.path.join(config.proj_dir, CHECKPOINTS))
    if config.resume != "auto" or not paths:
        # without its summary the output comes from a run that was killed before its first checkpoint was complete
        cut_off = config.resume == "auto" and not os.path.exists(os.path.join(config.proj_dir, SUMMARY))
        outputs = [path for path in (os.path.join(config.proj_dir, BEST), output_path(config)) if os.path.exists(path)]
        if is_first_process() and not cut_off and (paths or outputs):
            raise UserError(f"{config.proj_dir} holds a run already ({os.path.basename((paths or outputs)[-1])}); "
                            + ("go on with --resume auto, or " if paths else "it has no checkpoint to resume from; ") + "choose another --proj_dir")
        return None, None
    file = os.path.join(config.proj_dir, CONFIG)
    before = Config(**configuration.read_yaml(file))
    for name in configuration.FIELDS:
        if name not in MAY_CHANGE and getattr(before, name) != getattr(config, name):
            raise UserError(f"--resume auto: the run in {config.proj_dir} has {name} {getattr(before, name)}, now it is {getattr(config, name)}; "
                            f"resume with --config {file} --resume auto, or choose another --proj_dir")
    return paths[-1], before


def keep_rows_per_step(config: Config, before: Config) -> None:
    """Choose the accumulation with which a step has as many rows as it had before; a UserError where there is none."""

    def at_once(c: Config) -> int:
        return c.micro_bsz * c.devices * c.num_nodes

    rows = at_once(before) * accumulation(before)
    now = at_once(config) * accumulation(config)
    if now == rows:
        return
    what = f"--resume auto: a step of the run in {config.proj_dir} has {rows} rows"
    if config.global_bsz or config.accumulate_grad_batches > 1:
        raise UserError(f"{what}, now it has {now}; drop --global_bsz and --accumulate_grad_batches, which are then chosen to fit, "
                        "or choose another --proj_dir")
    if rows % at_once(config):
        raise UserError(f"{what}, which is not a multiple of micro_bsz x devices x num_nodes = {at_once(config)}; choose a --micro_bsz that fits")
    config.global_bsz = rows
