"""Waiting for others is told apart from working, in every ZeRO stage: the one that is waited for does not wait."""

import json
import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from npp_ds.distributed.process_group import Processes
from npp_ds.training import communication
from npp_ds.training.communication import COLLECTIVES, CommunicationWatch, StreamTimer
from npp_ds.training.deepspeed_config import read_settings
from npp_ds.training.deepspeed_import import import_deepspeed
from npp_ds.training.run_log import RunLog
from npp_ds.training.trainer import Trainer
from runs import tiny_config

SLOWNESS = 0.2  # seconds a step: many times what a step of the tiny model takes


def _wait_shares(processes: Processes, config, slow_rank: int) -> list[float]:
    """This rank's share at each line of a run in which one rank sleeps before its steps."""

    class OneIsSlow(Trainer):
        def _train(self):
            step = self.engine.step

            def slow(*arguments):
                if processes.rank == slow_rank:
                    time.sleep(SLOWNESS)
                return step(*arguments)

            self.engine.step = slow
            super()._train()

    shares, write = [], RunLog.write

    def noted(log, event, step, **values):
        if event == "train":
            shares.append(values["communication_wait_share"])
        write(log, event, step, **values)

    RunLog.write = noted
    try:
        OneIsSlow(config, processes).run()
    finally:
        RunLog.write = write
    assert not set(COLLECTIVES) & set(vars(import_deepspeed().comm.comm.cdb)), "DeepSpeed is as it was"
    return shares


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_rank_that_others_wait_for_does_not_wait_itself(pair, shards, tmp_path, zero):
    settings = read_settings(f"zero{zero}")
    if zero == 3:  # or the tiny model's weights would stay whole, and nobody wait for them
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    config = tiny_config(
        shards, tmp_path / "run", deepspeed={"config": str(tmp_path / "zero.json")}, logging={"every": 4},
        schedule={"patch_sides": [2], "epochs": 1, "warmup_epochs": 0, "end_at_patch_side_one": False},
    )  # fmt: skip
    waiting, slow = pair.run(_wait_shares, config, slow_rank=1)
    assert len(waiting) == len(slow) == 4, "lines after steps 1, 4, 8 and 10"
    assert min(waiting[1:]) > 0.5, waiting
    assert max(slow[1:]) < 0.3, slow
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["event"] == "train"]
    assert [line["communication_wait_share"] for line in lines] == waiting, "the first rank's own"
    largest = [max(both) for both in zip(waiting, slow, strict=True)]
    assert [line["communication_wait_share_largest"] for line in lines] == largest


def test_every_exchange_of_deepspeed_s_backend_is_watched():
    import_deepspeed()
    methods = vars(import_module("deepspeed.comm.torch").TorchBackend)
    exchanges = ("all_", "inference_all_", "reduce", "broadcast", "gather", "scatter", "barrier", "monitored_")
    assert {name for name in methods if name.startswith(exchanges)} == set(COLLECTIVES)


def test_what_is_nested_counts_once_and_what_is_paused_not_at_all():
    watch = CommunicationWatch(torch.device("cpu"))
    began = time.perf_counter()
    assert watch.call(watch.call, lambda seconds: time.sleep(seconds) or "done", seconds=0.05) == "done"
    assert 0.05 <= watch.seconds <= time.perf_counter() - began
    before = watch.seconds
    with watch.paused():
        watch.call(time.sleep, 0.01)
    assert watch.seconds == before


def test_an_exchange_that_fails_ends_the_wait():
    watch = CommunicationWatch(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError):
        watch.call(lambda: 1 / 0)
    before = watch.seconds
    watch.call(time.sleep, 0.01)
    assert watch.seconds >= before + 0.01


class Device:
    """A stand-in for a CUDA device: events hold the time `now` of their recording and are over once `done` is later."""

    def __init__(self, monkeypatch):
        self.now, self.done, self.synchronized = 0.0, 0.0, 0
        self.current = "compute"
        device = self

        class Event:
            made = 0

            def __init__(self, enable_timing):
                assert enable_timing
                Event.made += 1

            def record(self, stream):
                self.stream, self.at = stream, device.now

            def query(self):
                return self.at <= device.done

            def synchronize(self):
                device.synchronized += 1
                device.done = max(device.done, self.at)

            def elapsed_time(self, end):
                assert self.query() and end.query()
                return (end.at - self.at) * 1000

        class Stream(str):
            def wait_stream(self, other):
                device.now += 1.0

            def synchronize(self):
                device.now += 10.0

        self.Event, self.Stream = Event, Stream
        fake = SimpleNamespace(Event=Event, Stream=Stream, current_stream=lambda: self.current)
        monkeypatch.setattr(communication, "torch", SimpleNamespace(cuda=fake))


def span_of_a_second(device: Device, timer: StreamTimer) -> None:
    began = timer.begin()
    device.now += 1.0
    timer.end(began)


def test_waits_of_the_computing_stream_are_read_from_events_when_asked_for(monkeypatch):
    device = Device(monkeypatch)
    timer = StreamTimer()
    for stream, seconds in (("compute", 2.0), ("side", 50.0), ("compute", 3.0)):
        device.current = stream
        device.now += 1
        began = timer.begin()
        device.now += seconds
        timer.end(began)
    assert device.synchronized == 0, "nothing waits for the device before it is asked for"
    assert timer.seconds == 5.0 and timer.seconds == 5.0
    span_of_a_second(device, timer)
    assert timer.seconds == 6.0
    assert device.Event.made == 4, "events are used again"


def test_open_spans_are_bounded_and_never_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(communication, "MOST_OPEN_SPANS", 3)
    device = Device(monkeypatch)
    timer = StreamTimer()
    for _ in range(5):
        span_of_a_second(device, timer)
    assert (device.Event.made, device.synchronized) == (6, 0), "the last two found no room"
    device.done = device.now
    span_of_a_second(device, timer)
    assert (device.Event.made, device.synchronized) == (6, 0), "those that are over have made room"
    assert timer.seconds == 4.0


def test_on_a_gpu_waits_for_side_streams_count_and_what_runs_there_does_not(monkeypatch):
    device = Device(monkeypatch)
    import_deepspeed()
    comm, accelerator = import_module("deepspeed.comm.comm"), import_module("deepspeed.accelerator").get_accelerator()

    def taking(seconds):
        def exchange(*arguments):
            device.now += seconds

        return exchange

    backend = SimpleNamespace(**{name: taking(100.0) for name in COLLECTIVES})
    monkeypatch.setattr(comm, "cdb", backend)
    monkeypatch.setattr(accelerator, "synchronize", taking(1000.0))
    compute, side = device.Stream("compute"), device.Stream("side")
    before, methods = dict(vars(backend)), (device.Stream.wait_stream, device.Stream.synchronize)
    watch = CommunicationWatch(SimpleNamespace(type="cuda"))
    with watch.installed():
        device.current = "side"  # as ZeRO does with overlap_comm
        side.wait_stream(compute)
        backend.all_reduce()
        assert watch.seconds == 0
        device.current = "compute"
        side.wait_stream(compute)
        assert watch.seconds == 0
        compute.wait_stream(side)
        assert watch.seconds == 1
        side.synchronize()
        assert watch.seconds == 11
        backend.all_gather_into_tensor()
        assert watch.seconds == 111
        accelerator.synchronize()
        assert watch.seconds == 1111
    assert vars(backend) == before and (device.Stream.wait_stream, device.Stream.synchronize) == methods
    backend.all_reduce()
    assert watch.seconds == 1111


@pytest.mark.gpu
def test_a_gpu_s_computation_waits_for_other_streams():
    watch = CommunicationWatch(torch.device("cuda"))
    side, cycles = torch.cuda.Stream(), int(2e8)
    wait_stream = watch._watched_if_current(torch.cuda.Stream.wait_stream)
    for work_before, least, most in ((0, 0.05, 1.0), (3 * cycles, 0.0, 0.01)):
        torch.cuda.synchronize()
        before = watch.seconds
        with torch.cuda.stream(side):
            torch.cuda._sleep(cycles)
        torch.cuda._sleep(work_before + 1)
        wait_stream(torch.cuda.current_stream(), side)
        assert least <= watch.seconds - before <= most, "work of its own hides the wait"
