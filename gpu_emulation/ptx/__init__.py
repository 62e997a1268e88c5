"""Interpreter of PTX: the code that nvcc makes of cuda/*.cu runs on a CPU, under checks, against float64.

The library's own host code launches the kernels, since the interpreter is linked in the place of libcudart.
machine.h says which file has what, docs/kernels.md what a finding is. `python -m gpu_emulation.ptx --help`.

    library = gpu_emulation.ptx.library.load("80")         # the C interface of cuda/*.cu, on a CPU's memory
    device = gpu_emulation.ptx.device.Device("80")         # with the memory that it checks
    with device.in_place_of_cuda(): ...            # the project's operators run it for tensors of the CPU
"""
