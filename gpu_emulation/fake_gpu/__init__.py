"""A GPU on a machine without one: the paths of a CUDA device, counted without numbers or run with them.

fake_cuda.cpp is a stub of torch's CUDA device guard and hooks. Loaded before torch, it lets torch's CPU wheel
have tensors on cuda:0 and cuda:1. So the Python code of a GPU runs: what is on the wrong device raises as it
would there.

With numbers (numbers.cpp, on_cuda.py) a tensor has its values in the CPU's memory, and every operator runs
the CPU's kernel. ../test_cuda_runs.py compares what train.py makes there with what it makes on the CPU.

Without (device.py) they are FakeTensors, of any size: launches, waits for the device, copies, dtypes and
memory are counted.

    python -m gpu_emulation.fake_gpu            run all cases (cases.py), print what differs from table.json
    python -m gpu_emulation.fake_gpu --cases "step miss v?"     only these
    python -m gpu_emulation.fake_gpu --write    ... and write the table anew

../test_fake_gpu.py runs the same in a process of its own, so that no other test meets the stub.
What it cannot show: docs/kernels.md.
"""
