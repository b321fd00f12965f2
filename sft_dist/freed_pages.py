"""Keep the pages of freed tensors: on a CPU a step frees and allocates the same megabytes again and again."""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
LARGEST_INT = 2**31 - 1


def keep_freed_pages() -> bool:
    """Make glibc hand freed memory to the next allocation instead of giving its pages back to the kernel.

    The kernel clears a page before it hands it out again, and each first touch is a fault: six products of 8 MB
    took 43 ms with fresh pages and 5 ms with kept ones. What is free at this moment, as reading the weights leaves it,
    is given back first; what the process has at its peak from here on it keeps until it ends.
    Returns False, and changes nothing, where the C library has no such switches.
    """
    library = ctypes.CDLL(None)
    mallopt, malloc_trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if mallopt is None or malloc_trim is None:
        return False
    malloc_trim(0)
    # Without the first, the top of the heap is given back; without the second, large blocks never come from the heap.
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST_INT) and mallopt(M_MMAP_MAX, 0))
