"""Programs that work for people: they plan, look at data, check, convert and evaluate.

They import src and rwkv_miss, and no benchmark.
"""
