"""Personalization methods, one table of scopes and phases per file."""

from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase, Plan, plan

__all__ = ["FROZEN", "PERSONAL", "SHARED", "Method", "Phase", "Plan", "plan"]
