"""An OpenHands conversation in an Apptainer container: here, or with --slurm on a compute node.

    pip install 'hpc-workspace[openhands]'
    export LLM_API_KEY=…  LLM_MODEL=openai/gpt-5-mini
    python examples/07_convo_with_apptainer_sandboxed_server.py agent-server.sif
    python examples/07_convo_with_apptainer_sandboxed_server.py agent-server.sif --slurm --partition cpu

The image holds OpenHands' agent server: a SIF file, or a reference such as
ghcr.io/openhands/agent-server:latest-python. The model is called from where the agent server runs. One that only this
machine can reach (LLM_BASE_URL=http://127.0.0.1:8000/v1) is brought into the workspace.
"""

import argparse
import os
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from openhands.sdk import LLM, Agent, Conversation, Event, Tool
from openhands.tools.file_editor import FileEditorTool
from openhands.tools.terminal import TerminalTool
from pydantic import SecretStr

from hpc_workspace import SlurmOptions
from hpc_workspace.integrations.openhands import HpcWorkspace

TASK = "Count the lines of /workspace/notes.txt, and write the number to /workspace/count.txt."


def model_of(workspace: HpcWorkspace) -> LLM:
    """The model that the environment names, at an address that holds inside the workspace."""
    base_url = os.environ.get("LLM_BASE_URL")
    if base_url is not None:
        asked = urlsplit(base_url)
        if asked.hostname in ("127.0.0.1", "localhost") and asked.port is not None:
            base_url = workspace.reverse(asked.port).url + asked.path
    return LLM(
        model=os.environ.get("LLM_MODEL", "openai/gpt-5-mini"),
        api_key=SecretStr(os.environ["LLM_API_KEY"]),
        base_url=base_url,
        usage_id="agent",
    )


def show(event: Event) -> None:
    print(f"  {type(event).__name__} from {event.source}")


def main() -> None:
    parser = argparse.ArgumentParser(description="An OpenHands conversation in an Apptainer container.")
    parser.add_argument("image", help="SIF file or reference of an image that holds OpenHands' agent server")
    parser.add_argument("--slurm", action="store_true", help="on a compute node, in a batch job")
    parser.add_argument("--partition", help="of Slurm")
    arguments = parser.parse_args()

    kind = "sif_file" if arguments.image.endswith(".sif") else "server_image"
    slurm = SlurmOptions(partition=arguments.partition, time="00:30:00", mem="2G") if arguments.slurm else None

    # 1. The workspace: it runs when the constructor returns, and leaves nothing when the block ends.
    with HpcWorkspace(**{kind: arguments.image}, slurm=slurm) as workspace:
        where = f"job {workspace.job} on {workspace.node}" if workspace.job else workspace.node
        print(f"workspace {workspace.id}: {where}")

        # 2. Files go in.
        with tempfile.TemporaryDirectory() as folder:
            notes = Path(folder, "notes.txt")
            notes.write_text("one\ntwo\nthree\n")
            sent = workspace.file_upload(notes, "/workspace/notes.txt")
            print(f"uploaded {sent.file_size} bytes")

            # 3. The agent works.
            agent = Agent(llm=model_of(workspace), tools=[Tool(name=TerminalTool.name), Tool(name=FileEditorTool.name)])
            conversation = Conversation(agent=agent, workspace=workspace, callbacks=[show], visualizer=None)
            try:
                conversation.send_message(TASK)
                conversation.run()
                print(f"conversation {conversation.state.execution_status.value}")
            finally:
                conversation.close()

            # 4. Files, and what commands print, come out.
            count = Path(folder, "count.txt")
            workspace.file_download("/workspace/count.txt", count)
            print(f"count.txt: {count.read_text().strip()}")
        print(workspace.execute_command("ls /workspace").stdout.strip())
    print("nothing is left")


if __name__ == "__main__":
    main()
