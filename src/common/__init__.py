"""Common parts of all rooms: the start of a program, small files, numbers in words, devices, free memory.

Imports nothing of src. Read startup.py first: it is imported before torch.
"""
