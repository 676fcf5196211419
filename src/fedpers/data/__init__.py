"""Federations: users with their private records, and public texts from people outside."""

from fedpers.data.base import Federation, PublicText, Record, Source, load

__all__ = ["Federation", "PublicText", "Record", "Source", "load"]
