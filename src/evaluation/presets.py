"""Presets: published evaluations as settings of scripts.evaluate. A given flag overrides them."""

from __future__ import annotations

from typing import Any

# name -> flag -> value
PRESETS: dict[str, dict[str, Any]] = {
    # BlinkDL's scoring of the G1 models; the rows are those of HuggingFaceH4/MATH-500
    "math500": {
        "score": "math_verify",
        "sft_field": "problem,answer",
        "samples": 4,
        "max_tokens": 1500,
        "temperature": 1.0,
        "top_p": 0.28,
        "top_k": 32,
    }
}
