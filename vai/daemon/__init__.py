"""The daemon room: starts the engine and the server, restarts what dies, knows nothing it could not learn again.

Standard library only. `python -m vai.daemon` runs it; `vai.daemon.client` talks to it.
"""
