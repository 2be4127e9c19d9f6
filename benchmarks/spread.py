"""How much memory each of two workers takes while a base is loaded for ZeRO 3.

    python -m benchmarks.spread [--layers 12] [--hidden 1024] [--json FILE]

Writes a random decoder in bfloat16 and loads it on two workers (Gloo, CPU), each time in processes of their own: *whole
first*, as a base that is not spread is loaded, with the copy that moving it to a device makes, and then cut; and
*spread*, as ZeRO 3 loads it. Prints the peak of each worker's own memory (without mapped files) over what it had
before. In float32 the weights are of another dtype than the files, so that rank 0 has to make a copy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.engine import attach
from actors.load import load, load_spread
from configs.schema import Dtype, ModelConfig

MIB = 2**20
LOOK_S = 0.001
DTYPES: tuple[Dtype, ...] = ("bfloat16", "float32")


class Peak:
    """The largest memory of this process, that is no mapped file, since the start; MiB over what it had then."""

    def __init__(self) -> None:
        self._start = self._most = own_mib()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def end(self) -> float:
        """The peak."""
        self._over.set()
        self._thread.join()
        return self._most - self._start

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self._most = max(self._most, own_mib())


def own_mib() -> float:
    """Memory of this process that is no mapped file, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def main() -> None:
    """Prints a line for each dtype and way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tenfold-spread-") as name:
        folder = Path(name)
        size_mib = write_model(folder / "model", options.layers, options.hidden)
        print(f"{size_mib:.0f} MiB in bfloat16\n{'dtype':10} {'way':12} {'rank 0, MiB':>12} {'rank 1, MiB':>12}")
        for dtype in DTYPES:
            for way in ("whole first", "spread"):
                out = folder / f"{dtype}-{way}"
                out.mkdir()
                spawn(_rank, (folder / "model", out, dtype, way), nprocs=2)
                peaks = [float((out / f"{rank}").read_text()) for rank in (0, 1)]
                rows.append({"dtype": dtype, "way": way, "peak_mib": peaks})
                print(f"{dtype:10} {way:12} {peaks[0]:12.0f} {peaks[1]:12.0f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"size_mib": size_mib, "rows": rows}, indent=2))


def write_model(folder: Path, num_layers: int, hidden: int) -> float:
    """The size of the weights in MiB."""
    sizes = LlamaConfig(
        vocab_size=16_000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters()) / MIB


def _rank(rank: int, model: Path, out: Path, dtype: Dtype, way: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    attach(rank, 2)
    config = ModelConfig(path=str(model), dtype=dtype)
    peak = Peak()
    made = load_spread(config) if way == "spread" else _whole_first(config)
    (out / f"{rank}").write_text(str(peak.end()))
    del made
    torch.distributed.destroy_process_group()


def _whole_first(config: ModelConfig) -> Any:
    model = load(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as on its way to a device
    deepspeed.zero.Init(module=model)
    return model


if __name__ == "__main__":
    main()
