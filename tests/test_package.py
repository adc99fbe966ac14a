"""What importing the package gives, and what it costs."""

from __future__ import annotations

import inspect
import json
import pkgutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import vllm_unified
from vllm_unified import errors, public, results
from vllm_unified.errors import VllmError

ROOT = Path(__file__).parent.parent
HEAVY = (
    "typer rich click torch ray psutil pynvml openai pydantic docker prometheus_client "
    "jsonschema_rs transformers vllm numpy pyarrow sqlite3"
).split()


def test_every_exported_name_is_there() -> None:
    for name in vllm_unified.__all__:
        assert hasattr(vllm_unified, name), name


def test_names_are_sorted_and_stand_once() -> None:
    names = vllm_unified.__all__

    assert sorted(set(names), key=lambda name: (name == "__version__", name)) == names


def test_nothing_public_is_missing_or_left_over() -> None:
    found = {
        name
        for name, value in vars(public).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }

    assert found == set(vllm_unified.__all__) - {"__version__"}


def test_every_error_and_every_result_is_exported() -> None:
    kinds = {
        name
        for module in (errors, results)
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }

    assert kinds <= set(vllm_unified.__all__)
    assert issubclass(vllm_unified.BatchError, VllmError)


def test_every_exported_class_has_words() -> None:
    for name in vllm_unified.__all__:
        value = getattr(vllm_unified, name)
        assert not inspect.isclass(value) or value.__doc__, name


def modules_after(code: str) -> set[str]:
    code += "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_package_alone_imports_nothing_of_itself() -> None:
    modules = modules_after("import vllm_unified")

    assert not [name for name in modules if name.startswith("vllm_unified.")]


@pytest.mark.parametrize(
    "code",
    [
        "from vllm_unified import VllmUnified",
        "from vllm_unified import *; VllmUnified",
        "import vllm_unified; vllm_unified.VllmUnified",
        "import vllm_unified; vllm_unified.errors.VllmError",
        "import vllm_unified; assert {*vllm_unified.__all__} <= {*dir(vllm_unified)}",
    ],
)
def test_names_come_when_they_are_asked_for(code: str) -> None:
    assert "vllm_unified.client" in modules_after(code)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'vllm_unified' has no attribute 'Vllm'"):
        _ = vllm_unified.Vllm  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'Vllm'"):
        from vllm_unified import Vllm  # type: ignore[attr-defined]  # noqa: F401


def test_importing_takes_nothing_heavy() -> None:
    modules = modules_after("from vllm_unified import VllmUnified")

    assert modules.isdisjoint({*HEAVY, "httptools", "urllib.request"})
    rooms = {name.split(".")[1] for name in modules if name.startswith("vllm_unified.")}
    assert rooms.isdisjoint({"cli", "servers", "simulator", "hardware"})


def test_making_a_client_takes_nothing_heavy() -> None:
    modules = modules_after("import vllm_unified; vllm_unified.AsyncVllmUnified()")

    assert modules.isdisjoint(HEAVY)


def test_importing_starts_no_thread_and_reads_no_environment() -> None:
    code = (
        "import os, threading\n"
        "class Watched(dict):\n"
        "    def __getitem__(self, key): read.append(key); return dict.__getitem__(self, key)\n"
        "    def get(self, key, default=None): read.append(key); return default\n"
        "read = []\n"
        "os.environ = Watched()\n"
        "from vllm_unified import VllmUnified\n"
        "assert not [key for key in read if str(key).startswith('VLLM')], read\n"
        "assert threading.active_count() == 1\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_it_says_that_it_is_typed() -> None:
    assert resources.files(vllm_unified).joinpath("py.typed").is_file()


def test_the_version_is_one() -> None:
    assert vllm_unified.__version__.count(".") >= 2


def test_every_module_of_the_client_can_be_imported_alone() -> None:
    """No cycle that works in one order only."""
    package = resources.files(vllm_unified)
    rooms = ["wire", "endpoints", "batch"]
    names = ["bridge", "client", "blocking", "errors", "handler", "results", "settings"]
    for room in rooms:
        names += [f"{room}.{module.name}" for module in pkgutil.iter_modules([str(package / room)])]
    # One process that forgets between: twenty processes would take seconds.
    code = "import sys\n" + "\n".join(
        f"import vllm_unified.{name}\n"
        "for name in [n for n in sys.modules if n.startswith('vllm_unified')]:\n"
        "    del sys.modules[name]"
        for name in names
    )

    subprocess.run([sys.executable, "-c", code], check=True)
