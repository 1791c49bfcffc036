"""Where the models of a benchmark are, and in which dtype: set once per process, as the number of threads is."""

import dataclasses

import psutil
import torch


@dataclasses.dataclass
class Placement:
    """A device and a dtype.

    Attributes:
        device: of all models and token ids.
        dtype: of all weights.
    """

    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    @property
    def is_cpu(self) -> bool:
        """Whether resident memory is what counts, and nothing runs asynchronously."""
        return self.device.type == "cpu"

    @property
    def expected_flops_per_second(self) -> float:
        """What is expected of a system that was not timed yet: only whether a cell is skipped depends on it."""
        return 1e11 if self.is_cpu else 1e13

    def synchronize(self) -> None:
        """Wait for what runs on the device."""
        if not self.is_cpu:
            torch.accelerator.synchronize(self.device)

    def available_bytes(self) -> int:
        """Return the memory that can be taken: without swapping, or on the device."""
        if self.is_cpu:
            return psutil.virtual_memory().available
        return torch.get_device_module(self.device).mem_get_info(self.device)[0]

    def describe(self, machine: str) -> str:
        """Return the name of the machine, with that of the device where it is not the processor."""
        if self.is_cpu:
            return machine
        name = torch.get_device_module(self.device).get_device_name(self.device)
        return f"{name} ({str(self.dtype).removeprefix('torch.')}), {machine}"


PLACEMENT = Placement()


def place(device: torch.device, dtype: torch.dtype) -> None:
    """Put all models that are built from now on there."""
    PLACEMENT.device, PLACEMENT.dtype = device, dtype
