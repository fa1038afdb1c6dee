"""Speed and memory of reading, encoding and packing rows of Alpaca's size, also from the cache. See `--help`.

Rows are random words, on average as long as Alpaca's. Memory is the anonymous memory of the process and its children,
sampled in each part; memory-mapped results do not count. Prints one JSON line last.
"""

import argparse
import json
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from lola_ft.environment import usable_cores
from lola_ft.nano.build import train_tokenizer
from lola_ft.recipe.schema import Data
from lola_ft.training import dataset
from lola_ft.training.packing import ready

_SYLLABLES = ("ka", "mu", "ndi", "to", "le", "shi", "ra", "wen", "pol", "ti", "an", "ber", "sa", "ko", "gri", "ust")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=0, help="threads; 0 for what a run takes")
    parser.add_argument("--vocab", type=int, default=16384)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        os.environ["LOLA_FT_CACHE"] = str(Path(folder) / "cache")
        print(json.dumps(measure(Path(folder), args.rows, args.workers, args.vocab)))


def measure(folder: Path, rows: int, workers: int, vocab: int) -> dict[str, Any]:
    """Encode a generated file twice, then pack its rows."""
    words = make_words()
    tokenizer = train_tokenizer(texts(words, 3000), vocab_size=vocab, max_length=2048)
    file = write_rows(folder / "rows.jsonl", words, rows)
    data = Data.model_validate({"sources": [{"path": str(file), "format": "alpaca", "language": "en"}]})
    if workers:
        dataset._MOST_THREADS = workers
    before = own_memory()
    first_s, peak, made = timed(lambda: dataset.prepare(data, tokenizer, seed=0))
    again_s, peak_again, found = timed(lambda: dataset.prepare(data, tokenizer, seed=0))
    assert found.note, "the second time the rows come from the cache"
    assert found.train.dataset._fingerprint == made.train.dataset._fingerprint, "the cache holds other rows"
    del found
    pack_s, peak_packing, packed = timed(lambda: ready(made.mix.dataset, packing=True, max_length=data.max_length))
    plain_s, peak_plain, plain = timed(lambda: ready(made.mix.dataset, packing=False, max_length=data.max_length))
    assert len(plain) == rows, "every row has something to learn"
    return {
        "rows": rows,
        "file_mb": round(file.stat().st_size / 1e6, 1),
        "tokens": made.mix.tokens,
        "workers": min(usable_cores(), dataset._MOST_THREADS),
        "encode_s": round(first_s, 1),
        "rows_per_s": round(rows / first_s),
        "before_mb": round(before / 1e6),
        "peak_mb": round(peak / 1e6),
        "from_cache_s": round(again_s, 1),
        "from_cache_peak_mb": round(peak_again / 1e6),
        "packed_rows": len(packed),
        "pack_s": round(pack_s, 1),
        "pack_peak_mb": round(peak_packing / 1e6),
        "not_packed_s": round(plain_s, 1),
        "not_packed_peak_mb": round(peak_plain / 1e6),
        "after_mb": round(own_memory() / 1e6),
    }


def make_words() -> list[str]:
    """Return four thousand words, of which frequent ones are short."""
    draw = random.Random(0)
    return sorted({"".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(4000)}, key=len)


def texts(words: list[str], count: int) -> list[str]:
    draw = random.Random(1)
    weights = [1 / (place + 5) for place in range(len(words))]
    return [" ".join(draw.choices(words, weights, k=60)) for _ in range(count)]


def write_rows(file: Path, words: list[str], rows: int) -> Path:
    """Write rows like Alpaca's: instructions of ten words, inputs of eight in every third row, answers of fifty."""
    draw = random.Random(2)
    pool = draw.choices(words, [1 / (place + 5) for place in range(len(words))], k=200_000)

    def some(count: int) -> str:
        start = draw.randrange(len(pool) - count)
        return " ".join(pool[start : start + count])

    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            row = {
                "instruction": f"{number} {some(10)}",
                "input": some(8) if number % 3 == 0 else "",
                "output": some(draw.randint(5, 95)),
            }
            out.write(json.dumps(row) + "\n")
    return file


def timed(work: Any) -> tuple[float, int, Any]:
    """Return the seconds of `work`, its peak memory, and its result."""
    done, peak = threading.Event(), [own_memory()]

    def watch() -> None:
        while not done.wait(0.2):
            peak[0] = max(peak[0], own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return time.perf_counter() - began, max(peak[0], own_memory()), result


def own_memory() -> int:
    """Return the anonymous bytes of this process and its children."""
    this = psutil.Process()
    return sum(anonymous(process.pid) for process in [this, *this.children(recursive=True)])


def anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:  # the process has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
