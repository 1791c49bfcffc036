"""Random numbers of a run, apart from those of the process that it runs in."""

import contextlib
from collections.abc import Iterator

import torch

FORKED = ("cuda", "xpu")
"""Devices whose random numbers are restored after a run; other devices have none, or no way to read their state."""


class RandomNumbers:
    """What torch draws while this is in force: the same for the same seed, whatever the process has drawn.

    A run draws the first values of its weights, and dropout where the base model has some; all else it draws by
    generators.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.device = torch.device(device)
        self._state: torch.Tensor | None = None
        self._device_state: torch.Tensor | None = None
        self._is_in_force = False

    @property
    def state(self) -> torch.Tensor:
        """What the next number of the CPU depends on, for a checkpoint."""
        if self._is_in_force:
            return torch.get_rng_state()
        if self._state is None:
            return torch.Generator().manual_seed(self.seed).get_state()
        return self._state

    def go_on_from(self, state: torch.Tensor) -> None:
        """Draw what a run would that had been at `state`; not while this is in force."""
        assert not self._is_in_force
        self._state = state

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Draw from these numbers in the body, and from the process's again after it."""
        kind = self.device.type
        devices = [self.device] if kind in FORKED else []
        with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
            torch.manual_seed(self.seed)  # of all devices
            if self._state is not None:
                torch.set_rng_state(self._state)
            if self._device_state is not None:
                torch.get_device_module(self.device).set_rng_state(self._device_state, self.device)
            self._is_in_force = True
            try:
                yield
            finally:
                self._is_in_force = False
                self._state = torch.get_rng_state()
                if devices:
                    self._device_state = torch.get_device_module(self.device).get_rng_state(self.device)
