"""Our kernels for CPUs with AVX-512, in C++, compiled once on the machine that uses them; torch computes everywhere else."""
