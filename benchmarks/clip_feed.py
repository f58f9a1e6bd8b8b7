"""Is a CLIP kept busy? The scoring worker, fed from tars, against the same model in a bare loop over input in memory.

    python benchmarks/clip_feed.py --quick

A ViT-B/32 (open_clip's, random weights, bf16) scores a tar of JPEGs of 256 to 1600 px on one thread:

    worker     pipelines.measure.MeasureWorker with the clip_score stage: reads the tar, decodes, resizes and tokenizes
               in other threads while the towers compute, and writes its units
    bare loop  the same towers over the same batches, pixels and tokens made ready beforehand

Scores must be equal to the last bit before anything is timed. The claim is about wall time: a worker has one core for
its towers and others feed it. The CPU seconds beside it say what feeding takes where every core has a tower of its own.
Rounds take turns and the medians of their ratios are shown; other work on the machine makes wall times poor evidence.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from corpus import make_captions, make_jpegs, write_tars
from harness import arguments, conclude, machine
from pipelines.measure import MeasureWorker, StageJob
from pipelines.readers import InputShard
from stages.clip_score import ClipScore
from stages.contract import Batch
from stages.decode import EncodedImage

LEAST_SHARE = 0.95
BATCH = 32
CONFIG = {
    "model_cfg": {
        "embed_dim": 512,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
    "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]},
}


def write_model(folder: Path) -> None:
    """A ViT-B/32 with random weights in open_clip's local format."""
    import open_clip
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


class Fed:
    """The worker as a run has it, told to measure one tar anew each time."""

    def __init__(self, root: Path, tar: Path, stage: ClipScore) -> None:
        self.root, self.tar, self.runs = root, tar, 0
        job = StageJob("clip", stage).to_json()
        self.worker = MeasureWorker(
            {"store": str(root / "store"), "models": [str(root)], "device": "cpu", "transport_batch": 16, "jobs": [job]}
        )

    def __call__(self) -> list[float]:
        import pyarrow.parquet as pq

        self.runs += 1
        shard = InputShard(self.tar.name, str(self.tar), "webdataset")
        rows, unit = (f"units/{kind}-{self.runs}.parquet" for kind in ("rows", "clip"))
        task = {
            "shard": shard.to_json(),
            "digest": "d",
            "rows": rows,
            "units": {"clip": unit},
            "todo": ["clip"],
            "gate": "",
        }
        self.worker(task)
        return pq.read_table(self.root / "store" / unit)["score"].to_pylist()


class Bare:
    """The same towers over batches that lie in memory."""

    def __init__(self, measure: Any, jpegs: list[bytes], captions: list[str]) -> None:
        self.measure = measure
        batch = Batch({"caption": captions}, [EncodedImage(data) for data in jpegs])
        self.batches = []
        for first in range(0, len(jpegs), BATCH):
            rows = [measure.prepare(batch, row) for row in range(first, first + BATCH)]
            pixels = torch.stack([torch.as_tensor(row.pixels) for row in rows])
            self.batches.append((pixels, torch.stack([row.tokens for row in rows])))

    def __call__(self) -> list[float]:
        torch.set_num_threads(self.measure.threads)
        return [float(cosine) for pixels, tokens in self.batches for cosine in self.measure._towers(pixels, tokens)[0]]


def main() -> None:
    options = arguments(__doc__)
    print(machine("torch", "open-clip-torch", "simplejpeg"))
    batches, rounds = (4, 1) if options.quick else (12, 5)
    count = batches * BATCH
    jpegs, captions = make_jpegs(count), make_captions(count)
    shares: dict[str, float] = {}
    cpu: dict[str, float] = {}
    wrong = []
    with tempfile.TemporaryDirectory(prefix="sl-bench-") as folder:
        root = Path(folder)
        write_model(root / "vit")
        (tar,) = write_tars(root / "tars", jpegs, captions, count, count)
        rate = 0.0
        for how in ("fast",) if options.quick else ("fast", "exact"):
            stage = ClipScore(model="vit", precision="bf16", preprocessing=how, compute_batch=BATCH)
            fed = Fed(root, tar, stage)
            measure = fed.worker.measure_of(fed.worker.jobs[0])
            bare = Bare(measure, jpegs, captions)
            if fed() != bare():
                wrong.append(how)
            found, spent = [], []
            for _ in range(rounds):
                wall_s, cpu_s = [], []
                for run in (fed, bare):
                    began, cpu_began = time.perf_counter(), time.process_time()
                    run()
                    wall_s.append(time.perf_counter() - began)
                    cpu_s.append(time.process_time() - cpu_began)
                found.append(wall_s[1] / wall_s[0])
                spent.append(cpu_s[1] / cpu_s[0])
                rate = max(rate, count / wall_s[0])
            shares[how], cpu[how] = statistics.median(found), statistics.median(spent)
            print(f"{how} preprocessing: {shares[how]:.1%} of the bare loop by wall time, {cpu[how]:.1%} by CPU time")
    conclude(
        claim=f"CLIP scoring reaches {LEAST_SHARE:.0%} of the same model in a bare loop with its input in memory",
        value=100 * shares["fast"],
        unit="% of the bare loop's images/s",
        limit=f"scores equal; >= {100 * LEAST_SHARE:.0f} %",
        peer="the bare loop, 100 %",
        ratio=shares["fast"],
        holds=not wrong and shares["fast"] >= LEAST_SHARE,
        wall_share={how: round(share, 3) for how, share in shares.items()},
        cpu_share={how: round(share, 3) for how, share in cpu.items()},
        images_per_second=round(rate, 1),
    )


if __name__ == "__main__":
    main()
