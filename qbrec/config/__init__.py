"""Typed configuration: pydantic models, YAML, presets, dotted overrides."""

from qbrec.config.load import dump_config, load_config, parse_config
from qbrec.config.root import RootConfig

__all__ = ["RootConfig", "dump_config", "load_config", "parse_config"]
