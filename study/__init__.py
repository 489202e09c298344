"""Measuring: is the concept gone, is everything else still there, and what does an attacker get back?"""
