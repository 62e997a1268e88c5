"""Programs that measure time, memory, errors and learning, or try damaged files and planted faults.

They import src, rwkv_miss and demo, and from scripts only the table of released model sizes.
"""
