"""Memory that is freed is kept: passes that ask for the same again get no fresh pages."""

import os
import subprocess
import sys

import pytest

from minwm.memory import KEEP_FREED

pytestmark = pytest.mark.unit

PROGRAM = """
import resource, threading, torch
from minwm.memory import keep_freed_memory

def one_pass():
    x = torch.ones(1 << 22)
    for _ in range(4):
        x = torch.relu(torch.cat([x, x]))[: len(x)]
        x = torch.cat([x, x, x, x]).view(4, -1).sum(0)

def passes():
    for number in range(4):
        if number == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        one_pass()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

torch.set_num_threads(1)
{call}
"""
MAIN, KEPT = "passes()", "keep_freed_memory(); passes()"
THREAD = "thread = threading.Thread(target=passes); thread.start(); thread.join()"


def fresh_pages(call: str, environment: dict[str, str]) -> int:
    """Page faults of two passes, after two."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(command, env={**inherited, **environment}, check=True, capture_output=True, text=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that gives memory back")
def test_passes_get_few_fresh_pages_on_the_main_thread_and_in_the_environment_for_others_on_another() -> None:
    left_alone = fresh_pages(MAIN, {})
    assert left_alone > 100_000, "the test does not show what it is about"
    assert fresh_pages(KEPT, {}) < left_alone / 10
    assert fresh_pages(THREAD, KEEP_FREED) < left_alone / 10
