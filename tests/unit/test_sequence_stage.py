"""Pretraining and fine-tuning as stages: from artifacts to artifacts, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qbrec.config import RootConfig, parse_config
from qbrec.config.stages import MaskConfig
from qbrec.engine.context import StageContext
from qbrec.engine.launch import process_group
from qbrec.errors import DataError
from qbrec.evaluation.stage import run as evaluate
from qbrec.ranking.scorer import FactorisedScorer
from qbrec.ranking.validate import drawn_histories, drawn_users
from qbrec.sequence import stage
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.item_codes import ItemCodes, codes_read
from qbrec.sequence.masks import draw_masks
from qbrec.sequence.packing import HiddenCodes, pack
from qbrec.sequence.recommender import SequenceRecommender
from qbrec.sequence.tasks import HistoryCollate, id_table
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.artifact import Artifact, ArtifactStore
from qbrec.storage.catalog_view import CatalogView
from qbrec.storage.ragged import Ragged
from qbrec.storage.token_table import token_table
from tests.support.sequence_inputs import ITEMS, LEVELS, make_inputs

TRAIN = {"epochs": 30, "batch_size": 32, "micro_batch": 32, "learning_rate": 1e-2, "evaluate_every": 15}


def configuration(**sequence: Any) -> RootConfig:
    small = {"width": 32, "layers": 1, "heads": 2, "dropout": 0.0, "max_items": 8}
    domains = {name: {"items": "-", "interactions": "-"} for name in ("pets", "games")}
    settings = {**small, "pretrain": TRAIN, "finetune": {**TRAIN, "epochs": 15}, **sequence}
    data = {"domains": domains, "target": "games"}
    return parse_config(
        {"data": data, "sequence": settings, "evaluation": {"baselines": ["popularity", "itemknn"]}}
    )


def context(root: Path, name: str, key: str) -> StageContext:
    return StageContext.local(ArtifactStore(root), root / "run", stage=name, key=key * 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("sequence")
    inputs, config = make_inputs(root), configuration()
    with process_group(config):
        inputs["pretrain"] = stage.pretrain(context(root, "pretrain", "e"), config, dict(inputs))
        inputs["finetune"] = stage.finetune(context(root, "finetune", "f"), config, dict(inputs))
    return inputs


def test_both_stages_leave_what_the_contract_names(trained: dict[str, Artifact]) -> None:
    for name in ("pretrain", "finetune"):
        artifact = trained[name]
        assert artifact.kind == name
        artifact.verify()
        description = artifact.load_json("encoder.json")
        assert description["domains"] == ["pets", "games"]
        own = ItemCodes.load(artifact)
        assert own is not None
        assert description["levels"] == [8, 8, 4, own.size]
        curve = artifact.load_json("curve.json")
        assert [entry["epoch"] for entry in curve] == ([15, 30] if name == "pretrain" else [0, 15])
        assert artifact.meta["best"]["ndcg@10"] == max(entry["ndcg@10"] for entry in curve)
    assert trained["finetune"].inputs["pretrain"] == trained["pretrain"].fingerprint
    # Fine-tuning reads the target domain only, and no history of one item is ever trained on.
    assert trained["finetune"].meta["num_histories"] < trained["pretrain"].meta["num_histories"] < 90


def test_without_pretraining_fine_tuning_starts_from_scratch(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path)
    config = configuration(pretraining=False)
    schedule = stage.from_scratch(config.sequence)
    assert (schedule.epochs, schedule.learning_rate) == (45, 1e-2)
    with process_group(config):
        artifact = stage.finetune(context(tmp_path, "finetune", "f"), config, dict(inputs))
    curve = artifact.load_json("curve.json")
    assert curve[-1]["epoch"] == 45
    assert artifact.meta["best"]["ndcg@10"] > 0.5


def test_the_walk_of_each_domain_is_learnt(trained: dict[str, Artifact]) -> None:
    semantic_ids = trained["quantizer"].load_npy("semantic_ids.npy")
    recommender = SequenceRecommender.load(trained["finetune"], semantic_ids=semantic_ids)
    scorer = FactorisedScorer(recommender, semantic_ids=codes_read(trained["finetune"], semantic_ids))
    games = np.array([[(s - i) % ITEMS + ITEMS for i in range(4)] for s in range(ITEMS)])
    scores = scorer.scores(Ragged.from_lists(games.tolist()), 1)[:, ITEMS:]
    target = torch.from_numpy((games[:, -1] - 1 - ITEMS) % ITEMS + ITEMS)
    rank = (scores > scores[torch.arange(ITEMS), target - ITEMS][:, None]).sum(1)
    assert float((rank < 5).float().mean()) > 0.8


def test_only_items_with_enough_interactions_have_a_code_of_their_own(trained: dict[str, Artifact]) -> None:
    counts = np.asarray(CatalogView(trained["catalog"]).train_counts)
    own = ItemCodes.load(trained["pretrain"])
    assert own is not None
    assert own.rows.tolist() == np.flatnonzero(counts >= 4).tolist()
    after = ItemCodes.load(trained["finetune"])
    assert after is not None
    np.testing.assert_array_equal(after.rows, own.rows)


def test_without_item_codes_the_encoder_reads_semantic_ids_alone(
    trained: dict[str, Artifact], tmp_path: Path
) -> None:
    config = configuration(item_codes=0, pretrain={**TRAIN, "epochs": 1, "evaluate_every": 1})
    inputs = {name: trained[name] for name in ("catalog", "quantizer")}
    with process_group(config):
        artifact = stage.pretrain(context(tmp_path, "pretrain", "5"), config, inputs)
    assert artifact.load_json("encoder.json")["levels"] == list(LEVELS)
    assert ItemCodes.load(artifact) is None


def test_finetuning_starts_from_the_pretrained_weights(trained: dict[str, Artifact]) -> None:
    before = trained["pretrain"].load_safetensors("encoder.safetensors")
    after = trained["finetune"].load_safetensors("encoder.safetensors")
    assert before.keys() == after.keys()
    near = torch.nn.functional.cosine_similarity(
        before["tokens.weight"].flatten(), after["tokens.weight"].flatten(), dim=0
    )
    assert 0.7 < float(near) < 1 - 1e-6


def test_training_reads_no_validation_or_test_item(trained: dict[str, Artifact], tmp_path: Path) -> None:
    catalog = CatalogView(trained["catalog"])
    histories = catalog.load_histories()
    config = configuration()
    collate = HistoryCollate(max_items=100, seed=0, prefix=0.0)
    loader = stage.history_loader(
        context(tmp_path, "pretrain", "1"), catalog, config.sequence.pretrain, collate=collate, domain=None
    )
    read: dict[int, np.ndarray] = {}
    for step in loader.iterate(0):
        for batch in step:
            assert batch is not None
            ends = np.cumsum(batch.lengths.numpy())
            for sample, rows in zip(
                batch.samples.tolist(), np.split(batch.rows.numpy(), ends[:-1]), strict=True
            ):
                read[sample] = rows
    assert sorted(read) == np.flatnonzero(histories.cut[:, 0] >= 2).tolist()
    for user, rows in read.items():
        np.testing.assert_array_equal(rows, histories.rows.row(user)[: histories.cut[user, 0]])


@pytest.mark.parametrize("most", [0, 7])
def test_validation_reads_the_users_it_draws_and_no_others(trained: dict[str, Artifact], most: int) -> None:
    catalog = CatalogView(trained["catalog"])
    whole = catalog.load_histories("games")
    users = drawn_users(whole, max_users=most, seed=3)
    found = drawn_histories(catalog, "games", max_users=most, seed=3)
    assert len(found) == (most or len(users)) == len(users)
    np.testing.assert_array_equal(found.user, whole.user[users])
    np.testing.assert_array_equal(found.domain, whole.domain[users])
    np.testing.assert_array_equal(found.cut, whole.cut[users])
    for name in ("rows", "times"):
        there, here = getattr(whole, name).take(users), getattr(found, name)
        np.testing.assert_array_equal(here.values, there.values)
        np.testing.assert_array_equal(here.offsets, there.offsets)


def test_a_domain_without_histories_says_so(trained: dict[str, Artifact], tmp_path: Path) -> None:
    catalog = CatalogView(trained["catalog"])
    collate = HistoryCollate(max_items=9, seed=0, prefix=0.0)
    with pytest.raises(DataError, match="nothing to learn"):
        stage.history_loader(
            context(tmp_path, "finetune", "2"),
            catalog,
            configuration().sequence.finetune,
            collate=collate,
            domain=7,
        )


MODALITIES = {"text": (6, 5), "image": (4, 4)}  # codes per level, the one for items without it included
DIGIT = 3  # codes of a last level of the ID that has no codebook


def with_modalities(root: Path, quantizer: Artifact) -> Artifact:
    """The same IDs with one more level without a codebook, and codes of two modalities of equal width."""
    rng = np.random.default_rng(3)
    ids = np.asarray(quantizer.load_npy("semantic_ids.npy"))
    count = len(ids)
    writer = ArtifactStore(root).writer("quantizer", "9" * 64)
    writer.prepare()
    digit = rng.integers(0, DIGIT, (count, 1)).astype(np.uint8)
    writer.save_npy("semantic_ids.npy", np.concatenate([ids, digit], 1))
    sizes = [k for levels in MODALITIES.values() for k in levels]
    writer.save_npy("modality_codes.npy", (rng.random((count, len(sizes))) * sizes).astype(np.uint16))
    writer.save_safetensors("codebooks.safetensors", quantizer.load_safetensors("codebooks.safetensors"))
    for name, levels in MODALITIES.items():
        books = {
            f"level.{i}": torch.from_numpy(rng.standard_normal((k - 1, 7))) for i, k in enumerate(levels)
        }
        writer.save_safetensors(
            f"codebooks.{name}.safetensors", {k: book.float() for k, book in books.items()}
        )
    meta = {
        "levels": [*LEVELS, DIGIT],
        "modalities": [{"name": name, "levels": list(levels)} for name, levels in MODALITIES.items()],
    }
    return writer.commit(meta=meta, inputs={}, config={}, seed=0)


@pytest.fixture(scope="module")
def several(trained: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return with_modalities(tmp_path_factory.mktemp("several"), trained["quantizer"])


def angles(rows: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return unit @ unit.T


def test_embeddings_start_from_the_codebooks_of_every_space(several: Artifact) -> None:
    table = token_table(several)
    torch.manual_seed(0)
    module = SequenceEncoder(configuration().sequence, Vocabulary(table.sizes, ("pets", "games")))
    before = module.tokens.weight.detach().clone()
    stage.start_from_codebooks(module, several, table)
    after, starts = module.tokens.weight.detach(), module.vocabulary.starts
    books = {"": several.load_safetensors("codebooks.safetensors")}
    books |= {name: several.load_safetensors(f"codebooks.{name}.safetensors") for name in MODALITIES}
    spaces = [("", 0, 3), ("text", 4, 2), ("image", 6, 2)]
    touched = torch.zeros(len(after), dtype=torch.bool)
    for name, first, depth in spaces:
        levels = [books[name][f"level.{level}"] for level in range(depth)]
        rows = [torch.arange(starts[first + i], starts[first + i] + len(b)) for i, b in enumerate(levels)]
        # Within a space, the levels keep the angles that their codes have with one another.
        torch.testing.assert_close(
            angles(after[torch.cat(rows)]), angles(torch.cat(levels)), atol=1e-4, rtol=0
        )
        touched[torch.cat(rows)] = True
    # Left at random: pad, mask, the digit, the code of a missing modality at each level, domains.
    assert int((~touched).sum()) == 2 + DIGIT + 4 + 2
    assert torch.equal(after[~touched], before[~touched])
    assert not (after[touched] == before[touched]).any(1).any()


def test_training_and_ranking_read_all_codes(
    trained: dict[str, Artifact], several: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"catalog": trained["catalog"], "quantizer": several}
    config = configuration(item_codes=0, pretrain={**TRAIN, "epochs": 1, "evaluate_every": 1})
    with process_group(config):
        artifact = stage.pretrain(context(tmp_path, "pretrain", "7"), config, inputs)
    table = token_table(several)
    assert artifact.load_json("encoder.json")["levels"] == [*LEVELS, DIGIT, 6, 5, 4, 4]
    recommender = SequenceRecommender.load(artifact, semantic_ids=table.codes)
    history = Ragged.from_lists([[31, 30, 59], [40]])
    log_probs = recommender.code_log_probs(history, 1)
    scores = FactorisedScorer(recommender, semantic_ids=table.codes).scores(history, 1)
    want = [
        [sum(float(log_probs[b, level, code]) for level, code in enumerate(codes)) for codes in table.codes]
        for b in range(2)
    ]
    torch.testing.assert_close(scores, torch.tensor(want), atol=1e-4, rtol=0)
    monkeypatch.setattr(CatalogView, "near_duplicate_group", property(lambda self: np.arange(2 * ITEMS)))
    evaluation = evaluate(context(tmp_path, "evaluation", "6"), config, {**inputs, "finetune": artifact})
    assert "qbrec" in evaluation.load_json("metrics.json")["models"]
    short = {**TRAIN, "epochs": 1, "evaluate_every": 1}
    config = configuration(item_codes=0, codebook_start=False, pretrain=short)
    with process_group(config):
        other = stage.pretrain(context(tmp_path, "pretrain", "8"), config, inputs)
    ours, theirs = (a.load_safetensors("encoder.safetensors")["tokens.weight"] for a in (artifact, other))
    assert not torch.allclose(ours, theirs, atol=1e-2)


@pytest.mark.parametrize("partial", [0.0, 1.0])
def test_no_hidden_item_shows_through_its_modality_codes(several: Artifact, partial: float) -> None:
    table = token_table(several)
    torch.manual_seed(0)
    module = SequenceEncoder(configuration().sequence, Vocabulary(table.sizes, ("pets", "games"))).eval()
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 9, 20)
    rows = Ragged.from_lengths(rng.integers(0, 2 * ITEMS, lengths.sum()), lengths)
    packed, _ = pack(rows, domains=np.zeros(20, np.int64), samples=np.arange(20))
    batch = packed.to("cpu", id_table(table.codes))
    masks = MaskConfig(partial=partial)
    hidden = draw_masks(batch.lengths, batch.samples, masks, num_levels=len(table.sizes), seed=1, epoch=0)
    some = hidden.any(1)
    # What is hidden reaches to the last level: no modality code is seen of an item whose ID is not.
    assert hidden[some, -1].all()
    assert (hidden[:, 1:] >= hidden[:, :-1]).all()
    if partial == 0:
        assert hidden[some].all()
    else:
        assert not hidden[:, 0].any()
        assert hidden[some, 1].any(), "the ID itself is hidden in part at times"
    with torch.no_grad():
        want = module(batch, HiddenCodes.find(hidden))
        wrong = (batch.codes + 1) % torch.tensor(table.sizes)
        batch.codes[hidden] = wrong[hidden]
        got = module(batch, HiddenCodes.find(hidden))
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)
