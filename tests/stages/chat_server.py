"""A chat-completions server on this machine that can also misbehave, and keeps a book of what it was asked.

    with ChatServerForTests(behave=lambda number, text: "rate limited" if number % 5 == 0 else "well") as server:
        server.url, server.served

Each request gets a number from 0; `behave(number, prompt)` names what happens to it: well, slow, rate limited, broken,
malformed, cut short, dropped, too long, filtered, bad request, forbidden or never.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from PIL import Image


@dataclass
class Served:
    """One request: what it asked (picture and words), how it was treated and when."""

    question: str
    behaviour: str
    began: float
    ended: float = 0.0
    side: int = 0


class ChatServerForTests:
    def __init__(
        self, behave: Callable[[int, str], str] = lambda number, text: "well", latency_s: float = 0.0, port: int = 0
    ) -> None:
        self.behave, self.latency_s, self.port = behave, latency_s, port
        self.served: list[Served] = []
        self.most_at_once = self._now_at_once = 0

    def __enter__(self) -> ChatServerForTests:
        started = threading.Event()
        self.loop = asyncio.new_event_loop()

        async def serve() -> None:
            app = web.Application(client_max_size=1 << 26)
            app.router.add_get("/v1/models", self._models)
            app.router.add_post("/v1/chat/completions", self._answer)
            self.runner = web.AppRunner(app, access_log=None)
            await self.runner.setup()
            site = web.TCPSite(self.runner, "127.0.0.1", self.port, shutdown_timeout=0.1)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
            started.set()

        def run() -> None:
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(serve())
            self.loop.run_forever()

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "seer"}, {"id": "other"}]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        began = time.monotonic()
        self._now_at_once += 1
        self.most_at_once = max(self.most_at_once, self._now_at_once)
        try:
            return await self._treat(request, began)
        finally:
            self._now_at_once -= 1

    async def _treat(self, request: web.Request, began: float) -> web.StreamResponse:
        body = await request.json()
        picture, words = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
        question = hashlib.sha256(data).hexdigest()[:8] + f" {words['text']} {body['seed']}"
        served = Served(question, self.behave(len(self.served), words["text"]), began)
        served.side = max(Image.open(io.BytesIO(data)).size)
        self.served.append(served)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        try:
            return await self._send(request, served.behaviour, question, body["max_tokens"])
        finally:
            served.ended = time.monotonic()

    async def _send(self, request: web.Request, behaviour: str, question: str, most: int) -> web.StreamResponse:
        text = f"A picture that is known as {question.split()[0]}."
        usage = {"prompt_tokens": 100, "completion_tokens": 8}
        choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if behaviour == "slow":
            await asyncio.sleep(0.2)
        elif behaviour == "never":
            await asyncio.sleep(3600)
        elif behaviour == "rate limited":
            return web.Response(status=429, headers={"Retry-After": "0.05"}, text="too many")
        elif behaviour == "broken":
            return web.Response(status=500, text="Internal Server Error")
        elif behaviour == "malformed":
            return web.Response(text='{"choices": [{"mess', content_type="application/json")
        elif behaviour == "bad request":
            return web.json_response({"error": {"message": "the picture cannot be read"}}, status=400)
        elif behaviour == "forbidden":
            return web.Response(status=401, text="no such key")
        elif behaviour == "too long":
            choice["finish_reason"] = "length"
            usage["completion_tokens"] = most
        elif behaviour == "filtered":
            choice["finish_reason"] = "content_filter"
        payload = json.dumps({"choices": [choice], "usage": usage}).encode()
        if behaviour in ("cut short", "dropped"):
            response = web.StreamResponse(headers={"Content-Length": str(len(payload))})
            if behaviour == "cut short":
                await response.prepare(request)
                await response.write(payload[: len(payload) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        return web.Response(body=payload, content_type="application/json")
