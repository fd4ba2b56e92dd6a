"""Attention's gradient from q, k and v alone: torch's own attention, run again."""

from .._attention import attention_grad

__all__ = ["attention_grad"]
