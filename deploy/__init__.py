"""To use gates elsewhere.

hooks.py    attach gates to the pipelines and networks of diffusers
"""
