"""Programs for people: they plan, show data, check, convert and evaluate.

They import src and rwkv_miss, and no benchmark.
"""
