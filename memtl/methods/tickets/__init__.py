"""Lottery tickets: a network in which a few weights survive, and training those alone."""

from .optimizer import CompactOptimizer, state_bytes

__all__ = ["CompactOptimizer", "state_bytes"]
