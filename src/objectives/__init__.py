"""The kinds of training: what each minimises, measures and evaluates.

Imports all rooms but export, serving and training. base.py has what the kinds share, preferences/ and
rewards/ what one of them has.
"""
