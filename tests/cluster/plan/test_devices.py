"""The table of devices, and how a name or a label finds its row."""

from __future__ import annotations

import re

import pytest

from cluster.plan.budget import Budget
from cluster.plan.devices import GPUS, find_device, read_memory, this_cpu
from rlhf.errors import PlacementError


def test_usable_memory_is_less_than_the_label_and_says_its_basis() -> None:
    for device in GPUS.values():
        assert device.usable_gib < device.label_gb
        assert device.basis and device.source
        assert device.bfloat16_flops > device.float32_flops


def test_peaks_are_dense_and_are_those_of_the_source_that_is_named() -> None:
    for device in GPUS.values():
        told = re.search(r"BF16 (?:with FP32 accumulate )?([\d.,]+)( PFLOPS)?( with sparsity)?", device.source)
        assert told is not None, device.name
        tera = float(told[1].rstrip(",").replace(",", "")) * (1000 if told[2] else 1) / (2 if told[3] else 1)
        assert device.bfloat16_flops == pytest.approx(tera * 1e12, rel=1e-3), device.name


@pytest.mark.parametrize(
    ("name", "memory", "found"),
    [
        ("H100", None, "H100"),
        ("NVIDIA H100 80GB HBM3", None, "H100"),
        ("h200", None, "H200"),
        ("NVIDIA A100-SXM4-40GB", None, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", None, "A100-80GB"),
        ("A100", None, "A100-40GB"),  # the smaller: a plan for it fits both
        ("A100", 80, "A100-80GB"),
        ("4090", None, "RTX-4090"),
        ("NVIDIA GeForce RTX 4090", None, "RTX-4090"),
        ("NVIDIA RTX4090", None, "RTX-4090"),
        ("h100-80g", None, "H100"),
        (None, 80, "H100"),
        (None, 24, "RTX-4090"),
        (None, 48, "L40S"),
    ],
)
def test_a_device_is_found_by_name_or_label(name: str | None, memory: float | None, found: str) -> None:
    assert find_device(name, memory) == GPUS[found]


def test_another_label_can_use_the_share_that_the_nearest_device_can() -> None:
    device = find_device(None, 32)
    assert device.name == "RTX-4090 with 32 GB"
    assert device.usable_gib == pytest.approx(32 * 23.52 / 24)
    assert device.bfloat16_flops == GPUS["RTX-4090"].bfloat16_flops


@pytest.mark.parametrize("name", ["V100", "", "4", None, "H1000", "NVIDIA GH200 480GB", "B2000"])
def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are(name: str | None) -> None:
    with pytest.raises(PlacementError, match="Known are A100-40GB"):
        find_device(name)


@pytest.mark.parametrize(("text", "amount"), [("80GB", 80), ("80", 80), ("24 GiB", 24), ("81920MiB", 80)])
def test_memory_is_read_as_people_write_it(text: str, amount: float) -> None:
    assert read_memory(text) == amount


@pytest.mark.parametrize("text", ["much", "-1GB", "0", "80TB"])
def test_what_is_no_memory_is_refused(text: str) -> None:
    with pytest.raises(PlacementError, match="Write it as on the label"):
        read_memory(text)


def test_ranks_of_one_engine_stay_on_one_node() -> None:
    budget = Budget(12, 8, GPUS["H100"])
    assert budget.nodes == [8, 4]
    assert budget.holds(0, 3, 4)
    assert not budget.holds(0, 2, 8)  # the second node has four
    assert budget.holds(4, 1, 8)
    assert not budget.holds(5, 1, 8)
    assert Budget(0, 8, this_cpu(16, 2)).nodes == []
