"""Folders of named models: found, pinned, and refused where loading them could run somebody's code.

A model on the Hugging Face hub is pinned to a commit, and of that commit only safetensors, JSON and
vocabularies are downloaded. A local folder is judged by the same rules.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

from qbrec.config.sections import CatalogConfig, ImageConfig, TextConfig
from qbrec.errors import ConfigError

BUILT_IN_TEXT, BUILT_IN_IMAGE = "hashed-ngram", "pixel-statistics"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # neither pickles nor code
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_PACKAGES = ("torch", "transformers", "sentence-transformers", "tokenizers", "pillow")
Part = TextConfig | ImageConfig


def key_of(config: Part) -> str:
    """The configuration section an encoder is named in."""
    return "catalog.text" if isinstance(config, TextConfig) else "catalog.image"


def check_named(config: Part) -> None:
    """Refuse a named encoder that is not pinned, before anything is downloaded or computed.

    Raises:
        ConfigError: A model on the hub without a commit, or a folder that is not there or has a revision.
    """
    name, key = config.encoder, key_of(config)
    if os.path.isdir(name):
        if config.revision is not None:
            raise ConfigError(
                "a local folder has no revision",
                where=f"{key}.revision",
                fix="remove it: the folder is identified by its files",
            )
        return
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise ConfigError(
            f"there is no folder {name!r}", where=f"{key}.encoder", fix="check the path, on every machine"
        )
    if _COMMIT.fullmatch(config.revision or "") is None:
        raise ConfigError(
            f"the encoder {name!r} is not pinned to a commit",
            where=f"{key}.revision",
            fix="set it to the 40 hexadecimal digits that "
            f"`git ls-remote https://huggingface.co/{name} HEAD` prints",
        )


def model_folder(config: Part) -> Path:
    """The folder of a named model on this machine, downloaded if need be.

    Raises:
        ConfigError: It is not pinned, cannot be had, has no safetensors weights, or asks for its own code.
    """
    check_named(config)
    key, name = key_of(config), config.encoder
    if os.path.isdir(name):
        folder = Path(name)
    else:
        hub = need("huggingface_hub", f"{key}.encoder", name)
        try:
            folder = Path(hub.snapshot_download(name, revision=config.revision, allow_patterns=list(_FILES)))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot download the encoder {name!r}: {(str(error).strip().splitlines() or [''])[0]}",
                where=f"{key}, revision {config.revision}",
                fix="check name and revision; without access to the hub, name a folder that holds the model",
            ) from error
    _check_folder(folder, f"{key}.encoder")
    return folder


def need(module: str, key: str, name: str) -> Any:
    """A package of the extra `encode`; raises ConfigError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"the encoder {name!r} needs the package {module}, which is not installed",
            where=key,
            fix="pip install 'qbrec[encode]', or use the built-in encoder",
        ) from None


def _check_folder(folder: Path, key: str) -> None:
    parts = {folder}
    for path in sorted(folder.rglob("*.json")):
        content = _json(path)
        if path == folder / "modules.json" and isinstance(content, list):
            for module in content:
                kind = str(module.get("type", ""))
                if not kind.startswith("sentence_transformers."):
                    raise _own_code(f"{path}: {kind}", key)
                parts.add(folder / str(module.get("path", "")))
        if isinstance(content, dict) and "auto_map" in content:
            raise _own_code(f"{path}: auto_map", key)
    weights = 0
    for part in sorted(parts):
        names = [file.name for file in part.iterdir() if file.is_file()] if part.is_dir() else []
        safe = [name for name in names if fnmatch(name, "model*.safetensors")]
        pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES)]
        weights += len(safe)
        if pickles and not safe:
            raise ConfigError(
                f"the weights {pickles[0]!r} are a pickle, which can run any code when it is read",
                where=f"{key}: {part}",
                fix="use a revision with model.safetensors, or convert the weights",
            )
    if not weights:
        raise ConfigError(
            "there is no model.safetensors", where=f"{key}: {folder}", fix="name a model that has one"
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # whoever needs the file says so


def _own_code(where: str, key: str) -> ConfigError:
    return ConfigError(
        "the model asks to run code of its own, which is never done",
        where=f"{key}: {where}",
        fix="name a model that transformers or sentence-transformers knows by itself",
    )


def folder_hash(folder: str | Path) -> str:
    """SHA-256 over the names and bytes of all files that a model is read from."""
    total = hashlib.sha256()
    files = [p for p in Path(folder).rglob("*") if p.is_file() and any(fnmatch(p.name, f) for f in _FILES)]
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def local_models(config: CatalogConfig) -> dict[str, str]:
    """Hash of every named encoder that is a local folder, by section: what its name alone does not identify.

    Raises:
        ConfigError: A named encoder is not pinned.
    """
    found = {}
    for section, part, built_in in encoders(config):
        if part.encoder != built_in:
            check_named(part)
            if os.path.isdir(part.encoder):
                found[section] = folder_hash(part.encoder)
    return found


def encoder_identity(config: CatalogConfig, *, dims: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What made the features, for the manifest.

    Args:
        config: The catalogue's configuration.
        dims: Width by modality, of `text` and `image` where they were encoded.

    Returns:
        By modality: encoder, dim, and for a named one its revision or the hash of its folder, precision and
        the versions of the packages that ran it.
    """
    identity: dict[str, dict[str, Any]] = {}
    local = local_models(config)
    for section, part, built_in in encoders(config):
        if section not in dims:
            continue
        identity[section] = {"encoder": part.encoder, "dim": dims[section]}
        if part.encoder == built_in:
            continue
        pinned = {"files": local[section]} if section in local else {"revision": part.revision}
        versions = {name: _version(name) for name in _PACKAGES}
        identity[section] |= pinned | {"precision": part.precision, "packages": versions}
    return identity


def encoders(config: CatalogConfig) -> tuple[tuple[str, Part, str], ...]:
    """Section, configuration and name of the built-in encoder, for text and pictures."""
    return ("text", config.text, BUILT_IN_TEXT), ("image", config.image, BUILT_IN_IMAGE)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
