"""Questions to any server that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, hosted ones).

    server = ChatServer("http://localhost:8000/v1", "some-vlm", Limits(in_flight=64))
    server.check()                                                # one sentence, at once, if it is not there
    answers = server.ask_all(questions, record)

`in_flight` questions are under way at any time. A failure that may pass (no connection, a dropped one, a timeout, 408,
429, 5xx, a body that is cut short or no JSON) is tried again after a pause that doubles, with jitter; a Retry-After of
the server holds back every question until then. What will not pass (400, 413, ...) is that question's error; a refused
key or an unknown model (401, 403, 404) and a server that has stopped answering end the run, which finds everything that
was recorded when it is started again. Answers are recorded before anything else is made of them.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from stages.captioners import ERROR, REFUSED, SKIPPED, SUCCESS, TRUNCATED, Answer, Sampling

MAY_PASS = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
HOPELESS = {401, 403, 404}
LONGEST_BODY = 4 << 20
LONGEST_REASON = 200


class ServerError(RuntimeError):
    """A server that cannot be used; the message says which, what it said and what to do."""


@dataclass(frozen=True)
class Limits:
    """How hard a server is pressed. Seconds; attempts include the first; requests_per_minute 0: no limit.

    stop_after: so many questions in a row without any answer end the run. longest_pause_s: neither a growing pause nor
    a Retry-After holds questions back longer.
    """

    in_flight: int = 64
    timeout_s: float = 120.0
    attempts: int = 6
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0
    requests_per_minute: float = 0.0
    stop_after: int = 20

    def __post_init__(self) -> None:
        if self.in_flight < 1 or self.attempts < 1 or self.timeout_s <= 0:
            raise ValueError(
                f"captioner: in_flight {self.in_flight} and attempts {self.attempts} must be at least 1, "
                f"timeout_s {self.timeout_s} above 0"
            )


@dataclass(frozen=True)
class Question:
    """One request. key: what its answer is recorded under; picture: makes its data URL, or raises ValueError."""

    key: str
    prompt: str
    sampling: Sampling
    seed: int
    picture: Callable[[], str]


@dataclass
class Tally:
    """What the questions of a server came to."""

    requests: int = 0
    retries: int = 0
    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


class _TryAgainError(Exception):
    """A failure that may pass. kind is counted; pause_s is what the server asked for."""

    def __init__(self, kind: str, pause_s: float | None = None) -> None:
        super().__init__(kind)
        self.kind, self.pause_s = kind, pause_s


class ChatServer:
    """A model behind a base URL (".../v1"). The key goes out as a bearer token and never into a message."""

    def __init__(self, url: str, model: str, limits: Limits = Limits(), api_key: str = "") -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"captioner: server {url!r} is no http address; write one like http://localhost:8000/v1")
        self.url, self.model, self.limits = url.rstrip("/"), model, limits
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.tally = Tally()

    def check(self, timeout_s: float = 10.0) -> None:
        """Ask which models are there. Raises ServerError where the server is not, or does not have the model."""
        asyncio.run(self._check(timeout_s))

    def ask_all(
        self, questions: Iterable[Question], record: Callable[[Sequence[tuple[Question, Answer]]], None]
    ) -> dict[str, Answer]:
        """Answers by key. `record` has returned for every answer given here that the server sent; errors and skipped
        pictures are not recorded. Raises ServerError when going on is pointless."""
        started = time.monotonic()
        try:
            return asyncio.run(_Round(self, questions, record).run())
        finally:
            self.tally.seconds += time.monotonic() - started

    def session(self, timeout_s: float) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            connector=aiohttp.TCPConnector(limit=self.limits.in_flight),
        )

    async def _check(self, timeout_s: float) -> None:
        try:
            async with self.session(timeout_s) as session, session.get(f"{self.url}/models") as response:
                if response.status != 200:
                    raise ServerError(f"captioner: {self.url}/models answers {response.status}: check address and key")
                listed = [str(one.get("id")) for one in json.loads(await _read(response))["data"]]
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            raise ServerError(
                f"captioner: no server answers at {self.url} ({_short(problem)}): start it, or correct the address"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, _TryAgainError):
            raise ServerError(f"captioner: {self.url}/models is no list of models: is it an OpenAI server?") from None
        if self.model not in listed:
            raise ServerError(f"captioner: {self.url} has no model {self.model!r}; it has {', '.join(listed[:10])}")


class _Round:
    """One call of ask_all: workers take questions in turn, a recorder writes answers down in groups."""

    def __init__(
        self,
        server: ChatServer,
        questions: Iterable[Question],
        record: Callable[[Sequence[tuple[Question, Answer]]], None],
    ) -> None:
        self.server, self.limits, self.tally = server, server.limits, server.tally
        self.questions, self.record = iter(questions), record
        self.answers: dict[str, Answer] = {}
        self.unrecorded: list[tuple[Question, Answer, asyncio.Future[None]]] = []
        self.arrived = asyncio.Event()
        self.slots = asyncio.Semaphore(self.limits.in_flight)
        self.not_before = 0.0
        self.next_slot = 0.0
        self.silent = 0

    async def run(self) -> dict[str, Answer]:
        async with self.server.session(self.limits.timeout_s) as session:
            recorder = asyncio.create_task(self._recorder())
            # More than may be in flight: pictures are made small, answers recorded and pauses sat out meanwhile.
            workers = [asyncio.create_task(self._worker(session)) for _ in range(2 * self.limits.in_flight)]
            try:
                # The first that fails ends all; a recorder only ends by failing.
                await self._first_failure(workers, recorder)
            finally:
                for task in (*workers, recorder):
                    task.cancel()
                await asyncio.gather(*workers, recorder, return_exceptions=True)
                if self.unrecorded:  # answers that arrived while the round was ended are paid for all the same
                    self.record([(question, answer) for question, answer, _ in self.unrecorded])
        return self.answers

    @staticmethod
    async def _first_failure(workers: Sequence[asyncio.Task[None]], recorder: asyncio.Task[None]) -> None:
        waiting: set[asyncio.Task[None]] = set(workers)
        while waiting:
            done, _ = await asyncio.wait({*waiting, recorder}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            waiting -= done

    async def _worker(self, session: aiohttp.ClientSession) -> None:
        for question in self.questions:
            try:
                # Making the picture small is work for another thread: others are under way meanwhile.
                picture = await asyncio.to_thread(question.picture)
            except ValueError as problem:
                self.answers[question.key] = Answer(SKIPPED, reason=_short(problem))
                continue
            answer, is_final = await self._ask(session, question, picture)
            if is_final:
                await self._recorded(question, answer)
            self._count(answer)
            self.answers[question.key] = answer

    async def _ask(self, session: aiohttp.ClientSession, question: Question, picture: str) -> tuple[Answer, bool]:
        """(answer, whether the server gave it) after as many attempts as are allowed."""
        body = json.dumps(_body(self.server.model, question, picture))
        reason = ""
        for attempt in range(self.limits.attempts):
            try:
                async with self.slots:
                    await self._turn()
                    self.tally.requests += 1
                    self.tally.retries += attempt > 0
                    answer = await self._once(session, body)
            except _TryAgainError as failure:
                reason = failure.kind
                self.tally.failures[reason] = self.tally.failures.get(reason, 0) + 1
                pause = min(self.limits.first_pause_s * 2**attempt, self.limits.longest_pause_s)
                if failure.pause_s is not None:
                    held = min(failure.pause_s, self.limits.longest_pause_s)
                    self.not_before = max(self.not_before, time.monotonic() + held)
                if attempt + 1 < self.limits.attempts:
                    await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            else:
                self.silent = 0
                return answer, answer.status != ERROR
        self.silent += 1
        if self.silent >= self.limits.stop_after:
            raise ServerError(
                f"captioner: {self.server.url} left {self.limits.stop_after} questions in a row without an answer, "
                f"{self.limits.attempts} attempts each (last: {reason}): see to the server and run the same command "
                "again; what was answered is recorded"
            )
        return Answer(ERROR, reason=f"{reason}, {self.limits.attempts} attempts"), False

    async def _turn(self) -> None:
        """Wait for this request's turn: the rate limit's slot, and the end of a pause that the server asked for."""
        if self.limits.requests_per_minute:
            now = time.monotonic()
            slot = max(now, self.next_slot)
            self.next_slot = slot + 60 / self.limits.requests_per_minute
            await asyncio.sleep(slot - now)
        while (wait := self.not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    async def _once(self, session: aiohttp.ClientSession, body: str) -> Answer:
        try:
            async with session.post(
                f"{self.server.url}/chat/completions", data=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status in MAY_PASS:
                    raise _TryAgainError(f"status {response.status}", _retry_after(response.headers.get("Retry-After")))
                text = await _read(response)
                if response.status in HOPELESS:
                    raise ServerError(
                        f"captioner: {self.server.url} answers {response.status}: check the key and that it serves "
                        f"{self.server.model!r} ({text[:LONGEST_REASON].decode('utf-8', 'replace')})"
                    )
        except TimeoutError:
            raise _TryAgainError("timeout") from None
        except (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError):
            raise _TryAgainError("connection dropped") from None
        except (aiohttp.ClientError, OSError) as problem:
            raise _TryAgainError(f"no connection ({type(problem).__name__})") from None
        if response.status != 200:
            said = text[:LONGEST_REASON].decode("utf-8", "replace")
            return Answer(ERROR, reason=f"status {response.status}: {said}"[:LONGEST_REASON])
        return read_answer(text)

    async def _recorded(self, question: Question, answer: Answer) -> None:
        """Return once the answer is on the disk."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unrecorded.append((question, answer, written))
        self.arrived.set()
        await written

    async def _recorder(self) -> None:
        """Write down whatever has arrived, in one flush: at hundreds of answers a second a flush each is too slow."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            group = list(self.unrecorded)
            # Shielded: a flush that has begun is waited for, and what is flushed is not offered again.
            answers = [(question, answer) for question, answer, _ in group]
            flush = asyncio.ensure_future(asyncio.to_thread(self.record, answers))
            try:
                await asyncio.shield(flush)
            except asyncio.CancelledError:
                await flush
                del self.unrecorded[: len(group)]
                raise
            del self.unrecorded[: len(group)]
            for _, _, written in group:
                if not written.done():
                    written.set_result(None)

    def _count(self, answer: Answer) -> None:
        self.tally.answers += answer.status != ERROR
        self.tally.errors += answer.status == ERROR
        self.tally.prompt_tokens += answer.prompt_tokens
        self.tally.completion_tokens += answer.completion_tokens


def _body(model: str, question: Question, picture: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question.prompt}]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.sampling.max_tokens,
        "temperature": question.sampling.temperature,
        "top_p": question.sampling.top_p,
        "seed": question.seed,
    }


def read_answer(body: bytes) -> Answer:
    """The answer in the body of a chat completion. Raises _TryAgainError where it is not one."""
    try:
        said = json.loads(body)
        choice, usage = said["choices"][0], said.get("usage") or {}
        message = choice["message"]
        text = message.get("content") or ""
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if not isinstance(text, str):
            raise TypeError
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _TryAgainError("malformed answer") from None
    finish = choice.get("finish_reason")
    if message.get("refusal"):
        return Answer(REFUSED, text, str(message["refusal"])[:LONGEST_REASON], *tokens)
    if finish == "content_filter":
        return Answer(REFUSED, text, "content filter", *tokens)
    if finish == "length":
        return Answer(TRUNCATED, text, f"cut at {tokens[1]} tokens", *tokens)
    return Answer(SUCCESS, text, "", *tokens)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body, or as much of it as an answer may have: a server could send without end."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LONGEST_BODY:
            raise _TryAgainError("answer too long")
    return b"".join(parts)


def _retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After asks for, given as a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _short(problem: BaseException) -> str:
    return (str(problem) or type(problem).__name__)[:LONGEST_REASON]
