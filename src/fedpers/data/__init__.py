"""Federations: users with their private records, and public texts from people outside."""

from fedpers.data.base import Federation, Record, Source, load

__all__ = ["Federation", "Record", "Source", "load"]
