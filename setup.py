"""The compiled CPU kernels; everything else is in pyproject.toml.

No flag here names an instruction set: each file in kernels/cpu asks for its own, and run-time dispatch chooses. Where
the compiler fails, the package installs without the kernels and runs plain torch, and says so in its log.
"""

import platform
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ParallelCompile(default=0).install()  # a thread per core

KERNELS = Pybind11Extension(
    "foveate.kernels._cpu",
    sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wall"],
    optional=True,
)

setup(ext_modules=[KERNELS] if platform.machine() in ("x86_64", "AMD64") and platform.system() == "Linux" else [])
