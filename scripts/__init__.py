"""Programs for people: they plan, show data, check, convert and evaluate.

They may import src and rwkv_miss, but no benchmark.
"""
