"""Personalization methods, one table of scopes and phases per file."""

from fedpers.methods.base import FROZEN, PERSONAL, SHARED, Method, Phase
from fedpers.visit import Arrays, Service, Visit

__all__ = ["FROZEN", "PERSONAL", "SHARED", "Arrays", "Method", "Phase", "Service", "Visit"]
