"""To use an erased model elsewhere.

bake.py     the erasure moves from the gates into the text encoder's own weights; targets.py: its prompts
export.py   an erased model as one file in the original layout
hooks.py    gates on the U-Net of another library's pipeline
"""
