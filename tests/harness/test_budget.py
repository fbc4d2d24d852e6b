"""Equal budgets: the nearest one, found against a plain search over every budget; and the largest within a memory."""

import math
from dataclasses import replace

import pytest
import torch

from baselines.method import Setting
from baselines.registry import methods
from benchmarks.harness.budget import SLACK, budget_params, equal_memory, equal_trainable, metrics
from benchmarks.harness.predict import predict
from benchmarks.harness.spec import RunSpec
from reports.record import Record

ENCODER = [(1536, 384), (384, 1536)] * 6
ODD = [(53, 37), (37, 53), (11, 13)]


def test_rank_7_of_the_encoder():
    reference = budget_params("lora", 7, ENCODER)
    assert reference == 12 * 7 * (384 + 1536)
    # Entries: the same number in each layer. Outputs: k rows of D_in entries, over both kinds 2 (D_in + D_out) / 2.
    assert equal_trainable("sparsegrad", reference, ENCODER) == 7 * (384 + 1536)
    assert equal_trainable("random-mask", reference, ENCODER) == 7 * (384 + 1536)
    # As many fit a core of either shape: 70 x 192 and 280 x 48.
    assert equal_trainable("sparsegrad-core", reference, ENCODER) == 7 * (384 + 1536)
    assert budget_params("sparsegrad-core", 7 * (384 + 1536), ENCODER) == reference
    assert equal_trainable("meprop-unified", reference, ENCODER) == 14
    assert equal_trainable("lora", reference, ENCODER) == 7


def test_a_method_without_a_budget_has_none_to_match():
    assert equal_trainable("full", 1000, ENCODER) is None
    assert budget_params("full", None, ENCODER) is None


@pytest.mark.parametrize("reference", [1, 2, 100, 101, 345, 10**9])
@pytest.mark.parametrize("name", [name for name, cls in methods().items() if cls.knob])
def test_nothing_is_nearer(name, reference):
    found = equal_trainable(name, reference, ODD)
    largest = methods()[name].largest_budget(ODD)
    nearest = min(abs(budget_params(name, b, ODD) - reference) for b in range(1, largest + 1))
    assert abs(budget_params(name, found, ODD) - reference) == nearest


# --- equal memory


class Memory:
    """A stand-in for predictions: the bytes of a budget as a function says them."""

    def __init__(self, size):
        self.size = size
        self.asked: list[int] = []

    def __call__(self, budget):
        self.asked.append(budget)
        return Record(method="lora", model="m", budget=budget, resident_bytes=self.size(budget))


def blocks(size_bytes):
    return -(-size_bytes // 512) * 512


# Each rises, or stays level.
CURVES = {
    "linear": lambda n: 10_000 + 48 * n,
    "in blocks": lambda n: 7 * blocks(8 * n) + 3 * blocks(4 * n),
    "level": lambda n: 5_000,
    "level, then steep": lambda n: max(40_000, 100 * n),
    "steep, then level": lambda n: min(40_000, 100 * n),
    "square": lambda n: n * n,
    "root": lambda n: math.isqrt(10**6 * n),
}


@pytest.mark.parametrize("most", [1, 2, 3, 700, 45_088_768])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 1, 1.5])
@pytest.mark.parametrize("curve", CURVES)
def test_the_largest_budget_within_the_limit(curve, share, most):
    memory, size = Memory(CURVES[curve]), CURVES[curve]
    limit = size(1) + int(share * (size(most) - size(1)))
    record = equal_memory(memory, "resident_bytes", limit, most)
    assert record.matched
    assert size(record.budget) <= limit
    assert record.budget == most or size(record.budget + 1) > limit
    assert len(set(memory.asked)) == len(memory.asked)
    assert {record.budget, min(record.budget + 1, most)} <= set(memory.asked)
    # Bisection of n budgets asks for log2(n) of them, once both ends are known.
    assert len(memory.asked) <= 2 + math.ceil(math.log2(most)) + SLACK


def test_few_predictions_where_memory_is_linear():
    memory = Memory(lambda n: 10**9 + 12 * n)
    assert equal_memory(memory, "resident_bytes", 10**9 + 12 * 123_456 + 5, 2_359_296).budget == 123_456
    assert memory.asked == [2_359_296, 1, 123_456, 123_457]


def test_the_largest_of_all_takes_one_prediction():
    memory = Memory(lambda n: 500)
    assert equal_memory(memory, "resident_bytes", 500, 10**6).budget == 10**6
    assert memory.asked == [10**6]


def test_where_no_budget_fits():
    record = equal_memory(Memory(lambda n: 1000 + n), "resident_bytes", 1000, 50)
    assert (record.budget, record.matched, record.status, record.resident_bytes) == (1, False, "ok", 1001)
    assert record.reason == "no budget fits: even lora[1] has 1,001 bytes, more than 1,000"


def test_where_memory_wobbles_it_ends_at_a_crossing():
    def size(n):
        return 1000 + 10 * n + 200 * (n % 7 == 3)

    record = equal_memory(Memory(size), "resident_bytes", 2000, 10_000)
    assert size(record.budget) <= 2000 < size(record.budget + 1)


@pytest.mark.parametrize("unknown", [1, 40, 1000])
def test_a_refusal_ends_the_search(unknown):
    def predict(budget):
        if budget == unknown:
            return Record(method="lora", model="m", budget=budget, status="refused", reason="why")
        return Record(method="lora", model="m", budget=budget, resident_bytes=budget)

    record = equal_memory(predict, "resident_bytes", 40, 1000)
    assert (record.budget, record.matched, record.reason) == (unknown, None, "why")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_metrics_are_what_predictions_fill(device):
    record = predict(RunSpec("lora", budget=2, layer=(12, 20), batch=2, seq=3, device=device))
    filled = {name for name, value in record.to_dict().items() if name.endswith("_bytes") and value is not None}
    assert set(metrics(device)) == filled


def test_resident_memory_of_a_layer_by_its_formula():
    spec = RunSpec("lora", budget=5, layer=(64, 96), batch=1, seq=4, device="cpu", train_rest="none")

    def resident(name, budget):
        setting = Setting(layers={"linear": ["linear"]}, train_rest="none")
        return methods()[name](budget, setting).formula((96, 64), 4, torch.float32).resident

    # 16 bytes an entry for random-mask (a value with two moments, an index) are fewer than LoRA's 5 x 160 x 12.
    limit = resident("lora", 5)
    within = [n for n in range(1, 96 * 64) if resident("random-mask", n) <= limit]
    measured = predict(spec).resident_bytes
    found = equal_memory(
        lambda budget: predict(replace(spec, method="random-mask", budget=budget)), "resident_bytes", measured, 96 * 64
    )
    # The formulas leave the bias out, which both have, and AdamW's step counters: one of 4 bytes for each parameter.
    assert found.budget == within[-1]
