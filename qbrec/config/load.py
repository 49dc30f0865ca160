"""Read a YAML configuration, apply presets and `--set` overrides, and say clearly what is wrong with it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qbrec.config.root import RootConfig
from qbrec.errors import ConfigError


def load_config(path: str | Path | None = None, *, overrides: Sequence[str] = ()) -> RootConfig:
    """Read the configuration of a run.

    Args:
        path: YAML file, a built-in preset (`preset:small`), or an environment variable that holds the YAML
            (`env:QBREC_CONFIG`: how a configuration travels with a submitted job); None: defaults only.
        overrides: `dotted.key=value` strings; values are YAML (`sequence.width=256`,
            `quantizer.levels=[64,64]`).

    Raises:
        ConfigError: The file is missing or no YAML, or a key or value is wrong (names the nearest valid key).
    """
    where = str(path) if path is not None else "defaults"
    tree = _read(str(path)) if path is not None else {}
    for override in overrides:
        _set(tree, override)
    return parse_config(tree, where=where)


def parse_config(tree: Mapping[str, Any], *, where: str = "configuration") -> RootConfig:
    """Validate a plain dictionary; raises ConfigError that names every wrong key."""
    try:
        # Merged into the defaults as they stand: whoever sets only `sequence.pretrain.epochs` keeps the batch
        # size of that section instead of the one that every TrainConfig begins with.
        return RootConfig.model_validate(_merge(RootConfig().model_dump(), _tuples(tree)))
    except ValidationError as error:
        raise _explain(error, where) from None


def dump_config(config: RootConfig) -> str:
    """The configuration as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read(path: str) -> dict[str, Any]:
    if path.startswith("preset:"):
        return _preset(path.removeprefix("preset:"))
    try:
        tree = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise ConfigError(
            f"not valid YAML: {error}", where=path, fix="mend the syntax at that line"
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            "a configuration is a mapping of sections", where=path, fix="see `qbrec run --help`"
        )
    base = tree.pop("preset", None)
    return _merge(_preset(str(base)), tree) if base else tree


def _text(path: str) -> str:
    if path.startswith("env:"):
        text = os.environ.get(path.removeprefix("env:"))
        if text is None:
            raise ConfigError("there is no such variable", where=path, fix="set it, or name a file")
        return text
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration: {error.strerror}", where=path) from None


def _preset(name: str) -> dict[str, Any]:
    folder = resources.files("qbrec.config") / "presets"
    known = sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))
    if name not in known:
        raise ConfigError(f"unknown preset {name!r}", where="preset", fix=f"choose one of {', '.join(known)}")
    tree: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8")) or {}
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
    return base


def _set(tree: dict[str, Any], override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise ConfigError(
            f"override {override!r} has no value", where="--set", fix="write --set section.key=value"
        )
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key!r}: {parent!r} is a value, not a section", where="--set")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {key!r} is no YAML: {error}", where="--set") from None


def _tuples(node: Any) -> Any:
    # YAML and JSON know lists only; the strict models hold tuples, because they are immutable.
    if isinstance(node, Mapping):
        return {k: _tuples(v) for k, v in node.items()}
    if isinstance(node, list):
        return tuple(_tuples(v) for v in node)
    return node


def _explain(error: ValidationError, where: str) -> ConfigError:
    lines, fixes = [], []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(item["loc"][-1]), _keys_at(item["loc"][:-1]), n=1, cutoff=0.5
            )
            lines.append(f"unknown key {path!r}")
            if near:
                fixes.append(f"did you mean {'.'.join([*map(str, item['loc'][:-1]), near[0]])!r}?")
            else:
                fixes.append(f"valid keys there: {', '.join(_keys_at(item['loc'][:-1]))}")
        else:
            lines.append(f"{path}: {item['msg']} (got {item.get('input')!r})" if path else item["msg"])
    return ConfigError("; ".join(lines), where=where, fix="; ".join(fixes) or "correct the value")


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    model: Any = RootConfig
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and str(part) in model.model_fields:
            model = model.model_fields[str(part)].annotation
        else:
            # inside dict[str, Section]: step over the free key
            args = getattr(model, "__args__", ())
            model = args[-1] if args else None
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []
