"""What a device can do: memory, matrix peaks and bandwidth of those that people train on, with the source of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from configs.section import Dtype
from rlhf.errors import PlacementError

GIB = 1024**3
TERA = 10**12


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the processors of one machine.

    Peaks are dense (no sparsity), with accumulation in float32. Float32 products are those of the plain units: torch
    leaves TF32 off. `basis` says where the usable memory is from.
    """

    name: str
    label_gb: float  # the memory in its name
    usable_gib: float  # what a process can have
    bfloat16_flops: float  # per second
    float32_flops: float  # per second
    bandwidth: float  # bytes per second, of its memory
    link: float  # bytes per second to another device of its node, one way
    source: str  # of peaks and bandwidth
    basis: str  # of the usable memory
    is_cpu: bool = False

    @property
    def usable(self) -> int:
        """Bytes."""
        return int(self.usable_gib * GIB)

    def flops(self, dtype: Dtype) -> float:
        """Matrix products per second at most, in operations."""
        return self.bfloat16_flops if dtype == "bfloat16" else self.float32_flops


# What torch calls the total capacity of the device, the smallest that was found reported: the label less what ECC, the
# driver and its firmware keep.
CAPACITY = "total capacity as torch reports it"

GPUS: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device(
            "A100-40GB", 40, 39.49, 312 * TERA, 19.5 * TERA, 1.555e12, 300e9,
            "NVIDIA A100 Tensor Core GPU data sheet (2021): BF16 312, FP32 19.5 TFLOPS, 1,555 GB/s, "
            "NVLink 600 GB/s both ways",
            CAPACITY + " (42,405,855,232 bytes)",
        ),
        Device(
            "A100-80GB", 80, 79.14, 312 * TERA, 19.5 * TERA, 2.039e12, 300e9,
            "NVIDIA A100 Tensor Core GPU data sheet (2021), SXM: BF16 312, FP32 19.5 TFLOPS, 2,039 GB/s, "
            "NVLink 600 GB/s both ways", CAPACITY,
        ),
        Device(
            "H100", 80, 79.10, 989 * TERA, 67 * TERA, 3.35e12, 450e9,
            "NVIDIA H100 Tensor Core GPU data sheet, SXM: BF16 1,979 with sparsity, FP32 67 TFLOPS, 3.35 TB/s, "
            "NVLink 900 GB/s both ways",
            CAPACITY + " (nvidia-smi: 81,559 MiB)",
        ),
        Device(
            "H200", 141, 139.80, 989 * TERA, 67 * TERA, 4.8e12, 450e9,
            "NVIDIA H200 Tensor Core GPU data sheet, SXM: BF16 1,979 with sparsity, FP32 67 TFLOPS, 4.8 TB/s, "
            "NVLink 900 GB/s both ways",
            CAPACITY + " (nvidia-smi: 143,771 MiB)",
        ),
        Device(
            "B200", 180, 178.35, 2250 * TERA, 75 * TERA, 7.7e12, 900e9,
            "NVIDIA HGX B200, a GPU of eight: BF16 4.5 PFLOPS with sparsity, FP32 75 TFLOPS, 7.7 TB/s, "
            "NVLink 1.8 TB/s both ways",
            CAPACITY + " (nvidia-smi: 183,359 MiB)",
        ),
        Device(
            "L40S", 48, 44.40, 362 * TERA, 91.6 * TERA, 0.864e12, 32e9,
            "NVIDIA L40S data sheet: BF16 362 (733 with sparsity), FP32 91.6 TFLOPS, 864 GB/s, PCIe 4.0 x16",
            CAPACITY + " (nvidia-smi: 46,068 MiB; ECC of GDDR6 takes a sixteenth)",
        ),
        Device(
            "RTX-4090", 24, 23.52, 165.2 * TERA, 82.6 * TERA, 1.008e12, 32e9,
            "NVIDIA Ada GPU Architecture whitepaper, appendix A: BF16 with FP32 accumulate 165.2, FP32 82.6 TFLOPS, "
            "1,008 GB/s, PCIe 4.0 x16",
            CAPACITY + " (nvidia-smi: 24,564 MiB)",
        ),
    )
}  # fmt: skip

# Of one core, as measured for this project on a server's (two of them: 130 - 180 GFLOP/s in float32, 310 - 400 in
# bfloat16). Another machine's may be half or twice as fast.
CPU_FLOAT32_FLOPS = 75e9
CPU_BFLOAT16_FLOPS = 175e9
CPU_BANDWIDTH = 10e9


def this_cpu(memory_gib: float, num_cores: int) -> Device:
    """The processors of a machine as one device; peaks are rough."""
    return Device(
        "CPU",
        memory_gib,
        memory_gib,
        CPU_BFLOAT16_FLOPS * num_cores,
        CPU_FLOAT32_FLOPS * num_cores,
        CPU_BANDWIDTH * num_cores,
        CPU_BANDWIDTH,
        f"measured on another machine with two cores; this one has {num_cores}",
        "memory of the machine",
        is_cpu=True,
    )


def find_device(name: str | None = None, memory_gb: float | None = None) -> Device:
    """The device of this name, of this memory, or of both.

    A name may be what nvidia-smi or Ray calls it ("NVIDIA H100 80GB HBM3"). Memory alone takes the device with that
    label. A label that no device in the table has takes the speed of the nearest one, and the share of the label that
    this one can use.

    Raises PlacementError for a name that is not in the table, without a memory.
    """
    named = None if name is None else _named(name, memory_gb)
    if named is None and memory_gb is None:
        known = ", ".join(GPUS)
        raise PlacementError(
            f"The GPU {name!r} is not in the table of devices." if name else "No GPU was named.",
            limit=f"Known are {known}.",
            remedy="Name one of these (--gpu H100), or say how much memory it has (--gpu-memory 80GB).",
        )
    if memory_gb is None:
        assert named is not None
        return named
    if named is None:
        same = [device for device in _PREFERRED if device.label_gb == memory_gb]
        named = (
            same[0]
            if same
            else min(GPUS.values(), key=lambda device: (abs(device.label_gb - memory_gb), device.label_gb))
        )
    if named.label_gb == memory_gb:
        return named
    usable = named.usable_gib / named.label_gb * memory_gb
    return replace(
        named,
        name=f"{named.name} with {memory_gb:g} GB",
        label_gb=memory_gb,
        usable_gib=usable,
        basis=f"the share of its label that {named.name} can use",
    )


SHORTEST_NAME = 4  # "H100", "4090"
_PREFERRED = (GPUS["H100"], *GPUS.values())  # where several have a label


def read_memory(text: str) -> float:
    """GB of a text such as `80GB`, `80` or `81920MiB`. Raises PlacementError for another one."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G|MiB|MB)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise PlacementError(
            f"--gpu-memory {text}: that is not an amount of memory.", remedy="Write it as on the label: 80GB."
        )
    amount, unit = float(match[1]), (match[2] or "GB").lower()
    return amount / 1024 if unit in ("mib", "mb") else amount


def _named(name: str, memory_gb: float | None) -> Device | None:
    """The device that the name means: with letters and digits in the same order, whatever stands between them."""
    wanted = _letters(name)
    if len(wanted) < SHORTEST_NAME:
        return None
    found = [device for device in GPUS.values() if _says(name, device.name) or wanted in _letters(device.name)]
    if not found:
        found = [device for device in GPUS.values() if _says(name, device.name.partition("-")[0])]
    if memory_gb is not None:
        found = sorted(found, key=lambda device: abs(device.label_gb - memory_gb))
    if len(found) > 1 and memory_gb is None:
        # A100: the one whose size is in the name, else the smaller one, on which a plan for either fits.
        sized = [device for device in found if f"{device.label_gb:g}gb" in wanted]
        found = sized or sorted(found, key=lambda device: device.label_gb)
    return found[0] if found else None


def _says(text: str, name: str) -> bool:
    """Whether the text holds the name as a whole: neither an H1000 nor a GH100 is an H100."""
    parts = r"[^a-z0-9]*".join(re.findall(r"[a-z]+|[0-9]+", name.lower()))
    return re.search(rf"(?<![a-z0-9]){parts}(?![0-9])", text.lower()) is not None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
