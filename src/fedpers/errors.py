"""The errors that fedpers raises on purpose.

Each message is one sentence or two that say what is wrong, where, and how to mend it. The command line prints that
message alone and exits with code 2; any other exception is a bug and keeps its traceback.
"""


class FedpersError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(FedpersError):
    """A configuration key or value is not usable."""


class PrivacyRefusal(FedpersError):
    """The setup would give a false privacy claim, so it is not run."""


class LedgerError(FedpersError):
    """The ledger is incomplete, edited, or would record a noise key twice."""


class AssetError(FedpersError):
    """A model or a data set cannot be fetched, or a cached file is damaged."""


class DataError(FedpersError):
    """Users' records cannot be used as they are."""


class RunDirectoryError(FedpersError):
    """A run directory cannot be written, resumed or exported."""


class TrackingError(FedpersError):
    """A tracker is unknown, not installed, cannot be started, or missed something of a run."""
