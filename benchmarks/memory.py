"""A process's own memory, and its peak while something runs (Linux)."""

import threading
from pathlib import Path


class Peak:
    """Samples this process's memory while its block runs."""

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
        """Largest anonymous and resident memory seen, MB."""
        return self._most

    def _sample(self) -> None:
        while not self._stop.wait(0.1):
            now = read_memory()
            self._most = {key: max(value, self._most[key]) for key, value in now.items()}


def read_memory() -> dict[str, float]:
    """Anonymous and resident memory of this process, MB (Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name: round(int(fields[key].split()[0]) * 1024 / 1e6, 1)
        for name, key in (("anonymous", "RssAnon"), ("resident", "VmRSS"))
    }
