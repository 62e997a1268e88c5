"""Values that a reference, another model, gives for each trained token: their dtype in memory and in files.

A dtype is that of one token's values. float32 is one number, ln p. A structured dtype has several fields.
Tensors have their numbers one after another, in a row of (n, columns) fp32. An id below 2^24 is exact there.
"""

from __future__ import annotations

import math

import numpy as np

LOG_PROB = np.dtype(np.float32)  # ln p of the token


def top_tokens(count: int, vocab_size: int) -> np.dtype:
    """Return the dtype of the `count` likeliest tokens: their ids, ln p of each, and of all others."""
    ids = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return np.dtype([("ids", ids, (count,)), ("log_probs", np.float16, (count + 1,))])


def row_shape(dtype: np.dtype) -> tuple[int, ...]:
    """Return the shape of one token's numbers: () or (columns,)."""
    if dtype.names is None:
        return ()
    return (sum(math.prod(dtype[name].shape) for name in dtype.names),)


def packed(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Make (n,) values of this dtype from their numbers, (n,) or (n, columns) float32."""
    if dtype.names is None:
        return numbers.astype(dtype, copy=False)
    values, start = np.empty(len(numbers), dtype), 0
    for name in dtype.names:
        stop = start + math.prod(dtype[name].shape)
        values[name] = numbers[:, start:stop]
        start = stop
    return values


def unpacked(values: np.ndarray) -> np.ndarray:
    """Return the numbers of values, (n,) or (n, columns) float32."""
    if values.dtype.names is None:
        return values.astype(np.float32, copy=False)
    return np.concatenate([values[name] for name in values.dtype.names], 1, dtype=np.float32)


def unknown(count: int, dtype: np.dtype) -> np.ndarray:
    """Make `count` values that are NaN."""
    values = np.zeros(count, dtype)
    for part in _numbers(values):
        part[...] = np.nan
    return values


def are_finite(values: np.ndarray) -> bool:
    """Tell whether all numbers of some values are finite."""
    return all(np.isfinite(part).all() for part in _numbers(values))


def _numbers(values: np.ndarray) -> list[np.ndarray]:
    """Return the parts of values that are floating-point numbers."""
    parts = [values] if values.dtype.names is None else [values[name] for name in values.dtype.names]
    return [part for part in parts if part.dtype.kind == "f"]
