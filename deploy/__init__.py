"""To use gates elsewhere.

hooks.py    attach gates to the pipelines and networks of diffusers
erase.py    erase(pipe, "Brad Pitt"): solve for gates with a pipeline's own encoders, and attach them
"""
