"""The signals by which schedulers stop a run are noted instead of ending it, and only while somebody wants to know."""

import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests

pytestmark = pytest.mark.processes

# Notes what was requested when it has seen as many signals as are sent, then leaves the block and waits for the next.
PROGRAM = """
import signal, sys, time
from npp_ds.training.preemption import StopRequests
for times in range(2):
    with StopRequests() as stop:
        print("ready", stop.requested, flush=True)
        while stop.requested is None:
            time.sleep(0.01)
        print("first", flush=True)
        sys.stdin.readline()
        print(stop.requested, flush=True)
print("left", flush=True)
time.sleep(60)
"""


def test_a_process_notes_the_first_signal_twice_in_a_row_and_dies_of_one_afterwards():
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=-1, stdout=-1, text=True)
    guard = threading.Timer(30, process.kill)
    guard.start()

    def heard() -> str:
        return process.stdout.readline().strip()

    try:
        for first, second in ((signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
            assert heard() == "ready None"
            process.send_signal(first)
            assert heard() == "first"
            process.send_signal(second)
            process.stdin.write("\n")
            process.stdin.flush()
            assert heard() == first.name
        assert heard() == "left"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_at_once_also_in_native_code_but_one_that_a_launcher_repeats_does_not(last):
    program = """
import ctypes, os, signal
from npp_ds.training.preemption import StopRequests
with StopRequests() as stop:
    print("ready", flush=True)
    while stop.requested is None:
        pass
    print(stop.requested, flush=True)
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
    guard = threading.Timer(30, process.kill)
    guard.start()
    try:
        assert process.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # the terminal's, the launcher's, its last word
            process.send_signal(number)
            time.sleep(0.1)
        assert process.stdout.readline() == "SIGINT\n"
        process.send_signal(last)
        assert process.wait(10) == -last
    finally:
        guard.cancel()
        process.kill()
        process.communicate()


def test_the_exit_code_of_a_preempted_process_outlives_further_signals():
    program = """
import sys
from npp_ds.training.preemption import PREEMPTED, Preempted, StopRequests
try:
    with StopRequests():
        raise Preempted("SIGUSR1", 1)
except Preempted:
    print("left", flush=True)
    sys.stdin.readline()
    sys.exit(PREEMPTED)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True)
    try:
        assert process.stdout.readline() == "left\n"
        for number in StopRequests.SIGNALS:
            process.send_signal(number)
        process.communicate("\n", timeout=30)
        assert process.returncode == PREEMPTED
    finally:
        process.kill()
        process.communicate()


def test_earlier_handlers_come_back_also_after_an_error():
    heard = []
    before = {number: signal.signal(number, lambda n, f: heard.append(n)) for number in StopRequests.SIGNALS}
    try:
        with pytest.raises(KeyError), StopRequests() as stop:
            signal.raise_signal(signal.SIGTERM)
            raise KeyError
        assert (stop.requested, heard) == ("SIGTERM", [])
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        assert heard == [signal.SIGTERM, signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_another_thread_than_the_main_one_is_told_so():
    errors = []

    def enter() -> None:
        try:
            with StopRequests():
                pass
        except ValueError as error:
            errors.append(error)

    before = [signal.getsignal(number) for number in StopRequests.SIGNALS]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread" in str(errors[0])
    assert [signal.getsignal(number) for number in StopRequests.SIGNALS] == before


def test_preempted_says_by_what_and_where_and_passes_between_processes():
    error = pickle.loads(pickle.dumps(Preempted("SIGUSR1", 120)))
    assert (error.signal_name, error.step) == ("SIGUSR1", 120)
    assert str(error) == "asked to stop by SIGUSR1; saved after step 120; start again to resume"
    assert PREEMPTED == 75
