"""The bundled agent server: commands, files and git over HTTP, in the shape of OpenHands' agent server 1.58.

Run as `python -m hpc_workspace.server`. It needs the standard library, starlette, uvicorn and what they bring, and no
other part of this package: inside a container there is nothing but the toolbox.

Deliberately not here: conversations, tools, VSCode; and any decision who may reach the socket (the node's door).
"""
