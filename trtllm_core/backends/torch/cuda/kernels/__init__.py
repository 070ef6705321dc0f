"""Triton kernels, one family a file: the kernel, and the typed function that launches it.

Importing a file of this package imports Triton, which is optional: see ``support.unsupported``. All kernels can run
under Triton's interpreter on the CPU (``TRITON_INTERPRET=1``), which is how their tests run without a GPU.

**Programmatic dependent launch.** Each kernel may start while the one before it in the stream still runs. It reads
what never changes (weights), and then waits for the one before to be complete, memory and all, before it touches
anything else. So a chain of kernels is ordered as always, whatever is launched in between.
"""
