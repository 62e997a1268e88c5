"""First process: the one of a run that prints and writes."""

from __future__ import annotations

import os

# torchrun and deepspeed set RANK, Lightning's own launcher NODE_RANK and LOCAL_RANK, srun SLURM_PROCID
RANK_VARIABLES = ("RANK", "NODE_RANK", "LOCAL_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Tell whether this process prints and writes for the whole run."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANK_VARIABLES)
