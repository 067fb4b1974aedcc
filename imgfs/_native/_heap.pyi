"""Memory for large reads, and what the C library keeps of the memory that it was given back.  Where
that is not glibc the functions that change it do nothing."""

def uninitialized(length: int) -> bytearray:
    """A new bytearray of which no byte was set: each must be written before any is looked at."""

def keep_large(free: int = 64 << 20) -> bool:
    """Pieces of up to 32 MiB come from the heap from now on, which keeps so many bytes that are free.

    Otherwise each large piece is mapped anew, and the kernel clears its pages, which for what is
    read from a network costs more than receiving it.  For a process that is imgfs's own."""

def limit_arenas(most: int) -> bool:
    """Threads that begin to allocate from now on share so many pools; glibc's own limit is eight a
    processor, and each keeps the most that its threads ever had, in pieces."""

def trim() -> bool:
    """Give whole free pages back to the kernel, of all pools; True: there were some."""
