"""Which of the processes of a stage this one is, by what its launcher says."""

import os

RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "LOCAL_RANK")  # torchrun, SLURM, MPI, Lightning's own launcher


def rank() -> int:
    """0 where it is the only one."""
    return next((int(os.environ[name]) for name in RANK if os.environ.get(name, "").isdigit()), 0)


def is_first() -> bool:
    """Whether no launcher says that this is another process of a stage than the first, which alone holds its output."""
    return not any(int(os.environ[name]) for name in (*RANK, "NODE_RANK") if os.environ.get(name, "").isdigit())
