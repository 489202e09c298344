"""To use an erased model elsewhere.

hooks.py    attach gates to the pipelines and networks of diffusers
bake.py     the erasure moves from the gates into the text encoder's own weights; targets.py: its prompts
export.py   an erased model as one file in the original layout
"""
