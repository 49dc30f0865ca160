"""`qbrec plan`: each formula against the thing itself, and what the command says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from qbrec.baselines.item_batch import pack_items
from qbrec.baselines.item_encoder import ItemEncoder
from qbrec.baselines.item_tasks import ItemTask
from qbrec.cli.main import cli
from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import Bert4RecConfig, FusionConfig, ItemEncoderConfig, SequenceConfig, TrainConfig
from qbrec.engine.candidates import Candidates
from qbrec.engine.hardware import ACCELERATORS, find, named, peak_flops
from qbrec.errors import ConfigError
from qbrec.fusion.loss import GroupViews, multi_view_loss, pair_weights, view_pairs
from qbrec.fusion.model import FusionBatch, FusionModel, ModalitySpec
from qbrec.plan.activations import Numbers, encoder_activations, fusion_activations
from qbrec.plan.baselines import ItemsBatch, batch_of, item_activations, item_flops, item_parameters
from qbrec.plan.disk import item_bytes, quantizer_disk
from qbrec.plan.memory import RankMemory, add_rows, add_training, precise
from qbrec.plan.parameters import Parameters, encoder_parameters, fusion_parameters
from qbrec.plan.plan import make_plan
from qbrec.plan.scenario import (
    GIB,
    Lengths,
    Modality,
    Scenario,
    default_modalities,
    resolve,
    sequence_lengths,
)
from qbrec.plan.work import (
    SequenceBatch,
    encoder_flops,
    fusion_flops,
    largest_batch,
    num_pairs,
    sequence_batch,
)
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.masks import draw_masks
from qbrec.sequence.packing import pack
from qbrec.sequence.tasks import MaskedTask
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.ragged import Ragged

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

CPU = Numbers(4, on_gpu=False)


def scenario(**changes: object) -> Scenario:
    config = RootConfig()
    base = Scenario(
        items=50_000_000,
        users=200_000_000,
        interactions=30.0,
        world=64,
        per_machine=8,
        gpu=named("h100"),
        cpu_flops=1e11,
        host_bytes=1024 * GIB,
        disk_rate=2e9,
        mfu=0.2,
        overhead=0.02,
        modalities=default_modalities(config),
    )
    return replace(base, **changes)


class Fusion:
    """A real network over made-up items, and its loss."""

    def __init__(self, *, batch: int, width: int, depth: int, tokens: tuple[int, ...], dim: int) -> None:
        specs = [ModalitySpec(f"m{i}", "dense", dim) for i in range(len(tokens))]
        specs.append(ModalitySpec("structure", "bag", 512))
        statistics = {f"{part}.{s.name}": torch.ones(dim) for s in specs[:-1] for part in ("mean", "std")}
        self.config = FusionConfig(width=width, depth=depth)
        self.module = FusionModel(
            specs, width=width, depth=depth, heads=4, alignment_temperature=0.1, statistics=statistics
        )
        self.modalities = [
            Modality(s.name, s.kind, s.dim, t, t) for s, t in zip(specs, (*tokens, 3), strict=True)
        ]
        some = torch.ones(batch, len(specs), dtype=torch.bool)
        self.batch = FusionBatch(
            rows=torch.full((batch,), -1),
            features={f"m{i}": torch.randn(batch, n, dim) for i, n in enumerate(tokens)},
            tokens={f"m{i}": torch.ones(batch, n, dtype=torch.bool) for i, n in enumerate(tokens)},
            buckets=torch.randint(0, 512, (batch, 3)),
            visible=some,
            present=some,
            content=torch.arange(batch)[:, None].expand(-1, len(specs)).clone(),
        )
        self.pairs = view_pairs(specs)
        self.weights = pair_weights(specs, self.pairs, behaviour=1.0, cross=1.0)

    def loss(self) -> torch.Tensor:
        fused, views, _ = self.module(self.batch)
        own = GroupViews(torch.cat([views, fused[None]]), self.batch.present, self.batch.content)
        return multi_view_loss(own, own, first=0, pairs=self.pairs, weights=self.weights, temperature=0.2)[0]

    def step(self) -> None:
        self.loss().backward()


class Sequences:
    """A real encoder over histories of one length, and its losses."""

    def __init__(
        self, *, count: int = 96, length: int = 21, levels: tuple[int, ...] = (64, 64, 64), **keys: object
    ):
        self.config = SequenceConfig(max_items=length - 1, candidates=2048, **keys)
        self.levels = levels
        self.module = SequenceEncoder(self.config, Vocabulary(levels, ("shop", "club")))
        rng = np.random.default_rng(0)
        rows = Ragged.from_lengths(rng.integers(0, 4096, count * length), np.full(count, length))
        packed, _ = pack(rows, domains=np.zeros(count, np.int64), samples=np.arange(count))
        self.task = MaskedTask(
            self.module,
            semantic_ids=rng.integers(0, min(levels), (4096, len(levels))).astype(np.uint8),
            masks=self.config.masks,
            seed=0,
            candidates=Candidates(torch.arange(4096), count=2048, seed=0),
        )
        self.prepared, hidden = self.task.prepare(packed, torch.device("cpu"))
        mask = draw_masks(
            packed.lengths, packed.samples, self.config.masks, num_levels=len(levels), seed=0, epoch=0
        )
        assert int(mask.sum()) == int(hidden)
        tokens = 1 + length * len(levels)
        whole = int(mask.all(1).sum())
        self.batch = SequenceBatch(count, count * length, int(hidden), whole, count * tokens * tokens)

    def step(self) -> None:
        self.module.train()
        self.task.loss(self.module, self.prepared).backward()


def counted(step) -> int:
    counter = FlopCounterMode(display=False)
    # The counter knows no fused attention of a CPU; the plain one is made of products that it knows.
    with sdpa_kernel(SDPBackend.MATH), counter:
        step()
    return counter.get_total_flops()


def peak_of_tensors(step) -> int:
    """Most bytes of tensors at one time, beyond what is there before and the gradients of parameters."""
    step()  # gradients exist from here on
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(int(np.cumsum(changes).max()), 0)


FUSION = [
    {"batch": 256, "width": 64, "depth": 3, "tokens": (3, 4), "dim": 96},
    {"batch": 512, "width": 128, "depth": 1, "tokens": (2,), "dim": 64},
]
SEQUENCE = [
    {},
    {"width": 128, "layers": 3, "heads": 4, "dropout": 0.0},
    {"position": "rotary", "levels": (256, 256, 256, 256)},
    {"item_weight": 0.0, "layers": 1},
]


@pytest.mark.parametrize("sizes", FUSION)
def test_fusion_formulas_hold_for_the_real_network(sizes: dict) -> None:
    real = Fusion(**sizes)
    planned = fusion_parameters(real.config, real.modalities)
    numbers = [p.numel() for p in real.module.parameters()]
    assert (planned.total, planned.largest) == (sum(numbers), max(numbers))
    assert planned.vectors == sum(p.numel() for p in real.module.parameters() if p.ndim < 2)
    assert num_pairs(real.modalities) == len(real.pairs)
    batch = sizes["batch"]
    flops = fusion_flops(real.config, real.modalities, items=batch, group=batch)
    assert flops == pytest.approx(counted(real.step), rel=0.03)
    act = fusion_activations(real.config, real.modalities, CPU, batch=batch, group=batch)
    assert act == pytest.approx(peak_of_tensors(real.step), rel=0.05)


@pytest.mark.parametrize("keys", SEQUENCE)
def test_encoder_formulas_hold_for_the_real_network(keys: dict) -> None:
    real = Sequences(**keys)
    planned = encoder_parameters(real.config, real.levels, domains=2)
    numbers = [p.numel() for p in real.module.parameters()]
    assert (planned.total, planned.largest) == (sum(numbers), max(numbers))
    assert planned.vectors == sum(p.numel() for p in real.module.parameters() if p.ndim < 2)
    assert encoder_flops(real.config, real.levels, real.batch) == pytest.approx(counted(real.step), rel=0.03)
    if real.config.item_weight == 0:
        return  # the task of this test has candidates
    act = encoder_activations(real.config, real.levels, CPU, real.batch, candidates=2048)
    assert act == pytest.approx(peak_of_tensors(real.step), rel=0.05)


@pytest.mark.parametrize("items", [9000, 90_000])
@pytest.mark.parametrize("settings", [ItemEncoderConfig(), Bert4RecConfig(width=96, layers=3, heads=4)])
def test_item_formulas_hold_for_the_real_network(settings: ItemEncoderConfig, items: int) -> None:
    count, length, candidates = 96, 20, 7000
    cloze = isinstance(settings, Bert4RecConfig)
    module = ItemEncoder(settings, num_items=items, causal=not cloze).train()
    rng = np.random.default_rng(0)
    histories = Ragged.from_lengths(rng.integers(0, items, count * length), np.full(count, length))
    task = ItemTask.of(module, candidates=Candidates(torch.arange(items), count=candidates, seed=0), seed=0)
    prepared, places = task.prepare(pack_items(histories)[0], torch.device("cpu"))
    planned = item_parameters(settings, items=items)
    numbers = [p.numel() for p in module.parameters()]
    assert (planned.total, planned.largest) == (sum(numbers), max(numbers))
    assert planned.vectors == sum(p.numel() for p in module.parameters() if p.ndim < 2)

    def step() -> None:
        task.loss(module, prepared).backward()

    batch = ItemsBatch(count * length, float(places), count * length**2)
    assert item_flops(settings, batch, candidates=candidates) == pytest.approx(counted(step), rel=0.03)
    act = item_activations(settings, CPU, batch, items=items, candidates=candidates)
    peak = peak_of_tensors(step)
    assert 0.9 * peak <= act <= 1.3 * peak
    if cloze:
        train = settings.train.model_copy(update={"micro_batch": count})
        expected = batch_of(
            settings.model_copy(update={"train": train}),
            Lengths(length, 0.0, 51, 0.0),
            items=count * length,
        )
        assert expected.places == pytest.approx(float(places), rel=0.1)


def test_a_baseline_that_nobody_asks_for_is_not_planned() -> None:
    config = parse_config({"evaluation": {"baselines": ["popularity", "sasrec"]}})
    plan = make_plan(config, scenario())
    assert [s.name for s in plan.stages if s.name in ("sasrec", "bert4rec")] == ["sasrec"]
    assert any("leave sasrec out of evaluation.baselines" in warning for warning in plan.warnings)
    assert any("raise baselines.sasrec.train.batch_size" in warning for warning in plan.warnings)


def test_masks_hide_as_many_codes_as_expected() -> None:
    config = SequenceConfig()
    for length in (6, 20, 51):
        lengths = torch.full((2000,), length)
        mask = draw_masks(lengths, torch.arange(2000), config.masks, num_levels=4, seed=0, epoch=0)
        expected = sequence_batch(2000, 2000 * length, masks=config.masks, levels=4)
        assert expected.hidden == pytest.approx(int(mask.sum()), rel=0.1)
        assert expected.whole == pytest.approx(int(mask.all(1).sum()), rel=0.1)


def test_the_largest_micro_batch_is_rarely_exceeded() -> None:
    rng = np.random.default_rng(0)
    real = np.minimum(rng.exponential(28, (2000, 64)), 51)
    lengths = sequence_lengths(scenario(), longest=51, prefix=0.0)
    assert lengths.mean == pytest.approx(real.mean(), rel=0.02)
    assert lengths.deviation == pytest.approx(real.std(), rel=0.03)
    assert (real.sum(1) > lengths.most(64)).mean() < 0.005
    largest = largest_batch(64, lengths, masks=SequenceConfig().masks, levels=4)
    assert largest.hidden <= largest.items * 4
    assert largest.items <= 64 * 51


def training(
    stage: int, *, precision: str = "float32", on_gpu: bool = False, world: int = 4, **compute
) -> RankMemory:
    config = parse_config({"compute": {"zero_stage": stage, **compute}}).compute
    memory = RankMemory.start(on_gpu=on_gpu)
    add_training(
        memory,
        Parameters(matrices=999_000, vectors=1000, largest=100_000),
        compute=precise(config, precision=precision, on_gpu=on_gpu),
        train=TrainConfig(),
        world=world,
        activations=0,
        micro_steps=1,
    )
    return memory


def test_zero_stages_share_what_they_should() -> None:
    moments = [training(stage).host.resident["optimiser moments"] for stage in range(4)]
    assert moments == [8_000_000, 2_000_000, 2_000_000, 2_000_000]
    assert [training(stage).host.resident["parameters"] for stage in range(4)] == [4_000_000] * 3 + [
        1_000_000
    ]
    assert "master weights" not in training(0).host.resident
    assert training(1).host.resident["master weights"] == 1_000_000
    mixed = [training(stage, precision="bfloat16", on_gpu=True).device.resident for stage in range(4)]
    assert [m["master weights"] for m in mixed] == [4_000_000, 1_000_000, 1_000_000, 1_000_000]
    assert [m["parameters"] for m in mixed] == [2_000_000] * 3 + [500_000]
    peaks = [training(stage, world=64).host.phases["optimiser step"] for stage in (0, 1)]
    assert sum(peaks[1].values()) < sum(peaks[0].values())


def test_offloaded_states_lie_in_the_host() -> None:
    here = training(2, precision="bfloat16", on_gpu=True)
    there = training(2, precision="bfloat16", on_gpu=True, offload_optimizer=True)
    assert "optimiser moments" in here.device.resident
    assert "optimiser moments" not in there.device.resident
    assert there.host.resident["optimiser moments"] == here.device.resident["optimiser moments"]


def test_id_rows_are_cut_over_the_ranks() -> None:
    memory = RankMemory.start(on_gpu=True)
    add_rows(memory, rows=8_000_000, width=128, world=8, batch=0)
    assert memory.device.resident["ID rows"] == 1_000_000 * (128 * 4 + 4)


def test_the_table_of_rows_takes_what_is_planned(tmp_path: Path) -> None:
    from qbrec.engine.context import StageContext
    from qbrec.engine.rows import ShardedRows
    from qbrec.storage.artifact import ArtifactStore

    rows = ShardedRows(
        StageContext.local(ArtifactStore(tmp_path), tmp_path), num_rows=1000, width=32, std=0.1, clip_norm=1.0
    )
    memory = RankMemory.start(on_gpu=True)
    add_rows(memory, rows=1000, width=32, world=1, batch=0)
    assert memory.device.resident["ID rows"] == rows.local_bytes


def test_auto_becomes_what_the_stages_make_of_it() -> None:
    config = RootConfig()
    large = resolve(config, scenario())
    assert large.precision == "bfloat16"
    assert large.levels == (2048,) * 4
    assert large.id_embedding == "shared"
    small = resolve(config, scenario(items=100_000, gpu=named("t4")))
    assert small.precision == "float32"
    assert small.levels == (256,) * 4
    assert small.id_embedding == "table"
    with pytest.raises(ConfigError, match="bfloat16"):
        resolve(parse_config({"compute": {"precision": "bfloat16"}}), scenario(gpu=named("v100")))


def test_artifacts_take_the_bytes_that_are_planned(tmp_path: Path) -> None:
    from tests.support.fusion_catalog import make_catalog
    from tests.support.sequence_inputs import ITEMS, LEVELS, make_inputs

    catalog = make_catalog(tmp_path, num_items=4000, num_users=10)
    stored = sum(path.stat().st_size for path in catalog.path.glob("items-*.tar"))
    modalities = (
        Modality("text", "dense", 24, 2 * 10 / 11, 3),
        Modality("image", "dense", 16, 2 * 6 / 7, 3),
        Modality("structure", "bag", 256, 2, 2),
    )
    members = (
        8 * -(-4000 // 40) * 1.1
    )  # eight fields a block, each with a tar header, an npy header and padding
    assert stored == pytest.approx(4000 * item_bytes(modalities) + members * 896, rel=0.1)

    quantizer = make_inputs(tmp_path / "sequence")["quantizer"]
    there = (quantizer.path / "semantic_ids.npy").stat().st_size
    resolved = replace(resolve(RootConfig(), scenario()), levels=LEVELS)
    planned = quantizer_disk(RootConfig(), scenario(items=2 * ITEMS), resolved)
    assert planned["semantic IDs"] == there - 128  # npy's header


def test_what_does_not_fit_is_said_with_the_key_that_mends_it() -> None:
    config = parse_config({"fusion": {"id_embedding": "table", "width": 512}})
    plan = make_plan(config, scenario(world=1, per_machine=1))
    (warning,) = [w for w in plan.warnings if w.startswith("fusion") and "of a h100" in w]
    assert "fusion.id_embedding=shared" in warning
    graphs = make_plan(RootConfig(), scenario(items=100_000_000)).warnings
    assert any(w.startswith("finetune") and "lower ranking.neighbours" in w for w in graphs)
    alone = parse_config({"ranking": {"neighbours": 0, "alike": 0}})
    warnings = make_plan(alone, scenario(users=1_000_000_000)).warnings
    assert any(w.startswith("evaluation") and "histories of all users" in w for w in warnings)
    # While they train, ranks hold those of the validation users alone.
    assert not any(w.startswith(("pretrain", "sasrec")) and "histories" in w for w in warnings)
    assert any(
        "2 of 64 ranks" in w and "fusion.train.batch_size" in w
        for w in make_plan(RootConfig(), scenario()).warnings
    )
    small = scenario(items=10_000, users=10_000, world=1, per_machine=1)
    assert make_plan(RootConfig(), small).warnings == ()


def test_more_of_a_thing_never_needs_less() -> None:
    def peak(name: str, changed: dict, **changes: object) -> int:
        memory = make_plan(parse_config(changed), scenario(**changes)).stage(name).memory
        assert memory is not None
        return memory.device.peak + memory.host.peak

    base = {"items": 1_000_000, "users": 1_000_000, "world": 8}
    for name in ("fusion", "quantizer", "pretrain", "finetune", "sasrec", "bert4rec", "evaluation"):
        assert peak(name, {}, **base) <= peak(name, {}, **{**base, "items": 4_000_000})
        assert peak(name, {}, **base) <= peak(name, {}, **{**base, "users": 4_000_000})
    wide = {"sequence": {"width": 512}}
    assert peak("pretrain", {}, **base) <= peak("pretrain", wide, **base)


def run(*arguments: str):
    return CliRunner().invoke(cli, ["plan", *arguments])


def test_the_command_prints_every_stage_and_what_it_assumes() -> None:
    result = run("--items", "50e6", "--users", "200_000_000", "--world-size", "64", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    for word in (
        "catalog",
        "fusion",
        "quantizer",
        "pretrain",
        "finetune",
        "evaluation",
        "activations",
        "--mfu",
    ):
        assert word in result.output


def test_the_document_holds_numbers() -> None:
    result = run(
        "--items", "1e6", "--users", "2e6", "--world-size", "8", "--gpu", "a100-80", "--history", "20",
        "--modality", "text=768x2.5:4", "--mfu", "0.4", "--json",
    )  # fmt: skip
    document = json.loads(result.output)
    assert document["gpu"] == "a100-80"
    stages = document["stages"]
    assert stages["fusion"]["steps"] == 10 * -(-1_000_000 // 512)
    assert stages["pretrain"]["hours"] > 0
    assert stages["pretrain"]["read_bytes_per_second"] > 0
    fusion = stages["fusion"]["memory"]["gpu"]
    worst = fusion["phases"][fusion["peak_phase"]]
    assert fusion["peak_bytes"] == sum(fusion["resident"].values()) + sum(worst.values())
    assert stages["catalog"]["disk_bytes"] == sum(stages["catalog"]["disk"].values())
    assert any("text 2.5 (at most 4) x 768" in text for text in document["assumptions"])


def test_wrong_arguments_are_named() -> None:
    result = run("--items", "1e6", "--users", "1e6", "--gpu", "h1000")
    assert isinstance(result.exception, ConfigError)
    assert "a100-80" in str(result.exception)
    assert "text=768x3" in str(run("--items", "1", "--users", "1", "--modality", "text:768").exception)
    assert "no whole number" in run("--items", "1.5", "--users", "1").output


def test_a_cpu_is_measured_and_gpus_are_known_by_name() -> None:
    first = peak_flops(torch.device("cpu"), "float32")
    assert first is not None
    assert first > 1e8
    assert peak_flops(torch.device("cpu"), "float32") == first
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 PCIe": "h100-pcie",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA A100 80GB PCIe": "a100-80",
        "NVIDIA L40S": "l40s",
        "NVIDIA L4": "l4",
        "Tesla V100-SXM2-32GB": "v100-32",
        "Tesla V100-SXM2-16GB": "v100",
        "Tesla T4": "t4",
        "NVIDIA B200": "b200",
    }
    assert {name: gpu.name for name in names if (gpu := find(name))} == names
    assert find("NVIDIA A100-SXM4-40GB MIG 1g.5gb") is None
    assert find("Quadro P400") is None
    assert len({gpu.name for gpu in ACCELERATORS}) == len(ACCELERATORS)


@pytest.mark.slow
def test_memory_lies_within_a_sixth_of_what_stages_take() -> None:
    from plan import compare

    found = compare(scale=1.0, zero_stage=1)
    for stage, figures in found.items():
        assert 0.85 <= figures["ratio"] <= 1.15, (stage, figures)
