"""With glibc, freed memory stays with the process."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

# page faults of the second allocation of a block
_FAULTS = """
import os, resource, sys
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"
import numpy as np
from mpcache.model.glibc_malloc import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(12_500_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    completed = subprocess.run(
        [sys.executable, "-c", _FAULTS, how], check=True, capture_output=True, text=True
    )
    return int(completed.stdout)


def has_huge_pages() -> bool:
    """Whether the system gives huge pages to all processes, so that page faults are rare."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


@pytest.mark.skipif(has_huge_pages(), reason="huge pages hide it")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps its ways")
def test_a_block_that_is_allocated_again_causes_no_page_faults() -> None:
    pages = 12_500_000 * 8 // resource.getpagesize()
    assert faults("as it is") > pages / 2
    assert faults("kept") < pages / 100
