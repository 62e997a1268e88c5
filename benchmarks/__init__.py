"""Programs that measure: time, memory, errors, and what is left after damaged files, kills and Ctrl-C.

They import src, rwkv_miss and demo. From scripts they import only the table of released model sizes.
"""
