"""How busy a captioning server is kept, and what failures cost: the client against a server of fixed latency.

    python benchmarks/captioning.py --quick

First the answers: with a third of all requests failing (429, 500, cut short, dropped, no JSON) every picture must end
with an answer, recorded once, and nothing may be asked again after it was recorded. Then the load: 64 requests in
flight, each answered after a fixed time, from JPEGs of 1024x768 that are decoded, made small and encoded meanwhile,
and with every answer flushed to the disk before it is used. Busy is the share of the 64 places that were taken from the
first request to the last answer; the start and the end of the run, when places must be empty, are in it.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import arguments, conclude, machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.contract import Batch, Context
from stages.decode import EncodedImage
from stages.recaption import Recaption
from tests.pipelines import raw
from tests.stages.chat_server import ChatServerForTests

IN_FLIGHT = 64
LEAST_BUSY = 0.9
FAILURES = ("rate limited", "broken", "malformed", "cut short", "dropped")


def batch(count: int, size: tuple[int, int]) -> Batch:
    images = [EncodedImage(raw.jpeg(raw.picture(number, size))) for number in range(count)]
    return Batch({"image_id": [f"{number:032x}" for number in range(count)]}, images)


def asked(server: ChatServerForTests, pictures: Batch, **options: object) -> tuple[list[str], float, float]:
    """(status of every row, seconds, retries) of one batch."""
    with tempfile.TemporaryDirectory() as folder:
        stage = Recaption(engine="server", server=server.url, model="seer", in_flight=IN_FLIGHT, **options)
        measure = stage.open(Context(cache=folder))
        began = time.monotonic()
        answer = measure(pictures)
        seconds = time.monotonic() - began
        return [row[0] for row in answer.values["statuses"]], seconds, measure.spent["retries"]


def main() -> None:
    options = arguments(__doc__)
    print(machine("aiohttp", "pillow"))
    claim = f"{IN_FLIGHT} requests in flight keep a server of fixed latency at least {LEAST_BUSY:.0%} busy"
    limit = f"every row answered once; busy >= {LEAST_BUSY}"

    draw = random.Random(0)
    behaviour = [draw.choice(FAILURES) if draw.random() < 1 / 3 else "well" for _ in range(5000)]
    with ChatServerForTests(lambda number, text: behaviour[number]) as server:
        statuses, seconds, retries = asked(server, batch(400, (64, 48)), attempts=12)
        good = Counter(one.question for one in server.served if one.behaviour == "well")
    print(f"failing server: {Counter(statuses)}, {retries:.0f} retries, {400 / seconds:.0f} answers/s")
    if set(statuses) != {"success"} or len(good) != 400 or set(good.values()) != {1}:
        conclude(claim=claim, value=0, unit="busy", limit=limit, peer="none", ratio=None, holds=False)

    latency_s, rounds = (2.0, 12) if options.quick else (2.0, 40)
    with ChatServerForTests(latency_s=latency_s) as server:
        pictures = batch(IN_FLIGHT * rounds, (1024, 768))
        _, seconds, _ = asked(server, pictures)
        span = max(one.ended for one in server.served) - min(one.began for one in server.served)
    busy = len(server.served) * latency_s / (IN_FLIGHT * span)
    print(f"{len(server.served)} answers of {latency_s} s each in {seconds:.1f} s, most at once {server.most_at_once}")
    conclude(
        claim=claim,
        value=busy,
        unit="busy",
        limit=limit,
        peer=f"a server that is always full: {IN_FLIGHT / latency_s:.0f} answers/s",
        ratio=busy,
        holds=busy >= LEAST_BUSY and server.most_at_once <= IN_FLIGHT,
        answers_per_second=round(len(server.served) / span, 1),
        retries_of_failing_server=int(retries),
    )


if __name__ == "__main__":
    main()
