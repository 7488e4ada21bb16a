"""Dense checkpoint -> sparse checkpoint by the ProSparse method (Song et al., arXiv 2402.13516).

Reads and writes Hugging Face folders; knows nothing of the server or the runtime.
"""
