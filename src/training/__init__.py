"""A run from its first step to its last file: steps, checkpoints, evaluation, records, going on.

Imports all rooms but export. trainer.py has the step, run_folder.py what lies in a run's folder.
"""
