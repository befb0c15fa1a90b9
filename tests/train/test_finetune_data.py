"""The data's order, labels and document boundaries; the schedule; the loss."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from mha2mla import ConversionOptions
from tests.train.tiny import LENGTH, VOCAB, write_data, write_model, write_shard
from train.batches import PackedRows, TrainingOrder, next_tokens
from train.losses import cross_entropy
from train.schedule import learning_rate_factor
from train.targets import IGNORE, forward


def test_labels_never_cross_a_document_boundary():
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert next_tokens(tokens, positions).tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE]]


def test_order_is_a_permutation_per_epoch_and_depends_on_the_seed():
    order = TrainingOrder(rows=10, batch_size=4, epochs=3, seed=0)
    assert len(order) == 7  # 30 places, the last two left over
    seen = [row for step in range(len(order)) for row in order.rows(step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert order.rows(5) == TrainingOrder(10, 4, 3, seed=0).rows(5)  # asked for alone, as after a restart
    assert order.rows(5) != TrainingOrder(10, 4, 3, seed=1).rows(5)


def test_schedule_is_linear_constant_then_one_minus_root():
    factors = [learning_rate_factor(step, 100, 0.05, 0.20) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:81] == [1.0] * 76
    assert factors[85] == pytest.approx(1 - math.sqrt(5 / 20))
    assert factors[80:] == sorted(factors[80:], reverse=True) and factors[-1] > 0
    assert [learning_rate_factor(step, 3, 0.0, 0.0) for step in range(3)] == [1.0] * 3


def test_rows_of_any_length_with_the_largest_token_checked(tmp_path):
    rows = PackedRows(write_data(tmp_path, rows=8, length=17), "train", VOCAB)
    batch = rows.batch([7, 0])
    assert len(rows) == 8 and rows.length == 17
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: ((2, 17), torch.int64) for name in ("input_ids", "position_ids", "labels")
    }
    assert torch.equal(batch["input_ids"][1], rows.batch([0])["input_ids"][0])
    with pytest.raises(ValueError, match="another tokenizer"):
        PackedRows(tmp_path, "train", 60)


def test_largest_token_is_found_without_parquet_statistics(tmp_path):
    kind = pa.list_(pa.int32())
    table = pa.table({"input_ids": pa.array([[1, 99]], kind), "position_ids": pa.array([[0, 1]], kind)})
    pq.write_table(table, tmp_path / "train-00000.parquet", write_statistics=False)
    with pytest.raises(ValueError, match="token id 99"):
        PackedRows(tmp_path, "train", 99)
    assert len(PackedRows(tmp_path, "train", 100)) == 1


def test_no_rows_or_no_columns(tmp_path):
    with pytest.raises(ValueError, match="no rows of the split 'train'"):
        PackedRows(tmp_path, "train", VOCAB)
    write_shard(tmp_path / "train-00000.parquet", rows=0)
    with pytest.raises(ValueError, match="no rows of the split 'train'"):
        PackedRows(tmp_path, "train", VOCAB)
    pq.write_table(pa.table({"text": ["hello"]}), tmp_path / "train-00000.parquet")
    with pytest.raises(ValueError, match="lacks the columns"):
        PackedRows(tmp_path, "train", VOCAB)


@pytest.mark.parametrize("mla", [None, ConversionOptions(rope_dim=8, kv_lora_rank=10)], ids=["llama", "converted"])
def test_a_document_does_not_see_the_one_packed_before_it(tmp_path, mla):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path, mla=mla)).eval()
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(VOCAB, (1, 8), generator=generator) for _ in range(3))
    positions = torch.arange(8).repeat(2)[None]
    batches = [{"input_ids": torch.cat([start, second], 1), "position_ids": positions} for start in (first, other)]
    with torch.no_grad():
        packed, swapped = (forward(model, batch).logits[:, 8:] for batch in batches)
        alone = forward(model, {"input_ids": second, "position_ids": positions[:, :8]}).logits
        # Control: one long document, whose second half must depend on its first.
        long = {"position_ids": torch.arange(16)[None]}
        one, two = (forward(model, batch | long).logits[:, 8:] for batch in batches)
    assert torch.equal(packed, swapped)
    torch.testing.assert_close(packed, alone)
    assert (one - two).abs().max() > 0.01


def test_cross_entropy_is_a_sum_over_the_targets(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path)).eval()
    rows = PackedRows(write_data(tmp_path / "data"), "train", VOCAB)
    batch = rows.batch([0, 1, 2])
    loss, targets = cross_entropy(model, batch)
    documents = int((batch["position_ids"] == 0).sum())
    assert int(targets) == 3 * LENGTH - documents  # nothing predicts the first token of a document
    probabilities = forward(model, batch).logits.log_softmax(-1)
    by_hand = sum(
        -probabilities[row, place, label]
        for row in range(3)
        for place, label in enumerate(batch["labels"][row].tolist())
        if label != IGNORE
    )
    torch.testing.assert_close(loss, by_hand)
