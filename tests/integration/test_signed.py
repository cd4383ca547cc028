"""Signed and encrypted images, made here with a key of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.cluster import TINY, Cluster

pytestmark = pytest.mark.cluster

NODE = "n01"
PLACE = "/home/tester/signed"
MAKE = f"""
rm -rf {PLACE}; mkdir -m 700 {PLACE}; cd {PLACE}
export APPTAINER_CONFIGDIR={PLACE}/keys
apptainer key newpair --name t --email t@example.org --comment c --password "" --push=false </dev/null
cp {TINY} good.sif; apptainer sign good.sif </dev/null
openssl genrsa -traditional -out private.pem 2048
openssl rsa -in private.pem -RSAPublicKey_out -out public.pem
openssl rsa -in private.pem -pubout -out spki.pem
cp {TINY} pem.sif; apptainer sign --key private.pem pem.sif
cp good.sif changed.sif
python3 - <<'EOF'
import os
with open("changed.sif", "r+b") as file:
    file.seek(os.path.getsize("changed.sif") // 2)
    byte = file.read(1)
    file.seek(-1, 1)
    file.write(bytes([byte[0] ^ 1]))
EOF
apptainer build --encrypt --pem-path public.pem encrypted.sif {TINY}
APPTAINER_ENCRYPTION_PASSPHRASE="open, sesame" apptainer build --encrypt phrase.sif {TINY}
"""
PHRASE = {"APPTAINER_ENCRYPTION_PASSPHRASE": "open, sesame"}
KEYS = {"APPTAINER_CONFIGDIR": f"{PLACE}/keys"}
TRY = """
phrase = ", ".join(("open", "sesame"))  # this text itself is on the argv of the client
w = ApptainerWorkspace({options})
error = error_of(w.start)
tell(error=error, said=None if error else w.execute_command("echo hello").stdout)
if error is None:
    seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    folder = Path.home() / ".hpc_workspace/workspaces" / w.id
    tell(seen=phrase in seen, kept=[p.name for p in folder.iterdir() if phrase.encode() in p.read_bytes()],
         inside=w.execute_command("env; cat /proc/*/environ", timeout=20).stdout.count(phrase))
w.close()
"""


@pytest.fixture(scope="module", autouse=True)
def _images(cluster: Cluster) -> Iterator[None]:
    made = cluster.run(NODE, ["bash", "-euc", MAKE], timeout_s=300)
    assert made.returncode == 0, made.stdout + made.stderr
    yield
    cluster.run(NODE, ["rm", "-rf", PLACE])


def attempt(cluster: Cluster, options: str, env: dict[str, str]) -> dict[str, object]:
    told = cluster.tell(NODE, TRY.format(options=options), env=env)
    assert cluster.leftovers([NODE]) == {}
    return told


@pytest.mark.parametrize(
    ("image", "verify"),
    [("good.sif", "True"), ("pem.sif", f"'{PLACE}/spki.pem'"), ("good.sif", "False")],
)
def test_a_signature_that_passes_and_one_that_nobody_asks_for_let_the_image_run(
    cluster: Cluster, image: str, verify: str
) -> None:
    assert attempt(cluster, f"image='{PLACE}/{image}', verify={verify}", KEYS)["said"] == "hello\n"


@pytest.mark.parametrize(
    ("image", "verify", "env", "said"),
    [
        (TINY, "True", KEYS, "signature not found"),
        (f"{PLACE}/changed.sif", "True", KEYS, "integrity"),
        (f"{PLACE}/good.sif", "True", {}, "unknown entity"),
        (f"{PLACE}/good.sif", f"'{PLACE}/spki.pem'", KEYS, "not"),
        (f"{PLACE}/pem.sif", f"'{PLACE}/nosuch.pem'", KEYS, "nosuch.pem"),
    ],
)
def test_an_image_that_does_not_pass_is_not_run(
    cluster: Cluster, image: str, verify: str, env: dict[str, str], said: str
) -> None:
    error = attempt(cluster, f"image={image!r}, verify={verify}", env)["error"]
    assert isinstance(error, dict)
    assert error["kind"] == "ImageError"
    assert f"The signature of {image} did not pass" in error["text"]
    assert said in error["text"]
    assert "apptainer key import" in error["text"]


def test_an_encrypted_image_runs_with_its_key(cluster: Cluster) -> None:
    options = f"image='{PLACE}/encrypted.sif', encryption_pem='{PLACE}/private.pem'"
    assert attempt(cluster, options, {})["said"] == "hello\n"


def test_an_encrypted_image_runs_with_its_passphrase_which_nobody_sees(cluster: Cluster) -> None:
    told = attempt(cluster, f"image='{PLACE}/phrase.sif'", PHRASE)
    assert told["said"] == "hello\n"
    assert told["seen"] is False
    assert told["kept"] == ["runtime_environment"]
    assert told["inside"] == 0


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (f"image='{PLACE}/encrypted.sif'", {}),
        (f"image='{PLACE}/encrypted.sif', encryption_pem='/etc/hosts'", {}),
        (f"image='{PLACE}/phrase.sif'", {"APPTAINER_ENCRYPTION_PASSPHRASE": "wrong"}),
    ],
)
def test_without_the_right_key_the_error_says_how_to_give_it(
    cluster: Cluster, options: str, env: dict[str, str]
) -> None:
    error = attempt(cluster, options, env)["error"]
    assert isinstance(error, dict)
    assert error["kind"] == "ContainerError"
    assert "APPTAINER_ENCRYPTION_PASSPHRASE" in error["text"]
    assert "wrong" not in error["text"].replace("wrong\n", "")


def test_a_passphrase_reaches_a_compute_node(cluster: Cluster) -> None:
    code = f"""
with ApptainerWorkspace(image='{PLACE}/phrase.sif', slurm=SLURM) as w:
    tell(said=w.execute_command("echo hello").stdout, script=(Path.home() / ".hpc_workspace/workspaces" / w.id / "job.sbatch").read_text())
"""
    told = cluster.tell("login", code, env=PHRASE)
    assert told["said"] == "hello\n"
    assert "sesame" not in told["script"]
