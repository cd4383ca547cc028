"""Settings: the environment over the file over what is built in, and a mistake is named with its place."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_workspace.config import config_file, load_settings
from hpc_workspace.errors import ConfigError

VARIABLE = "HPC_WORKSPACE_IMAGES_"


@pytest.fixture(autouse=True)
def _nobodys_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("HPC_WORKSPACE_", "XDG_CONFIG_HOME")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The user's file, not there yet."""
    path = tmp_path / ".config" / "hpc-workspace" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def test_without_file_and_variables_all_is_as_built_in() -> None:
    settings = load_settings().images
    assert (settings.fetch_on, settings.plain_http, settings.convert_cpus, settings.convert_memory) == (
        None, [], None, None,
    )  # fmt: skip


def test_the_file_is_read(file: Path) -> None:
    file.write_text('[images]\nfetch_on = "transfer"\nplain_http = ["Node:5000", "[::1]:80"]\nconvert_cpus = 3\n')
    settings = load_settings().images
    assert settings.fetch_on == "transfer"
    assert settings.plain_http == ["node:5000", "[::1]:80"]
    assert settings.convert_cpus == 3


def test_the_environment_counts_more_than_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[images]\nfetch_on = "transfer"\nconvert_memory = "4G"\n')
    monkeypatch.setenv(f"{VARIABLE}FETCH_ON", "other")
    monkeypatch.setenv(f"{VARIABLE}CONVERT_CPUS", "4")
    settings = load_settings().images
    assert (settings.fetch_on, settings.convert_cpus, settings.convert_memory) == ("other", 4, "4G")


def test_an_empty_variable_takes_away_what_the_file_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[images]\nfetch_on = "transfer"\nplain_http = ["a:1"]\n')
    monkeypatch.setenv(f"{VARIABLE}FETCH_ON", "")
    monkeypatch.setenv(f"{VARIABLE}PLAIN_HTTP", "")
    settings = load_settings().images
    assert (settings.fetch_on, settings.plain_http) == (None, [])


def test_a_list_in_the_environment_is_written_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{VARIABLE}PLAIN_HTTP", " A:1, b.org:5000 ,,localhost,")
    assert load_settings().images.plain_http == ["a:1", "b.org:5000", "localhost"]


@pytest.mark.parametrize(
    ("text", "key", "why"),
    [
        ("[images]\nfetch_onn = 1\n", "images.fetch_onn", "is no setting"),
        ("[image]\nfetch_on = 1\n", "image", "is no setting"),
        ("fetch_on = 1\n", "fetch_on", "is no setting"),
        ("images = 5\n", "images", "dictionary"),
        ("[images]\nfetch_on = 5\n", "images.fetch_on", "string"),
        ('[images]\nfetch_on = "a\\nb"\n', "images.fetch_on", "control character"),
        ('[images]\nplain_http = ["http://a"]\n', "images.plain_http", "is not a host"),
        ('[images]\nplain_http = ["a/b"]\n', "images.plain_http", "is not a host"),
        ("[images]\nplain_http = 5\n", "images.plain_http", "list"),
        ("[images]\nconvert_cpus = 0\n", "images.convert_cpus", "greater than 0"),
        ('[images]\nconvert_memory = "2 GB"\n', "images.convert_memory", "is not a size"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_file_and_key(file: Path, text: str, key: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        load_settings()
    assert caught.value.what.startswith(f"{file}: {key}")
    assert caught.value.option == key


@pytest.mark.parametrize(
    ("name", "value", "key", "why"),
    [
        ("CONVERT_CPUS", "many", "images.convert_cpus", "integer"),
        ("CONVERT_CPUS", "-1", "images.convert_cpus", "greater than 0"),
        ("CONVERT_MEMORY", "2T", "images.convert_memory", "is not a size"),
        ("PLAIN_HTTP", "ok:1,http://x", "images.plain_http", "is not a host"),
        ("FETCH_ON", "a\x1bb", "images.fetch_on", "control character"),
    ],
)
def test_a_mistake_in_the_environment_is_named_with_variable_and_key(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, key: str, why: str
) -> None:
    file.write_text('[images]\nfetch_on = "right"\nconvert_cpus = 1\n')
    monkeypatch.setenv(VARIABLE + name, value)
    with pytest.raises(ConfigError, match=why) as caught:
        load_settings()
    assert caught.value.what.startswith(f"${VARIABLE}{name}: {key}")
    assert caught.value.option == key


def test_a_file_that_is_no_table_where_the_environment_has_a_word_is_named(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("images = 5\n")
    monkeypatch.setenv(f"{VARIABLE}FETCH_ON", "x")
    with pytest.raises(ConfigError, match="images is not a table") as caught:
        load_settings()
    assert str(file) in caught.value.what


@pytest.mark.parametrize("data", [b"[images", b"\xff", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_named(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    with pytest.raises(ConfigError, match="can't be read") as caught:
        load_settings()
    assert str(file) in caught.value.what


def test_a_file_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_CONFIG", str(tmp_path / "nosuch.toml"))
    with pytest.raises(ConfigError, match="HPC_WORKSPACE_CONFIG names, is not there") as caught:
        load_settings()
    assert caught.value.option == "HPC_WORKSPACE_CONFIG"
    assert str(tmp_path / "nosuch.toml") in caught.value.what


def test_a_file_that_is_named_counts_alone(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[images]\nfetch_on = "users"\n')
    (tmp_path / "site.toml").write_text("[images]\nconvert_cpus = 7\n")
    monkeypatch.setenv("HPC_WORKSPACE_CONFIG", "~/site.toml")
    settings = load_settings().images
    assert (settings.fetch_on, settings.convert_cpus) == (None, 7)


def test_a_variable_that_names_no_file_is_as_if_it_was_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_CONFIG", "")
    assert load_settings().images.fetch_on is None


def test_the_file_is_where_the_desktop_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_file() == tmp_path / ".config" / "hpc-workspace" / "config.toml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert config_file() == tmp_path / "xdg" / "hpc-workspace" / "config.toml"


def test_settings_do_not_change_under_ones_hands() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().images.fetch_on = "x"


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_PARTITON", "cpu")
    with pytest.raises(ConfigError, match=r"\$HPC_WORKSPACE_SLURM_PARTITON is no setting"):
        load_settings()


def test_every_setting_is_listed_with_its_origin(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('[slurm]\npartition = "cpu"\naccount = "a"\n[workspace]\nconnect = "openssh"\n')
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_ACCOUNT", "b")
    monkeypatch.setenv("HPC_WORKSPACE_SLURM_SETUP", "module load apptainer")
    monkeypatch.setenv("HPC_WORKSPACE_CACHE", "/scratch/sif")
    found = {key: (value, origin) for key, value, origin in load_settings().items()}
    assert found["slurm.partition"] == ("cpu", str(file))
    assert found["slurm.account"] == ("b", "$HPC_WORKSPACE_SLURM_ACCOUNT")
    assert found["slurm.setup"] == (["module load apptainer"], "$HPC_WORKSPACE_SLURM_SETUP")
    assert found["workspace.connect"] == ("openssh", str(file))
    assert found["workspace.cache_dir"] == ("/scratch/sif", "$HPC_WORKSPACE_CACHE")
    assert found["images.fetch_on"] == (None, "default")
