"""Training, from the first step to the last file: steps, checkpoints, evaluation, records, resuming.

Imports all rooms but reporting and export. trainer.py has the step, run_folder.py lists a run's folder.
"""
