"""From files to batches: formats, chat templates, tokens, documents, rows, and what is held out.

Imports common, losses, config and ops (for its lock). A row's way: formats/, templates.py, encode.py,
dataset.py or preferences.py, batches.py, collate.py or answer_batches.py.
"""
