"""A process on CPUs keeps the memory that its tensors have freed."""

import os
import subprocess
import sys

from npp_ds.distributed.process_group import OF_THE_USER, keep_freed_memory

PAGES_OF_TENSORS = """
import resource, sys
import torch
from npp_ds.distributed.process_group import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    small, large = torch.ones(1_000_000), torch.ones(30_000_000)
    del small, large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    assert keep_freed_memory()
for _ in range(10):  # until what lies between the tensors has found its place
    faults_of_a_step()
print(sum(faults_of_a_step() for _ in range(5)))
"""


def page_faults(*arguments: str, **variables: str) -> int:
    command = [sys.executable, "-c", PAGES_OF_TENSORS, *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in (*OF_THE_USER, "GLIBC_TUNABLES")}
    environment = {**kept, **variables}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=120)
    return int(done.stdout)


def test_tensors_as_large_as_freed_ones_cost_no_new_pages():
    """124 MB are 30,000 pages of 4 kB or 62 of 2 MB."""
    by_default = page_faults()
    assert by_default > 5 * 50
    assert page_faults("keep") < by_default / 20


def test_settings_of_the_users_own_stay():
    assert not keep_freed_memory({"MALLOC_TRIM_THRESHOLD_": "131072"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"})


def test_how_many_heaps_there_are_is_another_matter():
    assert page_faults("keep", MALLOC_ARENA_MAX="2") < page_faults(MALLOC_ARENA_MAX="2") / 20
