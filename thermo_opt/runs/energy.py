"""Joules a training run draws, where the machine has a meter: NVML on a GPU, RAPL on a CPU, both
read through Zeus.

Joules and nats are two different costs. k_B T·Q is the least heat that *some* physical process must
give off to move the predictions as far in as many steps; at room temperature a nat is 4·10⁻²¹ J. A
computer draws some twenty orders of magnitude more, for arithmetic that Q knows nothing of. Neither
number can be computed from the other.
"""

from __future__ import annotations

from typing import Any

from thermo_opt.errors import InputError


class EnergyMeter:
    """Counts the joules that all visible GPUs and CPU packages draw; other work on them counts too.

    Raises InputError saying why there is nothing to read: no library (the ``energy`` extra), no
    meter, no permission. Cost of a reading: a synchronisation of the GPU and one counter a device;
    NVML counters advance every 20-100 ms, so single short steps are coarse and sums over many are
    not.
    """

    def __init__(self) -> None:
        try:
            from zeus.monitor import ZeusMonitor
        except ImportError:
            raise InputError(
                "energy: its library isn't installed; pip install 'thermo-opt[energy]'"
            ) from None
        try:
            self._monitor: Any = ZeusMonitor()
        except Exception as error:  # whatever a driver raises
            raise InputError(
                f"energy: the meter can't be opened ({type(error).__name__}: {error})"
            ) from None
        devices = [f"GPU {i}" for i in self._monitor.gpu_indices] + [
            f"CPU {i}" for i in self._monitor.cpu_indices
        ]
        if not devices:
            raise InputError(
                "energy: this machine has no meter that may be read (NVML on a GPU, RAPL on a CPU)"
            )
        self.devices: list[str] = devices
        self._windows = 0
        self._monitor.begin_window(self._key())

    def read(self) -> float:
        """Joules drawn since the last `read` or `restart`."""
        last = self._key()
        self._windows += 1
        self._monitor.begin_window(
            self._key()
        )  # before the last one ends, so that nothing falls between them
        found = self._monitor.end_window(last)
        return float(sum(found.gpu_energy.values()) + sum((found.cpu_energy or {}).values()))

    def restart(self) -> None:
        """Leave out what was drawn since the last reading."""
        self.read()

    def _key(self) -> str:
        return f"thermo-opt {self._windows}"
