"""The experiments of the papers, driven by the notebooks beside this folder; clkit knows nothing of them."""
