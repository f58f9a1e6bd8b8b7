"""The client against a server that misbehaves: every question ends, none is asked again once its answer is recorded."""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from PIL import Image

from stages.captioners import Answer, Sampling
from stages.openai_server import ChatServer, Limits, Question, ServerError, _retry_after, read_answer
from stages.recaption import data_url
from tests.stages.chat_server import ChatServerForTests

QUICK = Limits(in_flight=8, timeout_s=5, attempts=8, first_pause_s=0.01, longest_pause_s=0.2)


class Book:
    """Records in memory, and notices what is recorded twice."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.flushes = 0

    def __call__(self, fresh: Sequence[tuple[Question, Answer]]) -> None:
        self.flushes += 1
        for question, answer in fresh:
            assert question.key not in self.answers
            self.answers[question.key] = answer


def questions(count: int, size: int = 8) -> list[Question]:
    def picture(number: int) -> str:
        return data_url(Image.new("RGB", (size, size), (number % 256, number // 256, 90)))

    return [Question(str(n), f"number {n} ?", Sampling(16), n, lambda n=n: picture(n)) for n in range(count)]


def test_a_misbehaving_server_leaves_every_question_with_an_answer() -> None:
    """A third of all requests fail, in every way there is; failures are seeded, so that eight attempts suffice."""
    kinds = ("slow", "rate limited", "broken", "malformed", "cut short", "dropped")
    choices = random.Random(3).choices([*kinds, "well"], [1, 1, 1, 1, 1, 1, 12], k=4000)
    book = Book()
    with ChatServerForTests(lambda number, text: choices[number]) as server:
        client = ChatServer(server.url, "seer", QUICK)
        client.check()
        answers = client.ask_all(questions(200), book)
    assert {answer.status for answer in answers.values()} == {"success"}
    assert set(answers) == set(book.answers) == {str(n) for n in range(200)}
    asked = Counter(one.question for one in server.served)
    good = Counter(one.question for one in server.served if one.behaviour in ("well", "slow"))
    assert set(good.values()) == {1}  # nothing was asked again after a good answer
    assert len(asked) == len(good) == 200
    tally = client.tally
    assert (tally.answers, tally.errors, tally.requests) == (200, 0, len(server.served))
    assert tally.retries == len(server.served) - 200 == sum(tally.failures.values()) > 20
    assert set(tally.failures) == {"status 429", "status 500", "malformed answer", "connection dropped"}
    assert tally.prompt_tokens == 200 * 100
    assert server.most_at_once <= 8


@pytest.mark.parametrize(
    ("behaviour", "status", "reason", "requests"),
    [
        ("too long", "truncated", "cut at 16 tokens", 1),
        ("filtered", "refused", "content filter", 1),
        ("bad request", "error", "status 400", 1),
        ("broken", "error", "status 500, 3 attempts", 3),
        ("malformed", "error", "malformed answer, 3 attempts", 3),
        ("dropped", "error", "connection dropped, 3 attempts", 3),
        ("never", "error", "timeout, 3 attempts", 3),
    ],
)
def test_what_each_failure_comes_to(behaviour: str, status: str, reason: str, requests: int) -> None:
    book, limits = Book(), Limits(in_flight=2, timeout_s=0.3, attempts=3, first_pause_s=0.01)
    with ChatServerForTests(lambda number, text: behaviour) as server:
        (answer,) = ChatServer(server.url, "seer", limits).ask_all(questions(1), book).values()
    assert (answer.status, len(server.served)) == (status, requests)
    assert answer.reason.startswith(reason)
    assert bool(book.answers) is (status != "error")  # an error is no answer: the next run asks again


def test_retry_after_holds_every_question_back() -> None:
    with ChatServerForTests(lambda number, text: "rate limited" if number == 0 else "well") as server:
        limits = Limits(in_flight=1, first_pause_s=0.001)
        ChatServer(server.url, "seer", limits).ask_all(questions(3), Book())
    began = [one.began for one in server.served]
    assert len(began) == 4
    assert began[1] - server.served[0].ended >= 0.045  # the server asked for 0.05 s


def test_a_date_or_nonsense_in_retry_after() -> None:
    assert _retry_after("1.5") == 1.5
    assert _retry_after("Fri, 01 Jan 1999 00:00:00 GMT") == 0
    assert _retry_after("Fri, 01 Jan 2999 00:00:00 GMT") > 1e6  # type: ignore[operator]
    assert _retry_after("soon") is None
    assert _retry_after("-3") == 0


def test_requests_a_minute_are_kept_to() -> None:
    with ChatServerForTests() as server:
        limits = Limits(in_flight=8, requests_per_minute=60 * 40)
        ChatServer(server.url, "seer", limits).ask_all(questions(12), Book())
    began = sorted(one.began for one in server.served)
    assert began[-1] - began[0] >= 11 / 40 - 0.02


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        began = time.monotonic()
        with pytest.raises(ServerError, match="no server answers"):
            ChatServer(url, "seer").check()
        assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="no http address"):
        ChatServer("localhost:8000", "seer")


def test_a_model_that_is_not_there_is_named_with_those_that_are() -> None:
    with ChatServerForTests() as server, pytest.raises(ServerError, match=r"no model 'sear'; it has seer, other"):
        ChatServer(server.url, "sear").check()


def test_a_dead_server_ends_the_run_and_keeps_what_was_answered() -> None:
    book = Book()
    limits = Limits(in_flight=4, attempts=2, first_pause_s=0.001, stop_after=3)
    with (
        ChatServerForTests(lambda number, text: "well" if number < 20 else "broken") as server,
        pytest.raises(ServerError, match="3 questions in a row"),
    ):
        ChatServer(server.url, "seer", limits).ask_all(questions(500), book)
    assert len(book.answers) == 20
    assert len(server.served) < 60


def test_a_refused_key_ends_the_run() -> None:
    book = Book()
    with (
        ChatServerForTests(lambda number, text: "well" if number < 5 else "forbidden") as server,
        pytest.raises(ServerError, match=r"answers 401: check the key .*no such key"),
    ):
        ChatServer(server.url, "seer", QUICK, api_key="secret").ask_all(questions(100), book)
    assert len(book.answers) >= 4  # those under way when the run was ended are lost, those that arrived are not


def test_answers_are_flushed_in_groups_and_before_they_are_given() -> None:
    book = Book()

    def slowly(fresh: Sequence[tuple[Question, Answer]]) -> None:
        time.sleep(0.02)
        book(fresh)

    with ChatServerForTests() as server:
        answers = ChatServer(server.url, "seer", Limits(in_flight=16)).ask_all(questions(100), slowly)
    assert answers == book.answers
    assert book.flushes < 60


def test_64_in_flight_keep_a_server_busy() -> None:
    """The benchmark's check in small: requests sent, answers recorded, no place left empty long."""
    with ChatServerForTests(latency_s=0.4) as server:
        ChatServer(server.url, "seer", Limits(in_flight=64)).ask_all(questions(64 * 6), Book())
    first, last = min(one.began for one in server.served), max(one.ended for one in server.served)
    assert server.most_at_once <= 64
    assert len(server.served) * 0.4 / (64 * (last - first)) > 0.8


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[" * 99999]
)
def test_bodies_that_are_no_answer(body: bytes) -> None:
    with pytest.raises(Exception, match="malformed answer"):
        read_answer(body)
