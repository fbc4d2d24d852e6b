"""The console script `sparsegrad-bench`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import signal
import sys
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reports.record import Record, RecordError, dumps, read, unwritable, write

if TYPE_CHECKING:
    from benchmarks.harness.spec import RunSpec
    from benchmarks.harness.turns import Done

OK, USAGE = 0, 2
# As benchmarks/harness/predict.py has them; that file imports torch.
PREDICTED_DEVICES = ("cuda", "cpu")

RUN_EXAMPLES = """examples:
  sparsegrad-bench run --model minilm-l6 --methods full,lora[7],sparsegrad --equal-trainable lora[7] --json -
  sparsegrad-bench run --layer 768x3072 --methods all --seq 512 --dtype bfloat16 --json layer.json
  sparsegrad-bench run --model path/to/config.json --methods lora[8] --targets attention --train-rest none
"""
PREDICT_EXAMPLES = """examples:
  sparsegrad-bench predict --model llama-2-7b --methods lora[7] --batch 1 --seq 512 --dtype bfloat16
  sparsegrad-bench predict --model bert-base --methods all --equal-trainable lora[7] --json bert.json
  sparsegrad-bench predict --block 4096x11008 --methods all --batch 1 --seq 2048 --dtype bfloat16
"""
REPORT_EXAMPLES = """examples:
  sparsegrad-bench report results/records.json --out results
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="sparsegrad-bench",
        description="What fine-tuning methods cost in memory, time and parameters, measured under one harness.",
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_predict(commands)
    _add_report(commands)
    return root


def _shared_options() -> argparse.ArgumentParser:
    """What `run` and `predict` both take: the workload, the methods, and how they train."""
    shared = argparse.ArgumentParser(add_help=False)
    what = shared.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", help="packaged checkpoint, preset, path of a config.json or its directory; ORG/NAME with --hub"
    )
    what.add_argument("--layer", type=_shape, metavar="D_INxD_OUT", help="one linear layer")
    what.add_argument("--block", type=_shape, metavar="D_INxD_OUT", help="two MLP blocks: up, GELU, down, twice")
    shared.add_argument(
        "--methods", default="all", help="comma-separated names with a budget in brackets, or all (default)"
    )
    shared.add_argument(
        "--equal-trainable", metavar="METHOD", help="match every other budget to this one's, e.g. lora[7]"
    )
    shared.add_argument(
        "--data", help="text to train on (default: trec for encoders, movie for decoders); glue/TASK with --hub"
    )
    shared.add_argument("--hub", action="store_true", help="allow downloads from the Hugging Face hub")
    shared.add_argument("--targets", default="mlp", help="mlp (default), attention, all-linear, or NAME,NAME")
    shared.add_argument(
        "--train-rest", choices=("all", "none"), default="all", help="whether the rest trains too (default: all)"
    )
    shared.add_argument("--adapter-dtype", choices=("same", "float32"), default="same")
    shared.add_argument("--batch", type=int, default=16)
    shared.add_argument("--seq", type=int, default=128)
    shared.add_argument("--dtype", default="float32", help="float32 (default), bfloat16, float16 or float64")
    shared.add_argument(
        "--attention",
        choices=("eager", "sdpa", "sdpa-efficient", "sdpa-flash"),
        default="sdpa",
        help="sdpa (default): the kernel that torch picks; behind a hyphen, one of CUDA's that it is held to",
    )
    shared.add_argument(
        "--optimizer-impl", choices=("for-loop", "foreach", "fused"), default=None, help="default: torch's own"
    )
    shared.add_argument("--checkpointing", action="store_true", help="activation checkpointing (models)")
    shared.add_argument("--lr", type=float, default=1e-4)
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument(
        "--calibration-steps", type=int, default=30, help="backward passes before the HOSVD (default: 30)"
    )
    shared.add_argument(
        "--json", metavar="PATH|-", default="-", help="where records go; - is standard output (default)"
    )
    return shared


def _add_run(commands) -> None:
    run = commands.add_parser(
        "run",
        parents=[_shared_options()],
        help="measure methods on one workload",
        description="Measure methods on one workload, each in a process of its own, and time them in turns: a round of "
        "each, then the next round. Progress goes to stderr.",
        epilog=RUN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is a GPU, else cpu"
    )
    run.add_argument("--threads", type=int, default=None, help="torch's intra-operation threads (default: torch's own)")
    run.add_argument(
        "--rounds",
        type=int,
        default=15,
        help="steps timed, each beside one of full fine-tuning; 0 leaves the timing pass out (default: 15)",
    )
    run.add_argument(
        "--timing-span",
        type=float,
        default=45.0,
        metavar="SECONDS",
        help="spread the rounds over this long at least: they see more of the machine than a moment (default: 45)",
    )
    run.add_argument(
        "--unpaired", action="store_true", help="time steps alone: full fine-tuning's worker needs its own memory"
    )
    run.add_argument(
        "--snapshot",
        metavar="PATH",
        help="write the CUDA allocator's history of the measured steps for pytorch.org/memory_viz; of several methods "
        "each has a file of its own, PATH with the method's name in it",
    )
    run.add_argument("--time-limit", type=float, default=1800, metavar="SECONDS", help="per method (default: 1800)")
    run.set_defaults(handler=_run)


def _add_predict(commands) -> None:
    predict = commands.add_parser(
        "predict",
        parents=[_shared_options()],
        help="what a run would measure, without its memory",
        description="Run the measured protocol on fake tensors, which have shapes and no memory: the same records "
        "without times, losses and kernels' own workspaces. Progress goes to stderr.",
        epilog=PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument(
        "--device", choices=PREDICTED_DEVICES, default="cuda", help="whose memory behaviour to predict (default: cuda)"
    )
    predict.add_argument(
        "--gpu", metavar="NAME|X.Y", help="the card, by name (t4, a100, rtx-4090, ...) or compute capability (9.0)"
    )
    predict.add_argument(
        "--gpu-memory", type=_memory, metavar="24GiB", help="say for each method whether it fits in so much"
    )
    predict.set_defaults(handler=_predict)


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="turn records into a CSV, figures and one HTML page",
        description="Write records.csv, PNG figures and one self-contained index.html.",
        epilog=REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("records", nargs="+", type=Path, metavar="RECORDS.json")
    report.add_argument("--out", type=Path, required=True, metavar="DIR")
    report.set_defaults(handler=_report)


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(int(n) for n in match.groups()):
        raise argparse.ArgumentTypeError(f"write a shape as D_INxD_OUT, for example 768x3072, got {text!r}")
    return int(match[1]), int(match[2])


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB)", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"write a size in GiB or MiB, for example 24GiB, got {text!r}")
    return int(float(match[1]) * 2 ** (30 if match[2] == "GiB" else 20))


def _run(arguments: argparse.Namespace) -> int:
    # Imported here so that --help and report answer without torch.
    from benchmarks.harness.pairing import Reference
    from benchmarks.harness.turns import measure_all

    specs = run_specs(arguments)
    reference = None if arguments.unpaired else Reference(arguments.time_limit)

    def obtain(done: Done) -> None:
        measure_all(specs, reference, done, arguments.time_limit, arguments.timing_span)

    turns = "timed in turns" if specs[0].rounds and not arguments.unpaired else "one after the other"
    try:
        return _collect(specs, turns, obtain, arguments.json)
    finally:
        if reference is not None:
            reference.close()


def _predict(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.predict import predict

    specs = predict_specs(arguments)

    def obtain(done: Done) -> None:
        for spec in specs:
            done(spec, predict(spec), ())

    return _collect(specs, "predicted", obtain, arguments.json)


def _collect(specs: Sequence[RunSpec], how: str, obtain: Callable[[Done], None], destination: str) -> int:
    """Take records as they come, tell how each went, and keep them in the order of the specs."""
    _check_destination(destination)
    records: list[Record] = []
    places: list[int] = []  # of the records, among the specs
    started = time.monotonic()

    def done(spec: RunSpec, record: Record, _) -> None:
        place = next(i for i, other in enumerate(specs) if other == spec and i not in places)
        at = bisect(places, place)
        places.insert(at, place)
        records.insert(at, record)
        passed = time.monotonic() - started
        _say(f"[{len(records)}/{len(specs)}] {_named(spec)}: {_outcome(record)} (after {passed:.0f} s)")
        if destination != "-":
            write(records, destination)

    _say(f"{specs[0].label()}, train-rest {specs[0].train_rest}, {how}: {', '.join(map(_named, specs))} ...")
    try:
        obtain(done)
    finally:
        # Also when interrupted: what is complete is kept.
        if destination == "-":
            sys.stdout.write(dumps(records))
            sys.stdout.flush()
    if destination != "-":
        _say(f"{len(records)} records in {destination}")
    failed = [record.status for record in records if record.status != "ok"]
    if failed:
        _say(f"{len(failed)} of {len(records)} runs did not end ok: {', '.join(failed)}")
    return OK


def _named(spec: RunSpec) -> str:
    return spec.method if spec.budget is None else f"{spec.method}[{spec.budget}]"


def _check_destination(path: str) -> None:
    """Raise `InputError` now, not after minutes of measuring, where records cannot be written."""
    from benchmarks.harness.errors import InputError

    if path == "-":
        if sys.stdout is None:
            raise InputError("standard output is closed; give --json PATH")
    elif reason := unwritable(path):
        raise InputError(f"--json {path} cannot be written: {reason}")


def run_specs(arguments: argparse.Namespace) -> list:
    """The runs that a command line asks for, checked as far as no model is needed. Raises for bad input."""
    import torch

    from benchmarks.harness.errors import InputError

    if not arguments.time_limit > 0:
        raise InputError(f"--time-limit must be positive, got {arguments.time_limit}")
    if not 0 <= arguments.timing_span < math.inf:
        raise InputError(f"--timing-span must be a number of seconds, 0 or more, got {arguments.timing_span}")
    if arguments.rounds < 0 or (arguments.threads is not None and arguments.threads < 1):
        raise InputError("--rounds must not be negative, and --threads must be at least 1")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs an NVIDIA GPU that torch can see; use --device cpu")
    if arguments.snapshot is not None:
        _check_snapshot(arguments.snapshot, device)
    # Fixed here, so that every worker has the same.
    specs = _specs(arguments, device=device, threads=arguments.threads or torch.get_num_threads())
    if arguments.snapshot is None or len(specs) == 1:
        return specs
    return [dataclasses.replace(spec, snapshot=_snapshot_of(spec)) for spec in specs]


def _check_snapshot(path: str, device: str) -> None:
    from benchmarks.harness.errors import InputError

    if device != "cuda":
        raise InputError(f"--snapshot records the CUDA allocator and needs --device cuda, got {device}; leave it out")
    if not Path(path).parent.is_dir():
        raise InputError(f"--snapshot {path} cannot be written: make the directory {Path(path).parent} first")
    if reason := unwritable(path):
        raise InputError(f"--snapshot {path} cannot be written: {reason}")


def _snapshot_of(spec: RunSpec) -> str:
    """The path of one method's snapshot among several: its label before the suffix, without brackets."""
    path = Path(spec.snapshot)
    label = re.sub(r"[^\w.]+", "-", _named(spec)).strip("-")
    return str(path.with_name(f"{path.stem}-{label}{path.suffix}"))


def predict_specs(arguments: argparse.Namespace) -> list:
    """The predictions that a command line asks for, checked as far as no model is needed. Raises for bad input."""
    return _specs(arguments, device=arguments.device, rounds=0, gpu_memory_bytes=arguments.gpu_memory)


def _specs(arguments: argparse.Namespace, device: str, **fixed: object) -> list:
    from benchmarks.harness.errors import InputError
    from benchmarks.harness.plan import plan
    from benchmarks.harness.spec import RunSpec

    for name in ("calibration_steps", "lr"):
        if not getattr(arguments, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, got {getattr(arguments, name)}")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed must be from 0 to {2**32 - 1}, got {arguments.seed}")
    names = {f.name for f in dataclasses.fields(RunSpec)} - {"equal_trainable"}
    common = {key: value for key, value in vars(arguments).items() if key in names}
    # torch's own choice: foreach on CUDA, a loop over the parameters elsewhere.
    impl = arguments.optimizer_impl or ("foreach" if device == "cuda" else "for-loop")
    return plan(
        arguments.methods,
        arguments.equal_trainable,
        **{**common, "optimizer_impl": impl, "device": device, **fixed},
    )


def _outcome(record: Record) -> str:
    if record.status != "ok":
        return f"{record.status}: {record.reason}"
    step = "" if record.step_time_s is None else f", {record.step_time_s * 1e3:.0f} ms a step"
    if record.step_time_ratio is not None:
        step += f", {record.step_time_ratio:.2f} of full fine-tuning's"
    if record.fits is not None:
        room = f"{record.gpu_memory_bytes / 2**30:g} GiB"
        step += f", fits in {room}" if record.fits else f", does NOT fit in {room} ({record.oom_phase})"
    return f"ok, peak {record.peak_step_bytes / 2**20:.1f} MiB{step}"


def _report(arguments: argparse.Namespace) -> int:
    from reports.page import write_report

    records = [record for path in arguments.records for record in read(path)]
    page = write_report(records, arguments.out)
    _say(f"{len(records)} records; page: {page}")
    return OK


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one line on stderr and exit code 2."""
    arguments = parser().parse_args(argv)
    # An exception, so that the worker under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return arguments.handler(arguments)
    except ValueError as error:
        # The packages' own errors for input that a person can put right; others keep their traceback.
        if not _is_input_error(error):
            raise
        _say(f"sparsegrad-bench: {error}")
        return USAGE
    except KeyboardInterrupt:
        _say("\nsparsegrad-bench: interrupted; the records that were complete are kept")
        return 130
    except OSError as error:
        _say(f"sparsegrad-bench: {error}")
        return USAGE


def _is_input_error(error: ValueError) -> bool:
    if isinstance(error, RecordError):
        return True
    from baselines.method import MethodError
    from benchmarks.harness.errors import InputError
    from sparsegrad import SparseGradError

    return isinstance(error, InputError | MethodError | SparseGradError)


if __name__ == "__main__":
    sys.exit(main())
