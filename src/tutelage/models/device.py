"""Devices by name: the one place of the code that knows what accelerators are called.

All else asks torch (`torch.accelerator`) or takes the device it is given.
"""

import importlib

import torch

from tutelage.core.errors import EngineError

DEVICE_MODULES = {"npu": "torch_npu"}
"""Devices whose backend is a package of its own: it registers itself with torch when imported."""


def pick_device(name: str) -> torch.device:
    """The device of this name; `auto` is the machine's accelerator, or the CPU where it has none.

    Raises EngineError when the machine lacks it.
    """
    if name in DEVICE_MODULES:
        try:
            importlib.import_module(DEVICE_MODULES[name])
        except ImportError as error:
            raise EngineError(
                f"device {name!r} needs the package {DEVICE_MODULES[name]} ({error}); "
                "install it, or set runtime.device to auto"
            ) from error
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name == "auto" and found is None):
        return torch.device("cpu")
    if found is None or name not in ("auto", found.type):
        has = f"it has {found.type}" if found else "it has only the CPU"
        raise EngineError(f"no device {name!r} on this machine: {has}; set runtime.device to auto")
    return found
