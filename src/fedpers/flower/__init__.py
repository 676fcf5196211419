"""Flower's side: our two apps, the strategy between them, and the in-process Grid. Only this package imports flwr."""
