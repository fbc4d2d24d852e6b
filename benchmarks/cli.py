"""The console script `sparsegrad-bench`."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.collect import check_destination, collect, say
from benchmarks.harness.fit import MOST
from benchmarks.lock import held
from benchmarks.options import checkpoints, fields, integer, memory, processors, several, shape, single
from reports.compare import ENVIRONMENTS
from reports.record import RecordError, read, unwritable
from reports.thresholds import ThresholdsError

if TYPE_CHECKING:
    from benchmarks.harness.spec import RunSpec
    from benchmarks.harness.turns import Done

OK, USAGE = 0, 2
LONGEST_SENTENCE = 1500  # characters
# As the harness has them, whose files import torch.
PREDICTED_DEVICES = ("cuda", "cpu")
ATTENTIONS = ("eager", "sdpa", "sdpa-efficient", "sdpa-flash")
CLUSTERS = ("slurm", "local")
OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
OPTIMIZER_IMPLS = ("for-loop", "foreach", "fused")
# Options of `quality` that do not go with --space.
STUDYS_OWN = ("jobs", "cluster", "cluster_option", "minutes", "time_limit", "arms", "lrs", "seeds")

RUN_EXAMPLES = """examples:
  sparsegrad-bench run --model minilm-l6 --methods full,lora[7],sparsegrad --equal-trainable lora[7] --json -
  sparsegrad-bench run --layer 768x3072 --methods all --seq 512 --dtype bfloat16 --json layer.json
  sparsegrad-bench run --model path/to/config.json --methods lora[8] --targets attention --train-rest none
"""
PREDICT_EXAMPLES = """examples:
  sparsegrad-bench predict --model llama-2-7b --methods lora[7] --batch 1 --seq 512 --dtype bfloat16
  sparsegrad-bench predict --model bert-base --methods all --equal-trainable lora[7] --json bert.json
  sparsegrad-bench predict --model bert-base,roberta-large --methods lora[7],sparsegrad --batch 8,32 --gpu t4,h100
  sparsegrad-bench predict --model llama-2-7b --methods lora[7] --train-rest none --gpu-memory 80GiB --max batch
"""
EQUAL_MEMORY_EXAMPLES = """examples:
  sparsegrad-bench equal-memory --model bert-base --reference lora[7] --methods all --json equal.json
  sparsegrad-bench equal-memory --block 4096x11008 --reference lora[7] --metric resident_bytes --dtype bfloat16
"""
QUALITY_EXAMPLES = """examples:
  sparsegrad-bench quality --out study --jobs 2
  sparsegrad-bench quality --out study --jobs 2 --minutes 60 --json summary.json
  sparsegrad-bench quality --out small --tasks trec,amazon --arms lora,sparsegrad-core@peak --train-size 100 --epochs 15
  sparsegrad-bench quality --out mine --arms lora,random-mask,my_method.py:MyMethod,my_method.py:MyMethod@peak
  sparsegrad-bench quality --out glue --model google-bert/bert-base-uncased --tasks glue/rte,glue/mrpc --hub
  sparsegrad-bench quality --out study --jobs 64 --cluster slurm --cluster-option slurm_partition=short
  sparsegrad-bench quality --space --out space --json -
"""
CLAIM_EXAMPLES = """examples:
  sparsegrad-bench claim --out claim
  sparsegrad-bench claim --quick --out claim --require holds
"""
REPORT_EXAMPLES = """examples:
  sparsegrad-bench report results/records.json --out results
  sparsegrad-bench report --history history.jsonl --out trend
"""
COMPARE_EXAMPLES = """exit codes, of several the first:
  2  bad usage or unreadable input
  1  a regression; with --fail-on change, anything that moved
  3  a benchmark of the reference is missing from the new results
  4  not comparable: the environment, whose memory is meant, or the version of the schema

examples:
  sparsegrad-bench compare reference.json new.json
  sparsegrad-bench compare reference.json new.json --markdown - >> "$GITHUB_STEP_SUMMARY"
  sparsegrad-bench compare reference.json out.json --environment warn --thresholds ours.json --json comparison.json
  sparsegrad-bench compare reference.json new.json --update
  sparsegrad-bench compare reference.json new.json --history history.jsonl --commit "$(git rev-parse HEAD)"
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
    _add_equal_memory(commands)
    _add_quality(commands)
    _add_claim(commands)
    _add_report(commands)
    _add_compare(commands)
    return root


def _shared_options() -> argparse.ArgumentParser:
    """What the commands that measure or predict take: the workload, the methods, and how they train."""
    shared = argparse.ArgumentParser(add_help=False)
    what = shared.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        type=checkpoints,
        default=(None,),
        help="packaged checkpoint, preset, path of a config.json or its directory; ORG/NAME with --hub",
    )
    what.add_argument("--layer", type=several(shape), default=(None,), metavar="D_INxD_OUT", help="one linear layer")
    what.add_argument(
        "--block",
        type=several(shape),
        default=(None,),
        metavar="D_INxD_OUT",
        help="two MLP blocks: up, GELU, down, twice",
    )
    shared.add_argument(
        "--methods",
        default="all",
        help="comma-separated names with a budget in brackets, or all (default); peft:NAME is a tuner of peft's",
    )
    shared.add_argument(
        "--method",
        action="append",
        dest="own_methods",
        default=[],
        metavar="FILE.py:CLASS",
        help="a method of your own besides, with a budget in brackets where it has one; may be given several times",
    )
    shared.add_argument(
        "--data", help="text to train on (default: trec for encoders, movie for decoders); glue/TASK with --hub"
    )
    shared.add_argument("--hub", action="store_true", help="allow downloads from the Hugging Face hub")
    shared.add_argument(
        "--targets",
        default="mlp",
        help="mlp (default), attention, all-linear, or NAME,NAME; mlp/3: every third block's",
    )
    shared.add_argument(
        "--train-rest", choices=("all", "none"), default="all", help="whether the rest trains too (default: all)"
    )
    shared.add_argument("--adapter-dtype", choices=("same", "float32"), default="same")
    shared.add_argument("--batch", type=several(integer), default="16")
    shared.add_argument("--seq", type=several(integer), default="128")
    shared.add_argument(
        "--dtype",
        type=several(str),
        default="float32",
        help="float32 (default), bfloat16, float16, float64, or bf16-mixed: float32 parameters under autocast",
    )
    shared.add_argument(
        "--attention",
        type=several(str),
        default="sdpa",
        metavar=_alternatives(ATTENTIONS),
        help="sdpa (default): the kernel that torch picks; behind a hyphen, one of CUDA's that it is held to",
    )
    shared.add_argument(
        "--optimizer",
        type=several(str),
        default="adamw",
        metavar=_alternatives(OPTIMIZERS),
        help="adamw (default), adamw8bit (8-bit moments, not for sparse gradients), or sgd without momentum; a method "
        "that makes its optimizers itself takes no other",
    )
    shared.add_argument(
        "--optimizer-impl",
        type=several(str),
        default=(None,),
        metavar=_alternatives(OPTIMIZER_IMPLS),
        help="default: torch's own",
    )
    shared.add_argument("--checkpointing", action="store_true", help="activation checkpointing (models)")
    shared.add_argument(
        "--accumulate",
        type=integer,
        default=1,
        metavar="N",
        help="micro-batches of --batch examples whose gradients one step takes (default: 1)",
    )
    shared.add_argument("--lr", type=float, default=1e-4)
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument(
        "--calibration-steps", type=int, default=30, help="backward passes before the HOSVD (default: 30)"
    )
    shared.add_argument(
        "--json", metavar="PATH|-", default="-", help="where records go; - is standard output (default)"
    )
    return shared


def _alternatives(words: Sequence[str]) -> str:
    return f"{{{','.join(words)}}}"


def _prediction_options() -> argparse.ArgumentParser:
    """What the commands that predict take besides: whose memory behaviour is meant."""
    prediction = argparse.ArgumentParser(add_help=False)
    prediction.add_argument(
        "--device", choices=PREDICTED_DEVICES, default="cuda", help="whose memory behaviour to predict (default: cuda)"
    )
    prediction.add_argument(
        "--gpu",
        type=several(str.lower),
        default=(None,),
        metavar="NAME|X.Y",
        help="the card, by name (t4, a100, rtx-4090, ...) or compute capability (9.0)",
    )
    prediction.add_argument(
        "--gpu-memory", type=memory, metavar="24GiB", help="say for each method whether it fits in so much"
    )
    return prediction


def _add_equal_trainable(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--equal-trainable", metavar="METHOD", help="match every other budget to this one's, e.g. lora[7]"
    )


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
    _add_equal_trainable(run)
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
        parents=[_shared_options(), _prediction_options()],
        help="what a run would measure, without its memory",
        description="Run the measured protocol on fake tensors, which have shapes and no memory: the same records "
        "without times, losses and kernels' own workspaces.\nProgress goes to stderr.\n\n"
        "--model, --layer, --block, --batch, --seq, --dtype, --attention, --optimizer, --optimizer-impl and --gpu take "
        "several\nvalues, separated by commas: every combination is predicted, the first of these options slowest, "
        "--methods\nfastest.",
        epilog=PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_equal_trainable(predict)
    predict.add_argument(
        "--max",
        choices=("batch", "seq"),
        help="for each method the largest batch or seq that fits in --gpu-memory, sought from the one that is given: a "
        f"batch of up to {MOST['batch']}, a seq of up to the model's longest, or {MOST['seq']} where it has none",
    )
    predict.set_defaults(handler=_predict)


def _add_equal_memory(commands) -> None:
    equal = commands.add_parser(
        "equal-memory",
        parents=[_shared_options(), _prediction_options()],
        help="the largest budget of each method that needs no more memory than a reference",
        description="For each method that has a budget and was not given one, the largest integer budget whose "
        "predicted metric is no more than the reference's.\nRecords have the reference first where it is among the "
        "methods; a table and progress go to stderr.",
        epilog=EQUAL_MEMORY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    equal.add_argument("--reference", required=True, metavar="METHOD", help="whose memory all get, e.g. lora[7]")
    equal.add_argument(
        "--metric",
        default="peak_step_bytes",
        metavar="FIELD",
        help="the field of bytes that is matched (default: peak_step_bytes)",
    )
    equal.set_defaults(handler=_equal_memory)


def _add_quality(commands) -> None:
    quality = commands.add_parser(
        "quality",
        help="fine-tune for real at equal memory, and compare what comes out",
        description="Run the quality study: every arm (a method at LoRA's peak memory or with as many parameters)\n"
        "on every task, with learning rates tuned alike, by the protocol in docs/quality-protocol.md.\n\n"
        "Each run is kept in DIR/runs.jsonl as it ends; the same command goes on where an earlier one was cut off.\n"
        "DIR/summary.json says what is known so far. What is not given is the core study's: hours on two cores.\n\n"
        "With --space no methods are compared: DIR/space.json says how much of held-out MLP gradients their largest\n"
        "entries hold, in SparseGrad's basis and without it, and which rows of dL/dY are zero. Minutes on one core.",
        epilog=QUALITY_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quality.add_argument("--out", type=Path, required=True, metavar="DIR")
    quality.add_argument("--jobs", type=int, default=1, help="runs at a time, each of one thread (default: 1)")
    quality.add_argument(
        "--cluster",
        choices=CLUSTERS,
        help="runs are jobs, --jobs of them at a time, through submitit (the extra [cluster]); local is this machine, "
        "to try it out",
    )
    quality.add_argument(
        "--cluster-option",
        action="append",
        type=_named,
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of submitit's, such as slurm_partition=short or mem_gb=4; may be given several times",
    )
    quality.add_argument("--minutes", type=float, metavar="N", help="begin no further run after so long")
    quality.add_argument("--time-limit", type=float, default=3600, metavar="SECONDS", help="per run (default: 3600)")
    quality.add_argument("--model", default="minilm-l6", help="an encoder with weights and a tokenizer")
    quality.add_argument(
        "--tasks",
        type=several(str),
        help="packaged data sets, or glue/TASK with --hub (default: the core study's six; with --space trec,amazon)",
    )
    quality.add_argument(
        "--arms",
        default="core",
        help="core (default), extended, or names separated by commas: of those two sets, or any METHOD (peft:NAME and "
        "FILE.py:CLASS too) at LoRA's number of parameters and METHOD@peak at its peak",
    )
    quality.add_argument(
        "--lrs",
        type=several(float),
        metavar="RATE,...",
        help="learning rates that every arm is tuned over (default: four of each arm's own; LoRA's where it has none)",
    )
    quality.add_argument(
        "--train-size", type=_size_or_all, default=300, metavar="N|all", help="training examples (default: 300)"
    )
    quality.add_argument("--epochs", type=int, default=8)
    quality.add_argument("--seeds", type=int, default=8)
    quality.add_argument("--train-rest", choices=("all", "none"), default="none")
    quality.add_argument("--hub", action="store_true", help="allow downloads from the Hugging Face hub")
    quality.add_argument("--json", metavar="PATH|-", default="-", help="where the summary goes too (default: -)")
    quality.add_argument("--space", action="store_true", help="measure the gradients' sparsity instead")
    quality.set_defaults(handler=_quality)


def _named(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not (found and name.isidentifier() and value):
        raise argparse.ArgumentTypeError(f"write NAME=VALUE, for example slurm_partition=short, got {text!r}")
    return name, value


def _size_or_all(text: str) -> int | None:
    return None if text == "all" else integer(text)


def _add_claim(commands) -> None:
    claim = commands.add_parser(
        "claim",
        help="the paper's sentence on trial, in three readings",
        description='Judge "with identical memory requirements, our method outperforms LoRA and MeProp" in three '
        "readings:\nequal parameters, equal peak, a fixed card. All memory is predicted; progress goes to stderr.\n\n"
        "Writes claim.json, the records, CSV files and one self-contained index.html.",
        epilog=CLAIM_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    claim.add_argument("--out", type=Path, required=True, metavar="DIR")
    claim.add_argument(
        "--quality", type=Path, metavar="SUMMARY", help="summary.json of your own study (default: the committed one)"
    )
    claim.add_argument(
        "--jobs",
        type=integer,
        default=min(processors(), 8),
        help="predictions at a time (default: one for each processor, at most 8)",
    )
    claim.add_argument("--quick", action="store_true", help="RoBERTa-base alone, a minute (default: all, half an hour)")
    claim.add_argument(
        "--require",
        choices=("holds",),
        help="exit with 1 unless the verdict is this; without it any verdict exits with 0",
    )
    claim.set_defaults(handler=_claim)


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="turn records into a CSV, figures and one HTML page",
        description="Write records.csv, PNG figures and one self-contained index.html; with --history also "
        "trend.html, which says which commit moved what, history.csv and moves.csv.",
        epilog=REPORT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("records", nargs="*", type=Path, metavar="RECORDS.json", help="needed without --history")
    report.add_argument("--history", type=Path, metavar="FILE", help="what compare --history has written")
    report.add_argument("--out", type=Path, required=True, metavar="DIR")
    report.set_defaults(handler=_report)


def _add_compare(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="new results against a reference: what got worse",
        description="Compare records with those of a reference, benchmark by benchmark, and fail where one got worse.\n"
        "Records are what run and predict write, or the suite's pytest-benchmark JSON. Bytes and counts are compared\n"
        "exactly, times as ratios to full fine-tuning with their intervals; reports/thresholds.json has all bounds.\n\n"
        "A table of what moved goes to stdout, or to stderr where --json, --markdown or --smaller-is-better has it.",
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.add_argument("reference", type=Path, metavar="REFERENCE.json")
    compare.add_argument("new", nargs="+", type=Path, metavar="NEW.json", help="several are taken together")
    compare.add_argument(
        "--thresholds", type=Path, metavar="FILE", help="JSON in the form of reports/thresholds.json, laid over it"
    )
    compare.add_argument(
        "--environment",
        choices=ENVIRONMENTS,
        default=ENVIRONMENTS[0],
        help="where torch, transformers or, for times, the machine changed: refuse (default), and do not judge the "
        "figures that this matters to; warn, and judge them; or ignore it",
    )
    compare.add_argument(
        "--fail-on",
        choices=("regression", "change"),
        default="regression",
        help="change: improvements and new benchmarks fail too, since the reference no longer says what is "
        "(default: regression)",
    )
    compare.add_argument("--json", metavar="PATH|-", help="the comparison as data")
    compare.add_argument("--markdown", metavar="PATH|-", help="the table in Markdown, for a job summary")
    compare.add_argument(
        "--smaller-is-better",
        metavar="PATH|-",
        help="the new figures as github-action-benchmark's customSmallerIsBetter reads them",
    )
    compare.add_argument(
        "--update",
        action="store_true",
        help="make the new results the reference, and exit with 0; not where benchmarks, runs or figures are missing, "
        "or something is not comparable",
    )
    compare.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="append the new results as a line to FILE, which report --history draws; with --update only where they "
        "become the reference",
    )
    compare.add_argument(
        "--commit",
        metavar="NAME",
        help="the commit that --history has them under, such as that of your own method (default: the suite's, from "
        "the new results)",
    )
    compare.set_defaults(handler=_compare)


def _run(arguments: argparse.Namespace) -> int:
    # Imported here so that --help and report answer without torch.
    from benchmarks.harness.pairing import Reference
    from benchmarks.harness.turns import measure_all

    specs = run_specs(arguments)
    reference = None if arguments.unpaired else Reference(arguments.time_limit)

    def obtain(done: Done) -> None:
        measure_all(specs, reference, done, arguments.time_limit, arguments.timing_span)

    turns = "timed in turns" if specs[0].rounds and not arguments.unpaired else "one after the other"
    check_destination(arguments.json)
    try:
        collect(specs, turns, obtain, arguments.json)
    finally:
        if reference is not None:
            reference.close()
    return OK


def _predict(arguments: argparse.Namespace) -> int:
    from benchmarks.predictions import predict_command

    predict_command(arguments)
    return OK


def _equal_memory(arguments: argparse.Namespace) -> int:
    from benchmarks.predictions import equal_memory_command

    equal_memory_command(arguments)
    return OK


def _claim(arguments: argparse.Namespace) -> int:
    from benchmarks.claim.command import claim

    return claim(arguments.out, arguments.quick, arguments.require, arguments.quality, arguments.jobs)


def run_specs(arguments: argparse.Namespace) -> list:
    """The runs that a command line asks for, checked as far as no model is needed. Raises for bad input."""
    import torch

    from benchmarks.harness.errors import InputError
    from benchmarks.harness.plan import plan
    from benchmarks.harness.turns import LONGEST_SPAN_S
    from benchmarks.harness.worker import MOST_THREADS

    if not arguments.time_limit > 0:
        raise InputError(f"--time-limit must be positive, got {arguments.time_limit}")
    if not 0 <= arguments.timing_span <= LONGEST_SPAN_S:
        raise InputError(f"--timing-span must be from 0 to {LONGEST_SPAN_S} seconds, got {arguments.timing_span}")
    if arguments.rounds < 0 or (arguments.threads is not None and not 1 <= arguments.threads <= MOST_THREADS):
        raise InputError(f"--rounds must not be negative, and --threads must be from 1 to {MOST_THREADS}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda needs an NVIDIA GPU that torch can see; use --device cpu")
    if arguments.snapshot is not None:
        _check_snapshot(arguments.snapshot, device)
    # Fixed here, so that every worker has the same.
    threads = arguments.threads or torch.get_num_threads()
    common = fields(single(arguments), device=device, threads=threads)
    specs = plan(arguments.methods, arguments.equal_trainable, **common)
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
    label = re.sub(r"[^\w.]+", "-", spec.method_label).strip("-")
    return str(path.with_name(f"{path.stem}-{label}{path.suffix}"))


def _quality(arguments: argparse.Namespace) -> int:
    if arguments.space:
        from benchmarks.quality.space import space_command

        _refuse_of_study(arguments)
        space_command(arguments)
    else:
        from benchmarks.quality.command import quality_command

        quality_command(arguments)
    return OK


def _refuse_of_study(arguments: argparse.Namespace) -> None:
    """Raise `InputError` for an option of the study beside `--space`: it would change nothing."""
    from benchmarks.harness.errors import InputError

    default = parser().parse_args(["quality", "--out", "."])
    for name in STUDYS_OWN:
        if getattr(arguments, name) != getattr(default, name):
            raise InputError(f"--{name.replace('_', '-')} is of the study, which --space does not run: leave it out")


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks.harness.errors import InputError
    from reports.history import History, Trend
    from reports.page import PAGE, write_report
    from reports.thresholds import read_thresholds
    from reports.trend import write_trend

    if not arguments.records and arguments.history is None:
        raise InputError("nothing to report: give RECORDS.json, --history FILE, or both")
    records = [record for path in arguments.records for record in read(path)]
    lines = None if arguments.history is None else History.read(arguments.history).lines
    with held(arguments.out / PAGE, "--out"):
        if lines is not None:
            say(f"trend: {write_trend(Trend.of(lines, read_thresholds()), arguments.out)}")
        page = write_report(records, arguments.out, trend=lines is not None)
    say(f"{len(records)} records; page: {page}")
    return OK


def _compare(arguments: argparse.Namespace) -> int:
    from benchmarks.compare_command import compare_command

    return compare_command(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; bad input is one line on stderr and exit code 2."""
    arguments = parser().parse_args(argv)
    if getattr(arguments, "own_methods", None):
        arguments.methods = ",".join((arguments.methods, *arguments.own_methods))
    # An exception, so that the worker under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return arguments.handler(arguments)
    except ValueError as error:
        # The packages' own errors for input that a person can put right; others keep their traceback.
        if not _is_input_error(error):
            raise
        say(f"sparsegrad-bench: {_sentence(error)}")
        return USAGE
    except KeyboardInterrupt:
        say("\nsparsegrad-bench: interrupted; the records that were complete are kept")
        return 130
    except OSError as error:
        say(f"sparsegrad-bench: {_sentence(error)}")
        return USAGE


def _sentence(error: Exception) -> str:
    """An error in one line that can be read, whatever of the input it quotes."""
    line = " ".join(str(error).splitlines())
    return line if len(line) <= LONGEST_SENTENCE else f"{line[:LONGEST_SENTENCE]}..."


def _is_input_error(error: ValueError) -> bool:
    if isinstance(error, RecordError | ThresholdsError):
        return True
    from baselines.method import MethodError
    from benchmarks.harness.errors import InputError
    from sparsegrad import SparseGradError

    return isinstance(error, InputError | MethodError | SparseGradError)


if __name__ == "__main__":
    sys.exit(main())
