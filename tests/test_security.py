"""What a server that strangers can reach must not allow."""

import logging
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hotneuron.access import allowed_hosts
from hotneuron.console import UserError
from hotneuron.listener import HttpServer, bind
from server import Gateway, ServerConfig, create_app, dashboard, load_tokenizer
from server.middleware import client_of
from tests.fake_engine import CHAT, HI, FakeEngine, LiveServer, error_of, serving, wait_until

KEY = {"authorization": "Bearer secret"}
PAGE = "https://chat.example.org"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="module")
def guarded(tokenizer: Any) -> Iterator[LiveServer]:
    limits = {"max_messages": 3, "max_message_chars": 50}
    with serving(
        FakeEngine(), tokenizer, api_keys=("secret", "other"), cors_origins=(PAGE,), **limits
    ) as live:
        yield live


def test_every_route_asks_for_a_key(guarded: LiveServer) -> None:
    """But the two probes, and the empty page with its files, where one signs in and out."""
    pages = {route.path: route.methods for route in dashboard.router.routes}  # type: ignore[attr-defined]
    routes = {"/openapi.json": ["get"], **pages, **guarded.app.openapi()["paths"]}
    open_paths = {
        "/health", "/ready", "/", "/dashboard", "/dashboard/login", "/dashboard/logout",
    }  # fmt: skip
    assert open_paths < set(routes)
    for path in set(routes) - open_paths:
        for method in routes[path]:
            reply = guarded.http.request(method, path.format(name="x"), json={})
            assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key"), path


def test_headers_of_every_answer(guarded: LiveServer) -> None:
    paths = ("/health", "/v1/models", "/nope", "/dashboard", "/dashboard/static/dashboard.js")
    for path in paths:
        headers = guarded.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy


def test_pages_of_one_origin_may_call(guarded: LiveServer) -> None:
    ask = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    allowed = guarded.http.options(CHAT, headers={"origin": PAGE, **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    refused = guarded.http.options(CHAT, headers={"origin": "https://evil.example", **ask})
    assert "access-control-allow-origin" not in refused.headers
    called = guarded.http.post(CHAT, json={"messages": HI}, headers={"origin": PAGE, **KEY})
    assert called.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in called.headers["access-control-expose-headers"]


def test_no_page_may_call_by_default(tokenizer: Any) -> None:
    with serving(FakeEngine(), tokenizer) as live:
        reply = live.http.get("/v1/models", headers={"origin": PAGE})
        assert "access-control-allow-origin" not in reply.headers


def test_only_names_of_this_server_are_answered(tokenizer: Any) -> None:
    """A page that lets its own name lead to 127.0.0.1 has that name in its requests."""
    hosts = allowed_hosts("127.0.0.1", None, ())
    with serving(FakeEngine(), tokenizer, allowed_hosts=hosts) as live:
        port = live.http.base_url.port

        def asked(host: str, path: str = CHAT) -> httpx.Response:
            return live.http.post(path, json={"messages": HI}, headers={"host": host})

        for name in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST."):
            assert asked(f"{name}:{port}").status_code == asked(name).status_code == 200
        for name in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0"):
            for path in (CHAT, "/dashboard", "/metrics", "/nope"):
                reply = asked(f"{name}:{port}", path)
                error = error_of(reply)
                assert (reply.status_code, error["code"]) == (403, "host_not_allowed"), name
                assert (error["param"], "--allowed-host" in error["message"]) == ("host", True)
        for name in ("localhost:80:80", "", "[::1", "a" * 5000):
            assert asked(name).status_code == 403


@pytest.mark.parametrize(
    ("host", "given", "keys", "allowed"),
    [
        ("127.0.0.1", None, (), {"localhost", "127.0.0.1", "::1"}),
        ("localhost", ["llm.local"], (), {"localhost", "127.0.0.1", "::1", "llm.local"}),
        ("127.0.0.2", None, (), {"localhost", "127.0.0.1", "::1", "127.0.0.2"}),
        ("127.0.0.1", ["*"], (), set()),
        ("127.0.0.1", None, ("key",), set()),  # which a page does not know
        ("0.0.0.0", None, (), set()),  # in a container: reached by whatever name it was given
        ("10.0.0.9", ["a", "b"], ("key",), {"localhost", "127.0.0.1", "::1", "10.0.0.9", "a", "b"}),
    ],
)
def test_which_names_are_allowed(
    host: str, given: list[str] | None, keys: tuple[str, ...], allowed: set[str]
) -> None:
    assert set(allowed_hosts(host, given, keys)) == allowed


@pytest.mark.parametrize("host", ["https://example.org", "example.org:80", "[::1]", "", "a b"])
def test_a_bad_host_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="--allowed-host"):
        ServerConfig("tiny", allowed_hosts=(host,))


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/path", ""])
def test_a_bad_origin_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="--cors-origin"):
        ServerConfig("tiny", cors_origins=(origin,))


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        (HI * 4, "messages", "too_many_messages"),
        ([*HI, {"role": "user", "content": "x" * 51}], "messages[1].content", "message_too_long"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x" * 26}] * 2}],
            "messages[0].content",
            "message_too_long",
        ),
        (
            [*HI, {"role": "assistant", "content": [{"type": "refusal", "refusal": "x" * 51}]}],
            "messages[1].content",
            "message_too_long",
        ),
    ],
)
def test_conversations_are_bounded(
    guarded: LiveServer, messages: list[dict[str, Any]], param: str, code: str
) -> None:
    for path in (CHAT, "/tokenize"):
        reply = guarded.http.post(path, json={"messages": messages}, headers=KEY)
        error = error_of(reply)
        assert (reply.status_code, error["param"], error["code"]) == (400, param, code)
    assert guarded.http.post(CHAT, json={"messages": HI * 3}, headers=KEY).status_code == 200


def test_the_access_log_has_no_secrets(
    guarded: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    def records() -> list[logging.LogRecord]:
        """The last three: a test before may still be writing its own."""
        return [record for record in caplog.records if record.name == "hotneuron.access"][-3:]

    body = {"messages": [{"role": "user", "content": "private"}]}
    with caplog.at_level(logging.DEBUG):
        for url in (f"{CHAT}?key=in-the-query", "/line%0Abreak", "/metrics"):
            guarded.http.post(url, json=body, headers=KEY)
        assert wait_until(lambda: len(records()) == 3 and records()[2].levelno == logging.DEBUG)
    assert [record.__dict__["status"] for record in records()] == [200, 404, 405]
    assert [record.levelno for record in records()] == [logging.INFO, logging.INFO, logging.DEBUG]
    assert all("\n" not in record.getMessage() for record in records())
    # The test's own client logs the addresses that it calls.
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    text = " ".join(str(record.__dict__) for record in ours)
    for secret in ("secret", "in-the-query", "private"):
        assert secret not in text


def test_clients_are_told_apart() -> None:
    assert client_of({"client": ("10.0.0.7", 4000)}) == "10.0.0.7"
    assert client_of({"client": ("10.0.0.7", 4000), "client_id": "key-1"}) == "key-1"
    assert client_of({"client": None}) == "local"


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    words = [
        *command.split(),
        "subjectAltName=IP:127.0.0.1",
        "-out",
        str(cert),
        "-keyout",
        str(key),
    ]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    return cert, key


def test_https(tokenizer: Any, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    gateway, engine = Gateway(), FakeEngine()
    trusted = ssl.create_default_context(cafile=cert)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with (
            HttpServer(gateway, listener, tls_cert=cert, tls_key=key),
            httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted) as http,
        ):
            gateway.open(create_app(engine, tokenizer, ServerConfig("tiny")))
            assert http.post(CHAT, json={"messages": HI}).status_code == 200
            with socket.create_connection(("127.0.0.1", port)) as plain:
                plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                assert b"200" not in plain.recv(4096)
            engine.stop()


def test_a_certificate_that_cannot_be_used(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    nonsense = tmp_path / "cert.pem"
    nonsense.write_text("nothing")
    for cert in (nonsense, tmp_path / "missing.pem"):
        with (
            bind("127.0.0.1", 0) as listener,
            pytest.raises(UserError, match=r"--tls-cert .* cannot be used"),
        ):
            HttpServer(Gateway(), listener, tls_cert=cert, tls_key=certificate[1])
