"""A whole deployment on this machine: a SuperLink, and SuperNodes that hold one user's records each.

    python experiments/deployment/run.py CONFIG --out DIR [--users N] [--limits YAML] [--app DIR]
    python experiments/deployment/run.py CONFIG --out DIR --ray

It makes a throw-away certificate authority (TLS), keys for the SuperNodes (authentication), and for each user a folder
of a node's own; starts all of it on loopback, runs the configuration, and ends what it started. README.md beside this
file says how to do the same on several machines. With --ray, Flower's simulation runtime takes the SuperNodes' place.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpers.config import load_config, read_tree
from fedpers.data import load
from fedpers.flower.node_file import Limits, write_nodes
from fedpers.flower.pinned import write_commands
from fedpers.privacy.randomness import seed_key

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip


def main() -> None:
    """Run a configuration with real SuperNodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new directory: server/, nodes/, certificates/, logs/"
    )
    parser.add_argument("--users", type=int, default=3, help="how many of the federation's first users take part")
    parser.add_argument("--limits", type=Path, help="a YAML file with limits that all nodes' owners set")
    parser.add_argument("--app", type=Path, default=ROOT, help="the folder with the app's pyproject.toml")
    parser.add_argument("--ray", action="store_true", help="simulate the nodes of all the federation's users on Ray")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the whole run")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, mode=0o700)
    config = load_config(args.config)
    federation = load(config, seed_key(config.seed))
    if args.ray:
        nodes = f"num-supernodes={len(federation.users)} client-resources-num-cpus=1"
        with superlink(out, ["--insecure", "--simulation"], "insecure = true") as (home, _):
            run(args, out, home, ["--federation-config", nodes])
        return
    limits = Limits.model_validate(read_tree(args.limits)) if args.limits else Limits()
    users = range(min(args.users, len(federation.users)))
    keys = out / "certificates"
    shown = certificates(keys, nodes=len(users))
    files = write_nodes(federation, args.config, out / "nodes", limits, users, shown)
    write_commands(out / "bin")
    tls = ["--ssl-ca-certfile", keys / "ca.pem", "--ssl-certfile", keys / "server.pem", "--ssl-keyfile"]
    secure = [*tls, keys / "server.key", "--enable-supernode-auth"]
    with superlink(out, secure, f'root-certificates = "{keys / "ca.pem"}"') as (home, _), ExitStack() as stack:
        for place, (file, port) in enumerate(zip(files, free_ports(len(files)), strict=True)):
            call(["supernode", "register", keys / f"node{place}.pub", "here"], home)
            stack.enter_context(supernode(out, place, file, address(home), port))
        run(args, out, home, [], people=out / "nodes" / "people.json")


@contextmanager
def superlink(
    out: Path, flags: Sequence[object], connection: str, port: int | None = None
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """Start a SuperLink; yields the Flower directory in which it is known as `here`, and its process."""
    home, port = out / "flower" / "server", port or free_ports(1)[0]
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{HOST}:{port}"\n{connection}\n', encoding="utf-8"
    )
    link = [BIN / "flower-superlink", *flags, "--host", HOST, "--port", port]
    with started(link, home, out / "logs" / "superlink.log") as process:
        wait_for(port)
        yield home, process


def address(home: Path) -> str:
    """Return the address of the SuperLink that is known there."""
    return str(tomllib.loads((home / "config.toml").read_text(encoding="utf-8"))["superlink"]["here"]["address"])


def supernode(
    out: Path, place: int, file: Path, link: str, port: int
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Start the SuperNode of an owner's file, whose own app answers whatever the server hands over."""
    keys = out / "certificates"
    node = [
        BIN / "flower-supernode", "--superlink", link, "--root-certificates", keys / "ca.pem",
        "--auth-supernode-private-key", keys / f"node{place}", "--host", HOST, "--port", port,
        "--node-config", f'node="{file}"',
    ]  # fmt: skip
    return started(node, out / "flower" / f"node{place}", out / "logs" / f"node{place}.log", first_on_path=out / "bin")


def run(args: argparse.Namespace, out: Path, home: Path, flags: Sequence[str], people: Path | None = None) -> None:
    """Run the configuration to its end."""
    settings = f'config="{args.config.resolve()}" out="{out / "server"}" people="{people or ""}"'
    settings += f" patience={args.timeout} timeout={args.timeout}"
    call(["run", args.app.resolve(), "here", "--stream", "--run-config", settings, *flags], home, args.timeout)
    if not (out / "server" / "claim.json").exists():
        raise SystemExit(f"the run did not come to its end; see the lines above, and {out / 'logs'}")


def call(arguments: Sequence[object], home: Path, timeout: float = 60) -> None:
    """Run a `flwr` command to its end."""
    command = [str(one) for one in (BIN / "flwr", *arguments)]
    subprocess.run(command, env=environment(home), check=True, timeout=timeout)


@contextmanager
def started(
    command: Sequence[object], home: Path, log: Path, first_on_path: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process with a Flower directory of its own, and end it and its children afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(one) for one in command], env=environment(home, first_on_path), stdout=file, stderr=file
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def environment(home: Path, first_on_path: Path | None = None) -> dict[str, str]:
    """Return the environment of a Flower process, which finds its commands by PATH."""
    folders = [*([first_on_path] if first_on_path else []), BIN, os.environ.get("PATH", "")]
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": os.pathsep.join(map(str, folders))}


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for(port: int, seconds: float = 60) -> None:
    """Wait until somebody listens on a port of loopback."""
    deadline = time.monotonic() + seconds
    while True:
        with socket.socket() as one:
            if one.connect_ex((HOST, port)) == 0:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing listens on port {port}")
        time.sleep(0.2)


def certificates(folder: Path, nodes: int, hosts: Sequence[str] = (HOST,)) -> list[str]:
    """Write a throw-away certificate authority, the server's certificate, and a pair of keys for each SuperNode;
    returns their public keys.
    """
    folder.mkdir(mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())

    def certificate(name: str, key: ec.EllipticCurvePrivateKey, ca: bool) -> x509.Certificate:
        def subject(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        names = [
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
        ]
        usage = x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject(name))
            .issuer_name(subject("fedpers throw-away CA"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=7))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        if not ca:
            made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return made.sign(authority, hashes.SHA384())

    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    private(folder / "server.key", server.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    (folder / "ca.pem").write_bytes(certificate("fedpers throw-away CA", authority, ca=True).public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate("superlink", server, ca=False).public_bytes(pem))
    shown = []
    for place in range(nodes):
        key = ec.generate_private_key(ec.SECP384R1())
        private(folder / f"node{place}", key.private_bytes(pem, serialization.PrivateFormat.OpenSSH, none))
        line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        (folder / f"node{place}.pub").write_bytes(line)
        shown.append(line.decode("ascii"))
    return shown


def private(path: Path, content: bytes) -> None:
    """Write a file that its owner alone can read."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


if __name__ == "__main__":
    main()
