"""OpenHands' conversations in our workspaces: the real SDK, the real agent server, a scripted model on the client's side."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import REPO
from tests.integration.cluster import PRELUDE, SERVER, TOLD, Cluster

pytestmark = pytest.mark.cluster

USER, VENV = "tester", "venv-openhands"
MODEL = (REPO / "tests/scripted_model.py").read_text().partition("\ndef main")[0]
EXAMPLE = (REPO / "examples/07_convo_with_apptainer_sandboxed_server.py").read_text()
# What pieces of Python that hold conversations begin with.
TALK = f"""{MODEL}
{PRELUDE}
import logging, pickle, tempfile
import httpx
from pydantic import SecretStr
from hpc_workspace.integrations.openhands import HpcWorkspace
from openhands.sdk import LLM, Agent, Conversation, Tool
from openhands.sdk.conversation.impl.remote_conversation import RemoteConversation
from openhands.tools.terminal import TerminalTool
logging.disable(logging.WARNING)
SLURM = dict(partition="cpu", time="10", mem="2G")
def options(node=None, **more):
    slurm = SlurmOptions(**SLURM, nodelist=node) if node else None
    return dict(sif_file=SERVER, slurm=slurm, health_check_timeout=600) | more
def run(command):
    return {{"call": "terminal", "with": {{"command": command}}}}
FINISH = {{"call": "finish", "with": {{"message": "all done"}}}}
def agent_for(w, model):
    llm = LLM(model="openai/scripted", base_url=w.reverse(model.port).url + "/v1", api_key=SecretStr("none"),
              usage_id="agent", retry_min_wait=1, retry_max_wait=2)
    return Agent(llm=llm, tools=[Tool(name=TerminalTool.name)])
def steps_of(w):
    return w.execute_command("cat /workspace/steps").stdout
def timed(call):
    began = time.monotonic()
    call()
    return time.monotonic() - began
"""


@pytest.fixture(scope="module")
def venv(cluster: Cluster) -> str:
    """The bin directory of a virtual environment of the nodes that has the extra."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(REPO)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        cluster.call("install", folder, "--extra", "openhands", "--venv", VENV)
    return f"/shared/{VENV}/bin"


@pytest.fixture(autouse=True)
def _nothing_left(cluster: Cluster) -> Iterator[None]:
    yield
    assert cluster.leftovers() == {}


def python(
    cluster: Cluster, venv: str, node: str, code: str, *, arguments: tuple[str, ...] = (), timeout_s: float = 300
) -> str:
    """What a piece of Python in a node prints. One that fails fails the test."""
    command = ["env", "OPENHANDS_SUPPRESS_BANNER=1", f"{venv}/python", "-c", code, *arguments]
    ended = cluster.run(node, command, user=USER, timeout_s=timeout_s)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def tell(cluster: Cluster, venv: str, node: str, code: str, **more: Any) -> dict[str, Any]:
    """What a piece of Python in a node tells; `TALK` stands before it."""
    told: dict[str, Any] = {}
    for line in python(cluster, venv, node, TALK + code, **more).splitlines():
        if line.startswith(TOLD):
            told |= json.loads(line.removeprefix(TOLD))
    return told


@pytest.mark.parametrize(
    ("node", "arguments"),
    [pytest.param("n03", (), marks=pytest.mark.long), ("login", ("--slurm", "--partition", "cpu"))],
)
def test_the_seeds_complete_example_runs(cluster: Cluster, venv: str, node: str, arguments: tuple[str, ...]) -> None:
    script = [
        {"call": "terminal", "with": {"command": "wc -l < /workspace/notes.txt"}},
        {"call": "file_editor", "with": {"command": "create", "path": "/workspace/count.txt", "file_text": "3\n"}},
        {"call": "finish", "with": {"message": "There are 3."}},
    ]
    code = f"""{MODEL}
import os
model = ScriptedModel(json.loads({json.dumps(script)!r}))
os.environ |= {{"LLM_API_KEY": "none", "LLM_MODEL": "openai/scripted"}}
os.environ["LLM_BASE_URL"] = f"http://127.0.0.1:{{model.port}}/v1"
exec(compile({EXAMPLE!r}, "example", "exec"), {{"__name__": "__main__"}})
"""
    said = python(cluster, venv, node, code, arguments=(SERVER, *arguments)).splitlines()
    assert "uploaded 14 bytes" in said
    assert "conversation finished" in said
    assert "count.txt: 3" in said
    assert said[-1] == "nothing is left"
    assert any(("job " in line) == bool(arguments) for line in said if line.startswith("workspace ws-"))


def test_a_conversation_beside_another_class_and_proxies_closes_at_once(cluster: Cluster, venv: str) -> None:
    """A second class of OpenHands', and a proxy for everything in the environment."""
    code = """
import socket, threading
from openhands.sdk.workspace import RemoteWorkspace
class ApptainerWorkspace(RemoteWorkspace):
    "As upstream's, imported beside ours."
proxy, asked = socket.create_server(("127.0.0.1", 0)), []
def refuse():
    while True:
        connection = proxy.accept()[0]
        with connection:
            asked.append(connection.recv(65536).decode("latin-1"))
threading.Thread(target=refuse, daemon=True).start()
os.environ |= dict.fromkeys(["http_proxy", "HTTPS_PROXY", "all_proxy"], f"http://127.0.0.1:{proxy.getsockname()[1]}")
model, seen = ScriptedModel([run("echo one >> /workspace/steps"), FINISH]), []
with HpcWorkspace(**options()) as w:
    conversation = Conversation(agent=agent_for(w, model), workspace=w, visualizer=None, callbacks=[seen.append])
    conversation.send_message("Do it.")
    conversation.run()
    tell(status=conversation.state.execution_status.value, steps=steps_of(w), alive=w.alive, said=repr(w) + str(w),
         key=w.api_key, dumped=w.model_dump_json(), seen=len(seen), closing=timed(conversation.close))
    missing = w.file_download("/workspace/nosuch", "/tmp/nosuch")
    tell(missing=[missing.success, missing.error], sent=w.file_upload(b"12345", "/workspace/five").file_size)
    try:
        httpx.get("http://elsewhere.example/")  # the proxy is in force
    except httpx.HTTPError:
        pass
tell(after=w.alive, proxied="".join(asked))
"""
    told = tell(cluster, venv, "n03", code)
    assert (told["status"], told["steps"], told["alive"], told["after"]) == ("finished", "one\n", True, False)
    assert told["seen"] > 0
    assert told["closing"] < 1
    assert told["key"] not in told["said"] + told["dumped"] + told["proxied"]
    assert "elsewhere.example" in told["proxied"]
    assert "127.0.0.1" not in told["proxied"]
    assert told["missing"][0] is False
    assert told["sent"] == 5


def test_a_cut_tunnel_in_the_middle_of_a_conversation_repeats_no_step(cluster: Cluster, venv: str) -> None:
    """Cut twice: while the agent's command runs, and while the model is asked."""
    code = """
import threading
asked, answer = threading.Event(), threading.Event()
def on_question(position):
    if position == 2 and not asked.is_set():
        asked.set()
        answer.wait(60)
def cut(node):
    subprocess.run(["ssh", "-o", "BatchMode=yes", node, "pkill -KILL -u $(id -u) -x sshd-session"])
folder = Path(tempfile.mkdtemp(dir=Path.home()))
wait = "echo one >> /workspace/steps; until [ -e /workspace/go ]; do sleep 0.1; done"
model = ScriptedModel([run(wait), run("echo two >> /workspace/steps"), run("echo three >> /workspace/steps"), FINISH],
                      on_question)
seen = []
with HpcWorkspace(**options("n03", mount_dir=str(folder), connect="paramiko")) as w:
    conversation = Conversation(agent=agent_for(w, model), workspace=w, visualizer=None, callbacks=[seen.append])
    conversation.send_message("Do it.")
    running = threading.Thread(target=conversation.run)
    running.start()
    w.execute_command("until [ -e /workspace/steps ]; do sleep 0.05; done", timeout=60)
    cut(w.node)
    (folder / "go").touch()
    asked.wait(60)
    cut(w.node)
    answer.set()
    running.join()
    kinds = [type(event).__name__ for event in conversation.state.events]
    tell(status=conversation.state.execution_status.value, steps=(folder / "steps").read_text(), kinds=kinds,
         seen=len(seen), unique=len({event.id for event in seen}),
         missed=[type(e).__name__ for e in conversation.state.events if e.id not in {s.id for s in seen}],
         closing=timed(conversation.close))
import shutil
shutil.rmtree(folder, ignore_errors=True)
"""
    told = tell(cluster, venv, "login", code)
    assert (told["status"], told["steps"]) == ("finished", "one\ntwo\nthree\n")
    assert told["kinds"].count("ActionEvent") == told["kinds"].count("ObservationEvent") == 4
    assert told["missed"] == []
    assert told["seen"] == told["unique"]
    assert told["closing"] < 1


@pytest.mark.long
def test_a_second_process_attaches_to_workspace_and_conversation(cluster: Cluster, venv: str) -> None:
    """And a secret that the agent server keeps reaches the agent's commands, by its name alone."""
    second = """
workspace_id, conversation_id = sys.argv[1:]
import uuid
w = HpcWorkspace.attach(workspace_id)
conversation = RemoteConversation.attach(w, uuid.UUID(conversation_id), visualizer=None)
conversation.send_message("Again.")
conversation.run()
kinds = [type(event).__name__ for event in conversation.state.events]
tell(messages=kinds.count("MessageEvent"), status=conversation.state.execution_status.value)
conversation.close()
w.detach()
"""
    code = f"""
model = ScriptedModel([run("echo one $(echo $PASS | rev) >> /workspace/steps"), FINISH,
                       run("echo two >> /workspace/steps"), FINISH])
with HpcWorkspace(**options("n03")) as w:
    w.client.put("/api/settings/secrets", json={{"name": "PASS", "value": "drowssap"}}).raise_for_status()
    conversation = Conversation(agent=agent_for(w, model), workspace=w, visualizer=None, delete_on_close=False)
    conversation.update_secrets(w.get_secrets())
    conversation.send_message("Do it.")
    conversation.run()
    argv = [sys.executable, "-c", {(TALK + second)!r}, w.id, str(conversation.id)]
    print(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout, flush=True)
    tell(steps=steps_of(w), here=conversation.state.execution_status.value)
    again = pickle.loads(pickle.dumps(w))
    tell(pickled=[again.id == w.id, again.execute_command("echo hi").stdout])
    again.workspace.disconnect()
    conversation.close()
"""
    told = tell(cluster, venv, "login", code)
    assert (told["messages"], told["status"], told["here"]) == (2, "finished", "finished")
    assert told["steps"] == "one password\ntwo\n"
    assert told["pickled"] == [True, "hi\n"]


@pytest.mark.long
def test_a_job_that_is_requeued_under_a_conversation_ends_its_run_and_says_so(cluster: Cluster, venv: str) -> None:
    code = """
import threading
from openhands.sdk.conversation.exceptions import ConversationRunError
SLURM |= {"partition": "low", "requeue": True}
model = ScriptedModel([run("touch /workspace/begun; sleep 600"), FINISH])
def requeue(w):
    subprocess.run(["scontrol", "requeue", w.job], check=True)
    waits = f"until squeue -h -j {w.job} -t PD | grep -q .; do sleep 0.1; done"
    subprocess.run(["sh", "-c", f"{waits}; scontrol update JobId={w.job} StartTime=now+3"], check=True)
with HpcWorkspace(**options("n03")) as w:
    conversation = Conversation(agent=agent_for(w, model), workspace=w, visualizer=None)
    conversation.send_message("Do it.")
    ended = []
    def converse():
        try:
            conversation.run()
        except ConversationRunError as error:
            ended.append(error)
    running = threading.Thread(target=converse)
    running.start()
    w.execute_command("until [ -e /workspace/begun ]; do sleep 0.05; done", timeout=60)
    requeue(w)
    running.join()
    cause = ended[0].__cause__
    tell(kind=type(cause).__name__, said=str(ended[0]), cause=str(cause), closing=timed(conversation.close),
         goes_on=w.execute_command("ls /workspace").stdout)
"""
    told = tell(cluster, venv, "login", code)
    assert told["kind"] == "SandboxRestarted"
    assert "Slurm requeued job" in told["cause"]
    assert "Slurm requeued job" in told["said"]
    assert told["goes_on"] == ""
    assert told["closing"] < 1


@pytest.mark.long
def test_ten_conversations_at_once_on_two_nodes_all_finish(cluster: Cluster, venv: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
SLURM = SLURM | {"mem": "1G"}
model = ScriptedModel([run("hostname >> /workspace/steps")] * 3 + [FINISH])
def converse(number):
    with HpcWorkspace(**options(("n02", "n03")[number % 2])) as w:
        conversation = Conversation(agent=agent_for(w, model), workspace=w, visualizer=None)
        conversation.send_message("Do it.")
        conversation.run()
        said = [conversation.state.execution_status.value, steps_of(w) == 3 * (w.node + "\\n")]
        conversation.close()
        return said
with ThreadPoolExecutor(10) as pool:
    tell(all=list(pool.map(converse, range(10))))
"""
    assert tell(cluster, venv, "login", code, timeout_s=580)["all"] == [["finished", True]] * 10


# The seed's own, but for the import line and the image.
SNIPPETS = {
    "server_image": """
# Use a pre-built agent server image
with ApptainerWorkspace(
    server_image="ghcr.io/openhands/agent-server:latest-python",
    host_port=8010,
) as workspace:
    result = workspace.execute_command("echo 'Hello from Apptainer!'")
    print(result.stdout)
""",
    "sif_file": """
# Use an existing Apptainer SIF file
with ApptainerWorkspace(
    sif_file="/path/to/your/agent-server.sif",
    host_port=8010,
) as workspace:
    result = workspace.execute_command("ls -la")
    print(result.stdout)
""",
    "mount_dir": """
# Mount a host directory into the container
with ApptainerWorkspace(
    server_image="ghcr.io/openhands/agent-server:latest-python",
    host_port=8010,
    mount_dir="/path/to/host/directory",
) as workspace:
    result = workspace.execute_command("ls /workspace")
    print(result.stdout)
""",
}
IMPORTS = {
    "ours": "from hpc_workspace import ApptainerWorkspace",
    "openhands": "from hpc_workspace.integrations.openhands import HpcWorkspace as ApptainerWorkspace",
}
PLACES = {
    "ghcr.io/openhands/agent-server:latest-python": "login:5000/agent-server:latest",
    "/path/to/your/agent-server.sif": SERVER,
    "/path/to/host/directory": "/shared/images",
}
QUIET = 'import logging, os\nos.environ["HPC_WORKSPACE_IMAGES_PLAIN_HTTP"] = "login:5000"\n'


def snippet(name: str, imports: str) -> str:
    code = SNIPPETS[name]
    for given, here in PLACES.items():
        code = code.replace(given, here)
    return f"{QUIET}{IMPORTS[imports]}\nlogging.disable(logging.WARNING)\n{code}"


@pytest.mark.long
@pytest.mark.parametrize("imports", IMPORTS)
@pytest.mark.parametrize(
    ("name", "said"),
    [("server_image", "Hello from Apptainer!"), ("sif_file", "total"), ("mount_dir", "agent-server.sif")],
)
def test_a_snippet_of_the_seed_runs(cluster: Cluster, venv: str, imports: str, name: str, said: str) -> None:
    assert said in python(cluster, venv, "n03", snippet(name, imports), timeout_s=600)


TROUBLES = {
    "Apptainer is not available": ('os.environ["PATH"] = "/nowhere"', "sif_file"),
    "Port 8010 is not available": (
        'import socket; taken = socket.create_server(("127.0.0.1", 8010))',
        "sif_file",
    ),
    "Failed to pull and convert Docker image": ("pass", "server_image"),
}


@pytest.mark.parametrize("imports", IMPORTS)
@pytest.mark.parametrize("text", TROUBLES)
def test_a_trouble_of_the_seed_is_a_runtime_error_with_its_text(
    cluster: Cluster, venv: str, imports: str, text: str
) -> None:
    trouble, name = TROUBLES[text]
    code = snippet(name, imports).replace("agent-server:latest", "nosuch:latest")
    lines = "\n".join(f"    {line}" for line in code.splitlines())
    code = f"import os\n{trouble}\ntry:\n{lines}\nexcept RuntimeError as error:\n    print('said:', error)\n"
    assert f"said: {text}" in python(cluster, venv, "n03", code)
