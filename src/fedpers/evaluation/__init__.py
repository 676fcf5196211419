"""Evaluation, per user first."""
