"""The README's claims, measured: speed against named peers (interleaved, medians), and the method
on many seeds.
"""
