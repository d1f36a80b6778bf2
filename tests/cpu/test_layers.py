"""The layers: tune -> server -> engine -> kernels, and all but kernels -> configs; and that callers of kernels do not
branch on hardware. Read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "tune": {"tune", "server", "engine", "kernels", "configs"},
    "server": {"server", "engine", "kernels", "configs"},
    "engine": {"engine", "kernels", "configs"},
    "kernels": {"kernels"},
    "configs": {"configs"},
}
STARTS = {"server/main.py": {"tune"}}  # the command line starts what lies above it, inside a function
# Read by the server as well, which starts in a second because it imports none of these.
FOLDERS = ("common", "images")
LIGHT = ["engine/__init__.py"]
LIGHT += sorted(f"engine/{name}/{path.name}" for name in FOLDERS for path in (ROOT / "engine" / name).glob("*.py"))
# A back end that has its own tensors reads no more than this of a model.
LIGHT += sorted(f"engine/geometry/{path.name}" for path in (ROOT / "engine" / "geometry").glob("*.py"))
HEAVY = {"torch", "numpy", "transformers"}
CALLERS = ("engine", "server", "tune")  # of kernels
HARDWARE = {"cuda", "mps", "xpu", "is_cpu", "is_cuda", "is_mps", "is_xpu", "get_device"}  # attributes
HARDWARE_NAMES = {"platform.machine", "platform.processor", "os.uname", "torch.backends", "torch.accelerator"}
HARDWARE_MODULES = {"foveate.kernels.cpu.levels", "foveate.kernels.cuda", "foveate.kernels._cpu", "torch.cuda"}
HARDWARE_WORDS = {"cpu", "cuda", "mps", "xpu"}
RUNS_DATA = {"eval", "exec", "compile", "__import__"}


def sources() -> list[Path]:
    return sorted(path for layer in MAY_IMPORT for path in (ROOT / layer).rglob("*.py"))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported dotted name with its line, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def imports_at_import(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What runs when the module is imported: everything outside functions and `if TYPE_CHECKING`."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        pending += ast.iter_child_nodes(node)


def upward(path: Path, tree: ast.AST) -> list[str]:
    """The imports of `path` that do not point down, each with its place."""
    layer = path.relative_to(ROOT).parts[0]
    above = MAY_IMPORT.keys() - MAY_IMPORT[layer] - STARTS.get(str(path.relative_to(ROOT)), set())
    found = []
    for name, line in imports(tree):
        parts = name.split(".")
        if name.startswith("."):
            found.append(f"{where(path, line)} imports {name}: imports are absolute")
        elif parts[0] in MAY_IMPORT:
            found.append(f"{where(path, line)} imports {name}: write foveate.{name}")
        elif parts[0] == "foveate" and len(parts) > 1 and parts[1] in above:
            found.append(f"{where(path, line)} imports {name}: {layer} lies below {parts[1]}")
    return found


def test_there_is_something_to_check() -> None:
    layers = {path.relative_to(ROOT).parts[0] for path in sources()}
    assert layers == set(MAY_IMPORT)


def test_imports_point_down() -> None:
    found = [line for path in sources() for line in upward(path, ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("kernels", "from foveate.engine.common.grid import Grid"),
        ("kernels", "import foveate.configs.config"),
        ("configs", "from foveate import engine"),
        ("engine", "def f():\n    from foveate.server.main import main"),
        ("engine", "from kernels.attention import paged_attention"),
        ("server", "from . import app"),
        ("server", "from foveate.tune.command import tune"),
    ],
)
def test_an_upward_import_is_found(layer: str, line: str) -> None:
    (found,) = upward(ROOT / layer / "invented.py", ast.parse(line))
    assert found.startswith(f"{layer}/invented.py:{2 if line.startswith('def') else 1} ")


def test_the_server_imports_no_tensors_at_import() -> None:
    """Not directly, and not through another module of ours: the closure of every server module is light."""
    found = []
    pending = sorted((ROOT / "server").rglob("*.py")) + [ROOT / name for name in LIGHT]
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for name, line in imports_at_import(ast.parse(path.read_text())):
            if name.split(".")[0] in HEAVY:
                found.append(f"{where(path, line)} imports {name}")
            pending += modules(name)
    assert not found, "\n".join(found)


def modules(name: str) -> list[Path]:
    """Files of ours that importing `name` runs, packages included; `name` may end in an attribute."""
    parts = name.split(".")
    if parts[0] != "foveate":
        return []
    tried = [ROOT.joinpath(*parts[1:end]) for end in range(2, len(parts) + 1)]
    files = [file for path in tried for file in (path / "__init__.py", path.with_suffix(".py"))]
    return [file for file in files if file.is_file()]


def test_models_know_no_method() -> None:
    families = ("foveate.engine.reduce", "foveate.engine.prune")
    found = [
        f"{where(path, line)} imports {name}"
        for folder in ("models", "geometry", "vision")
        for path in sorted((ROOT / "engine" / folder).rglob("*.py"))
        for name, line in imports(ast.parse(path.read_text()))
        if name.startswith(families)
    ]
    assert not found, "\n".join(found)


def test_nothing_runs_data() -> None:
    """No pickle, no torch.load, no eval: weights are safetensors, messages msgspec, templates sandboxed."""
    found = []
    for path in sources():
        tree = ast.parse(path.read_text())
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
        found += [f"{where(path, line)} imports {n}" for n, line in imports(tree) if n.split(".")[0] in banned]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in RUNS_DATA:
                found.append(f"{where(path, node.lineno)} calls {node.func.id}")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
                found.append(f"{where(path, node.lineno)} uses {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_transformers_is_for_tests_only() -> None:
    found = [
        f"{where(path, line)} imports {name}"
        for path in sources()
        for name, line in imports(ast.parse(path.read_text()))
        if name.split(".")[0] == "transformers"
    ]
    assert not found, "\n".join(found)


def hardware(path: Path, tree: ast.AST) -> list[str]:
    """Where a caller of kernels looks at the hardware itself instead of asking `kernels/hardware/`."""
    found = [
        f"{where(path, line)} imports {name}"
        for name, line in imports(tree)
        if any(f"{name}.".startswith(f"{module}.") for module in HARDWARE_MODULES) or name in HARDWARE_NAMES
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and asks_hardware(node):
            found.append(f"{where(path, node.lineno)} reads {ast.unparse(node)}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "cpuinfo" in node.value:
            found.append(f"{where(path, node.lineno)} reads cpuinfo")
        if isinstance(node, ast.Compare | ast.MatchValue) and any(map(names_hardware, ast.walk(node))):
            found.append(f"{where(path, node.lineno)} compares {ast.unparse(node)}")
    return found


def asks_hardware(node: ast.Attribute) -> bool:
    owner = ast.unparse(node.value)
    of_device = node.attr in ("type", "index") and (owner.endswith("device") or owner.startswith("torch.device("))
    return of_device or node.attr in HARDWARE or f"{owner}.{node.attr}" in HARDWARE_NAMES


def names_hardware(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in HARDWARE_WORDS


def test_callers_never_branch_on_hardware() -> None:
    paths = [path for path in sources() if path.relative_to(ROOT).parts[0] in CALLERS]
    found = [line for path in paths for line in hardware(path, ast.parse(path.read_text()))]
    assert not found, "\n".join(found)


def test_nothing_reads_cpuinfo() -> None:
    """Some virtual machines forbid what the file promises: only an instruction that has run is an answer."""
    found = [str(path.relative_to(ROOT)) for path in sources() if "cpuinfo" in path.read_text()]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "if x.device.type == device: pass",
        "fast = self._device.type in known",
        "kind = torch.device(name).type",
        "if x.is_cuda: pass",
        "if not torch.cuda.is_available(): pass",
        "from torch.cuda import mem_get_info",
        "from torch import cuda",
        "moved = x.cuda()",
        "if platform.machine() == 'x86_64': pass",
        "from platform import machine",
        "flags = Path('/proc/cpuinfo').read_text()",
        "from foveate.kernels.cpu.levels import level",
        "from foveate.kernels.cpu import levels",
        "import foveate.kernels.cuda.vision_attention",
        "if config.device == 'cuda': pass",
        "if device != torch.device('cpu'): pass",
        "if str(device).startswith(some) and name in ('cpu', 'auto'): pass",
        "match name:\n    case 'cuda':\n        pass",
    ],
)
def test_a_branch_on_hardware_is_found(line: str) -> None:
    found = hardware(ROOT / "engine/invented.py", ast.parse(line))
    assert found and all(place.startswith("engine/invented.py:") for place in found)


@pytest.mark.parametrize(
    "line",
    [
        "rows = torch.zeros(n, device=x.device)",
        "host = x.to('cpu')",
        "from foveate.kernels.hardware.device import free_bytes",
        "from foveate.kernels.cpu.weights import PackedWeight",
        "if message.type == 'text': pass",
        "device = torch.device('cpu')",
    ],
)
def test_naming_a_device_is_no_branch(line: str) -> None:
    assert not hardware(ROOT / "engine/invented.py", ast.parse(line))
