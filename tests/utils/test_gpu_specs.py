"""A device is taken for a GPU of the table only when its name leaves no doubt: a wrong peak is worse than none."""

import pytest

from npp_ds.utils.gpu_specs import GPUS, gpu_of_device


@pytest.mark.parametrize(
    "device_name, name",
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_devices_of_the_table_are_known_by_the_driver_s_name(device_name, name):
    assert gpu_of_device(device_name) is GPUS[name]


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40",
        "Tesla V100-SXM2-16GB",
        "",
    ],
)
def test_relatives_with_other_rates_are_unknown(device_name):
    assert gpu_of_device(device_name) is None
