"""From options to a spec: what the node program is told, with all resolved that the client's side can resolve."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc_workspace import apptainer, images, toolbox
from hpc_workspace.config import load_settings
from hpc_workspace.errors import ConfigError
from hpc_workspace.images.progress import Tell, as_lines
from hpc_workspace.images.reference import Reference
from hpc_workspace.options import PullPolicy, SlurmOptions, WorkspaceOptions, this_platform
from hpc_workspace.record import Spec

log = logging.getLogger(__name__)


def make_spec(options: WorkspaceOptions, *, slurm: SlurmOptions | None, say: Callable[[str], None]) -> Spec:
    """Check what can be checked here, fetch the image and make the toolbox, here where there is a network.

    Args:
        slurm: None: the node program runs here too, so that paths can be looked at.
        say: told in words how a fetch gets on.

    Raises:
        ConfigError: a path of this machine that is to be mounted is not there; `image` is no image's name.
        ImageError: the image is missing, is none, or can't be fetched.
        PrerequisiteError: there is no runtime here, or the toolbox can't be made.
    """
    on_this_machine = slurm is None
    binds = [*options.extra_bind_mounts, *_binds_of_the_environment()]
    if on_this_machine:
        _require_paths(options.mount_dir, binds, options.encryption_pem)
    if options.image is not None:
        _require_this_platform(options.platform)
    store = images.cache_dir(options.cache_dir)
    return Spec(
        workspace_id=f"ws-{secrets.token_hex(5)}",
        launch_id=secrets.token_hex(8),
        runtime=options.runtime,
        server="bundled" if options.image is not None or options.runtime == "process" else "image",
        image=_resolve_image(options, store, slurm, say),
        toolbox=str(toolbox.ensure_toolbox(store)) if options.image is not None else None,
        working_dir=options.working_dir,
        mount_dir=_absolute(options.mount_dir) if options.mount_dir else None,
        binds=[_with_absolute_source(bind) for bind in binds],
        use_fakeroot=options.use_fakeroot,
        enable_gpu=options.enable_gpu,
        enable_docker_compat=options.enable_docker_compat,
        disable_mount_locations=options.disable_mount_locations,
        writable=options.writable,
        max_processes=options.max_processes,
        verify=_absolute(options.verify) if isinstance(options.verify, str) else options.verify,
        encryption_pem=_absolute(options.encryption_pem) if options.encryption_pem else None,
        extra_ports=options.extra_ports,
        health_check_timeout_s=options.health_check_timeout,
        ends_with_lease=on_this_machine,
        idle_timeout_s=options.idle_timeout,
        may_restart=slurm is not None and slurm.requeue,
    )


def prepare_image(
    options: Mapping[str, Any], *, slurm: SlurmOptions | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """`options` of many workspaces with their image as a path: fetched now and here, and not by each of them.

    Raises: as `make_spec`, for the image and the toolbox.
    """
    checked = WorkspaceOptions(**options)
    store = images.cache_dir(checked.cache_dir)
    path = _resolve_image(checked, store, slurm, say)
    if path is None:
        return dict(options)
    if checked.image is not None:
        toolbox.ensure_toolbox(store)
    others = {name: value for name, value in options.items() if name not in ("image", "server_image", "sif_file")}
    return others | {"image" if checked.image is not None else "sif_file": path}


def _resolve_image(
    options: WorkspaceOptions, store: Path, slurm: SlurmOptions | None, say: Callable[[str], None]
) -> str | None:
    if options.runtime == "process":
        log.warning("runtime='process': no container; commands run as you, on this machine's own files")
        return None
    if slurm is None:
        apptainer.choose_runtime(options.runtime)
    return resolve_image(
        options.image or options.sif_file or _with_scheme(options.server_image),
        runtime=options.runtime,
        store=store,
        platform=options.platform,
        pull_policy=options.pull_policy,
        slurm=slurm,
        tell=as_lines(say),
        say=say,
    )


def resolve_image(
    image: str,
    *,
    runtime: str,
    store: Path,
    platform: str,
    pull_policy: PullPolicy,
    slurm: SlurmOptions | None,
    tell: Tell,
    say: Callable[[str], None],
    here: bool = False,
) -> str:
    """`images.resolve` with the settings that hold: fetched on the partition that they name, unless `here`.

    Args:
        slurm: for the account of a job that fetches.
        say: told the lines that such a job prints.

    Raises: as `images.resolve`; ConfigError: a setting is wrong.
    """
    settings = load_settings().images

    def elsewhere(reference: Reference, platform: str, policy: PullPolicy) -> None:
        from hpc_workspace.launch import transfer

        arguments = ["images", "pull", "--here", f"--store={store}", f"--platform={platform}"]
        arguments += [f"--runtime={runtime}", f"--pull-policy={policy}", "--", str(reference)]
        transfer.run_on_partition(settings, slurm, arguments, say)

    return images.resolve(
        image,
        runtime=runtime,
        store=store,
        platform=platform,
        pull_policy=pull_policy,
        settings=settings,
        tell=tell,
        elsewhere=elsewhere if settings.fetch_on is not None and not here else None,
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _binds_of_the_environment() -> list[str]:
    """Bind mounts from the variable that OpenHands' ApptainerWorkspace (1.58) reads: comma-separated."""
    said = os.environ.get("OPENHANDS_APPTAINER_EXTRA_BINDS", "")
    return [bind.strip() for bind in said.split(",") if bind.strip()]


def _with_absolute_source(bind: str) -> str:
    """A bind mount whose source does not depend on where the container is started; its target stays."""
    source, colon, rest = bind.partition(":")
    return bind if source.startswith("/") else f"{_absolute(source)}{colon}{rest}"


def _require_paths(mount_dir: str | None, binds: list[str], encryption_pem: str | None) -> None:
    """Make sure that what is to be mounted on this machine is there, before anything starts.

    Raises:
        ConfigError: it is not; it names the option.
    """
    if mount_dir is not None and not Path(_absolute(mount_dir)).is_dir():
        raise ConfigError(
            f"mount_dir {mount_dir} is not a directory.", option="mount_dir", remedy="Make it first, or leave it out."
        )
    for source in (bind.partition(":")[0] for bind in binds):
        if not Path(_absolute(source)).exists():
            raise ConfigError(f"extra_bind_mounts: {source} does not exist.", option="extra_bind_mounts")
    if encryption_pem is not None and not Path(_absolute(encryption_pem)).is_file():
        raise ConfigError(f"encryption_pem {encryption_pem} is not a file.", option="encryption_pem")


def _require_this_platform(platform: str) -> None:
    """Raises: ConfigError: the server that is brought along does not run there."""
    if platform.split("/")[:2] != this_platform().split("/"):
        raise ConfigError(
            f"image= brings along the server of this machine, which is {this_platform()} and not {platform}.",
            option="platform",
            remedy="Start it from a machine of that kind, or use an image that holds a server (server_image).",
        )


def _with_scheme(server_image: str | None) -> str:
    assert server_image is not None
    return server_image if "://" in server_image else f"docker://{server_image}"
