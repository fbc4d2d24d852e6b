"""What holds for every test: no network, whatever the code under test would like."""

import socket

import pytest


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """Refuse every connection, and fail the test that tried one; yields the list of attempts."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("a test tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield attempts
    assert attempts == []
