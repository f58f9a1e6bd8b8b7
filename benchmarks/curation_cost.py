"""What curation costs: CPU milliseconds an image through `sluice curate`, against the bare loop and against peers.

    python benchmarks/curation_cost.py --quick
    DATA_JUICER_PYTHON=/path/to/venv/bin/python python benchmarks/curation_cost.py

A seeded corpus of JPEGs (corpus.py), 256 to 1600 px, in WebDataset tars, each picture some times over. Every contestant
decodes, hashes, measures size and text, and makes the picture ready for a CLIP of 224 px:

    sluice     `sluice curate` on Ray with two workers: fingerprints, lineage, ledger, report and all; nothing is kept,
               so nothing is packed
    packing    the same with every picture kept, so that its tars are written too
    local      the first, `--local`, in one process
    bare loop  two processes that do nothing but read tars and call the same kernels
    Ray Data   as its documentation has it: read_webdataset with its defaults, then map with Pillow and imagehash
    juicer     data-juicer's text and image filters with two processes; it neither hashes nor prepares for CLIP here

CPU seconds are user and system time of the whole process tree, daemons included, less those of the same command on
eight pictures (its start-up); medians of rounds in which the contestants take turns. They hardly depend on what else
runs here; wall times do. All but data-juicer's results are compared with the bare loop's before anything is believed.
Without --quick, memory (the largest PSS of the process tree) is also measured for 10,000 and 100,000 pictures.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from corpus import make_captions, make_jpegs, write_tars
from harness import conclude, machine
from processes import Cost, cost_of

WORKERS = 2
TINY = 8
ROWS_A_SHARD = 250
MOST_TIMES_BARE = 1.25
MOST_STARTUP_S = 6.0
MOST_PSS_MB = 1500.0
MOST_GROWTH = 1.1
FOLDER = Path(__file__).resolve().parent
STAGES = {
    "decode": {"reduced": True},
    "text": {"type": "text_quality"},
    "quick": {"type": "fast_hash"},
    "pixels": {"type": "clip_pixels"},
}
NOTHING_KEPT = {"none": {"column": "decode.short_side", "at_least": 1 << 20}}


# --- the contestants that are not commands of their own --------------------------------------------------------------


def samples_of(path: str) -> Iterator[tuple[str, bytes, str]]:
    """(key, JPEG, caption) of a tar, by the shortest way."""
    with tarfile.open(path) as archive:
        members = iter(archive)
        for picture, text in zip(members, members, strict=True):
            yield picture.name[:-4], archive.extractfile(picture).read(), archive.extractfile(text).read().decode()


def bare_loop(path: str) -> list[tuple[Any, ...]]:
    """(key, width, height, hash, words, flaw, total of CLIP's bytes) of a tar's samples, by our kernels alone."""
    from stages.clip_score import fast_pixels
    from stages.decode import REDUCED_SIDE, open_header, open_reduced
    from stages.hashing import phash64, reduced_32
    from stages.text_quality import flaw_of, words_of

    rows, greys = [], []
    for key, data, caption in samples_of(path):
        header = open_header(data)
        pixels_YXC = open_reduced(data, REDUCED_SIDE, header=header)
        greys.append(reduced_32(pixels_YXC)[0])
        total = int(fast_pixels(pixels_YXC, REDUCED_SIDE).sum())
        rows.append((key, *header.size, len(words_of(caption)), flaw_of(caption), total))
    hashes = phash64(greys)
    return [(key, w, h, int(bits), *rest) for (key, w, h, *rest), bits in zip(rows, hashes, strict=True)]


def run_bare(folder: str, out: str) -> None:
    from multiprocessing import get_context

    with get_context("spawn").Pool(WORKERS) as pool:
        rows = [row for part in pool.imap_unordered(bare_loop, sorted(glob.glob(f"{folder}/*.tar"))) for row in part]
    names = ("key", "width", "height", "hash", "words", "flaw", "total")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({**columns, "hash": pa.array(columns["hash"], pa.uint64())}), out)


def run_ray_data(folder: str, out: str) -> None:
    """The documented way: default decoders, one Python function a row, Pillow, imagehash, float tensors."""
    import imagehash
    import numpy as np
    import ray
    from PIL import Image

    from stages.text_quality import flaw_of, words_of

    def measure(row: dict[str, Any]) -> dict[str, Any]:
        picture = Image.fromarray(row["jpg"])
        width, height = picture.size
        short = min(width, height)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
        small_YXC = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC, box=box), np.float32) / 255
        return {
            "key": row["__key__"],
            "width": width,
            "height": height,
            "hash": str(imagehash.phash(picture)),
            "words": len(words_of(row["txt"])),
            "flaw": flaw_of(row["txt"]) or "",
            "total": float(small_YXC.sum()),
        }

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ray.data.read_webdataset(folder).map(measure).write_parquet(out)
    ray.shutdown()


# --- what is measured ------------------------------------------------------------------------------------------------


class Workplace:
    """A temporary folder with corpora of a few and of many pictures, and the commands that read them."""

    def __init__(self, root: Path, pictures: int, count: int) -> None:
        self.root = root
        self.counts = {"tiny": TINY, "full": count}
        jpegs, captions = make_jpegs(pictures), make_captions(pictures)
        for name, samples in self.counts.items():
            write_tars(root / name, jpegs, captions, min(ROWS_A_SHARD, samples // WORKERS), samples)
            self._write_files(root / f"{name}-files", jpegs, captions, samples)
        self.mean_bytes = sum(map(len, jpegs)) / pictures
        self.environment = {
            "PYTHONPATH": f"{FOLDER}{os.pathsep}{FOLDER.parent}",
            "SLUICE_CATALOG": f"sqlite:///{root}/catalog.db",
            "HOME": str(root),
            "OMP_NUM_THREADS": "1",
        }
        self.runs = 0

    def _write_files(self, folder: Path, jpegs: list[bytes], captions: list[str], count: int) -> None:
        """The same samples as files with a list of them, which is what data-juicer reads."""
        folder.mkdir()
        lines = []
        for number in range(count):
            path = folder / f"{number % len(jpegs):09d}.jpg"
            if number < len(jpegs):
                path.write_bytes(jpegs[number])
            lines.append(json.dumps({"text": captions[number % len(captions)], "images": [str(path)]}))
        (folder / "list.jsonl").write_text("\n".join(lines) + "\n")

    def fresh(self) -> Path:
        self.runs += 1
        return self.root / f"out{self.runs}"

    def sluice(self, size: str, *more: str, rules: dict[str, Any] = NOTHING_KEPT) -> tuple[Cost, Path]:
        out = self.fresh()
        recipe = out.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({"input": {"url": str(self.root / size)}, "stages": STAGES, "rules": rules}))
        script = str(FOLDER / "curation_stages.py")
        command = [sys.executable, script, "curate", str(recipe), "--output", str(out), *more]
        return cost_of(command, self.environment), out

    def itself(self, way: str, size: str) -> tuple[Cost, Path]:
        out = self.fresh()
        command = [sys.executable, __file__, f"--{way}", str(self.root / size), str(out)]
        return cost_of(command, self.environment), out

    def juicer(self, python: str, size: str) -> tuple[Cost, Path]:
        out = self.fresh()
        process = [
            {"text_length_filter": {"min_len": 1}},
            {"words_num_filter": {"min_num": 1}},
            {"special_characters_filter": {}},
            {"character_repetition_filter": {}},
            {"image_shape_filter": {"min_width": 1, "min_height": 1}},
            {"image_aspect_ratio_filter": {}},
            {"image_size_filter": {"min_size": "1"}},
        ]
        config = out.with_suffix(".juicer.yaml")
        data = {"dataset_path": f"{self.root}/{size}-files/list.jsonl", "export_path": f"{out}/kept.jsonl"}
        config.write_text(yaml.safe_dump({"project_name": "cost", **data, "np": WORKERS, "process": process}))
        program = str(Path(python).parent / "dj-process")
        return cost_of([python, program, "--config", str(config)], {**self.environment, "PYTHONPATH": ""}), out


def ledger_of(out: Path) -> dict[str, tuple[Any, ...]]:
    """(width, height, hash, words, flaw, total) by key, from the snapshot that a run left."""
    names = ("width", "height"), ("fast64",), ("words", "flaw"), ("total",)
    stages = ("decode", "quick", "text", "pixels")
    columns = [f"{stage}.{name}" for stage, group in zip(stages, names, strict=True) for name in group]
    tables = [pq.read_table(path, columns=["key", *columns]) for path in sorted(out.glob("snapshots/*/ledger/*"))]
    return {key: tuple(row) for table in tables for key, *row in zip(*table.to_pydict().values(), strict=True)}


def table_of(out: Path) -> dict[str, tuple[Any, ...]]:
    """The same from a Parquet file or folder of a contestant."""
    table = pq.read_table(out, columns=["key", "width", "height", "hash", "words", "flaw", "total"])
    return {key: tuple(row) for key, *row in zip(*table.to_pydict().values(), strict=True)}


def measure_cost(
    contestants: dict[str, Callable[[str], tuple[Cost, Path]]], place: Workplace, rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, Path]]:
    """(CPU ms an image, start-up wall seconds, peak PSS in MB, an output) of each, start-up taken off."""
    cost_ms: dict[str, list[float]] = {name: [] for name in contestants}
    start_s: dict[str, list[float]] = {name: [] for name in contestants}
    pss_mb: dict[str, list[float]] = {name: [] for name in contestants}
    outputs = {}
    for _ in range(rounds):
        for name, run in contestants.items():
            tiny, _ = run("tiny")
            full, outputs[name] = run("full")
            cost_ms[name].append(1000 * (full.cpu_s - tiny.cpu_s) / (place.counts["full"] - place.counts["tiny"]))
            start_s[name].append(tiny.wall_s)
            pss_mb[name].append(full.peak_pss_mb)
            print(f"  {name:<10}{cost_ms[name][-1]:8.2f} ms, start-up {tiny.wall_s:5.1f} s wall", flush=True)
    medians = [{name: statistics.median(found[name]) for name in found} for found in (cost_ms, start_s, pss_mb)]
    return medians[0], medians[1], medians[2], outputs


def measure_memory(place: Workplace, counts: tuple[int, int]) -> list[float]:
    """Peak PSS (MB) of `sluice curate` on Ray over so many pictures, of up to 512 px so that the disk can hold them."""
    jpegs, captions = make_jpegs(1000, seed=1, most_px=512), make_captions(1000)
    peaks = []
    for count in counts:
        write_tars(place.root / f"many{count}", jpegs, captions, 1000, count)
        cost, _ = place.sluice(f"many{count}", "--workers", str(WORKERS))
        print(f"  {count:,} pictures: {cost.peak_pss_mb:,.0f} MB of PSS at most, {cost.wall_s:.0f} s", flush=True)
        peaks.append(cost.peak_pss_mb)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller case that ends in under a minute")
    parser.add_argument("--bare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--ray-data", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return run_bare(*options.bare)
    if options.ray_data:
        return run_ray_data(*options.ray_data)

    print(machine("ray", "pillow", "simplejpeg", "opencv-python-headless", "imagehash"))
    juicer = os.environ.get("DATA_JUICER_PYTHON", "")
    with tempfile.TemporaryDirectory(prefix="sl-bench-") as folder:
        pictures, count, rounds = (300, 1500, 1) if options.quick else (2000, 4000, 5)
        place = Workplace(Path(folder), pictures, count)
        print(f"{count} samples of {pictures} pictures, {place.mean_bytes / 1000:.0f} KB on average")
        contestants: dict[str, Callable[[str], tuple[Cost, Path]]] = {
            "sluice": lambda size: place.sluice(size, "--workers", str(WORKERS)),
            "bare loop": lambda size: place.itself("bare", size),
            "Ray Data": lambda size: place.itself("ray-data", size),
        }
        if not options.quick:
            contestants["packing"] = lambda size: place.sluice(size, "--workers", str(WORKERS), rules={})
            contestants["local"] = lambda size: place.sluice(size, "--local")
        if juicer:
            contestants["juicer"] = lambda size: place.juicer(juicer, size)
        cost_ms, start_s, pss_mb, outputs = measure_cost(contestants, place, rounds)

        truth = table_of(outputs["bare loop"])
        wrong = [
            name for name in ("sluice", "packing", "local") if name in outputs and ledger_of(outputs[name]) != truth
        ]
        theirs = {key: (row[0], row[1], row[3]) for key, row in table_of(outputs["Ray Data"]).items()}
        if theirs != {key: (row[0], row[1], row[3]) for key, row in truth.items()}:
            wrong.append("Ray Data")
        print(f"results: {'differ: ' + ', '.join(wrong) if wrong else 'equal'} over {len(truth)} pictures")
        peaks = [] if options.quick else measure_memory(place, (10_000, 100_000))

    for name in contestants:
        times = cost_ms[name] / cost_ms["bare loop"]
        print(f"  {name:<10}{cost_ms[name]:8.2f} ms an image, {times:5.2f} times bare, peak PSS {pss_mb[name]:,.0f} MB")
    ours = cost_ms["sluice"]
    flat = not peaks or (peaks[1] <= MOST_GROWTH * peaks[0] and peaks[1] < MOST_PSS_MB)
    peer = f"Ray Data as documented: {cost_ms['Ray Data']:.3g} ms"
    if juicer:
        peer += f"; data-juicer's filters: {cost_ms['juicer']:.3g} ms"
    conclude(
        claim=f"curation costs at most {MOST_TIMES_BARE} times the bare two-process loop over the same kernels",
        value=ours,
        unit="CPU ms an image",
        limit=f"<= {MOST_TIMES_BARE} x bare loop ({cost_ms['bare loop']:.3g} ms); start-up < {MOST_STARTUP_S:.0f} s; "
        f"PSS < {MOST_PSS_MB:.0f} MB and flat from 10,000 to 100,000 pictures",
        peer=peer,
        ratio=cost_ms["Ray Data"] / ours,
        holds=not wrong
        and ours <= MOST_TIMES_BARE * cost_ms["bare loop"]
        and start_s["sluice"] < MOST_STARTUP_S
        and flat,
        times_bare=round(ours / cost_ms["bare loop"], 3),
        startup_s=round(start_s["sluice"], 2),
        pss_mb=[round(peak) for peak in peaks] or round(pss_mb["sluice"]),
        core_hours_per_million=round(ours / 3.6, 3),
    )


if __name__ == "__main__":
    main()
