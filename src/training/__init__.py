"""A run from its first step to its last file: steps, checkpoints, evaluation, records, going on.

Imports all rooms but reporting and export. trainer.py has the step, run_folder.py lists a run's folder.
"""
