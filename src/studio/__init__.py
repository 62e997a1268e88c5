"""The training page's server: models, data, jobs and runs as JSON, and a run as a process of train.py.

Imports common, config, data, export, model, training and serving.
"""
