"""Programs that measure: time, memory, errors, and what is left after damaged files, kills and Ctrl-C.
They import src, rwkv_miss and demo; of scripts only the table of released sizes, of which there is one.
"""
