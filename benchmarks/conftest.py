"""The suite's command line under pytest, and its place in pytest-benchmark's hooks."""

from contextlib import ExitStack

import pytest
import torch

from benchmarks import matrix
from benchmarks.harness.errors import InputError
from benchmarks.harness.turns import LONGEST_SPAN_S, SPAN_S
from benchmarks.harness.worker import DEFAULT_TIME_LIMIT_S, MOST_THREADS
from benchmarks.journal import Journal
from benchmarks.lock import held
from benchmarks.suite import DEFECTS, Case, Suite, with_failures
from reports.record import unwritable

SUITE = pytest.StashKey[Suite]()


def pytest_addoption(parser):
    """What the suite can be told."""
    group = parser.getgroup("suite", "the benchmark suite")
    group.addoption(
        "--resume", action="store_true", help="go on from what an earlier suite left at --benchmark-json's path"
    )
    group.addoption(
        "--rounds",
        type=int,
        default=None,
        help="steps timed, each beside one of full fine-tuning (default: 15, more where steps are short)",
    )
    group.addoption(
        "--timing-span",
        type=float,
        default=SPAN_S,
        metavar="SECONDS",
        help="spread the rounds over this long at least: they see more of the machine than a moment (default: 45)",
    )
    group.addoption("--threads", type=int, default=None, help="threads of every worker (default: torch's own number)")
    group.addoption("--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is a GPU")
    group.addoption(
        "--time-limit", type=float, default=DEFAULT_TIME_LIMIT_S, metavar="SECONDS", help="per run (default: 1800)"
    )


def pytest_sessionstart(session):
    """Refuse now, not after hours, what would end without results."""
    config = session.config
    plugin = config._benchmarksession
    out = config.getoption("benchmark_json")
    if plugin.xdist_warning:
        raise pytest.UsageError("the suite measures time and memory, one run at a time: leave xdist (-n, --dist) out")
    if out and plugin.disabled:
        raise pytest.UsageError(f"--benchmark-disable leaves nothing to write to {out}: leave one of the two out")
    if out and (reason := unwritable(out)):
        raise pytest.UsageError(f"--benchmark-json={out} cannot be written: {reason}")
    if config.getoption("resume") and not out:
        raise pytest.UsageError("--resume needs --benchmark-json=PATH, beside which the earlier suite's runs are")
    given = [config.getoption(name) for name in ("rounds", "threads", "time_limit")]
    if any(value is not None and not value > 0 for value in given) or (given[1] or 1) > MOST_THREADS:
        raise pytest.UsageError(
            f"--rounds, --threads and --time-limit must be positive, and --threads at most {MOST_THREADS}"
        )
    if not 0 <= config.getoption("timing_span") <= LONGEST_SPAN_S:
        raise pytest.UsageError(f"--timing-span must be from 0 to {LONGEST_SPAN_S} seconds")
    device = config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda needs an NVIDIA GPU that torch can see; use --device cpu")
    suite = config.stash[SUITE] = Suite(
        # Without pytest-benchmark's statistics a benchmark runs once.
        rounds=1 if plugin.disabled else config.getoption("rounds"),
        span_s=config.getoption("timing_span"),
        threads=config.getoption("threads") or torch.get_num_threads(),
        device=device,
        time_limit_s=config.getoption("time_limit"),
        journal=Journal(out) if out else None,
    )
    try:
        if out:
            lock = ExitStack()
            lock.enter_context(held(suite.journal.path, "--benchmark-json"))
            config.add_cleanup(lock.close)
        if config.getoption("resume"):
            suite.journal.resume()
    except InputError as error:
        raise pytest.UsageError(str(error)) from error
    if out:
        # The plugin empties the file before it writes, so that a full disk would leave nothing.
        plugin.save_json = suite.save


def pytest_report_header(config):
    """What every run of this session has in common."""
    suite = config.stash.get(SUITE, None)
    if suite is None:
        return None
    rounds = f"{suite.rounds or f'{matrix.ROUNDS} rounds or more'} over {suite.span_s:g} s or more"
    return f"suite: {suite.device}, {suite.threads} threads, {rounds}, budgets of {matrix.EQUAL_TRAINABLE}"


def pytest_collection_modifyitems(config, items):
    """Leave `large` out unless -m asks for it; give pytest-benchmark the workers' clock."""
    if "large" not in config.getoption("markexpr"):
        large = [item for item in items if item.get_closest_marker("large")]
        items[:] = [item for item in items if item not in large]
        config.hook.pytest_deselected(items=large)
    suite = config.stash[SUITE]
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=suite.clock.now))


def pytest_collection_finish(session):
    """Note what was selected: methods on the same case are timed in turns."""
    suite = session.config.stash[SUITE]
    for item in session.items:
        if "measured" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec"):
            conditions = {**item.callspec.params}
            if "method" in conditions:
                suite.selected.append(Case(item.nodeid, conditions.pop("method"), conditions))


@pytest.fixture(scope="session")
def suite(pytestconfig):
    """This session's suite; its reference worker ends with it."""
    with pytestconfig.stash[SUITE].reference:
        yield pytestconfig.stash[SUITE]


@pytest.fixture
def measured(benchmark, suite):
    """Measure a method on a case; a status other than ok becomes pytest's outcome."""

    def measure(method, **case):
        record = suite.measure(benchmark, method, **case)
        if record.status in DEFECTS:
            pytest.fail(f"{record.status}: {record.reason}", pytrace=False)
        if record.status != "ok":
            pytest.xfail(f"{record.status}: {record.reason}")

    return measure


def pytest_benchmark_generate_machine_info(config):
    """The default has the host's name and the clock of the moment, so that no two machines look the same."""
    return config.stash[SUITE].machine_info()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """The default leaves out every benchmark whose run did not end ok."""
    output_json["benchmarks"] = with_failures(benchmarks, output_json["benchmarks"])


def pytest_sessionfinish(session):
    """Results that could not be written are no success."""
    suite = session.config.stash.get(SUITE, None)
    if suite is not None and suite.problem:
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_terminal_summary(terminalreporter, config):
    """The records in short, and what went wrong with their file."""
    suite = config.stash.get(SUITE, None)
    if suite is None:
        return
    if suite.records:
        terminalreporter.section("records")
    for line in suite.summary():
        terminalreporter.write_line(line)
    if left := suite.left_in_journal():
        terminalreporter.write_line(left)
    if suite.replayed:
        terminalreporter.write_line(f"{suite.replayed} of {len(suite.records)} runs were taken from an earlier suite")
    if suite.problem:
        terminalreporter.write_line(suite.problem, red=True)
