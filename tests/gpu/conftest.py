"""The devices that tests of caches run on: the host twin always, CUDA's first one where it is."""

import pytest

from gpu.backend import Device, open_device
from gpu.errors import DeviceError
from gpu.twin.twin import HostTwin


@pytest.fixture(scope="session", params=["host-twin", "host-twin, weak memory", "cuda:0"])
def device(request: pytest.FixtureRequest) -> Device:
    """A device; the twin's weak memory comes with another adversary at every run."""
    if request.param == "host-twin, weak memory":
        return HostTwin("model", seed=1)
    try:
        return open_device(request.param)
    except DeviceError as error:
        if request.param == "host-twin":
            raise
        pytest.skip(str(error))
