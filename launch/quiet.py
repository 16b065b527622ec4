"""Keeping libraries from printing over our own output."""

from __future__ import annotations


def quiet_transformers() -> None:
    """transformers' advice and progress bars off; our own errors and bars say what matters."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
