"""Many streams over one pair of byte pipes, for sites that let one command through and nothing else.

`frames` is the bytes, `session` what they mean, both without a socket, a thread or a clock; `streams` is the client's
side, for many threads. The node's side is `hpc_workspace.node.bridge`.
"""
