/* CRC-32C (RFC 3720, appendix B.4), by the processor's own instruction where it has one. */
#ifndef IMGFS_CRC32C_H
#define IMGFS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Go on with `crc`, which is 0 to begin with. */
uint32_t crc32c(uint32_t crc, const void *bytes, size_t n);
/* The same of three buffers of one length at once: the instruction has a latency of three cycles. */
void crc32c_three(uint32_t crcs[3], const void *const bytes[3], size_t n);
/* Without the instruction. */
uint32_t crc32c_table(uint32_t crc, const void *bytes, size_t n);

#endif
