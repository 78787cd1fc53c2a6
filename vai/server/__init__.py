"""The HTTP server: the OpenAI API over the models of one root. A process of its own, `python -m vai.server`."""
