"""Configuration: what is refused, what the message says, what reaches the models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qbrec.config import RootConfig, dump_config, load_config, parse_config
from qbrec.errors import ConfigError
from qbrec.stages import STAGES


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_a_misspelt_key_names_the_nearest(tmp_path: Path) -> None:
    path = _write(tmp_path, "fusion:\n  widht: 128\n")
    with pytest.raises(ConfigError, match=r"unknown key 'fusion\.widht'") as caught:
        load_config(path)
    assert "did you mean 'fusion.width'" in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_misspelt_key_inside_a_domain_names_the_nearest() -> None:
    tree = {"data": {"domains": {"pets": {"items": "a", "interactions": "b", "item": "c"}}}}
    with pytest.raises(ConfigError, match=r"data\.domains\.pets\.item'") as caught:
        parse_config(tree)
    assert "data.domains.pets.items" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("fusion.width=wide", "fusion.width"),
        ("fusion.width=0", "fusion.width"),
        ("compute.zero_stage=4", "zero_stage"),
        ("compute.num_workers=[3,2]", r"compute\.num_workers: .* may not exceed"),
        ("compute.num_workers=[2]", r"compute\.num_workers"),
        ("run.name=../evil", "run.name"),
        ("fusion.width=30", "multiple of heads"),
        ("sequence.masks.span=1.5", "span"),
        ("fusion", "has no value"),
    ],
)
def test_wrong_values_are_named(override: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_config(overrides=[override])


def test_overrides_and_files_reach_the_models(tmp_path: Path) -> None:
    path = _write(tmp_path, "preset: small\nquantizer: {levels: [32, 16]}\n")
    config = load_config(path, overrides=["quantizer.levels=[64,64,64]", "sequence.finetune.patience=7"])
    assert config.quantizer.levels == (64, 64, 64)
    assert config.sequence.finetune.patience == 7
    assert config.compute.num_workers == 2  # from the preset


def test_what_is_dumped_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(overrides=["data.domains.a.items=i", "data.domains.a.interactions=j"])
    assert load_config(_write(tmp_path, dump_config(config))) == config


def test_a_missing_file_and_broken_yaml_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(_write(tmp_path, "a: [1,"))
    with pytest.raises(ConfigError, match="choose one of large, small"):
        load_config("preset:large-ish")


@pytest.mark.parametrize("name", ["small", "large"])
def test_presets_change_what_they_say_and_fit_the_models(name: str) -> None:
    preset, defaults = load_config(f"preset:{name}"), load_config()
    for section in ("compute", "fusion", "sequence", "baselines"):
        assert getattr(preset, section) != getattr(defaults, section)


@pytest.mark.parametrize(
    "section",
    ["fusion.train", "sequence.pretrain", "sequence.finetune", "sequence.masks", "baselines.bert4rec.train"],
)
def test_one_key_of_a_section_leaves_its_other_defaults(section: str) -> None:
    def of(config: RootConfig) -> dict[str, object]:
        found: Any = config
        for name in section.split("."):
            found = getattr(found, name)
        return dict(found.model_dump())

    key, value = ("partial", 0.7) if section.endswith("masks") else ("epochs", 77)
    assert of(load_config(overrides=[f"{section}.{key}={value}"])) == of(RootConfig()) | {key: value}


@pytest.mark.parametrize("kept", [{"checkpoint_every": 7}, {"keep_checkpoints": 9}, {"keep_every": 50}])
def test_when_checkpoints_are_kept_is_in_no_key(kept: dict[str, int]) -> None:
    data = {"domains": {"shop": {"items": "items.parquet", "interactions": "interactions.parquet"}}}
    usual = parse_config({"data": data})
    fusion = {"train": {**usual.fusion.train.model_dump(), **kept}}
    sequence = {
        name: {**getattr(usual.sequence, name).model_dump(), **kept} for name in ("pretrain", "finetune")
    }
    baselines = {
        name: {"train": {**getattr(usual.baselines, name).train.model_dump(), **kept}}
        for name in ("sasrec", "bert4rec")
    }
    other = parse_config({"data": data, "fusion": fusion, "sequence": sequence, "baselines": baselines})
    assert usual != other
    for stage in STAGES.values():
        assert stage.recipe(usual) == stage.recipe(other), stage.name
