"""A thousand inputs with something wrong in each: one clear sentence or the usage, exit code 2, and nothing begun."""

import contextlib
import io
import json
import random
import re
import typing

import pytest

from baselines.registry import get, methods
from benchmarks import cli, predictions
from benchmarks.claim import command as claim
from benchmarks.harness import turns
from benchmarks.quality import command as quality
from benchmarks.quality.ledger import Heading, Ledger
from benchmarks.quality.study import Study
from benchmarks.quality.training import FINAL, Outcome, Trial
from reports import page
from reports.record import Record, dumps

NUMBERS = {"command lines": 550, "configs": 110, "records": 220, "ledgers": 80, "summaries": 40}


class Begun(Exception):
    """The command took its input for good."""


@pytest.fixture(scope="module", autouse=True)
def nothing_begins():
    """What commands do once their input is checked is out of reach."""

    def begin(*_, **__):
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(turns, "measure_all", begin)
        patch.setattr(predictions, "predict", begin)
        patch.setattr(quality, "_check_workloads", lambda study: None)
        for module, name in ((quality, "records"), (quality, "run_all"), (claim, "gather"), (page, "write_report")):
            patch.setattr(module, name, begin)
        yield


def fault_in(argv):
    """What is wrong with how a command refuses its input; None where nothing is."""
    err, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = cli.main(argv)
        clear = re.fullmatch(r"sparsegrad-bench: \S.{10,1510}\n", err.getvalue())
    except SystemExit as usage:
        code = usage.code
        clear = re.search(r"^usage: sparsegrad-bench.*\nsparsegrad-bench.*: error: .+\n$", err.getvalue(), re.DOTALL)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if code != 2 or not clear or out.getvalue() or "Traceback" in err.getvalue():
        return f"exit code {code}, said {err.getvalue()!r}, wrote {out.getvalue()!r}"
    return None


# --- command lines

JUNK = (
    "☃",
    "-☃",
    "ſix",
    "\udcff",
    "a b",
    "'; rm",
    "\u202etxt",
    "é" * 300,
    "<b>",
    "$HOME",
    "%s",
    "{}",
    "\\",
    "/\\",
    "1٣٣x",
)
LONG = "9" * 5000


def number(rng, least=1, whole=True):
    """No number, or one that is less than `least`."""
    wrong = [str(least - rng.randrange(1, 10**6)), "", " ", "nan", "-inf", "1e", "0x1", "1,x", *JUNK]
    return rng.choice(wrong + ["1.5", "1e3", LONG] * whole)


def shape(rng):
    good = f"{rng.randrange(1, 50)}x{rng.randrange(1, 50)}"
    wrong = [
        f"{good},{good}",
        f"0x{good}",
        f"{good}x1",
        f"-{good}",
        good.replace("x", "X"),
        f"{LONG}x2",
        "3x",
        "x",
        "0x0",
    ]
    return rng.choice([*wrong, f"{10**17}x{10**17}", *JUNK])


def method(rng):
    """A method that there is not, or one with a budget that it cannot take on layers of 12 x 20."""
    name = rng.choice(list(methods()))
    if rng.random() < 0.3:
        return rng.choice(
            [f"{name}s", name.upper(), f"{name}[", f"{name}]", f"{name}[]", f"{name}[1][1]", f"{name},", *JUNK]
        )
    budgets = ["0", "-3", "nan", "inf", "1e400", "2.5", str(10**30), LONG, "x", "1x", "0x0", f"{LONG}x1", "☃", "1e9"]
    if get(name).knob is None:
        budgets += ["1", "0.5", "3x3"]
    return f"{name}[{rng.choice(budgets)}]"


def gpu(rng):
    return rng.choice(["h1000", "0.0", "-9.0", "9", f"9.{LONG}", "", "9.0,9.0", *JUNK])


def gpu_memory(rng):
    return rng.choice(["0GiB", "-1GiB", "24", "GiB", "24GB", "1e9GiB", f"{LONG}GiB", "nanGiB", "", *JUNK])


SHARED = {
    "--methods": method,
    "--targets": lambda rng: rng.choice(["attention", "mlp/0", "mlp/9999999", "", ",", "(((", "[", "down", *JUNK]),
    "--batch": number,
    "--seq": number,
    "--dtype": lambda rng: rng.choice(["int8", "Float32", "", "float32,float32", *JUNK]),
    "--attention": lambda rng: rng.choice(["flash", "", "sdpa,sdpa", *JUNK]),
    "--optimizer-impl": lambda rng: rng.choice(["fast", "", "fused,fused", *JUNK]),
    "--train-rest": lambda rng: rng.choice(["some", "", *JUNK]),
    "--adapter-dtype": lambda rng: rng.choice(["float16", "", *JUNK]),
    "--lr": lambda rng: rng.choice(["inf", "1e400", "0", number(rng, 0, whole=False)]),
    "--seed": lambda rng: rng.choice([str(2**32), number(rng, 0)]),
    "--calibration-steps": lambda rng: rng.choice([str(10**6), number(rng)]),
    "--data": lambda rng: rng.choice(["trec", "glue/x", *JUNK]),  # goes with --model
    "--json": lambda rng: rng.choice(["", "/", "/dev/null", "/proc/x/y", "x" * 300, "/proc/☃"]),
    "--unheard-of": lambda rng: rng.choice(JUNK),
}
PREDICTED = {"--device": lambda rng: rng.choice(["tpu", "", *JUNK]), "--gpu": gpu, "--gpu-memory": gpu_memory}
OPTIONS = {
    "run": {
        **SHARED,
        "--device": lambda rng: rng.choice(["tpu", "", *JUNK]),
        "--equal-trainable": lambda rng: rng.choice(["full", "all", "lora,lora", method(rng)]),
        "--threads": lambda rng: rng.choice([str(10**9), number(rng)]),
        "--rounds": lambda rng: number(rng, 0),
        "--timing-span": lambda rng: rng.choice(["inf", "1e300", number(rng, 0, whole=False)]),
        "--time-limit": lambda rng: rng.choice(["0", number(rng, 0, whole=False)]),
        "--snapshot": lambda rng: rng.choice(["steps.pickle", "", "/"]),  # goes with CUDA
    },
    "predict": {**SHARED, **PREDICTED, "--max": lambda rng: rng.choice(["batch", "seq", "rank", *JUNK])},
    "equal-memory": {**SHARED, **PREDICTED, "--metric": lambda rng: rng.choice(["bytes", "", "step_time_s", *JUNK])},
}
CONTRADICTIONS = [
    ["run", "--layer", "12x20", "--model", "minilm-l6"],
    ["predict", "--layer", "12x20", "--block", "12x20"],
    ["predict", "--layer", "12x20", "--checkpointing"],
    ["predict", "--layer", "12x20", "--device", "cpu", "--gpu", "t4"],
    ["predict", "--layer", "12x20", "--device", "cpu", "--gpu-memory", "24GiB"],
    ["run", "--layer", "12x20", "--device", "cpu", "--attention", "sdpa-flash"],
    ["run", "--layer", "12x20", "--batch", "1,2"],
    ["run", "--layer", "12x20,20x12"],
    ["predict", "--layer", "12x20", "--attention", "eager,sdpa"],
    ["predict", "--layer", "12x20", "--gpu-memory", "24GiB", "--max", "batch", "--batch", "1,2"],
    ["equal-memory", "--layer", "12x20", "--reference", "lora[1],lora[2]"],
    ["equal-memory", "--layer", "12x20"],
    ["predict", "--layer", "12x20", "--rounds", "3"],
    ["quality", "--tasks", "trec"],
    ["report"],
    ["report", "--out", "x"],
    ["claim", "--quick"],
    [],
    [""],
    ["runs"],
]
STUDY = {
    "--tasks": lambda rng: rng.choice(["trec,trec", "movie,movie-sentiment", ","]),
    "--arms": lambda rng: rng.choice(["nobody", "", "lora,lora", "core,lora", *JUNK]),
    "--train-size": lambda rng: rng.choice(["some", *JUNK]),
    "--epochs": number,
    "--seeds": lambda rng: rng.choice(["1001", number(rng)]),
    "--jobs": lambda rng: rng.choice([str(10**9), number(rng)]),
    "--minutes": lambda rng: rng.choice(["0", number(rng, 0, whole=False)]),
    "--time-limit": lambda rng: rng.choice(["0", number(rng, 0, whole=False)]),
    "--train-rest": lambda rng: rng.choice(["some", *JUNK]),
    "--json": SHARED["--json"],
}


def command_line(rng, folder):
    kind = rng.random()
    if kind < 0.1:
        return rng.choice(CONTRADICTIONS)
    if kind < 0.25:
        option = rng.choice(list(STUDY))
        return ["quality", "--out", str(folder / "study"), option, STUDY[option](rng)]
    command = rng.choice(list(OPTIONS))
    argv = [command, *(["--reference", "lora[1]"] if command == "equal-memory" else [])]
    if kind < 0.4:
        workload = rng.choice(["--layer", "--block", "--model"])
        value = rng.choice([*JUNK, "", "/", "~nobody/x", "x.json", "x" * 5000]) if workload == "--model" else shape(rng)
        # Behind an equals sign it is a value whatever it begins with.
        return [*argv, f"{workload}={value}", "--methods", "full"]
    option = rng.choice(list(OPTIONS[command]))
    join = rng.random() < 0.5
    value = OPTIONS[command][option](rng)
    argv += [rng.choice(["--layer", "--block"]), "12x20"]
    return [*argv, f"{option}={value}"] if join else [*argv, option, value]


# --- files

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = {
    "bert": {"vocab_size": 99, **SIZES},
    "roberta": {"vocab_size": 99, **SIZES, "pad_token_id": 1},
    "llama": {"vocab_size": 99, **SIZES, "num_key_value_heads": 1},
    "gpt2": {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2},
}
NO_SIZE = (None, "16", -1, 0, 1.5, [], {}, True, 10**30, [16], "☃", -(10**30))


def corrupted(rng, text):
    """A file's bytes that are no JSON, or not what they were: cut short, nested, with a key twice, of other bytes."""
    content = text.encode()
    match rng.randrange(6):
        case 0:
            return content.rstrip()[: rng.randrange(len(content.rstrip()))]
        case 1:
            return b"[" * rng.randrange(1200, 10**5)
        case 2:
            return rng.choice([b"{}", b"[[]]", b"3", b"null", b'"text"', b"true", b"[1]", b"NaN", b"1" * 5000])
        case 3:
            return text.replace("{", '{"twice": 1, "twice": 2, ', 1).encode()
        case 4:
            return rng.randbytes(rng.randrange(1, 200)) + b"\xff"
        case _:
            return rng.choice([b"\xef\xbb\xbf" + content, text.encode("utf-16"), b"\0" * 64])


def config(rng, folder):
    path = folder / "config.json"
    family = rng.choice(list(CONFIGS))
    good = {"model_type": family, **CONFIGS[family]}
    kind = rng.random()
    if kind < 0.25:
        path.write_bytes(corrupted(rng, json.dumps(good)))
    elif kind < 0.45:
        models = [None, 3, [], {}, "", "t5", "clip", "berts", True, ["bert"], {"bert": 1}, "☃", "b" * 5000]
        path.write_text(json.dumps({**good, "model_type": rng.choice(models)}))
    elif kind < 0.6:
        act = "activation_function" if family == "gpt2" else "hidden_act"
        others = [(act, "☃"), ("dtype", "float7"), ("is_encoder_decoder", True)]
        path.write_text(json.dumps(good | dict([rng.choice(others)])))
    else:
        name = rng.choice([name for name in CONFIGS[family] if name != "pad_token_id"])
        path.write_text(json.dumps({**good, name: rng.choice(NO_SIZE)}))
    return ["predict", "--model", str(path), "--methods", "full", "--batch", "1", "--seq", "4"]


RECORDS = [Record(method="lora", budget=7, model="m", peak_step_bytes=5, lr=0.1), Record(method="full", model="n")]
# For each kind of value one that is of no other kind.
STRANGE = (None, "text", 1.5, True, [], {}, [1], -1, float("nan"), float("inf"))


def misfitting(rng):
    """A field of a record and a value that it cannot have."""
    name, hint = rng.choice([(n, h) for n, h in typing.get_type_hints(Record).items() if n != "schema_version"])
    allowed = typing.get_args(hint) or (hint,)
    if float in allowed:
        allowed += (int,)
    values = [v for v in STRANGE if type(v) not in allowed or v != v or v in (float("inf"), float("-inf"))]
    if name.endswith(("_params", "_s")) and int in allowed:
        values.append(-1)
    return name, rng.choice(values)


def wrong_record(rng):
    good = json.loads(dumps(RECORDS))
    spoiled = rng.choice(good)
    match rng.randrange(6):
        case 0:
            spoiled.pop(rng.choice(["method", "model", "schema_version"]))
        case 1:
            spoiled["schema_version"] = rng.choice([0, 2, None, "1", [1], {}, 10**4000, True, 1.0])
        case 2:
            spoiled[rng.choice(["☃", "", "peak", "x" * 10**5])] = 1
        case 3:
            spoiled[rng.choice(["status", "source", "train_rest", "device_semantics", "pairing", "timeline"])] = "☃"
        case 4:
            return json.dumps(good).replace(
                '"lr": 0.1', f'"lr": {rng.choice(["1e400", "-1e999", LONG, "1" + "0" * 400])}'
            )
        case _:
            name, value = misfitting(rng)
            spoiled[name] = value
    return json.dumps(good)


def records(rng, folder):
    path = folder / "records.json"
    if rng.random() < 0.3:
        path.write_bytes(corrupted(rng, dumps(RECORDS)))
        return ["report", str(path), "--out", str(folder / "report")]
    text = wrong_record(rng)
    # As the list that `run` writes, or within pytest-benchmark's JSON.
    path.write_text(text if rng.random() < 0.6 else f'{{"benchmarks": [{{"extra_info": {text[1:-1]}}}]}}')
    return ["report", str(path), "--out", str(folder / "report")]


TRIAL = Trial(FINAL, "trec", 300, "head", "head", None, 1e-3, 0, 3, "minilm-l6", 16, 64, "none")
DONE = Outcome(TRIAL, "ok", score=6.5, predictions=(0.0, 1.0), losses=(2.0, 1.0), curve=((3, 1.5),), time_s=2.5)


def ledger(rng, folder):
    (folder / "study").mkdir(exist_ok=True)
    path = folder / "study" / quality.RUNS
    path.unlink(missing_ok=True)
    study = Study(arms=("head",), tasks=("trec",))
    it = Ledger(path)
    it.start(Heading(study, {"head": Record(method="head", model="m")}))
    it.add(DONE)
    lines = path.read_text().splitlines()
    place = rng.randrange(2)
    raw = json.loads(lines[place])
    if rng.random() < 0.4:
        bad = corrupted(rng, lines[place]).replace(b"\n", b" ") or b"x"
    else:
        if place == 0:
            spoiled = rng.choice([raw, raw["study"], raw["arms"], raw["arms"]["head"]])
        else:
            spoiled = rng.choice([raw, raw["trial"]])
        name = rng.choice([name for name in spoiled if spoiled[name] is not None])
        if rng.random() < 0.3:
            spoiled[rng.choice(["☃", "x" * 10**5])] = spoiled.pop(name)
        else:
            spoiled[name] = {"☃": [[-1]]}
        bad = json.dumps(raw).encode()
    lines = [line.encode() for line in lines]
    lines[place] = bad
    path.write_bytes(b"\n".join(lines) + b"\n")
    return ["quality", "--out", str(folder / "study"), "--arms", "head", "--tasks", "trec"]


SUMMARY = {
    "protocol": 2,
    "study": {name: 1 for name in ("epochs", "batch", "longest", "seeds")}
    | {"model": "m", "train_size": None, "train_rest": "none"},
    "runs": {"settled": 1, "planned": 1, "failed": [], "hours": 0.5},
    "primary": {"first": "a", "second": "b", "verdict": "holds", "difference": 1.0, "low": 0.5, "high": 1.5},
    "secondary": [{"first": "sparsegrad", "second": "lora", "verdict": "undecided", "reason": "not yet"}],
    "arms": [
        {
            "arm": "lora", "method": "lora", "label": "lora[7]", "matched": "parameters", "trainable_params": 3,
            "peak_step_bytes": 5, "mean": None,
            "tasks": [
                {"task": "t", "metric": "accuracy", "score": 1.0, "scores": {"0": 1.0}, "lr": 0.1, "lr_at_edge": False,
                 "losses": [1.0], "steps_to_target": [3]}
            ],
        }
    ],
}  # fmt: skip


def summary(rng, folder):
    path = folder / "summary.json"
    good = json.loads(json.dumps(SUMMARY))
    if rng.random() < 0.4:
        path.write_bytes(corrupted(rng, json.dumps(good)) or b"x")
        return ["claim", "--out", str(folder / "claim"), "--quality", str(path)]
    comparison, arm = good["primary"], good["arms"][0]
    spoiled, name = rng.choice(
        [(good, name) for name in good]
        + [(comparison, name) for name in ("verdict", "first", "low", "difference")]
        + [(arm, name) for name in arm]
        + [(arm["tasks"][0], name) for name in arm["tasks"][0]]
        + [(good["runs"], name) for name in good["runs"]]
        + [(good["study"], name) for name in good["study"]]
    )
    value = spoiled.pop(name)
    if name == "difference" or (rng.random() < 0.5 and not isinstance(value, str | bool | None)):
        spoiled[name] = 10**400 if isinstance(value, int | float) else 3
    path.write_text(json.dumps(good))
    return ["claim", "--out", str(folder / "claim"), "--quality", str(path)]


KINDS = {"command lines": command_line, "configs": config, "records": records, "ledgers": ledger, "summaries": summary}


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_refused_in_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults = []
    for place in range(NUMBERS[kind]):
        argv = KINDS[kind](random.Random(f"{kind} {place}"), tmp_path)
        if fault := fault_in(argv):
            faults.append((place, [word[:80] for word in argv], fault[:300]))
    assert not faults


def test_there_are_a_thousand():
    assert sum(NUMBERS.values()) == 1000
