"""Logins: looked for when a registry wants one, where Docker, Podman and Apptainer keep them, and shown to nobody else."""

from __future__ import annotations

import base64
import json
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc_workspace.errors import ImageError
from hpc_workspace.images.credentials import Search, find_credentials
from tests.registry import Fault, Registry
from tests.unit.images.pulling import Puller, at_once, everything, executable, make_certificate, oras, sif

USER, SECRET = "ada", "pa55:w0rd"
ENCODED = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()


@pytest.fixture
def image(r: Registry) -> str:
    r.push_oras("team/app", "1", sif(b"content"))
    return oras(r)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Docker's configuration file, which is not there yet."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `docker-credential-x` prints is in this file; what it was asked is beside it, in `asked`."""
    answer = tmp_path / "bin" / "answer.json"
    executable(
        answer.parent / "docker-credential-x",
        f'#!/bin/sh\nprintf "%s " "$1" >> "{answer.parent}/asked"; cat >> "{answer.parent}/asked"\ncat "{answer}"\n',
    )
    monkeypatch.setenv("PATH", str(answer.parent), prepend=":")
    return answer


def write(config: Path, **document: Any) -> None:
    config.write_text(json.dumps(document))


def kinds(r: Registry, match: str = "") -> list[str]:
    return [q.authorization for q in r.seen(match)]


# --- when ---


def test_where_no_login_is_wanted_none_is_looked_for_or_sent(
    r: Registry, pull: Puller, image: str, config: Path, helper: Path
) -> None:
    write(config, credHelpers={r.host: "x"})
    pull.fetch(image)
    assert set(kinds(r)) == {""}
    assert not (helper.parent / "asked").exists()


def test_a_registry_that_gives_tokens_to_anyone_gets_no_name(r: Registry, pull: Puller, image: str) -> None:
    r.anonymous = True
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert kinds(r, "/token") == [""]
    assert kinds(r, "/v2/") == ["", "Bearer", "Bearer", "Bearer"]


def test_a_login_is_sent_only_after_it_was_asked_for(r: Registry, pull: Puller, image: str, config: Path) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": ENCODED}})
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert [q.method for q in r.requests] == ["HEAD", "GET", "HEAD", "GET", "GET"]
    assert kinds(r) == ["", "Basic", "Bearer", "Bearer", "Bearer"]


def test_basic_is_sent_only_after_it_was_asked_for(r: Registry, pull: Puller, image: str, config: Path) -> None:
    r.login, r.scheme = (USER, SECRET), "basic"
    write(config, auths={r.host: {"auth": ENCODED}})
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert kinds(r) == ["", "Basic", "Basic", "Basic"]


def test_a_token_that_ends_in_the_middle_is_asked_for_again(r: Registry, root: Path, image: str, config: Path) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": ENCODED}})
    r.faults.append(Fault("cut", match="/blobs/", times=1, after_bytes=10))
    pull = Puller(root, r, on_step=lambda step: r.tokens.clear() if step.done_bytes == 10 else None)
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert len(r.seen("/token")) == 2
    assert [q.status for q in r.seen("/blobs/")] == [200, 401, 206]


def test_tokens_are_asked_for_by_repository(r: Registry, pull: Puller, config: Path) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": ENCODED}})
    for name in ("team/app", "other/app"):
        r.push_oras(name, "1", sif(name.encode()))
        pull.fetch(oras(r, name))
    assert [q.path.partition("scope=")[2] for q in r.seen("/token")] == [
        "repository%3Ateam%2Fapp%3Apull",
        "repository%3Aother%2Fapp%3Apull",
    ]


@pytest.mark.parametrize("kind", ["status", "cut"])
def test_who_gives_tokens_may_fail_for_a_while(r: Registry, pull: Puller, image: str, kind: Any) -> None:
    r.anonymous = True
    headers = {"Retry-After": "0"}
    r.faults.append(Fault(kind, match="/token", status=503, headers=headers, times=1, after_bytes=-1))
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert len(r.seen("/token")) == 2


def test_who_gives_no_tokens_for_good_is_an_error(r: Registry, pull: Puller, image: str) -> None:
    r.anonymous = True
    r.faults.append(Fault("status", match="/token", status=500, headers={"Retry-After": "0"}))
    with pytest.raises(ImageError, match="failed") as caught:
        pull.fetch(image)
    assert "HTTP 500" in caught.value.evidence


@pytest.mark.parametrize("body", ["{}", '{"token": 5}', '{"token": ""}', '{"token": "a\\nb"}', "[]", "x", "[" * 9000])
def test_a_token_that_is_none_is_an_error(r: Registry, pull: Puller, image: str, body: str) -> None:
    r.anonymous = True
    r.faults.append(Fault("status", match="/token", status=200, body=body))
    with pytest.raises(ImageError, match="gave no token"):
        pull.fetch(image)


# --- where from ---


def test_the_environment_comes_first(
    r: Registry, pull: Puller, image: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": base64.b64encode(b"bob:other").decode()}})
    monkeypatch.setenv("APPTAINER_DOCKER_USERNAME", USER)
    monkeypatch.setenv("APPTAINER_DOCKER_PASSWORD", SECRET)
    assert pull.fetch(image).read_bytes() == sif(b"content")


def test_an_identity_token_is_exchanged(r: Registry, pull: Puller, image: str, config: Path) -> None:
    r.login, r.identity_token = (USER, SECRET), "identity-5ecret"
    write(config, auths={r.host: {"identitytoken": "identity-5ecret", "auth": ENCODED}})
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert [q.line for q in r.seen("/token")] == ["POST /token"]


@pytest.mark.parametrize("as_token", [False, True])
@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_a_credential_helper_is_asked_for_the_host(
    r: Registry, pull: Puller, image: str, config: Path, helper: Path, key: str, as_token: bool
) -> None:
    r.login = (USER, SECRET)
    given = ("<token>", r.identity_token) if as_token else (USER, SECRET)
    helper.write_text(json.dumps({"ServerURL": r.host, "Username": given[0], "Secret": given[1]}))
    write(config, **{key: {r.host: "x"} if key == "credHelpers" else "x"})
    assert pull.fetch(image).read_bytes() == sif(b"content")
    assert (helper.parent / "asked").read_text() == f"get {r.host}\n"


def test_logins_are_found_where_each_program_keeps_them(tmp_path: Path) -> None:
    def place(name: str, user: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, auths={"a.org": {"auth": base64.b64encode(f"{user}:x".encode()).decode()}})

    environment = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path / "run")}

    def found() -> str:
        search = find_credentials("a.org", "team/app", environment)
        return search.credentials.user if search.credentials else ""

    assert found() == ""
    place(".docker/config.json", "docker")
    assert found() == "docker"
    place("run/containers/auth.json", "podman")
    assert found() == "podman"
    place(".apptainer/docker-config.json", "apptainer")
    assert found() == "apptainer"
    place("elsewhere.json", "named")
    environment["REGISTRY_AUTH_FILE"] = str(tmp_path / "elsewhere.json")
    assert found() == "named"
    environment["DOCKER_AUTH_CONFIG"] = json.dumps({"auths": {"a.org": {"username": "ci", "password": "x"}}})
    assert found() == "ci"
    environment |= {"SINGULARITY_DOCKER_USERNAME": "singularity", "SINGULARITY_DOCKER_PASSWORD": "x"}
    assert found() == "singularity"


@pytest.mark.parametrize(
    ("key", "registry", "repository", "fits"),
    [
        ("a.org", "a.org", "team/app", True),
        ("https://a.org", "a.org", "team/app", True),
        ("https://a.org/v2/", "a.org", "team/app", True),
        ("A.org", "a.org", "team/app", True),
        ("a.org/team", "a.org", "team/app", True),
        ("a.org/team/app", "a.org", "team/app", True),
        ("a.org/te", "a.org", "team/app", False),
        ("a.org/other", "a.org", "team/app", False),
        ("a.org:5000", "a.org", "team/app", False),
        ("b.a.org", "a.org", "team/app", False),
        ("a.org.evil.org", "a.org", "team/app", False),
        ("https://index.docker.io/v1/", "docker.io", "library/python", True),
        ("docker.io", "docker.io", "library/python", True),
        ("docker.io/library", "docker.io", "library/python", True),
        ("https://index.docker.io/v1/", "a.org", "library/python", False),
    ],
)
def test_an_entry_is_for_its_own_host_or_repositories(
    tmp_path: Path, key: str, registry: str, repository: str, fits: bool
) -> None:
    document = json.dumps({"auths": {key: {"auth": ENCODED}}})
    search = find_credentials(registry, repository, {"HOME": str(tmp_path), "DOCKER_AUTH_CONFIG": document})
    assert (search.credentials is not None) == fits


def test_the_most_exact_entry_counts(tmp_path: Path) -> None:
    auths = {key: {"username": key, "password": "x"} for key in ("a.org", "a.org/team", "a.org/team/app")}
    environment = {"HOME": str(tmp_path), "DOCKER_AUTH_CONFIG": json.dumps({"auths": auths})}
    for repository, user in {"team/app": "a.org/team/app", "team/x": "a.org/team", "y": "a.org"}.items():
        found = find_credentials("a.org", repository, environment).credentials
        assert found is not None
        assert found.user == user


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"auths": {"a.org": {"auth": "???"}}}', "not base64 of user:password"),
        ('{"auths": {"a.org": {"auth": "YWRh"}}}', "not base64 of user:password"),
        ('{"credHelpers": {"a.org": "../x"}}', "not a program's"),
        ('{"credHelpers": {"a.org": "nosuch-helper"}}', "docker-credential-nosuch-helper is not available"),
        ('{"credHelpers": {"a.org": "failing"}}', "docker-credential-failing failed with exit code 3"),
        ('{"credHelpers": {"a.org": "silent"}}', "docker-credential-silent gave no credentials"),
        ('{"credHelpers": {"a.org": "broken"}}', "docker-credential-broken"),
        ('{"auths": [], "credHelpers": 5, "credsStore": ""}', ""),
    ],
)
def test_what_is_of_no_use_is_named_with_its_reason_and_never_shown(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    executable(tmp_path / "bin" / "docker-credential-failing", "#!/bin/sh\necho 5ecret >&2; echo 5ecret; exit 3\n")
    executable(tmp_path / "bin" / "docker-credential-silent", "#!/bin/sh\necho 5ecret\n")
    executable(tmp_path / "bin" / "docker-credential-broken", "\x7fELF nothing that runs")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    config.write_text(text)
    search = find_credentials("a.org", "team/app")
    assert search.credentials is None
    assert len(search.looked_in) == 1
    assert search.looked_in[0].startswith(str(config))
    assert why in search.looked_in[0]
    assert "5ecret" not in everything(search)


def test_a_helper_that_knows_nothing_is_no_failure(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "#!/bin/sh\necho credentials not found in native keychain; exit 1\n"
    executable(tmp_path / "bin" / "docker-credential-empty", said)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    write(config, credHelpers={"a.org": "empty"})
    assert find_credentials("a.org", "x") == Search(None, (str(config),))


@pytest.mark.parametrize("place", ["x" * 5000, "/dev/null/x", "/nowhere"])
def test_a_place_that_can_not_be_is_no_place(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", place)
    assert find_credentials("a.org", "x").credentials is None


# --- what is seen of it ---


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
def test_a_wrong_password_is_an_error_that_names_the_place_it_is_from(
    r: Registry, pull: Puller, image: str, config: Path, caplog: pytest.LogCaptureFixture, scheme: Any
) -> None:
    r.login, r.scheme = (USER, "another"), scheme
    write(config, auths={r.host: {"auth": ENCODED}})
    with caplog.at_level(logging.DEBUG), pytest.raises(ImageError, match="does not let us read team/app") as caught:
        pull.fetch(image)
    assert f"the login of {config} is not enough" in caught.value.what
    assert "apptainer registry login" in caught.value.remedy
    seen = everything(caught.value) + caplog.text + "".join(map(everything, [pull.fetcher, *pull.steps]))
    for hidden in (SECRET, ENCODED):
        assert hidden not in seen


def test_a_wrong_identity_token_is_shown_nowhere(
    r: Registry, pull: Puller, image: str, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"identitytoken": "identity-5ecret"}})
    with caplog.at_level(logging.DEBUG), pytest.raises(ImageError) as caught:
        pull.fetch(image)
    assert f"the login of {config} is not enough" in caught.value.what
    assert "5ecret" not in everything(caught.value) + caplog.text


def test_a_right_login_is_shown_nowhere_either(
    r: Registry, root: Path, image: str, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": ENCODED}})
    pull = Puller(root, r)
    with caplog.at_level(logging.DEBUG):
        pull.fetch(image)
    kept = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file()).decode("latin-1")
    for hidden in (SECRET, ENCODED, *r.tokens):
        assert hidden not in caplog.text + kept + "".join(pull.told)
    found = find_credentials(r.host, "team/app")
    assert found.credentials is not None
    assert found.credentials.secret == SECRET
    assert SECRET not in repr(found) + str(found) + repr(found.credentials)


def test_without_a_login_the_error_says_where_one_was_looked_for(
    r: Registry, pull: Puller, image: str, config: Path
) -> None:
    r.login = (USER, SECRET)
    write(config, auths={"other.org": {"auth": ENCODED}})
    with pytest.raises(ImageError, match="it wants a login, or there is no such repository") as caught:
        pull.fetch(image)
    assert f"Looked for a login in: {config}." in caught.value.evidence


def test_a_forbidden_repository_is_told_as_that(r: Registry, pull: Puller, image: str) -> None:
    r.faults.append(Fault("status", status=403))
    with pytest.raises(ImageError, match="does not let us read") as caught:
        pull.fetch(image)
    assert "HTTP 403" in caught.value.evidence
    assert len(r.requests) == 1


# --- who names whom ---


def challenge(r: Registry, realm: str) -> None:
    header = f'Bearer realm="{realm}",service="s"'
    r.faults.append(Fault("status", match="/v2/", status=401, headers={"WWW-Authenticate": header}, times=1))


def test_a_plain_registry_may_name_a_plain_realm_on_another_host(
    r: Registry, pull: Puller, image: str, config: Path
) -> None:
    write(config, auths={r.host: {"auth": ENCODED}})
    with Registry(login=(USER, SECRET)) as other:
        challenge(r, f"{other.url}/token")
        pull.fetch(image)
        assert kinds(other) == ["Basic"]  # as Docker does: whoever names the realm is the registry that is trusted


def test_a_plain_registry_that_names_a_realm_with_tls_is_taken_at_its_word(
    r: Registry, pull: Puller, image: str, config: Path
) -> None:
    write(config, auths={r.host: {"auth": ENCODED}})
    with Registry() as other:
        challenge(r, f"https://{other.host}/token")
        with pytest.raises(ImageError, match="can't be reached"):
            pull.fetch(image)
        assert not other.requests  # it has no TLS, and was sent nothing


@pytest.mark.parametrize("realm", ["ftp://127.0.0.1/x", "/token", "http://[x]/", "not a url", ""])
def test_a_realm_that_is_none_gets_nothing(r: Registry, pull: Puller, image: str, config: Path, realm: str) -> None:
    write(config, auths={r.host: {"auth": ENCODED}})
    challenge(r, realm)
    with pytest.raises(ImageError, match="wants a login"):
        pull.fetch(image)
    assert kinds(r) == [""]


def test_a_challenge_that_is_none_takes_no_long_time(r: Registry, pull: Puller, image: str) -> None:
    header = "Bearer " + "a" * 60_000
    r.faults.append(Fault("status", match="/v2/", status=401, headers={"WWW-Authenticate": header}))
    with pytest.raises(ImageError, match="wants a login"):
        pull.fetch(image)


def test_many_who_need_a_login_at_once_all_get_one(r: Registry, root: Path, config: Path) -> None:
    r.login = (USER, SECRET)
    write(config, auths={r.host: {"auth": ENCODED}})
    names = [f"team/app{i}" for i in range(6)]
    for name in names:
        r.push_oras(name, "1", sif(name.encode()))
    results = at_once([lambda n=n: Puller(root, r).fetch(oras(r, n)) for n in names]).join()
    assert [Path(str(path)).read_bytes() for path in results] == [sif(name.encode()) for name in names]


# --- with TLS ---


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry with a certificate that is trusted here."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate = make_certificate(tmp_path / "certificate.pem")
    context.load_cert_chain(certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Registry() as registry:
        registry._server.socket = context.wrap_socket(registry._server.socket, server_side=True)
        yield registry


def test_a_registry_is_spoken_to_with_tls_unless_told_otherwise(tls: Registry, root: Path) -> None:
    tls.push_oras("team/app", "1", sif(b"content"))
    assert Puller(root).fetch(oras(tls)).read_bytes() == sif(b"content")


def test_a_certificate_that_is_not_trusted_is_told_as_that(
    tls: Registry, root: Path, authorities: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authorities))
    with pytest.raises(ImageError, match="can't be reached") as caught:
        Puller(root).fetch(oras(tls))
    assert "SSL_CERT_FILE" in caught.value.remedy
    assert "plain_http" not in caught.value.remedy
    assert not tls.requests


def test_a_registry_with_tls_that_sends_us_on_to_a_plain_one_is_not_followed(tls: Registry, root: Path) -> None:
    tls.push_oras("team/app", "1", sif())
    with Registry(content=tls.content) as plain:
        tls.blobs_at = plain.url
        with pytest.raises(ImageError, match=r"redirects to http://127\.0\.0\.1, which is not TLS"):
            Puller(root).fetch(oras(tls))
        assert not plain.requests


def test_a_registry_with_tls_that_names_a_plain_realm_gets_no_login(tls: Registry, root: Path, config: Path) -> None:
    tls.push_oras("team/app", "1", sif())
    tls.login = (USER, SECRET)  # its realm is http://
    write(config, auths={tls.host: {"auth": ENCODED}})
    with pytest.raises(ImageError, match=r"wants a login at http://127\.0\.0\.1, which is not TLS") as caught:
        Puller(root).fetch(oras(tls))
    assert "Nothing was sent there" in caught.value.remedy
    assert kinds(tls) == [""]
