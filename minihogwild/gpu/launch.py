"""Kernels one behind the other without a gap ("programmatic dependent launch", from compute capability 9.0 on).

A kernel is started while the one before it still runs, and itself waits until that has ended: so the microsecond or two
that a start takes costs nothing. All kernels here begin with `wait_for_predecessor`; none reads or writes before it.
"""

import torch
import triton
import triton.language as tl

IS_THERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
STARTS_EARLY = tl.constexpr(IS_THERE)
OVERLAPPING = {"launch_pdl": True} if IS_THERE else {}  # goes with each launch


@triton.jit
def wait_for_predecessor():
    if STARTS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # the next kernel may start now
