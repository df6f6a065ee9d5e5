"""Few-step diffusion distillation: DMD, DMD2 and GDD, from training to serving.

Importing the package imports nothing heavy; take what you need from its modules.
"""

import os

__version__ = "0.1.0"

# Torch's threads (by GNU's OpenMP, which reads this when torch is loaded) wait for each other in a loop, by default
# for milliseconds: two processes on the same cores then lose two thirds of their time by it. See docs/benchmarks.md.
if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"
