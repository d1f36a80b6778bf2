"""Memory that kernels work in."""

import subprocess
import sys

_PROGRAM = """
import resource, torch
from foveate.kernels.cpu.memory import keep_freed
keep_freed()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def prefill():
    some = [torch.ones(5_000_000) for _ in range(4)]  # 20 MB each

for _ in range(3):  # the heap grows to its size
    prefill()
before = faults()
for _ in range(10):
    prefill()
print(faults() - before)
"""


def test_freed_memory_is_taken_again_without_faults() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000, "a tenth of 10 times 80 MB; a heap that grows once more takes 5,000"
