"""Passwords, keys and tokens, in the environment and in addresses, are used and never written down or said."""

import base64
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from massl_ray.config import keys, load, parse_toml, secret_keys, to_toml, validate
from massl_ray.data.decode import reason
from massl_ray.data.sources import open_source
from massl_ray.errors import UserError
from massl_ray.shown import redacted
from massl_ray.storage import Folder
from massl_ray.storage import reason as storage_reason
from massl_ray.training.run import claim_directory, prepare_run
from tests.images import TINY, write_images
from tests.sources import encoded_images, write_list
from tests.storages import s3_server
from tests.test_train import plain_environment

SECRET = "Zp9secretZp9"
ENVIRONMENT = {
    name: f"{SECRET}-{name}"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "GOOGLE_OAUTH_ACCESS_TOKEN",
        "AZURE_STORAGE_KEY",
        "AZURE_CLIENT_SECRET",
        "WANDB_API_KEY",
    )
}

# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:SECRET@bucket/images?region=eu-west-1", "s3://bucket/images?region=eu-west-1"),
        ("s3://KEY:SEC%2FRET@bucket", "s3://bucket"),
        ("s3://KEY:SEC/RET+x/y@bucket/images", "s3://bucket/images"),  # what Arrow does not take, but people type
        ("s3://bucket/a?access_key=KEY&secret_key=SECRET&scheme=http", "s3://bucket/a?scheme=http"),
        ("s3://bucket/a?awsSecretAccessKey=SECRET", "s3://bucket/a"),
        ("http://user:SECRET@host:8080/a/b.parquet", "http://host:8080/a/b.parquet"),
        ("https://SECRET@host/a", "https://host/a"),
        ("https://host/a.parquet?version=3&token=SECRET", "https://host/a.parquet?version=3"),
        (
            "https://b.s3.amazonaws.com/a?X-Amz-Date=1&X-Amz-Credential=KEY%2F2&X-Amz-Signature=SECRET",
            "https://b.s3.amazonaws.com/a",
        ),
        ("https://storage.googleapis.com/b/a?X-Goog-Signature=SECRET&x-goog-date=1", "https://storage.googleapis.com/b/a"),
        ("https://x.blob.core.windows.net/c/a?sv=2024&se=2026&sp=r&sig=SECRET", "https://x.blob.core.windows.net/c/a"),
        ("abfs://container:SECRET@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        (
            "abfss://container@account.dfs.core.windows.net/a?client_secret=SECRET",
            "abfss://container@account.dfs.core.windows.net/a",
        ),
        ("abfs://:SECRET@account.blob.core.windows.net/c/a", "abfs://account.blob.core.windows.net/c/a"),
        ("gs://anonymous@bucket/a", "gs://anonymous@bucket/a"),
        ("gs://bucket/a?access_token=SECRET&retry_limit_seconds=5", "gs://bucket/a?retry_limit_seconds=5"),
        ("sftp://user:SECRET@host/a", "sftp://user@host/a"),
        ("hdfs://user@host:9000/a", "hdfs://user@host:9000/a"),
        ("simplecache::https://user:SECRET@host/a", "simplecache::https://host/a"),
        ("jupyter://host:8888/a?tok=SECRET", "jupyter://host:8888/a"),
    ],
)
def test_secrets_are_left_out_of_addresses(address, shown):
    assert redacted(address) == shown == redacted(shown)
    sentence = "no '{0}' and ({0}, twice) here: {0}: x. ({0})."
    assert redacted(sentence.format(address)) == sentence.format(shown)
    assert str(Folder(address)) == shown and repr(Folder(address)) == f"Folder({shown!r})" and f"{Folder(address)}" == shown
    assert (
        Folder(Folder(address)).uri == address
        and (Folder(address) / "x").uri == Folder(address).uri.replace("?", "/x?", 1)
        or ("?" not in address)
    )


@pytest.mark.parametrize(
    "harmless",
    [
        "/data/a:b@c/d?token=e",
        "s3://bucket/a@b.jpg?endpoint_override=127.0.0.1:9000&scheme=http&allow_bucket_creation=true",
        "hf://datasets/user/repo@main/a.parquet",
        "http://[::1]:8080/a@b",
        "C://images",
        "no answer at http://127.0.0.1:38909: give http://HOST:PORT (as http://127.0.0.1:x).",
        "abfss://container@account.dfs.core.windows.net/a?credential_kind=default&tenant_id=1",
        "data.source: there is no folder or file a://b. Give images.",
    ],
)
def test_what_is_no_secret_stays(harmless):
    assert redacted(harmless) == harmless


words = st.text(st.characters(codec="ascii", exclude_characters=" \t\r\n'\"<>/?#&@:", categories=("L", "N", "P", "S")), min_size=1)


@given(st.sampled_from(["s3", "https", "abfs", "sftp"]), words, words, st.sampled_from(["token", "secret_key", "sig", "password"]))
def test_no_password_survives(scheme, user, password, option):
    password = f"{SECRET}{password}"
    for address in (f"{scheme}://{user}:{password}@host/path", f"{scheme}://host/path?a=b&{option}={password}&c=d"):
        assert SECRET not in redacted(address) and "host/path" in redacted(address)


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        f"nosuch://user:{SECRET}@host/images",
        f"http://user:{SECRET}@127.0.0.1:1/images.parquet",
        f"http://127.0.0.1:1/images.parquet?token={SECRET}",
        f"http://127.0.0.1:1/*.parquet?token={SECRET}",
        f"s3://KEY:{SECRET}@bucket/images?endpoint_override=127.0.0.1:1&scheme=http&connect_timeout=1",
        f"s3://KEY:{SECRET}/a@bucket/images",
        f"s3://bucket/images?secret_key={SECRET}",
    ],
)
def test_refusals_have_no_secrets(source, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError) as refused:
        open_source(source)
    assert SECRET not in str(refused.value) and source.partition(":")[0] in str(refused.value)
    with pytest.raises((OSError, UserError)) as failed:
        Folder(source).check_writable()
    assert SECRET not in str(failed.value)
    with pytest.raises(OSError) as failed:
        Folder(source).read_bytes()
    assert SECRET not in str(failed.value)


def test_a_list_of_signed_addresses(tmp_path):
    """Names are without the signatures: those are others tomorrow, and the images are the same."""
    identities = []
    for day in (1, 2):
        lines = [f"http://user:{SECRET}@127.0.0.1:1/{number}.png?X-Amz-Date={day}&sig={SECRET}{day}" for number in range(3)]
        (tmp_path / "list.txt").write_text("\n".join(lines))
        images = open_source(str(tmp_path / "list.txt"))
        identities.append(images.identity())
        assert images.path(1) == images.name(1) == "http://127.0.0.1:1/1.png"
        with pytest.raises((OSError, ValueError)) as gone:
            images.read(1)
        assert SECRET not in reason(gone.value)
    assert identities[0] == identities[1]


def test_whatever_a_file_system_raises(monkeypatch):
    """It may quote the address that it was given."""
    address = f"memory://user:{SECRET}@host/a"

    def refuse(self, path, **options):
        raise RuntimeError(f"no way to {address}?token={SECRET}")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", refuse)
    with pytest.raises(OSError, match="RuntimeError: no way to memory://host/a") as failed:
        Folder("memory://host/a").kind("x")
    assert SECRET not in str(failed.value)
    assert SECRET not in reason(OSError(f"no way to {address}"))
    assert SECRET not in storage_reason(OSError(f"no way to {address}"))


@contextmanager
def closed_server(folder: Path) -> Iterator[int]:
    """A web server for those who have the token, or the password; as its port."""
    basic = "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()

    class Closed(SimpleHTTPRequestHandler):
        def send_head(self):
            if self.path.partition("?")[2] != f"token={SECRET}" and self.headers.get("Authorization") != basic:
                return self.send_error(403)
            return super().send_head()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Closed, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:{}/list.txt?token=" + SECRET, f"http://user:{SECRET}@127.0.0.1:{{}}/list.txt"]
)
def test_secrets_are_used(tmp_path, address):
    """For the file that is named and for those that it names."""
    images = encoded_images(4)
    write_list(tmp_path / "list.txt", images)
    with closed_server(tmp_path) as port:
        listing = open_source(address.format(port))
        assert [listing.read(sample) for sample in range(4)] == images
        assert listing.path(0) == f"http://127.0.0.1:{port}/listed/cat/000.png"
        with pytest.raises(UserError):
            open_source(redacted(address.format(port)))


# ---- configurations --------------------------------------------------------------------------------------------------


def test_a_configuration_is_written_without_them():
    source = f"s3://KEY:{SECRET}@bucket/images?region=eu-west-1"
    config = load([*TINY, "--data.source", source, "--run.dir", f"s3://bucket/run?secret_key={SECRET}"])
    assert config.data.source == source and secret_keys(config) == ["run.dir", "data.source"]
    assert SECRET not in to_toml(config) + json.dumps(keys(config))
    again = validate(parse_toml(to_toml(config), "it"))
    assert again.data.source == "s3://bucket/images?region=eu-west-1" and keys(again) == keys(config) and not secret_keys(again)


def test_a_sweep_refuses_them(tmp_path, capsys):
    from massl_ray.sweep import main

    (tmp_path / "spec.toml").write_text('[sweep]\nmetric = "loss"\n[space]\n"memory.size" = {choice = [64]}\n')
    root = tmp_path / "sweep"
    flags = ["--run.dir", str(root), "--data.source", f"https://user:{SECRET}@host/images.parquet"]
    assert main([str(tmp_path / "spec.toml"), *TINY[2:], *flags]) == 2
    assert "data.source has a password, a key or a token in it" in capsys.readouterr().err and not root.exists()


# ---- whole runs ------------------------------------------------------------------------------------------------------


def where_it_stands(*roots: Path) -> list[Path]:
    """Files that hold the secret, or are called so."""
    files: list[Path] = []
    for root in roots:
        here = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
        assert here, root
        files += here
    return [path for path in files if SECRET.encode() in path.read_bytes() or SECRET in str(path)]


@pytest.fixture(scope="module")
def store():
    with s3_server() as options:
        yield options


def signed(options: str, secret: str, path: str) -> str:
    return f"s3://KEY:{secret}@bucket/{path}?{options}"


def test_a_run_goes_on_with_other_keys(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    folder = Folder(f"s3://bucket/rotated?{store}")
    for path in write_images(tmp_path / "images", 12).rglob("*.png"):
        folder.upload(path, str(path.relative_to(tmp_path)))

    def flags(secret: str, *more: str) -> list[str]:
        source, run_dir = signed(store, secret, "rotated/images"), signed(store, secret, "rotated/run")
        return [*TINY, "--data.source", source, "--run.dir", run_dir, *more]

    first = claim_directory(prepare_run(load(flags(f"{SECRET}1"))))
    second = prepare_run(load(flags(f"{SECRET}2")))
    assert second.dir == first.dir and f"{SECRET}2" in second.config.data.source
    with pytest.raises(UserError, match="optim.lr is") as refused:
        prepare_run(load(flags(f"{SECRET}2", "--optim.lr", "0.25")))
    assert SECRET not in str(refused.value)
    assert not where_it_stands(tmp_path / "cache")
    assert SECRET not in folder.read_text("run/config.toml")


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_writes_none_of_them_down(store, tmp_path, tmp_path_factory):
    """Not in its directory, in what it prints, in prepared images, in Ray's own files: every byte is looked at. Interrupted, it
    goes on with other keys."""
    bucket, cache, rays = Folder(f"s3://bucket/whole?{store}"), tmp_path / "cache", tmp_path_factory.mktemp("r")
    for path in write_images(tmp_path / "images", 47).rglob("*.png"):
        bucket.upload(path, str(path.relative_to(tmp_path)))
    bucket.write_text("images/ramps/broken.png", "no image")
    environment = plain_environment() | ENVIRONMENT | {"MASSL_RAY_CACHE": str(cache), "RAY_TMPDIR": str(rays)}
    environment["AWS_EC2_METADATA_DISABLED"] = "true"

    def start(secret: str) -> subprocess.Popen[str]:
        source, run_dir = signed(store, secret, "whole/images"), signed(store, secret, "whole/run")
        settings = tmp_path / "mine.toml"  # not on the command line, which Ray shows
        settings.write_text(f'[data]\nsource = "{source}"\n[run]\ndir = "{run_dir}"\n')
        command = [sys.executable, "-m", "massl_ray.train", "--config", str(settings), *TINY[2:], "--train.steps", "24"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    printed = ""
    first = start(f"{SECRET}1")
    assert first.stdout is not None
    for line in first.stdout:
        printed += line
        if line.startswith("step "):
            first.send_signal(signal.SIGINT)
            break
    printed += first.stdout.read()
    assert first.wait() == 130, printed
    second = start(f"{SECRET}2")
    rest, _ = second.communicate()
    printed += rest
    assert second.returncode == 0 and "Continuing after step" in rest, rest

    assert SECRET not in printed and "broken.png" in printed
    (local,) = (cache / "runs").iterdir()
    for name in ("config.toml", "report.html", "skipped.jsonl", "tensorboard", "eval/neighbours.json", "images.json"):
        assert (local / name).exists()
    copy = tmp_path / "copy"
    for name in bucket.files():
        bucket.download(name, copy / name)
    assert list(copy.rglob("manifest.json")) and list(copy.rglob("state.safetensors"))
    assert where_it_stands(cache, copy, rays) == []
