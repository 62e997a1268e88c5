"""A GPU that computes nothing: every path of a CUDA device, on a machine without one.

fake_cuda.cpp is a stub of torch's CUDA device guard and hooks. Loaded before torch, it lets torch's CPU wheel
hold, move and differentiate FakeTensors on cuda:0 and cuda:1. These have a shape, a dtype and a device but no
numbers. So the Python code of a GPU runs: what is on the wrong device raises as it would there. Launches,
waits for the device, copies, dtypes and memory are counted.

    python -m tests.fake_gpu            run all cases (cases.py) and print what they differ in from table.json
    python -m tests.fake_gpu --cases "step miss v?"     only these
    python -m tests.fake_gpu --write    ... and write the table anew

tests/test_fake_gpu.py runs the same in a process of its own, so that no other test meets the stub.
What it cannot show: docs/kernels.md.
"""
