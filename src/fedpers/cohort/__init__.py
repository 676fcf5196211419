"""Local training of many clients in one pass."""
