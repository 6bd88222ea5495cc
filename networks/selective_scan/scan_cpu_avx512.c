/* The scan with AVX-512: vectors of sixteen, and a table of sixteen in a register for the
 * exponential. The vectors stay whole whatever width the compiler's tuning prefers. */
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,fma,prefer-vector-width=512")
#endif
#define ISA avx512
#define MAX(a, b) _mm512_max_ps(a, b)
#define MIN(a, b) _mm512_min_ps(a, b)
#define VL 16
#define NB 16
#define TABLE_EXP2
#include "scan_cpu_forward.h"
#include "scan_cpu_backward.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
