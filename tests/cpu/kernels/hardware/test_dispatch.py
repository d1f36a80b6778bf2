"""The table of operations, and that one file is enough to appear in it."""

import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import foveate.kernels
import foveate.kernels.cpu
from foveate.kernels.cpu.levels import LEVELS, force, machine
from foveate.kernels.hardware import dispatch
from foveate.kernels.hardware.dispatch import VERSIONS, Versions, choose, operations, table, version_of

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")
has_cpu = pytest.mark.skipif(machine() == "reference", reason="the C++ kernels are not here")


def modules(*folder: str) -> set[str]:
    return {path.stem for path in (ROOT / "kernels").joinpath(*folder).glob("*.py")} - {"__init__"}


def test_every_file_is_an_operation() -> None:
    assert set(operations()) == modules()
    assert {"rms_norm", "layer_norm", "rotary", "decoder", "pack", "attention", "linear", "store"} <= modules()


@pytest.mark.parametrize("operation", operations())
def test_every_operation_has_its_reference(operation: str) -> None:
    reference = table()[operation].reference
    assert reference.__name__ == "reference" and reference.__module__ == f"foveate.kernels.{operation}"
    assert reference.__doc__, "a definition says what it defines"


@pytest.mark.parametrize(
    ("operation", "version"), [(o, v) for o, found in table().items() for v in VERSIONS if getattr(found, v)]
)
def test_a_version_takes_what_its_reference_takes(operation: str, version: str) -> None:
    module = version_of(operation, version)
    assert module is not None, "the table names it"
    assert inspect.signature(module.run) == inspect.signature(table()[operation].reference)
    assert module.TAKES and all(isinstance(dtype, torch.dtype) for taken in module.TAKES for dtype in taken)


def test_a_file_of_a_version_belongs_to_an_operation() -> None:
    """One with a `run` whose name is no operation's would never be called."""
    for version in VERSIONS:
        texts = {name: (ROOT / f"kernels/{version}/{name}.py").read_text() for name in modules(version)}
        runs = {name for name, text in texts.items() if "\ndef run(" in text}
        assert runs and runs <= set(operations())


@has_cpu
@pytest.mark.parametrize("operation", operations())
def test_the_choice_follows_device_dtype_and_level(operation: str) -> None:
    versions, module = table()[operation], version_of(operation, "cpu")
    taken = [dtypes[0] for dtypes in module.TAKES] if module else [torch.float32]
    reference = versions.reference
    for level in LEVELS[1 : LEVELS.index(machine()) + 1]:
        with force(level):
            assert choose(reference, CPU, *taken) is (versions.cpu or reference)
            assert choose(reference, CPU, *(torch.float64 for _ in taken)) is reference
            assert choose(reference, torch.device("meta"), *taken) is reference
    with force("reference"):
        for device in ("cpu", "cuda"):
            assert choose(reference, torch.device(device), *taken) is reference


@pytest.mark.parametrize("operation", operations())
def test_cuda_runs_its_version_or_the_reference(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the C++ for the CPU is here."""
    monkeypatch.setattr(dispatch, "forced", lambda: "")
    monkeypatch.setattr(dispatch, "level", lambda: "reference")
    versions, module = table()[operation], version_of(operation, "cuda")
    taken = [dtypes[0] for dtypes in module.TAKES] if module else [torch.float32]
    assert choose(versions.reference, torch.device("cuda"), *taken) is (versions.cuda or versions.reference)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operation that CONTRIBUTING.md writes, in a folder of its own that counts as part of `kernels/`."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    files = re.findall(r"^```python\n# (kernels/\S+\.py)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["kernels/double.py", "kernels/cpu/double.py"]
    for name, text in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    monkeypatch.setattr(foveate.kernels, "__path__", [*foveate.kernels.__path__, str(tmp_path / "kernels")])
    yield
    for name in ("foveate.kernels.double", "foveate.kernels.cpu.double"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("example")
def test_one_file_is_a_new_operation() -> None:
    from foveate.kernels.double import double, reference  # type: ignore[import-not-found]

    x = torch.randn(3, 5)
    assert "double" in operations() and table()["double"] == Versions(reference, None, None)
    assert torch.equal(double(x), 2 * x)


@has_cpu
@pytest.mark.usefixtures("example")
def test_a_second_file_is_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foveate.kernels.cpu, "__path__", [*foveate.kernels.cpu.__path__, str(tmp_path / "kernels/cpu")])
    from foveate.kernels.cpu.double import run  # type: ignore[import-not-found]
    from foveate.kernels.double import double, reference

    assert table()["double"] == Versions(reference, run, None)
    x = torch.randn(3, 5)
    with force("avx2"):
        assert choose(reference, CPU, torch.float32) is run and choose(reference, CPU, torch.bfloat16) is reference
        assert torch.equal(double(x), 2 * x)
