"""Formulas of titok's ops for `torch.utils.flop_counter`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any


def register_flop_formula(op: Any, formula: Callable[..., Any]) -> None:
    """Tells `FlopCounterMode` how to count an op; does nothing where PyTorch cannot import its counter."""
    logger = logging.getLogger("torch.utils.flop_counter")
    logger.addFilter(_is_never_logged)  # the module warns where Triton is missing, but titok imports in silence
    try:
        from torch.utils.flop_counter import register_flop_formula as register
    except Exception:  # it imports Triton, and a broken installation may raise anything
        return
    finally:
        logger.removeFilter(_is_never_logged)
    register(op, get_raw=True)(formula)


def _is_never_logged(record: logging.LogRecord) -> bool:
    return False
