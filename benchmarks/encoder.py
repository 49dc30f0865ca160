"""A training step of the masked encoder on the CPU: ours beside padding, BERT and a plain torch loop.

Real tokens per second of float32 training steps (masks, forward, backward, AdamW) on the same histories of up
to 50 items × 4 codes plus the item to predict, two threads, rounds interleaved in one process:

* `ours`: packed, the shipped loss (codes, and a softmax over the items of the catalogue);
* `padded`: the same weights, loss and masks, every history padded to full length under a key mask, the head
  at hidden places only, as ours; `padded_longest`: to the longest of its batch. With dropout 0 all three must
  give the same loss, and do, or the benchmark stops;
* `bert_longest`, `bert_full`: Hugging Face's BertForMaskedLM of the same size (SDPA), its batches made
  beforehand; the faster one counts. Its loss is over codes only; `ours_codes` is ours without items.

`deepspeed_overhead` is the time of a step of two micro-batches in `engine.train` (ZeRO 1, the default) over
that of a loop in plain torch with the same batches, losses, optimiser groups and clipping, minus 1; their
losses must agree. `data_wait_fraction` is the share of a training loop that waits for the next batch of
100,000 histories read from block tars; the first batch is left out and printed. Times are the best of every
batch over the rounds, beside them the ratios of whole rounds. The shipped configuration is measured first,
then that asked for; JSON has the latter's ratios and the larger wait. Lengths are those of the set Beauty if
QBREC_BENCH_DATA names the folder that holds it, else log-normal. The last line is JSON. Needs transformers.

    python benchmarks/encoder.py [--width 256 --layers 4 --heads 4] [--rounds 7] [--steps 3]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from encoder_loop import CPU, best, compare_engines, data_wait, own_step, ratios, spread

from qbrec.config.sections import ComputeConfig
from qbrec.config.stages import MaskConfig, SequenceConfig
from qbrec.engine.candidates import Candidates
from qbrec.sequence.encoder import SequenceEncoder
from qbrec.sequence.packing import HiddenCodes, PackedHistories, PackedRows, pack
from qbrec.sequence.tasks import MaskedTask
from qbrec.sequence.vocabulary import Vocabulary
from qbrec.storage.ragged import Ragged

MAX_ITEMS, LEVELS, CODES, ITEMS, USERS = 50, 4, 256, 12_101, 100_000  # Beauty has 12,101 items
LOG_MEAN, LOG_STD, SHORTEST = 2.019, 0.487, 5  # fitted to Beauty, whose users have at least five interactions


def draw_lengths(count: int) -> np.ndarray:
    """Items in each history, at most `MAX_ITEMS` and the one to predict."""
    rng, folder = np.random.default_rng(0), os.environ.get("QBREC_BENCH_DATA")
    if folder is None:
        lengths = np.maximum(np.exp(rng.normal(LOG_MEAN, LOG_STD, count)).round().astype(np.int64), SHORTEST)
    else:
        import pyarrow.parquet as pq

        users = pq.read_table(f"{folder}/beauty/interactions.parquet", columns=["user_id"])["user_id"]
        lengths = rng.choice(np.array([c["counts"].as_py() for c in users.value_counts()]), count)
    return np.minimum(lengths, MAX_ITEMS + 1)


def make_task(sequence: SequenceConfig, **changes: Any) -> MaskedTask:
    torch.manual_seed(0)
    ids = np.random.default_rng(1).integers(0, CODES, (ITEMS, LEVELS)).astype(np.uint8)
    module = SequenceEncoder(sequence, Vocabulary((CODES,) * LEVELS, ("shop",)))
    candidates = Candidates(torch.arange(ITEMS), count=sequence.candidates, seed=0)
    return MaskedTask(module, semantic_ids=ids, masks=MaskConfig(), seed=0, candidates=candidates, **changes)


def make_batches(count: int, size: int) -> list[PackedRows]:
    lengths, rng = draw_lengths(count * size), np.random.default_rng(2)
    batches = []
    for begin in range(0, count * size, size):
        part = lengths[begin : begin + size]
        rows = Ragged.from_lengths(rng.integers(0, ITEMS, part.sum()), part)
        samples = np.arange(begin, begin + size)
        batches.append(pack(rows, domains=np.zeros(size, np.int64), samples=samples)[0])
    return batches


class Padded(nn.Module):
    """The encoder's forward over histories padded to one length; its weights are the encoder's own."""

    def __init__(self, encoder: SequenceEncoder, *, longest: bool) -> None:
        super().__init__()
        self.encoder, self.longest = encoder, longest

    def forward(self, batch: PackedHistories, hidden: HiddenCodes) -> list[torch.Tensor]:
        encoder = self.encoder
        vocabulary, width = encoder.vocabulary, encoder.config.width
        size = int(batch.lengths.max()) if self.longest else encoder.num_positions
        valid = torch.arange(size) < batch.lengths[:, None]  # [B, H]
        ids = torch.full((*valid.shape, LEVELS), vocabulary.pad)
        ids[valid] = torch.where(hidden.mask, vocabulary.mask, vocabulary.tokens(batch.codes))
        visible = torch.zeros(ids.shape, dtype=torch.bool)
        visible[valid] = ~hidden.mask
        share = visible.float()[..., None]
        codes = encoder.tokens(ids)  # [B, H, L, D]
        item = encoder.item_projection((codes * share).sum(2) / share.sum(2).clamp(min=1))
        item = item + encoder.positions((batch.lengths[:, None] - 1 - torch.arange(size)).clamp(min=0))
        content = codes + item[:, :, None] + encoder.level_embedding.weight
        domain = encoder.tokens(vocabulary.domain_tokens(batch.domains))[:, None]
        x = encoder.dropout(torch.cat((domain, content.flatten(1, 2)), 1))  # [B, T, D]
        keys = torch.cat((torch.ones_like(valid[:, :1]), valid.repeat_interleave(LEVELS, 1)), 1)[
            :, None, None
        ]
        items = torch.arange(valid.numel()).view(valid.shape)[valid]  # [S] place of an item in [B, H]
        user, place = items // size, items % size
        read = torch.cat(
            [user[i] * x.shape[1] + 1 + place[i] * LEVELS + level for level, i in enumerate(hidden.items)]
        )
        for block in encoder.blocks:
            assert hasattr(block, "qkv")
            qkv = block.qkv(block.attention_norm(x)).view(*x.shape[:2], 3, block.heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
            mixed = mixed.transpose(1, 2).reshape(x.shape)
            if block is encoder.blocks[-1]:
                x, mixed = x.reshape(-1, width)[read], mixed.reshape(-1, width)[read]
            x = x + block.dropout(block.attention_output(mixed))
            fed = block.down(functional.gelu(block.up(block.feed_norm(x)), approximate="tanh"))
            x = x + block.dropout(fed)
        return encoder._logits(encoder.head(x), [len(i) for i in hidden.items])


def bert_step(
    task: MaskedTask, batches: list[PackedRows], sequence: SequenceConfig, *, longest: bool
) -> Callable[[PackedRows], None]:
    from transformers import BertConfig, BertForMaskedLM

    vocabulary = task.module.vocabulary
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary.size,
            hidden_size=sequence.width,
            num_hidden_layers=sequence.layers,
            num_attention_heads=sequence.heads,
            intermediate_size=4 * sequence.width,
            max_position_embeddings=1 + LEVELS * (MAX_ITEMS + 1),
            hidden_dropout_prob=sequence.dropout,
            attention_probs_dropout_prob=0.0,  # ours has none either
            attn_implementation="sdpa",
        )
    ).train()
    inputs = {}
    for batch in batches:
        prepared = task.prepare(batch, CPU)[0]
        items = int(batch.lengths.max()) if longest else MAX_ITEMS + 1
        ids = torch.full((len(batch.lengths), items, LEVELS), vocabulary.pad)
        labels = torch.full_like(ids, -100)
        valid = torch.arange(items) < batch.lengths[:, None]
        codes, mask = vocabulary.tokens(prepared.histories.codes), prepared.hidden.mask
        ids[valid] = torch.where(mask, vocabulary.mask, codes)
        labels[valid] = torch.where(mask, codes, -100)
        first = vocabulary.domain_tokens(batch.domains)[:, None]
        ids = torch.cat((first, ids.flatten(1)), 1)
        labels = torch.cat((torch.full_like(first, -100), labels.flatten(1)), 1)
        inputs[id(batch)] = {
            "input_ids": ids,
            "attention_mask": (ids != vocabulary.pad).long(),
            "labels": labels,
        }
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(batch: PackedRows) -> None:
        model(**inputs[id(batch)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def check_padding(sequence: SequenceConfig, batch: PackedRows) -> None:
    task = make_task(sequence.model_copy(update={"dropout": 0.0}))
    prepared, count = task.prepare(batch, CPU)
    modules = [task.module, *(Padded(task.module, longest=longest) for longest in (False, True))]
    losses = torch.stack([task.loss(module, prepared).detach() / count for module in modules])
    torch.testing.assert_close(losses, losses[:1].expand(3), atol=1e-5, rtol=1e-5)


def compare_steps(sequence: SequenceConfig, batches: list[PackedRows], *, rounds: int) -> dict[str, float]:
    check_padding(sequence, batches[0])
    task, codes_only = make_task(sequence), make_task(sequence, item_weight=0.0)
    rivals = {False: make_task(sequence), True: make_task(sequence)}
    variants = {
        "ours": own_step(task, task.module),
        "ours_codes": own_step(codes_only, codes_only.module),
        "padded": own_step(rivals[False], Padded(rivals[False].module, longest=False)),
        "padded_longest": own_step(rivals[True], Padded(rivals[True].module, longest=True)),
        "bert_longest": bert_step(task, batches, sequence, longest=True),
        "bert_full": bert_step(task, batches, sequence, longest=False),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, step in variants.items():
            seconds = []
            for batch in batches:
                began = time.perf_counter()
                step(batch)
                seconds.append(time.perf_counter() - began)
            if turn:  # the first one is for warming up
                times[name].append(seconds)
    tokens = sum(len(batch.lengths) + LEVELS * len(batch.rows) for batch in batches)
    full = sum(len(batch.lengths) for batch in batches) * (1 + LEVELS * (MAX_ITEMS + 1))
    print(f"  {len(batches)} batches, {tokens} tokens, {tokens / full:.2f} of the padded ones")
    slower = {name: best(t) / best(times["ours"]) for name, t in times.items()}
    for name, t in times.items():
        print(f"  {name:<15} {tokens / best(t):8.0f} tokens/s   time / ours {slower[name]:.2f} "
              f"({spread(ratios(t, times['ours']))})")  # fmt: skip
    return {
        "packed_vs_padded": slower["padded"],
        "vs_hf_bert": min(slower["bert_longest"], slower["bert_full"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (
        ("width", 256),
        ("layers", 4),
        ("heads", 4),
        ("batch", 64),
        ("steps", 3),
        ("rounds", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's calls of torch.distributed
    print("lengths:", "Beauty" if "QBREC_BENCH_DATA" in os.environ else f"log-normal({LOG_MEAN}, {LOG_STD})")
    shipped = SequenceConfig(max_items=MAX_ITEMS)
    size = {"width": options.width, "layers": options.layers, "heads": options.heads}
    result: dict[str, float] = {}
    for label, sequence in (("shipped", shipped), ("as asked", shipped.model_copy(update=size))):
        print(
            f"{label}: width {sequence.width}, {sequence.layers} layers, {sequence.heads} heads", flush=True
        )
        batches = make_batches(2 * options.steps, options.batch)
        result |= compare_steps(sequence, batches[: options.steps], rounds=options.rounds)
        overhead = compare_engines(make_task(sequence), batches, rounds=options.rounds)
        wait = data_wait(
            make_task(sequence),
            draw_lengths(USERS),
            num_items=ITEMS,
            size=options.batch,
            steps=10 * options.steps if label == "shipped" else options.steps,
            rounds=3,
        )
        result["deepspeed_overhead"] = overhead[ComputeConfig().zero_stage]
        result["data_wait_fraction"] = max(result.get("data_wait_fraction", 0.0), wait)
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
