"""Processes that find each other, and the one line when they do not."""

import concurrent.futures
import json
import socket

import pytest

from scaling_dit.errors import UserError
from scaling_dit.parallel import rendezvous

ABOUT = {"jax": "1.2.3"}


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def meet_all(address, callers, processes, seconds=20.0):
    """What each of the (process, about) callers, started together, ends with: None or its error as (code, line)."""

    def meet(process, about):
        try:
            rendezvous.meet(address, processes, process, seconds, about)
        except UserError as error:
            return error.exit_code, str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(len(callers)) as pool:
        return [result.result() for result in [pool.submit(meet, *caller) for caller in callers]]


def test_all_come(address):
    assert meet_all(address, [(process, ABOUT) for process in (3, 1, 0, 2)], 4) == [None] * 4


def test_those_that_do_not_come_are_named_in_all_others(address):
    answers = meet_all(address, [(0, ABOUT), (2, ABOUT)], 5, seconds=1.0)
    expected = f"processes 1, 3, 4 of 5 did not come to {address} within 1 s"
    # Worth a retry.
    assert answers == [(75, expected)] * 2


def test_many_missing_ones_are_counted(address):
    ((code, answers),) = meet_all(address, [(0, ABOUT)], 32, seconds=0.2)
    assert code == 75 and answers.startswith("processes 1, 2, 3, 4, 5, 6, 7, 8 and 23 more of 32")


def test_no_process_0(address):
    (answers,) = meet_all(address, [(1, ABOUT)], 2, seconds=0.5)
    line = f"process 0 did not answer at {address} within 0.5 s; is it started, and is the port open?"
    assert answers == (75, line)


def test_a_call_that_meets_itself_is_no_answer(address, monkeypatch):
    """Linux may give a caller of a free port that very port, and then joins the two ends of the call."""

    def to_itself(place, timeout):
        met = socket.socket()
        met.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        met.bind(("127.0.0.1", place[1]))
        met.connect(("127.0.0.1", place[1]))
        return met

    monkeypatch.setattr(rendezvous.socket, "create_connection", to_itself)
    with pytest.raises(UserError, match="process 0 did not answer"):
        rendezvous.meet(address, 2, 1, 0.5, ABOUT)


def test_other_versions_are_reported_by_all(address):
    answers = meet_all(address, [(0, ABOUT), (1, {"jax": "1.2.4"})], 2)
    line = "process 1 has jax 1.2.4, process 0 has 1.2.3; start all of them alike"
    # A mistake.
    assert answers == [(2, line)] * 2


def test_other_counts_of_processes(address):
    def meet(process, processes):
        try:
            rendezvous.meet(address, processes, process, 20.0, ABOUT)
        except UserError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = [result.result() for result in (pool.submit(meet, 0, 2), pool.submit(meet, 1, 3))]
    assert answers == ["process 1 has --processes 3, process 0 has 2; start all of them alike"] * 2


def test_one_number_given_twice(address):
    answers = meet_all(address, [(0, ABOUT), (1, ABOUT), (1, ABOUT)], 3)
    assert answers == [(2, "process 1 came twice; give each process its own --process")] * 3


def test_a_call_of_someone_else_is_not_counted(address):
    host, port = rendezvous.split_address(address)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous.meet, address, 2, 0, 20.0, ABOUT)
        for words in (b"GET / HTTP/1.1\r\n", b'{"process": "x"}\n', b"[1]\n", b"\n"):
            while True:
                try:
                    stranger = socket.create_connection((host, port), timeout=5)
                    break
                except OSError:
                    continue
            with stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
        rendezvous.meet(address, 2, 1, 20.0, ABOUT)
        assert first.result() is None


def test_the_address_is_free_again(address):
    for _ in range(2):
        assert meet_all(address, [(0, ABOUT), (1, ABOUT)], 2) == [None, None]


def test_a_port_in_use(address):
    _, port = rendezvous.split_address(address)
    with (
        socket.create_server(("", port)),
        pytest.raises(UserError, match="give another port in --coordinator"),
    ):
        rendezvous.meet(address, 2, 0, 1.0, ABOUT)


@pytest.mark.parametrize("wrong", ["localhost", "localhost:", ":80", "localhost:0", "host:99999", "host:a"])
def test_addresses(wrong):
    with pytest.raises(UserError, match="HOST:PORT"):
        rendezvous.split_address(wrong)
    assert rendezvous.split_address("[::1]:80") == ("::1", 80)
    assert json.dumps(rendezvous.split_address("10.0.0.2:8482")) == '["10.0.0.2", 8482]'
