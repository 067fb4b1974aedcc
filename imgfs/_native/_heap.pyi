"""What the C library keeps of the memory that it was given back.  Where it is not glibc all of this
does nothing."""

def limit_arenas(most: int) -> bool:
    """Threads that begin to allocate from now on share so many pools; glibc's own limit is eight a
    processor, and each keeps the most that its threads ever had, in pieces."""

def trim() -> bool:
    """Give whole free pages back to the kernel, of all pools; True: there were some."""
