"""Few-step diffusion distillation: DMD, DMD2 and GDD, from training to serving.

Importing the package imports nothing heavy; take what you need from its modules.
"""

__version__ = "0.1.0"
