"""The configuration of a run: YAML, checked by pydantic, with overrides `key.path=value` from the command line."""

from fedpers.config.base import ALIASES, FAMILIES, FAMILY, GROUPS, PLAIN, Family, expand, spoken
from fedpers.config.data import ColumnsConfig, DataConfig, LampConfig, PartitionConfig, TaskConfig
from fedpers.config.load import (
    GRID_KEYS,
    assign,
    dump_config,
    load_config,
    override,
    parse_config,
    read_tree,
    result_text,
)
from fedpers.config.privacy import TRUSTS, Epsilon, HeadPolicy, PrivacyConfig, Trust, Unit
from fedpers.config.run import AdapterConfig, Config, EvaluationConfig, LearningRates, TrainConfig

__all__ = [
    "ALIASES",
    "FAMILIES",
    "FAMILY",
    "GRID_KEYS",
    "GROUPS",
    "PLAIN",
    "TRUSTS",
    "AdapterConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "Epsilon",
    "EvaluationConfig",
    "Family",
    "HeadPolicy",
    "LampConfig",
    "LearningRates",
    "PartitionConfig",
    "PrivacyConfig",
    "TaskConfig",
    "TrainConfig",
    "Trust",
    "Unit",
    "assign",
    "dump_config",
    "expand",
    "load_config",
    "override",
    "parse_config",
    "read_tree",
    "result_text",
    "spoken",
]
