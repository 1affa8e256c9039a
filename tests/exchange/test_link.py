"""Links carry frames whole and in order; a hub lets in only who holds the token."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from distrain.errors import LinkError
from distrain.exchange.link import Address, Frame, Hub, Kind, SocketLink, connect
from tests.support.links import InMemoryLink, socket_pair

TOKEN = "the run's token"


@pytest.fixture(params=["memory", "unix", "tcp"])
def pair(request: pytest.FixtureRequest):
    ends = InMemoryLink.pair() if request.param == "memory" else socket_pair(request.param)
    yield ends
    for end in ends:
        end.close()


class TestEveryLink:
    def test_carries_every_field(self, pair):
        frame = Frame(Kind.PUSH, 2**40, 7, 1, 3, 5, 2, 6, 4, 2**33, 2**34, 0.125, 3.5, 1e-300, 0.5, 0.25, b"payload")
        pair[0].send(frame)
        got = pair[1].receive(5)
        got.payload = bytes(got.payload)
        assert got == frame

    def test_keeps_order_both_ways(self, pair):
        for step in range(100):
            pair[0].send(Frame(Kind.TRAIN, step=step))
            pair[1].send(Frame(Kind.PUSH, step=step, payload=bytes(step)))
        assert [pair[1].receive(5).step for _ in range(100)] == list(range(100))
        assert [len(bytes(pair[0].receive(5).payload)) for _ in range(100)] == list(range(100))

    def test_times_out(self, pair):
        start = time.monotonic()
        assert pair[0].receive(0.05) is None
        assert 0.04 < time.monotonic() - start < 2

    def test_the_end_of_the_other_side_is_an_error(self, pair):
        pair[0].send(Frame(Kind.STOP))
        pair[0].close()
        assert pair[1].receive(5).kind is Kind.STOP
        with pytest.raises(LinkError):
            pair[1].receive(5)


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_large_payloads_pass_without_blocking_the_sender(family: str):
    a, b = socket_pair(family)
    payload = os.urandom(8 << 20)
    a.send(Frame(Kind.PUBLISH, payload=payload))
    assert a.sending  # queued, not waited for
    place = bytearray(len(payload))
    b.sink = lambda frame: memoryview(place)
    got: list[Frame | None] = []
    reader = threading.Thread(target=lambda: got.append(b.receive(10)))
    reader.start()
    while a.sending:
        a.flush()
    reader.join()
    assert got[0] is not None and bytes(place) == payload
    a.close()
    b.close()


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_words_overtake_what_is_sent_in_bulk_and_keep_their_order(family: str):
    a, b = socket_pair(family)
    for number in range(40):
        a.send(Frame(Kind.PIECE, number, payload=bytes(1 << 20)), bulk=True)
    for number in range(2):
        a.send(Frame(Kind.PUSH, number))
    got: list[Frame | None] = []
    reader = threading.Thread(target=lambda: got.extend(b.receive(10) for _ in range(42)))
    reader.start()
    while a.sending:
        a.flush()
    reader.join()
    assert [frame.round for frame in got if frame is not None and frame.kind is Kind.PIECE] == list(range(40))
    words = [place for place, frame in enumerate(got) if frame is not None and frame.kind is Kind.PUSH]
    assert [got[place].round for place in words] == [0, 1] and words[1] < 20, "not behind all of it"
    a.close()
    b.close()


def test_what_is_queued_in_bulk_may_be_withdrawn():
    a, b = socket_pair("tcp")
    for number in range(40):
        a.send(Frame(Kind.PUBLISH, number, payload=bytes(1 << 20)), bulk=True)
    a.withdraw(lambda frame: frame.round % 2 == 1)
    a.send(Frame(Kind.STOP), bulk=True)
    got: list[int] = []

    def read() -> None:
        while (frame := b.receive(10)) is not None and frame.kind is Kind.PUBLISH:
            got.append(frame.round)

    reader = threading.Thread(target=read)
    reader.start()
    while a.sending:
        a.flush()
    reader.join()
    assert [number for number in got if number > 20] == list(range(22, 40, 2)), "what was not under way"
    assert got == sorted(got)
    a.close()
    b.close()


def test_a_payload_of_the_wrong_size_is_refused():
    a, b = socket_pair("unix")
    b.sink = lambda frame: memoryview(bytearray(8))
    a.send(Frame(Kind.PUSH, payload=b"123456789"))
    with pytest.raises(LinkError, match="brings 9 bytes where 8 were expected"):
        b.receive(5)
    a.close()
    b.close()


def test_garbage_is_refused():
    a, b = socket.socketpair()
    link = SocketLink(b)
    a.sendall(b"\xff" * 200)
    with pytest.raises(LinkError, match="unknown kind 255"):
        link.receive(5)
    a.close()
    link.close()


def serve(hub: Hub, until: int, timeout_s: float = 5.0) -> list[tuple[SocketLink, Frame | LinkError]]:
    happened: list[tuple[SocketLink, Frame | LinkError]] = []
    deadline = time.monotonic() + timeout_s
    while len(happened) < until and time.monotonic() < deadline:
        happened += hub.poll(0.05)
    return happened


@pytest.fixture
def hub():
    hub = Hub(TOKEN, "127.0.0.1")
    yield hub
    hub.close()


def in_thread(action) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("same_node", [True, False])
def test_who_holds_the_token_gets_in(hub: Hub, same_node: bool):
    links: list[SocketLink] = []
    thread = in_thread(lambda: links.append(connect(hub.address, same_node, TOKEN, {"rank": 3})))
    [(link, hello)] = serve(hub, 1)
    thread.join()
    assert isinstance(hello, Frame) and hello.kind is Kind.HELLO and hello.json()["rank"] == 3
    assert link.shared == same_node
    hub.send(link, Frame(Kind.STOP))
    assert links[0].receive(5).kind is Kind.STOP
    links[0].close()
    [(_, end)] = serve(hub, 1)
    assert isinstance(end, LinkError)


def test_who_does_not_is_dropped_unheard(hub: Hub):
    links: list[SocketLink] = []
    thread = in_thread(lambda: links.append(connect(hub.address, True, "another token", {"rank": 0})))
    assert serve(hub, 1, 0.5) == []
    thread.join()
    with pytest.raises(LinkError):
        links[0].receive(5)
    links[0].close()


@pytest.mark.parametrize("payload", [b'{"proof": "\\ud800"}', b"[" * 4000, b"\xff", b"3"])
def test_whatever_a_stranger_says_ends_nothing_but_its_link(hub: Hub, payload: bytes):
    link = SocketLink(socket.create_connection(hub.address.tcp))
    link.send(Frame(Kind.HELLO, payload=payload))
    assert serve(hub, 1, 0.5) == []
    assert link.receive(5).kind is Kind.CHALLENGE
    with pytest.raises(LinkError):
        link.receive(5)
    link.close()


def test_a_stranger_may_not_send_much(hub: Hub):
    stranger = socket.create_connection(hub.address.tcp)
    link = SocketLink(stranger)
    assert serve(hub, 1, 0.3) == []
    link.send(Frame(Kind.HELLO, payload=b"x" * 100_000))
    assert serve(hub, 1, 0.5) == []
    assert link.receive(5).kind is Kind.CHALLENGE
    with pytest.raises(LinkError):
        link.receive(5)
    link.close()


def test_nobody_listening_is_a_clear_error():
    with pytest.raises(LinkError, match="cannot reach the parameter server at nobody"):
        connect(Address("nobody"), True, TOKEN, {})
    with pytest.raises(LinkError, match="listens on its own host only"):
        connect(Address("nobody"), False, TOKEN, {})


def test_descriptors_are_handed_over():
    a, b = socket_pair("unix")
    fd = os.memfd_create("test")
    os.write(fd, b"shared")
    a.send_descriptors([fd])
    [other] = b.receive_descriptors(1, 5)
    assert os.pread(other, 6, 0) == b"shared"
    for descriptor in (fd, other):
        os.close(descriptor)
    a.close()
    b.close()


def test_more_descriptors_than_one_message_takes_are_handed_over():
    a, b = socket_pair("unix")
    fd = os.memfd_create("test")
    a.send_descriptors([fd] * 300)
    others = b.receive_descriptors(300, 5)
    assert len({*others}) == 300 and all(os.path.sameopenfile(fd, other) for other in others)
    for descriptor in (fd, *others):
        os.close(descriptor)
    a.close()
    b.close()


def test_a_link_knows_when_bytes_last_came_or_went():
    a, b = socket_pair("tcp")
    began = time.monotonic()
    a.moved_at = b.moved_at = began - 100.0
    assert b.receive(0.01) is None and b.moved_at < began
    a.send(Frame(Kind.STATE, payload=bytes(64 << 20)))
    assert a.sending and a.moved_at > began
    assert b.receive(0.0) is None and b.moved_at > began, "some of the frame came"
    a.close()
    b.close()


def test_a_sign_of_life_is_heard_and_is_no_movement():
    a, b = socket_pair("tcp")
    began = time.monotonic()
    for kind, has_moved in ((Kind.ALIVE, False), (Kind.PUSH, True)):
        b.heard_at = b.moved_at = began - 100.0
        a.send(Frame(kind))
        assert b.receive(5.0).kind is kind
        assert b.heard_at > began and (b.moved_at > began) is has_moved
    a.close()
    b.close()


def test_a_frame_without_json_says_so():
    with pytest.raises(LinkError, match="without readable JSON"):
        Frame(Kind.HELLO, payload=b"{").json()
    with pytest.raises(LinkError, match="holds list"):
        Frame(Kind.HELLO, payload=b"[]").json()
