"""`hotneuron report`: one dict with every figure, and its tables, Markdown and plots.

What was not measured is None in the dict and "-" in a table, with the command that measures it.
"""
