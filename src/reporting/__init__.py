"""Reports on a run: the plan before it, warnings while it goes, the cards and the diagnosis at its end.

Imports common, config, model, losses, data, planning, evaluation, sources and training.
run_end.py ends a run.
"""
