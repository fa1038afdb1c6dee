"""A process's own memory, and its peak in a block of code (Linux)."""

import threading
from pathlib import Path


class Peak:
    """Context manager that samples this process's memory while its block runs."""

    def __enter__(self) -> "Peak":
        self._stop = threading.Event()
        self._most = read_memory()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> dict[str, float]:
        """Return the largest sampled anonymous and resident memory, MB."""
        return self._most

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            now = read_memory()
            self._most = {key: max(value, self._most[key]) for key, value in now.items()}


def read_memory() -> dict[str, float]:
    """Return the anonymous and resident memory of this process, MB (Linux)."""
    fields = _fields()
    return {"anonymous": fields["RssAnon"], "resident": fields["VmRSS"]}


def peak_resident() -> float:
    """Return the largest resident memory of this process so far, MB (Linux)."""
    return _fields()["VmHWM"]


def _fields() -> dict[str, float]:
    """Return the kernel's figures about this process's memory, MB."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: round(int(words[1]) * 1024 / 1e6, 1) for words in lines if words[-1] == "kB"}
