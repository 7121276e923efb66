"""Free memory is that within the limits of control groups, and running out of it is one line."""

import pytest
import torch

from npp_ds.distributed.environment import free_memory
from npp_ds.errors import UserError, memory_advice

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")
HUGE = "9223372036854771712"


@pytest.mark.parametrize(
    "groups, files, expected",
    [
        ("0::/job/step\n", {"job/step": V2, "job": V2}, [("max", "5"), ("100", "30")]),
        ("9:name=systemd:/x\n4:memory:/job\n", {"memory/job": V1, "memory": V1}, [("90", "20"), (HUGE, "1")]),
        ("0::/../outside\n", {}, []),
    ],
)
def test_the_tightest_limit_of_the_control_groups_counts(groups, files, expected, tmp_path, monkeypatch):
    (tmp_path / "self").write_text(groups)
    for (folder, names), values in zip(files.items(), expected, strict=True):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip(names, values, strict=True):
            (tmp_path / folder / name).write_text(value + "\n")
    monkeypatch.setattr("npp_ds.distributed.environment.OWN_GROUPS", tmp_path / "self")
    monkeypatch.setattr("npp_ds.distributed.environment.CGROUPS", tmp_path)
    free = free_memory("cpu")
    assert free == 70 if files else free > 1 << 20


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("... can't allocate memory"),
    ],
)
def test_out_of_memory_is_a_user_error_and_other_errors_are_not(error):
    with pytest.raises(UserError, match=r"^out of memory: .*; lower x$"), memory_advice("lower x"):
        raise error
    with pytest.raises(RuntimeError, match="shape"), memory_advice("lower x"):
        raise RuntimeError("shape")
