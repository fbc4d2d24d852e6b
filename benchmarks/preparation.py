"""How long does a preparation take beyond its backward passes? `python -m benchmarks.preparation --json PATH|-`.

A preparation runs forward and backward `--calibration-steps` times and does something with each target layer's weight
gradient. What that costs is its time minus that of as many passes in which those gradients are made and freed, and no
other parameter's. A few such passes are timed just before each preparation, since a machine's speed drifts: their
median stands for all. Conversion and what the method does once, decompositions above all, are part of what it costs.

By default BERT-base (24 MLP layers of 768x3072 and 3072x768), its weights random, at 16 x 128 tokens: minutes a method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import median

import torch
from torch import nn

from baselines.method import MethodError
from benchmarks.collect import check_destination, say
from benchmarks.harness.environment import environment
from benchmarks.harness.errors import InputError
from benchmarks.harness.plan import plan
from benchmarks.harness.protocol import build
from benchmarks.harness.spec import RunSpec
from benchmarks.harness.workload import Workload
from benchmarks.options import integer, shape
from reports.record import write_bytes

FORMS = "sparsegrad,sparsegrad-compact,sparsegrad-fixed,sparsegrad-core,sparsegrad-directions"
EQUAL_TRAINABLE = "lora[7]"
# Timed before each preparation, after one that is not.
PASSES = 5

Row = dict[str, object]


def measured(spec: RunSpec) -> Row:
    """Seconds of a method's preparation, of its passes alone, and what is left; and what they were measured with."""
    workload = spec.workload()
    method, model, _ = build(spec, workload)
    passes_s = spec.calibration_steps * pass_time(model, workload.layers(model), workload)
    started = time.perf_counter()
    method.prepare(model, workload.batches())
    preparation_s = time.perf_counter() - started
    asked = ("method", "budget", "model", "block", "batch", "seq", "dtype", "calibration_steps", "seed")
    return {
        **{name: getattr(spec, name) for name in asked},
        "preparation_s": preparation_s,
        "passes_s": passes_s,
        "beyond_s": preparation_s - passes_s,
        **environment("cpu"),
    }


def pass_time(model: nn.Module, layers: Mapping[str, Sequence[str]], workload: Workload) -> float:
    """Median seconds of a forward and backward with the gradients of the layers' weights alone; none are left."""
    weights = {model.get_submodule(name).weight for names in layers.values() for name in names}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(parameter in weights)
    times = []
    for batch in islice(workload.batches(), PASSES + 1):
        started = time.perf_counter()
        workload.run_backward(model, batch)
        model.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return median(times[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, tell on stderr how each went, and write the rows as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparation", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", required=True, metavar="PATH|-")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="bert-base")
    what.add_argument("--block", type=shape, metavar="D_INxD_OUT", help="two MLP blocks in the model's place")
    parser.add_argument("--methods", default=FORMS, help="by default all forms at the budget of LoRA's rank 7")
    for option, default in (("--batch", 16), ("--seq", 128), ("--calibration-steps", 30)):
        parser.add_argument(option, type=integer, default=default)
    parser.add_argument("--threads", type=integer, help="default: torch's own number")
    given = vars(parser.parse_args(arguments))
    destination, methods, threads = (given.pop(name) for name in ("json", "methods", "threads"))
    try:
        check_destination(destination)
        if min(given["calibration_steps"], threads or 1) < 1:
            raise InputError("--calibration-steps and --threads must be at least 1")
        if given["block"] is not None:
            given["model"] = None
        specs = plan(methods, EQUAL_TRAINABLE, **given)
    except (InputError, MethodError) as error:
        parser.error(str(error))
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    for spec in specs:
        rows.append(row := measured(spec))
        say(
            f"{spec.method_label}: {row['preparation_s']:.2f} s, of which {row['passes_s']:.2f} s are "
            f"{spec.calibration_steps} passes and {row['beyond_s']:.2f} s what is beyond them "
            f"(threads: {row['threads']})"
        )
    text = json.dumps(rows, indent=1) + "\n"
    if destination == "-":
        sys.stdout.write(text)
    else:
        write_bytes(text.encode(), destination)


if __name__ == "__main__":
    main()
