"""A small HTTPS server in place of the Kubernetes API server, as a pod finds it: address, token and
certificate."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

CLIENT_PATH = "/apis/tributary.dev/v1alpha1/namespaces/clinic-a/federatedclients/notes"
"""Of `training_worlds.CLIENT`."""
TOKEN = "a-token"


@contextmanager
def api_server(account: Path) -> Iterator[tuple[dict[str, str], dict[str, tuple[int, bytes]]]]:
    """(environment of a pod, answers by path); token and ca.crt are written to `account`."""
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            status, body = answers.get(self.path, (404, b"{}")) if allowed else (401, b"{}")
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    account.mkdir(parents=True, exist_ok=True)
    (account / "token").write_text(TOKEN + "\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key = write_certificate(account)
    context.load_cert_chain(account / "ca.crt", key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        port = str(server.server_port)
        yield {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": port}, answers
    finally:
        server.shutdown()
        server.server_close()


def write_certificate(account: Path) -> Path:
    """Write a fresh self-signed ca.crt; gives the file with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (account / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (account / "key.pem").write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return account / "key.pem"
