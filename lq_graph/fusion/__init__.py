"""Fusion: fewer kernels around the quantized layers of a graph.

    table.py      every fusion, in the order in which they run
    options.py    which of them run
    editor.py     a graph under change: reading nodes, adding them, and the record of what was done
    passes.py     runs the table over a graph
    torchair.py   has torchair run it in each graph that holds our layers

and a file for each family of fusions.
"""
