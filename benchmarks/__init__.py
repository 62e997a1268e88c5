"""Programs that measure: time, memory, errors, what is learnt, and what damaged files and planted faults do.

They import src, rwkv_miss and demo. From scripts they import only the table of released model sizes.
"""
