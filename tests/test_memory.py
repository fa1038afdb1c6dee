"""A process keeps memory that it uses again, and no idle threads; each test runs in a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource
from lola_ft.memory import give_back_freed_memory, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        buffers = [bytes(bytearray(48 << 20)) for _ in range(2)]
        del buffers
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
kept = faults()
give_back_freed_memory()
print(before, kept, faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_what_is_freed_is_used_again_without_asking_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    before, kept, given_back = map(int, done.stdout.split())
    assert before > 100_000  # every page of ten buffers, new and written each time
    assert kept < before / 100
    assert given_back > before / 20  # giving back still works, and is paid for once


THREADS = """
import os, torch
from lola_ft.quantization.nf4 import quantize

def threads():
    torch.ones(1 << 20).add_(1)  # wakes OpenMP's own
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
before = threads()
quantize(torch.randn(1 << 21, dtype=torch.bfloat16))
print(threads() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads")
def test_quantising_leaves_no_pools_of_openmps_behind() -> None:
    """With more of its threads than cores OpenMP's sleep at once, and waking them takes longer than most operations."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= 4, "the four that quantise stay; each must not have got four more"
