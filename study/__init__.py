"""Measuring what erasers do.

evaluate.py    what is in pictures, and how far they moved
attacks.py     inputs that bring an erased concept back; victim.py, learned_words.py, sentences.py: their parts
variants.py    other nonlinearities in the place of the gate
scenarios.py   what is erased, and the pictures that are judged
methods.py     every eraser with its settings, as the comparison runs it
compare.py     the table: every eraser in every scenario
"""
