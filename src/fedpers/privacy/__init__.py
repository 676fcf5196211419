"""Guarantees, mechanisms, accounting and the ledger. Knows nothing of Flower or of models."""
