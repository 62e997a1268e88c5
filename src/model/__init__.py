"""RWKV-6 and RWKV-7: the layers, the model, and the loss of a batch.

Imports common and ops. Read rwkv7.py first, then rwkv.py.
"""

from .rwkv import RWKV, LayerState, State, default_arch, read_model_file

__all__ = ["RWKV", "LayerState", "State", "default_arch", "read_model_file"]
