"""The program in the job: starts the container, keeps the door, publishes the record, and ends everything.

It meets the client side in the workspace directory (`rendezvous`) and at the door (`exchange`), nowhere else.
"""
