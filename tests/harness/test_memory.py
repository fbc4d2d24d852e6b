"""The tracker: bytes counted by hand, and the CPU allocator's own trace as an independent witness."""

import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from benchmarks.harness.memory import CATEGORIES, AllocatorTrace, Tracker, storages

KIB = 1024


def floats(count):
    return torch.zeros(count // 4)


def test_birth_and_death():
    with Tracker() as tracker:
        a = floats(8 * KIB)
        assert tracker.live_bytes == 8 * KIB
        b = floats(4 * KIB)
        assert tracker.live_bytes == 12 * KIB
        del a
        assert tracker.live_bytes == 4 * KIB
        del b
    assert tracker.live_bytes == 0
    assert tracker.peak(0).bytes == 12 * KIB


def test_a_view_keeps_its_whole_storage():
    with Tracker() as tracker:
        a = floats(64 * KIB)
        row = a.view(16, -1)[3]
        assert tracker.live_bytes == 64 * KIB
        del a
        assert tracker.live_bytes == 64 * KIB
        del row
    assert tracker.live_bytes == 0


def test_a_sparse_tensor_is_its_indices_and_its_values():
    k, shape = 5, (7, 11)
    with Tracker() as tracker:
        indices, values = torch.zeros(2, k, dtype=torch.long), torch.ones(k)
        sparse = torch.sparse_coo_tensor(indices, values, shape, check_invariants=False)
        del indices, values
        assert tracker.live_bytes == 2 * k * 8 + k * 4
        del sparse
    assert tracker.live_bytes == 0


class SparseSum(torch.autograd.Function):
    """A sum whose gradient is a COO tensor of k = 2 entries; with `keep`, a clone of it is made in Python too."""

    @staticmethod
    def forward(ctx, weight, kept):
        ctx.kept = kept
        return weight.sum()

    @staticmethod
    def backward(ctx, _):
        gradient = torch.sparse_coo_tensor([[0, 2], [1, 1]], [1.0, 2.0], (3, 3), check_invariants=False)
        if ctx.kept is not None:
            ctx.kept.append(gradient.clone())
        return gradient, None


@pytest.mark.parametrize("kept", [None, []], ids=["taken over", "cloned by hand"])
def test_watching_does_not_change_how_a_sparse_gradient_is_accumulated(kept):
    def trace(context):
        weight = nn.Parameter(torch.zeros(3, 3))
        loss = SparseSum.apply(weight, kept)
        with AllocatorTrace() as allocator, context:
            loss.backward()
        # Entries, and whether the flag survives.
        dense = torch.zeros(3, 3).index_put_((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.tensor([1.0, 2.0]))
        assert torch.equal(weight.grad.to_dense(), dense)
        return allocator.peak_bytes, allocator.left_bytes, weight.grad.is_coalesced()

    gradient = 2 * 2 * 8 + 2 * 4
    watched, unwatched = trace(Tracker()), trace(nullcontext())
    assert watched == unwatched
    assert watched[1] == gradient * (1 if kept is None else 2)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
@pytest.mark.parametrize("make", [torch.sparse_csr_tensor, torch.sparse_csc_tensor])
def test_compressed_layouts_are_three_storages(make):
    sparse = make(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2]), torch.ones(2), (3, 3), check_invariants=False)
    assert sum(s.nbytes() for s in storages(sparse)) == 4 * 8 + 2 * 8 + 2 * 4


def test_an_unknown_layout_is_an_error():
    with pytest.raises(TypeError, match="layout"):
        list(storages(torch.ones(2, 2).to_mkldnn()))


def test_in_place_operations_allocate_nothing():
    a = floats(KIB)
    tracker = Tracker()
    tracker.adopt(a)
    with tracker:
        a.add_(1).mul_(2).view(-1)[3] = 5
    assert tracker.live_bytes == KIB


def test_a_resized_storage_is_counted_at_its_new_size():
    out = torch.empty(0)
    with Tracker() as tracker:
        torch.add(torch.zeros(256), 1, out=out)
        assert tracker.live_bytes == KIB  # the argument is gone, `out` has grown


def test_saved_tensors_live_until_backward():
    x = floats(KIB).requires_grad_()
    with Tracker() as tracker:
        tracker.adopt(x)
        y = x.exp()  # saves its result
        z = y.sin()  # saves y
        del y
        assert tracker.live_bytes == 3 * KIB
        z.backward(torch.ones(KIB // 4))
        del z
        assert tracker.live_bytes == 2 * KIB  # x and its gradient
        x.grad = None
    assert tracker.live_bytes == KIB


def test_foreach_and_fused_optimizers_are_seen():
    for impl in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        layer = nn.Linear(16, 16, bias=False)
        layer.weight.grad = torch.ones(16, 16)
        optimizer = torch.optim.AdamW(layer.parameters(), **impl)
        tracker = Tracker()
        tracker.adopt(layer)
        before = tracker.live_bytes
        with tracker:
            optimizer.step()
        # Two moments and a float32 step counter.
        assert tracker.live_bytes - before == 2 * 16 * 16 * 4 + 4, impl


def test_phases_and_spans():
    tracker = Tracker()
    with tracker:
        with tracker.phase("one") as one:
            a = floats(2 * KIB)
            b = floats(6 * KIB)
            del b
        with tracker.phase("two") as two:
            c = floats(3 * KIB)
    assert tracker.peak(one.start, one.end).bytes == 8 * KIB
    assert tracker.peak(two.start, two.end).bytes == 5 * KIB  # what lived before the span counts
    whole = tracker.peak(0)
    assert (whole.bytes, whole.phase) == (8 * KIB, "one")
    assert tracker.peak_of_born(two.start, two.end) == 3 * KIB
    del a, c


def test_a_span_without_events_has_what_lived():
    with Tracker() as tracker:
        a = floats(KIB)
        with tracker.phase("idle") as span:
            pass
    assert tracker.peak(span.start, span.end).bytes == KIB
    del a


def test_categories_add_up_and_hold_from_birth():
    with Tracker() as tracker:
        a, b, c = floats(KIB), floats(2 * KIB), floats(4 * KIB)
        tracker.mark("gradient", a)
        tracker.mark("parameter", [b])
        del a
        d = floats(8 * KIB)
    peak = tracker.peak(0)
    assert peak.bytes == 14 * KIB
    tracker.mark("optimizer", d)
    by = tracker.peak(0).by_category
    assert by == {**dict.fromkeys(CATEGORIES, 0), "parameter": 2 * KIB, "temporary": 4 * KIB, "optimizer": 8 * KIB}
    del b, c, d


def test_a_series_has_every_instant_of_a_short_log():
    tracker = Tracker()
    with tracker:
        old = floats(KIB)
        start = tracker.position
        a, b = floats(2 * KIB), floats(4 * KIB)
        del a
        tracker.mark("gradient", b)
        tracker.mark("parameter", old)
    at, series = tracker.series(start, tracker.position, most=4)
    assert at == [0, 1, 2, 3]
    assert series["parameter"] == [KIB] * 4
    assert series["gradient"] == [0, 0, 4 * KIB, 4 * KIB]
    assert series["temporary"] == [0, 2 * KIB, 2 * KIB, 0]


def test_a_long_series_keeps_the_extremes_of_each_stretch():
    tracker = Tracker()
    held = []
    with tracker:
        for i in range(200):
            # A sawtooth with one tall and one deep tooth.
            held.append(floats({70: 9 * KIB}.get(i, 2 * KIB)))
            if i % 2 or i == 130:
                held.clear()
    for most in (4, 21, 160):
        at, series = tracker.series(0, tracker.position, most)
        totals = [sum(column) for column in zip(*series.values(), strict=True)]
        assert len(at) <= most
        assert (at[0], at[-1]) == (0, tracker.position)
        assert max(totals) == tracker.peak(0).bytes == 11 * KIB
        assert min(totals) == 0
        # Each sample is what lived at its instant.
        assert totals == [sum(event.change for event in tracker.events[:i]) for i in at]


def test_the_earlier_category_wins():
    a = floats(KIB)
    tracker = Tracker()
    for category in ("activation", "parameter", "basis", "gradient"):
        tracker.mark(category, a)
    assert tracker.peak(0).by_category["basis"] == KIB


def test_mark_born_since():
    with Tracker() as tracker:
        old = floats(KIB)
        position = tracker.position
        new, gone = floats(2 * KIB), floats(4 * KIB)
        del gone
        tracker.mark_born_since("activation", position)
    by = tracker.peak(tracker.position).by_category
    assert (by["activation"], by["temporary"]) == (2 * KIB, KIB)
    del old, new


def test_adopt_counts_modules_gradients_and_optimizer_state_once():
    layer = nn.Linear(8, 8)
    tied = nn.Sequential(layer, layer)
    tied(torch.ones(1, 8)).sum().backward()
    optimizer = torch.optim.SGD(tied.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    tracker = Tracker()
    tracker.adopt(tied, optimizer)
    tracker.adopt(tied)
    assert tracker.live_bytes == 3 * (8 * 8 + 8) * 4  # weights, gradients, momentum


def test_live_without_some_things():
    a, b = floats(KIB), floats(2 * KIB)
    tracker = Tracker()
    tracker.adopt(a, b)
    end = tracker.position
    assert tracker.live_at(end, without=tracker.serials(b)) == KIB
    assert tracker.live_at(end, without=tracker.serials([a, b[:3]])) == 0
    assert tracker.live_at(end, without=tracker.serials(floats(64))) == 3 * KIB  # not known to the tracker
    assert tracker.live_at(0) == 0
    del a
    assert tracker.live_at(end) == 3 * KIB
    assert tracker.live_at(tracker.position) == 2 * KIB


def test_tensors_on_other_devices_do_not_count():
    tracker = Tracker("cpu")
    tracker.adopt(torch.empty(100, device="meta"))
    assert tracker.live_bytes == 0


def test_the_tracker_keeps_nothing_alive():
    with Tracker():
        a = floats(KIB)
        storage = a.untyped_storage()
        gone = []
        weakref.finalize(storage, gone.append, True)
        del a, storage
        gc.collect()
        assert gone


def test_the_allocator_trace_counts_what_is_allocated():
    kept = []
    with AllocatorTrace() as trace:
        kept.append(torch.empty(1000, dtype=torch.uint8))
        torch.empty(500, dtype=torch.uint8)
        kept.append(torch.empty(200, dtype=torch.uint8))
    assert (trace.peak_bytes, trace.left_bytes) == (1500, 1200)


def test_a_trace_knows_nothing_of_what_an_earlier_one_saw_allocated():
    with AllocatorTrace():
        old = torch.empty(1000, dtype=torch.uint8)
    with AllocatorTrace() as trace:
        kept = torch.empty(300, dtype=torch.uint8)
        del old
        torch.empty(100, dtype=torch.uint8)
    assert (trace.peak_bytes, trace.left_bytes) == (400, 300)
    del kept


def test_what_a_kernel_allocates_inside_is_seen_by_the_trace_alone():
    a = torch.randn(64, 64, dtype=torch.float64)
    a = a + a.T
    tracker = Tracker()
    tracker.adopt(a)
    with AllocatorTrace() as trace, tracker:
        torch.linalg.eigh(a)
    # The eigenvectors, the eigenvalues, and inside the kernel the workspace.
    assert tracker.peak_of_born(0) - a.nbytes >= 64 * 64 * 8 + 64 * 8
    assert trace.peak_bytes > tracker.peak_of_born(0) - a.nbytes


def test_a_process_that_tracks_for_the_first_time_keeps_nothing_alive():
    code = """
import torch
from benchmarks.harness.memory import Tracker, steady_collection

def first():
    held = torch.zeros(1000)
    return held.sum().item()

with steady_collection(), Tracker() as tracker:
    first()
    print(tracker.live_bytes)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "0"
