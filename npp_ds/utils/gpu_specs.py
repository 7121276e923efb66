"""Specifications of GPUs: memory, dense bf16 rate, bandwidth between GPUs, and CUDA's device names. Needs no torch."""

from dataclasses import dataclass

from npp_ds.errors import UserError, did_you_mean, similar_names

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class GPU:
    """Memory in 10^9 bytes, peak of dense bf16 products in TFLOP/s, and bandwidths in GB/s in one direction.

    `within_node` is what one GPU sends to others of its node, `between_nodes` what a whole node sends to another.
    """

    name: str
    memory_gb: float
    tflops: float
    within_node: float
    between_nodes: float

    def bandwidth(self, gpus: int) -> float:
        """Return the GB/s that each of `gpus` GPUs sends in a collective of them all.

        Between nodes NCCL runs one ring per network adapter, and each ring takes its part of the data through every
        GPU. So the network of the whole node counts, up to the bandwidth of a GPU within the node.
        """
        return self.within_node if gpus <= GPUS_PER_NODE else min(self.within_node, self.between_nodes)


# NVIDIA's data sheets, dense rates (without sparsity), NVLink or PCIe in one direction (half of the total they name).
# Between nodes: eight adapters as in DGX A100 (200 Gbit/s each) and DGX H100, H200, B200 (400 Gbit/s each); one of
# 100 Gbit/s for a node of PCIe cards is an assumption.
GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40", 40, 312, 300, 200),  # A100 data sheet, SXM: 312 TFLOP/s, NVLink 600 GB/s
        GPU("a100-80", 80, 312, 300, 200),
        GPU("h100", 80, 989.4, 450, 400),  # H100 data sheet, SXM: 1,979 with sparsity, NVLink 900 GB/s
        GPU("h200", 141, 989.4, 450, 400),  # H200 data sheet, SXM: the same chip
        GPU("b200", 180, 2250, 900, 400),  # DGX B200 data sheet: 1,440 GB in 8, 36 PFLOP/s dense FP8, NVLink 1.8 TB/s
        GPU("l40s", 48, 362, 32, 12.5),  # L40S data sheet: 733 with sparsity (362.05 dense), PCIe 4 x16 64 GB/s
        GPU("rtx4090", 24, 165.2, 32, 12.5),  # Ada architecture paper, appendix A: bf16 with fp32 sums, PCIe 4 x16
    )
}

# The driver's names for complete devices; older drivers omit the brand. Cards of the same chip with other limits (PCIe,
# NVL, laptops, MIG slices) have other names and other rates.
_DEVICE_NAMES = {
    "A100-SXM4-40GB": "a100-40",
    "A100-SXM4-80GB": "a100-80",
    "H100 80GB HBM3": "h100",
    "H200": "h200",
    "B200": "b200",
    "L40S": "l40s",
    "GeForce RTX 4090": "rtx4090",
}


def gpu_of_device(device_name: str) -> GPU | None:
    """Return the GPU of the table with this `torch.cuda.get_device_name`; None for any other device."""
    return GPUS.get(_DEVICE_NAMES.get(device_name.removeprefix("NVIDIA "), ""))


def has_own_rate(gpu: GPU) -> bool:
    """Return whether a GPU of the table has the rate that the table gives, not another one that a user gave."""
    known = GPUS.get(gpu.name)
    return known is not None and known.tflops == gpu.tflops


def find_gpu(name: str, memory_gb: float | None, tflops: float | None, bandwidth: float | None) -> GPU:
    """Return a GPU of the table, with the figures that are given instead of its own.

    A GPU outside the table needs memory and rate; its bandwidth is by default that of a100-80. Raises UserError for an
    unknown GPU without these.
    """
    known = GPUS.get(name)
    if known is None and (memory_gb is None or tflops is None):
        hint = did_you_mean(similar_names(name, GPUS))
        raise UserError(
            f"--gpu {name}: not one of {', '.join(GPUS)}{hint}; name one of these, or give also --gpu-memory (GB) "
            "and --gpu-tflops (dense bf16)"
        )
    base = known or GPUS["a100-80"]
    return GPU(
        name,
        memory_gb or base.memory_gb,
        tflops or base.tflops,
        bandwidth or base.within_node,
        bandwidth or base.between_nodes,
    )
