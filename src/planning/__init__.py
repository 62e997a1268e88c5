"""Before a run: what is read, what is chosen for the user, what memory and time it will take.

Imports common, config, ops, model, losses, data and sources. plan.py has the plan as a whole.
"""
