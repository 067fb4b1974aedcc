#include "crc32c.h"

#include <pthread.h>
#include <string.h>

#define POLYNOMIAL UINT32_C(0x82f63b78)   /* bits reversed */

/* ---- by a table: slicing by 8 ---- */

static uint32_t table[8][256];
static pthread_once_t table_once = PTHREAD_ONCE_INIT;

static void make_table(void)
{
	unsigned i, j;

	for (i = 0; i < 256; i++) {
		uint32_t crc = i;

		for (j = 0; j < 8; j++)
			crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
		table[0][i] = crc;
	}
	for (i = 0; i < 256; i++)
		for (j = 1; j < 8; j++)
			table[j][i] = table[j - 1][i] >> 8 ^ table[0][table[j - 1][i] & 0xff];
}

uint32_t crc32c_table(uint32_t crc, const void *bytes, size_t n)
{
	const unsigned char *at = bytes;

	pthread_once(&table_once, make_table);
	crc = ~crc;
	for (; n >= 8; n -= 8, at += 8) {
		crc ^= at[0] | (uint32_t)at[1] << 8 | (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
		crc = table[7][crc & 0xff] ^ table[6][crc >> 8 & 0xff] ^
		      table[5][crc >> 16 & 0xff] ^ table[4][crc >> 24] ^ table[3][at[4]] ^
		      table[2][at[5]] ^ table[1][at[6]] ^ table[0][at[7]];
	}
	while (n--)
		crc = crc >> 8 ^ table[0][(crc ^ *at++) & 0xff];
	return ~crc;
}

/* ---- by the processor ---- */

#if defined(__x86_64__)

#define HAS_INSTRUCTION 1
#define WITH_INSTRUCTION __attribute__((target("sse4.2")))
#define step64(crc, word) ((uint32_t)__builtin_ia32_crc32di((crc), (word)))
#define step8(crc, byte) __builtin_ia32_crc32qi((crc), (byte))

static int has_instruction(void)
{
	return __builtin_cpu_supports("sse4.2");
}

#elif defined(__aarch64__) && defined(__linux__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__

#include <sys/auxv.h>

#define HAS_INSTRUCTION 1
#define WITH_INSTRUCTION __attribute__((target("+crc")))
#define step64(crc, word) __builtin_aarch64_crc32cx((crc), (word))
#define step8(crc, byte) __builtin_aarch64_crc32cb((crc), (byte))

static int has_instruction(void)
{
	return (getauxval(AT_HWCAP) & (1ul << 7)) != 0;   /* HWCAP_CRC32 */
}

#endif

#ifdef HAS_INSTRUCTION

static uint64_t word_at(const unsigned char *at)
{
	uint64_t word;

	memcpy(&word, at, sizeof(word));
	return word;
}

WITH_INSTRUCTION static uint32_t by_instruction(uint32_t crc, const unsigned char *at, size_t n)
{
	crc = ~crc;
	for (; n >= 8; n -= 8, at += 8)
		crc = step64(crc, word_at(at));
	while (n--)
		crc = step8(crc, *at++);
	return ~crc;
}

WITH_INSTRUCTION static void three_by_instruction(uint32_t crcs[3], const unsigned char *a,
						  const unsigned char *b, const unsigned char *c,
						  size_t n)
{
	uint32_t x = ~crcs[0], y = ~crcs[1], z = ~crcs[2];
	size_t i;

	for (i = 0; i + 8 <= n; i += 8) {
		x = step64(x, word_at(a + i));
		y = step64(y, word_at(b + i));
		z = step64(z, word_at(c + i));
	}
	for (; i < n; i++) {
		x = step8(x, a[i]);
		y = step8(y, b[i]);
		z = step8(z, c[i]);
	}
	crcs[0] = ~x;
	crcs[1] = ~y;
	crcs[2] = ~z;
}

#endif

uint32_t crc32c(uint32_t crc, const void *bytes, size_t n)
{
#ifdef HAS_INSTRUCTION
	if (has_instruction())
		return by_instruction(crc, bytes, n);
#endif
	return crc32c_table(crc, bytes, n);
}

void crc32c_three(uint32_t crcs[3], const void *const bytes[3], size_t n)
{
	unsigned i;

#ifdef HAS_INSTRUCTION
	if (has_instruction()) {
		three_by_instruction(crcs, bytes[0], bytes[1], bytes[2], n);
		return;
	}
#endif
	for (i = 0; i < 3; i++)
		crcs[i] = crc32c_table(crcs[i], bytes[i], n);
}
