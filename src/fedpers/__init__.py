"""Private federated personalization of language models, simulated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedpers.config import Config, load_config
    from fedpers.registry import register
    from fedpers.simulation import Run, simulate

__all__ = ["Config", "Run", "load_config", "register", "simulate"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import fedpers` and `fedpers --help` do not wait for torch."""
    if name in {"Config", "load_config"}:
        from fedpers import config

        return getattr(config, name)
    if name in {"Run", "simulate"}:
        from fedpers import simulation

        return getattr(simulation, name)
    if name == "register":
        from fedpers import registry

        return registry.register
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
