"""One run of ``prune`` in several processes, which share the work of the first estimate."""

from __future__ import annotations

from llm_pruner import planning
from llm_pruner.commands.prune import PruneRun
from llm_pruner.errors import UserError
from llm_pruner.report.records import Pruned
from llm_pruner.runtime.processes import is_sharded, joined, own_device
from llm_pruner.runtime.progress import quiet


def carry_out_together(run: PruneRun) -> Pruned | None:
    """Carry a run out in each of several processes that a launcher started.

    They share the text of the first estimate; the first process does all else and returns
    what was done.
    """
    if is_sharded():
        raise UserError(
            "prune has the whole model in each process, and FSDP was asked for; start it with "
            "torchrun, or with accelerate launch without --use_fsdp"
        )
    run.device = own_device(run.settings.device)
    run.check()
    run.check_files()
    with joined(run.device) as run.processes:
        run.processes.barrier()  # all have checked the folders that may change from here on
        done = None
        if run.processes.is_first:
            done = run.carry_out()
        else:
            _assist(run)
        run.processes.barrier()
    return done


def _assist(run: PruneRun) -> None:
    """Take a share of the first estimate; the first process shows the messages."""
    with quiet("llm_pruner", warned=None):
        run.load()
    if run.plan is None and not run.scores:
        run.reach()
        scored, _ = run._read_text()
        dense = planning.Numbering.dense(run.discovery)
        run._scores_of(run.discovery, dense, scored, run.processes)
