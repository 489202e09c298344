"""Measuring: is the concept gone, is everything else still there, and what does an attacker get back?

evaluate.py  what CLIP sees in pictures: recognition, CLIP score, CMMD, intervals; of a folder, too
attacks.py   what all attacks share, and those that reach the keys and values
searches.py  attacks that search words, through the text encoder and the U-Net
world.py     what is erased, and which pictures are drawn to see it
erased.py    the rows of the table: every eraser with its settings
compare.py   one cell of the table, and the table
"""
