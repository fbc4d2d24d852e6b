"""The registry finds what is in the package, and reads what people write about methods."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import baselines
from baselines import registry
from baselines.lora import LoRA
from baselines.meprop import MePropExample
from baselines.method import MethodError

ROOT = Path(baselines.__file__).parents[1]
CORE = [
    "full",
    "head",
    "lora",
    "meprop-example",
    "meprop-unified",
    "meprop-weight",
    "random-mask",
    "sparsegrad",
    "sparsegrad-folded",
    "sparsegrad-compact",
    "sparsegrad-fixed",
    "sparsegrad-core",
    "sparsegrad-directions",
]

A_METHOD = """
from baselines.lora import LoRA
from baselines.method import EntryMethod, LayerBytes, Method


class _HalfDone(Method):
    name = "half-done"

    def prepare(self, model, batches):
        pass


class Finished(_HalfDone):
    name = "{name}"

    def formula(self, shape, tokens, dtype):
        return LayerBytes(parameter=0, gradient=0, optimizer=0)
"""


@pytest.fixture
def add_to_package(tmp_path, monkeypatch):
    """Puts a file beside the package's own, as far as imports can tell; taken out again afterwards."""
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])
    added = []

    def add(module: str, source: str) -> None:
        (tmp_path / f"{module}.py").write_text(source)
        added.append(module)
        importlib.invalidate_caches()
        registry.methods.cache_clear()

    yield add
    for module in added:
        sys.modules.pop(f"baselines.{module}", None)
        if hasattr(baselines, module):
            delattr(baselines, module)
    registry.methods.cache_clear()


# --- what it finds


def test_core_methods_come_first_and_in_order():
    names = list(registry.methods())
    assert names[: len(CORE)] == CORE
    assert names[len(CORE) :] == sorted(names[len(CORE) :])


def test_names_lead_to_the_classes_that_bear_them():
    assert registry.get("lora") is LoRA
    assert registry.get("meprop-example") is MePropExample
    assert all(cls.name == name for name, cls in registry.methods().items())


def test_a_new_file_is_found(add_to_package):
    add_to_package("added_later", A_METHOD.format(name="added"))
    assert registry.get("added").__module__ == "baselines.added_later"
    assert list(registry.methods())[: len(CORE)] == CORE
    assert registry.parse("added") == [("added", None)]
    assert ("added", None) in registry.parse("all")


def test_a_class_is_listed_under_its_own_module_alone(add_to_package):
    # The added file imports LoRA; were imported classes counted, that would be a second one of its name.
    add_to_package("added_later", A_METHOD.format(name="added"))
    assert registry.get("lora") is LoRA


def test_abstract_helpers_are_not_listed(add_to_package):
    add_to_package("added_later", A_METHOD.format(name="added"))
    assert "half-done" not in registry.methods()
    assert not any(cls.__abstractmethods__ for cls in registry.methods().values())


def test_two_classes_of_one_name_are_an_error(add_to_package):
    add_to_package("added_later", A_METHOD.format(name="lora"))
    with pytest.raises(MethodError, match=r"'lora'.*(LoRA and Finished|Finished and LoRA)"):
        registry.methods()


def test_an_added_method_is_gone_again():
    assert "added" not in registry.methods()


# --- what it reads


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", [("full", None)]),
        (
            "full,lora[7],sparsegrad[0.01],sparsegrad[1e-2]",
            [("full", None), ("lora", 7), ("sparsegrad", 0.01), ("sparsegrad", 0.01)],
        ),
        (" lora [ 7 ] ,\tmeprop-example[3]", [("lora", 7), ("meprop-example", 3)]),
        ("sparsegrad-core[82x326]", [("sparsegrad-core", "82x326")]),
        ("lora[-3]", [("lora", -3)]),
        ("sparsegrad[1]", [("sparsegrad", 1)]),
        ("sparsegrad[1.]", [("sparsegrad", 1.0)]),
        ("sparsegrad[1E0]", [("sparsegrad", 1.0)]),
    ],
)
def test_parse(text, expected):
    result = registry.parse(text)
    assert result == expected
    # 1 is a count and 1.0 a density, although they are equal.
    assert [type(budget) for _, budget in result] == [type(budget) for _, budget in expected]


def test_all_is_every_method_without_a_budget():
    every = [(name, None) for name in registry.methods()]
    assert registry.parse(" all ") == every
    assert registry.parse("lora[3], all") == [("lora", 3), *every]


@pytest.mark.parametrize("text", ["nonesuch", "lora,nonesuch[3]", "LoRA", "all[3]"])
def test_an_unknown_method_lists_the_known(text):
    with pytest.raises(MethodError, match="unknown method") as error:
        registry.parse(text)
    assert all(name in str(error.value) for name in CORE)


def test_get_of_an_unknown_method_lists_the_known():
    with pytest.raises(MethodError, match=r"'nonesuch'.*lora, meprop-example"):
        registry.get("nonesuch")


@pytest.mark.parametrize(
    "text", ["", "lora,", ",lora", "lora[", "lora[]", "lora]7[", "lora[7", "lora[7]8", "lora[7,8]"]
)
def test_a_malformed_method_is_refused(text):
    with pytest.raises(MethodError, match="cannot read the method"):
        registry.parse(text)


@pytest.mark.parametrize("text", ["lora[seven]", "lora[7x]", "lora[x7]", "lora[1x2x3]", "lora[1/2]", "lora[0x-1]"])
def test_a_malformed_budget_is_refused(text):
    with pytest.raises(MethodError, match=r"cannot read the budget.*count.*density.*core"):
        registry.parse(text)


@pytest.mark.parametrize("budget", ["9" * 41, "9" * 5000, "3x" + "9" * 5000, "-" + "9" * 5000])
def test_a_budget_longer_than_any_is_refused_and_not_repeated(budget):
    with pytest.raises(MethodError, match=r"^the budget .{40}\.\.\. has more digits than a layer can have entries$"):
        registry.parse(f"lora[{budget}]")


# --- what it depends on


def test_the_package_imports_neither_harness_nor_reports_nor_transformers():
    script = (
        "import importlib, pkgutil, sys, baselines\n"
        "for info in pkgutil.iter_modules(baselines.__path__):\n"
        "    importlib.import_module(f'baselines.{info.name}')\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    loaded = set(ast.literal_eval(run.stdout))
    assert {"baselines", "sparsegrad", "torch"} <= loaded
    assert not loaded & {"benchmarks", "reports", "transformers", "peft"}


@pytest.mark.parametrize("path", sorted((ROOT / "baselines").glob("*.py")), ids=lambda path: path.stem)
def test_no_import_is_hidden_in_a_function(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & {"benchmarks", "reports"}
