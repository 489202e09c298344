"""To use an erased model elsewhere.

hooks.py    attach gates to the pipelines and networks of diffusers
erase.py    solve for gates with a pipeline's own text encoders, and attach them: one call
bake.py     the erasure moves from the gates into the text encoder's own weights; targets.py: its prompts
export.py   an erased model as one file in the original layout
"""
