"""The first GPU of this machine, as NVIDIA's driver describes it."""

import ctypes

COMPUTE_CAPABILITY_ATTRIBUTES = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
PROCESSORS_ATTRIBUTE = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def gpu_capability() -> str | None:
    """Compute capability of the first GPU, such as 89 for 8.9; None without a GPU."""
    numbers = _gpu_attributes(*COMPUTE_CAPABILITY_ATTRIBUTES)
    return None if numbers is None else "".join(map(str, numbers))


def gpu_processors() -> int | None:
    """Number of streaming multiprocessors of the first GPU; None without a GPU."""
    numbers = _gpu_attributes(PROCESSORS_ATTRIBUTE)
    return None if numbers is None else numbers[0]


def gpu_identity() -> dict[str, str | int | None] | None:
    """The facts about the first GPU that decide an engine built on it; None without a GPU.

    Model, compute capability and processors. GPUs with equal facts run each other's engines at the timed speed.
    """
    driver = _driver()
    name = ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGetName(name, len(name), 0) != 0:
        return None
    model = name.value.decode("utf-8", "replace")
    return {"model": model, "capability": gpu_capability(), "processors": gpu_processors()}


def _driver() -> ctypes.CDLL | None:
    """NVIDIA's driver, initialised; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _gpu_attributes(*attributes: int) -> tuple[int, ...] | None:
    """Attributes of the first GPU from the driver; None without a GPU."""
    numbers = [ctypes.c_int(0) for _ in attributes]
    driver = _driver()
    if driver is None:
        return None
    for number, attribute in zip(numbers, attributes, strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0) != 0:
            return None
    return tuple(number.value for number in numbers)
