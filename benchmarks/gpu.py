"""`gpu`: a cache of rows in device memory: look-ups and updates against its bandwidth and against torch, and what they cost.

With CuPy and a CUDA device the engine is "cuda": 16 million slots, dim 64, float32, 80 % full, a million uniform keys a launch.
Without, it is "host-twin": the same kernels by the C++ compiler, lane by lane, at a small size. That shows that all of this
runs; its rates say nothing about a device, so that they stand apart, as `host_twin`.

On either, from the compiler alone: registers and resident warps by architecture, spills, bytes of a row; and on paper the rows
a second that a device's bandwidth allows.
"""

from collections.abc import Callable

from benchmarks.common import Figure
from benchmarks.device import beside_torch, load, static
from benchmarks.device.published import publish_to_visible
from gpu.backend import Device, open_device
from gpu.errors import DeviceError
from gpu.layout import Shape
from gpu.nvrtc import ARCHES, Resources

TARGETS = {
    "spills": "<= 0",
    "lookup_vs_torch": ">= 0.6",
    "apply_vs_index_copy": ">= 0.5",
    "hbm_fraction": ">= 0.6",
    "p99_ratio_applying": "<= 1.5",
}
ARCHES_QUICK = (90,)


def run(quick: bool) -> dict[str, Figure]:
    """Measure on a device where there is one, on the host twin otherwise; and count what the compiler tells."""
    device, why = _device()
    cuda = device.name.startswith("cuda")
    figures: dict[str, Figure] = {"engine": "cuda" if cuda else "host-twin"}
    if cuda:
        bed = load.Bed.make(device, load.CUDA_QUICK if quick else load.CUDA)
        measured = _measured(bed, quick)
        figures |= measured
        figures |= beside_torch.compare(bed, int(device.name.removeprefix("cuda:")), measured["lookup_bytes_per_s"])
    else:
        bed = load.Bed.make(device, load.TWIN_QUICK if quick else load.TWIN)
        for figure in sorted(TARGETS.keys() - {"spills"}):
            figures |= {figure: None, f"note_{figure}": "measured on a device only"}
        figures |= {
            "why_no_device": why,
            "host_twin": [{"figure": name, "measured": it} for name, it in _measured(bed, quick).items()],
        }
    return figures | on_paper(ARCHES_QUICK if quick else ARCHES)


def _measured(bed: load.Bed, quick: bool) -> dict[str, float]:
    return {
        "slots": bed.cache.shape.slots,
        "keys_of_a_launch": bed.size.batch,
        **load.throughput(bed),
        **load.latency(bed),
        **load.visible(bed),
        **publish_to_visible(bed.device.name, quick),
    }


def on_paper(arches: tuple[int, ...] = ARCHES) -> dict[str, Figure]:
    """What the compiler and the layout tell."""
    taken = static.resources(arches)
    shape = Shape(1, 64, "float32")
    return {
        "spills": sum(one.spill_bytes + one.stack_bytes for of in taken.values() for one in of.values()),
        "bytes_per_lookup": static.lookup_bytes(shape),
        "bytes_per_pooled_key": static.pooled_bytes(shape),
        "bytes_per_apply": static.apply_bytes(shape),
        "registers": _grid(taken, lambda one, _: one.registers),
        "resident_warps": _grid(taken, lambda one, arch: round(static.occupancy(one, arch), 2)),
        "row_costs": static.row_costs(),
        "roofline_million_rows_per_s": [{"memory": name, **rates} for name, rates in static.roofline(shape).items()],
    }


def _grid(taken: dict[str, dict[int, Resources]], value: Callable[[Resources, int], float | int]) -> Figure:
    return [
        {"kernel": kernel, **{f"sm_{arch}": value(one, arch) for arch, one in of.items()}}
        for kernel, of in sorted(taken.items())
    ]


def _device() -> tuple[Device, str]:
    """The device to measure on, and why it is no CUDA device."""
    try:
        return open_device("cuda:0"), ""
    except DeviceError as error:
        return open_device("host-twin"), str(error)
